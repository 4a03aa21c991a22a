"""The orchestrator's own decisions; its life among gateways and workers is in tests/integration/test_roles.py."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.support import HandWorker, OrchestratorNode, Peer, open_world, until
from tests.support import make_job as job
from tether import orchestrator as orchestrator_module
from tether.errors import ErrorInfo
from tether.messages import JobAccepted, JobEnd, JobQueued, JobStarted, JobTokens, Submit
from tether.records import ModelInfo
from tether.roster import FIRST_BUSY_SECONDS
from tether.settings import OrchestratorSettings
from tether.testing import in_trio

BOTH = (ModelInfo("demo", "1.0", slots=1), ModelInfo("other", "1.0", slots=1))


# --- jobs of an earlier boot -----------------------------------------------------------------------------------------


@in_trio()
async def test_a_job_of_an_earlier_boot_has_the_time_that_is_left_of_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator_module, "COME_BACK_SECONDS", 0.1)
    async with open_world(tmp_path) as world:
        before = await world.orchestrator()
        now = time.time()
        fresh = job(created_at=now, deadline_seconds=100.0)
        late = job(created_at=now - 50, deadline_seconds=20.0)
        odd = job(created_at=now + 1000, deadline_seconds=100.0)
        for new in (fresh, late, odd):
            await before.ledger.admit(
                new, orchestrator_id=before.id, orchestrator_boot=before.boot_id, now=now, worker=None
            )
        before.crash()
        again = await world.orchestrator(key=before.key)
        await until(lambda: again.orchestrator.get(late.id) is None)
        assert world.ended(late).status == "expired"
        for new in (fresh, odd):
            active = again.orchestrator.get(new.id)
            assert active is not None
            assert 90 < active.deadline - trio.current_time() <= 100
            again.orchestrator.cancel(active, "the test is over")


@in_trio()
async def test_a_job_that_only_seems_overdue_has_a_while_for_its_gateway_to_say_so(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before = await world.orchestrator()
        now = time.time()
        waited_for, left = (job(created_at=now - 5000, deadline_seconds=20.0, wait=wait) for wait in (True, False))
        for new in (waited_for, left):
            await before.ledger.admit(
                new, orchestrator_id=before.id, orchestrator_boot=before.boot_id, now=now, worker=None
            )
        before.crash()
        again = await world.orchestrator(key=before.key)
        await until(lambda: again.orchestrator.get(left.id) is None)
        active = again.orchestrator.get(waited_for.id)
        assert active is not None
        gateway = await world.gateway()
        await until(lambda: gateway.links.get(again.id))
        to_it = gateway.links.get(again.id)
        assert to_it is not None
        to_it.send(Submit(waited_for, (), (), before.id, before.boot_id, 15.0, accepted=True))
        await until(lambda: active.deadline - trio.current_time() > 10)
        again.orchestrator.cancel(active, "the test is over")


@in_trio()
async def test_a_job_that_the_ledger_has_is_not_refused_after_its_orchestrator_was_lost(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        lost = await world.orchestrator(name="lost")
        accepted, new = job(created_at=time.time()), job(created_at=time.time())
        await lost.ledger.admit(accepted, orchestrator_id=lost.id, orchestrator_boot=lost.boot_id, now=time.time())
        lost.crash()
        full = await world.orchestrator(name="full", settings=OrchestratorSettings(max_queued=0))
        worker = await world.hand_worker(full)
        gateway = await world.gateway()
        await until(lambda: gateway.links.get(full.id))
        running = gateway.client(job())
        await worker.start_of(running.job)
        by_hand = Peer(world, "gateway", name="by hand")
        heard: list[JobEnd] = []
        by_hand.links.on(JobEnd, lambda _link, end: heard.append(end))
        for kind in (JobAccepted, JobQueued, JobStarted, JobTokens):
            by_hand.links.on(kind, lambda _link, _event: None)
        await world.start(by_hand)
        await until(lambda: by_hand.links.get(full.id))
        to_it = by_hand.links.get(full.id)
        assert to_it is not None
        for each in (accepted, new):
            to_it.send(Submit(each, (), (), lost.id, lost.boot_id, 15.0, accepted=False))
        await until(lambda: heard)
        assert [(end.job_id, end.error.code if end.error else "") for end in heard] == [(new.id, "queue_full")]
        active = full.orchestrator.get(accepted.id)
        assert active is not None
        await until(lambda: active.accepted)
        full.orchestrator.cancel(active, "the test is over")
        worker.end(running.job)


@in_trio()
async def test_a_worker_that_always_gives_jobs_back_is_asked_less_and_less(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job()
        gateway.client(new)
        for attempt in range(1, 5):
            await worker.start_of(new, attempt)
            worker.end(new, attempt, reason="error", error=ErrorInfo("draining", "leaving"), retry=True)
        began = trio.current_time()
        await worker.start_of(new, 5)
        assert trio.current_time() - began > FIRST_BUSY_SECONDS
        worker.end(new, 5)


@in_trio()
async def test_a_job_of_an_earlier_boot_waits_for_a_worker_though_none_is_there_yet(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before = await world.orchestrator()
        new = job(created_at=time.time(), wait=False)
        await before.ledger.admit(
            new, orchestrator_id=before.id, orchestrator_boot=before.boot_id, now=time.time(), worker=None
        )
        before.crash()
        again = await world.orchestrator(key=before.key)
        await until(lambda: again.orchestrator.num_queued == 1)
        assert again.orchestrator.num_running == 0
        worker = await world.hand_worker(again)
        await worker.start_of(new)
        worker.end(new)


@in_trio()
async def test_another_orchestrators_jobs_are_left_alone(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one = await world.orchestrator(name="one")
        new = job(created_at=time.time())
        await one.ledger.admit(new, orchestrator_id=one.id, orchestrator_boot=one.boot_id, now=1.0, worker=None)
        one.crash()
        two = await world.orchestrator(name="two")
        assert two.leftovers == []
        record = world.record(new)
        assert record is not None
        assert (record.status, record.orchestrator_id) == ("queued", one.id)


# --- who is served next ----------------------------------------------------------------------------------------------


@in_trio()
async def test_a_line_for_one_model_does_not_hold_up_another(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each(models=BOTH)
        running = [job(), job(model="other")]
        for new in running:
            gateway.client(new)
            await worker.start_of(new)
        waiting = [job(priority=9), job(priority=8), job(model="other")]
        places = [(await gateway.client(new).until(JobQueued)).place for new in waiting]
        assert places == [1, 2, 1], "a place among those that wait for the same model"
        worker.end(running[1])
        await worker.start_of(waiting[2])
        worker.end(waiting[2])
        worker.end(running[0])
        for new in waiting[:2]:
            await worker.start_of(new)
            worker.end(new)


@in_trio()
async def test_a_job_that_avoids_a_worker_does_not_hold_up_those_behind_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, bad, gateway = await world.one_of_each(name="bad")
        first = job()
        client = gateway.client(first)
        await bad.start_of(first)
        good = await world.hand_worker(orchestrator, name="good")
        other = job()
        gateway.client(other)
        await good.start_of(other)
        second = job()
        gateway.client(second)
        await until(lambda: orchestrator.orchestrator.num_queued == 1)
        bad.end(first, reason="error", retry=True)
        await client.until(JobQueued)
        await bad.start_of(second)
        good.end(other)
        await good.start_of(first, 2)
        good.end(first, 2)
        bad.end(second)


@in_trio()
async def test_a_worker_that_comes_takes_what_waits(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, first, gateway = await world.one_of_each()
        running, waiting = job(), job()
        gateway.client(running)
        await first.start_of(running)
        client = gateway.client(waiting)
        await client.until(JobQueued)
        second = await world.hand_worker(orchestrator, name="second")
        await second.start_of(waiting)
        assert (await client.until(JobStarted)).worker_id == second.id
        second.end(waiting)
        first.end(running)


@in_trio()
async def test_a_slot_that_was_given_to_a_waiting_job_just_before_its_worker_vanished_is_not_lost(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, first, gateway = await world.one_of_each()
        running, waiting = job(), job()
        gateway.client(running)
        await first.start_of(running)
        client = gateway.client(waiting)
        await client.until(JobQueued)
        link = orchestrator.links.get(first.id)
        active = orchestrator.orchestrator.get(running.id)
        assert link is not None
        assert active is not None
        world.database.hold()
        first.end(running)
        await until(lambda: active.slot is None)  # the waiting job has the slot now
        link.close("gone")
        world.database.go_on()
        await first.until(lambda: first.links.with_role("orchestrator") or None)
        attempt = await _attempt_of(first, waiting.id)
        first.end(waiting, attempt)
        assert (await client.end()).status == "completed"


async def _attempt_of(worker: HandWorker, job_id: str) -> int:
    start = await worker.until(lambda: next((s for s in worker.starts if s.job.id == job_id), None))
    return start.attempt


@in_trio()
async def test_the_store_says_no_where_another_orchestrator_was_quicker_and_the_job_waits_a_moment(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        theirs, mine = job(), job()
        await orchestrator.ledger.admit(
            theirs, orchestrator_id="another", orchestrator_boot="b", now=1.0, worker=(worker.id, worker.boot_id, 1)
        )
        client = gateway.client(mine)
        await client.until(JobQueued)
        assert worker.starts == []
        await orchestrator.ledger.finish(theirs.id, 1, status="completed", finish_reason="stop", now=2.0)
        await worker.start_of(mine)
        assert len(world.attempts(mine)) == 1, "no attempt was begun before"
        worker.end(mine)
        assert (await client.end()).status == "completed"


# --- bounds ----------------------------------------------------------------------------------------------------------


@in_trio()
async def test_counts_of_queued_and_running_jobs_are_true(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        assert _counts(orchestrator) == (0, 0)
        worker = await world.hand_worker(orchestrator)
        gateway = await world.gateway()
        jobs = [job(), job(), job()]
        gateway.client(jobs[0])
        await worker.start_of(jobs[0])
        for new in jobs[1:]:
            await gateway.client(new).until(JobQueued)
        assert _counts(orchestrator) == (2, 1)
        for new in jobs:
            await worker.start_of(new)
            worker.end(new)
        await until(lambda: _counts(orchestrator) == (0, 0))


def _counts(node: OrchestratorNode) -> tuple[int, int]:
    return node.orchestrator.num_queued, node.orchestrator.num_running


@in_trio()
async def test_without_a_queue_a_job_runs_at_once_or_is_refused(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator(settings=OrchestratorSettings(max_queued=0))
        worker = await world.hand_worker(orchestrator)
        gateway = await world.gateway()
        running = gateway.client(job())
        await worker.start_of(running.job)
        end = await gateway.client(job()).end()
        assert end.error is not None
        assert end.error.code == "queue_full"
        worker.end(running.job)
        assert (await running.end()).status == "completed"


@in_trio()
async def test_draining_without_jobs_is_done_at_once(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await orchestrator.orchestrator.drain()
        assert orchestrator.orchestrator.is_draining


@in_trio()
async def test_a_gateway_that_comes_while_an_orchestrator_drains_brings_its_jobs_to_those_that_stay(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        leaving = await world.orchestrator(name="leaving")
        worker = await world.hand_worker(leaving, slots=5)
        running = (await world.gateway()).client(job())
        await worker.start_of(running.job)
        staying = await world.orchestrator(name="staying")
        await world.known(worker, staying)
        await until(lambda: leaving.links.get(staying.id))
        world.nursery.start_soon(leaving.orchestrator.drain)
        await until(lambda: leaving.orchestrator.is_draining)
        late = await world.gateway("late")
        await late.until(lambda: len(late.links.with_role("orchestrator")) == 2 or None)
        clients = [late.client(job()) for _ in range(4)]
        await until(lambda: all(staying.orchestrator.get(client.job.id) for client in clients))
        assert not any(leaving.orchestrator.get(client.job.id) for client in clients)
        for client in [running, *clients]:
            await worker.start_of(client.job)
            worker.end(client.job)
            assert (await client.end()).status == "completed"


@in_trio()
async def test_a_refused_job_that_cannot_be_taken_back_takes_nobody_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        node, worker, gateway = await world.one_of_each()

        other, new = await world.gateway("other"), job()

        async def fail(*_args: object, **_facts: object) -> bool:
            raise RuntimeError("a bug")

        async def fail_late(*_args: object, **_facts: object) -> bool:
            again = other.client(new)
            await until(lambda: (active := node.orchestrator.get(new.id)) and active.gateway_id == other.id)
            clients.append(again)
            raise RuntimeError("a bug")

        with monkeypatch.context() as broken:
            broken.setattr(node.ledger, "admit", fail)
            broken.setattr(node.ledger, "finish", fail_late)
            clients = [gateway.client(new)]
            await until(lambda: not node.leftovers and len(clients) == 2)
        for each in clients:
            end = await each.end()
            assert end.error is not None
            assert end.error.code == "internal_error"
        client = gateway.client(job())
        await worker.start_of(client.job)
        worker.end(client.job)
        assert (await client.end()).status == "completed"


@in_trio()
async def test_a_thousand_jobs_that_wait_are_matched_quickly(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await world.hand_worker(orchestrator, models=(ModelInfo("demo", "1.0", slots=0),))
        core = orchestrator.orchestrator
        for number in range(1000):
            active = core._new_job(job(), None, 100.0)
            core._jobs[active.job.id] = active
            core._queue.push(active.job, number)
        looks = 0
        best = orchestrator.roster.best

        def counted(active: object) -> str | None:
            nonlocal looks
            looks += 1
            return best(active)  # type: ignore[arg-type]

        orchestrator.roster.best = counted  # type: ignore[method-assign]
        core._match(("demo", "1.0"))
        assert looks == 1, "where the first of a line has no chance the others have none"
        for job_id in list(core._jobs):
            core._queue.remove(job_id)
            del core._jobs[job_id]
