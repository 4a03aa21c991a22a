"""What one client of the chaos suite saw, in order: the only evidence there is of what Tether did to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal["stream", "chat", "plain", "background"]
"""`stream` and `chat` read server-sent events, `plain` waits for the whole answer, `background` comes back for it."""
STREAMED: frozenset[Kind] = frozenset({"stream", "chat"})


class Asked(NamedTuple):
    """A request was sent: the first one, or another one after a cut or a refusal."""

    at: float
    gateway: str


class Named(NamedTuple):
    """A stream's headers named the job: it may still be refused, by the stream's first event."""

    at: float
    job_id: str


class Accepted(NamedTuple):
    """The client was told that there is a job."""

    at: float
    job_id: str


class Started(NamedTuple):
    """The client was told which worker its job runs on."""

    at: float
    worker: str
    attempt: int


class Told(NamedTuple):
    """A piece of the answer came; `end` is the number of characters that the client has with it, by the event's id."""

    at: float
    text: str
    end: int


class Cut(NamedTuple):
    """The connection broke before the answer's end."""

    at: float
    why: str


class Refused(NamedTuple):
    """An answer with an error's status."""

    at: float
    status: int
    code: str
    retry_after: str | None


class Ended(NamedTuple):
    """The job's end, as it was told: the whole text where all of it comes at once, or an error's code."""

    at: float
    result: str | None
    error: str | None


class GaveUp(NamedTuple):
    """The client waited for much longer than any job may take, and has seen no end."""

    at: float


Seen = Asked | Named | Accepted | Started | Told | Cut | Refused | Ended | GaveUp


@dataclass
class History:
    """One client: what it asked for, and all that it saw."""

    number: int
    kind: Kind
    tenant: str
    expected: str
    """The answer of a run that nothing disturbed."""
    seen: list[Seen] = field(default_factory=list)

    @property
    def job_id(self) -> str | None:
        """The job's id, as it was told first."""
        return next((each.job_id for each in self.seen if isinstance(each, Named | Accepted)), None)

    @property
    def is_accepted(self) -> bool:
        """Whether the client was told that there is a job."""
        return any(isinstance(each, Accepted) for each in self.seen)

    @property
    def told(self) -> list[Told]:
        """The pieces of the answer."""
        return [each for each in self.seen if isinstance(each, Told)]

    @property
    def end(self) -> Ended | None:
        """The first end that was told."""
        return next((each for each in self.seen if isinstance(each, Ended)), None)

    @property
    def num_chars(self) -> int:
        """How much of the answer the client has, by the id of the last event."""
        return self.told[-1].end if self.told else 0

    @property
    def started(self) -> Started | None:
        """Where the job runs, as it was told last."""
        return next((each for each in reversed(self.seen) if isinstance(each, Started)), None)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to come."""
        return bool(self.seen) and isinstance(self.seen[-1], Ended | GaveUp)

    def worker_at(self, moment: float) -> str | None:
        """Return the worker that the job ran on at a moment, as far as the client was told."""
        names = [each.worker for each in self.seen if isinstance(each, Started) and each.at <= moment]
        return names[-1] if names else None

    def pause_after(self, moment: float, window_seconds: float) -> float | None:
        """Return the longest silence that a fault at a moment can have caused; None where the stream was not open then.

        It contains the moment, or begins within `window_seconds` after it: what was on its way still arrives.
        """
        times = [each.at for each in self.seen if isinstance(each, Told | Ended)]
        gaps = [
            after - before for before, after in pairwise(times) if after >= moment and before <= moment + window_seconds
        ]
        return max(gaps) if times and times[0] <= moment and gaps else None
