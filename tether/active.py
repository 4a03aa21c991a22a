"""A live job at an orchestrator: what is known of it, and the turns that its story can take.

A job's task waits for one thing only, its inbox. Whoever learns something (a frame, a lost link, a free slot, a client
that left) puts a turn in; tokens are no turns, they are passed on as they come.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import trio

from tether.answers import PORTION_CHARS, AnswersSoFar, joined
from tether.attempts import Attempts
from tether.errors import DeadlineExceeded, ErrorInfo, JobConflict, LinkError, LinkFull, TetherError
from tether.link import Link
from tether.messages import (
    InferEnd,
    InferTokens,
    JobAccepted,
    JobEnd,
    JobEvent,
    JobMoved,
    JobStarted,
    JobTokens,
    NotLive,
)
from tether.records import LIVE, FinishReason, Job, JobRecord, JobStatus, Usage

if TYPE_CHECKING:
    from tether.roster import Entry

log = logging.getLogger(__name__)

HOLD_SECONDS = 0.5
"""How long what happens to a job is held back from a gateway whose client sees nothing before the end."""


class Assigned(msgspec.Struct, frozen=True):
    """The queue gave the job a slot on this worker."""

    worker_id: str


class Ended(msgspec.Struct, frozen=True):
    """The worker told the attempt's end."""

    end: InferEnd


class Busy(msgspec.Struct, frozen=True):
    """The worker had no room after all; nothing ran."""


class Lost(msgspec.Struct, frozen=True):
    """The attempt's worker is gone, or is wrong about the answer."""

    reason: str
    is_down: bool = False
    """The worker itself is gone, while it ran the job."""


class Displaced(msgspec.Struct, frozen=True):
    """The attempt's worker is to run no more jobs: this one goes on elsewhere, and nobody is at fault."""


class Stop(msgspec.Struct, frozen=True):
    """Somebody, or the deadline, ends the job."""

    status: JobStatus
    error: ErrorInfo


class HandOver(msgspec.Struct, frozen=True):
    """This orchestrator gives the job away, for another one to go on with it."""


class Moved(Exception):
    """The job is another orchestrator's now, or anybody's; what is known of its holder is told to its gateway."""

    def __init__(self, holder: tuple[str, str] = ("", "")) -> None:
        self.holder = holder
        super().__init__(holder)


EndOfAttempt = Ended | Busy | Lost | Displaced
Turn = Assigned | EndOfAttempt | Stop | HandOver


class Ending(msgspec.Struct, frozen=True):
    """How a job ends."""

    status: JobStatus
    finish_reason: FinishReason
    error: ErrorInfo | None = None
    choices: tuple[FinishReason, ...] = ()

    @classmethod
    def of(cls, stop: Stop) -> Ending:
        """Return the end of a job that was stopped."""
        return cls(stop.status, "cancelled" if stop.status == "cancelled" else "error", stop.error)

    @classmethod
    def failed(cls, error: ErrorInfo) -> Ending:
        """Return the end of a job that failed, or that was refused."""
        return cls("failed", "error", error)


class ActiveJob:
    """A live job; one task runs its story, and everybody else only reads it or puts turns in."""

    def __init__(self, job: Job, *, arrival: int, deadline: float, gateway: Link | None) -> None:
        self.job = job
        self.arrival = arrival
        """Its number in the order of coming: where it stands in the queue, however often it comes back to it."""
        self.deadline = deadline
        """By this process's own clock (`trio.current_time`)."""
        self.gateway = gateway
        """Who hears of it; None while nobody does."""
        self.gateway_id = gateway.peer_id if gateway is not None else None
        """The gateway through which its client waits, also while it has no link; it may cancel the job."""
        self.attempt = 0
        """The number of the newest attempt; 0 before the first."""
        self.slot: Entry | None = None
        """The worker that has given the job a slot; None while it has none."""
        self.accepted = False
        """It is in the ledger."""
        self.lost = ("", "")
        """The orchestrator, and its boot, that the job's gateway has lost: the job may be taken from it."""
        self.is_promised = False
        """Its client was told that it is accepted, before it came here: it is not refused any more."""
        self.attempts = Attempts()
        """What its attempts that are over say of it."""
        self.exact = True
        """Each attempt went on as the one before it would have."""
        self.tried: frozenset[tuple[str, str]] = frozenset()
        """The workers' boots `(worker_id, boot_id)` that failed at it."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        """Spent by all attempts that are over."""
        self.attempt_tokens = 0
        """Spent by the newest attempt."""
        self.answers = AnswersSoFar(job.sampling.n)
        """The answers so far; a gateway that comes back is told what it misses."""
        self.start: JobStarted | None = None
        """What was told of the newest attempt's beginning."""
        self.deserted_at: float | None = None
        """When the last gateway was lost through which its client waits; None where one is there, or nobody waits."""
        self.watchers: dict[str, Link] = {}
        """Further gateways that hear of it, by peer id."""
        self.end: JobEnd | None = None
        """What was told of its end, or of its refusal."""
        self.done = trio.Event()
        self._held: list[JobEvent] = []
        self._held_since = 0.0
        self._num_held_chars = 0
        self._is_attempt_open = False
        self._stopped = False
        self._turns: deque[Turn] = deque()
        self._wake = trio.Event()

    @property
    def token_ids(self) -> list[int]:
        """The first answer's ids so far."""
        return self.answers.choices[0].token_ids

    @property
    def text(self) -> str:
        """The first answer's text so far."""
        return self.answers.choices[0].text

    @property
    def usage(self) -> Usage:
        """Tokens spent on the job."""
        return Usage(self.prompt_tokens, self.completion_tokens)

    @property
    def model_key(self) -> tuple[str, str]:
        """The model and version that it asks for."""
        return self.job.model, self.job.version

    # --- the answer --------------------------------------------------------------------------------------------------

    def adopt(self, emitted: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Take over what a gateway says that its client has seen, where that is more than is known here.

        An attempt that runs goes on, and what it tells counts from the end of this on.
        """
        self.answers.adopt(emitted, texts)

    def add(self, tokens: InferTokens) -> JobTokens | None:
        """Add what an attempt tells to the answer; return what is new of it, or None.

        Only for tokens that are next (`is_next`).
        """
        self.attempt_tokens += len(tokens.token_ids)
        return self.answers.choices[tokens.choice].add(tokens)

    def is_next(self, tokens: InferTokens) -> bool:
        """Whether these tokens follow what the attempt told before."""
        return self.answers.knows(tokens.choice) and self.answers.choices[tokens.choice].is_next(tokens.position)

    def beyond(self, seen: Sequence[tuple[int, int]]) -> Iterator[JobTokens]:
        """Yield what somebody misses who has seen so many tokens and characters of each choice, in portions."""
        return self.answers.beyond(self.job.id, self.attempt, seen)

    # --- telling its gateway -----------------------------------------------------------------------------------------

    def tell(self, event: JobEvent) -> None:
        """Tell the job's gateway, and all that watch; one that cannot hear comes back and is told what it missed.

        Where the client gets its answer in one piece, events are told together: each write costs more than what it says.
        The gateway is never further behind than `HOLD_SECONDS` of tokens, should it have to go on elsewhere.
        """
        if isinstance(event, JobEnd):
            self.end = event
        self._tell_watchers(event)
        if self.gateway is None:
            return
        if self.job.stream or not self.job.wait:
            self._tell_gateway(event)
            return
        now = trio.current_time()
        if not self._held:
            self._held_since = now
        self._held.append(event)
        self._num_held_chars += len(event.text) if isinstance(event, JobTokens) else 0
        too_much = self._num_held_chars >= PORTION_CHARS
        if isinstance(event, JobEnd) or too_much or now - self._held_since >= HOLD_SECONDS:
            self._num_held_chars = 0
            held, self._held = self._held, []
            for each in joined(held):
                self._tell_gateway(each)

    @property
    def is_told_at_once(self) -> bool:
        """Whether anybody sees what happens to it before its end."""
        return bool(self.watchers) or (self.gateway is not None and self.job.stream)

    def attach(self, gateway: Link, seconds_left: float | None = None) -> None:
        """Tell this gateway from now on; one that had the job before goes on to watch it.

        What it says is left of the deadline counts: it has measured that with one clock.
        """
        if seconds_left is not None:
            self.deadline = trio.current_time() + seconds_left
            self._wake.set()
        before, held = self.gateway, self._held
        if before is not None and before is not gateway:
            self.watchers[before.peer_id] = before
            if not all(self._send(before, each) for each in held):
                self.watchers.pop(before.peer_id, None)
        self.watchers.pop(gateway.peer_id, None)
        self.gateway, self.gateway_id = gateway, gateway.peer_id
        self.deserted_at = None
        self._held = []

    def _tell_watchers(self, event: JobEvent | NotLive) -> None:
        for link in list(self.watchers.values()):  # one that is closed is forgotten at once
            if not self._send(link, event):
                self.watchers.pop(link.peer_id, None)

    def _tell_gateway(self, event: JobEvent) -> None:
        if self.gateway is not None and not self._send(self.gateway, event):
            self.gateway = None

    def _send(self, gateway: Link, event: JobEvent | JobMoved | NotLive) -> bool:
        """Return whether the gateway can still hear."""
        try:
            gateway.send(event)
        except LinkFull as exc:
            log.warning("closing the link to gateway %s: %s", gateway.name, exc.message)
            gateway.close("it does not read")
            return False
        except LinkError as exc:
            log.info("gateway %s hears no more of job %s: %s", gateway.name, self.job.id, exc.message)
            return False
        return True

    def watch(self, link: Link, seen: Sequence[tuple[int, int]]) -> None:
        """Tell a further gateway what it misses, and from here on all that comes."""
        if link is not self.gateway:
            self.watchers[link.peer_id] = link
        if self.deserted_at is not None:
            self.gateway_id, self.deserted_at = link.peer_id, None
        events: list[JobEvent] = [self.acceptance]
        if self.start is not None and self.is_attempt_open:
            events.append(self.start)
        for event in [*events, *self.beyond(seen)]:
            if not self._send(link, event):
                self.watchers.pop(link.peer_id, None)
                return

    def forget_link(self, link: Link) -> None:
        """Whoever is at this link hears no more of the job, which goes on."""
        if self.gateway is link:
            self.gateway = None
        if self.watchers.get(link.peer_id) is link:
            del self.watchers[link.peer_id]

    def lose_link(self, link: Link) -> None:
        """The link is down: the job's client may have come back already, through a gateway that watches, or does so later.

        From then on the lost one's word that its client has left counts for nothing: it may have been frozen, and be late.
        """
        self.forget_link(link)
        if self.gateway_id != link.peer_id or self.gateway is not None or not self.job.wait:
            return
        if self.watchers:
            self.gateway_id = next(iter(self.watchers))
        else:
            self.deserted_at = trio.current_time()

    @property
    def acceptance(self) -> JobAccepted:
        """What a gateway is told first of a job that is in the ledger."""
        status: JobStatus = "running" if self.is_attempt_open else "queued"
        return JobAccepted(self.job.id, status, self.job.version)

    def tell_moved(self, holder: tuple[str, str]) -> None:
        """Tell the job's gateway to bring it elsewhere, and those that watch that it is not live here."""
        held, self._held = self._held, []
        if self.gateway is not None:
            for each in joined(held):
                self._tell_gateway(each)
        if self.gateway is not None:
            self._send(self.gateway, JobMoved(self.job.id, *holder))
        self._tell_watchers(NotLive(self.job.id))

    def tell_end(self, ending: Ending) -> None:
        """Tell the job's end, or the refusal of one that was never accepted."""
        attempt = self.attempt if self.accepted else 0
        how = (ending.finish_reason, self.usage, ending.error)
        told = self.answers.seen if ending.error is None else ()
        self.tell(
            JobEnd(self.job.id, ending.status, attempt, *how, choices=ending.choices, exact=self.exact, told=told)
        )

    def refuse(self, error: TetherError) -> None:
        """Tell the refusal of a job that is not even begun."""
        self.tell_end(Ending.failed(error.to_info()))
        self.done.set()

    def tell_record(self, record: JobRecord | None) -> None:
        """Tell the end that the store has of this job, or that somebody else has the job."""
        if record is None or record.status in LIVE:
            self.tell_end(Ending.failed(JobConflict("another orchestrator holds the job with this id").to_info()))
            return
        error = record.error
        num_known = sum(len(choice.token_ids) for choice in self.answers.choices)
        if record.status == "completed" and record.result is None and num_known < record.usage.completion_tokens:
            error = JobConflict("the job has completed, and its answer was not kept").to_info()
        reason = record.finish_reason or "error"
        how = (reason, record.usage, error, record.result)
        self.tell(JobEnd(record.id, record.status, record.attempt, *how, exact=record.exact))

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """The next attempt is written down and begins; it goes on after the answer so far."""
        self.attempt += 1
        self.attempt_tokens = 0
        for choice in self.answers.choices:
            choice.begin_attempt()
        self._is_attempt_open = True

    @property
    def is_attempt_open(self) -> bool:
        """Whether the newest attempt has not ended yet, as far as anybody has said."""
        return self._is_attempt_open

    def count_attempt(self, usage: Usage | None) -> None:
        """Count what the attempt spent: what its worker says, else what it told; the prompt counts once."""
        if usage is not None:
            self.prompt_tokens = max(self.prompt_tokens, usage.prompt_tokens)
            self.attempt_tokens = usage.completion_tokens
        self.completion_tokens += self.attempt_tokens

    def recall(self, attempts: Attempts) -> None:
        """Go on from what the ledger says of the attempts that others made; tokens that were told were spent."""
        self.attempts = attempts
        num_told = sum(len(choice.token_ids) for choice in self.answers.choices)
        self.completion_tokens = max(self.completion_tokens, attempts.completion_tokens, num_told)

    @property
    def like(self) -> str:
        """The fingerprint that a worker must have to go on exactly; empty where nothing was told yet."""
        return self.attempts.fingerprint if any(choice.token_ids for choice in self.answers.choices) else ""

    @property
    def is_stopped(self) -> bool:
        """Whether somebody, or the deadline, ends the job."""
        return self._stopped

    # --- turns -------------------------------------------------------------------------------------------------------

    def put(self, turn: Turn) -> None:
        """Put a turn into the inbox; of stops the first counts, and of an attempt's ends the first.

        A job that is stopped ends here, and is not given away any more.
        """
        match turn:
            case Stop():
                if self._stopped:
                    return
                self._stopped = True
                self._turns = deque(each for each in self._turns if not isinstance(each, HandOver))
            case Ended() | Busy() | Lost() | Displaced():
                if not self._is_attempt_open:
                    return
                self._is_attempt_open = False
        self._turns.append(turn)
        self._wake.set()

    async def next_turn(self) -> Turn:
        """Wait for the next turn; the deadline is one, unless the job is being stopped already."""
        while not self._turns:
            if not self._stopped and trio.current_time() >= self.deadline:
                self._stopped = True
                return Stop("expired", self.overdue.to_info())
            self._wake = trio.Event()
            with trio.move_on_at(float("inf") if self._stopped else self.deadline):
                await self._wake.wait()
        return self._turns.popleft()

    @property
    def overdue(self) -> DeadlineExceeded:
        """What a client is told whose job's deadline has passed."""
        return DeadlineExceeded(f"the job was not done within its {self.job.deadline_seconds:g} s")

    async def end_of_attempt(self) -> EndOfAttempt | Stop | HandOver:
        """Wait for the turn that ends the newest attempt, or the job's time here."""
        while isinstance(turn := await self.next_turn(), Assigned):
            continue  # a slot that is held already
        return turn

    async def stop(self) -> Stop:
        """Wait for the turn that ends the job, past those that say how its newest attempt fares."""
        while not isinstance(turn := await self.next_turn(), Stop):
            continue
        return turn


def job_of(record: JobRecord) -> Job:
    """Return a job as it was submitted; its quota was counted then, and its texts are kept until its end.

    Of one that has ended without its input there is the outline, by which its answer is told as it was.
    """
    return Job(
        id=record.id,
        tenant_id=record.tenant_id,
        model=record.model,
        version=record.version,
        input=(record.input if record.input is not None else record.outline) or "",
        sampling=record.sampling,
        wait=record.wait,
        stream=record.stream,
        priority=record.priority,
        deadline_seconds=record.deadline_seconds,
        region=record.region,
        session_key=record.session_key,
        keep=record.keep,
        created_at=record.created_at,
        form=record.form,
        user=record.user,
        metadata=record.metadata,
    )
