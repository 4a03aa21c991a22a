"""A job that somebody at a gateway waits for: what has arrived for it, and those who are told of it.

An event goes to its readers in the same turn in which it arrives: waking a task for each token of each stream costs more
than all else that is done with it. A reader without room misses nothing, since each has a place of its own in what has
arrived; it is told the rest, all at once, when there is room again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import trio

from tether.answers import AnswersSoFar
from tether.errors import DeadlineExceeded
from tether.link import Link
from tether.messages import JobAccepted, JobEnd, JobEvent, JobTokens
from tether.records import Job
from tether.retelling import ending_of

log = logging.getLogger(__name__)

END_SECONDS = 60.0
"""How long after its deadline a job's end may come: its orchestrator may wait for the store to write it down."""


class Outlet(Protocol):
    """Where a reader's events go (`bridge.Outlet`)."""

    room: int
    """How many more it takes now."""
    on_room: Callable[[], None]
    """Called when there is more room."""

    def put(self, items: Sequence[JobEvent]) -> None:
        """Take events; never blocks."""
        ...


class Reader:
    """Somebody who is told of a job, from its beginning on."""

    def __init__(self, following: Following, outlet: Outlet) -> None:
        self._following = following
        self._outlet = outlet
        self._place = 0
        outlet.on_room = self._on_room
        self.tell()

    def tell(self) -> None:
        """Tell what has arrived, as far as there is room."""
        history, place = self._following.history, self._place
        if self._outlet.room > 0 and place < len(history):
            events = history[place : place + self._outlet.room]
            self._place += len(events)
            self._outlet.put(events)

    @property
    def is_done(self) -> bool:
        """Whether the job's end was told."""
        return self._following.ended and self._place == len(self._following.history)

    def _on_room(self) -> None:
        self.tell()
        if self.is_done:
            self._following.wake()


class Following:
    """A job that somebody here waits for, and those who read it."""

    def __init__(self, job_id: str, job: Job | None, num_choices: int, seconds: float) -> None:
        self.job_id = job_id
        self.job = job
        """As it was submitted here; None for a job that is only watched."""
        self.link: Link | None = None
        self.orchestrator_id: str | None = None
        """The orchestrator that it was sent to last; None while it was sent to nobody."""
        self.lost = ("", "")
        """The orchestrator, and its boot, that had it and was lost, or that is said to have it."""
        self.answers = AnswersSoFar(num_choices)
        self.history: list[JobEvent] = []
        self.readers: list[Reader] = []
        self.num_awaiting_acceptance = 0
        """How many wait for its acceptance only; those that read it as well came later."""
        self.accepted = False
        self.ended = False
        self.away_until: float | None = None
        """How long a job that is only watched may have nobody who tells of it; None while somebody does."""
        self.connecting = trio.Lock()
        self.deadline = trio.current_time() + seconds
        self.give_up_at = self.deadline + END_SECONDS
        self._wake = trio.Event()

    def hear(self, link: Link, event: JobEvent) -> None:
        """Take in what the job's orchestrator tells; from another one it is late."""
        if link is not self.link or self.ended:
            return
        self.away_until = None
        if isinstance(event, JobTokens):
            if self._is_new(event):
                self._tell(event)
            return
        if isinstance(event, JobAccepted):
            if self.job is not None and event.version and not self.job.version:
                # Another orchestrator must go on with the same version, whatever is the newest one then.
                self.job = msgspec.structs.replace(self.job, version=event.version)
            if self.accepted:
                return
            self.accepted = True
            if self.job is not None and not self.job.wait:
                self.read_on()  # its orchestrator tells of it to those who ask
        if isinstance(event, JobEnd):
            if self.answers.lacks(event.told):
                self.lose()  # told to whoever followed it here before: the whole answer is in the ledger
            else:
                self.end_with(event)
            return
        self._tell(event)
        self.wake()

    def _is_new(self, tokens: JobTokens) -> bool:
        """Take in tokens that are next; ask for those that are missing."""
        if not self.answers.knows(tokens.choice):
            log.error("job %s: tokens of a choice %d, which it does not have", self.job_id, tokens.choice)
            return False
        known = self.answers.choices[tokens.choice]
        num_known = len(known.token_ids)
        if tokens.position == num_known:
            known.take(tokens)
            return True
        if tokens.position + len(tokens.token_ids) > num_known:
            log.error("job %s: tokens from %d on, not %d", self.job_id, tokens.position, num_known)
            self.lose()  # to be told the rest from where the client is
        return False

    def _tell(self, event: JobEvent) -> None:
        self.history.append(event)
        for reader in self.readers:
            reader.tell()
        if len(self.history) == 1:
            self.wake()

    def lose(self) -> None:
        """The job's orchestrator is lost."""
        if self.link is not None:
            self.lost = self.link.peer_id, self.link.boot_id
        self.link = None
        self.wake()

    @property
    def is_unread(self) -> bool:
        """Whether nobody waits for anything of it."""
        return not self.readers and not self.num_awaiting_acceptance

    def read_on(self) -> None:
        """Let those that read it watch it from here on, where it goes on without them or whoever it was submitted for."""
        self.job, self.link = None, None
        self.wake()

    def end_with(self, end: JobEnd) -> None:
        """The job has ended; what of its answer nobody has told here comes before its end."""
        self.ended = True
        for event in ending_of(end, self.answers):
            self._tell(event)
        self.wake()

    @property
    def seconds_left(self) -> float:
        """Of the job's deadline, by this process's clock."""
        return max(0.0, self.deadline - trio.current_time())

    def wake(self) -> None:
        """Let all that wait look again."""
        self._wake.set()

    async def wait(self) -> None:
        """Wait until it has begun, is accepted, lost or over, or its end is told; further tokens are no news here.

        Raises `DeadlineExceeded` when the job's end is long overdue.
        """
        if self.is_overdue and not self.ended:
            raise DeadlineExceeded(f"job {self.job_id} has no end yet, though its deadline has passed")
        if self._wake.is_set():
            self._wake = trio.Event()
        await self._wake.wait()

    @property
    def is_overdue(self) -> bool:
        """Whether nobody is to wait for its end any more."""
        return trio.current_time() >= self.give_up_at
