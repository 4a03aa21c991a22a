"""The gateway's side of a job, before orchestrators that are played by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from tests.support import LINKS, GatewayNode, HandOrchestrator, Peer, open_world, until
from tests.support import make_job as job
from tether import submissions as submissions_module
from tether.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    ErrorInfo,
    JobConflict,
    JobNotFound,
    NoOrchestrator,
    NoWorker,
)
from tether.following import END_SECONDS, Following
from tether.link import LinkSettings
from tether.messages import (
    Cancel,
    GetHealth,
    GetJob,
    Health,
    JobAccepted,
    JobEnd,
    JobMoved,
    JobQueued,
    Jobs,
    JobStarted,
    JobTokens,
    Leaving,
    Submit,
    Unwatch,
    Watch,
)
from tether.records import Job, JobRecord, Usage
from tether.store import DEADLINE_SECONDS
from tether.submissions import Submissions
from tether.testing import in_trio


class Stage:
    """A gateway and its orchestrators."""

    def __init__(self, gateway: GatewayNode, orchestrators: list[HandOrchestrator]) -> None:
        self.gateway = gateway
        self.orchestrators = orchestrators
        self.orchestrator = orchestrators[0]

    def accept(self, new: Job) -> None:
        self.orchestrator.send(self.gateway, JobAccepted(new.id, "running"))

    async def submit(self, new: Job, answers: list[str]) -> None:
        answers.append((await self.gateway.submissions.submit(new)).status)

    def tokens(self, new: Job, *positions: int) -> None:
        text = "".join(f"{position} " for position in positions)
        self.orchestrator.send(self.gateway, JobTokens(new.id, 1, positions[0], positions, text))

    def end(self, new: Job, error: ErrorInfo | None = None, attempt: int = 1) -> None:
        status, reason = ("completed", "stop") if error is None else ("failed", "error")
        end = JobEnd(new.id, status, attempt, reason, Usage(), error)  # type: ignore[arg-type]
        self.orchestrator.send(self.gateway, end)


@asynccontextmanager
async def stage(folder: Path, *, num_orchestrators: int = 1, links: LinkSettings = LINKS) -> AsyncIterator[Stage]:
    async with open_world(folder, link_settings=links) as world:
        orchestrators = [HandOrchestrator(world, name=f"orchestrator {n}") for n in range(num_orchestrators)]
        await world.start(*orchestrators)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == num_orchestrators or None)
        await until(lambda: all(each.links.with_role("gateway") for each in orchestrators))
        yield Stage(gateway, orchestrators)


# --- jobs ------------------------------------------------------------------------------------------------------------


def following_of(new: Job) -> Following:
    return Following(new.id, new, new.sampling.n, new.deadline_seconds)


@in_trio()
async def test_what_an_orchestrator_tells_arrives_in_order_and_the_end_is_the_last(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job()
        client = s.gateway.client(new)
        assert await s.orchestrator.next(Submit) == Submit(new)
        s.accept(new)
        s.orchestrator.send(s.gateway, JobQueued(new.id, 1, 5.0))
        s.orchestrator.send(s.gateway, JobStarted(new.id, 1, "w", "worker"))
        s.tokens(new, 0)
        s.tokens(new, 1, 2)
        s.end(new)
        s.tokens(new, 3)
        s.end(new)
        await client.end()
        assert [type(event) for event in client.events] == [
            JobAccepted,
            JobQueued,
            JobStarted,
            JobTokens,
            JobTokens,
            JobEnd,
        ]
        assert client.token_ids == [0, 1, 2]
        assert s.orchestrator.of(Cancel) == []


@in_trio()
async def test_events_that_came_while_the_client_was_slow_are_told_together_and_none_is_lost(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        client = s.gateway.client(job(), room=1)
        new = client.job
        await s.orchestrator.next(Submit)
        s.accept(new)
        await client.until(JobAccepted)
        s.tokens(new, 0)
        s.tokens(new, 1)
        s.end(new)
        following = s.gateway.submissions._following[new.id]
        await until(lambda: following.ended)
        assert client.events == [JobAccepted(new.id, "running")]
        client.read_on()
        await client.end()
        assert [type(event) for event in client.events[1:]] == [JobTokens, JobTokens, JobEnd]
        assert s.gateway.submissions.num_following == 0


@in_trio()
async def test_a_slow_reader_of_a_job_holds_no_other_one_back(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        slow = s.gateway.client(job(), room=2, stays=True)
        new = slow.job
        await s.orchestrator.next(Submit)
        s.accept(new)
        s.tokens(new, 0)
        await slow.until_tokens(0)
        quick = s.gateway.client(new, stays=True)
        for position in range(1, 100):
            s.tokens(new, position)
        await quick.until_tokens(*range(100))
        assert slow.token_ids == [0]
        s.end(new)
        await quick.end()
        slow.read_on()
        await slow.end()
        assert slow.token_ids == list(range(100))


@in_trio()
async def test_tokens_that_the_client_has_are_dropped_and_a_gap_is_asked_for(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job()
        client = s.gateway.client(new)
        await s.orchestrator.next(Submit)
        s.accept(new)
        s.tokens(new, 0, 1)
        s.tokens(new, 0, 1)
        s.tokens(new, 1)
        s.tokens(new, 4, 5)
        again = await s.orchestrator.next(Submit, 2)
        assert (again.job, again.emitted, again.texts) == (new, ((0, 1),), ("0 1 ",))
        s.accept(new)
        s.tokens(new, 2, 3)
        s.tokens(new, 4, 5)
        s.end(new)
        await client.end()
        assert client.token_ids == [0, 1, 2, 3, 4, 5]
        assert len(client.of(JobAccepted)) == 1


@in_trio()
async def test_a_job_goes_to_the_next_link_of_its_orchestrator_with_what_its_client_has_seen(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job()
        client = s.gateway.client(new)
        await s.orchestrator.next(Submit)
        s.accept(new)
        s.tokens(new, 0, 1)
        await client.until_tokens(0, 1)
        s.gateway.world.memory.end(s.gateway.id, s.orchestrator.id)
        again = await s.orchestrator.next(Submit, 2)
        assert (again.job, again.emitted, again.texts) == (new, ((0, 1),), ("0 1 ",))
        s.tokens(new, 2)
        s.end(new)
        await client.end()
        assert client.token_ids == [0, 1, 2]


@in_trio()
async def test_of_a_job_that_ended_meanwhile_the_rest_comes_as_tokens_before_its_end(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        new = job()
        client = s.gateway.client(new)
        await until(lambda: any(each.of(Submit) for each in s.orchestrators))
        one, other = s.orchestrators if s.orchestrators[0].of(Submit) else s.orchestrators[::-1]
        s.orchestrator = one
        s.accept(new)
        s.tokens(new, 0, 1)
        await client.until_tokens(0, 1)
        one.crash()
        await other.next(Submit)
        other.send(s.gateway, JobEnd(new.id, "completed", 1, "stop", Usage(1, 4), text="0 1 2 3 "))
        end = await client.end()
        assert (end.text, end.usage) == (None, Usage(1, 4))
        assert client.text == "0 1 2 3 "
        *_, rest, last = client.events
        assert (rest, last) == (JobTokens(new.id, 1, 2, (), "2 3 "), end)


@in_trio()
async def test_a_job_goes_at_once_to_another_orchestrator_that_is_there_and_says_whom_it_lost(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        new = job()
        client = s.gateway.client(new)
        await until(lambda: any(each.of(Submit) for each in s.orchestrators))
        one, other = s.orchestrators if s.orchestrators[0].of(Submit) else s.orchestrators[::-1]
        s.orchestrator = one
        s.accept(new)
        await client.until(JobAccepted)
        one.crash()
        again = await other.next(Submit)
        assert (again.lost_id, again.lost_boot, again.accepted) == (one.id, one.boot_id, True)
        assert again.seconds_left is not None
        assert 0 < again.seconds_left <= new.deadline_seconds
        s.orchestrator = other
        s.accept(new)
        s.end(new)
        await client.end()


@in_trio()
async def test_a_job_that_moved_is_brought_to_whoever_has_it_or_to_any_that_stays(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=3) as s:
        new = job()
        client = s.gateway.client(new)
        await until(lambda: any(each.of(Submit) for each in s.orchestrators))
        first = next(each for each in s.orchestrators if each.of(Submit))
        second, third = (each for each in s.orchestrators if each is not first)
        first.send(s.gateway, JobMoved(new.id, third.id, third.boot_id))
        again = await third.next(Submit)
        assert (again.lost_id, again.lost_boot) == (third.id, third.boot_id)
        assert second.of(Submit) == []
        for leaving in (first, third):
            leaving.send(s.gateway, Leaving())
        third.send(s.gateway, JobMoved(new.id))
        again = await second.next(Submit)
        assert (again.lost_id, again.lost_boot) == (third.id, third.boot_id)
        s.orchestrator = second
        s.accept(new)
        s.end(new)
        await client.end()
        assert {(await s.gateway.submissions._orchestrator(1.0)).peer_id for _ in range(3)} == {second.id}
        second.crash()
        await s.gateway.until(lambda: s.gateway.links.get(second.id) is None or None)
        assert (await s.gateway.submissions._orchestrator(1.0)).peer_id in {first.id, third.id}, "to be told why not"


@in_trio()
async def test_a_job_that_nobody_waits_for_goes_to_another_orchestrator_until_one_has_taken_it(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        new = job(wait=False)
        answers: list[str] = []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.submit, new, answers)
            await until(lambda: any(each.of(Submit) for each in s.orchestrators))
            one, other = s.orchestrators if s.orchestrators[0].of(Submit) else s.orchestrators[::-1]
            one.crash()
            assert (await other.next(Submit)).lost_id == one.id
            s.orchestrator = other
            s.accept(new)
        assert answers == ["running"]


@in_trio()
async def test_what_another_orchestrator_says_of_a_job_does_not_count(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        new = job()
        client = s.gateway.client(new)
        await until(lambda: any(each.of(Submit) for each in s.orchestrators))
        mine, stranger = s.orchestrators if s.orchestrators[0].of(Submit) else s.orchestrators[::-1]
        s.orchestrator = stranger
        s.tokens(new, 0)
        s.end(new)
        await heard(s, stranger)
        s.orchestrator = mine
        s.end(new)
        await client.end()
        assert client.token_ids == []


async def heard(s: Stage, by: HandOrchestrator) -> None:
    """Return when what `by` sent before has been handled: it answers a question after it."""
    link = s.gateway.links.get(by.id)
    assert link is not None
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            await s.gateway.links.ask(link, lambda number: GetJob(number, "nothing"), Jobs)

        nursery.start_soon(ask)
        question = await by.next(GetJob)
        by.send(s.gateway, Jobs(question.request_id))


@in_trio()
async def test_a_client_that_leaves_cancels_its_job_and_one_that_has_its_end_does_not(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        done, left = s.gateway.client(job()), s.gateway.client(job())
        await s.orchestrator.next(Submit, 2)
        s.end(done.job)
        await done.end()
        left.leave()
        await s.orchestrator.next(Cancel)
        assert s.orchestrator.of(Cancel) == [Cancel(left.job.id)]
        assert s.gateway.submissions.num_following == 0


@in_trio()
async def test_a_cancel_that_was_sent_on_a_link_that_was_dead_already_is_sent_again(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        client = s.gateway.client(job())
        await s.orchestrator.next(Submit)
        s.gateway.world.memory.cut(s.gateway.id, s.orchestrator.id)
        client.leave()
        await client.done.wait()
        await until(lambda: not s.gateway.links.get(s.orchestrator.id) and not s.orchestrator.links.get(s.gateway.id))
        assert not s.orchestrator.of(Cancel)
        s.gateway.world.memory.heal(s.gateway.id, s.orchestrator.id)
        assert (await s.orchestrator.next(Cancel)).job_id == client.job.id


@in_trio()
async def test_every_orchestrator_hears_of_a_client_that_left_while_its_jobs_own_one_was_lost(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        following = following_of(job())
        following.orchestrator_id = "lost"
        s.gateway.submissions._leave(following)
        for each in s.orchestrators:
            assert (await each.next(Cancel)).job_id == following.job_id


@in_trio()
async def test_one_job_has_one_client_at_a_gateway(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        client = s.gateway.client(job())
        await s.orchestrator.next(Submit)
        again = s.gateway.client(client.job)
        with pytest.raises(JobConflict, match="has a client here already"):
            await again.end()
        assert s.gateway.submissions.num_following == 1
        s.end(client.job)
        await client.end()


@in_trio(clock_jumps=True)
async def test_an_orchestrator_that_never_ends_a_job_is_not_waited_for_without_a_bound(tmp_path: Path) -> None:
    async with stage(tmp_path, links=msgspec.structs.replace(LINKS, silence_seconds=600.0)) as s:
        new = job(deadline_seconds=30.0)
        began = trio.current_time()
        client = s.gateway.client(new)
        await s.orchestrator.next(Submit)
        with pytest.raises(DeadlineExceeded):
            await client.end()
        assert trio.current_time() - began == pytest.approx(30 + END_SECONDS, abs=1)
        await s.orchestrator.next(Cancel)


@in_trio()
async def test_an_orchestrator_that_cannot_hear_is_none(tmp_path: Path) -> None:
    async with stage(tmp_path, links=msgspec.structs.replace(LINKS, max_buffer_bytes=2_000)) as s:
        client = s.gateway.client(job("x" * 3_000))
        with pytest.raises(NoOrchestrator, match="cannot hear"):
            await client.end()
        with pytest.raises(NoOrchestrator, match="cannot hear"):
            await s.gateway.submissions.submit(job("x" * 3_000, wait=False))
        with pytest.raises(NoOrchestrator, match="cannot hear"):
            await s.gateway.submissions.job("x" * 3_000, None)


@in_trio()
async def test_a_job_that_fits_into_no_frame_is_refused_as_too_large(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        client = s.gateway.client(job("x" * (1 << 20)))
        with pytest.raises(BodyTooLarge):
            await client.end()
        assert s.orchestrator.of(Submit) == []


# --- jobs that nobody waits for --------------------------------------------------------------------------------------


@in_trio()
async def test_a_job_that_nobody_waits_for_is_answered_when_it_is_in_the_ledger(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job(wait=False)
        answers: list[str] = []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.submit, new, answers)
            assert await s.orchestrator.next(Submit) == Submit(new)
            s.accept(new)
        assert answers == ["running"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.submit, new, answers)
            await s.orchestrator.next(Submit, 2)
            s.end(new)
        assert answers == ["running", "completed"], "it had ended already"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.submit, new, answers)
            nursery.start_soon(s.submit, new, answers)
            await s.orchestrator.next(Submit, 3)
            s.accept(new)
        assert answers[2:] == ["running", "running"], "the same job at the same moment"
        assert len(s.orchestrator.of(Submit)) == 3
        assert s.gateway.submissions.num_following == 0


def record_of(new: Job, orchestrator_id: str) -> JobRecord:
    """A live job as the store has it."""
    facts: dict[str, object] = dict.fromkeys(JobRecord.__struct_fields__)
    facts |= {name: getattr(new, name) for name in Job.__struct_fields__ if name in facts}
    facts |= {"status": "running", "attempt": 1, "usage": Usage(), "orchestrator_id": orchestrator_id}
    facts |= {"fingerprint": "", "exact": True, "logprobs": ()}
    return JobRecord(**facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("reader_leaves", [False, True])
@in_trio()
async def test_whoever_reads_a_job_before_it_is_accepted_for_another_goes_on_reading_it(
    tmp_path: Path, reader_leaves: bool
) -> None:
    async with stage(tmp_path) as s:
        new = job(wait=False)
        answers: list[str] = []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.submit, new, answers)
            await s.orchestrator.next(Submit)
            reader = s.gateway.client(new, stays=True)
            await until(lambda: s.gateway.submissions._following[new.id].readers)
            if reader_leaves:
                reader.leave()
                await reader.done.wait()
            s.accept(new)
        assert answers == ["running"]
        if reader_leaves:
            assert s.gateway.submissions.num_following == 0
            return
        asked = await s.orchestrator.next(GetJob)
        s.orchestrator.send(s.gateway, Jobs(asked.request_id, (record_of(new, s.orchestrator.id),)))
        await s.orchestrator.next(Watch)
        s.tokens(new, 0, 1)
        s.end(new)
        assert (await reader.end()).status == "completed"
        assert reader.text == "0 1 "


@in_trio()
async def test_an_end_that_was_on_its_way_to_whoever_read_the_job_before_is_no_whole_answer(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job()
        before = s.gateway.client(new, stays=True)
        await s.orchestrator.next(Submit)
        s.accept(new)
        await before.until(JobAccepted)
        before.leave()
        await before.done.wait()
        again = s.gateway.client(new, stays=True)
        await s.orchestrator.next(Submit, 2)
        end = JobEnd(new.id, "completed", 1, "stop", Usage(1, 2), told=((2, 4),))
        s.orchestrator.send(s.gateway, end)
        await s.orchestrator.next(Submit, 3)
        s.orchestrator.send(s.gateway, msgspec.structs.replace(end, told=(), text="0 1 "))
        assert (await again.end()).status == "completed"
        assert again.text == "0 1 "


@pytest.mark.parametrize("leaves", [False, True])
@in_trio()
async def test_a_job_that_nobody_has_to_wait_for_is_told_to_who_follows_it_and_goes_on_without_them(
    tmp_path: Path, leaves: bool
) -> None:
    async with stage(tmp_path) as s:
        new = job(wait=False, stream=True)
        client = s.gateway.client(new, stays=True)
        assert await s.orchestrator.next(Submit) == Submit(new)
        s.accept(new)  # and no more: it tells of such a job to those who ask
        asked = await s.orchestrator.next(GetJob)
        s.orchestrator.send(s.gateway, Jobs(asked.request_id, (record_of(new, s.orchestrator.id),)))
        assert await s.orchestrator.next(Watch) == Watch(new.id, ((0, 0),))
        s.tokens(new, 0, 1)
        await until(lambda: client.text == "0 1 ")
        if leaves:
            client.leave()
            assert await s.orchestrator.next(Unwatch) == Unwatch(new.id)
        else:
            s.end(new)
            assert (await client.end()).status == "completed"
            assert [type(event) for event in client.events] == [JobAccepted, JobTokens, JobEnd]
        assert s.gateway.submissions.num_following == 0
        assert s.orchestrator.of(Cancel) == []
        assert len(s.orchestrator.of(Submit)) == 1


@in_trio()
async def test_a_job_that_nobody_has_to_wait_for_is_refused_as_any_other(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job(wait=False, stream=True)
        client = s.gateway.client(new, stays=True)
        await s.orchestrator.next(Submit)
        s.end(new, NoWorker("none").to_info(), attempt=0)
        end = await client.end()
        assert end.error is not None
        assert (end.status, end.error.code) == ("failed", "no_worker")


@in_trio()
async def test_a_refusal_of_a_job_that_nobody_waits_for_is_raised(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        new = job(wait=False)

        async def refuse() -> None:
            await s.orchestrator.next(Submit)
            s.end(new, ErrorInfo("no_worker", "none", None, 2.0), attempt=0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            with pytest.raises(NoWorker, match="none") as caught:
                await s.gateway.submissions.submit(new)
        assert caught.value.retry_after_seconds == 2.0


@in_trio()
async def test_when_nobody_says_whether_a_job_was_taken_the_error_says_to_look_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions_module, "ASK_SECONDS", 0.1)
    async with stage(tmp_path) as s:
        late, lost = job(wait=False), job(wait=False)
        with pytest.raises(DeadlineExceeded, match=f"look for job {late.id} before you repeat it"):
            await s.gateway.submissions.submit(late)
        monkeypatch.setattr(submissions_module, "ASK_SECONDS", 10.0)
        monkeypatch.setattr(submissions_module, "FAILOVER_WAIT_SECONDS", 0.1)

        async def crash() -> None:
            await s.orchestrator.next(Submit, 2)
            s.orchestrator.crash()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)
            with pytest.raises(NoOrchestrator, match=f"look for job {lost.id} before you repeat it"):
                await s.gateway.submissions.submit(lost)
        assert s.gateway.submissions.num_following == 0


# --- questions and the choice of an orchestrator ---------------------------------------------------------------------


@in_trio()
async def test_a_question_is_answered_or_its_error_raised(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:

        async def answer() -> None:
            health = await s.orchestrator.next(GetHealth)
            s.orchestrator.send(s.gateway, Health(health.request_id, None, 3, 2, 1, 0))
            question = await s.orchestrator.next(GetJob)
            s.orchestrator.send(s.gateway, Jobs(question.request_id, error=JobNotFound("no").to_info()))
            await s.orchestrator.next(GetJob, 2)
            s.orchestrator.crash()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            assert (await s.gateway.submissions.health()).num_workers == 3
            with pytest.raises(JobNotFound):
                await s.gateway.submissions.job("nothing", None)
            with pytest.raises(NoOrchestrator, match="was lost before it answered"):
                await s.gateway.submissions.job("nothing", None)


@in_trio()
async def test_a_new_job_goes_to_the_orchestrator_with_the_least_to_do_and_equals_take_turns(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        chosen = [(await s.gateway.submissions._orchestrator(1.0)).peer_id for _ in range(4)]
        assert chosen in (
            [s.orchestrators[0].id, s.orchestrators[1].id] * 2,
            [s.orchestrators[1].id, s.orchestrators[0].id] * 2,
        )
        loads = {s.orchestrators[0].id: 5, s.orchestrators[1].id: 1}
        monitored = Peer(s.gateway.world, "gateway", name="other")
        busy = Submissions(monitored.links, load=lambda peer_id: loads[peer_id])
        await s.gateway.world.start(monitored)
        await until(lambda: len(monitored.links.up) == 2)
        assert {(await busy._orchestrator(1.0)).peer_id for _ in range(4)} == {s.orchestrators[1].id}


@in_trio()
async def test_a_new_job_waits_a_moment_for_an_orchestrator_that_is_on_its_way(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        gateway = GatewayNode(world)
        await world.start(gateway)
        client = gateway.client(job())
        orchestrator = HandOrchestrator(world)
        await world.start(orchestrator)
        await orchestrator.next(Submit)
        orchestrator.send(gateway, JobEnd(client.job.id, "completed", 1, "stop", Usage()))
        assert (await client.end()).status == "completed"


@in_trio(clock_jumps=True)
async def test_only_so_many_clients_that_left_are_remembered_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submissions_module, "MAX_LEFT", 3)
    async with stage(tmp_path) as s:
        submissions, sent = s.gateway.submissions, []
        for _ in range(6):
            following = following_of(job())
            following.orchestrator_id = s.orchestrator.id
            sent.append(following)
        for following in sent[:5]:
            submissions._leave(following)
        assert list(submissions._left) == [following.job_id for following in sent[:3]]
        await trio.sleep(submissions_module.FAILOVER_WAIT_SECONDS + 1)
        submissions._leave(sent[5])
        assert list(submissions._left) == [sent[5].job_id]


@in_trio()
async def test_an_orchestrator_that_is_back_is_told_once_of_the_jobs_that_it_was_sent_and_whose_clients_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stage(tmp_path) as s:
        memory, submissions = s.gateway.world.memory, s.gateway.submissions
        client = s.gateway.client(job())
        await s.orchestrator.next(Submit)
        memory.cut(s.gateway.id, s.orchestrator.id)
        await s.gateway.until(lambda: not s.gateway.links.with_role("orchestrator"))
        client.leave()
        await client.done.wait()
        # A job that nobody was sent is nobody's to be cancelled, and takes no room.
        monkeypatch.setattr(submissions_module, "ORCHESTRATOR_WAIT_SECONDS", 0.05)
        with pytest.raises(NoOrchestrator):
            await s.gateway.client(job()).end()
        late, others = following_of(job()), following_of(job())
        others.orchestrator_id = "another"
        submissions._leave(others)
        submissions._left[late.job_id] = (s.orchestrator.id, trio.current_time())
        assert set(submissions._left) == {client.job.id, late.job_id, others.job_id}
        memory.heal(s.gateway.id, s.orchestrator.id)
        await s.orchestrator.next(Cancel)
        memory.end(s.gateway.id, s.orchestrator.id)
        await until(lambda: s.orchestrator.links.get(s.gateway.id) is None)
        await until(lambda: s.gateway.links.get(s.orchestrator.id))
        await heard(s, s.orchestrator)
        assert s.orchestrator.of(Cancel) == [Cancel(client.job.id)]
        assert list(submissions._left) == [others.job_id], "its own orchestrator may still be back"


def test_an_orchestrator_has_longer_to_answer_than_its_store_to_be_given_up() -> None:
    # A write may have to wait for the one before it, and is read back after it.
    assert submissions_module.ASK_SECONDS > 2 * DEADLINE_SECONDS
