"""What would happen to a job that came now, and why: the decision that is made for jobs, told worker by worker. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from tether import quotas
from tether.errors import ErrorInfo
from tether.quotas import Limit
from tether.records import Explanation, Job, LimitLeft, Waiting, WorkerChance
from tether.scheduler import Decision, WorkerView


class Outlook(NamedTuple):
    """What an orchestrator would do with a job."""

    job: Job
    """With the version that it would get."""
    decision: Decision
    waiting: Waiting | None
    """Where it would stand, if it had to wait."""
    error: ErrorInfo | None
    """Why it would be refused."""
    num_waiting: dict[str, int]
    """The jobs that wait for the model, by tenant."""


def explain(
    outlook: Outlook,
    views: Sequence[WorkerView],
    limits: Sequence[Limit],
    *,
    orchestrator: tuple[str, str],
    sees_all: bool,
    now: float,
) -> Explanation:
    """Return an outlook as it is told, with the limits that hold for the job.

    `views` are those of which the decision was made, `orchestrator` is the id and the name of who made it. Only who
    `sees_all` is told how many jobs other tenants have.
    """
    job, decision = outlook.job, outlook.decision
    tokens = quotas.reserved_tokens(job)
    error = outlook.error
    if error is None and quotas.passed(limits, tokens):
        error = quotas.refusal(limits, tokens, now).to_info()
    outcome: Literal["runs", "waits", "refused"] = "runs" if decision.worker_id is not None else "waits"
    return Explanation(
        *orchestrator,
        model=job.model,
        version=job.version,
        tokens=tokens,
        outcome=outcome if error is None else "refused",
        error=error,
        workers=tuple(_chances(job, decision, views)),
        waiting=outlook.waiting,
        num_own_waiting=outlook.num_waiting.get(job.tenant_id, 0),
        num_waiting=sum(outlook.num_waiting.values()) if sees_all else None,
        limits=tuple(_left(limit, now) for limit in limits),
    )


def _chances(job: Job, decision: Decision, views: Sequence[WorkerView]) -> Iterable[WorkerChance]:
    by_id = {view.state.worker_id: view for view in views}
    for candidate in decision.candidates:
        yield _chance(job, by_id[candidate.worker_id], candidate.score, candidate.parts)
    for rejection in decision.rejections:
        yield _chance(job, by_id[rejection.worker_id], reason=rejection.reason, detail=rejection.detail)


def _chance(
    job: Job,
    view: WorkerView,
    score: float | None = None,
    parts: dict[str, float] | None = None,
    reason: str | None = None,
    detail: str = "",
) -> WorkerChance:
    state, model = view.state, view.model(job)
    return WorkerChance(
        state.worker_id,
        state.name,
        state.region,
        slots=model.slots if model is not None else 0,
        free_slots=max(0, view.free_slots(model)) if model is not None else 0,
        score=score,
        parts=parts or {},
        reason=reason,
        detail=detail,
    )


def _left(limit: Limit, now: float) -> LimitLeft:
    whose: Literal["tenant", "key"] = "key" if limit.key_id else "tenant"
    return LimitLeft(limit.name, whose, limit.model, limit.most, max(0, limit.left), limit.reset_seconds(now))
