"""Jobs whose clients waited at a gateway that was lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.support import GatewayNode, HandWorker, OrchestratorNode, World, open_world, until
from tests.support import make_job as job
from tether.bridge import Outlet
from tether.deserted import Deserted
from tether.errors import JobNotFound
from tether.messages import JobEnd, JobEvent, JobTokens
from tether.records import Job
from tether.testing import in_trio


async def look_later(node: OrchestratorNode, seconds: float) -> None:
    """Look as it would be done so many seconds from now, with ten as the bound."""
    Deserted(node.orchestrator, most_seconds=10).look(trio.current_time() + seconds)


async def begin(world: World) -> tuple[OrchestratorNode, GatewayNode]:
    node = await world.orchestrator()
    return node, await world.gateway()


@in_trio()
async def test_a_job_whose_client_does_not_come_back_is_cancelled_after_a_while_and_says_why(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node, gateway = await begin(world)
        worker = await world.hand_worker(node, slots=2)
        waiting, left = job(), job(wait=False)
        client = gateway.client(waiting)
        await gateway.submissions.submit(left)
        await worker.start_of(waiting)
        worker.tokens(waiting, 1, 0)
        await client.until(JobTokens)
        await look_later(node, 1000)
        assert not worker.cancels, "its client is there"
        gateway.crash()
        await until(lambda: (active := node.orchestrator.get(waiting.id)) and active.deserted_at is not None)
        await look_later(node, 5)
        assert not worker.cancels, "its client may come back"
        await look_later(node, 11)
        await worker.cancel_of(waiting)
        await until(lambda: world.record(waiting).status == "cancelled")  # type: ignore[union-attr]
        error = world.ended(waiting).error
        assert error is not None
        assert "its gateway was lost" in error.message
        worker.end(left)
        await until(lambda: world.record(left).status == "completed")  # type: ignore[union-attr]


async def watched(gateway: GatewayNode, node: OrchestratorNode, of: Job) -> list[JobEvent]:
    """Let a client of a job come back through this gateway; what it is told."""
    told: list[JobEvent] = []
    gateway.nursery.start_soon(gateway.submissions.watch, Outlet[JobEvent](told.extend, 100), of.id, None)
    await until(lambda: (active := node.orchestrator.get(of.id)) and gateway.id in active.watchers)
    return told


async def deserted(world: World) -> tuple[OrchestratorNode, HandWorker, GatewayNode, Job]:
    """Let a gateway be lost under a job that runs; its orchestrator, its worker, another gateway, and the job."""
    node, gateway = await begin(world)
    worker = await world.hand_worker(node)
    other = await world.gateway("other")
    client = gateway.client(job())
    await worker.start_of(client.job)
    gateway.crash()
    await until(lambda: (active := node.orchestrator.get(client.job.id)) and active.deserted_at is not None)
    return node, worker, other, client.job


@in_trio()
async def test_a_client_that_comes_back_through_another_gateway_keeps_its_job(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node, worker, other, left = await deserted(world)
        told = await watched(other, node, left)
        await look_later(node, 1000)
        worker.tokens(left, 1, 0)
        worker.end(left)
        await until(lambda: world.record(left).status == "completed")  # type: ignore[union-attr]
        await until(lambda: told and isinstance(told[-1], JobEnd))


@pytest.mark.parametrize("is_noticed", [True, False], ids=["lost", "not seen to be lost yet"])
@in_trio()
async def test_a_gateway_that_was_lost_cancels_no_job_whose_client_has_come_back_through_another_one(
    tmp_path: Path, is_noticed: bool
) -> None:
    async with open_world(tmp_path) as world:
        node, gateway = await begin(world)
        worker = await world.hand_worker(node)
        other = await world.gateway("other")
        client = gateway.client(job())
        await worker.start_of(client.job)
        told: list[JobEvent] = []
        if not is_noticed:
            told = await watched(other, node, client.job)
        world.memory.cut(gateway.id, node.id)
        await until(lambda: gateway.links.get(node.id) is None and node.links.get(gateway.id) is None)
        if is_noticed:
            told = await watched(other, node, client.job)
        client.leave()  # as its frozen gateway sees only now
        await client.done.wait()
        world.memory.heal(gateway.id, node.id)
        await gateway.until(lambda: gateway.links.get(node.id))
        with pytest.raises(JobNotFound):  # an answer on the same link: a cancel was heard before
            await gateway.submissions.job("nothing", None)
        assert not worker.cancels
        worker.end(client.job)
        await until(lambda: told and isinstance(told[-1], JobEnd))
        assert world.ended(client.job).status == "completed"


@in_trio()
async def test_a_job_whose_client_came_back_is_deserted_again_when_that_gateway_is_lost_too(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node, worker, other, left = await deserted(world)
        active = node.orchestrator.get(left.id)
        assert active is not None
        await watched(other, node, left)
        assert active.deserted_at is None
        other.crash()
        await until(lambda: active.deserted_at is not None)
        await look_later(node, 11)
        await worker.cancel_of(left)
        await until(lambda: world.record(left).status == "cancelled")  # type: ignore[union-attr]


@in_trio()
async def test_a_job_that_is_taken_up_at_a_start_waits_for_its_client_as_long(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before = await world.orchestrator()
        waiting, left = job(created_at=time.time()), job(created_at=time.time(), wait=False)
        for new in (waiting, left):
            await before.ledger.admit(new, orchestrator_id=before.id, orchestrator_boot=before.boot_id, now=time.time())
        before.crash()
        node = await world.orchestrator(key=before.key)
        await until(lambda: node.orchestrator.num_queued == 2)
        await look_later(node, 5)
        await look_later(node, 11)
        await until(lambda: world.record(waiting).status == "cancelled")  # type: ignore[union-attr]
        worker = await world.hand_worker(node)
        await worker.start_of(left)
        worker.end(left)
