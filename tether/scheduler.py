"""Who runs a job: the cluster's view and the job in, a decision with its reasons out. Pure: no I/O, no clock.

A worker either cannot take the job, for one reason, or it has a score made of parts. The parts are weighed so that a
wish of the client (region, session) outweighs comfort (free slots, speed), and fresh failures outweigh both. An answer
that has begun goes before all of that to a worker that goes on exactly.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Sequence

import msgspec

from tether import reasons
from tether.errors import ModelNotFound, NoWorker, TetherError, UnsupportedParameter
from tether.reasons import Reason, Rejection
from tether.records import Job, ModelInfo, WorkerState

_PASSING: frozenset[Reason] = frozenset({"full", "too_little_memory", "loading", "failed_before"})
"""What may pass, so that the job can wait for it."""
_NEVER: frozenset[Reason] = frozenset({"no_such_model", "no_such_version", "no_embeddings"})
"""What no wait would change."""
_ALWAYS_SAID: frozenset[Reason] = frozenset({"no_such_model", "draining", "full", "too_little_memory"})

MAX_LISTED = 50
"""Names in a message, and others are counted."""
CHARS_PER_TOKEN = 3
"""A prompt's tokens are guessed from its characters: English has four to a token, most other texts fewer."""
WEIGHTS = {
    "region": 100.0,
    "affinity": 60.0,
    "free_slots": 30.0,
    "speed": 20.0,
    "first_token": 10.0,
    "failures": -80.0,
    "exact": 250.0,
}
_REGION, _AFFINITY, _FREE_SLOTS, _SPEED, _FIRST_TOKEN, _FAILURES, _EXACT = WEIGHTS.values()


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
    drained: bool = False
    """An operator keeps jobs from it."""

    @property
    def takes_jobs(self) -> bool:
        """Whether it would take a job if it had room."""
        return self.state.takes_jobs and not self.drained

    def model(self, job: Job) -> ModelInfo | None:
        """Return the model that the job asks for, or None."""
        for model in self.state.models:
            if model.name == job.model and model.version == job.version:
                return model
        return None

    def free_slots(self, model: ModelInfo) -> int:
        """Return how many more jobs of this model the worker would take."""
        if self.busy:
            return 0
        return model.slots - self._num_running(model)

    def has_memory(self, model: ModelInfo, num_tokens: int) -> bool:
        """Whether the model's cache would take so many tokens more, as far as is known.

        What a worker said when its latest job ended may be from a busier time: one that runs nothing is taken to have room.
        """
        free = model.free_kv_tokens
        if free is None or self._num_running(model) <= 0:
            return True
        return min(num_tokens, model.context_tokens or num_tokens) <= free

    def _num_running(self, model: ModelInfo) -> int:
        return self.assigned.get((model.name, model.version), 0) + self.num_elsewhere


class Candidate(msgspec.Struct, frozen=True):
    """A worker that could take the job, and what speaks for it."""

    worker_id: str
    score: float
    parts: dict[str, float]


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

    def counts(self) -> dict[str, int]:
        """Return how many workers cannot take the job, for every reason that there is."""
        return reasons.count(self.rejections)

    def why(self) -> str:
        """Return the same for people: `no such model 0, draining 1, full 2, too little memory 1`."""
        if not self.rejections and not self.candidates:
            return "no worker is connected"
        return reasons.told(self.rejections, _ALWAYS_SAID)


def best(
    job: Job, workers: Sequence[WorkerView], *, tried: frozenset[tuple[str, str]] = frozenset(), like: str = ""
) -> str | None:
    """Return the worker to ask first, or None: what `choose` says, without the reasons, for each job at each free slot."""
    field = _Field(job, workers, tried, like)
    found: list[str] = []
    highest = -math.inf
    for view in workers:
        model = view.model(job)
        if model is None or _why_not_model(view, model, field) is not None:
            continue
        score = math.fsum(field.parts(view, model))
        if score > highest:
            found, highest = [], score
        if score == highest:
            found.append(view.state.worker_id)
    return max(found, key=lambda worker_id: _mix(job.id, worker_id)) if found else None


def choose(
    job: Job, workers: Sequence[WorkerView], *, tried: frozenset[tuple[str, str]] = frozenset(), like: str = ""
) -> Decision:
    """Decide which worker runs the job, with every reason.

    `tried` are the boots `(worker_id, boot_id)` that failed at this very job: they are asked again only when nobody else
    serves the model. `like` is the fingerprint with which the answer began (`ModelInfo.fingerprint`); empty: it has not.
    """
    field = _Field(job, workers, tried, like)
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    for view in workers:
        model = view.model(job)
        reason = _why_not_model(view, model, field) if model is not None else _why_no_model(job, view)
        if model is None or reason is not None:
            rejections.append(_rejection(view, reason or "no_such_model"))
            continue
        parts = field.parts(view, model)
        named = dict(zip(WEIGHTS, parts, strict=True))
        candidates.append(Candidate(view.state.worker_id, math.fsum(parts), named))
    # Equals are told apart by the job's id, so that many jobs at once do not all ask the same worker first.
    candidates.sort(key=lambda c: (c.score, _mix(job.id, c.worker_id)), reverse=True)
    return Decision(tuple(candidates), tuple(rejections))


def unready(workers: Iterable[WorkerView]) -> list[Rejection]:
    """Return who takes no job now, whatever its model, and why; a worker that is only full takes the next one."""
    found: list[Rejection] = []
    for view in workers:
        if not view.takes_jobs:
            found.append(_rejection(view, _why_away(view)))
        elif not any(model.slots for model in view.state.models):
            found.append(_rejection(view, "loading"))
    return found


def refusal(
    job: Job, decision: Decision, workers: Sequence[WorkerView], known_models: Iterable[str] = ()
) -> TetherError:
    """Return the error for a job that nobody can take, now or soon.

    `known_models` have been served before: for them the answer is "no worker at present", for others "no such model".
    """
    if "no_embeddings" in (why := {r.reason for r in decision.rejections}) and why <= _NEVER:
        return UnsupportedParameter(f"no worker that serves {job.model!r} gives embeddings", param="model")
    served = sorted({(m.name, m.version) for view in workers for m in view.state.models})
    versions = sorted(version for name, version in served if name == job.model)
    if versions and job.version not in versions:
        return ModelNotFound(
            f"model {job.model!r} is served in version {_listed(versions)}, not {job.version!r}", param="version"
        )
    if versions or job.model in known_models:
        return NoWorker(
            f"no worker can take a job for {job.model!r} now ({decision.why()}); try again soon",
            reasons=decision.counts(),
        )
    names = sorted({name for name, _ in served} | set(known_models))
    near = difflib.get_close_matches(job.model, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"served now: {_listed(names) or 'nothing'}"
    return ModelNotFound(f"no worker serves a model {job.model!r}; {hint}", param="model")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def newest_version(model: str, states: Iterable[WorkerState]) -> str | None:
    """Return the newest version of a model that somebody serves, those that take no jobs last; None where nobody does.

    Numbers in a version count as numbers: 1.10 is newer than 1.9.
    """
    served = {(state.takes_jobs, m.version) for state in states for m in state.models if m.name == model}
    found = max(served, key=lambda each: (each[0], version_key(each[1])), default=None)
    return found[1] if found is not None else None


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return what orders versions from older to newer, however many digits a number in them has."""
    pieces = re.findall(r"[0-9]+|[^0-9.]+", version)
    return tuple(_number_key(piece.lstrip("0")) if "0" <= piece[0] <= "9" else (0, 0, piece) for piece in pieces)


def _number_key(digits: str) -> tuple[int, int, str]:
    return 1, len(digits), digits


def fade(failure_ages_seconds: Iterable[float], half_life_seconds: float = 60.0) -> float:
    """Return the weight of failures: 1 for each fresh one, half of it after each half-life; in the end they are forgotten."""
    weight = math.fsum(0.5 ** (age / half_life_seconds) for age in failure_ages_seconds)
    return weight if weight >= 0.01 else 0.0


class _Field:
    """What a worker's score needs to know of the others."""

    def __init__(self, job: Job, workers: Sequence[WorkerView], tried: frozenset[tuple[str, str]], like: str) -> None:
        serving: list[WorkerView] = []
        fastest = 0.0
        quickest = math.inf
        for view in workers:
            model = view.model(job)
            if model is not None and view.takes_jobs:
                serving.append(view)
                fastest = max(fastest, model.tokens_per_second)
                quickest = min(quickest, model.time_to_first_token_seconds or math.inf)
        if tried and all((view.state.worker_id, view.state.boot_id) in tried for view in serving):
            tried = frozenset()
        self.tried = tried
        """The boots not to be asked."""
        self.is_embedding = job.form == "embedding"
        self.num_tokens = len(job.input) // CHARS_PER_TOKEN + job.sampling.max_tokens * job.sampling.n
        """What the job may need of a cache."""
        if self.is_embedding:
            self.num_tokens = 0
        self._fastest = fastest
        self._quickest = quickest
        self._region = job.region
        self._like = like
        self._favourite = _favourite(job, serving)

    def parts(self, view: WorkerView, model: ModelInfo) -> tuple[float, ...]:
        """Return the parts of a worker's score, in the order of `WEIGHTS`."""
        state = view.state
        return (
            _REGION if self._region is not None and state.region == self._region else 0.0,
            _AFFINITY if self._favourite is not None and state.worker_id == self._favourite else 0.0,
            _FREE_SLOTS * view.free_slots(model) / model.slots,
            _SPEED * model.tokens_per_second / self._fastest if self._fastest else 0.0,
            _FIRST_TOKEN * self._quickest / first if (first := model.time_to_first_token_seconds) else 0.0,
            _FAILURES * view.recent_failures,
            _EXACT if self._like and model.fingerprint == self._like else 0.0,
        )


def _why_no_model(job: Job, view: WorkerView) -> Reason:
    return "no_such_version" if any(m.name == job.model for m in view.state.models) else "no_such_model"


def _why_not_model(view: WorkerView, model: ModelInfo, field: _Field) -> Reason | None:
    state = view.state
    if not view.takes_jobs:
        return _why_away(view)
    if model.slots == 0:
        return "loading"
    if field.is_embedding and not model.embeds:
        return "no_embeddings"
    if field.tried and (state.worker_id, state.boot_id) in field.tried:
        return "failed_before"
    if view.free_slots(model) <= 0:
        return "full"
    if not view.has_memory(model, field.num_tokens):
        return "too_little_memory"
    return None


def _why_away(view: WorkerView) -> Reason:
    """Return why a worker takes no jobs at all: what others say of it goes before what it says itself."""
    return "draining" if view.drained or view.state.draining else "paused"


def _rejection(view: WorkerView, reason: Reason) -> Rejection:
    state = view.state
    match reason:
        case "paused":
            detail = state.paused
        case "draining":
            detail = "by an operator" if view.drained else "stopping"
        case _:
            detail = ""
    return Rejection(state.worker_id, reason, detail)


def _favourite(job: Job, serving: Sequence[WorkerView]) -> str | None:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): a session keeps its worker when others come and go."""
    if job.session_key is None or not serving:
        return None
    return max((view.state.worker_id for view in serving), key=lambda worker: _hash(job.session_key or "", worker))


def _hash(key: str, worker_id: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{worker_id}".encode(), digest_size=8).digest()


def _mix(key: str, worker_id: str) -> tuple[int, str]:
    """Return a number that orders workers differently for each key; good enough among equals, and cheap."""
    return zlib.crc32(worker_id.encode(), zlib.crc32(key.encode())), worker_id
