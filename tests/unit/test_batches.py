"""Batches over real orchestrators and a store: whoever dies, each line has one outcome and one job."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.support import GatewayNode, OrchestratorNode, World, make_job, open_world, until
from tether import batch_inquiries, batch_lines, leases
from tether import batches as batches_module
from tether.batch_lines import LineJob
from tether.batch_messages import Batches, CancelBatch, CreateBatch, Files, GetBatch, ListBatches, PutFile, PutFilePart
from tether.batch_store import BatchStore, Holder, LiveBatch
from tether.desk import page_of
from tether.named_queries import Query
from tether.records import BatchLine, BatchRecord, FileRecord
from tether.tenant_store import TenantStore
from tether.testing import in_trio

LINES = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and leases that suit a test."""
    monkeypatch.setattr(batches_module, "ROUND_SECONDS", 0.05)
    monkeypatch.setattr(batches_module, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(leases, "ROUND_SECONDS", 0.1)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.6)


async def begin(
    gateway: GatewayNode, script: str = "tokens=3 every=0.02", num_lines: int = LINES, key_id: str = ""
) -> BatchRecord:
    """Bring a file and make a batch of it, as a gateway does."""
    body = {"model": "demo", "messages": [{"role": "user", "content": script}]}
    url = "/v1/chat/completions"
    lines = [{"custom_id": f"{n}", "method": "POST", "url": url, "body": body} for n in range(num_lines)]
    content = "\n".join(map(json.dumps, lines))
    file = FileRecord("file-1", "tenant", "a.jsonl", "batch", len(content), 1, 1_800_000_000.0)
    ask = gateway.submissions.ask
    await ask(lambda request_id: PutFilePart(request_id, file.id, 0, content), Files)
    await ask(lambda request_id: PutFile(request_id, file, 1 << 20), Files)
    batch = BatchRecord("batch_1", "tenant", key_id, "/v1/chat/completions", file.id, 0.0, 0.0)
    made = await ask(lambda request_id: CreateBatch(request_id, batch), Batches)
    assert (made.batches[0].status, made.batches[0].orchestrator_id != "") == ("validating", True)
    return made.batches[0]


def now(world: World) -> BatchRecord:
    found = BatchStore(world.store).batch("batch_1")
    assert found is not None
    return found


async def ended(world: World) -> BatchRecord:
    await until(lambda: now(world).ended_at is not None)
    return now(world)


def lines_of(world: World, file_id: str | None) -> dict[str, str]:
    """Each line's content or error code by its custom id; none of them twice."""
    if file_id is None:
        return {}
    store = BatchStore(world.store)
    file = store.file(file_id)
    assert file is not None
    text = "".join(store.file_part(file_id, number) or "" for number in range(file.num_parts))
    assert len(text.encode()) == file.num_bytes
    found = [json.loads(each) for each in text.splitlines()]
    custom_ids = [each["custom_id"] for each in found]
    assert custom_ids == sorted(set(custom_ids), key=int)
    return {
        each["custom_id"]: each["error"]["code"]
        if each["error"]
        else each["response"]["body"]["choices"][0]["message"]["content"]
        for each in found
    }


def check_complete(world: World, batch: BatchRecord, text: str = "0 1 2 ", num_lines: int = LINES) -> None:
    """Check that every line has its answer, by one job each."""
    assert (batch.status, batch.num_lines, batch.num_completed, batch.num_failed) == (
        "completed",
        num_lines,
        num_lines,
        0,
    )
    assert lines_of(world, batch.output_file_id) == dict.fromkeys(map(str, range(num_lines)), text)
    assert Counter(job.status for job in world.store.jobs(limit=1000)) == {"completed": num_lines}
    assert BatchStore(world.store).waiting_lines("batch_1", limit=1) == []


async def pair(world: World) -> tuple[OrchestratorNode, OrchestratorNode]:
    one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
    await world.scripted_worker(one, two, slots=4)
    return one, two


def holder_of(world: World, nodes: Sequence[OrchestratorNode]) -> OrchestratorNode:
    return next(node for node in nodes if node.id == now(world).orchestrator_id)


async def cancel(gateway: GatewayNode, node: OrchestratorNode) -> None:
    """Ask this very orchestrator for the batch's end."""
    await until(lambda: gateway.links.get(node.id))
    link = gateway.links.get(node.id)
    assert link is not None
    answer = await gateway.links.ask(link, lambda request_id: CancelBatch(request_id, "batch_1"), Batches)
    assert answer.batches[0].status == "cancelling"


@in_trio()
async def test_another_orchestrator_goes_on_with_the_batch_of_one_that_died(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        nodes = await pair(world)
        gateway = await world.gateway()
        await begin(gateway)
        await until(lambda: now(world).num_completed >= 2)
        dead = holder_of(world, nodes)
        dead.crash()
        batch = await ended(world)
        assert batch.orchestrator_id != dead.id
        check_complete(world, batch)


@in_trio()
async def test_a_batch_goes_on_when_its_orchestrator_is_back(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        first = await world.orchestrator()
        await world.scripted_worker(first, slots=4)
        await begin(await world.gateway())
        await until(lambda: now(world).num_completed >= 2)
        first.crash()
        again = await world.orchestrator(key=first.key)
        batch = await ended(world)
        assert (batch.orchestrator_id, batch.orchestrator_boot) == (first.id, again.boot_id)
        check_complete(world, batch)


@in_trio()
async def test_an_orchestrator_that_leaves_gives_its_batches_away_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1000.0)
    async with open_world(tmp_path) as world:
        nodes = await pair(world)
        await begin(await world.gateway())
        await until(lambda: now(world).num_completed >= 2)
        leaving = holder_of(world, nodes)
        await leaving.orchestrator.drain()
        await leaving.batches.leave()
        batch = await ended(world)
        assert batch.orchestrator_id != leaving.id
        check_complete(world, batch)


@in_trio()
async def test_what_a_runner_writes_after_another_one_took_its_batch_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1000.0)
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=2)
        await begin(await world.gateway())
        await until(lambda: now(world).num_completed >= 1)
        held = LiveBatch("batch_1", "in_progress", node.id, node.boot_id, key_has_ended=False)
        assert await node.batches._batches.claim(held, Holder("somebody else", "alive"))
        before = now(world)
        await until(lambda: not node.batches._running)
        assert now(world).num_completed == before.num_completed
        assert now(world).status == "in_progress"
        assert len(BatchStore(world.store).waiting_lines("batch_1", limit=99)) == LINES - before.num_completed


@in_trio()
async def test_a_runner_that_was_away_while_another_one_took_its_batch_begins_no_more_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 1000.0)
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        await begin(await world.gateway(), "tokens=1000 every=0.05")
        await until(lambda: node.batches._in_flight["demo"] == node.orchestrator.num_running == 3)
        held = LiveBatch("batch_1", "in_progress", node.id, node.boot_id, key_has_ended=False)
        assert await node.batches._batches.claim(held, Holder("somebody else", "alive"))
        await until(lambda: not node.batches._running)
        assert (node.batches._in_flight["demo"], node.orchestrator.num_running) == (0, 3), "its jobs are others' to end"
        for active in node.orchestrator.jobs:
            node.orchestrator.cancel(active, "the test is over")
        await until(lambda: not node.leftovers)
        assert len(world.store.jobs()) == 3


@in_trio()
async def test_who_lost_a_batch_does_not_drop_an_answer_that_its_holder_has_not_told_yet(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        gateway = await world.gateway()
        await begin(gateway, num_lines=1)
        await until(lambda: now(world).status == "in_progress")
        held = LiveBatch("batch_1", "in_progress", node.id, node.boot_id, key_has_ended=False)
        assert await node.batches._batches.claim(held, Holder("somebody else", "alive"))
        end = await gateway.client(make_job("tokens=2")).end()
        (line,) = BatchStore(world.store).waiting_lines("batch_1", limit=1)
        lost = Holder(node.id, node.boot_id)
        await node.batches._batches.end_line(
            "batch_1", line, lost, completed=True, outcome="{}", drop_answer_of=end.job_id
        )
        kept = world.store.job(end.job_id)
        assert kept is not None
        assert kept.result == "0 1 "


@in_trio()
async def test_a_line_whose_answer_somebody_has_deleted_is_an_error_and_holds_nothing_up(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        end_line, done = node.batches._batches.end_line, trio.Event()

        async def crash(*_args: object, **_facts: object) -> None:
            done.set()
            await trio.sleep_forever()

        node.batches._batches.end_line = crash  # type: ignore[method-assign]
        await begin(await world.gateway(), num_lines=1)
        await done.wait()
        await until(world.store.models)  # so that the next one knows that there is such a model
        node.batches._batches.end_line = end_line  # type: ignore[method-assign]
        node.crash()
        (ended_job,) = world.store.jobs()
        assert ended_job.status == "completed"
        world.store.write((Query("forget_job", {"id": ended_job.id}),))
        await world.orchestrator(key=node.key)
        batch = await ended(world)
        assert (batch.status, batch.num_completed, batch.num_failed) == ("completed", 0, 1)
        assert batch.error_file_id is not None
        assert "its answer was not kept" in (BatchStore(world.store).file_part(batch.error_file_id, 0) or "")


@in_trio()
async def test_a_store_that_goes_away_only_holds_a_batch_up(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=3)
        await begin(await world.gateway())
        for number, statement in enumerate(("INSERT INTO jobs", "UPDATE batch_lines", "UPDATE jobs", "file_parts")):
            if number < 3:
                await until(lambda number=number: now(world).num_completed >= 3 * number)  # type: ignore[misc]
            world.database.lose_answer_to = statement
            with trio.move_on_after(5):
                await until(lambda: world.database.is_away)
                num_refused = world.database.num_refused
                await until(lambda num_refused=num_refused: world.database.num_refused > num_refused)  # type: ignore[misc]
            world.database.is_away = False
        batch = await ended(world)
        assert (batch.status, batch.num_completed, batch.num_failed) == ("completed", LINES, 0)
        assert lines_of(world, batch.output_file_id) == dict.fromkeys(map(str, range(LINES)), "0 1 2 ")


@in_trio()
async def test_a_batch_is_cancelled_by_any_orchestrator(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        nodes = await pair(world)
        gateway = await world.gateway()
        await begin(gateway, "tokens=1000 every=0.05")
        await until(lambda: Counter(job.status for job in world.store.jobs())["running"] >= 3)
        other = next(node for node in nodes if node is not holder_of(world, nodes))
        await cancel(gateway, other)
        batch = await ended(world)
        assert (batch.status, batch.output_file_id, batch.num_failed) == ("cancelled", None, LINES)
        assert set(lines_of(world, batch.error_file_id).values()) == {"batch_cancelled"}
        assert {job.status for job in world.store.jobs()} == {"cancelled"}


@in_trio()
async def test_a_batch_whose_runner_died_while_it_was_cancelled_is_cancelled_by_the_next(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        nodes = await pair(world)
        gateway = await world.gateway()
        await begin(gateway, "tokens=1000 every=0.05")
        await until(lambda: Counter(job.status for job in world.store.jobs())["running"] >= 3)
        dead = holder_of(world, nodes)
        dead.crash()
        await cancel(gateway, next(node for node in nodes if node is not dead))
        batch = await ended(world)
        assert (batch.status, batch.num_failed) == ("cancelled", LINES)
        await until(lambda: {job.status for job in world.store.jobs()} == {"cancelled"})


def revoke(world: World, key_id: str) -> None:
    assert TenantStore(world.store).revoke_key(key_id, now=time.time())


def expire(world: World, key_id: str) -> None:
    TenantStore(world.store).rotate_key(key_id, grace_seconds=0.01, now=time.time())


def remove(world: World, _key_id: str) -> None:
    assert TenantStore(world.store).remove_tenant("tenant", now=time.time())


@pytest.mark.parametrize(
    ("take_away", "code"),
    [(revoke, "invalid_api_key"), (expire, "invalid_api_key"), (remove, "tenant_removed")],
    ids=["revoked", "expired", "removed"],
)
@in_trio()
async def test_a_batch_ends_with_the_key_or_the_tenant_that_it_came_with(
    tmp_path: Path, take_away: Callable[[World, str], None], code: str
) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        gateway = await world.gateway()
        TenantStore(world.store).create_tenant("tenant", now=time.time())
        _, key = TenantStore(world.store).create_key("tenant", now=time.time())
        await begin(gateway, "tokens=1000 every=0.05", key_id=key.id)
        await until(lambda: Counter(job.status for job in world.store.jobs())["running"] >= 3)
        num_jobs = len(world.store.jobs())
        take_away(world, key.id)
        batch = await ended(world)
        assert (batch.status, batch.output_file_id, batch.num_failed) == ("failed", None, LINES)
        assert [mistake.code for mistake in batch.errors] == [code]
        assert set(lines_of(world, batch.error_file_id).values()) == {code}
        assert Counter(job.status for job in world.store.jobs()) == {"cancelled": num_jobs}
        assert num_jobs < LINES


@in_trio()
async def test_a_batch_whose_key_ended_while_nobody_ran_it_is_not_gone_on_with(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        _, key = TenantStore(world.store).create_key("tenant", now=time.time())
        await begin(await world.gateway(), "tokens=3 every=0.1", key_id=key.id)
        await until(lambda: now(world).num_completed >= 3)
        node.crash()
        revoke(world, key.id)
        await until(lambda: not [job for job in world.store.jobs() if job.status == "queued"])
        num_jobs = len(world.store.jobs())
        again = await world.orchestrator(key=node.key)
        batch = await ended(world)
        assert (batch.orchestrator_boot, batch.status) == (again.boot_id, "failed")
        assert len(lines_of(world, batch.output_file_id)) == batch.num_completed >= 3
        assert set(lines_of(world, batch.error_file_id).values()) == {"invalid_api_key"}
        assert len(world.store.jobs()) == num_jobs


@in_trio()
async def test_a_batch_outlives_other_keys_and_tenants_than_its_own(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        tenants = TenantStore(world.store)
        tenants.create_tenant("other", now=time.time())
        _, key = tenants.create_key("tenant", now=time.time())
        _, sibling = tenants.create_key("tenant", now=time.time())
        await begin(await world.gateway(), key_id=key.id)
        revoke(world, sibling.id)
        assert tenants.remove_tenant("other", now=time.time())
        assert not tenants.remove_tenant("nobody", now=time.time())
        check_complete(world, await ended(world))


@in_trio()
async def test_what_is_not_run_in_time_expires_and_what_was_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_inquiries, "WINDOW_SECONDS", 1.5)
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=2)
        gateway = await world.gateway()
        await begin(gateway, "tokens=4 every=0.1")
        batch = await ended(world)
        done, late = lines_of(world, batch.output_file_id), lines_of(world, batch.error_file_id)
        assert batch.status == "expired"
        assert 0 < len(done) == batch.num_completed
        assert set(late.values()) == {"batch_expired"}
        assert sorted({**done, **late}, key=int) == list(map(str, range(LINES)))
        assert {job.status for job in world.store.jobs()} <= {"completed", "expired", "cancelled"}
        found = await gateway.submissions.ask(lambda request_id: GetBatch(request_id, "batch_1", "tenant"), Batches)
        assert found.batches[0] == batch


def break_line(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a mistake of Tether's keep one line from becoming a job."""
    make = batch_lines.to_job

    def fail_at_one(batch: BatchRecord, line: BatchLine, *args: Any) -> LineJob:
        if line.number == number:
            raise RuntimeError("a bug")
        return make(batch, line, *args)

    monkeypatch.setattr(batch_lines, "to_job", fail_at_one)


@in_trio()
async def test_a_line_that_cannot_be_made_a_job_has_that_as_its_error_and_the_batch_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_line(monkeypatch, 3)
    async with open_world(tmp_path) as world:
        await world.scripted_worker(await world.orchestrator(), slots=4)
        await begin(await world.gateway())
        batch = await ended(world)
        assert (batch.status, batch.num_completed, batch.num_failed) == ("completed", LINES - 1, 1)
        assert sorted(lines_of(world, batch.output_file_id), key=int) == [str(n) for n in range(LINES) if n != 2]
        store = BatchStore(world.store)
        (line,) = (store.file_part(batch.error_file_id or "", 0) or "").splitlines()
        response = json.loads(line)["response"]
        assert (response["status_code"], response["body"]["error"]["code"]) == (500, "internal_error")
        assert [record.message for record in caplog.records if record.exc_info] == [
            "batch batch_1: line 3 cannot be made a job"
        ], "a line is tried once, and the log says why"


@in_trio()
async def test_a_batch_is_cancelled_also_where_a_line_that_was_done_cannot_be_told_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = trio.Event()

    async def hold(*_: object) -> None:
        held.set()
        await trio.sleep_forever()

    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=2)
        gateway = await world.gateway()
        with monkeypatch.context() as patch:
            patch.setattr(batches_module.Batches, "_end_line", hold)
            await begin(gateway, num_lines=2)
            with trio.fail_after(20):
                await held.wait()
        break_line(monkeypatch, 1)
        await cancel(gateway, node)
        batch = await ended(world)
        assert (batch.status, batch.output_file_id, batch.num_failed) == ("cancelled", None, 2)
        told = "".join(BatchStore(world.store).file_part(batch.error_file_id or "", 0) or "").splitlines()
        assert [json.loads(line)["error"] is None for line in told] == [True, False]
        assert "internal_error" in told[0]


@in_trio()
async def test_lines_wait_for_a_worker(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        worker = await world.scripted_worker(node, slots=2)
        worker.crash()
        await until(lambda: not len(node.roster))
        await begin(await world.gateway(), num_lines=3)
        await until(lambda: now(world).status == "in_progress")
        await until(lambda: node.batches._in_flight["demo"] == 1)
        await world.scripted_worker(node, slots=2, name="another")
        check_complete(world, await ended(world), num_lines=3)


@in_trio()
async def test_a_runner_that_comes_back_from_the_store_when_all_is_ending_brings_its_work_to_nobody(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator()
        await world.scripted_worker(node, slots=4)
        await begin(await world.gateway())
        await until(lambda: node.orchestrator._jobs)
        template = next(iter(node.orchestrator._jobs.values())).job
        node.crash()
        await until(lambda: not node.orchestrator._nursery.child_tasks)
        active = node.orchestrator.submit(msgspec.structs.replace(template, id="job_late"))
        assert not active.done.is_set()


@in_trio()
async def test_batches_with_long_metadata_are_listed_whole(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        await world.orchestrator()
        gateway = await world.gateway()
        await begin(gateway)
        ask = gateway.submissions.ask
        metadata = {f"{number:064}": "\x01" * 512 for number in range(16)}
        for number in range(30):
            batch = BatchRecord(
                f"batch_m{number:02}", "tenant", "", "/v1/chat/completions", "file-1", 0.0, 0.0, metadata=metadata
            )
            await ask(lambda request_id, batch=batch: CreateBatch(request_id, batch), Batches)  # type: ignore[misc]

        async def page(after: str | None, limit: int) -> tuple[BatchRecord, ...]:
            return (await ask(lambda request_id: ListBatches(request_id, None, None, after, limit), Batches)).batches

        assert 1 <= len(await page(None, 40)) < 31
        found = await page_of(page, None, 40)
        assert len({batch.id for batch in found}) == len(found) == 31
