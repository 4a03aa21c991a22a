"""An orchestrator's answers to gateways that ask: a job, a page of jobs, a job's end, whether jobs can be served."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

import msgspec
import trio

from tether import reasons, scheduler
from tether.answering import Answering, fitting
from tether.audit import Action, told_of
from tether.cancelling import Cancelling
from tether.errors import JobConflict, JobNotFound, StoreUnavailable, Unavailable
from tether.explain import explain
from tether.housekeeping import Housekeeping
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.messages import (
    CancelJob,
    ClaimKey,
    Explain,
    Explained,
    ForgetJob,
    GetHealth,
    GetJob,
    GetModels,
    Health,
    Jobs,
    KeyClaimed,
    ListJobs,
    Models,
)
from tether.named_queries import Write
from tether.orchestrator import Orchestrator
from tether.records import LIVE, Actor, Job, JobRecord, ModelInfo, ServedModel, WorkerState
from tether.roster import Roster

log = logging.getLogger(__name__)

MAX_PAGE = 200


class Inquiries:
    """Answers what arrives on `links`, each question in a task of its own."""

    def __init__(
        self,
        links: Links,
        ledger: Ledger,
        orchestrator: Orchestrator,
        cancelling: Cancelling,
        roster: Roster,
        housekeeping: Housekeeping,
    ) -> None:
        self._links = links
        self._ledger = ledger
        self._orchestrator = orchestrator
        self._cancelling = cancelling
        self._roster = roster
        self._housekeeping = housekeeping
        self._answering = Answering()
        links.on(GetJob, self._on_get_job)
        links.on(ListJobs, self._on_list_jobs)
        links.on(CancelJob, self._on_cancel_job)
        links.on(ForgetJob, self._on_forget_job)
        links.on(GetHealth, self._on_get_health)
        links.on(GetModels, self._on_get_models)
        links.on(ClaimKey, self._on_claim_key)
        links.on(Explain, self._on_explain)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled."""
        await self._answering.run(task_status)

    def _on_get_job(self, link: Link, get: GetJob) -> None:
        async def answer() -> tuple[JobRecord, ...]:
            record = await self._record(get.job_id, get.tenant_id)
            return (msgspec.structs.replace(record, waiting=self._orchestrator.waiting(record.id)),)

        self._answer_jobs_soon(link, get.request_id, answer)

    def _on_list_jobs(self, link: Link, query: ListJobs) -> None:
        async def answer() -> tuple[JobRecord, ...]:
            limit = max(1, min(query.limit, MAX_PAGE))
            store = self._ledger.store
            jobs = await self._ledger.read(store.jobs, query.tenant_id, query.status, query.model, query.before, limit)
            return fitting([_listed(job) for job in jobs])

        self._answer_jobs_soon(link, query.request_id, answer)

    def _on_cancel_job(self, link: Link, cancel: CancelJob) -> None:
        async def answer() -> tuple[JobRecord, ...]:
            active = self._orchestrator.get(cancel.job_id)
            if active is not None and cancel.tenant_id in {None, active.job.tenant_id}:
                await self._tell(cancel.by, "job.cancelled", active.job)
            else:
                record = await self._record(cancel.job_id, cancel.tenant_id)
                if record.status not in LIVE:
                    raise JobConflict(f"job {record.id} has ended already: it is {record.status}")
                await self._tell(cancel.by, "job.cancelled", record)
            await self._cancelling.end(cancel.job_id, cancel.reason)
            record = await self._record(cancel.job_id, cancel.tenant_id)
            if record.status in LIVE:
                raise Unavailable(
                    f"job {record.id} is not cancelled: its orchestrator does not answer, or it moves; try again"
                )
            return (record,)

        self._answer_jobs_soon(link, cancel.request_id, answer)

    def _on_forget_job(self, link: Link, forget: ForgetJob) -> None:
        async def answer() -> tuple[JobRecord, ...]:
            record = await self._record(forget.job_id, forget.tenant_id)
            if record.status in LIVE:
                raise JobConflict(f"job {record.id} has not ended yet")
            await self._ledger.forget(record.id, told=_told(forget.by, "job.forgotten", record))
            return (await self._record(forget.job_id, forget.tenant_id),)

        self._answer_jobs_soon(link, forget.request_id, answer)

    def _on_claim_key(self, link: Link, claim: ClaimKey) -> None:
        async def answer() -> KeyClaimed:
            job_id = await self._ledger.claim_key(
                claim.tenant_id, claim.key, fingerprint=claim.fingerprint, job_id=claim.job_id, now=time.time()
            )
            record = None
            if job_id != claim.job_id:
                record = await self._ledger.read(self._ledger.store.job, job_id, claim.tenant_id)
            return KeyClaimed(claim.request_id, job_id, record)

        self._answering.soon(link, answer, lambda error: KeyClaimed(claim.request_id, error=error))

    def _on_get_models(self, link: Link, get: GetModels) -> None:
        async def answer() -> Models:
            try:
                known = await self._ledger.read(self._ledger.store.models)
            except StoreUnavailable as exc:
                log.warning("models are told without their ages: %s", exc.message)
                known = []
            first_seen = {(model.name, model.version): model.first_seen_at for model in known}
            return Models(get.request_id, tuple(served_models(self._roster.states, first_seen)))

        self._answering.soon(link, answer, lambda _: Models(get.request_id, ()))

    def _on_explain(self, link: Link, question: Explain) -> None:
        async def answer() -> Explained:
            now = time.time()
            limits = await self._ledger.limits(question.job, now=now)
            outlook = self._orchestrator.outlook(question.job)
            if self._housekeeping.store_error is not None:
                outlook = outlook._replace(error=self._housekeeping.store_error)
            explanation = explain(
                outlook,
                self._roster.views(),
                limits,
                orchestrator=(self._links.peer_id, self._links.name),
                sees_all=question.sees_all,
                now=now,
            )
            return Explained(question.request_id, explanation)

        self._answering.soon(link, answer, lambda error: Explained(question.request_id, error=error))

    def _on_get_health(self, link: Link, get: GetHealth) -> None:
        unready = scheduler.unready(self._roster.views())
        health = Health(
            get.request_id,
            self._housekeeping.store_error,
            len(self._roster),
            len(self._roster) - len(unready),
            self._orchestrator.num_queued,
            self._orchestrator.num_running,
            {reason: number for reason, number in reasons.count(unready).items() if number},
            reasons.told(unready),
        )
        self._answering.send(link, health)

    async def _tell(self, by: Actor | None, action: Action, job: Job | JobRecord) -> None:
        """Let the audit log have what is about to be done to another tenant's job: first, so that nothing is done without a line."""
        if told := _told(by, action, job):
            await self._ledger.write(told)

    async def _record(self, job_id: str, tenant_id: str | None) -> JobRecord:
        record = await self._ledger.read(self._ledger.store.job, job_id, tenant_id)
        if record is None:
            raise JobNotFound(f"there is no job {job_id!r}")
        return record

    def _answer_jobs_soon(
        self, link: Link, request_id: int, answer: Callable[[], Awaitable[tuple[JobRecord, ...]]]
    ) -> None:
        async def jobs() -> Jobs:
            return Jobs(request_id, await answer())

        self._answering.soon(link, jobs, lambda error: Jobs(request_id, error=error))


def _told(by: Actor | None, action: Action, job: Job | JobRecord) -> Write:
    return told_of(by, action, job.id, owner=job.tenant_id, now=time.time())


def _listed(job: JobRecord) -> JobRecord:
    """Return a job as a listing has it: without what may be long in its sampling."""
    sampling = msgspec.structs.replace(job.sampling, json_schema=None, regex=None, logit_bias={})
    return msgspec.structs.replace(job, sampling=sampling)


def served_models(
    states: Iterable[WorkerState], first_seen: Mapping[tuple[str, str], float] | None = None
) -> list[ServedModel]:
    """Return what workers that take jobs serve, by name, the newest version of each first."""
    places: dict[tuple[str, str], list[ModelInfo]] = {}
    for state in states:
        for model in state.models:
            if model.slots and state.takes_jobs:
                places.setdefault((model.name, model.version), []).append(model)
    by_version = sorted(places, key=lambda each: scheduler.version_key(each[1]), reverse=True)
    found: list[ServedModel] = []
    for name, version in sorted(by_version, key=lambda each: each[0]):
        models = places[name, version]
        found.append(
            ServedModel(
                name,
                version,
                context_tokens=min(model.context_tokens for model in models),
                toy=all(model.toy for model in models),
                num_workers=len(models),
                num_slots=sum(model.slots for model in models),
                is_newest=not found or found[-1].name != name,
                first_seen_at=(first_seen or {}).get((name, version), 0.0),
            )
        )
    return found
