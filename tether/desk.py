"""Takes jobs from those who ask for them, by HTTP or on a socket: once or again; and answers those who came by HTTP."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tether import quotas
from tether.access_log import note_tenant
from tether.active import job_of
from tether.auth import Client
from tether.batch_messages import Batches as BatchesReply
from tether.batch_messages import BatchQuestion, Files
from tether.cursor import Cursor
from tether.door import client_of
from tether.errors import InvalidRequest, JobConflict, JobNotFound, ResponseNotFound, TetherError
from tether.infer_api import MAX_NAME
from tether.job_routes import JOB_ROUTES, telling_of
from tether.messages import Authenticated, Health, JobAccepted, JobEvent, KeyClaimed
from tether.openai_api import fingerprint_of, seed_of
from tether.openai_items import PARAM, continued, previous_of
from tether.openai_responses import ResponseAnswer
from tether.records import LIVE, Actor, BatchRecord, Explanation, FileRecord, Job, JobRecord, JobStatus, ServedModel
from tether.replies import Batches, OpenRequests, answer_stream, answer_whole, failure, job_headers, waiting_headers
from tether.retelling import story_of
from tether.settings import GatewaySettings
from tether.telling import Telling

A = TypeVar("A", Files, BatchesReply)
R = TypeVar("R", JobRecord, FileRecord, BatchRecord)


class Network(Protocol):
    """What the HTTP side needs of the network behind it."""

    def follow(self, job: Job, stays: bool = False) -> AsyncGenerator[list[JobEvent], None]:
        """Submit a job and yield its events, all that wait at a time; the last is its `JobEnd`.

        Closed early, it cancels the job, unless that `stays`.
        """
        ...

    def watch(self, job_id: str, tenant_id: str | None) -> AsyncGenerator[list[JobEvent], None]:
        """Yield a job's events from its beginning, wherever it was submitted."""
        ...

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:
        """Give a client's idempotency key to a job; return whose it is."""
        ...

    async def models(self) -> list[ServedModel]:
        """Return the models that can be served now."""
        ...

    async def submit(self, job: Job) -> JobAccepted:
        """Submit a job that nobody waits for; return its acceptance when it is in the ledger."""
        ...

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record."""
        ...

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first: at most `limit`, and fewer where they would not fit into a message."""
        ...

    async def cancel(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """End a job; return its record after its end. `by`: who asks, where the job may be another tenant's."""
        ...

    async def forget(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        """Drop what is kept of a job that has ended; return its record then."""
        ...

    async def explain(self, job: Job, *, sees_all: bool) -> Explanation:
        """Return what would happen to a job that came now."""
        ...

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Return whom an API key stands for; None asks only whether keys are needed."""
        ...

    async def ask(self, make_question: Callable[[int], BatchQuestion], reply_type: type[A]) -> A:
        """Ask about files or batches; raise what is said to be wrong."""
        ...

    async def health(self) -> Health:
        """Return whether jobs can be served."""
        ...


class TenantFilter(BaseModel):
    """What a job's routes take in the query; anything else is refused, so that no filter is ignored."""

    model_config = ConfigDict(extra="forbid")

    tenant_id: str | None = None
    """Only this tenant's: another one's job is not found."""


class Order(NamedTuple):
    """What somebody asks for: a route that runs jobs, its body, and what says whether it was asked for before."""

    path: str
    body: BaseModel
    client: Client
    key: str | None = None
    """The client's idempotency key."""
    after: str | None = None
    """The last event that the client has of the job."""
    after_param: str = "Last-Event-ID"
    key_param: str = "Idempotency-Key"
    """What the client calls these two."""


_REPLAYED = {"idempotent-replayed": "true"}


class Followed(NamedTuple):
    """A job that was taken on, and what happens to it."""

    job: Job
    telling: Telling
    batches: Batches
    headers: dict[str, str]
    """Of its answer, beside those that name the job."""


class Left(NamedTuple):
    """A job that nobody waits for and nobody is told of: it is to be submitted (`Desk.submit`)."""

    job: Job
    telling: Telling
    headers: dict[str, str]
    found: JobRecord | None = None
    """The job as it was, where the same was asked for before."""


Taken = Followed | Left


class Desk:
    """Takes jobs on, and answers HTTP requests for them."""

    def __init__(self, network: Network, settings: GatewaySettings) -> None:
        self._network = network
        self._settings = settings
        self._open_requests = OpenRequests(settings.max_open_requests)

    async def serve(self, path: str, body: BaseModel, request: Request) -> Response:
        """Run a job and answer with its result, with events, or with its id."""
        key, last_event_id = request.headers.get("idempotency-key"), request.headers.get("last-event-id")
        taken = await self.take(Order(path, body, client_of(request), key, last_event_id))
        job, telling = taken.job, taken.telling
        note_tenant(request.scope, job.tenant_id)
        if isinstance(taken, Left):
            try:
                acceptance = await self.submit(taken)
            except TetherError as exc:
                return failure(job, None, exc.to_info(), telling.fields)
            return accepted(taken, acceptance, self._settings)
        if job.stream:
            return await answer_stream(taken.batches, job, telling, self._settings, taken.headers)
        return await answer_whole(taken.batches, job, telling, request, taken.headers)

    async def stream(
        self,
        job_id: str,
        tenant_id: str | None,
        request: Request,
        after: str | None,
        *,
        after_param: str = "after",
        include_usage: bool = False,
    ) -> Response:
        """Tell a job's events, in the form of the route that it came by."""
        last_event_id = request.headers.get("last-event-id")
        name, place = (after_param, after) if last_event_id is None else ("Last-Event-ID", last_event_id)
        taken = await self.resume(job_id, tenant_id, place, name, include_usage=include_usage)
        return await answer_stream(taken.batches, taken.job, taken.telling, self._settings)

    async def take(self, order: Order) -> Taken:
        """Take a job on; raise `TetherError` with why not.

        With an idempotency key a job outlives whoever asks for it, since they come back; and where it was asked for
        before, that one's job is followed, however far it is.
        """
        route = JOB_ROUTES[order.path]
        tenant_id = order.client.tenant_for_job(getattr(order.body, "tenantId", None))
        job = route.make_job(order.body, self._settings, tenant_id)
        job = await self._continued(msgspec.structs.replace(job, key_id=order.client.key_id))
        if order.key is not None:
            return await self._take_once(order, order.key, job)
        if order.after is not None:
            raise InvalidRequest(
                f"a stream goes on with GET /v1/jobs/{{id}}/stream, or with the same request and its {order.key_param}",
                param=order.after_param,
            )
        return self._taken(job, route.telling(order.body)(job), stays=False)

    def _taken(self, job: Job, telling: Telling, *, stays: bool, found: JobRecord | None = None) -> Taken:
        """Return a job as it is run: one that `stays`, or that nobody has to wait for, outlives those that it is told to."""
        headers = {} if found is None else _REPLAYED
        if not job.wait and not job.stream:
            return Left(job, telling, headers, found)
        if found is None:
            batches = self._network.follow(job, stays or not job.wait)
        else:
            batches = self._network.watch(job.id, job.tenant_id)
        return Followed(job, telling, self._open_requests.read(batches, job.tenant_id), headers)

    async def _continued(self, job: Job) -> Job:
        """Return a job with the conversation that goes before it, where its request only names that."""
        previous_id = previous_of(job)
        if previous_id is None:
            return job
        try:
            before = await self._network.job(previous_id, job.tenant_id)
        except JobNotFound as exc:
            raise ResponseNotFound(f"there is no response resp_{previous_id}", param=PARAM) from exc
        if before.status in LIVE:
            raise JobConflict("the response before this one has not ended yet", param=PARAM)
        return continued(job, before, story_of(before))

    async def resume(
        self, job_id: str, tenant_id: str | None, after: str | None, param: str, *, include_usage: bool
    ) -> Followed:
        """Follow a job that was taken before, wherever that was, from its beginning or from behind an event on."""
        job = job_of(await self._network.job(job_id, tenant_id))
        telling = telling_of(job, seen=_seen(job, after, param), include_usage=include_usage)
        batches = self._open_requests.read(self._network.watch(job_id, tenant_id), job.tenant_id)
        return Followed(job, telling, batches, {})

    async def submit(self, taken: Left) -> JobAccepted:
        """Bring a job that nobody waits for to the network, unless it is there; return how it is."""
        if taken.found is not None:
            return JobAccepted(taken.job.id, taken.found.status, waiting=taken.found.waiting)
        return await self._network.submit(taken.job)

    async def cancel(self, job: Job) -> None:
        """End a job that was taken on; raise `TetherError` where that cannot be."""
        await self._network.cancel(job.id, job.tenant_id)

    async def _take_once(self, order: Order, key: str, job: Job) -> Taken:
        if re.fullmatch(r"[\x21-\x7e]{1,255}", key) is None:
            raise InvalidRequest(f"{order.key_param} has 1 to 255 visible ASCII characters", param=order.key_param)
        route, found = JOB_ROUTES[order.path], None
        fingerprint = fingerprint_of(order.path, order.body)
        try:
            claimed = await self._network.claim(job.tenant_id, key, fingerprint, job.id)
        except JobConflict as exc:
            exc.param = order.key_param
            raise
        if claimed.job is None:
            seed = job.sampling.seed if getattr(order.body, "seed", None) is not None else seed_of(claimed.job_id)
            sampling = msgspec.structs.replace(job.sampling, seed=seed)
            job = msgspec.structs.replace(job, id=claimed.job_id, sampling=sampling)
        else:
            # It was the same request, so its input is this one's, also where it was not kept.
            found = (
                claimed.job if claimed.job.input is not None else msgspec.structs.replace(claimed.job, input=job.input)
            )
            job = job_of(found)
        seen = _seen(job, order.after, order.after_param)
        return self._taken(job, route.telling(order.body)(job, seen=seen), stays=True, found=found)


def accepted_body(taken: Left, acceptance: JobAccepted) -> dict[str, Any]:
    """Return what is said of a job for which nobody waits."""
    if isinstance(taken.telling, ResponseAnswer):
        return {**taken.telling.body(), "status": "queued" if acceptance.status == "queued" else "in_progress"}
    told: dict[str, Any] = {"jobId": taken.job.id, "status": acceptance.status}
    if (waiting := acceptance.waiting) is not None:
        told |= {"place": waiting.place, "expectedSeconds": waiting.expected_seconds}
    return told


def accepted(taken: Left, acceptance: JobAccepted, settings: GatewaySettings) -> Response:
    """Answer for a job for which nobody waits."""
    headers = {**job_headers(taken.job), **taken.headers}
    headers |= quotas.headers(acceptance.limits) | waiting_headers(acceptance.waiting)
    if isinstance(taken.telling, ResponseAnswer):
        return JSONResponse(accepted_body(taken, acceptance), headers=headers)
    headers["Location"] = f"{settings.root_path}/v1/jobs/{taken.job.id}"
    return JSONResponse(accepted_body(taken, acceptance), 202, headers)


async def page_of(ask: Callable[[str | None, int], Awaitable[Sequence[R]]], after: str | None, limit: int) -> list[R]:
    """Return so many records from behind an id on; `ask` is asked again for those that did not fit into its answer."""
    found: list[R] = []
    while len(found) < limit and (more := await ask(found[-1].id if found else after, limit - len(found))):
        found += more
    return found


def checked_id(job_id: str) -> str:
    """Return what may be a job's id; what is far too long is none, and need not be asked for or repeated."""
    if len(job_id) > MAX_NAME:
        raise JobNotFound
    return job_id


def _seen(job: Job, after: str | None, param: str) -> Cursor | None:
    """Return how far a client has read a job's stream, by the event that it names."""
    if after is None:
        return None
    seen = Cursor.parse(after, job.sampling.n, param)
    if job.form == "response" and str(seen.chars[0]) != str(seen):
        raise InvalidRequest(f"{param} must be the sequence_number of an event of this stream", param=param)
    return seen
