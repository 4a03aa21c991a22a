"""A live job at an orchestrator: what is known of it, and the turns that its story can take.

A job's task waits for one thing only, its inbox. Whoever learns something (a frame, a lost link, a free slot, a client
that left) puts a turn in; tokens are no turns, they are passed on as they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import trio

from tether.errors import DeadlineExceeded, ErrorInfo
from tether.links import Link
from tether.messages import InferEnd, InferTokens
from tether.records import FinishReason, Job, JobStatus, Usage

if TYPE_CHECKING:
    from tether.roster import Entry

MAX_TURNS = 1024
"""An inbox's bound. Each attempt brings a few turns at most, and attempts are bounded; nobody else puts any in."""


class Assigned(msgspec.Struct, frozen=True):
    """The queue gave the job a slot on this worker."""

    worker_id: str


class Ended(msgspec.Struct, frozen=True):
    """The worker told the attempt's end."""

    end: InferEnd


class Busy(msgspec.Struct, frozen=True):
    """The worker had no room after all; nothing ran."""

    attempt: int


class Lost(msgspec.Struct, frozen=True):
    """The attempt's worker is gone, or is wrong about the answer."""

    attempt: int


class Stop(msgspec.Struct, frozen=True):
    """Somebody, or the deadline, ends the job."""

    status: JobStatus
    error: ErrorInfo


Turn = Assigned | Ended | Busy | Lost | Stop


class Ending(msgspec.Struct, frozen=True):
    """How a job ends."""

    status: JobStatus
    finish_reason: FinishReason
    error: ErrorInfo | None = None

    @classmethod
    def of(cls, stop: Stop) -> Ending:
        """Return the end of a job that was stopped."""
        return cls(stop.status, "cancelled" if stop.status == "cancelled" else "error", stop.error)


class ActiveJob:
    """A live job; one task runs its story, and everybody else only reads it or puts turns in."""

    def __init__(self, job: Job, *, deadline: float, gateway: Link | None, attempt: int = 0) -> None:
        self.job = job
        self.deadline = deadline
        """By this process's own clock (`trio.current_time`)."""
        self.gateway = gateway
        """Who hears of it; None while nobody does."""
        self.attempt = attempt
        """The number of the newest attempt; 0 before the first."""
        self.slot: Entry | None = None
        """The worker that has given the job a slot; None while it has none."""
        self.accepted = attempt > 0
        """It is in the ledger."""
        self.num_failures = 0
        self.tried: frozenset[tuple[str, str]] = frozenset()
        """The workers' boots `(worker_id, boot_id)` that failed at it."""
        self.prompt_tokens = 0
        self.completion_tokens = 0
        """Spent by all attempts together."""
        self.attempt_tokens = 0
        """Spent by the newest attempt."""
        self.chunks: list[InferTokens] = []
        """The answer so far, as it came; a gateway that comes back is told what it misses."""
        self.num_tokens = 0
        self.done = trio.Event()
        self._stopped = False
        self._turns, self._inbox = trio.open_memory_channel[Turn](MAX_TURNS)

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def emitted(self) -> tuple[int, ...]:
        """The answer's token ids so far."""
        return tuple(token for chunk in self.chunks for token in chunk.token_ids)

    @property
    def usage(self) -> Usage:
        """Tokens spent on the job."""
        return Usage(self.prompt_tokens, self.completion_tokens)

    @property
    def model_key(self) -> tuple[str, str]:
        """The model and version that it asks for."""
        return self.job.model, self.job.version

    def extend(self, tokens: InferTokens) -> None:
        """Add tokens to the answer."""
        self.chunks.append(tokens)
        self.num_tokens += len(tokens.token_ids)

    def spend(self, usage: Usage) -> None:
        """Count what an attempt used; the prompt counts once, however often it was read."""
        self.prompt_tokens = max(self.prompt_tokens, usage.prompt_tokens)
        self.completion_tokens += usage.completion_tokens
        self.attempt_tokens = usage.completion_tokens

    def put(self, turn: Turn) -> None:
        """Put a turn into the inbox; after a first stop no other counts."""
        if isinstance(turn, Stop):
            if self._stopped:
                return
            self._stopped = True
        self._turns.send_nowait(turn)

    async def next_turn(self) -> Turn:
        """Wait for the next turn; the deadline is one, unless the job is being stopped already."""
        with trio.move_on_at(float("inf") if self._stopped else self.deadline):
            return await self._inbox.receive()
        self._stopped = True
        error = DeadlineExceeded(f"the job was not done within its {self.job.deadline_seconds:g} s")
        return Stop("expired", error.to_info())

    async def end_of_attempt(self, number: int) -> Ended | Busy | Lost | Stop:
        """Wait for the turn that ends attempt `number`; what belongs to an older one is late and dropped."""
        while True:
            match turn := await self.next_turn():
                case Stop():
                    return turn
                case Ended(end) if end.attempt == number:
                    return turn
                case Busy(attempt) | Lost(attempt) if attempt == number:
                    return turn
                case _:
                    continue
