"""The gateway's side of a job: submit it to an orchestrator and follow it to its end.

Runs on trio, beside the links; the HTTP side reaches it through the bridge. A job outlives the link that carried it: when
the orchestrator is lost, the same job, with the tokens so far, goes to another one (or to the same, when it is back), and
what the client has seen already is dropped, so that it sees each token once.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

import trio

from tether.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    ErrorInfo,
    JobConflict,
    LinkClosed,
    LinkError,
    LinkFull,
    NoOrchestrator,
    ProtocolViolation,
    from_info,
)
from tether.links import Link, Links
from tether.messages import (
    Authenticate,
    Authenticated,
    Cancel,
    CancelJob,
    GetHealth,
    GetJob,
    Health,
    JobAccepted,
    JobEnd,
    JobEvent,
    JobQueued,
    Jobs,
    JobStarted,
    JobTokens,
    LinkMessage,
    ListJobs,
    Submit,
)
from tether.records import Job, JobRecord, JobStatus

log = logging.getLogger(__name__)

R = TypeVar("R", Health, Jobs, Authenticated)

ORCHESTRATOR_WAIT_SECONDS = 1.0
"""How long a new job waits for an orchestrator before it is refused."""
FAILOVER_WAIT_SECONDS = 15.0
"""How long a job that lost its orchestrator waits for one."""
SAME_WAIT_SECONDS = 5.0
"""How long of that for the same one: it has the job in its memory, or takes it up when it starts again."""
END_SECONDS = 60.0
"""How long after its deadline a job's end may come: its orchestrator may wait for the store to write it down."""
MAX_LEFT = 1000
"""Jobs to be cancelled when an orchestrator is back; further ones run to their end."""
ASK_SECONDS = 10.0


class Following:
    """A job that a client waits for: what has arrived for it and was not taken yet, what it has seen."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.link: Link | None = None
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.accepted = False
        self.ended = False
        """Its end has arrived; it may not have been taken yet."""
        self.waiting: list[JobEvent] = []
        self.give_up_at = trio.current_time() + job.deadline_seconds + END_SECONDS
        self._wake = trio.Event()

    def hear(self, link: Link, event: JobEvent) -> None:
        """Take in what the job's orchestrator tells; from another one it is late."""
        if link is not self.link or self.ended:
            return
        match event:
            case JobTokens(position=position, token_ids=ids) if position != len(self.token_ids):
                if position + len(ids) > len(self.token_ids):
                    log.error("job %s: tokens from %d on, not %d", self.job.id, position, len(self.token_ids))
                    self.lose()  # to be told the rest from where the client is
                return
            case JobTokens():
                self.token_ids += event.token_ids
                self.texts.append(event.text)
            case JobAccepted():
                if self.accepted:
                    return
                self.accepted = True
            case JobEnd():
                self.ended = True
        self.waiting.append(event)
        self._wake.set()

    def lose(self) -> None:
        """The job's orchestrator is lost."""
        self.link = None
        self._wake.set()

    async def take(self) -> list[JobEvent]:
        """Wait until something has arrived, and take all of it.

        Raises `LinkClosed` when the orchestrator is lost, `DeadlineExceeded` when the job's end is long overdue.
        """
        if not self.waiting:
            if self.link is None:
                raise LinkClosed
            self._wake = trio.Event()
            with trio.move_on_at(self.give_up_at):
                await self._wake.wait()
            if not self.waiting:
                if self.link is None:
                    raise LinkClosed
                raise DeadlineExceeded(f"job {self.job.id} has no end yet, though its deadline has passed")
        events, self.waiting = self.waiting, []
        return events


class Submissions:
    """All jobs that this gateway follows."""

    def __init__(self, links: Links, *, load: Callable[[str], int] = lambda _: 0) -> None:
        """`load` tells how many jobs an orchestrator has, by its peer id, as far as anybody knows."""
        self._links = links
        self._load = load
        self._following: dict[str, Following] = {}
        self._left: dict[str, float] = {}
        self._came_up = trio.Event()
        self._next = 0
        links.on(JobAccepted, self._on_event)
        links.on(JobQueued, self._on_event)
        links.on(JobStarted, self._on_event)
        links.on(JobTokens, self._on_event)
        links.on(JobEnd, self._on_event)
        links.on_up(self._on_up)
        links.on_down(self._on_down)

    @property
    def num_following(self) -> int:
        """How many jobs have a client here that waits."""
        return len(self._following)

    async def follow(self, job: Job) -> AsyncGenerator[list[JobEvent], None]:
        """Submit the job and yield its events as they come, all that wait at a time; the last one is its `JobEnd`.

        A generator that is closed early cancels the job. Raises `NoOrchestrator` when nobody takes it, and
        `DeadlineExceeded` when its end does not come.
        """
        following = self._follow(job)
        try:
            link = await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
            while True:
                try:
                    self._submit(following, link)
                    while following.waiting or not following.ended:
                        yield await following.take()
                except LinkClosed:
                    log.info("job %s lost its orchestrator", job.id, extra={"job_id": job.id})
                    link = await self._next_orchestrator(link.peer_id)
                else:
                    return
        finally:
            del self._following[job.id]
            if not following.ended:
                self._leave(job.id, following.link)

    async def submit(self, job: Job) -> JobStatus:
        """Submit a job that nobody waits for; return its status once it is in the ledger.

        Raises the refusal when it is not taken.
        """
        following = self._follow(job)
        try:
            self._submit(following, await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS))
            with trio.fail_after(ASK_SECONDS):
                while True:
                    for event in await following.take():
                        match event:
                            case JobEnd(error=ErrorInfo() as error):
                                raise from_info(error)
                            case JobAccepted(status=status) | JobEnd(status=status):
                                return status
                            case _:
                                continue
        except trio.TooSlowError as exc:
            raise DeadlineExceeded(
                f"no orchestrator answered in time; look for job {job.id} before you repeat it"
            ) from exc
        except LinkClosed as exc:
            raise NoOrchestrator(f"the orchestrator was lost; look for job {job.id} before you repeat it") from exc
        finally:
            del self._following[job.id]

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record; raise `JobNotFound`."""
        return (await self._ask(lambda request_id: GetJob(request_id, job_id, tenant_id)))[0]

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first."""
        return await self._ask(lambda request_id: ListJobs(request_id, tenant_id, status, model, before, limit))

    async def cancel(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """End a job; return its record after its end. Raises `JobNotFound`, or `JobConflict` when it had ended."""
        return (await self._ask(lambda request_id: CancelJob(request_id, job_id, tenant_id)))[0]

    async def health(self) -> Health:
        """Ask an orchestrator whether jobs can be served; raise `NoOrchestrator` when there is none."""
        return await self._ask_one(GetHealth, Health)

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Ask whom an API key stands for, by its digest, and whether keys are needed; raise what keeps it from being said."""
        answer = await self._ask_one(lambda request_id: Authenticate(request_id, key_digest), Authenticated)
        if answer.error is not None:
            raise from_info(answer.error)
        return answer

    async def _ask(self, make_message: Callable[[int], LinkMessage]) -> list[JobRecord]:
        reply = await self._ask_one(make_message, Jobs)
        if reply.error is not None:
            raise from_info(reply.error)
        return list(reply.jobs)

    async def _ask_one(self, make_message: Callable[[int], LinkMessage], reply_type: type[R]) -> R:
        link = await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
        try:
            return await self._links.ask(link, make_message, reply_type, timeout_seconds=ASK_SECONDS)
        except LinkClosed as exc:
            raise NoOrchestrator("the orchestrator was lost before it answered; try again") from exc
        except LinkFull as exc:
            raise NoOrchestrator(f"the orchestrator cannot hear: {exc.message}") from exc

    def _follow(self, job: Job) -> Following:
        if job.id in self._following:
            raise JobConflict(f"job {job.id} has a client here already")
        following = self._following[job.id] = Following(job)
        return following

    def _submit(self, following: Following, link: Link) -> None:
        """Bring the job to an orchestrator, with what its client has seen already."""
        following.link = link
        try:
            link.send(Submit(following.job, tuple(following.token_ids), "".join(following.texts)))
        except LinkFull as exc:
            following.link = None
            raise NoOrchestrator(f"the orchestrator cannot hear: {exc.message}") from exc
        except ProtocolViolation as exc:
            following.link = None
            raise BodyTooLarge(f"the job does not fit into a message: {exc.message}") from exc

    async def _next_orchestrator(self, lost: str) -> Link:
        """Return a link for a job whose orchestrator is lost: the same one's, if it is back soon, or any."""
        with trio.move_on_after(SAME_WAIT_SECONDS):
            while True:
                for link in self._links.with_role("orchestrator"):
                    if link.peer_id == lost:
                        return link
                await self._came_up.wait()
        return await self._orchestrator(FAILOVER_WAIT_SECONDS - SAME_WAIT_SECONDS)

    async def _orchestrator(self, patience_seconds: float) -> Link:
        """Return a link to the orchestrator with the least to do, equals in turn; wait for one if there is none."""
        with trio.move_on_after(patience_seconds):
            while True:
                if links := self._links.with_role("orchestrator"):
                    self._next += 1
                    turn = self._next % len(links)
                    return min([*links[turn:], *links[:turn]], key=lambda link: self._load(link.peer_id))
                await self._came_up.wait()
        raise NoOrchestrator

    def _on_event(self, link: Link, event: JobEvent) -> None:
        following = self._following.get(event.job_id)
        if following is not None:
            following.hear(link, event)

    def _on_up(self, link: Link) -> None:
        if "orchestrator" in link.roles:
            self._came_up.set()
            self._came_up = trio.Event()
            for job_id in self._left:
                self._cancel(link, job_id)

    def _on_down(self, link: Link, _reason: str) -> None:
        for following in self._following.values():
            if following.link is link:
                following.lose()

    def _leave(self, job_id: str, link: Link | None) -> None:
        """Cancel a job whose client has gone; while its orchestrator is lost, tell those that come back."""
        if link is not None:
            self._cancel(link, job_id)
            return
        now = trio.current_time()
        self._left = {left: until for left, until in self._left.items() if until > now}
        if len(self._left) < MAX_LEFT:
            self._left[job_id] = now + FAILOVER_WAIT_SECONDS

    def _cancel(self, link: Link, job_id: str) -> None:
        try:
            link.send(Cancel(job_id))
        except LinkError as exc:
            log.debug("job %s not cancelled: %s", job_id, exc.message)
