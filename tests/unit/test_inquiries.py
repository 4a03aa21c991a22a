from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from tests.support import make_job as job
from tests.support import open_world, until
from tether import answering
from tether import inquiries as inquiries_module
from tether.desk import page_of
from tether.errors import LinkFull, from_info
from tether.link import Link
from tether.messages import CancelJob, GetHealth, GetJob, Jobs, LinkMessage, ListJobs
from tether.records import Actor, ModelInfo, Sampling
from tether.testing import in_trio


@in_trio()
async def test_a_page_has_at_least_one_job_and_at_most_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiries_module, "MAX_PAGE", 2)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        for _ in range(3):
            await gateway.client(job()).end()
        for limit, count in ((-5, 1), (0, 1), (1, 1), (2, 2), (1000, 2)):
            assert len(await gateway.submissions.jobs(None, None, None, None, limit)) == count


@in_trio()
async def test_a_listing_leaves_out_what_may_be_long_and_is_told_in_as_many_messages_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = msgspec.json.encode({"type": "object", "description": "x" * 60_000}).decode()
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        sampling = Sampling(seed=1, json_schema=schema)
        made = [job(sampling=sampling) for _ in range(20)]
        for each in made:
            await gateway.client(each).end()
        listed = await gateway.submissions.jobs(None, None, None, None, 100)
        assert [each.id for each in listed] == [each.id for each in reversed(made)]
        assert all(each.sampling == Sampling(seed=1) for each in listed)
        assert (await gateway.submissions.job(made[0].id, None)).sampling == sampling

        monkeypatch.setattr(answering, "MAX_FRAME_BYTES", 6 * len(msgspec.json.encode(listed[0])))
        ask = partial(gateway.submissions.jobs, None, None, None)
        assert 1 <= len(await ask(None, 100)) < 7
        assert await page_of(ask, None, 100) == listed
        assert await page_of(ask, listed[3].id, 10) == listed[4:14]


@in_trio()
async def test_too_many_questions_at_once_are_refused_and_later_ones_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "MAX_OPEN", 2)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        blocked = trio.Event()

        read = orchestrator.ledger.read

        async def block(call: Callable[..., object], *args: object, **named: object) -> object:
            if call == orchestrator.ledger.store.jobs:
                await blocked.wait()
            return await read(call, *args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(orchestrator.ledger, "read", block)
            link = gateway.links.with_role("orchestrator")[0]
            replies: list[Jobs] = []

            async def ask() -> None:
                replies.append(await gateway.links.ask(link, ListJobs, Jobs))

            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(ask)
                await until(lambda: len(replies) == 2)
                assert {reply.error.code for reply in replies if reply.error} == {"queue_full"}
                blocked.set()
        assert [reply.error for reply in replies[2:]] == [None, None]
        assert await gateway.submissions.jobs(None, None, None, None, 1) == []


@in_trio()
async def test_a_mistake_in_an_answer_is_told_and_the_next_question_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()

        read = orchestrator.ledger.read

        async def fail(call: Callable[..., object], *args: object, **named: object) -> object:
            if call == orchestrator.ledger.store.job:
                raise RuntimeError("a bug")
            return await read(call, *args, **named)

        link = gateway.links.with_role("orchestrator")[0]
        with monkeypatch.context() as patch:
            patch.setattr(orchestrator.ledger, "read", fail)
            reply = await gateway.links.ask(link, lambda number: GetJob(number, "job"), Jobs)
        assert reply.error is not None
        assert reply.error.code == "internal_error"
        reply = await gateway.links.ask(link, lambda number: GetJob(number, "job"), Jobs)
        assert reply.error is not None
        assert from_info(reply.error).status == 404


@in_trio()
async def test_an_asker_that_does_not_read_keeps_its_link(tmp_path: Path) -> None:
    class FullLink(Link):
        def send(self, message: LinkMessage) -> None:
            raise LinkFull(f"no room for {type(message).__name__}")

    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        link = FullLink("peer", roles=["gateway"], name="gateway", region="here", boot_id="boot")
        orchestrator.inquiries._on_get_health(link, GetHealth(1))
        orchestrator.inquiries._on_get_job(link, GetJob(2, "job"))
        await until(lambda: orchestrator.inquiries._answering.num_open == 0)


@in_trio()
async def test_health_and_an_explanation_say_of_workers_that_take_no_jobs_how_many_and_why(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        workers = [await world.hand_worker(orchestrator, name=name) for name in ("polite", "drained", "ready", "loads")]
        gateway = await world.gateway()
        workers[0].tell(paused="on battery")
        workers[3].tell(models=(ModelInfo("demo", "1.0", slots=0),))
        orchestrator.roster.set_drained({workers[1].id})
        await until(lambda: any(state.paused for state in orchestrator.roster.states))
        await until(lambda: any(not state.models[0].slots for state in orchestrator.roster.states))

        health = await gateway.submissions.health()
        assert (health.num_workers, health.num_ready_workers) == (4, 1)
        assert health.reasons == {"paused": 1, "draining": 1, "loading": 1}
        assert health.why == "draining 1 (by an operator), paused 1 (on battery), loading 1"
        found = await gateway.submissions.explain(job())
        assert {each.name: (each.reason, each.detail) for each in found.workers} == {
            "ready": (None, ""),
            "polite": ("paused", "on battery"),
            "drained": ("draining", "by an operator"),
            "loads": ("loading", ""),
        }

        workers[2].tell(paused="outside 20:00-08:00")
        await until(
            lambda: all(not view.takes_jobs or not view.state.models[0].slots for view in orchestrator.roster.views())
        )
        found = await gateway.submissions.explain(job())
        assert found.outcome == "waits", "the one that loads will take it"
        workers[3].tell(paused="on battery")
        await until(lambda: not any(view.takes_jobs for view in orchestrator.roster.views()))
        error = (await gateway.client(job()).end()).error
        assert error is not None
        assert (error.code, error.reasons["paused"], error.reasons["draining"]) == ("no_worker", 3, 1)
        assert "draining 1 (by an operator), paused 3 (on battery 2, outside 20:00-08:00 1)" in error.message


@in_trio()
async def test_a_key_that_ends_or_deletes_another_tenants_job_has_a_line_in_the_audit_log(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator, slots=3)
        gateway = await world.gateway()
        jobs = [job(), job(), job()]
        for new in jobs:
            gateway.client(new)
            await worker.start_of(new)
        for new, by in zip(jobs, (Actor("key-1", "ops"), Actor("key-2", "tenant"), None), strict=True):
            assert (await gateway.submissions.cancel(new.id, None, by)).status == "cancelled"
            assert (await gateway.submissions.forget(new.id, None, by)).keep == "nothing"
        lines = [(event.action, event.who, event.subject, event.details) for event in world.store.audit_events()]
        assert lines == [
            ("job.forgotten", "key-1", jobs[0].id, {"tenant": "tenant"}),
            ("job.cancelled", "key-1", jobs[0].id, {"tenant": "tenant"}),
        ]


@in_trio()
async def test_a_job_of_an_orchestrator_that_is_lost_can_be_cancelled_at_another_one(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        dead, alive = await world.orchestrator(name="dead"), await world.orchestrator(name="alive")
        gateway = await world.gateway()
        link = await gateway.until(lambda: gateway.links.get(alive.id))
        new = job()
        await alive.ledger.admit(
            new, orchestrator_id=dead.id, orchestrator_boot=dead.boot_id, now=time.time(), worker=("w", "boot", 1)
        )
        cancel = partial(CancelJob, job_id=new.id, tenant_id=new.tenant_id)
        await until(lambda: alive.links.get(dead.id))
        dead.crash()
        await until(lambda: alive.links.get(dead.id) is None)
        others = await gateway.links.ask(link, lambda number: CancelJob(number, new.id, "another tenant"), Jobs)
        assert others.error is not None
        assert others.error.code == "job_not_found"
        (record,) = (await gateway.links.ask(link, cancel, Jobs)).jobs
        assert (record.id, record.status) == (new.id, "cancelled")
        assert [attempt.status for attempt in world.attempts(new)] == ["cancelled"]
        again = await gateway.links.ask(link, cancel, Jobs)
        assert again.error is not None
        assert "has ended already: it is cancelled" in again.error.message
