"""Orchestrators that are lost, seen from those that are left."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from tests.support import World, open_world, until
from tests.support import make_job as job
from tether import leases as leases_module
from tether import orchestrator as orchestrator_module
from tether.leases import LeaseWatch
from tether.records import Job
from tether.stored import Lease
from tether.testing import in_trio


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out at once."""
    monkeypatch.setattr(leases_module, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(leases_module, "LEASE_SECONDS", 1.5)
    monkeypatch.setattr(orchestrator_module, "COME_BACK_SECONDS", 0.1)


def status(world: World, of: Job) -> str:
    record = world.record(of)
    assert record is not None
    return record.status


def test_a_lease_stands_still_when_it_was_seen_for_long_without_a_change() -> None:
    watch = LeaseWatch()
    assert not watch.is_still("dead")
    for now in range(0, 14, 2):
        watch.look([Lease("me", "a", now), Lease("dead", "b", 7), Lease("late", "c", now // 10)], now)
        assert [watch.is_still(each) for each in ("me", "dead", "absent", "late")] == [
            False,
            now >= 10,
            now >= 10,
            False,
        ]
    watch.look([Lease("me", "a", 40), Lease("dead", "another boot", 7), Lease("absent", "d", 0)], 14)
    assert not any(watch.is_still(each) for each in ("me", "dead", "absent"))
    watch.forget()
    assert not watch.is_still("dead")
    watch.look([Lease("me", "a", 45)], 16)
    assert not watch.is_still("dead"), "while the store was away nobody could renew"


def test_who_has_not_looked_for_a_while_begins_to_watch_anew() -> None:
    watch = LeaseWatch()
    for now in (0, 2, 4):
        watch.look([Lease("other", "b", 7)], now)
    watch.look([Lease("other", "b", 7)], 64)
    assert not watch.is_still("other"), "this process was stopped for a minute, and perhaps the other one too"
    for now in range(66, 76, 2):
        watch.look([Lease("other", "b", 7)], now)
    assert watch.is_still("other")


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_jobs_of_an_orchestrator_that_does_not_return_are_finished_by_another_one(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        dead = await world.orchestrator(name="dead")
        worker = await world.hand_worker(dead, slots=2)
        gateway = await world.gateway()
        running, waiting = job(wait=False), job(wait=False, sampling=job().sampling)
        for new in (running, waiting):
            await gateway.submissions.submit(new)
        await worker.start_of(running)
        worker.tokens(running, 1, 0, 1)
        dead.crash()
        alive = await world.orchestrator(name="alive")
        await world.known(worker, alive)
        for new in (running, waiting):
            assert (await worker.start_of(new, 2)).emitted == ()
            worker.tokens(new, 2, 0, 1, 2)
            worker.end(new, 2)
        await until(lambda: {status(world, each) for each in (running, waiting)} == {"completed"})
        record = world.ended(running)
        assert (record.result, record.orchestrator_id) == ("0 1 2 ", alive.id)
        assert [a.status for a in world.attempts(running)] == ["lost", "completed"]


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_jobs_of_an_orchestrator_that_is_there_are_left_alone(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        new = job(wait=False)
        await one.ledger.admit(new, orchestrator_id=one.id, orchestrator_boot=one.boot_id, now=time.time())
        lost = job(wait=False)
        await one.ledger.admit(lost, orchestrator_id="dead", orchestrator_boot="boot", now=time.time())
        await until(lambda: (found := world.record(lost)) and found.orchestrator_id in {one.id, two.id})
        await until(lambda: one.orchestrator.get(new.id))  # which finds that it holds it
        record = world.record(new)
        assert record is not None
        assert record.orchestrator_id == one.id
        await until(lambda: one.orchestrator.get(lost.id) or two.orchestrator.get(lost.id))
        for each in (one, two):
            for live in (new, lost):
                if (active := each.orchestrator.get(live.id)) is not None:
                    each.orchestrator.cancel(active, "the test is over")


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_overdue_jobs_of_an_orchestrator_that_does_not_return_expire_and_their_slots_are_free(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        alive = await world.orchestrator()
        now = time.time()
        overdue = partial(job, created_at=now - 500, deadline_seconds=300.0)
        running, queued = overdue(), overdue(keep="nothing")
        in_time = job(created_at=now - 200, deadline_seconds=300.0)
        for new in (queued, in_time):
            await alive.ledger.admit(new, orchestrator_id="dead", orchestrator_boot="boot", now=now)
        await alive.ledger.admit(
            running, orchestrator_id="dead", orchestrator_boot="boot", now=now, worker=("w", "boot", 1)
        )
        await until(lambda: status(world, running) == status(world, queued) == "expired")
        record = world.ended(queued)
        assert record.error is not None
        assert (record.error.code, record.input) == ("deadline_exceeded", None)
        assert [attempt.status for attempt in world.attempts(running)] == ["lost"], "its slot is free"
        await until(lambda: alive.orchestrator.get(in_time.id))
        active = alive.orchestrator.get(in_time.id)
        assert active is not None
        alive.orchestrator.cancel(active, "the test is over")


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_an_orchestrator_that_was_cut_off_from_the_store_lets_go_of_what_was_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        worker = await world.hand_worker(one, two, slots=2)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        client = gateway.client(job())
        await worker.start_of(client.job)
        worker.tokens(client.job, 1, 0, 1)
        await client.until_tokens(0, 1)
        first = world.record(client.job)
        assert first is not None
        cut, other = (one, two) if first.orchestrator_id == one.id else (two, one)

        async def nothing(*_: object, **__: object) -> bool:
            return True

        with monkeypatch.context() as patch:
            patch.setattr(cut.ledger, "renew_lease", nothing)  # as if it could not write
            await until(lambda: (now := world.record(client.job)) and now.orchestrator_id == other.id)
        start = await worker.start_of(client.job, 2)
        await worker.cancel_of(client.job, 1)
        await until(lambda: cut.orchestrator.get(client.job.id) is None)
        # It tells the gateway as it lets go. Were the job to end before the gateway is at the other one, its client would
        # hear the whole answer in one piece.
        await until(lambda: (active := other.orchestrator.get(client.job.id)) and active.gateway is not None)
        position = len(start.emitted[0]) if start.emitted else 0
        worker.tokens(client.job, 2, *range(position, 4))
        worker.end(client.job, 2)
        assert (await client.end()).status == "completed"
        assert client.token_ids == [0, 1, 2, 3]
        assert world.ended(client.job).result == "0 1 2 3 "


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_a_drained_worker_gets_no_jobs_and_those_that_run_go_on_elsewhere_after_a_while(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, one, gateway = await world.one_of_each(name="one")
        client = gateway.client(job())
        await one.start_of(client.job)
        one.tokens(client.job, 1, 0, 1)
        await client.until_tokens(0, 1)
        two = await world.hand_worker(orchestrator, name="two")
        await until(lambda: len(world.store.workers()) == 2)
        assert world.store.drain_worker(one.id, now=time.time())
        await until(lambda: {w.name: w.status for w in world.store.workers()} == {"one": "draining", "two": "ready"})
        start = await two.start_of(client.job, 2)
        assert start.emitted == ((0, 1),)
        await one.cancel_of(client.job, 1)
        two.tokens(client.job, 2, 2)
        two.end(client.job, 2)
        assert (await client.end()).status == "completed"
        assert [a.error_code for a in world.attempts(client.job)] == ["handed_over", None]
        assert world.store.resume_worker(one.id, now=time.time())
        await until(lambda: {w.status for w in world.store.workers()} == {"ready"})


# --- writes that come late -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_what_an_earlier_boot_wrote_after_its_end_is_taken_up_as_well(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before = await world.orchestrator()
        before.crash()
        again = await world.orchestrator(key=before.key)
        worker = await world.hand_worker(again)
        late = job(wait=False, created_at=time.time())
        await again.ledger.admit(
            late,
            orchestrator_id=before.id,
            orchestrator_boot=before.boot_id,
            now=time.time(),
            worker=(worker.id, worker.boot_id, 1),
        )
        await worker.start_of(late, 2)
        worker.end(late, 2)
        await until(lambda: status(world, late) == "completed")
        assert [attempt.status for attempt in world.attempts(late)] == ["lost", "completed"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("is_running", [False, True])
def test_a_job_that_the_ledger_says_is_held_here_and_nobody_knows_goes_on(tmp_path: Path, is_running: bool) -> None:
    @in_trio()
    async def test() -> None:
        async with open_world(tmp_path) as world:
            node = await world.orchestrator()
            worker = await world.hand_worker(node)
            lost = job(wait=False, created_at=time.time())
            slot = (worker.id, worker.boot_id, 1) if is_running else None
            await node.ledger.admit(
                lost, orchestrator_id=node.id, orchestrator_boot=node.boot_id, now=time.time(), worker=slot
            )
            attempt = 2 if is_running else 1
            await worker.start_of(lost, attempt)
            worker.end(lost, attempt)
            await until(lambda: status(world, lost) == "completed")

    test()


@pytest.mark.usefixtures("quick")
@in_trio()
async def test_a_job_that_was_refused_and_is_written_down_later_is_void(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node, worker, gateway = await world.one_of_each()
        world.database.is_away = True
        refused = job(requests_per_minute=1)
        end = await gateway.client(refused).end()
        assert end.error is not None
        assert end.error.code == "store_unavailable"
        world.database.is_away = False
        await until(lambda: not node.leftovers)
        await node.ledger.admit(
            refused,
            orchestrator_id=node.id,
            orchestrator_boot=node.boot_id,
            now=time.time(),
            worker=(worker.id, worker.boot_id, 1),
        )
        await until(lambda: status(world, refused) == "failed")
        assert worker.starts == []
        after = gateway.client(job(requests_per_minute=1))  # neither its slot nor its place in the quota is taken
        await worker.start_of(after.job)
        worker.end(after.job)
        assert (await after.end()).status == "completed"
