"""The orchestrator: takes jobs from gateways, finds each a worker, and sees that each has exactly one end.

`_serve` is the life of a job and reads as its story; each job has a task that runs it. What arrives on links is passed on
at once (tokens) or put into the job's inbox, where the story takes a turn (active.py). Who could run a job is decided in
scheduler.py over the view that roster.py keeps; what must not be forgotten goes through the ledger (store.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import trio

from tether import scheduler
from tether.active import ActiveJob, Assigned, Busy, Ended, Ending, Lost, Stop
from tether.errors import (
    Draining,
    ErrorInfo,
    InternalError,
    JobCancelled,
    JobConflict,
    LinkError,
    QueueFull,
    StoreUnavailable,
    TetherError,
    WorkerFailed,
)
from tether.links import Link, Links
from tether.messages import (
    Cancel,
    InferBusy,
    InferCancel,
    InferEnd,
    InferStart,
    InferTokens,
    JobAccepted,
    JobEnd,
    JobEvent,
    JobQueued,
    JobStarted,
    JobTokens,
    Presence,
    Submit,
)
from tether.records import LIVE, Job, JobRecord, Usage
from tether.roster import Entry, Roster
from tether.scheduler import JobQueue
from tether.settings import OrchestratorSettings
from tether.store import Ledger

log = logging.getLogger(__name__)

BUSY_SECONDS = 0.2
"""How long a worker that said busy is not asked again, unless a new state of it comes first."""
CANCEL_SECONDS = 2.0
"""How long a cancelled attempt may take to say what it spent."""


class Orchestrator:
    """An orchestrator over `links`, with its durable part in `ledger` and its view of the workers in `roster`."""

    def __init__(
        self, links: Links, ledger: Ledger, roster: Roster, *, boot_id: str, settings: OrchestratorSettings
    ) -> None:
        self._links = links
        self._ledger = ledger
        self._roster = roster
        self._boot_id = boot_id
        self._settings = settings
        self._jobs: dict[str, ActiveJob] = {}
        self._queue = JobQueue(settings.max_queued)
        self._known_models: set[str] = set()
        self._draining = False
        self._idle = trio.Event()
        self._nursery: trio.Nursery
        links.on_down(self._on_down)
        links.on(Presence, self._on_presence)
        links.on(InferTokens, self._on_tokens)
        links.on(InferEnd, self._on_infer_end)
        links.on(InferBusy, self._on_busy)
        links.on(Submit, self._on_submit)
        links.on(Cancel, self._on_cancel)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started when the jobs that an earlier boot left are taken up again."""
        async with trio.open_nursery() as self._nursery:
            await self._recover()
            task_status.started()
            await trio.sleep_forever()

    async def drain(self) -> None:
        """Take no new jobs and wait until the live ones have ended."""
        self._draining = True
        while self._jobs:
            self._idle = trio.Event()
            await self._idle.wait()

    @property
    def num_queued(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Live jobs that do not wait for a slot."""
        return len(self._jobs) - len(self._queue)

    @property
    def is_draining(self) -> bool:
        """Whether it takes no new jobs."""
        return self._draining

    def get(self, job_id: str) -> ActiveJob | None:
        """Return a job that is live here."""
        return self._jobs.get(job_id)

    # --- the life of a job -------------------------------------------------------------------------------------------

    async def _serve(self, active: ActiveJob) -> None:
        """Run a job from its admission to its end."""
        try:
            entry = None if active.accepted else await self._admit(active)
            while active.accepted:
                found = entry or await self._wait_for_slot(active)
                ending = found if isinstance(found, Ending) else await self._attempt(active, found)
                if ending is not None:
                    await self._finish(active, ending)
                    return
                entry = None
        except Exception as exc:
            if active.accepted or not isinstance(exc, TetherError):
                # A mistake in here must not take the other jobs down, nor leave this one's client waiting. If the ledger
                # has the job, it stays live there and is taken up at the next start.
                log.exception("job %s: internal error", active.job.id, extra={"job_id": active.job.id})
                exc = InternalError()
            self._tell_end(active, Ending("failed", "error", exc.to_info()))  # refused: nothing is in the ledger
        finally:
            self._forget(active)

    async def _admit(self, active: ActiveJob) -> Entry | None:
        """Check the quota, write the job down and reserve a slot for it, all in one transaction.

        Returns the worker whose slot the job has, or None where it has to wait. Raises the refusal. A job that the store
        knows as ended is told its end and stays not accepted.
        """
        job = active.job
        decision = self._roster.choose(active)
        if decision.worker_id is None:
            if not decision.can_wait:
                raise scheduler.refusal(job, decision, self._roster.views(), self._known_models)
            self._queue.check_room()
        entry = self._roster.assign(active, decision.worker_id) if decision.worker_id else None
        admission = await self._ledger.admit(
            job,
            orchestrator_id=self._links.peer_id,
            orchestrator_boot=self._boot_id,
            now=time.time(),
            worker=(*entry.boot, entry.num_slots) if entry else None,
        )
        if admission.duplicate and not self._is_mine(admission.record):
            self._tell_record(active, admission.record)
            return None
        active.accepted = True
        self._tell(active, JobAccepted(job.id, "running" if admission.reserved else "queued"))
        if not job.wait:
            active.gateway = None  # its client has its answer, and fetches the result
        if entry is not None and admission.reserved:
            active.attempt = 1
            return entry
        if entry is not None:
            self._give_back(active, entry)
        return None

    async def _wait_for_slot(self, active: ActiveJob) -> Entry | Ending:
        """Stand in the queue until a worker has a slot for the job and the store agrees, or the job is stopped."""
        self._stand_in_queue(active)
        while True:
            match await active.next_turn():
                case Stop() as stop:
                    self._queue.remove(active.job.id)
                    return Ending.of(stop)
                case Assigned():
                    if (entry := await self._reserve(active)) is not None:
                        return entry
                    self._stand_in_queue(active)
                case _:
                    continue  # late, of an attempt that is over

    def _stand_in_queue(self, active: ActiveJob) -> None:
        place = self._queue.push(active.job)
        left = max(0.0, active.deadline - trio.current_time())
        self._tell(active, JobQueued(active.job.id, place, left))
        self._match()

    async def _reserve(self, active: ActiveJob) -> Entry | None:
        """Write the next attempt down; None, with the slot given back, where the store says that the slot is taken."""
        entry = active.slot
        if entry is None or self._roster.get(entry.link.peer_id) is not entry:
            self._release(active)
            return None
        try:
            reserved = await self._ledger.reserve(
                active.job.id,
                active.attempt + 1,
                orchestrator_id=self._links.peer_id,
                orchestrator_boot=self._boot_id,
                worker=(*entry.boot, entry.num_slots),
                now=time.time(),
            )
        except StoreUnavailable as exc:
            log.warning("job %s waits for the store: %s", active.job.id, exc.message, extra={"job_id": active.job.id})
            reserved = False
        if not reserved:
            self._give_back(active, entry)
            return None
        active.attempt += 1
        return entry

    async def _attempt(self, active: ActiveJob, entry: Entry) -> Ending | None:
        """Run one attempt; return how the job ends, or None when another attempt is due.

        Between the turn that ends the attempt and the write that says so to the store nothing waits, so the next job's
        reservation of the same slot comes after it in the ledger's order.
        """
        job, number = active.job, active.attempt
        active.attempt_tokens = 0
        try:
            entry.link.send(InferStart(job, number, active.emitted))
            self._tell(active, JobStarted(job.id, number, entry.link.peer_id, entry.link.name))
            turn = await active.end_of_attempt(number)
            if isinstance(turn, Stop):
                return await self._stop_attempt(active, entry, turn)
        except LinkError:
            turn = Lost(number)
        finally:
            self._release(active)
        match turn:
            case Ended(end):
                active.spend(end.usage)
                if end.error is None:
                    return Ending("completed", end.finish_reason)
                if not end.retry:
                    return Ending("failed", "error", end.error)
                return await self._retry(active, entry, "failed", end.error)
            case Busy():
                self._mark_busy(entry)
                await self._settle(active, self._ledger.requeue, job.id, number, status="busy")
                return None
            case Lost():
                error = WorkerFailed(f"worker {entry.link.name} was lost")
                return await self._retry(active, entry, "lost", error.to_info())

    async def _stop_attempt(self, active: ActiveJob, entry: Entry, stop: Stop) -> Ending:
        """Tell the worker to stop, and wait shortly to hear what the attempt has spent."""
        entry.link.send(InferCancel(active.job.id, active.attempt))
        with trio.move_on_after(CANCEL_SECONDS):
            turn = await active.end_of_attempt(active.attempt)
            if isinstance(turn, Ended):
                active.spend(turn.end.usage)
                if turn.end.error is None and turn.end.finish_reason in {"stop", "length"}:
                    return Ending("completed", turn.end.finish_reason)  # it was done before it could be stopped
        return Ending.of(stop)

    async def _retry(
        self, active: ActiveJob, entry: Entry, status: Literal["failed", "lost"], error: ErrorInfo
    ) -> Ending | None:
        """Count a failed attempt against its worker; return the job's end when that was the last one it may have."""
        log.warning(
            "job %s: attempt %d on %s %s: %s",
            active.job.id,
            active.attempt,
            entry.link.name,
            status,
            error.message,
            extra={"job_id": active.job.id},
        )
        self._roster.mark_failed(entry)
        active.tried |= {entry.boot}
        active.num_failures += 1
        if active.num_failures >= self._settings.max_attempts:
            message = f"{active.num_failures} attempts failed; the last one: {error.message}"
            return Ending("failed", "error", WorkerFailed(message).to_info())
        await self._settle(
            active,
            self._ledger.requeue,
            active.job.id,
            active.attempt,
            status=status,
            error_code=error.code,
            completion_tokens=active.attempt_tokens,
        )
        return None

    async def _finish(self, active: ActiveJob, ending: Ending) -> None:
        """Write the job's end, and only then tell it."""
        written = await self._settle(
            active,
            self._ledger.finish,
            active.job.id,
            active.attempt,
            status=ending.status,
            finish_reason=ending.finish_reason,
            result=active.text,
            error=ending.error,
            usage=active.usage,
            attempt_tokens=active.attempt_tokens,
        )
        if not written:
            log.error("job %s had another end in the store", active.job.id, extra={"job_id": active.job.id})
        self._tell_end(active, ending)

    async def _settle(
        self, active: ActiveJob, operation: Callable[..., Awaitable[bool]], *names: Any, **facts: Any
    ) -> bool:
        """Write until the store has it: what happened has happened, so it waits for a store that is away."""
        now, pause = time.time(), 0.1
        while True:
            try:
                return await operation(*names, **facts, now=now)
            except StoreUnavailable as exc:
                log.warning("job %s: %s; trying again", active.job.id, exc.message, extra={"job_id": active.job.id})
                await trio.sleep(pause)
                pause = min(2 * pause, 5.0)

    async def _recover(self) -> None:
        """Take up the jobs that an earlier boot of this orchestrator left: their attempts are void, they wait again."""
        me, now = self._links.peer_id, time.time()
        store = self._ledger.store
        await self._ledger.adopt(orchestrator_id=me, orchestrator_boot=self._boot_id, now=now)
        for record in await self._ledger.read(store.live_jobs, me):
            log.info("job %s is taken up again", record.id, extra={"job_id": record.id})
            active = ActiveJob(
                _job_of(record),
                # One machine's clock, unless the store moved; a clock that went back gives the job its full time again.
                deadline=trio.current_time() + record.deadline_seconds - max(0.0, now - record.created_at),
                gateway=None,
                attempt=record.attempt,
            )
            active.accepted = True
            self._jobs[record.id] = active
            self._nursery.start_soon(self._serve, active)
        self._known_models.update(model.name for model in await self._ledger.read(store.models))

    # --- telling the gateway -----------------------------------------------------------------------------------------

    def _tell(self, active: ActiveJob, event: JobEvent) -> None:
        if active.gateway is None:
            return
        try:
            active.gateway.send(event)
        except LinkError as exc:
            log.info("gateway %s hears no more of job %s: %s", active.gateway.name, active.job.id, exc.message)
            active.gateway = None

    def _tell_end(self, active: ActiveJob, ending: Ending) -> None:
        attempt = active.attempt if active.accepted else 0
        self._tell(
            active,
            JobEnd(active.job.id, ending.status, attempt, ending.finish_reason, active.usage, ending.error),
        )

    def _is_mine(self, record: JobRecord | None) -> bool:
        """Whether the store has the job from this very admission, whose first answer was lost on the way.

        What earlier boots left was taken up at the start, so a live job of mine that is not live here is this one.
        """
        return record is not None and record.status in LIVE and record.orchestrator_id == self._links.peer_id

    def _tell_record(self, active: ActiveJob, record: JobRecord | None) -> None:
        """Tell the end that the store has of this job; raise `JobConflict` where it is not this tenant's, or is live."""
        if record is None or record.status in LIVE:
            raise JobConflict("another job has this id")
        self._tell(
            active,
            JobEnd(
                record.id,
                record.status,
                record.attempt,
                record.finish_reason or "error",
                record.usage,
                record.error,
                record.result,
            ),
        )

    # --- slots and the queue -----------------------------------------------------------------------------------------

    def _release(self, active: ActiveJob) -> None:
        """Take the job's slot back, for whoever is next."""
        if self._roster.release(active):
            self._match()

    def _give_back(self, active: ActiveJob, entry: Entry) -> None:
        """Take back a slot that turned out to be taken, and leave that worker alone for a moment."""
        self._mark_busy(entry)
        self._release(active)

    def _mark_busy(self, entry: Entry) -> None:
        async def match_later() -> None:
            await trio.sleep(BUSY_SECONDS)
            self._match()

        self._roster.mark_busy(entry, BUSY_SECONDS)
        self._nursery.start_soon(match_later)

    def _match(self) -> None:
        """Give free slots to the jobs that wait, in the order of the queue."""
        without_slots: set[tuple[str, str]] = set()
        for job_id in self._queue:
            active = self._jobs[job_id]
            if active.model_key in without_slots:
                continue
            worker_id = self._roster.choose(active).worker_id
            if worker_id is not None:
                self._queue.remove(job_id)
                self._roster.assign(active, worker_id)
                active.put(Assigned(worker_id))
            elif not active.tried:  # a job that avoids a worker says nothing of the others' chances
                without_slots.add(active.model_key)

    def _forget(self, active: ActiveJob) -> None:
        self._release(active)
        self._queue.remove(active.job.id)
        del self._jobs[active.job.id]
        active.done.set()
        if not self._jobs:
            self._idle.set()

    # --- from gateways -----------------------------------------------------------------------------------------------

    def _on_submit(self, link: Link, submit: Submit) -> None:
        job = submit.job
        if (active := self._jobs.get(job.id)) is not None:
            self._attach(active, link, submit)
            return
        active = ActiveJob(job, deadline=trio.current_time() + job.deadline_seconds, gateway=link)
        if submit.emitted:
            active.extend(InferTokens(job.id, 0, 0, submit.emitted, submit.text))
        if self._draining:
            self._tell_end(active, Ending("failed", "error", Draining().to_info()))
        elif len(self._jobs) >= self._settings.max_queued + self._roster.num_slots:
            error = QueueFull(f"{len(self._jobs)} jobs are live already, which is all that may; try again soon")
            self._tell_end(active, Ending("failed", "error", error.to_info()))
        else:
            self._jobs[job.id] = active
            self._nursery.start_soon(self._serve, active)

    def _attach(self, active: ActiveJob, link: Link, submit: Submit) -> None:
        """Go on with a job that is live here for a gateway that lost its link, from what its client has seen."""
        if submit.job.tenant_id != active.job.tenant_id:
            error = JobConflict("another job has this id").to_info()
            link.send(JobEnd(submit.job.id, "failed", 0, "error", Usage(), error))
            return
        active.gateway = link
        if not active.chunks and active.slot is None and submit.emitted:
            active.extend(InferTokens(active.job.id, 0, 0, submit.emitted, submit.text))
        if active.accepted:
            self._tell(active, JobAccepted(active.job.id, "running" if active.slot else "queued"))
        for chunk in active.chunks:
            if chunk.position >= len(submit.emitted):
                self._tell(active, _job_tokens(chunk))

    def _on_cancel(self, link: Link, cancel: Cancel) -> None:
        active = self._jobs.get(cancel.job_id)
        if active is not None and active.gateway is not None and active.gateway.peer_id == link.peer_id:
            self.cancel(active, cancel.reason)

    def cancel(self, active: ActiveJob, reason: str) -> None:
        """End a live job as cancelled; `active.done` says when its end is written."""
        active.put(Stop("cancelled", JobCancelled(f"the job was cancelled: {reason}").to_info()))

    # --- from workers ------------------------------------------------------------------------------------------------

    def _on_presence(self, link: Link, presence: Presence) -> None:
        self._roster.hear(link, presence)
        self._known_models.update(model.name for state in self._roster.states for model in state.models)
        self._match()

    def _on_tokens(self, link: Link, tokens: InferTokens) -> None:
        active = self._current(link, tokens.job_id, tokens.attempt)
        if active is None:
            return
        if tokens.position != active.num_tokens:
            # A worker that skips or repeats tokens is wrong about this answer: it goes on elsewhere from what is sure.
            log.error("worker %s sent tokens from %d, not %d", link.name, tokens.position, active.num_tokens)
            active.put(Lost(tokens.attempt))
            link.send(InferCancel(tokens.job_id, tokens.attempt))
            return
        active.extend(tokens)
        self._tell(active, _job_tokens(tokens))

    def _on_infer_end(self, link: Link, end: InferEnd) -> None:
        if (active := self._current(link, end.job_id, end.attempt)) is not None:
            active.put(Ended(end))

    def _on_busy(self, link: Link, busy: InferBusy) -> None:
        if (active := self._current(link, busy.job_id, busy.attempt)) is not None:
            active.put(Busy(busy.attempt))

    def _current(self, link: Link, job_id: str, attempt: int) -> ActiveJob | None:
        """Return the job whose newest attempt this is, on this very link; None for whatever is late."""
        active = self._jobs.get(job_id)
        if active is None or active.attempt != attempt or active.slot is None or active.slot.link is not link:
            return None
        return active

    # --- links -------------------------------------------------------------------------------------------------------

    def _on_down(self, link: Link, reason: str) -> None:
        entry = self._roster.remove(link)
        if entry is not None:
            log.info("worker %s is gone: %s", link.name, reason)
        for active in list(self._jobs.values()):
            if active.gateway is link:
                active.gateway = None  # the job goes on: its gateway comes back, or its result is fetched
            if active.slot is not None and active.slot.link is link:
                active.put(Lost(active.attempt))


def _job_tokens(tokens: InferTokens) -> JobTokens:
    return JobTokens(tokens.job_id, tokens.attempt, tokens.position, tokens.token_ids, tokens.text)


def _job_of(record: JobRecord) -> Job:
    """Return the job as it was submitted; its quota was counted then."""
    return Job(
        id=record.id,
        tenant_id=record.tenant_id,
        model=record.model,
        version=record.version,
        input=record.input or "",
        sampling=record.sampling,
        wait=record.wait,
        stream=record.stream,
        priority=record.priority,
        deadline_seconds=record.deadline_seconds,
        region=record.region,
        session_key=record.session_key,
        keep=record.keep,
        created_at=record.created_at,
    )
