"""The orchestrator: takes jobs from gateways, finds each a worker, and sees that each has exactly one end.

`_serve` is the life of a job and reads as its story; each job has a task that runs it. What arrives on links is passed on
at once (tokens) or put into the job's inbox, where the story takes a turn (active.py). Who could run a job is decided in
scheduler.py over the view that roster.py keeps; what must not be forgotten is written down in bookkeeping.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from typing import Literal

import msgspec
import trio

from tether import scheduler
from tether.active import (
    ActiveJob,
    Assigned,
    Busy,
    Displaced,
    Ended,
    Ending,
    EndOfAttempt,
    HandOver,
    Lost,
    Moved,
    Stop,
    job_of,
)
from tether.attempts import is_handed_over
from tether.bookkeeping import Books
from tether.errors import (
    Draining,
    ErrorInfo,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    LinkError,
    ProtocolViolation,
    QueueFull,
    StoreUnavailable,
    TetherError,
    WorkerFailed,
    WorkerLost,
    from_info,
)
from tether.explain import Outlook
from tether.ledger import HANDED_OVER, Ledger
from tether.link import Link
from tether.links import Links
from tether.messages import (
    InferBusy,
    InferCancel,
    InferEnd,
    InferStart,
    InferTokens,
    JobAccepted,
    JobEnd,
    JobMoved,
    JobStarted,
    Leaving,
    NotLive,
    Presence,
    Submit,
    Unwatch,
    Watch,
)
from tether.plausible import plausible_usage, says_too_much
from tether.queueing import JobQueue
from tether.records import Job, JobRecord, JobStatus, ModelKey, Usage, Waiting
from tether.roster import Entry, Roster
from tether.scheduler import Decision
from tether.settings import OrchestratorSettings
from tether.stored import WorkerSlot
from tether.tasks import start_if_open
from tether.waiting import WaitingRoom

log = logging.getLogger(__name__)

SETTLE_SECONDS = 3.0
"""How long after its start an orchestrator does not know yet who is there: workers find it again within a second or so,
and what was sent to it before that need not be refused."""
CANCEL_SECONDS = 2.0
"""How long a cancelled attempt may take to say what it spent."""
COME_BACK_SECONDS = 5.0
"""How long a job that is taken up may wait at least, whatever the clock says, for a gateway that knows its deadline."""


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
        self._queue = JobQueue(settings.max_queued, settings.max_queued_per_tenant)
        self._waiting = WaitingRoom(self._queue, roster, self._jobs.get)
        self._num_arrivals = 0
        self._num_undecided = 0  # just arrived: nobody has looked yet whether they may wait
        self._books = Books(ledger, (links.peer_id, boot_id))
        self._draining = False
        self._settles_at = trio.current_time() + SETTLE_SECONDS
        self._heard = trio.Event()
        self._idle = trio.Event()
        self._nursery: trio.Nursery
        links.on_up(self._on_up)
        links.on_down(self._on_down)
        links.on(Presence, self._on_presence)
        links.on(InferTokens, self._on_tokens)
        links.on(InferEnd, self._on_infer_end)
        links.on(InferBusy, self._on_busy)
        links.on(Submit, self._on_submit)
        links.on(Watch, self._on_watch)
        links.on(Unwatch, self._on_unwatch)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started when the jobs that an earlier boot left are taken up again."""
        async with trio.open_nursery() as self._nursery:
            await self._recover()
            task_status.started()
            await self._waiting.run()

    async def drain(self) -> None:
        """Take no new jobs, give those that wait to another orchestrator, and wait until the live ones have ended."""
        self._draining = True
        for link in self._links.with_role("gateway"):
            self._send(link, Leaving())
        if self._has_others:
            for active in list(self._jobs.values()):
                if active.job.id in self._queue:
                    active.put(HandOver())
        while self._jobs:
            self._idle = trio.Event()
            await self._idle.wait()

    async def hand_over(self) -> None:
        """Give all live jobs away: their gateways bring them elsewhere, and others take up those that have none."""
        self._draining = True
        for active in list(self._jobs.values()):
            active.put(HandOver())
        while self._jobs:
            self._idle = trio.Event()
            await self._idle.wait()

    @property
    def live_ids(self) -> set[str]:
        """The jobs that this orchestrator believes to hold, by what it wrote to the ledger."""
        return {job_id for job_id, active in self._jobs.items() if active.accepted}

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

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Say each tenant's share of the slots while several wait; one that is not there has 1."""
        self._queue.weights = weights

    def waiting(self, job_id: str) -> Waiting | None:
        """Return where a job stands; None for one that does not wait here."""
        return self._waiting.waiting(job_id)

    def outlook(self, job: Job) -> Outlook:
        """Return what would happen to a job that came now; nothing is changed by it."""
        job = self._with_version(job)
        decision = self._roster.choose(job)
        waiting, error = None, None
        try:
            if self._draining:
                raise Draining
            if decision.worker_id is None:
                if not decision.can_wait:
                    raise self._refusal(job, decision)
                self._waiting.check_room(job, decision)
                waiting = self._waiting.prospect(job, self._num_arrivals + 1)
        except TetherError as exc:
            error = exc.to_info()
        return Outlook(job, decision, waiting, error, self._queue.waiting((job.model, job.version)))

    @property
    def jobs(self) -> tuple[ActiveJob, ...]:
        """The jobs that are live here."""
        return tuple(self._jobs.values())

    def get(self, job_id: str) -> ActiveJob | None:
        """Return a job that is live here."""
        return self._jobs.get(job_id)

    # --- the life of a job -------------------------------------------------------------------------------------------

    async def _serve(self, active: ActiveJob) -> None:
        """Run a job from its admission to its end."""
        try:
            entry = None if active.accepted else await self._admit(active)
            if entry is None and active.attempt:
                await self._books.recall(active)
            while active.accepted:
                found = entry or await self._wait_for_slot(active)
                ending = found if isinstance(found, Ending) else await self._attempt(active, found)
                if ending is not None:
                    await self._books.finish(active, ending)
                    return
                entry = None
        except Moved as moved:
            log.info("job %s goes on elsewhere", active.job.id, extra={"job_id": active.job.id})
            active.tell_moved(moved.holder)
        except Exception as exc:  # noqa: BLE001 - logged there; a mistake in here must not take other jobs down
            await self._give_up(active, exc)
        finally:
            self._forget(active)

    async def _admit(self, active: ActiveJob) -> Entry | None:
        """Check the quota, write the job down and reserve a slot for it, all in one transaction.

        Returns the worker whose slot the job has, or None where it has to wait. Raises the refusal. A job that the store
        knows as ended is told its end and stays not accepted.
        """
        job = active.job
        worker_id = await self._find_worker(active)
        entry = self._roster.assign(active, worker_id) if worker_id is not None else None
        admit = partial(
            self._ledger.admit,
            job,
            orchestrator_id=self._links.peer_id,
            orchestrator_boot=self._boot_id,
            worker=self._slot(active, entry) if entry else None,
        )
        # A job that was accepted elsewhere is not refused for want of the store.
        admission = await (self._books.settle(active, admit) if active.is_promised else admit(now=time.time()))
        if admission.duplicate and not await self._books.resume(active, admission):
            return None
        active.accepted = True
        self._books.forget(job.id)  # the same job may come again
        if entry is not None and not admission.reserved:
            self._give_back(active, entry)
            entry = None
        waiting = None if admission.reserved else self._waiting.prospect(job, active.arrival)
        status: JobStatus = "running" if admission.reserved else "queued"
        active.tell(JobAccepted(job.id, status, job.version, admission.limits, waiting))
        if not job.wait:
            active.gateway = None  # its client has its answer, and fetches the result
        if entry is not None:
            active.begin_attempt()
            self._remember_fingerprint(active, entry)
        return entry

    def _slot(self, active: ActiveJob, entry: Entry) -> WorkerSlot:
        model = entry.view.model(active.job)
        return WorkerSlot(*entry.boot, entry.num_slots, model.fingerprint if model is not None else "")

    def _remember_fingerprint(self, active: ActiveJob, entry: Entry) -> None:
        if (model := entry.view.model(active.job)) is not None:
            active.attempts.fingerprint = model.fingerprint

    async def _find_worker(self, active: ActiveJob) -> str | None:
        """Return who is to run a new job, or None, with a place in the queue kept, where somebody may soon.

        Raises the refusal where nobody will. A job that was accepted elsewhere waits, whoever is there.
        """
        self._num_undecided -= 1
        if active.lost != ("", "") and not active.is_promised:
            # Its acceptance may have been written, and never told.
            active.is_promised = await self._books.is_known(active)
        if active.is_promised:
            return self._roster.best(active)
        # Those that run or wait are bounded by slots and places; as many again may be held up by a store that is away.
        num_others = len(self._jobs) - self._num_undecided - 1
        if num_others > 2 * (self._settings.max_queued + self._roster.num_slots):
            raise QueueFull(f"{num_others} jobs are live already, which is all that may; try again soon")
        while (worker_id := self._roster.best(active)) is None:
            decision = self._roster.choose(active.job)
            if not decision.can_wait and trio.current_time() >= self._settles_at:
                raise self._refusal(active.job, decision)
            self._waiting.expect(active.job, decision)
            if decision.can_wait:
                return None
            with trio.move_on_at(min(self._settles_at, active.deadline)):
                await self._heard.wait()
            if trio.current_time() >= active.deadline:
                raise active.overdue
        self._queue.remove(active.job.id)
        return worker_id

    def _refusal(self, job: Job, decision: Decision) -> TetherError:
        return scheduler.refusal(job, decision, self._roster.views(), self._roster.known_models)

    async def _wait_for_slot(self, active: ActiveJob) -> Entry | Ending:
        """Stand in the queue until a worker has a slot for the job and the store agrees, or the job is stopped."""
        self._stand_in_queue(active)
        while True:
            match await active.next_turn():
                case Stop() as stop:
                    self._queue.remove(active.job.id)
                    self._release(active)
                    return Ending.of(stop)
                case HandOver():
                    await self._give_away(active)
                case Assigned():
                    if (entry := await self._reserve(active)) is not None:
                        return entry
                    self._stand_in_queue(active)
                case _:
                    continue  # of an attempt that is over

    def _stand_in_queue(self, active: ActiveJob) -> None:
        self._queue.push(active.job, active.arrival)
        self._waiting.tell(active)
        self._match(active.model_key)

    async def _reserve(self, active: ActiveJob) -> Entry | None:
        """Write the next attempt down; None, with the slot given back, where the store says that the slot is taken.

        Raises `Moved` where the job is not held here any more.
        """
        entry = active.slot
        if entry is None or self._roster.get(entry.link.peer_id) is not entry:
            self._release(active)
            return None
        model = entry.view.model(active.job)
        exact = model is None or active.like == "" or active.attempts.goes_on_exactly(model)
        try:
            reserved = await self._ledger.reserve(
                active.job.id,
                active.attempt + 1,
                orchestrator_id=self._links.peer_id,
                orchestrator_boot=self._boot_id,
                worker=self._slot(active, entry),
                exact=active.exact and exact,
                now=time.time(),
            )
            if not reserved:
                await self._books.catch_up(active)
        except StoreUnavailable as exc:
            log.warning("job %s waits for the store: %s", active.job.id, exc.message, extra={"job_id": active.job.id})
            reserved = False
        if not reserved:
            self._give_back(active, entry)
            return None
        active.begin_attempt()
        active.exact = active.exact and exact
        self._remember_fingerprint(active, entry)
        return entry

    async def _attempt(self, active: ActiveJob, entry: Entry) -> Ending | None:
        """Run one attempt; return how the job ends, or None when another attempt is due.

        Between the release of the slot and the write that says so to the store nothing waits, so the next job's
        reservation of the same slot comes after it in the ledger's order.
        """
        turn: EndOfAttempt = Busy()
        self._waiting.begin(active)
        try:
            turn, stop = await self._until_over(active, entry)
            if isinstance(stop, HandOver):
                await self._give_away(active)
            if isinstance(turn, Busy) or (isinstance(turn, Ended) and is_handed_over(turn.end.error)):
                self._mark_busy(entry)  # before its slot goes to the next job
        finally:
            self._waiting.end(active, counts=isinstance(turn, Ended))
            self._release(active)
        active.count_attempt(turn.end.usage if isinstance(turn, Ended) else None)
        match turn:
            case Ended(end) if end.error is None and end.finish_reason in {"stop", "length"}:
                self._roster.mark_taken(entry)
                return Ending("completed", end.finish_reason, choices=end.choices)  # perhaps before it could be stopped
            case _ if isinstance(stop, Stop):
                return Ending.of(stop)
            case Ended(end) if end.error is not None and not end.retry:
                return Ending.failed(end.error)
            case Ended(end) if is_handed_over(end.error) and end.retry:
                await self._books.requeue(active, status="lost", error_code=HANDED_OVER)
                return None
            case Displaced():
                await self._books.requeue(active, status="lost", error_code=HANDED_OVER)
                return None
            case Ended(end):
                error = end.error or WorkerFailed(f"worker {entry.link.name} broke the answer off").to_info()
                return await self._retry(active, entry, "failed", error)
            case Busy():
                await self._books.requeue(active, status="busy")
                return None
            case Lost(reason, is_down):
                kind = WorkerLost if is_down else WorkerFailed
                error = kind(f"worker {entry.link.name} was lost: {reason}").to_info()
                return await self._retry(active, entry, "lost", error)

    async def _until_over(self, active: ActiveJob, entry: Entry) -> tuple[EndOfAttempt, Stop | HandOver | None]:
        """Start an attempt and wait for its end; where the job is stopped, stop it and wait shortly for what it spent."""
        job, link = active.job, entry.link
        if active.is_stopped or trio.current_time() >= active.deadline:
            # Its worker has never heard of the attempt, so there is nobody to tell and nothing to wait for.
            return Lost("it was not started"), await active.stop()
        try:
            text = "" if job.form == "embedding" else active.text  # who makes vectors needs only their number
            link.send(InferStart(job, active.attempt, active.answers.emitted, text))
        except ProtocolViolation as exc:  # a frame cannot hold the prompt and the answer so far; no worker can help
            error = InvalidRequest(f"the job is too long to be sent: {exc.message}").to_info()
            return Ended(InferEnd(job.id, active.attempt, "error", Usage(), error)), None
        except LinkError as exc:
            return Lost(exc.message), None
        model = entry.view.model(job)
        weights = (model.revision, model.dtype) if model is not None else ("", "")
        active.start = JobStarted(job.id, active.attempt, link.peer_id, link.name, *weights)
        active.tell(active.start)
        turn = await active.end_of_attempt()
        if isinstance(turn, Displaced | Stop | HandOver):
            self._send(link, InferCancel(job.id, active.attempt))
        if isinstance(turn, HandOver):
            return Displaced(), turn  # what it told is known; its gateway need not wait for more
        if not isinstance(turn, Stop):
            return turn, None
        with trio.move_on_after(CANCEL_SECONDS):
            end = await active.end_of_attempt()
            if not isinstance(end, Stop | HandOver):
                return end, turn
        return Lost("it did not answer when it was told to stop"), turn

    async def _retry(
        self, active: ActiveJob, entry: Entry, status: Literal["failed", "lost"], error: ErrorInfo
    ) -> Ending | None:
        """Count a failed attempt against its worker; return the job's end when that was the last one it may have."""
        job_id = active.job.id
        log.warning(
            "job %s: attempt %d on %s %s: %s",
            job_id,
            active.attempt,
            entry.link.name,
            status,
            error.message,
            extra={"job_id": job_id},
        )
        self._roster.mark_failed(entry)
        active.tried |= {entry.boot}
        active.attempts.fail(active.attempt, entry.boot, error.code)
        verdict = active.attempts.verdict(
            error, max_failures=self._settings.max_attempts, max_down=self._settings.max_lost_workers
        )
        if verdict is not None:
            return Ending.failed(verdict.to_info())
        await self._books.requeue(active, status=status, error_code=error.code)
        return None

    async def _give_away(self, active: ActiveJob) -> None:
        """Let whoever comes first have the job, and raise `Moved`."""
        self._queue.remove(active.job.id)
        self._release(active)
        await self._books.release(active)
        raise Moved

    async def _give_up(self, active: ActiveJob, exc: Exception) -> None:
        """Tell a refusal; and where a mistake broke the job's story, write and tell an end all the same."""
        if active.accepted:
            log.error("job %s: internal error", active.job.id, exc_info=exc, extra={"job_id": active.job.id})
            ending = Ending.failed(InternalError().to_info())
            try:
                await self._books.finish(active, ending)
            except Moved as moved:
                active.tell_moved(moved.holder)
            except Exception:
                # It stays live in the ledger, until what that has is compared with what is live here.
                log.exception("job %s: its end is not written", active.job.id, extra={"job_id": active.job.id})
                self._books.remember(active, ending)
                active.tell_end(ending)
            return
        if not isinstance(exc, TetherError):
            log.error("job %s: not admitted", active.job.id, exc_info=exc, extra={"job_id": active.job.id})
        ending = Ending.failed((exc if isinstance(exc, TetherError) else InternalError()).to_info())
        active.tell_end(ending)
        active.gateway = None
        if isinstance(exc, StoreUnavailable) or not isinstance(exc, TetherError):
            self._books.remember(active, ending)
            self._release(active)
            try:
                await self._books.void(active, ending)
            except Exception:
                log.exception("job %s: its admission is not taken back", active.job.id, extra={"job_id": active.job.id})
            active.tell_end(ending)  # to a gateway that came back to it meanwhile

    async def _recover(self) -> None:
        """Take up the jobs that an earlier boot of this orchestrator left: their attempts are void, they wait again."""
        me, now = self._links.peer_id, time.time()
        store = self._ledger.store
        await self._ledger.adopt(orchestrator_id=me, orchestrator_boot=self._boot_id, now=now)
        for record in await self._ledger.read(store.live_jobs, me):
            log.info("job %s is taken up again", record.id, extra={"job_id": record.id})
            self.take_up(record, now)
        self._roster.remember_models(model.name for model in await self._ledger.read(store.models))

    def take_up(self, record: JobRecord, now: float) -> None:
        """Go on with a job that the ledger has as held here, and that nobody waits for here yet."""
        seconds_left = record.deadline_seconds - max(0.0, now - record.created_at)
        if record.wait:
            # Two machines' clocks are compared: what seems overdue may have time left, as its gateway comes and says.
            seconds_left = max(seconds_left, min(record.deadline_seconds, COME_BACK_SECONDS))
        active = self._new_job(job_of(record), None, seconds_left)
        active.accepted, active.attempt, active.exact = True, record.attempt, record.exact
        if record.wait:
            active.deserted_at = trio.current_time()  # until its gateway brings it again
        self._start(active)

    async def finish_as_told(self, record: JobRecord) -> bool:
        """Write the end that a job's client was told and the ledger may not have; False where none was told."""
        return await self._books.finish_as_told(record)

    def give_up(self, job_id: str) -> None:
        """Stop a job that another orchestrator has taken over, as the ledger says."""
        if (active := self._jobs.get(job_id)) is not None:
            active.put(HandOver())

    def displace(self, worker_id: str) -> None:
        """Let the jobs that run on a worker go on elsewhere."""
        for active in list(self._jobs.values()):
            if active.slot is not None and active.slot.link.peer_id == worker_id:
                active.put(Displaced())

    @property
    def _me(self) -> tuple[str, str]:
        return self._links.peer_id, self._boot_id

    @property
    def _has_others(self) -> bool:
        """Whether other orchestrators are there to go on with jobs."""
        return any(link.peer_id != self._links.peer_id for link in self._links.with_role("orchestrator"))

    # --- slots and the queue -----------------------------------------------------------------------------------------

    def _release(self, active: ActiveJob) -> None:
        """Take the job's slot back, for whoever is next."""
        if self._roster.release(active):
            self._match(active.model_key)

    def _give_back(self, active: ActiveJob, entry: Entry) -> None:
        """Take back a slot that turned out to be taken, and leave that worker alone for a moment."""
        self._mark_busy(entry)
        self._release(active)

    def _mark_busy(self, entry: Entry) -> None:
        seconds = self._roster.mark_busy(entry)
        if seconds is not None:
            start_if_open(self._nursery, self._match_later, entry, seconds)

    async def _match_later(self, entry: Entry, seconds: float) -> None:
        await trio.sleep(seconds)
        self._match_all(entry)

    def _match_all(self, entry: Entry) -> None:
        """Give this worker's free slots away."""
        for model in entry.state.models:
            self._match((model.name, model.version))

    def _match(self, model: ModelKey) -> None:
        """Give free slots to the jobs that wait for a model, in the order of their line."""
        for job_id in self._queue.line(model):
            active = self._jobs[job_id]
            worker_id = self._roster.best(active)
            if worker_id is not None:
                self._queue.take(job_id)
                self._roster.assign(active, worker_id)
                active.put(Assigned(worker_id))
            elif not active.tried:  # a job that avoids a worker says nothing of the others' chances
                return

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _new_job(self, job: Job, gateway: Link | None, seconds_left: float) -> ActiveJob:
        self._num_arrivals += 1
        deadline = trio.current_time() + seconds_left
        return ActiveJob(job, arrival=self._num_arrivals, deadline=deadline, gateway=gateway)

    def _start(self, active: ActiveJob) -> None:
        self._jobs[active.job.id] = active
        start_if_open(self._nursery, self._serve, active)

    def _forget(self, active: ActiveJob) -> None:
        self._release(active)
        self._waiting.forget(active.job.id)
        del self._jobs[active.job.id]
        active.done.set()
        if not self._jobs:
            self._idle.set()

    # --- from gateways -----------------------------------------------------------------------------------------------

    def _on_submit(self, link: Link, submit: Submit) -> None:
        if (active := self._jobs.get(submit.job.id)) is not None:
            self._attach(active, link, submit)
            return
        job = self._with_version(submit.job)
        seconds_left = job.deadline_seconds if submit.seconds_left is None else submit.seconds_left
        active = self._new_job(job, link, seconds_left)
        active.adopt(submit.emitted, submit.texts)
        active.lost, active.is_promised = (submit.lost_id, submit.lost_boot), submit.accepted
        if self._draining and self._has_others:
            self._send(link, JobMoved(job.id))
        else:
            self._take_on(active)

    def submit(self, job: Job) -> ActiveJob:
        """Run a job that this node itself brings: `done` says when, and `end` how it has ended or was refused.

        Without an `end` it goes on at another orchestrator. A job with the same id that is live here already is returned as
        it is.
        """
        if (active := self._jobs.get(job.id)) is None:
            active = self._new_job(self._with_version(job), None, job.deadline_seconds)
            self._take_on(active)
        return active

    def _take_on(self, active: ActiveJob) -> None:
        """Start a new job, unless this orchestrator takes none now.

        While the store is away its own renewals and house-keeping find out when it is back; no client waits for that.
        """
        if self._draining:
            active.refuse(Draining())
        elif self._ledger.failure is not None and active.lost == ("", ""):
            active.refuse(from_info(self._ledger.failure))
        else:
            self._num_undecided += 1
            self._start(active)

    def _with_version(self, job: Job) -> Job:
        """Return a job with the newest version that is served, where its client leaves the choice to the network."""
        if job.version:
            return job
        newest = scheduler.newest_version(job.model, self._roster.states)
        return msgspec.structs.replace(job, version=newest or "")

    def _attach(self, active: ActiveJob, link: Link, submit: Submit) -> None:
        """Go on with a job that is live here for a gateway that lost its link, from what its client has seen."""
        job = active.job
        if submit.job.tenant_id != job.tenant_id:
            error = JobConflict("another job has this id").to_info()
            self._send(link, JobEnd(job.id, "failed", 0, "error", Usage(), error))
            return
        active.attach(link, submit.seconds_left)
        active.adopt(submit.emitted, submit.texts)
        if not active.accepted:
            return  # its admission, under way, goes on for this gateway
        if not job.wait:
            active.gateway = None
            self._send(link, active.acceptance)
            return
        seen = tuple((len(ids), len(text)) for ids, text in zip(submit.emitted, submit.texts, strict=False))
        active.watch(link, seen)
        self._waiting.tell(active)

    def _on_watch(self, link: Link, watch: Watch) -> None:
        active = self._jobs.get(watch.job_id)
        if active is None or not active.accepted:
            self._send(link, NotLive(watch.job_id))
            return
        active.watch(link, watch.seen)
        self._waiting.tell(active)

    def _on_unwatch(self, link: Link, unwatch: Unwatch) -> None:
        if (active := self._jobs.get(unwatch.job_id)) is not None:
            active.forget_link(link)

    def cancel(self, active: ActiveJob, reason: str) -> None:
        """End a live job as cancelled; `active.done` says when its end is written."""
        active.put(Stop("cancelled", JobCancelled(f"the job was cancelled: {reason}").to_info()))

    # --- from workers ------------------------------------------------------------------------------------------------

    def _on_presence(self, link: Link, presence: Presence) -> None:
        self._roster.hear(link, presence)
        self._heard.set()
        self._heard = trio.Event()
        if (entry := self._roster.get(link.peer_id)) is not None:
            self._match_all(entry)

    def _on_tokens(self, link: Link, tokens: InferTokens) -> None:
        active = self._current(link, tokens.job_id, tokens.attempt)
        if active is None:
            return
        if not active.is_next(tokens):
            # A worker that skips or repeats tokens is wrong about this answer: it goes on elsewhere from what is sure.
            log.error("worker %s sent tokens out of turn, from %d on", link.name, tokens.position)
            self._break_off(active, link, "it skipped or repeated tokens")
        elif says_too_much(active.job, active.answers.choices[tokens.choice], tokens):
            log.error("worker %s answers more than it was asked for", link.name, extra={"job_id": tokens.job_id})
            self._break_off(active, link, "it said more than was asked")
        elif (new := active.add(tokens)) is not None:
            active.tell(new)

    def _break_off(self, active: ActiveJob, link: Link, reason: str) -> None:
        active.put(Lost(reason))
        self._send(link, InferCancel(active.job.id, active.attempt))

    def _on_infer_end(self, link: Link, end: InferEnd) -> None:
        if (active := self._current(link, end.job_id, end.attempt)) is None:
            return
        usage = plausible_usage(active.job, end.usage)
        if usage != end.usage:
            log.error("worker %s says that a job took %s", link.name, end.usage, extra={"job_id": end.job_id})
            end = msgspec.structs.replace(end, usage=usage)
        active.put(Ended(end))

    def _on_busy(self, link: Link, busy: InferBusy) -> None:
        if (active := self._current(link, busy.job_id, busy.attempt)) is not None:
            active.put(Busy())

    def _current(self, link: Link, job_id: str, attempt: int) -> ActiveJob | None:
        """Return the job whose newest attempt this is, on this very link, and not over; None for whatever is late."""
        active = self._jobs.get(job_id)
        if active is None or active.attempt != attempt or not active.is_attempt_open:
            return None
        return active if active.slot is not None and active.slot.link is link else None

    # --- links -------------------------------------------------------------------------------------------------------

    def _on_up(self, link: Link) -> None:
        if self._draining and "gateway" in link.roles:
            self._send(link, Leaving())  # else it would bring its jobs here again and again

    def _on_down(self, link: Link, reason: str) -> None:
        if self._roster.remove(link) is not None:
            log.info("worker %s is gone: %s", link.name, reason)
        for active in list(self._jobs.values()):
            active.lose_link(link)
            if active.slot is not None and active.slot.link is link:
                active.put(Lost(reason, is_down=True))

    def _send(self, link: Link, message: InferCancel | JobAccepted | JobEnd | JobMoved | Leaving | NotLive) -> None:
        """Send what needs no answer; a link that has gone needs it no more."""
        try:
            link.send(message)
        except LinkError as exc:
            log.debug("not sent to %s: %s", link.name, exc.message)
