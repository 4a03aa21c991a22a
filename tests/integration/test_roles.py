"""The roles together: real orchestrators, gateways and workers, a real SQLite store, a network in memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from random import Random

import msgspec
import pytest
import trio

from tests.support import LINKS, Client, GatewayNode, LivelyWorker, World, open_world, types, until
from tests.support import make_job as job
from tether.active import ActiveJob
from tether.errors import (
    DeadlineExceeded,
    ErrorInfo,
    JobConflict,
    JobNotFound,
    NoOrchestrator,
    NoWorker,
    QueueFull,
    RuntimeDied,
    StoreUnavailable,
    TetherError,
    Unavailable,
    from_info,
)
from tether.link import Link
from tether.messages import (
    InferCancel,
    InferEnd,
    InferStart,
    InferTokens,
    JobAccepted,
    JobEnd,
    JobMoved,
    JobQueued,
    JobStarted,
    JobTokens,
    Submit,
)
from tether.records import LIVE, Job, ModelInfo, Sampling, Usage
from tether.settings import OrchestratorSettings
from tether.tenant_store import TenantStore
from tether.testing import in_trio


async def refused(client: Client, error: type[TetherError], code: str) -> ErrorInfo:
    """Return the refusal of a job that was never accepted, after checking that nothing of it is in the ledger."""
    end = await client.end()
    assert types(client) == ["end"]
    assert (end.status, end.attempt, end.finish_reason) == ("failed", 0, "error")
    assert end.error is not None
    assert end.error.code == code
    assert isinstance(from_info(end.error), error)
    assert client.gateway.world.record(client.job) is None
    return end.error


def statuses(world: World, of: Job) -> list[str]:
    return [attempt.status for attempt in world.attempts(of)]


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


@in_trio()
async def test_a_client_that_gets_its_answer_in_one_piece_gets_all_of_it_though_its_gateway_lost_its_link(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job(stream=False)
        client = gateway.client(new)
        await worker.start_of(new)
        active = orchestrator.orchestrator.get(new.id)
        assert active is not None
        worker.tokens(new, 1, 0, 1)
        await until(lambda: active.token_ids == [0, 1])
        world.memory.end(gateway.id, orchestrator.id)
        await until(lambda: active.gateway is None)
        await until(lambda: active.gateway is not None)
        worker.tokens(new, 1, 2)
        worker.end(new)
        await client.end()
        assert (client.token_ids, client.text) == ([0, 1, 2], "0 1 2 ")


@in_trio()
async def test_two_hundred_jobs_at_once_on_two_workers_all_complete(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        one = await world.scripted_worker(orchestrator, slots=8, name="one")
        two = await world.scripted_worker(orchestrator, slots=8, name="two")
        gateway = await world.gateway()
        clients = [gateway.client(job("tokens=3")) for _ in range(200)]
        for client in clients:
            assert (await client.end()).status == "completed"
            assert client.token_ids == [0, 1, 2]
        by_worker = {world.ended(client.job).worker_id for client in clients}
        assert by_worker == {one.id, two.id}


@in_trio()
async def test_a_slow_client_still_hears_an_end_that_came_meanwhile(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        client = gateway.client(job("tokens=3"), room=1)
        await client.until(JobAccepted)
        await until(lambda: gateway.submissions._following[client.job.id].ended)
        client.read_on()
        await client.end()
        assert client.text == "0 1 2 "


@in_trio()
async def test_a_job_that_nobody_waits_for_is_accepted_and_runs_to_its_end(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        first, second = job(wait=False), job(wait=False)
        assert (await gateway.submissions.submit(first)).status == "running"
        assert (await gateway.submissions.submit(second)).status == "queued"
        assert gateway.leftovers == []
        await worker.start_of(first)
        active = orchestrator.orchestrator.get(first.id)
        assert active is not None
        assert active.gateway is None, "nothing of it is sent to a gateway that does not listen"
        gateway.crash()
        worker.tokens(first, 1, 0, 1)
        worker.end(first)
        await worker.start_of(second)
        worker.end(second)
        await until(lambda: not orchestrator.leftovers)
        assert (world.ended(first).status, world.ended(first).result) == ("completed", "0 1 ")
        assert world.ended(second).status == "completed"


@in_trio()
async def test_a_prompt_that_may_not_be_kept_is_kept_while_its_job_is_live(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job("a secret", keep="nothing")
        client = gateway.client(new)
        await worker.start_of(new)
        record = world.record(new)
        assert record is not None
        assert record.input == "a secret"
        worker.tokens(new, 1, 0)
        worker.end(new)
        await client.end()
        assert (world.ended(new).input, world.ended(new).result) == (None, None)


# --- the queue -------------------------------------------------------------------------------------------------------


@in_trio()
async def test_jobs_without_a_slot_hear_their_places_and_are_served_by_priority_and_arrival(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        running = job()
        gateway.client(running)
        await worker.start_of(running)
        places = []
        waiting = [job(), job(), job(priority=5), job()]
        for new in waiting:
            client = gateway.client(new)
            queued = await client.until(JobQueued)
            assert 0 < queued.deadline_seconds <= new.deadline_seconds
            places.append(queued.place)
        assert places == [1, 2, 1, 4]
        assert [record.status for record in map(world.record, waiting) if record] == ["queued"] * 4
        last = running
        for following in (waiting[2], waiting[0], waiting[1], waiting[3]):
            worker.end(last)
            await worker.start_of(following)
            last = following
        worker.end(last)


@in_trio()
async def test_a_job_whose_worker_was_busy_keeps_its_place_before_later_ones(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        first, second = job(), job()
        early = gateway.client(first)
        await worker.start_of(first)
        late = gateway.client(second)
        await late.until(JobQueued)
        worker.busy(first)
        queued = await early.until(JobQueued)
        assert queued.place == 1
        await worker.start_of(first, 2)
        assert second.id not in [start.job.id for start in worker.starts]
        worker.tokens(first, 2, 0)
        worker.end(first, 2)
        end = await early.end()
        assert (end.status, end.attempt) == ("completed", 2)
        assert statuses(world, first) == ["busy", "completed"]
        await worker.start_of(second)
        worker.end(second)


@in_trio()
async def test_a_worker_that_stays_busy_is_asked_more_and_more_rarely(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job(deadline_seconds=1.3)
        client = gateway.client(new)
        for attempt in (1, 2, 3):
            await worker.start_of(new, attempt)
            worker.busy(new, attempt)
        end = await client.end()  # 0.2 + 0.4 seconds have passed, and the next ask is 0.8 seconds away
        assert end.status == "expired"
        assert statuses(world, new) == ["busy"] * 3


@in_trio()
async def test_a_full_queue_refuses_the_next_job_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator(settings=OrchestratorSettings(max_queued=1))
        worker = await world.hand_worker(orchestrator)
        gateway = await world.gateway()
        running, waiting = job(), job()
        clients = [gateway.client(running)]
        await worker.start_of(running)
        clients.append(gateway.client(waiting))
        await clients[1].until(JobQueued)
        error = await refused(gateway.client(job()), QueueFull, "queue_full")
        assert error.retry_after_seconds
        assert (error.reasons["full"], error.reasons["draining"]) == (1, 0)
        assert "no such model 0, draining 0, full 1, too little memory 0" in error.message
        worker.end(running)
        await worker.start_of(waiting)
        worker.end(waiting)
        assert [(await client.end()).status for client in clients] == ["completed"] * 2


@in_trio()
async def test_jobs_that_arrive_at_once_do_not_overfill_the_queue(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator(settings=OrchestratorSettings(max_queued=3))
        worker = await world.hand_worker(
            orchestrator, models=(ModelInfo("demo", "1.0", slots=1), ModelInfo("other", "1.0", slots=50))
        )
        gateway = await world.gateway()
        running = job()
        gateway.client(running)
        await worker.start_of(running)
        clients = [gateway.client(job(tenant_id=f"tenant-{number}")) for number in range(20)]
        await until(lambda: sum(client.done.is_set() for client in clients) == 17)
        await until(lambda: orchestrator.orchestrator.num_queued == 3)
        for client in clients:
            client.leave()
        worker.end(running)


@in_trio()
async def test_a_job_whose_deadline_passes_in_the_queue_expires(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        running = job()
        gateway.client(running)
        await worker.start_of(running)
        new = job(deadline_seconds=0.05)
        end = await (client := gateway.client(new)).end()
        assert types(client) == ["accepted", "queued", "end"]
        assert (end.status, end.attempt, end.finish_reason) == ("expired", 0, "error")
        assert end.error is not None
        assert end.error.code == "deadline_exceeded"
        assert world.ended(new).status == "expired"
        assert orchestrator.orchestrator.num_queued == 0
        worker.end(running)


@in_trio()
async def test_a_running_job_whose_deadline_passes_is_cancelled_at_its_worker_and_its_tokens_count(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job(deadline_seconds=0.3)
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0, 1)
        end = await client.end()
        assert worker.cancels == [InferCancel(new.id, 1)]
        assert (end.status, end.usage) == ("expired", Usage(3, 7))
        record = world.ended(new)
        assert (record.status, record.usage, record.result) == ("expired", Usage(3, 7), "0 1 ")
        (attempt,) = world.attempts(new)
        assert (attempt.status, attempt.completion_tokens) == ("expired", 7)


# --- cancelling ------------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_client_that_leaves_before_admission_is_done_leaves_a_cancelled_job_that_never_ran(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        world.database.hold()
        client = gateway.client(new)
        await until(lambda: orchestrator.orchestrator.get(new.id))
        client.leave()
        await client.done.wait()
        active = orchestrator.orchestrator.get(new.id)
        assert active is not None
        await until(lambda: active.is_stopped)
        world.database.go_on()
        await active.done.wait()
        assert world.ended(new).status == "cancelled"
        assert statuses(world, new) == ["cancelled"]
        assert worker.starts == []


@pytest.mark.parametrize("is_worker_lost", [False, True], ids=["", "and_so_does_its_worker"])
def test_a_client_that_leaves_before_its_attempt_is_sent_frees_the_slot_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_worker_lost: bool
) -> None:
    monkeypatch.setattr("tether.orchestrator.CANCEL_SECONDS", 1e6)

    @in_trio()
    async def main() -> None:
        async with open_world(tmp_path) as world:
            orchestrator = await world.orchestrator()
            worker = await world.hand_worker(orchestrator)
            worker.answers_cancels = False
            gateway = await world.gateway()
            leaving, staying = job(), job()
            world.database.hold()
            client = gateway.client(leaving)
            await until(lambda: world.database.holds("INSERT INTO jobs"))
            active = orchestrator.orchestrator.get(leaving.id)
            assert active is not None
            if is_worker_lost:
                worker.crash()
                await until(lambda: not len(orchestrator.roster))
            client.leave()
            await until(lambda: active.is_stopped)
            world.database.go_on()
            await active.done.wait()
            assert (world.ended(leaving).status, world.ended(leaving).usage) == ("cancelled", Usage())
            assert statuses(world, leaving) == ["cancelled"]
            if not is_worker_lost:
                gateway.client(staying)
                await worker.start_of(staying)
                worker.end(staying)
            assert worker.cancels == []

    main()


@in_trio()
async def test_a_job_whose_deadline_passes_before_its_attempt_is_sent_never_runs(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job(deadline_seconds=0.05)
        world.database.hold()
        client = gateway.client(new)
        await until(lambda: world.database.holds("INSERT INTO jobs"))
        active = orchestrator.orchestrator.get(new.id)
        assert active is not None
        await until(lambda: trio.current_time() >= active.deadline)
        world.database.go_on()
        assert (await client.end()).status == "expired"
        assert statuses(world, new) == ["expired"]
        assert (worker.starts, worker.cancels) == ([], [])


@in_trio()
async def test_a_client_that_leaves_the_queue_frees_its_place(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        running, leaving, staying = job(), job(), job()
        gateway.client(running)
        await worker.start_of(running)
        client = gateway.client(leaving)
        await client.until(JobQueued)
        assert (await gateway.client(staying).until(JobQueued)).place == 2
        client.leave()
        await until(lambda: orchestrator.orchestrator.num_queued == 1)
        worker.end(running)
        await worker.start_of(staying)
        worker.end(staying)
        await until(lambda: not orchestrator.leftovers)
        assert (world.ended(leaving).status, world.ended(leaving).attempt) == ("cancelled", 0)
        assert world.attempts(leaving) == []


@pytest.mark.parametrize("positions", [(), (0, 1, 2)], ids=["before_the_first_token", "in_mid_answer"])
def test_a_client_that_leaves_stops_its_job_at_the_worker(tmp_path: Path, positions: tuple[int, ...]) -> None:
    @in_trio()
    async def main() -> None:
        async with open_world(tmp_path) as world:
            orchestrator, worker, gateway = await world.one_of_each()
            new = job()
            client = gateway.client(new)
            await worker.start_of(new)
            if positions:
                worker.tokens(new, 1, *positions)
                await client.until(JobTokens)
            client.leave()
            await worker.cancel_of(new)
            await until(lambda: not orchestrator.leftovers)
            record = world.ended(new)
            assert (record.status, record.finish_reason, record.usage) == ("cancelled", "cancelled", Usage(3, 7))
            assert record.error is not None
            assert record.error.code == "job_cancelled"
            assert statuses(world, new) == ["cancelled"]

    main()


@in_trio()
async def test_a_cancel_that_a_worker_does_not_answer_ends_the_job_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.orchestrator.CANCEL_SECONDS", 0.05)
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        worker.answers_cancels = False
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0, 1, 2)
        await client.until(JobTokens)
        client.leave()
        await until(lambda: not orchestrator.leftovers)
        assert world.ended(new).status == "cancelled"
        assert world.ended(new).usage == Usage(0, 3), "what the worker told is spent, whatever it says"


@in_trio()
async def test_a_job_that_was_done_before_it_could_be_cancelled_is_completed(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        worker.answers_cancels = False
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        client.leave()
        await worker.cancel_of(new)
        worker.end(new)
        await until(lambda: not orchestrator.leftovers)
        assert world.ended(new).status == "completed"


@in_trio()
async def test_a_job_that_is_stopped_as_its_worker_vanishes_stays_stopped(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        gateway.client(new)
        await worker.start_of(new)
        active = orchestrator.orchestrator.get(new.id)
        link = orchestrator.links.get(worker.id)
        assert active is not None
        assert link is not None
        # Both before the job's own task has a turn.
        orchestrator.orchestrator.cancel(active, "on request")
        link.close("gone")
        await active.done.wait()
        assert world.ended(new).status == "cancelled"
        assert statuses(world, new) == ["cancelled"]


@in_trio()
async def test_a_job_is_cancelled_on_request_and_the_answer_is_its_record_after_the_end(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        other = await world.gateway("other")
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        with pytest.raises(JobNotFound):
            await other.submissions.cancel(new.id, "another tenant")
        assert worker.cancels == []
        record = await other.submissions.cancel(new.id, new.tenant_id)
        assert record == world.ended(new)
        assert record.status == "cancelled"
        assert (await client.end()).status == "cancelled"
        with pytest.raises(JobConflict, match="has ended already: it is cancelled"):
            await gateway.submissions.cancel(new.id, None)
        with pytest.raises(JobNotFound, match="there is no job 'nothing'"):
            await gateway.submissions.cancel("nothing", None)


@in_trio()
async def test_a_client_that_leaves_while_its_orchestrator_is_away_cancels_the_job_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        world.memory.cut(gateway.id, orchestrator.id)
        await until(lambda: not gateway.links.with_role("orchestrator"))
        client.leave()
        await client.done.wait()
        world.memory.heal(gateway.id, orchestrator.id)
        await worker.cancel_of(new)
        await until(lambda: not orchestrator.leftovers)
        assert world.ended(new).status == "cancelled"


@in_trio()
async def test_a_client_that_leaves_while_its_orchestrator_is_lost_has_its_job_cancelled_by_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        await world.hand_worker(one, two)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        client = gateway.client(job())
        await client.until(JobStarted)
        record = world.record(client.job)
        assert record is not None
        lost, left = (one, two) if record.orchestrator_id == one.id else (two, one)
        waits = trio.Event()

        async def wait(_following: object) -> Link:
            await waits.wait()
            raise NoOrchestrator

        monkeypatch.setattr(gateway.submissions, "_orchestrator_for", wait)
        lost.crash()
        await gateway.until(lambda: gateway.links.get(lost.id) is None or None)
        await until(lambda: left.links.get(lost.id) is None)
        client.leave()
        await client.done.wait()
        await until(lambda: (found := world.record(client.job)) and found.status == "cancelled")
        assert statuses(world, client.job) == ["cancelled"]


@in_trio()
async def test_a_gateway_may_not_cancel_anothers_job_as_its_client(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _orchestrator, worker, gateway = await world.one_of_each()
        other = await world.gateway("other")
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        other.submissions._cancel(other.links.with_role("orchestrator")[0], new.id)
        with pytest.raises(JobNotFound):  # an answer on the same link: the cancel has been heard before
            await other.submissions.job("nothing", None)
        worker.end(new)
        assert (await client.end()).status == "completed"


# --- workers that are lost -------------------------------------------------------------------------------------------


@in_trio()
async def test_a_job_whose_worker_is_lost_goes_on_elsewhere_and_its_client_sees_each_token_once(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, first, gateway = await world.one_of_each(name="first")
        new = job()
        client = gateway.client(new)
        await first.start_of(new)
        first.tokens(new, 1, 0, 1)
        first.tokens(new, 1, 2)
        await client.until(JobTokens, 2)
        second = await world.hand_worker(orchestrator, name="second")
        first.crash()
        start = await second.start_of(new, 2)
        assert start.emitted == ((0, 1, 2),)
        second.tokens(new, 2, 3, 4)
        second.end(new, 2, usage=Usage(3, 2))
        end = await client.end()
        assert client.token_ids == [0, 1, 2, 3, 4]
        assert [event.worker_id for event in client.of(JobStarted)] == [first.id, second.id]
        assert (end.status, end.attempt, end.usage) == ("completed", 2, Usage(3, 5))
        assert world.ended(new).result == "0 1 2 3 4 "
        lost, completed = world.attempts(new)
        assert (lost.status, lost.worker_id, lost.error_code, lost.completion_tokens) == (
            "lost",
            first.id,
            "worker_lost",
            3,
        )
        assert (completed.status, completed.worker_id, completed.completion_tokens) == ("completed", second.id, 2)


@in_trio()
async def test_a_worker_that_falls_silent_is_lost(tmp_path: Path) -> None:
    async with open_world(tmp_path, link_settings=msgspec.structs.replace(LINKS, silence_seconds=0.3)) as world:
        orchestrator, first, gateway = await world.one_of_each(name="first")
        new = job()
        client = gateway.client(new)
        await first.start_of(new)
        second = await world.hand_worker(orchestrator, name="second")
        world.memory.freeze(first.id)
        await second.start_of(new, 2)
        second.end(new, 2)
        assert (await client.end()).attempt == 2
        assert statuses(world, new) == ["lost", "completed"]


@in_trio()
async def test_a_worker_that_starts_again_may_go_on_with_the_job_that_it_lost(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, first, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await first.start_of(new)
        first.tokens(new, 1, 0)
        await client.until(JobTokens)
        first.crash()
        await client.until(JobQueued)
        again = await world.hand_worker(orchestrator, key=first.key)
        start = await again.start_of(new, 2)
        assert start.emitted == ((0,),)
        again.tokens(new, 2, 1)
        again.end(new, 2)
        await client.end()
        assert client.token_ids == [0, 1]
        entry = orchestrator.roster.get(again.id)
        assert entry is not None
        assert len(entry.failures) == 1, "a worker's failures outlive its link"


@in_trio()
async def test_a_job_that_fails_on_every_attempt_ends_after_the_last_one_that_it_may_have(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator(settings=OrchestratorSettings(max_attempts=3))
        workers = [await world.hand_worker(orchestrator, name=f"worker {n}") for n in range(4)]
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        for attempt in (1, 2, 3):
            started = await client.until(JobStarted, attempt)
            worker = next(worker for worker in workers if worker.id == started.worker_id)
            await worker.start_of(new, attempt)
            worker.end(new, attempt, reason="error", error=ErrorInfo("internal_error", "it broke"), retry=True)
        end = await client.end()
        assert (end.status, end.attempt) == ("failed", 3)
        assert end.error is not None
        assert (end.error.code, from_info(end.error).status) == ("worker_failed", 502)
        assert end.error.message == "3 attempts failed; the last one: it broke"
        rows = world.attempts(new)
        assert [(row.number, row.status, row.error_code) for row in rows] == [
            (1, "failed", "internal_error"),
            (2, "failed", "internal_error"),
            (3, "failed", "worker_failed"),
        ]
        assert len({row.worker_id for row in rows}) == 3, "each attempt on another worker"
        assert world.ended(new).usage == Usage(3, 3)


@in_trio()
async def test_an_error_that_no_other_worker_can_mend_ends_the_job_at_once(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        await world.hand_worker(orchestrator, name="other")
        gateway = await world.gateway()
        client = gateway.client(job(region="here"))
        started = await client.until(JobStarted)
        if started.worker_id != worker.id:
            worker = next(p for p in world.peers if p.id == started.worker_id)  # type: ignore[assignment]
        await worker.start_of(client.job)
        error = ErrorInfo("context_length_exceeded", "the prompt is too long")
        worker.end(client.job, reason="error", error=error)
        end = await client.end()
        assert (end.status, end.attempt, end.error) == ("failed", 1, error)
        entry = orchestrator.roster.get(worker.id)
        assert entry is not None
        assert not entry.failures, "the caller's mistake does not count against the worker"


@in_trio()
async def test_an_answer_that_a_worker_breaks_off_without_being_asked_goes_on_elsewhere(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0)
        worker.end(new, reason="cancelled", usage=Usage(3, 1))
        start = await worker.start_of(new, 2)
        assert start.emitted == ((0,),)
        worker.tokens(new, 2, 1)
        worker.end(new, 2)
        assert (await client.end()).status == "completed"
        assert client.text == "0 1 "
        assert statuses(world, new) == ["failed", "completed"]


@pytest.mark.parametrize("position", [2, 0], ids=["skips", "repeats"])
def test_a_worker_that_skips_or_repeats_tokens_is_left_and_told_to_stop(tmp_path: Path, position: int) -> None:
    @in_trio()
    async def main() -> None:
        async with open_world(tmp_path) as world:
            orchestrator, wrong, gateway = await world.one_of_each(name="wrong")
            new = job()
            client = gateway.client(new)
            await wrong.start_of(new)
            right = await world.hand_worker(orchestrator, name="right")
            wrong.tokens(new, 1, 0)
            wrong.tokens(new, 1, position)
            await wrong.cancel_of(new)
            assert (await right.start_of(new, 2)).emitted == ((0,),)
            right.tokens(new, 2, 1)
            right.end(new, 2)
            await client.end()
            assert client.token_ids == [0, 1]
            assert statuses(world, new) == ["lost", "completed"]
            assert wrong.links.with_role("orchestrator"), "its link stays: other jobs on it are well"

    main()


@in_trio()
async def test_frames_of_an_older_attempt_and_of_jobs_that_are_over_are_dropped(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        stranger = await world.hand_worker(orchestrator, name="stranger", models=(ModelInfo("other", "1", slots=1),))
        gateway = await world.gateway()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0)
        worker.tokens(new, 1, 7)  # wrong: attempt 2 is due
        await worker.start_of(new, 2)
        worker.tokens(new, 1, 1)
        worker.end(new, 1, usage=Usage(99, 99))
        worker.busy(new, 1)
        to_orchestrator = stranger.links.with_role("orchestrator")[0]
        to_orchestrator.send(InferTokens(new.id, 2, 1, (66,), "forged"))
        to_orchestrator.send(InferEnd(new.id, 2, "stop", Usage()))
        worker.tokens(new, 2, 1)
        worker.end(new, 2)
        end = await client.end()
        assert client.token_ids == [0, 1]
        assert (end.status, end.attempt, end.usage) == ("completed", 2, Usage(3, 2))
        worker.tokens(new, 2, 2)
        worker.end(new, 2)
        other = gateway.client(job())
        await worker.start_of(other.job)
        worker.end(other.job)
        await other.end()
        assert len(client.of(JobEnd)) == 1


@in_trio(seconds=60)
async def test_a_runtime_child_that_is_killed_in_mid_answer_is_started_again_and_the_job_completes(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        new = job("tokens=20 every=0.02")
        client = gateway.client(new)
        await client.until(JobTokens, 3)
        pid = worker.child.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        end = await client.end()
        assert (end.status, end.attempt) == ("completed", 2)
        assert client.token_ids == list(range(20)), "no token is missing, none is there twice"
        assert worker.child.num_starts == 2
        first, second = world.attempts(new)
        assert (first.status, first.error_code) == ("failed", "runtime_died")
        assert first.completion_tokens + second.completion_tokens == 20


# --- refusals --------------------------------------------------------------------------------------------------------


@in_trio()
async def test_refusals_say_why_and_leave_nothing_in_the_ledger(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        error = await refused(gateway.client(job()), TetherError, "model_not_found")
        assert error.message == "no worker serves a model 'demo'; served now: nothing"
        worker = await world.hand_worker(orchestrator)
        error = await refused(gateway.client(job(model="dema")), TetherError, "model_not_found")
        assert error.message == "no worker serves a model 'dema'; did you mean 'demo'?"
        assert error.param == "model"
        error = await refused(gateway.client(job(version="2.0")), TetherError, "model_not_found")
        assert error.message == "model 'demo' is served in version 1.0, not '2.0'"
        assert error.param == "version"
        worker.tell(draining=True)
        await until(lambda: all(entry.state.draining for entry in orchestrator.roster))
        error = await refused(gateway.client(job()), NoWorker, "no_worker")
        assert "draining 1 (stopping), full 0" in error.message
        assert error.retry_after_seconds
        worker.crash()
        await until(lambda: not len(orchestrator.roster))
        error = await refused(gateway.client(job()), NoWorker, "no_worker")
        assert "(no worker is connected)" in error.message
        assert world.store.jobs() == []


@in_trio()
async def test_an_orchestrator_that_has_just_started_waits_for_a_worker_before_it_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        world.settles = True
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        client = gateway.client(job())
        await until(lambda: orchestrator.orchestrator.get(client.job.id))
        worker = await world.hand_worker(orchestrator)
        await worker.start_of(client.job)
        worker.end(client.job)
        assert (await client.end()).status == "completed"
        orchestrator.crash()
        monkeypatch.setattr("tether.orchestrator.SETTLE_SECONDS", 0.3)
        again = await world.orchestrator(key=orchestrator.key)
        await world.known(worker, again)
        began = trio.current_time()
        await refused(gateway.client(job(model="nothing")), TetherError, "model_not_found")
        assert trio.current_time() - began < 2


@in_trio()
async def test_a_tenant_over_its_limit_is_refused_until_the_minute_is_over(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        await world.scripted_worker(orchestrator)
        gateway = await world.gateway()
        TenantStore(world.store).set_tenant("tenant", requests_per_minute=2)
        ends = [await gateway.client(job()).end() for _ in range(5)]
        limited = [end for end in ends if end.error is not None]
        assert len(limited) in {1, 2, 3}  # a minute may begin in between
        for end in limited:
            assert end.error is not None
            assert (end.attempt, end.error.code) == (0, "rate_limit_exceeded")
            assert 0 < (end.error.retry_after_seconds or 0) <= 60
        assert len(world.store.jobs()) == 5 - len(limited)


@in_trio()
async def test_a_gateway_without_an_orchestrator_refuses_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.submissions.ORCHESTRATOR_WAIT_SECONDS", 0.01)
    async with open_world(tmp_path) as world:
        gateway = GatewayNode(world)
        await world.start(gateway)
        client = gateway.client(job())
        with pytest.raises(NoOrchestrator):
            await client.end()
        with pytest.raises(NoOrchestrator):
            await gateway.submissions.submit(job(wait=False))
        with pytest.raises(NoOrchestrator):
            await gateway.submissions.health()


# --- the store -------------------------------------------------------------------------------------------------------


@in_trio()
async def test_while_the_store_is_away_new_jobs_are_refused(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        world.database.is_away = True
        client = gateway.client(job())
        end = await client.end()
        assert end.error is not None
        assert (end.attempt, end.error.code) == (0, "store_unavailable")
        assert isinstance(from_info(end.error), StoreUnavailable)
        assert end.error.retry_after_seconds
        world.database.is_away = False
        await until(lambda: not orchestrator.leftovers)
        assert world.record(client.job) is None
        assert worker.starts == []
        after = gateway.client(job())
        await worker.start_of(after.job)
        worker.end(after.job)
        assert (await after.end()).status == "completed"


@in_trio()
async def test_an_admission_whose_answer_is_lost_is_taken_back_and_holds_no_slot(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        world.database.lose_answer_to = "INSERT INTO jobs"
        client = gateway.client(job())
        end = await client.end()
        assert end.error is not None
        assert end.error.code == "store_unavailable"
        record = world.database.peek(client.job.id)
        assert record == "running", "it was written, and the slot reserved"
        world.database.is_away = False
        await until(lambda: not orchestrator.leftovers)
        assert world.ended(client.job).status == "failed"
        assert statuses(world, client.job) == ["failed"]
        after = gateway.client(job())
        await worker.start_of(after.job)
        worker.end(after.job)
        assert (await after.end()).status == "completed"


@in_trio()
async def test_a_jobs_end_is_told_only_when_the_store_has_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        world.database.is_away = True
        worker.tokens(new, 1, 0)
        await client.until(JobTokens)
        worker.end(new)
        await until(lambda: world.database.num_refused >= 2)
        assert not client.done.is_set()
        world.database.is_away = False
        assert (await client.end()).status == "completed"
        assert world.ended(new).status == "completed"


@in_trio()
async def test_an_end_whose_answer_from_the_store_is_lost_is_told_as_it_was_written(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        world.database.lose_answer_to = "SET status = :status, finish_reason"
        worker.end(new)
        await until(lambda: world.database.is_away)
        assert not client.done.is_set()
        world.database.is_away = False
        assert (await client.end()).status == "completed"
        assert len(world.attempts(new)) == 1


@in_trio()
async def test_a_queued_job_outlasts_a_store_that_is_away(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        running, waiting = job(), job()
        gateway.client(running)
        await worker.start_of(running)
        client = gateway.client(waiting)
        await client.until(JobQueued)
        world.database.is_away = True
        worker.end(running)
        await client.until(JobQueued, 2)
        world.database.is_away = False
        await worker.start_of(waiting)
        worker.end(waiting)
        assert (await client.end()).status == "completed"


@in_trio()
async def test_a_reservation_whose_answer_is_lost_with_its_worker_is_given_up_and_the_job_goes_on(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, first, gateway = await world.one_of_each(name="first")
        running = gateway.client(job())
        await first.start_of(running.job)
        waiting = gateway.client(job())
        await waiting.until(JobQueued)
        world.database.lose_answer_to = "INSERT INTO attempts"
        first.end(running.job)
        await until(lambda: world.database.is_away)
        first.crash()
        await until(lambda: not len(orchestrator.roster))
        world.database.is_away = False
        second = await world.hand_worker(orchestrator, name="second")
        start = await second.until(lambda: next(iter(second.starts), None))
        second.end(start.job, start.attempt)
        assert (await waiting.end()).status == "completed"
        assert (await running.end()).status == "completed"
        assert statuses(world, waiting.job) == ["lost", "completed"]


@in_trio()
async def test_a_job_that_another_has_ended_in_the_store_is_told_as_the_store_has_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        error = ErrorInfo("job_cancelled", "by somebody else")
        await orchestrator.ledger.finish(
            new.id, 1, status="cancelled", finish_reason="cancelled", error=error, now=1_800_000_000.0
        )
        worker.end(new)
        end = await client.end()
        assert (end.status, end.error) == ("cancelled", error)


# --- orchestrators that are lost -------------------------------------------------------------------------------------


@in_trio()
async def test_an_orchestrator_that_starts_again_takes_up_what_it_had_and_clients_see_each_token_once(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        before, worker, gateway = await world.one_of_each()
        running, waiting, alone = job(), job(), job(wait=False)
        clients = [gateway.client(running)]
        await worker.start_of(running)
        clients.append(gateway.client(waiting))
        await clients[1].until(JobQueued)
        assert (await gateway.submissions.submit(alone)).status == "queued"
        worker.tokens(running, 1, 0, 1, 2)
        await clients[0].until(JobTokens)
        before.crash()
        await until(lambda: not worker.links.up)
        await world.orchestrator(key=before.key)
        start = await worker.start_of(running, 2)
        # Whoever was back first, gateway or worker: the answer goes on, or begins anew in other portions.
        position = len(start.emitted[0]) if start.emitted else 0
        if position == 0:
            worker.tokens(running, 2, 0, 1)
            worker.tokens(running, 2, 2, 3)
        else:
            assert start.emitted == ((0, 1, 2),)
            worker.tokens(running, 2, 3)
        worker.tokens(running, 2, 4)
        await clients[0].until_tokens(0, 1, 2, 3, 4)
        worker.end(running, 2)
        end = await clients[0].end()
        assert clients[0].token_ids == [0, 1, 2, 3, 4]
        assert clients[0].text == "0 1 2 3 4 "
        assert (end.status, end.attempt) == ("completed", 2)
        assert world.ended(running).result == "0 1 2 3 4 "
        assert statuses(world, running) == ["lost", "completed"]
        await worker.start_of(waiting)
        worker.end(waiting)
        assert (await clients[1].end()).status == "completed"
        await worker.start_of(alone)
        worker.end(alone)
        await until(lambda: (record := world.record(alone)) and record.status not in LIVE)


@in_trio()
async def test_a_client_whose_job_begins_anew_before_its_gateway_is_back_misses_nothing(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        before, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0, 1, 2)
        await client.until(JobTokens)
        world.memory.cut(gateway.id, before.id)
        before.crash()
        await until(lambda: not worker.links.up)
        again = await world.orchestrator(key=before.key)
        assert (await worker.start_of(new, 2)).emitted == ()
        worker.tokens(new, 2, 0, 1)
        active = again.orchestrator.get(new.id)
        assert active is not None
        await until(lambda: active.token_ids == [0, 1])
        world.memory.heal(gateway.id, before.id)
        await until(lambda: active.token_ids == [0, 1, 2])  # the client knows more than the attempt has told yet
        worker.tokens(new, 2, 2, 3)
        worker.tokens(new, 2, 4)
        worker.end(new, 2)
        await client.end()
        assert client.token_ids == [0, 1, 2, 3, 4]
        assert client.text == world.ended(new).result == "0 1 2 3 4 "


@in_trio()
async def test_a_gateway_that_lost_its_link_is_told_what_it_missed(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0)
        await client.until(JobTokens)
        world.memory.cut(gateway.id, orchestrator.id)
        await until(lambda: not orchestrator.links.with_role("gateway"))
        worker.tokens(new, 1, 1, 2)
        worker.tokens(new, 1, 3)
        active = orchestrator.orchestrator.get(new.id)
        assert active is not None
        await until(lambda: len(active.token_ids) == 4)
        world.memory.heal(gateway.id, orchestrator.id)
        await client.until(JobTokens, 2)
        worker.tokens(new, 1, 4)
        worker.end(new)
        await client.end()
        assert client.token_ids == [0, 1, 2, 3, 4]
        assert client.text == "0 1 2 3 4 "
        assert len(client.of(JobAccepted)) == 1
        assert statuses(world, new) == ["completed"], "the job itself never stopped"


@in_trio()
async def test_a_gateway_that_missed_the_end_is_told_it_from_the_store(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        kept, dropped = job(), job(keep="nothing")
        for new in (kept, dropped):
            client = gateway.client(new)
            await worker.start_of(new)
            worker.tokens(new, 1, 0)
            await client.until(JobTokens)
            world.memory.cut(gateway.id, orchestrator.id)
            await until(lambda: not orchestrator.links.with_role("gateway"))
            worker.tokens(new, 1, 1)
            worker.end(new, usage=Usage(3, 2))
            await until(lambda: not orchestrator.leftovers)
            world.memory.heal(gateway.id, orchestrator.id)
            end = await client.end()
            assert (end.status, end.attempt) == ("completed", 1)
            if new is kept:
                assert (client.text, end.error) == ("0 1 ", None)
            else:
                assert end.error is not None, "a part of an answer is not passed off as the whole"
                assert end.error.message == "the job has completed, and its answer was not kept"


@in_trio()
async def test_a_gateway_waits_for_its_orchestrator_and_says_so_when_it_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.submissions.FAILOVER_WAIT_SECONDS", 0.05)
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        client = gateway.client(job())
        await worker.start_of(client.job)
        orchestrator.crash()
        with pytest.raises(NoOrchestrator):
            await client.end()


@in_trio()
async def test_a_client_is_told_when_its_jobs_end_is_long_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.following.END_SECONDS", 0.1)
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job(deadline_seconds=0.1)
        client = gateway.client(new)
        await worker.start_of(new)
        world.database.is_away = True
        with pytest.raises(DeadlineExceeded, match="has no end yet"):
            await client.end()
        world.database.is_away = False


# --- the same id again -----------------------------------------------------------------------------------------------


@in_trio()
async def test_the_same_id_again_attaches_to_a_live_job_and_tells_an_ended_one(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        gateway, other = await world.gateway(), await world.gateway("other")
        new = job()
        client = gateway.client(new)
        await worker.start_of(new)
        worker.tokens(new, 1, 0, 1)
        await client.until(JobTokens)
        second = other.client(new)
        await second.until(JobTokens)
        foreign = await world.gateway("foreign")
        conflict = await foreign.client(msgspec.structs.replace(new, tenant_id="another")).end()
        assert conflict.error is not None
        assert (conflict.attempt, conflict.error.code) == (0, "job_conflict")
        worker.tokens(new, 1, 2)
        worker.end(new)
        await second.end()
        assert second.token_ids == [0, 1, 2]
        assert len(worker.starts) == 1
        third = foreign.client(new)
        assert ((await third.end()).status, third.text) == ("completed", "0 1 2 ")
        conflict = await foreign.client(msgspec.structs.replace(new, tenant_id="another")).end()
        assert conflict.error is not None
        assert (conflict.attempt, conflict.error.code) == (0, "job_conflict")
        client.leave()


@in_trio()
async def test_the_same_id_while_it_is_being_admitted_changes_who_hears_of_it(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job()
        world.database.hold()
        link = gateway.links.with_role("orchestrator")[0]
        link.send(Submit(new))
        await until(lambda: orchestrator.orchestrator.get(new.id))
        client = gateway.client(new)
        await until(lambda: gateway.submissions._following.get(new.id))
        world.database.go_on()
        await worker.start_of(new)
        worker.end(new)
        end = await client.end()
        assert end.status == "completed"
        assert len(world.attempts(new)) == 1


# --- several orchestrators -------------------------------------------------------------------------------------------


@in_trio(seconds=60)
async def test_two_orchestrators_never_give_one_worker_more_than_its_slots(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one = await world.orchestrator(name="one")
        two = await world.orchestrator(name="two")
        worker = await world.scripted_worker(one, two, slots=3)
        most = 0
        on_start = worker.worker._on_start

        def watch(*arguments: object) -> None:
            nonlocal most
            on_start(*arguments)  # type: ignore[arg-type]
            most = max(most, worker.worker.num_running)

        worker.links._handlers[InferStart] = watch
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2)
        clients = [gateway.client(job("tokens=2 every=0.005")) for _ in range(60)]
        for client in clients:
            assert (await client.end()).status == "completed"
        assert most == 3
        held = {record.orchestrator_id for record in (world.record(client.job) for client in clients) if record}
        assert held == {one.id, two.id}


@in_trio()
async def test_the_same_job_through_two_gateways_at_once_is_told_to_both_by_the_orchestrator_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        one = await world.orchestrator(name="one")
        worker = await world.hand_worker(one)
        gateway = await world.gateway()
        new = job()
        clients = [gateway.client(new, stays=True)]
        await worker.start_of(new)
        two = await world.orchestrator(name="two")
        await world.known(worker, two)
        other = await world.gateway("other")
        to_two = await other.until(lambda: other.links.get(two.id))
        await other.until(lambda: other.links.get(one.id))
        with monkeypatch.context() as at_first:
            at_first.setattr(other.submissions, "_choose", lambda _links: to_two)
            clients.append(other.client(new, stays=True))
            await clients[1].until(JobAccepted)
        assert two.orchestrator.get(new.id) is None
        worker.tokens(new, 1, 0, 1)
        worker.end(new)
        for client in clients:
            assert (await client.end()).status == "completed"
            assert client.token_ids == [0, 1]
        assert [attempt.status for attempt in world.attempts(new)] == ["completed"]


@in_trio()
async def test_the_jobs_of_an_orchestrator_that_is_lost_go_on_at_another_one_from_what_clients_have_seen(
    tmp_path: Path,
) -> None:
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        worker = await world.hand_worker(one, two, slots=1)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        running = gateway.client(job())
        await worker.start_of(running.job)
        worker.tokens(running.job, 1, 0, 1, 2)
        await running.until_tokens(0, 1, 2)
        record = world.record(running.job)
        assert record is not None
        lost, left = (one, two) if record.orchestrator_id == one.id else (two, one)
        waiting = gateway.client(job())
        await waiting.until(JobQueued)
        lost.crash()
        for number in (1, 2):  # whichever has the slot first
            start = await worker.until(lambda: next(iter(worker.starts[number:]), None))  # noqa: B023
            if start.job.id == running.job.id:
                assert (start.attempt, start.emitted) == (2, ((0, 1, 2),))
                worker.tokens(running.job, 2, 3)
            worker.end(start.job, start.attempt, usage=Usage(3, 1))
        end = await running.end()
        assert running.token_ids == [0, 1, 2, 3]
        assert (end.status, end.attempt, end.usage, end.exact) == ("completed", 2, Usage(3, 4), True)
        assert statuses(world, running.job) == ["lost", "completed"]
        assert (await waiting.end()).status == "completed"
        assert {world.ended(c.job).orchestrator_id for c in (running, waiting)} == {left.id}


@in_trio()
async def test_an_orchestrator_that_is_only_cut_off_from_a_gateway_lets_go_of_a_job_that_was_taken_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tether.leases.ROUND_SECONDS", 0.05)
    async with open_world(tmp_path) as world:
        one, two = await world.orchestrator(name="one"), await world.orchestrator(name="two")
        worker = await world.hand_worker(one, two, slots=2)
        gateway = await world.gateway()
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        client = gateway.client(job())
        await worker.start_of(client.job)
        worker.tokens(client.job, 1, 0)
        await client.until_tokens(0)
        record = world.record(client.job)
        assert record is not None
        cut, other = (one, two) if record.orchestrator_id == one.id else (two, one)
        world.memory.cut(gateway.id, cut.id)
        await worker.start_of(client.job, 2)
        await worker.cancel_of(client.job, 1)
        await until(lambda: cut.orchestrator.get(client.job.id) is None)
        worker.tokens(client.job, 2, 1)
        worker.end(client.job, 2)
        assert (await client.end()).status == "completed"
        assert client.token_ids == [0, 1]
        assert world.ended(client.job).orchestrator_id == other.id
        world.memory.heal(gateway.id, cut.id)


@in_trio()
async def test_a_job_is_taken_only_from_the_orchestrator_that_its_gateway_lost(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        one = await world.orchestrator(name="one")
        worker = await world.hand_worker(one)
        gateway = await world.gateway()
        client = gateway.client(job())
        await worker.start_of(client.job)
        two = await world.orchestrator(name="two")
        await world.known(worker, two)
        other = await world.gateway("other")
        await until(lambda: len(other.links.up) == 2)
        moves: list[JobMoved] = []
        other.links._handlers[JobMoved] = lambda _link, moved: moves.append(moved)
        to_two = other.links.get(two.id)
        assert to_two is not None
        to_two.send(Submit(client.job, lost_id="somebody else", lost_boot="boot"))
        to_two.send(Submit(job("unknown"), lost_id=one.id, lost_boot="an earlier boot", accepted=True))
        await until(lambda: moves)
        assert moves == [JobMoved(client.job.id, one.id, one.boot_id)]
        worker.end(client.job)
        assert (await client.end()).status == "completed"
        assert statuses(world, client.job) == ["completed"]
        await until(lambda: any(start.job.input == "unknown" for start in worker.starts))
        worker.end(next(start.job for start in worker.starts if start.job.input == "unknown"))


@in_trio()
async def test_a_job_that_takes_three_workers_down_is_poison_whoever_holds_it(tmp_path: Path) -> None:
    settings = OrchestratorSettings(max_attempts=10)
    async with open_world(tmp_path) as world:
        one = await world.orchestrator(name="one", settings=settings)
        workers = [await world.hand_worker(one, name="worker 1")]
        gateway = await world.gateway()
        client = gateway.client(job())
        await workers[0].start_of(client.job)
        workers[0].crash()
        workers.append(await world.hand_worker(one, name="worker 2"))
        await workers[1].start_of(client.job, 2)
        two = await world.orchestrator(name="two", settings=settings)
        await world.known(workers[1], two)
        one.crash()
        await workers[1].start_of(client.job, 3)  # an orchestrator's loss is no worker's
        workers[1].crash()
        workers.append(await world.hand_worker(two, name="worker 3"))
        start = await workers[2].start_of(client.job, 4)
        workers[2].end(client.job, 4, reason="error", error=RuntimeDied("it died").to_info(), retry=True)
        end = await client.end()
        assert start.attempt == 4
        assert end.error is not None
        assert (end.status, end.error.code) == ("failed", "poison")
        assert "3 workers went down" in end.error.message
        assert [a.error_code for a in world.attempts(client.job)] == [
            "worker_lost",
            "orchestrator_lost",
            "worker_lost",
            "poison",
        ]


@in_trio()
async def test_an_answer_that_goes_on_with_other_weights_says_so(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        models = [(ModelInfo("demo", "1.0", revision=revision),) for revision in ("weights", "others", "weights")]
        first = await world.hand_worker(orchestrator, name="first", models=models[0])
        gateway = await world.gateway()
        clients = [gateway.client(job())]
        await first.start_of(clients[0].job)
        first.tokens(clients[0].job, 1, 0)
        await clients[0].until_tokens(0)
        other = await world.hand_worker(orchestrator, name="other", models=models[1])
        same = await world.hand_worker(orchestrator, name="same", models=models[2])
        first.crash()
        await same.start_of(clients[0].job, 2)
        same.tokens(clients[0].job, 2, 1)
        await clients[0].until_tokens(0, 1)
        same.crash()
        await other.start_of(clients[0].job, 3)
        other.end(clients[0].job, 3)
        end = await clients[0].end()
        assert (end.exact, world.ended(clients[0].job).exact) == (False, False)
        assert [a.fingerprint for a in world.attempts(clients[0].job)] == [
            "weights/float32/", "weights/float32/", "others/float32/"
        ]  # fmt: skip


# --- stopping --------------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_draining_orchestrator_refuses_new_jobs_and_waits_for_the_live_ones(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        running, waiting = job(), job()
        clients = [gateway.client(running)]
        await worker.start_of(running)
        clients.append(gateway.client(waiting))
        await clients[1].until(JobQueued)
        drained = trio.Event()

        async def drain() -> None:
            await orchestrator.orchestrator.drain()
            drained.set()

        world.nursery.start_soon(drain)
        await until(lambda: orchestrator.orchestrator.is_draining)
        await refused(gateway.client(job()), TetherError, "draining")
        assert not drained.is_set()
        worker.end(running)
        await worker.start_of(waiting)
        worker.end(waiting)
        await drained.wait()
        assert [(await client.end()).status for client in clients] == ["completed"] * 2


@in_trio()
async def test_an_orchestrator_that_leaves_hands_its_jobs_to_another_one_with_the_tokens_so_far(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        leaving = await world.orchestrator(name="leaving")
        worker = await world.hand_worker(leaving)
        gateway = await world.gateway()
        running, waiting, alone = gateway.client(job()), job(), job(wait=False)
        await worker.start_of(running.job)
        worker.tokens(running.job, 1, 0, 1)
        await running.until_tokens(0, 1)
        queued = gateway.client(waiting)
        await queued.until(JobQueued)
        assert (await gateway.submissions.submit(alone)).status == "queued"
        staying = await world.orchestrator(name="staying")
        await world.known(worker, staying)
        await gateway.until(lambda: len(gateway.links.with_role("orchestrator")) == 2 or None)
        await until(lambda: leaving.links.get(staying.id))
        world.nursery.start_soon(leaving.orchestrator.drain)
        await until(lambda: staying.orchestrator.get(waiting.id))
        assert leaving.orchestrator.get(running.job.id) is not None, "what runs has its time to end"
        at_once = gateway.client(job())
        await at_once.until(JobQueued)
        assert staying.orchestrator.get(at_once.job.id) is not None
        await leaving.orchestrator.hand_over()
        assert not leaving.leftovers
        await worker.cancel_of(running.job, 1)
        for number in range(1, 5):
            start = await worker.until(lambda: next(iter(worker.starts[number:]), None))  # noqa: B023
            assert start.emitted == (((0, 1),) if start.job.id == running.job.id else ())
            worker.end(start.job, start.attempt)
        for client in (running, queued, at_once):
            assert (await client.end()).status == "completed"
        assert running.token_ids == [0, 1]
        assert [a.error_code for a in world.attempts(running.job)] == ["handed_over", None]
        await until(lambda: (record := world.record(alone)) and record.status == "completed")


@in_trio()
async def test_a_worker_that_leaves_hands_over_what_still_runs_and_nobody_is_at_fault(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        leaving = await world.scripted_worker(orchestrator, name="leaving")
        gateway = await world.gateway()
        client = gateway.client(job("tokens=100 every=0.03"))
        await client.until(JobTokens, 3)
        await world.scripted_worker(orchestrator, name="staying")
        leaving.worker.hand_over()
        end = await client.end()
        assert (end.status, client.token_ids) == ("completed", list(range(100)))
        assert [a.error_code for a in world.attempts(client.job)] == ["handed_over", None]
        assert orchestrator.roster.views()[0].recent_failures == 0


@in_trio()
async def test_a_draining_worker_finishes_what_it_has_and_new_jobs_go_elsewhere(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        leaving = await world.scripted_worker(orchestrator, name="leaving")
        gateway = await world.gateway()
        slow = gateway.client(job("tokens=30 every=0.03"))
        await slow.until(JobTokens)
        staying = await world.hand_worker(orchestrator, name="staying")
        drained = trio.Event()

        async def drain() -> None:
            await leaving.worker.drain()
            drained.set()

        world.nursery.start_soon(drain)
        entry = orchestrator.roster.get(leaving.id)
        assert entry is not None
        await until(lambda: entry.state.draining)
        quick = gateway.client(job())
        await staying.start_of(quick.job)
        staying.end(quick.job)
        assert not drained.is_set()
        assert (await slow.end()).status == "completed"
        await drained.wait()
        assert statuses(world, slow.job) == ["completed"]


# --- mistakes in here ------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_mistake_in_one_jobs_story_ends_that_job_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each(slots=4)
        well, broken = gateway.client(job()), gateway.client(job())
        for client in (well, broken):
            await worker.start_of(client.job)
        count = ActiveJob.count_attempt

        def fail(self: ActiveJob, usage: Usage | None) -> None:
            if self.job.id == broken.job.id:
                raise RuntimeError("a bug")
            count(self, usage)

        monkeypatch.setattr(ActiveJob, "count_attempt", fail)
        worker.end(broken.job)
        end = await broken.end()
        assert end.status == "failed"
        assert end.error is not None
        assert end.error.code == "internal_error"
        assert world.ended(broken.job).status == "failed"
        assert statuses(world, broken.job) == ["failed"], "its slot is free in the ledger too"
        worker.end(well.job)
        assert (await well.end()).status == "completed"


@in_trio()
async def test_a_mistake_in_an_admission_refuses_that_job_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        admit = orchestrator.ledger.admit

        async def fail(new: Job, **facts: object) -> object:
            if new.input == "broken":
                raise RuntimeError("a bug")
            return await admit(new, **facts)  # type: ignore[arg-type]

        monkeypatch.setattr(orchestrator.ledger, "admit", fail)
        end = await gateway.client(job("broken")).end()
        assert end.error is not None
        assert (end.attempt, end.error.code) == (0, "internal_error")
        client = gateway.client(job())
        await worker.start_of(client.job)
        worker.end(client.job)
        assert (await client.end()).status == "completed"


# --- links that are full ---------------------------------------------------------------------------------------------


@in_trio()
async def test_a_gateway_that_does_not_read_loses_its_link_and_then_hears_the_whole_answer(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(LINKS, max_buffer_bytes=150_000, close_seconds=0.05)
    async with open_world(tmp_path, link_settings=settings) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        new = job(sampling=Sampling(max_tokens=4096))
        client = gateway.client(new)
        await worker.start_of(new)
        link = orchestrator.links.with_role("gateway")[0]
        worker.tokens(new, 1, 0)
        await client.until(JobTokens)
        active = orchestrator.orchestrator.get(new.id)
        assert active is not None
        world.memory.freeze(gateway.id)
        for position in range(1, 4):
            worker.link_of(new, 1).send(InferTokens(new.id, 1, position, (position,), str(position) * 60_000))
            await until(lambda: len(active.token_ids) == position + 1)  # noqa: B023
        assert not link.is_open
        world.memory.thaw(gateway.id)
        await client.until_tokens(0, 1, 2, 3)
        worker.end(new)
        await client.end()
        assert client.text == "0 " + "1" * 60_000 + "2" * 60_000 + "3" * 60_000


# --- questions -------------------------------------------------------------------------------------------------------


@in_trio()
async def test_a_gateway_can_ask_for_jobs_and_for_health(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        health = await gateway.submissions.health()
        assert (health.store, health.num_workers, health.num_ready_workers) == (None, 0, 0)
        worker = await world.hand_worker(orchestrator)
        running, waiting = job(), job(tenant_id="other")
        clients = [gateway.client(running)]
        await worker.start_of(running)
        clients.append(gateway.client(waiting))
        await clients[1].until(JobQueued)
        health = await gateway.submissions.health()
        assert (health.num_workers, health.num_ready_workers, health.num_running, health.num_queued) == (1, 1, 1, 1)
        assert await gateway.submissions.job(running.id, "tenant") == world.record(running)
        with pytest.raises(JobNotFound):
            await gateway.submissions.job(running.id, "other")
        jobs = await gateway.submissions.jobs(None, None, None, None, 10)
        assert [record.id for record in jobs] == [waiting.id, running.id]
        assert await gateway.submissions.jobs("other", "queued", "demo", None, 10) == jobs[:1]
        assert await gateway.submissions.jobs(None, None, None, waiting.id, 10) == jobs[1:]
        world.database.is_away = True
        with pytest.raises(StoreUnavailable):
            await gateway.submissions.job(running.id, None)
        world.database.is_away = False
        worker.end(running)
        await worker.start_of(waiting)
        worker.end(waiting)


@in_trio()
async def test_a_record_that_is_longer_than_a_frame_is_an_error_and_no_hang(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        _, worker, gateway = await world.one_of_each()
        new = job("x" * 700_000, sampling=Sampling(max_tokens=4096))
        client = gateway.client(new)
        await worker.start_of(new)
        for position in range(2):
            worker.link_of(new, 1).send(InferTokens(new.id, 1, position, (position,), "y" * 300_000))
        worker.end(new)
        await client.end()
        with pytest.raises(TetherError, match="longer than a message may be"):
            await gateway.submissions.job(new.id, None)
        assert len(await gateway.submissions.jobs(None, None, None, None, 10)) == 1


# --- housekeeping ----------------------------------------------------------------------------------------------------


@in_trio()
async def test_the_store_knows_who_takes_part_and_who_has_left(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator, worker, gateway = await world.one_of_each()
        await until(lambda: [record.status for record in world.store.workers()] == ["ready"])
        (record,) = world.store.workers()
        assert (record.id, record.orchestrator_id, record.models) == (worker.id, orchestrator.id, worker.models)
        await until(lambda: [model.name for model in world.store.models()] == ["demo"])
        await until(lambda: {node.role for node in world.store.nodes()} >= {"orchestrator"})
        worker.tell(draining=True)
        await until(lambda: world.store.workers()[0].status == "draining")
        worker.crash()
        await until(lambda: world.store.workers()[0].status == "gone")
        assert gateway.links.up


@in_trio()
async def test_a_worker_that_comes_back_at_once_is_not_written_down_as_gone(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        worker = await world.hand_worker(orchestrator)
        await until(lambda: [record.status for record in world.store.workers()] == ["ready"])
        world.memory.end(worker.id, orchestrator.id)
        await until(lambda: not orchestrator.roster.get(worker.id))
        await world.known(worker, orchestrator)
        saved = orchestrator.housekeeping._saved
        await until(lambda: worker.id in saved and not orchestrator.housekeeping._changed.is_set())
        assert world.store.workers()[0].status == "ready"


@in_trio()
async def test_a_store_that_is_away_shows_in_the_answer_about_health_until_it_is_back(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        orchestrator = await world.orchestrator()
        gateway = await world.gateway()
        world.database.is_away = True
        orchestrator.housekeeping._look()
        await world.hand_worker(orchestrator)
        await until(lambda: orchestrator.housekeeping.store_error)
        health = await gateway.submissions.health()
        assert health.store is not None
        assert health.store.code == "store_unavailable"
        world.database.is_away = False
        await until(lambda: orchestrator.housekeeping.store_error is None)
        assert [record.status for record in world.store.workers()] == ["ready"]


# --- any order of events ---------------------------------------------------------------------------------------------


class Trouble:
    """A world with 24 clients, and what can happen to it."""

    def __init__(self, world: World, random: Random, num_orchestrators: int) -> None:
        self.world = world
        self.random = random
        self.num_orchestrators = num_orchestrators
        self.settings = OrchestratorSettings(max_attempts=100, max_lost_workers=100)
        world.settles = True

    async def begin(self) -> None:
        self.orchestrators = [
            await self.world.orchestrator(settings=self.settings, name=f"orchestrator {n}")
            for n in range(self.num_orchestrators)
        ]
        self.workers = [LivelyWorker(self.world, self.random, slots=3, name=f"worker {n}") for n in range(3)]
        await self.world.start(*self.workers)
        for worker in self.workers:
            await self.world.known(worker, *self.orchestrators)
        self.gateways = [await self.world.gateway("one"), await self.world.gateway("two")]
        self.clients = [self.client() for _ in range(24)]

    def client(self) -> Client:
        new = job(f"tokens={self.random.randint(1, 40)}", stream=self.random.random() < 0.7)
        return self.random.choice(self.gateways).client(new)

    async def happen(self) -> None:
        match self.random.choice(["end", "end", "worker", "orchestrator", "store", "leave"]):
            case "end":
                peer = self.random.choice([*self.workers, *self.gateways])
                self.world.memory.end(peer.id, self.random.choice(self.orchestrators).id)
            case "worker":
                number = self.random.randrange(len(self.workers))
                old = self.workers[number]
                old.crash()
                new = LivelyWorker(self.world, self.random, slots=3, name=old.node.name, key=old.key)
                self.workers[number] = new
                await self.world.start(new)
            case "orchestrator":
                number = self.random.randrange(len(self.orchestrators))
                before = self.orchestrators[number]
                before.crash()
                self.orchestrators[number] = await self.world.orchestrator(
                    settings=self.settings, key=before.key, name=before.node.name
                )
            case "store":
                self.world.database.is_away = True
                await trio.sleep(0.01)
                self.world.database.is_away = False
            case "leave":
                self.random.choice(self.clients[::8]).leave()

    async def check(self, client: Client) -> bool:
        """Check what a client saw; return whether it saw an answer, and not a refusal."""
        await client.done.wait()
        if isinstance(client.error, NoOrchestrator):
            return False
        end = await client.end()
        if end.attempt == 0 and end.error is not None and isinstance(from_info(end.error), Unavailable):
            return False
        assert end.status == "completed", end
        wanted = list(range(int(client.job.input.removeprefix("tokens="))))
        assert client.token_ids == wanted[: len(client.token_ids)], "in order, none twice"
        assert client.text == "".join(f"{token} " for token in wanted), "none missing"
        record = self.world.ended(client.job)
        assert (record.status, record.result) == ("completed", client.text)
        return True


@pytest.mark.parametrize(("seed", "num_orchestrators"), [*((n, 1) for n in range(4)), *((n, 2) for n in range(6))])
def test_whatever_is_lost_and_in_whatever_order_each_client_sees_each_token_once_and_one_end(
    tmp_path: Path, seed: int, num_orchestrators: int
) -> None:
    @in_trio(seconds=60)
    async def main() -> None:
        async with open_world(tmp_path) as world:
            trouble = Trouble(world, Random(seed), num_orchestrators)
            await trouble.begin()
            await until(lambda: any(worker.starts for worker in trouble.workers))
            for _ in range(25):
                await trio.sleep(trouble.random.uniform(0, 0.03))
                await trouble.happen()
            leaving, staying = trouble.clients[::8], [c for n, c in enumerate(trouble.clients) if n % 8]
            for client in leaving:
                client.leave()
            answered = [client for client in staying if await trouble.check(client)]
            assert answered
            await until(lambda: not any(each.leftovers for each in trouble.orchestrators))
            assert not any(world.store.jobs(status=status) for status in LIVE)
            attempts = [row for client in trouble.clients for row in world.attempts(client.job)]
            assert not any(row.status == "running" for row in attempts)

    main()
