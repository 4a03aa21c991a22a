"""The roles together: real orchestrators, gateways and workers, a real SQLite store, a network in memory."""

from __future__ import annotations

from pathlib import Path

from tests.support import make_job as job
from tests.support import open_world, types
from tether.records import Usage
from tether.testing import in_trio

# --- the life of a job -----------------------------------------------------------------------------------------------


@in_trio()
async def test_a_job_is_accepted_started_answered_and_ended_in_that_order(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        new = job("tokens=5")
        client = gateway.client(new)
        end = await client.end()
        assert types(client) == ["accepted", "started", "tokens", "end"]
        assert client.text == "0 1 2 3 4 "
        assert client.token_ids == [0, 1, 2, 3, 4]
        assert (end.status, end.finish_reason, end.attempt, end.usage) == ("completed", "stop", 1, Usage(1, 5))
        record = world.ended(new)
        assert (record.status, record.result, record.worker_id) == ("completed", client.text, worker.id)
        (attempt,) = world.attempts(new)
        assert (attempt.status, attempt.worker_id, attempt.completion_tokens) == ("completed", worker.id, 5)
