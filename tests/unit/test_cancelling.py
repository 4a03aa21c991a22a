"""A job is cancelled by whichever orchestrator is asked, wherever it is and while it moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import GatewayNode, OrchestratorNode, World, open_world, until
from tests.support import make_job as job
from tether.errors import DeadlineExceeded, JobConflict, Unavailable, from_info
from tether.messages import Cancel, CancelJob, Jobs
from tether.records import Job, JobRecord
from tether.testing import in_trio


async def cancel_at(gateway: GatewayNode, node: OrchestratorNode, of: Job) -> JobRecord:
    """Ask this very orchestrator, as a gateway does for its operator."""
    link = await gateway.until(lambda: gateway.links.get(node.id))
    reply = await gateway.links.ask(link, lambda request_id: CancelJob(request_id, of.id, of.tenant_id), Jobs)
    if reply.error is not None:
        raise from_info(reply.error)
    return reply.jobs[0]


async def pair(world: World) -> tuple[OrchestratorNode, OrchestratorNode]:
    one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
    await until(lambda: one.links.get(two.id) and two.links.get(one.id))
    return one, two


async def left_by_client(world: World, of: Job, node: OrchestratorNode) -> None:
    """Tell this very orchestrator, through a gateway, that the client of a job has left."""
    gateway = await world.gateway()
    (await gateway.until(lambda: gateway.links.get(node.id))).send(Cancel(of.id))


async def written(node: OrchestratorNode, new: Job, holder: tuple[str, str]) -> None:
    """Write a job that a worker of this holder runs."""
    id_, boot = holder
    now = time.time()
    await node.ledger.admit(new, orchestrator_id=id_, orchestrator_boot=boot, now=now, worker=("w", "boot", 1))


@in_trio()
async def test_the_job_of_another_orchestrator_is_cancelled_there(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        worker = await world.hand_worker(one)
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        holder = one if one.orchestrator.get(new.id) is not None else two
        other = two if holder is one else one
        assert (await cancel_at(gateway, other, new)).status == "cancelled"
        await worker.cancel_of(new)
        assert (await client.end()).status == "cancelled"
        with pytest.raises(JobConflict, match="has ended already"):
            await cancel_at(gateway, other, new)


@in_trio()
async def test_the_reason_goes_with_a_cancel_to_the_orchestrator_that_has_the_job(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        new = job()
        await written(one, new, (one.id, one.boot_id))
        assert await two.cancelling.end(new.id, "its batch has ended")
        error = world.ended(new).error
        assert error is not None
        assert "its batch has ended" in error.message


@in_trio()
async def test_who_asks_is_told_where_the_holder_of_a_job_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(*_args: object, **_named: object) -> Jobs:
        raise DeadlineExceeded("no answer")

    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        gateway = await world.gateway()
        new = job()
        await written(one, new, (one.id, one.boot_id))
        monkeypatch.setattr(two.links, "ask", ask)
        with pytest.raises(Unavailable, match="does not answer, or it moves; try again"):
            await cancel_at(gateway, two, new)


@pytest.mark.parametrize("is_asked", [True, False], ids=["by an operator", "by a client that left"])
@pytest.mark.parametrize("is_written", [True, False], ids=["when it is written", "before it is written"])
@in_trio()
async def test_a_cancel_that_comes_while_a_job_is_given_away_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool, is_asked: bool
) -> None:
    async with open_world(tmp_path) as world:
        leaving, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        active, release = leaving.orchestrator.get(new.id), leaving.ledger.release
        assert active is not None
        found: list[JobRecord] = []

        async def ask() -> None:
            found.append(await cancel_at(gateway, leaving, new))

        async def cancel() -> None:
            if is_asked:
                world.nursery.start_soon(ask)
            else:
                client.leave()
            await until(lambda: active.is_stopped)

        async def give_away(*args: Any, **facts: Any) -> bool:
            if not is_written:
                await cancel()
            is_released = await release(*args, **facts)
            if is_written:
                await cancel()
            return is_released

        monkeypatch.setattr(leaving.ledger, "release", give_away)
        leaving.orchestrator.give_up(new.id)
        await until(lambda: world.record(new).status == "cancelled")  # type: ignore[union-attr]
        if is_asked:
            assert (await client.end()).status == "cancelled"
            await until(lambda: found)
            assert found[0].status == "cancelled"


@in_trio()
async def test_a_job_that_is_to_be_given_away_and_to_be_cancelled_is_cancelled(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        leaving, worker, gateway = await world.one_of_each()
        clients = [gateway.client(job()) for _ in range(2)]
        await until(lambda: leaving.orchestrator.num_running == leaving.orchestrator.num_queued == 1)
        for active in leaving.orchestrator.jobs:
            leaving.orchestrator.give_up(active.job.id)
            leaving.orchestrator.cancel(active, "client gone")
        for client in clients:
            assert (await client.end()).status == "cancelled"
        (start,) = worker.starts
        await worker.cancel_of(start.job)
        assert world.ended(start.job).usage.completion_tokens == 7, "what it spent is told"


@in_trio()
async def test_a_job_that_was_taken_over_while_it_was_being_cancelled_is_cancelled_where_it_is(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        worker = await world.hand_worker(one)
        gateway = await world.gateway()
        new = job(wait=False)
        await gateway.submissions.submit(new)
        await worker.start_of(new)
        holder, other = (one, two) if one.orchestrator.get(new.id) is not None else (two, one)
        assert await other.ledger.take_over(
            new.id,
            holder=(holder.id, holder.boot_id),
            orchestrator_id=other.id,
            orchestrator_boot=other.boot_id,
            now=time.time(),
        )
        assert (await cancel_at(gateway, holder, new)).status == "cancelled"


@in_trio()
async def test_the_job_of_a_client_that_left_is_cancelled_when_an_orchestrator_that_is_there_has_given_it_away(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        new = job()
        await written(one, new, (one.id, ""))
        await left_by_client(world, new, two)
        await until(lambda: world.record(new).status == "cancelled")  # type: ignore[union-attr]


@in_trio()
async def test_the_job_of_a_client_that_left_is_cancelled_when_its_orchestrator_is_seen_to_be_lost_a_moment_later(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        new = job()
        await written(one, new, (one.id, one.boot_id))
        await left_by_client(world, new, two)
        await until(lambda: two.cancelling._waiting)
        one.crash()
        await until(lambda: world.record(new).status == "cancelled")  # type: ignore[union-attr]
        assert not two.cancelling._waiting


@in_trio()
async def test_a_job_that_is_held_here_and_not_taken_up_yet_is_cancelled(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one, two = await pair(world)
        gateway = await world.gateway()
        for node in (one, two):
            new = job()
            await written(one, new, (one.id, one.boot_id))
            assert (await cancel_at(gateway, node, new)).status == "cancelled"
            assert [attempt.status for attempt in world.attempts(new)] == ["cancelled"]


@pytest.mark.parametrize("is_asked", [True, False], ids=["by an operator", "by a client that left"])
@in_trio()
async def test_a_job_that_is_taken_up_while_its_holder_is_looked_for_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_asked: bool
) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        gateway = await world.gateway()
        new = job()
        await written(node, new, ("lost", "boot"))
        read, store = node.ledger.read, node.ledger.store

        async def read_and_take_over(call: Callable[..., object], *args: object, **named: object) -> object:
            found = await read(call, *args, **named)
            if call == store.held_job and node.orchestrator.get(new.id) is None:
                me = node.id, node.boot_id
                assert await node.ledger.take_over(
                    new.id, holder=("lost", "boot"), orchestrator_id=me[0], orchestrator_boot=me[1], now=time.time()
                )
                record = world.record(new)
                assert record is not None
                node.orchestrator.take_up(record, time.time())
            return found

        monkeypatch.setattr(node.ledger, "read", read_and_take_over)
        if is_asked:
            assert (await cancel_at(gateway, node, new)).status == "cancelled"
        else:
            gateway.links.with_role("orchestrator")[0].send(Cancel(new.id))
            await until(lambda: world.record(new).status == "cancelled")  # type: ignore[union-attr]
        await until(lambda: node.orchestrator.get(new.id) is None)
        assert [attempt.status for attempt in world.attempts(new)] == ["lost"]
