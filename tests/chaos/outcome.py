"""What a fault did: when it was made, what clients saw, what was wrong, how long they waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.chaos.checker import Finding
from tests.chaos.faults import Fault
from tests.chaos.history import STREAMED, History

PAUSE_WINDOW_SECONDS = 0.5
"""What was on its way when a fault was made still arrives for so long."""


class Injection(NamedTuple):
    """A fault that was made."""

    at: float
    target: str


class Outcome(NamedTuple):
    """What a fault did."""

    fault: Fault
    engine: str
    injections: Sequence[Injection]
    histories: Sequence[History]
    findings: Sequence[Finding]
    seconds: float
    facts: Mapping[str, str] = {}
    """What else was measured, by what it is."""

    @property
    def num_hit(self) -> int:
        """Streams that were open while a fault was made, and felt it if it was their worker's."""
        return len(self.pauses)

    @property
    def pauses(self) -> list[float]:
        """The longest silence of each stream that a fault hit, shortest first."""
        found = []
        for history in self.histories:
            pauses = [pause for each in self.injections if (pause := self._pause(history, each)) is not None]
            if pauses:
                found.append(max(pauses))
        return sorted(found)

    def _pause(self, history: History, injection: Injection) -> float | None:
        if history.kind not in STREAMED:
            return None
        if self.fault.startswith("worker-") and history.worker_at(injection.at) != injection.target:
            return None
        return history.pause_after(injection.at, PAUSE_WINDOW_SECONDS)

    def count(self, *wrongs: str) -> int:
        """Return how many findings are of these kinds."""
        return sum(finding.wrong in wrongs for finding in self.findings)
