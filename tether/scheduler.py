"""Who runs a job: the cluster's view and the job in, a decision with its reasons out. Pure: no I/O, no clock.

A worker either cannot take the job, for one reason, or it has a score made of parts. The parts are weighed so that a
wish of the client (region, session) outweighs comfort (free slots, speed), and fresh failures outweigh both.
"""

from __future__ import annotations

import bisect
import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from tether.errors import ModelNotFound, NoWorker, QueueFull, TetherError
from tether.records import Job, ModelInfo, WorkerState

Reason = Literal["other_model", "other_version", "draining", "loading", "full", "tried"]
"""Why a worker cannot take a job now. `full`, `loading` and `tried` may pass, so the job can wait for them."""

_PASSING: frozenset[Reason] = frozenset({"full", "loading", "tried"})

WEIGHTS = {"region": 100.0, "affinity": 60.0, "free_slots": 30.0, "speed": 20.0, "failures": -80.0}


class WorkerView(msgspec.Struct):
    """A worker as an orchestrator sees it now; the orchestrator keeps it true, the functions here only read it."""

    state: WorkerState
    assigned: dict[tuple[str, str], int] = {}
    """Jobs that this orchestrator has on it, by model and version."""
    num_elsewhere: int = 0
    """Jobs that it runs for other orchestrators."""
    recent_failures: float = 0.0
    """Failures, each worth 1 when fresh and fading with time."""
    busy: bool = False
    """It said so itself just now, whatever the counts say."""

    def model(self, job: Job) -> ModelInfo | None:
        """Return the model that the job asks for, or None."""
        return next((m for m in self.state.models if m.name == job.model and m.version == job.version), None)

    def free_slots(self, model: ModelInfo) -> int:
        """Return how many more jobs of this model the worker would take."""
        if self.busy:
            return 0
        return model.slots - self.assigned.get((model.name, model.version), 0) - self.num_elsewhere


class Candidate(msgspec.Struct, frozen=True):
    """A worker that could take the job, and what speaks for it."""

    worker_id: str
    score: float
    parts: dict[str, float]


class Rejection(msgspec.Struct, frozen=True):
    """A worker that cannot take the job, and why."""

    worker_id: str
    reason: Reason


class Decision(msgspec.Struct, frozen=True):
    """What would happen to a job now: the candidates, best first, and everybody else's reason."""

    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]

    @property
    def worker_id(self) -> str | None:
        """The worker to ask first, or None."""
        return self.candidates[0].worker_id if self.candidates else None

    @property
    def can_wait(self) -> bool:
        """Whether somebody serves the model and may have room later."""
        return any(r.reason in _PASSING for r in self.rejections)

    def counts(self) -> dict[Reason, int]:
        """Return how many workers refused for each reason."""
        return dict(Counter(r.reason for r in self.rejections))


def choose(job: Job, workers: Sequence[WorkerView], *, tried: frozenset[tuple[str, str]] = frozenset()) -> Decision:
    """Decide which worker runs the job.

    `tried` are the boots `(worker_id, boot_id)` that failed at this very job: they are asked again only when nobody else
    serves the model.
    """
    serving = [view for view in workers if view.model(job) is not None and not view.state.draining]
    fresh = any((view.state.worker_id, view.state.boot_id) not in tried for view in serving)
    fastest = max((m.tokens_per_second for view in serving if (m := view.model(job))), default=0.0)
    favourite = _favourite(job, serving)
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    for view in workers:
        reason = _why_not(job, view, tried if fresh else frozenset())
        if reason is not None:
            rejections.append(Rejection(view.state.worker_id, reason))
            continue
        model = view.model(job)
        if model is None:  # _why_not has said so already; this tells the type checker
            continue
        parts = {
            "region": WEIGHTS["region"] * (job.region is not None and view.state.region == job.region),
            "affinity": WEIGHTS["affinity"] * (view.state.worker_id == favourite),
            "free_slots": WEIGHTS["free_slots"] * view.free_slots(model) / model.slots,
            "speed": WEIGHTS["speed"] * (model.tokens_per_second / fastest if fastest else 0.0),
            "failures": WEIGHTS["failures"] * view.recent_failures,
        }
        candidates.append(Candidate(view.state.worker_id, math.fsum(parts.values()), parts))
    # Equals are told apart by the job's id, so that many jobs at once do not all ask the same worker first.
    candidates.sort(key=lambda c: (-c.score, _hash(job.id, c.worker_id)))
    return Decision(tuple(candidates), tuple(rejections))


def refusal(
    job: Job, decision: Decision, workers: Sequence[WorkerView], known_models: Iterable[str] = ()
) -> TetherError:
    """Return the error for a job that nobody can take, now or soon.

    `known_models` have been served before: for them the answer is "no worker at present", for others "no such model".
    """
    served = sorted({(m.name, m.version) for view in workers for m in view.state.models})
    versions = sorted(version for name, version in served if name == job.model)
    if versions and job.version not in versions:
        return ModelNotFound(
            f"model {job.model!r} is served in version {', '.join(versions)}, not {job.version!r}", param="version"
        )
    if versions or job.model in known_models:
        counts = decision.counts()
        why = ", ".join(
            f"{count} {reason}" for reason, count in counts.items() if reason in {"draining", "full", "loading"}
        )
        return NoWorker(
            f"no worker can take a job for {job.model!r} now ({why or 'none is connected'}); try again soon"
        )
    names = sorted({name for name, _ in served} | set(known_models))
    near = difflib.get_close_matches(job.model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"served now: {', '.join(names) or 'nothing'}"
    return ModelNotFound(f"no worker serves a model {job.model!r}; {hint}", param="model")


class QueueEntry(msgspec.Struct, frozen=True, order=True):
    """A waiting job's place: higher priority first, then first come."""

    negative_priority: int
    arrival: int
    job_id: str


class JobQueue:
    """The jobs that wait for a slot, in the order in which they will be served; bounded."""

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self._entries: list[QueueEntry] = []
        self._by_id: dict[str, QueueEntry] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._by_id

    def __iter__(self) -> Iterator[str]:
        """Yield the job ids, next one first."""
        return iter([entry.job_id for entry in self._entries])

    def check_room(self) -> None:
        """Raise `QueueFull` when no further job may wait."""
        if len(self._entries) >= self.max_queued:
            raise QueueFull(f"{len(self._entries)} jobs wait already, which is all that may; try again soon")

    def push(self, job: Job) -> int:
        """Let the job wait; return its place, 1 being next. A job that was accepted before is never turned away."""
        self._arrivals += 1
        entry = QueueEntry(-job.priority, self._arrivals, job.id)
        bisect.insort(self._entries, entry)
        self._by_id[job.id] = entry
        return self.place(job.id)

    def place(self, job_id: str) -> int:
        """Return the job's place, 1 being next."""
        return bisect.bisect_left(self._entries, self._by_id[job_id]) + 1

    def remove(self, job_id: str) -> None:
        """Take the job out; a job that does not wait is left alone."""
        entry = self._by_id.pop(job_id, None)
        if entry is not None:
            del self._entries[bisect.bisect_left(self._entries, entry)]


def fade(failure_ages_seconds: Iterable[float], half_life_seconds: float = 60.0) -> float:
    """Return the weight of failures: 1 for each fresh one, half of it after each half-life."""
    return math.fsum(0.5 ** (age / half_life_seconds) for age in failure_ages_seconds)


def _why_not(job: Job, view: WorkerView, tried: frozenset[tuple[str, str]]) -> Reason | None:
    if all(m.name != job.model for m in view.state.models):
        return "other_model"
    model = view.model(job)
    if model is None:
        return "other_version"
    if view.state.draining:
        return "draining"
    if view.state.loading or model.slots == 0:
        return "loading"
    if (view.state.worker_id, view.state.boot_id) in tried:
        return "tried"
    if view.free_slots(model) <= 0:
        return "full"
    return None


def _favourite(job: Job, serving: Sequence[WorkerView]) -> str | None:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): a session keeps its worker when others come and go."""
    if job.session_key is None or not serving:
        return None
    return max((view.state.worker_id for view in serving), key=lambda worker: _hash(job.session_key or "", worker))


def _hash(key: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{worker_id}".encode(), digest_size=8).digest()
