"""The worker between orchestrators and runtime children, both played by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from tests.support import LINKS, HandOrchestrator, Peer, World, open_world, until
from tests.support import make_job as job
from tether import worker as worker_module
from tether.errors import ErrorInfo, RuntimeDied
from tether.link import LinkSettings
from tether.messages import InferBusy, InferCancel, InferEnd, InferStart, InferTokens, Presence
from tether.node_key import sign, verify
from tether.politeness import Facts, Politeness
from tether.records import ModelInfo, Usage
from tether.runtime_messages import Cancel, End, Event, Generate, Refused, Request, Started, Stats, Tokens
from tether.settings import WorkerSettings
from tether.testing import in_trio
from tether.worker import Offer, Worker

PATIENT = msgspec.structs.replace(LINKS, silence_seconds=600.0)


class FakeChild:
    """A runtime child without a process."""

    def __init__(
        self,
        name: str,
        arguments: list[str],
        *,
        on_event: Callable[[Event], None],
        on_ready: Callable[[ModelInfo], None],
        on_lost: Callable[[], None],
        on_loading: Callable[[object], None],
        variables: tuple[str, ...],
    ) -> None:
        self.name = name
        self.variables = variables
        self.slots = int(arguments[0])
        self.model: ModelInfo | None = None
        self.requests: list[Request] = []
        self.num_kills = 0
        self.say = on_event
        self._on_ready = on_ready
        self._on_lost = on_lost
        del on_loading

    def send(self, request: Request) -> None:
        if self.model is None:
            raise RuntimeDied("not ready")
        self.requests.append(request)

    def kill(self) -> None:
        self.num_kills += 1
        self.die()

    def die(self) -> None:
        self.model = None
        self._on_lost()

    def load(self) -> None:
        self.model = ModelInfo("internal name", "0", revision="r", slots=self.slots)
        self._on_ready(self.model)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        self.load()
        task_status.started()
        await trio.sleep_forever()


class WorkerNode(Peer):
    def __init__(self, world: World, *offers: Offer) -> None:
        super().__init__(world, "worker", name="worker")
        self.node = msgspec.structs.replace(self.node, grace_seconds=0.0)
        self.facts = Facts(minute_of_day=0, idle_seconds=900.0)
        self.worker = Worker(
            self.links,
            list(offers or [Offer("demo", "1.0", ("2",), toy=True)]),
            node=self.node,
            settings=WorkerSettings(presence_seconds=5.0, gpu_class="tpu", politeness=Politeness(polite=True)),
            look=lambda: self.facts,
            boot_id=self.boot_id,
            sign=lambda payload: sign(self.key, payload),
        )

    async def start(self, nursery: trio.Nursery) -> None:
        await super().start(nursery)
        await nursery.start(self.worker.run)

    @property
    def children(self) -> list[FakeChild]:
        return self.worker.children  # type: ignore[return-value]

    @property
    def child(self) -> FakeChild:
        return self.children[0]


class Stage:
    """A worker with its orchestrators."""

    def __init__(self, worker: WorkerNode, orchestrators: list[HandOrchestrator]) -> None:
        self.worker = worker
        self.orchestrators = orchestrators
        self.orchestrator = orchestrators[0]

    async def begin(self, *, orchestrator: HandOrchestrator | None = None, attempt: int = 1) -> InferStart:
        """Send a job to the worker, and wait until its child has it."""
        start = InferStart(job(), attempt)
        (orchestrator or self.orchestrator).send(self.worker, start)
        key = f"{start.job.id}/{attempt}"
        await until(lambda: key in [r.id for r in self.worker.child.requests if isinstance(r, Generate)])
        return start


@asynccontextmanager
async def stage(
    folder: Path, *offers: Offer, num_orchestrators: int = 1, links: LinkSettings = PATIENT
) -> AsyncIterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "RuntimeChild", FakeChild)
        async with open_world(folder, link_settings=links) as world:
            orchestrators = [HandOrchestrator(world, name=f"orchestrator {n}") for n in range(num_orchestrators)]
            await world.start(*orchestrators)
            worker = WorkerNode(world, *offers)
            await world.start(worker)
            for each in orchestrators:
                await each.next(Presence)
            yield Stage(worker, orchestrators)


# --- attempts --------------------------------------------------------------------------------------------------------


@in_trio()
async def test_an_attempt_goes_to_the_child_and_what_it_says_goes_back(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = InferStart(job("hello"), 3, ((7, 8),))
        s.orchestrator.send(s.worker, start)
        key = f"{start.job.id}/3"
        await until(lambda: s.worker.child.requests)
        assert s.worker.child.requests == [Generate(key, "hello", start.job.sampling, emitted=((7, 8),))]
        assert s.worker.worker.num_running == 1
        s.worker.child.say(Started(key, 12))
        s.worker.child.say(Tokens(key, 2, (9, 10), "text"))
        s.worker.child.say(End(key, "stop", Usage(12, 2)))
        assert await s.orchestrator.next(InferEnd) == InferEnd(start.job.id, 3, "stop", Usage(12, 2))
        assert s.orchestrator.of(InferTokens) == [InferTokens(start.job.id, 3, 2, (9, 10), "text")]
        assert s.worker.worker.num_running == 0


@in_trio()
async def test_a_child_is_given_the_variables_that_its_offer_names_and_no_other_child_is(tmp_path: Path) -> None:
    keyed = Offer("other", "1.0", ("1",), variables=("TETHER_KEY",))
    async with stage(tmp_path, Offer("demo", "1.0", ("2",)), keyed) as s:
        assert [child.variables for child in s.worker.children] == [(), ("TETHER_KEY",)]


@in_trio()
async def test_an_attempt_that_has_no_room_is_answered_with_busy_and_why(tmp_path: Path) -> None:
    async with stage(tmp_path, Offer("demo", "1.0", ("2",)), Offer("other", "1.0", ("1",))) as s:
        first = await s.begin()
        s.orchestrator.send(s.worker, first)
        await s.begin()
        s.orchestrator.send(s.worker, InferStart(job(), 1))
        s.orchestrator.send(s.worker, InferStart(job(model="nothing"), 1))
        s.orchestrator.send(s.worker, InferStart(job(version="2.0"), 1))
        s.worker.children[1].die()
        s.orchestrator.send(s.worker, InferStart(job(model="other"), 1))
        await s.orchestrator.next(InferBusy, 5)
        assert [busy.error.message for busy in s.orchestrator.of(InferBusy)] == [
            "this attempt runs here already",
            "every slot of this worker is taken",
            "this worker does not serve nothing 1.0",
            "this worker does not serve demo 2.0",
            "the runtime of other is not ready",
        ]
        assert s.worker.worker.num_running == 2
        for request in list(s.worker.child.requests):
            assert isinstance(request, Generate)
            s.worker.child.say(End(request.id, "stop"))


@in_trio()
async def test_a_draining_worker_takes_no_more_says_so_at_once_and_waits_for_what_runs(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = await s.begin()
        drained = trio.Event()

        async def drain() -> None:
            await s.worker.worker.drain()
            drained.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await s.orchestrator.until(lambda: s.orchestrator.states[-1].draining or None)
            s.orchestrator.send(s.worker, InferStart(job(), 1))
            assert (await s.orchestrator.next(InferBusy)).error.code == "draining"
            assert not drained.is_set()
            s.worker.child.say(End(f"{start.job.id}/1", "stop"))
            await drained.wait()


@in_trio()
async def test_a_worker_pauses_while_its_owner_is_at_work_says_so_and_gives_back_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "LOOK_SECONDS", 0.01)
    async with stage(tmp_path) as s:
        start = await s.begin()
        s.worker.child.say(Tokens(f"{start.job.id}/1", 0, (5, 6), "text"))
        s.worker.facts = Facts(minute_of_day=0, idle_seconds=1.0)
        end = await s.orchestrator.next(InferEnd)
        assert end.error is not None
        assert (end.job_id, end.retry, end.error.code, end.usage.completion_tokens) == (
            start.job.id,
            True,
            "draining",
            2,
        )
        assert Cancel(f"{start.job.id}/1") in s.worker.child.requests
        assert {state.paused for state in s.orchestrator.states} == {"", "its owner is at work"}
        s.orchestrator.send(s.worker, InferStart(job(), 1))
        assert "its owner is at work" in (await s.orchestrator.next(InferBusy)).error.message
        s.worker.facts = Facts(minute_of_day=0, idle_seconds=900.0)
        await s.orchestrator.until(lambda: s.orchestrator.states[-1].paused == "" or None)
        s.worker.child.say(End(f"{start.job.id}/1", "cancelled"))
        await s.begin()
        s.worker.worker.hand_over()


@in_trio()
async def test_a_newer_attempt_at_a_job_stops_the_older_one(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        start = await s.begin()
        s.orchestrators[1].send(s.worker, InferStart(start.job, 2))
        await until(lambda: Cancel(f"{start.job.id}/1") in s.worker.child.requests)
        await until(lambda: s.worker.child.requests[-1].id == f"{start.job.id}/2")  # type: ignore[union-attr]
        s.worker.child.say(End(f"{start.job.id}/1", "cancelled"))
        s.worker.child.say(End(f"{start.job.id}/2", "stop"))
        assert (await s.orchestrators[1].next(InferEnd)).finish_reason == "stop"


@in_trio()
async def test_a_cancel_reaches_the_child_from_the_orchestrator_that_sent_the_attempt_only(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        start = await s.begin()
        key = f"{start.job.id}/1"
        cancel = InferCancel(start.job.id, 1)
        s.orchestrators[1].send(s.worker, cancel)
        s.orchestrators[1].send(s.worker, InferStart(job(model="nothing"), 1))
        await s.orchestrators[1].next(InferBusy)
        assert Cancel(key) not in s.worker.child.requests
        s.orchestrator.send(s.worker, InferCancel(start.job.id, 2))
        s.orchestrator.send(s.worker, cancel)
        s.orchestrator.send(s.worker, cancel)
        await until(lambda: s.worker.child.requests.count(Cancel(key)) == 2)
        s.worker.child.say(End(key, "cancelled", Usage(1, 4)))
        assert await s.orchestrator.next(InferEnd) == InferEnd(start.job.id, 1, "cancelled", Usage(1, 4))


@in_trio()
async def test_the_attempts_of_an_orchestrator_that_is_gone_are_cancelled_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        lost, kept = await s.begin(), await s.begin(orchestrator=s.orchestrators[1])
        s.orchestrator.crash()
        await until(lambda: Cancel(f"{lost.job.id}/1") in s.worker.child.requests)
        assert Cancel(f"{kept.job.id}/1") not in s.worker.child.requests
        assert s.worker.worker.num_running == 2, "a slot is free when the child says so"
        for start in (lost, kept):
            s.worker.child.say(End(f"{start.job.id}/1", "stop"))
        assert (await s.orchestrators[1].next(InferEnd)).job_id == kept.job.id


@in_trio()
async def test_what_ran_on_a_child_that_died_may_be_tried_elsewhere_and_its_tokens_count(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        first, second = await s.begin(), await s.begin()
        s.worker.child.say(Started(f"{first.job.id}/1", 5))
        s.worker.child.say(Tokens(f"{first.job.id}/1", 0, (1, 2), "ab"))
        s.worker.child.die()
        await s.orchestrator.next(InferEnd, 2)
        error = ErrorInfo("runtime_died", "the runtime of demo died")
        assert s.orchestrator.of(InferEnd) == [
            InferEnd(first.job.id, 1, "error", Usage(5, 2), error, retry=True),
            InferEnd(second.job.id, 1, "error", Usage(0, 0), error, retry=True),
        ]
        state = await s.orchestrator.until(
            lambda: next((state for state in s.orchestrator.states if state.loading), None)
        )
        assert [model.slots for model in state.models] == [0]
        s.worker.child.say(End(f"{first.job.id}/1", "stop"))  # late
        s.worker.child.load()
        await s.orchestrator.until(lambda: s.orchestrator.states[-1].models[0].slots or None)
        assert len(s.orchestrator.of(InferEnd)) == 2


@in_trio()
async def test_a_request_that_the_child_refuses_is_an_error_that_nobody_else_can_mend(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = await s.begin()
        error = ErrorInfo("invalid_request", "top_p must be above 0")
        s.worker.child.say(Refused(None, error))
        s.worker.child.say(Refused(f"{start.job.id}/1", error))
        assert await s.orchestrator.next(InferEnd) == InferEnd(start.job.id, 1, "error", Usage(), error, retry=False)


@in_trio()
async def test_a_batch_that_is_full_though_a_slot_was_free_is_busy_and_nobodys_failure(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        refused, broken = await s.begin(), await s.begin()
        full = ErrorInfo("queue_full", "the batch is full")
        s.worker.child.say(Tokens(f"{broken.job.id}/1", 0, (1,), "a"))
        for start in (refused, broken):
            s.worker.child.say(End(f"{start.job.id}/1", "error", error=full, retry=True))
        assert await s.orchestrator.next(InferBusy) == InferBusy(refused.job.id, 1, full)
        assert (await s.orchestrator.next(InferEnd)).job_id == broken.job.id
        assert s.worker.worker.num_running == 0


@pytest.mark.parametrize("text", ["", "{}", '{"inputs":[[-1e400]]}', '{"inputs":7}', "[" * 10_000])
@in_trio()
async def test_an_embedding_that_is_not_to_be_understood_is_refused_for_good_and_its_link_stays(
    tmp_path: Path, text: str
) -> None:
    async with stage(tmp_path) as s:
        new = job(text, form="embedding")
        s.orchestrator.send(s.worker, InferStart(new, 1))
        end = await s.orchestrator.next(InferEnd)
        assert end.error is not None
        assert (end.job_id, end.error.code, end.retry) == (new.id, "invalid_request", False)
        assert s.worker.worker.num_running == 0
        await s.begin()
        assert len(s.orchestrator.of(InferEnd)) == 1


@in_trio()
async def test_what_a_child_says_of_sequences_that_are_not_live_is_dropped(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        s.worker.child.say(Started("nothing/1", 5))
        s.worker.child.say(Tokens("nothing/1", 0, (1,), "a"))
        s.worker.child.say(End("nothing/1", "stop"))
        s.worker.child.say(Refused("nothing/1", ErrorInfo("invalid_request", "x")))
        start = await s.begin()
        s.worker.child.say(End(f"{start.job.id}/1", "stop"))
        await s.orchestrator.next(InferEnd)
        assert s.orchestrator.of(InferTokens) == []


@in_trio(clock_jumps=True)
async def test_a_child_that_does_not_answer_to_a_cancel_is_killed_and_gives_its_slots_back(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = await s.begin()
        s.orchestrator.send(s.worker, InferCancel(start.job.id, 1))
        await until(lambda: Cancel(f"{start.job.id}/1") in s.worker.child.requests)
        await trio.sleep(worker_module.CANCEL_SECONDS - 1)
        assert s.worker.child.num_kills == 0
        await trio.sleep(2)
        assert s.worker.child.num_kills == 1
        assert s.worker.worker.num_running == 0
        assert (await s.orchestrator.next(InferEnd)).retry


@in_trio(clock_jumps=True)
async def test_a_child_that_answers_to_a_cancel_lives_on(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = await s.begin()
        s.orchestrator.send(s.worker, InferCancel(start.job.id, 1))
        await until(lambda: Cancel(f"{start.job.id}/1") in s.worker.child.requests)
        s.worker.child.say(End(f"{start.job.id}/1", "cancelled"))
        await trio.sleep(2 * worker_module.CANCEL_SECONDS)
        assert s.worker.child.num_kills == 0


@in_trio()
async def test_an_orchestrator_that_does_not_read_loses_its_link_for_what_it_would_have_missed(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path, links=msgspec.structs.replace(PATIENT, max_buffer_bytes=100_000)) as s:
        start = await s.begin()
        world = s.worker.world
        world.memory.freeze(s.orchestrator.id)
        link = s.worker.links.get(s.orchestrator.id)
        assert link is not None
        for position in range(20):
            s.worker.child.say(Tokens(f"{start.job.id}/1", position, (1,), "x" * 50_000))
            await trio.lowlevel.checkpoint()
        assert not link.is_open
        assert Cancel(f"{start.job.id}/1") in s.worker.child.requests
        world.memory.thaw(s.orchestrator.id)
        s.worker.child.say(End(f"{start.job.id}/1", "cancelled"))


# --- presence --------------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_worker_says_what_it_is_and_signs_it(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await s.orchestrator.until(lambda: s.orchestrator.states[-1].models[0].slots or None)
        presence, state = s.orchestrator.of(Presence)[-1], s.orchestrator.states[-1]
        assert verify(presence.state) == s.worker.id == state.worker_id
        assert (state.boot_id, state.name, state.region, state.gpu_class) == (s.worker.boot_id, "worker", "here", "tpu")
        assert state.models == (ModelInfo("demo", "1.0", revision="r", slots=2, toy=True),)
        assert (state.running, state.held, state.draining, state.loading) == (0, {}, False, False)
        sequences = [state.sequence for state in s.orchestrator.states]
        assert sequences == sorted(set(sequences))


@in_trio(clock_jumps=True)
async def test_a_worker_says_how_it_is_every_few_seconds_though_nothing_changes(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await trio.sleep(1)
        count = len(s.orchestrator.states)
        await trio.sleep(50)
        assert len(s.orchestrator.states) - count == 10


@in_trio(clock_jumps=True)
async def test_under_load_a_worker_says_how_much_it_runs_once_a_second(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        await trio.sleep(1)
        count, began = len(s.orchestrator.states), trio.current_time()
        while trio.current_time() - began < 10:
            start = await s.begin()
            await trio.sleep(0.05)
            s.worker.child.say(End(f"{start.job.id}/1", "stop"))
        assert 5 <= len(s.orchestrator.states) - count <= 12


@in_trio(clock_jumps=True)
async def test_beside_a_second_orchestrator_counts_are_told_within_a_tenth_of_a_second(tmp_path: Path) -> None:
    async with stage(tmp_path, num_orchestrators=2) as s:
        await trio.sleep(1)
        began = trio.current_time()
        first, second = await s.begin(), await s.begin(orchestrator=s.orchestrators[1])
        held = {s.orchestrators[0].id: 1, s.orchestrators[1].id: 1}
        await s.orchestrators[0].until(lambda: s.orchestrators[0].states[-1].held == held or None)
        await s.orchestrators[1].until(lambda: s.orchestrators[1].states[-1].held == held or None)
        assert trio.current_time() - began < 0.5
        for start in (first, second):
            s.worker.child.say(End(f"{start.job.id}/1", "stop"))


@in_trio()
async def test_the_speed_that_a_child_measured_is_told(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        start = await s.begin()
        s.worker.child.say(End(f"{start.job.id}/1", "stop", tokens_per_second=12.5))
        await s.orchestrator.until(lambda: s.orchestrator.states[-1].models[0].tokens_per_second == 12.5 or None)


@in_trio()
async def test_the_figures_of_a_childs_last_job_are_told_and_kept_where_it_has_none(tmp_path: Path) -> None:
    async with stage(tmp_path) as s:
        stats = Stats(time_to_first_token_seconds=0.25, free_kv_tokens=900, waiting=2)
        for said in (End("", "stop", tokens_per_second=12.5, stats=stats), End("", "stop")):
            start = await s.begin()
            await s.orchestrator.until(lambda: s.orchestrator.states[-1].running == 1 or None)
            s.worker.child.say(msgspec.structs.replace(said, id=f"{start.job.id}/1"))
            await s.orchestrator.until(lambda: s.orchestrator.states[-1].running == 0 or None)
            model = s.orchestrator.states[-1].models[0]
            assert (model.tokens_per_second, model.time_to_first_token_seconds) == (12.5, 0.25)
            assert (model.free_kv_tokens, model.num_waiting) == (900, 2)


@in_trio()
async def test_one_child_that_is_not_ready_leaves_the_others_in_service(tmp_path: Path) -> None:
    async with stage(tmp_path, Offer("demo", "1.0", ("2",)), Offer("other", "1.0", ("1",))) as s:
        s.worker.children[1].die()
        await s.orchestrator.until(lambda: s.orchestrator.states[-1].loading or None)
        assert [model.slots for model in s.orchestrator.states[-1].models] == [2, 0]
        start = await s.begin()
        s.worker.child.say(End(f"{start.job.id}/1", "stop"))
        await s.orchestrator.next(InferEnd)


@in_trio()
async def test_a_model_that_cannot_be_loaded_ends_the_worker_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_self: FakeChild, task_status: trio.TaskStatus[None]) -> None:
        del task_status
        await trio.lowlevel.checkpoint()
        raise RuntimeDied("no such weights")

    monkeypatch.setattr(FakeChild, "run", fail)
    with pytest.raises(ExceptionGroup) as caught:
        async with stage(tmp_path):
            await trio.sleep_forever()
    assert caught.group_contains(RuntimeDied, match="no such weights", depth=None)
