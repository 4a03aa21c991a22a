"""The chaos suite in its short form: each kind of kill once under load. `make chaos` does it at length."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.chaos.arena import torment
from tests.chaos.faults import Fault
from tests.chaos.outcome import Outcome
from tests.chaos.report import summary
from tests.chaos.scene import Size
from tests.chaos.swarm import Plan, swarm

FAULTS: list[Fault] = ["worker-killed", "worker-frozen", "orchestrator-killed", "gateway-killed", "leader-killed"]


def test_whatever_is_killed_under_load_no_job_is_lost_and_no_token_comes_twice(tmp_path: Path) -> None:
    size = Size(streams=2, strikes=1, at_once=5, pieces_between=30, tokens=36)
    outcomes: list[Outcome] = []
    with swarm(tmp_path, Plan()) as found:
        trio.run(torment, found, FAULTS, 1, size, print, outcomes)
    assert len(outcomes) == len(FAULTS)
    for outcome in outcomes:
        assert summary(outcome)["findings"] == []
        assert outcome.injections
