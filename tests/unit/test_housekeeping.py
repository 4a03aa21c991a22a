from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.support import make_job as job
from tests.support import open_world, until
from tether import housekeeping as housekeeping_module
from tether.records import NodeRecord
from tether.settings import OrchestratorSettings
from tether.testing import in_trio

DAY = 86_400.0


@in_trio()
async def test_old_texts_are_dropped_and_new_ones_kept(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before = await world.orchestrator(settings=OrchestratorSettings(retention_days=30.0))
        now = time.time()
        jobs = {age: job("text", created_at=now - age * DAY) for age in (1, 29, 31, 400)}
        for age, old in jobs.items():
            at = now - age * DAY
            await before.ledger.admit(old, orchestrator_id="another", orchestrator_boot="boot", now=at)
            await before.ledger.finish(old.id, 0, status="completed", finish_reason="stop", result="answer", now=at)
        before.crash()
        await world.orchestrator(settings=OrchestratorSettings(retention_days=30.0), key=before.key)
        await until(lambda: world.record(jobs[400]) is None)
        assert [(world.ended(jobs[age]).input, world.ended(jobs[age]).result) for age in (1, 29, 31)] == [
            ("text", "answer"),
            ("text", "answer"),
            (None, None),
        ]


@in_trio()
async def test_a_change_that_comes_while_the_last_one_is_written_is_written_too(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        await until(lambda: worker.id in orchestrator.housekeeping._saved)
        entry = orchestrator.roster.get(worker.id)
        assert entry is not None
        world.database.hold()
        worker.tell(draining=True)
        await until(lambda: entry.state.draining)
        await until(lambda: world.database.holds("INSERT INTO workers"))
        worker.tell(draining=False)
        await until(lambda: not entry.state.draining)
        began = trio.current_time()
        world.database.go_on()
        saved = orchestrator.housekeeping._saved
        await until(lambda: saved[worker.id].draining)
        await until(lambda: not saved[worker.id].draining)
        assert world.store.workers()[0].status == "ready"
        assert trio.current_time() - began < housekeeping_module.FULL_ROUND_SECONDS - 1


@in_trio()
async def test_gateways_are_remembered_beside_orchestrators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping_module, "FULL_ROUND_SECONDS", 0.2)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        await until(lambda: len(world.store.nodes()) == 2)
        found = {node.role: node for node in world.store.nodes()}
        assert (found["gateway"].id, found["gateway"].name) == (gateway.id, "gateway")
        assert found["orchestrator"].id == orchestrator.id
        assert found["orchestrator"].addresses == orchestrator.transport.addresses
        (lease,) = world.store.leases()
        renewals = lease.renewals
        await until(lambda: world.store.leases()[0].renewals > renewals)
        seen_at = found["gateway"].seen_at
        await until(lambda: {n.role: n.seen_at for n in world.store.nodes()}["gateway"] > seen_at)


@in_trio()
async def test_a_worker_whose_link_goes_while_it_is_being_written_is_written_as_gone(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await until(world.store.leases)  # the first round's last write
        world.database.hold()
        worker = await world.hand_worker(orchestrator)
        await until(lambda: world.database.holds("INSERT INTO workers"))
        worker.crash()
        await until(lambda: not len(orchestrator.roster))
        world.database.go_on()
        await until(lambda: [record.status for record in world.store.workers()] == ["gone"])


@in_trio()
async def test_a_store_that_is_away_is_tried_again_each_second_and_then_has_everything(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await until(world.store.nodes)
        world.database.is_away = True
        worker = await world.hand_worker(orchestrator)
        await until(lambda: orchestrator.housekeeping.store_error)
        refused = world.database.num_refused
        await until(lambda: world.database.num_refused > refused)
        world.database.is_away = False
        await until(lambda: [record.id for record in world.store.workers()] == [worker.id])
        await until(lambda: orchestrator.housekeeping.store_error is None)


@in_trio()
async def test_a_store_that_takes_longer_than_a_round_shows_as_away_until_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping_module, "OVERDUE_SECONDS", 0.05)
    monkeypatch.setattr(housekeeping_module, "FULL_ROUND_SECONDS", 0.02)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        world.database.hold()
        worker = await world.hand_worker(orchestrator)
        await until(lambda: orchestrator.housekeeping.store_error)
        error = (await gateway.submissions.health()).store
        assert error is not None
        assert (error.code, error.message) == ("store_unavailable", "the store has not answered for 0 s")
        world.database.go_on()
        await until(lambda: orchestrator.housekeeping.store_error is None)
        await until(lambda: [record.id for record in world.store.workers()] == [worker.id])


# --- who has left ----------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_gateway_is_up_since_its_link_came_up_and_gone_when_it_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping_module, "FULL_ROUND_SECONDS", 0.05)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        began = time.time()
        gateway = await world.gateway()
        came = time.time()

        def found() -> NodeRecord | None:
            return next((node for node in world.store.nodes() if node.id == gateway.id), None)

        await until(found)
        first = found()
        assert first is not None
        assert (first.status, began <= first.started_at <= came) == ("up", True)
        await until(lambda: (later := found()) is not None and later.seen_at > first.seen_at)
        later = found()
        assert later is not None
        assert later.started_at == first.started_at
        gateway.crash()
        await until(lambda: (gone := found()) is not None and gone.status == "gone")
        assert [node.id for node in world.store.nodes()] == [orchestrator.id, gateway.id], (
            "those that are gone come last"
        )
        again = await world.gateway()
        await until(lambda: len([node for node in world.store.nodes() if node.status == "up"]) == 2)
        assert again.id != gateway.id


@in_trio()
async def test_an_orchestrator_that_leaves_and_whom_it_knew_are_gone_and_it_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping_module, "FULL_ROUND_SECONDS", 0.02)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        await world.gateway()
        await until(lambda: len(world.store.nodes()) == 2 and world.store.workers())
        await orchestrator.housekeeping.leave()
        gone = (world.store.nodes(), world.store.workers())
        assert [record.status for records in gone for record in records] == ["gone"] * 3
        worker.tell(draining=True)
        entry = orchestrator.roster.get(worker.id)
        assert entry is not None
        await until(lambda: entry.state.draining)
        await trio.testing.wait_all_tasks_blocked(0.05)  # more than two rounds
        assert (world.store.nodes(), world.store.workers()) == gone


@in_trio()
async def test_whom_another_orchestrator_knows_is_not_gone_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping_module, "FULL_ROUND_SECONDS", 0.05)
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        worker = await world.hand_worker(one, two)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        await until(lambda: len(world.store.nodes()) == 3 and world.store.workers())
        await one.housekeeping.leave()
        one.crash()
        await worker.until(lambda: len(worker.links.up) == 1 or None)
        worker.tell()  # as a worker does every few seconds
        await until(
            lambda: (
                {node.name: node.status for node in world.store.nodes()}
                == {"one": "gone", "two": "up", "gateway": "up"}
            )
        )
        await until(lambda: world.store.workers()[0].status == "ready")


@in_trio()
async def test_an_orchestrator_leaves_though_its_store_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await until(world.store.nodes)
        world.database.is_away = True
        await orchestrator.housekeeping.leave()
        assert "the store does not know that this node has left" in caplog.text
