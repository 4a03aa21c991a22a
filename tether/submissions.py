"""The gateway's side of a job: submit it to an orchestrator and follow it to its end.

Runs on trio, beside the links; the HTTP side reaches it through the bridge. A job outlives the link that carried it: when
the orchestrator is lost, or leaves, the same job, with the tokens so far, goes at once to another one (where there is none,
to whichever comes up first), and what the client has seen already is dropped, so that it sees each token once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from tether.batch_messages import Batches, BatchQuestion, Files
from tether.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    ErrorInfo,
    InternalError,
    JobConflict,
    LinkClosed,
    LinkError,
    LinkFull,
    NoOrchestrator,
    ProtocolViolation,
    TetherError,
    Unavailable,
    from_info,
)
from tether.following import Following, Outlet, Reader
from tether.link import Link
from tether.links import Links
from tether.messages import (
    Authenticate,
    Authenticated,
    Cancel,
    CancelJob,
    ClaimKey,
    Explain,
    Explained,
    ForgetJob,
    GetHealth,
    GetJob,
    GetModels,
    Health,
    JobAccepted,
    JobEnd,
    JobEvent,
    JobMoved,
    JobQueued,
    Jobs,
    JobStarted,
    JobTokens,
    KeyClaimed,
    Leaving,
    LinkMessage,
    ListJobs,
    Models,
    NotLive,
    Submit,
    Unwatch,
    Watch,
)
from tether.records import LIVE, Actor, Explanation, Job, JobRecord, JobStatus, ServedModel
from tether.retelling import end_of, story_of

log = logging.getLogger(__name__)

R = TypeVar("R", Health, Jobs, KeyClaimed, Models, Authenticated, Files, Batches, Explained)
A = TypeVar("A", Files, Batches)

ORCHESTRATOR_WAIT_SECONDS = 1.0
"""How long a new job waits for an orchestrator before it is refused."""
FAILOVER_WAIT_SECONDS = 15.0
"""How long a job that lost its orchestrator waits for one; longer than a lease, which its next holder may wait for."""
OVERDUE_SECONDS = 0.5
"""How often it is looked for such jobs."""
MAX_LEFT = 1000
"""Jobs to be cancelled when an orchestrator is back; further ones run to their end."""
ASK_SECONDS = 25.0
"""How long an orchestrator may take to answer: longer than its store may (a write may wait for the one before it, and
each has the store's deadline), so that the client is told that the store is away, and not that nobody answered."""
PLACE_SECONDS = 2.0
"""How long the orchestrator of a job that waits may take to say its place; else it is left out."""
NOT_LIVE_PAUSE_SECONDS = 0.2
"""Between two looks for a job that is live in the ledger and at no orchestrator, which is starting perhaps."""
CLIENT_GONE = "client gone"
"""The reason of a job that is cancelled because nobody waits for it any more."""


class Submissions:
    """All jobs that this gateway follows."""

    def __init__(self, links: Links, *, load: Callable[[str], int] = lambda _: 0) -> None:
        """`load` tells how many jobs an orchestrator has, by its peer id, as far as anybody knows."""
        self._links = links
        self._load = load
        self._following: dict[str, Following] = {}
        self._left: dict[str, tuple[str, float]] = {}  # by job: who has it, and until when it would be told
        self._leaving: set[Link] = set()
        self._came_up = trio.Event()
        self._next = 0
        links.on(JobAccepted, self._on_event)
        links.on(JobQueued, self._on_event)
        links.on(JobStarted, self._on_event)
        links.on(JobTokens, self._on_event)
        links.on(JobEnd, self._on_event)
        links.on(NotLive, self._on_not_live)
        links.on(JobMoved, self._on_moved)
        links.on(Leaving, self._on_leaving)
        links.on_up(self._on_up)
        links.on_down(self._on_down)

    async def run(self) -> None:
        """Look again and again for jobs whose end does not come, until cancelled.

        One timer for all: one for each token that somebody waits for costs as much as the token itself.
        """
        while True:
            await trio.sleep(OVERDUE_SECONDS)
            for following in self._following.values():
                if following.is_overdue:
                    following.wake()

    @property
    def num_following(self) -> int:
        """How many jobs have a client here that waits."""
        return len(self._following)

    async def follow(self, outlet: Outlet, job: Job, stays: bool = False) -> None:
        """Submit the job and put its events out as they come; return when the last one, its `JobEnd`, is out.

        Cancelled before that, it cancels the job, unless it `stays`: then its client may come back for it, and the same
        job may also be followed twice. Raises `NoOrchestrator` when nobody takes it, and `DeadlineExceeded` when its end does
        not come.
        """
        following = self._following.get(job.id) if stays else None
        await self._read(following or self._follow(job), outlet, stays=stays)

    async def watch(self, outlet: Outlet, job_id: str, tenant_id: str | None) -> None:
        """Put a job's events out from its beginning, wherever it was submitted; return when its `JobEnd` is out.

        Of a job that has ended there are its whole text and its end. Cancelled, it changes nothing for the job.
        Raises `JobNotFound`, and `NoOrchestrator` when nobody goes on with the job for too long.
        """
        record = await self.job(job_id, tenant_id)
        if record.status not in LIVE:
            outlet.put(story_of(record))
            return
        following = self._following.get(job_id)
        if following is None:
            following = Following(job_id, None, record.sampling.n, record.deadline_seconds)
            self._following[job_id] = following
        await self._read(following, outlet, stays=True)

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:
        """Give a client's idempotency key to a job; return whose it is. Raises `JobConflict` for another fingerprint."""
        claimed = await self._ask_one(
            lambda request_id: ClaimKey(request_id, tenant_id, key, fingerprint, job_id), KeyClaimed
        )
        if claimed.error is not None:
            raise from_info(claimed.error)
        return claimed

    async def models(self) -> list[ServedModel]:
        """Return the models that can be served now; raise `NoOrchestrator` when nobody can say."""
        return list((await self._ask_one(GetModels, Models)).models)

    async def _read(self, following: Following, outlet: Outlet, *, stays: bool) -> None:
        """Put out what has arrived and what comes, to the end; see meanwhile that some orchestrator tells of it."""
        reader = Reader(following, outlet)
        following.readers.append(reader)
        why = CLIENT_GONE
        try:
            while not reader.is_done:
                await self._go_on(following)
        except trio.Cancelled as exc:
            if exc.source == "explicit" and exc.reason:  # as the bridge was told it
                why = exc.reason
            raise
        finally:
            self._close(following, reader, stays=stays, why=why)

    def _close(self, following: Following, reader: Reader, *, stays: bool, why: str) -> None:
        following.readers.remove(reader)
        if following.is_unread:
            self._following.pop(following.job_id, None)
        if following.ended:
            return
        if not stays:
            self._leave(following, why)
        elif following.is_unread and following.link is not None:
            self._tell(following.link, Unwatch(following.job_id))

    async def _go_on(self, following: Following) -> None:
        """Wait for what comes next; see first that some orchestrator tells of the job, unless it has ended."""
        if following.link is not None or following.ended:
            await following.wait()
            return
        async with following.connecting:
            if following.link is None and not following.ended:
                await self._connect(following)

    async def _connect(self, following: Following) -> None:
        """Bring the job to an orchestrator, or ask the one that has it to tell of it."""
        if following.job is None:
            await self._watch(following)
        else:
            self._submit(following, await self._orchestrator_for(following))

    async def _watch(self, following: Following) -> None:
        """Ask whoever holds a job to tell of it; take its end from the ledger where it has one."""
        if following.away_until is None:
            following.away_until = trio.current_time() + FAILOVER_WAIT_SECONDS
        else:
            await trio.sleep(NOT_LIVE_PAUSE_SECONDS)  # it was not live there: its next holder is on its way
        while True:
            record = await self._record(following)
            if record is not None and record.status not in LIVE:
                following.end_with(end_of(record))
                return
            link = self._links.get(record.orchestrator_id or "") if record is not None else None
            if link is not None:
                following.link = link
                try:
                    link.send(Watch(following.job_id, following.answers.seen))
                except LinkError as exc:
                    following.link = None
                    raise NoOrchestrator(f"the orchestrator cannot hear: {exc.message}") from exc
                return
            if trio.current_time() > following.away_until:
                raise NoOrchestrator(f"job {following.job_id} goes on, and its orchestrator is away; try again")
            await trio.sleep(NOT_LIVE_PAUSE_SECONDS)

    async def _record(self, following: Following) -> JobRecord | None:
        """Return a job's record; None where nobody can say now."""
        try:
            return await self.job(following.job_id, None)
        except Unavailable as exc:
            log.debug("job %s is not found now: %s", following.job_id, exc.message)
            return None

    async def _orchestrator_for(self, following: Following) -> Link:
        """Return a link for a job, for which nobody waits longer than the job may take."""
        with trio.move_on_at(following.deadline):
            if following.lost == ("", ""):
                return await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
            log.info("job %s lost its orchestrator", following.job_id, extra={"job_id": following.job_id})
            return await self._next_orchestrator(following.lost)
        raise DeadlineExceeded(f"job {following.job_id} was not done in its time, and its orchestrator is away")

    async def submit(self, job: Job) -> JobAccepted:
        """Submit a job that nobody waits for; return its acceptance once it is in the ledger.

        The same job may come twice: by one idempotency key at the same moment. Raises the refusal when it is not taken.
        """
        following = self._following.get(job.id) or self._follow(job)
        following.num_awaiting_acceptance += 1
        try:
            with trio.fail_after(ASK_SECONDS):
                while not following.history:
                    await self._go_on(following)
            match following.history[0]:
                case JobEnd(error=ErrorInfo() as error):
                    raise from_info(error)
                case JobAccepted() as accepted:
                    return accepted
                case JobEnd(status=status):
                    return JobAccepted(job.id, status)
                case event:
                    raise ProtocolViolation(f"an orchestrator began with {type(event).__name__}")
        except trio.TooSlowError as exc:
            raise DeadlineExceeded(
                f"no orchestrator answered in time; look for job {job.id} before you repeat it"
            ) from exc
        except NoOrchestrator as exc:
            if following.orchestrator_id is None:
                raise
            raise NoOrchestrator(f"the orchestrator was lost; look for job {job.id} before you repeat it") from exc
        finally:
            following.num_awaiting_acceptance -= 1
            if following.is_unread:
                del self._following[job.id]
            elif not following.num_awaiting_acceptance and not following.ended:
                following.read_on()

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record; raise `JobNotFound`."""
        record = (await self._ask(lambda request_id: GetJob(request_id, job_id, tenant_id)))[0]
        return await self.with_place(record)

    async def with_place(self, record: JobRecord) -> JobRecord:
        """Return a job, with its place where it waits and the orchestrator that holds it, and alone knows, says it."""
        holder = self._links.get(record.orchestrator_id) if record.orchestrator_id is not None else None
        if record.status != "queued" or record.waiting is not None or holder is None:
            return record
        try:
            ask = partial(GetJob, job_id=record.id, tenant_id=record.tenant_id)
            reply = await self._links.ask(holder, ask, Jobs, timeout_seconds=PLACE_SECONDS)
        except TetherError as exc:
            log.debug("job %s: nobody says its place: %s", record.id, exc.message)
            return record
        return reply.jobs[0] if reply.jobs else record

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first."""
        return await self._ask(lambda request_id: ListJobs(request_id, tenant_id, status, model, before, limit))

    async def cancel(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """End a job; return its record after its end. Raises `JobNotFound`, or `JobConflict` when it had ended."""
        following = self._following.get(job_id)
        holder = following.link if following is not None else None
        if holder is None and len(self._links.with_role("orchestrator")) > 1:
            holder = self._links.get((await self.job(job_id, tenant_id)).orchestrator_id or "")
        return (await self._ask(lambda request_id: CancelJob(request_id, job_id, tenant_id, by), holder))[0]

    async def forget(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """Drop what is kept of a job that has ended; return its record then.

        Raises `JobNotFound`, or `JobConflict` where it has not ended.
        """
        return (await self._ask(lambda request_id: ForgetJob(request_id, job_id, tenant_id, by)))[0]

    async def health(self) -> Health:
        """Ask an orchestrator whether jobs can be served; raise `NoOrchestrator` when there is none."""
        return await self._ask_one(GetHealth, Health)

    async def explain(self, job: Job, *, sees_all: bool = False) -> Explanation:
        """Ask the orchestrator to which a job would go what would happen to it; raise what keeps it from being said."""
        answer = await self._ask_one(lambda request_id: Explain(request_id, job, sees_all), Explained)
        if answer.explanation is None:
            raise from_info(answer.error) if answer.error is not None else InternalError
        return answer.explanation

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Ask whom an API key stands for, by its digest, and whether keys are needed; raise what keeps it from being said."""
        answer = await self._ask_one(lambda request_id: Authenticate(request_id, key_digest), Authenticated)
        if answer.error is not None:
            raise from_info(answer.error)
        return answer

    async def _ask(self, make_message: Callable[[int], LinkMessage], link: Link | None = None) -> list[JobRecord]:
        reply = await self._ask_one(make_message, Jobs, link)
        if reply.error is not None:
            raise from_info(reply.error)
        return list(reply.jobs)

    async def ask(self, make_question: Callable[[int], BatchQuestion], reply_type: type[A]) -> A:
        """Ask an orchestrator about files or batches, by a question with the request id that it is given.

        Raises what it says is wrong, and `NoOrchestrator` when nobody can say.
        """
        reply = await self._ask_one(make_question, reply_type)
        if reply.error is not None:
            raise from_info(reply.error)
        return reply

    async def _ask_one(
        self, make_message: Callable[[int], LinkMessage], reply_type: type[R], link: Link | None = None
    ) -> R:
        """Ask the orchestrator at the end of a link, or any; raise `NoOrchestrator` when it does not answer."""
        link = link or await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
        try:
            return await self._links.ask(link, make_message, reply_type, timeout_seconds=ASK_SECONDS)
        except LinkClosed as exc:
            raise NoOrchestrator("the orchestrator was lost before it answered; try again") from exc
        except LinkFull as exc:
            raise NoOrchestrator(f"the orchestrator cannot hear: {exc.message}") from exc

    def _follow(self, job: Job) -> Following:
        if job.id in self._following:
            raise JobConflict(f"job {job.id} has a client here already")
        following = self._following[job.id] = Following(job.id, job, job.sampling.n, job.deadline_seconds)
        return following

    def _submit(self, following: Following, link: Link) -> None:
        """Bring the job to an orchestrator, with what its client has seen already."""
        following.link = link
        if following.job is None:
            raise ValueError("a job that is only watched cannot be submitted")
        answers, lost = following.answers, following.lost
        submit = Submit(following.job, answers.emitted, answers.texts)
        if lost != ("", ""):
            submit = Submit(
                following.job, answers.emitted, answers.texts, *lost, following.seconds_left, following.accepted
            )
        try:
            link.send(submit)
        except LinkFull as exc:
            following.link = None
            raise NoOrchestrator(f"the orchestrator cannot hear: {exc.message}") from exc
        except ProtocolViolation as exc:
            following.link = None
            raise BodyTooLarge(f"the job does not fit into a message: {exc.message}") from exc
        following.orchestrator_id = link.peer_id

    async def _next_orchestrator(self, lost: tuple[str, str]) -> Link:
        """Return a link for a job whose orchestrator is lost: to the one that is said to have it, or any that stays."""
        with trio.move_on_after(FAILOVER_WAIT_SECONDS):
            while True:
                said = self._links.get(lost[0])
                if said is not None and said.boot_id == lost[1] and said not in self._leaving:
                    return said
                if links := self._staying:
                    return self._choose(links)
                await self._came_up.wait()
        raise NoOrchestrator

    async def _orchestrator(self, patience_seconds: float) -> Link:
        """Return a link to the orchestrator with the least to do, equals in turn; wait for one if there is none."""
        with trio.move_on_after(patience_seconds):
            while True:
                if links := self._staying or self._links.with_role("orchestrator"):
                    return self._choose(links)
                await self._came_up.wait()
        raise NoOrchestrator

    @property
    def _staying(self) -> list[Link]:
        """The links to the orchestrators that take jobs."""
        return [link for link in self._links.with_role("orchestrator") if link not in self._leaving]

    def _choose(self, links: Sequence[Link]) -> Link:
        self._next += 1
        turn = self._next % len(links)
        return min([*links[turn:], *links[:turn]], key=lambda link: self._load(link.peer_id))

    def _on_event(self, link: Link, event: JobEvent) -> None:
        following = self._following.get(event.job_id)
        if following is not None:
            following.hear(link, event)

    def _on_not_live(self, link: Link, message: NotLive) -> None:
        following = self._following.get(message.job_id)
        if following is not None and following.link is link and following.job is None:
            following.lose()

    def _on_moved(self, link: Link, moved: JobMoved) -> None:
        following = self._following.get(moved.job_id)
        if following is None or following.link is not link or following.ended:
            return
        following.lose()
        if moved.orchestrator_id:
            following.lost = moved.orchestrator_id, moved.boot_id

    def _on_leaving(self, link: Link, _leaving: Leaving) -> None:
        self._leaving.add(link)

    def _on_up(self, link: Link) -> None:
        if "orchestrator" in link.roles:
            self._came_up.set()
            self._came_up = trio.Event()
            self._cancel_left(link)

    def _cancel_left(self, link: Link) -> None:
        """Tell an orchestrator that is back, once, whose clients have gone."""
        for job_id in self._left_at(link):
            self._cancel(link, job_id)
        self._left = {left: each for left, each in self._left.items() if each[0] != link.peer_id}

    def _on_down(self, link: Link, _reason: str) -> None:
        self._leaving.discard(link)
        for following in self._following.values():
            if following.link is link:
                following.lose()
        for job_id in self._left_at(link):  # whether it has heard of that is not known
            self._cancel_when_back(job_id, link.peer_id)

    def _left_at(self, link: Link) -> list[str]:
        """Return the jobs whose clients left lately, and that whoever is at this link had."""
        now = trio.current_time()
        return [job_id for job_id, (peer_id, until) in self._left.items() if peer_id == link.peer_id and until > now]

    def _leave(self, following: Following, why: str = CLIENT_GONE) -> None:
        """Cancel a job whose client has gone; while its orchestrator is lost, when it is back."""
        job_id, orchestrator_id = following.job_id, following.orchestrator_id
        if orchestrator_id is None:
            return  # nobody has heard of it
        if following.link is None:
            self._cancel_when_back(job_id, orchestrator_id, why)
            return
        self._cancel(following.link, job_id, why)
        # Perhaps into the void: a link that is dead falls silent only later.
        self._remember(job_id, orchestrator_id, 2 * self._links.settings.silence_seconds)

    def _cancel_when_back(self, job_id: str, orchestrator_id: str, why: str = CLIENT_GONE) -> None:
        for link in self._staying:
            # So that nobody goes on with it, should the lost one stay away; one of them may have it already.
            self._cancel(link, job_id, why)
        self._remember(job_id, orchestrator_id, FAILOVER_WAIT_SECONDS)

    def _remember(self, job_id: str, orchestrator_id: str, seconds: float) -> None:
        """Remember for a while that a job's client has left, unless too many have."""
        now = trio.current_time()
        self._left = {left: each for left, each in self._left.items() if each[1] > now}
        if len(self._left) < MAX_LEFT or job_id in self._left:
            self._left[job_id] = (orchestrator_id, now + seconds)

    def _cancel(self, link: Link, job_id: str, why: str = CLIENT_GONE) -> None:
        self._tell(link, Cancel(job_id, why))

    def _tell(self, link: Link, message: Cancel | Unwatch) -> None:
        try:
            link.send(message)
        except LinkError as exc:
            log.debug("job %s: not told to stop: %s", message.job_id, exc.message)
