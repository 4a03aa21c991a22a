"""The gateway's side of a job: submit it to an orchestrator and follow it to its end.

Runs on trio, beside the links; the HTTP side reaches it through the bridge. A job outlives the link that carried it: when
the orchestrator is lost, the same job, with the tokens so far, goes to another one (or to the same, when it is back), and
what the client has seen already is dropped, so that it sees each token once.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable

import trio

from tether.errors import DeadlineExceeded, ErrorInfo, LinkClosed, LinkError, NoOrchestrator, from_info
from tether.links import Link, Links
from tether.messages import (
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

ORCHESTRATOR_WAIT_SECONDS = 1.0
"""How long a new job waits for an orchestrator before it is refused."""
FAILOVER_WAIT_SECONDS = 15.0
"""How long a job that lost its orchestrator waits for one."""
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
        self.waiting: list[JobEvent] = []
        self.wake = trio.Event()

    def hear(self, link: Link, event: JobEvent) -> None:
        """Take in what the job's orchestrator tells; from another one it is late."""
        if link is not self.link or self.ended:
            return
        match event:
            case JobTokens():
                if event.position < len(self.token_ids):
                    return  # told before the orchestrator was lost
                self.token_ids += event.token_ids
                self.texts.append(event.text)
            case JobAccepted():
                if self.accepted:
                    return
                self.accepted = True
            case JobEnd():
                self.ended = True
        self.waiting.append(event)
        self.wake.set()

    def lose(self) -> None:
        """The job's orchestrator is lost."""
        self.link = None
        self.wake.set()

    async def take(self) -> list[JobEvent]:
        """Wait until something has arrived, and take all of it; raise `LinkClosed` when the orchestrator is lost."""
        while not self.waiting:
            if self.link is None:
                raise LinkClosed
            self.wake = trio.Event()
            await self.wake.wait()
        events, self.waiting = self.waiting, []
        return events


class Submissions:
    """All jobs that this gateway follows."""

    def __init__(self, links: Links, *, load: Callable[[str], int] = lambda _: 0) -> None:
        """`load` tells how many jobs an orchestrator has, by its peer id, as far as anybody knows."""
        self._links = links
        self._load = load
        self._following: dict[str, Following] = {}
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

        A generator that is closed early cancels the job. Raises `NoOrchestrator` when nobody takes it.
        """
        following = self._following[job.id] = Following(job)
        patience = ORCHESTRATOR_WAIT_SECONDS
        try:
            while not following.ended:
                link = following.link = await self._orchestrator(patience)
                patience = FAILOVER_WAIT_SECONDS
                try:
                    link.send(Submit(job, tuple(following.token_ids), "".join(following.texts)))
                    while not following.ended:
                        yield await following.take()
                except LinkClosed:
                    log.info("job %s lost its orchestrator", job.id, extra={"job_id": job.id})
        finally:
            del self._following[job.id]
            if not following.ended and following.link is not None:
                self._cancel(following.link, job.id)

    async def submit(self, job: Job) -> JobStatus:
        """Submit a job that nobody waits for; return its status once it is in the ledger.

        Raises the refusal when it is not taken.
        """
        following = self._following[job.id] = Following(job)
        try:
            link = following.link = await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
            link.send(Submit(job))
            with trio.fail_after(ASK_SECONDS):
                while True:
                    for event in await following.take():
                        match event:
                            case JobAccepted(status=status):
                                return status
                            case JobEnd(error=ErrorInfo() as error):
                                raise from_info(error)
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
        link = await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
        return await self._links.ask(link, GetHealth, Health, timeout_seconds=ASK_SECONDS)

    async def _ask(self, make_message: Callable[[int], LinkMessage]) -> list[JobRecord]:
        link = await self._orchestrator(ORCHESTRATOR_WAIT_SECONDS)
        try:
            reply = await self._links.ask(link, make_message, Jobs, timeout_seconds=ASK_SECONDS)
        except LinkClosed as exc:
            raise NoOrchestrator("the orchestrator was lost before it answered; try again") from exc
        if reply.error is not None:
            raise from_info(reply.error)
        return list(reply.jobs)

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

    def _on_down(self, link: Link, _reason: str) -> None:
        for following in self._following.values():
            if following.link is link:
                following.lose()

    def _cancel(self, link: Link, job_id: str) -> None:
        try:
            link.send(Cancel(job_id))
        except LinkError as exc:
            log.debug("job %s not cancelled: %s", job_id, exc.message)
