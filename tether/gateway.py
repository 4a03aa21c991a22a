"""The gateway's HTTP side: routes, streaming, the one table from errors to answers. The only importer of fastapi.

A request becomes a `Job`, and a job's events become a JSON answer or server-sent events (infer_api.py says how); in
between it belongs to the network behind the bridge (submissions.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import math
import re
import secrets
from collections.abc import AsyncGenerator, Awaitable
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether import __version__
from tether.api_page import render
from tether.errors import (
    BodyTooLarge,
    ErrorInfo,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobNotFound,
    MethodNotAllowed,
    NoWorker,
    QueueFull,
    RouteNotFound,
    TetherError,
    from_info,
)
from tether.infer_api import FIELDS, MAX_NAME, Answer, InferAccepted, InferAnswer, InferRequest, sse, to_job
from tether.messages import Health, JobEnd, JobEvent
from tether.records import Job, JobRecord, JobStatus
from tether.settings import GatewaySettings

log = logging.getLogger(__name__)


class Network(Protocol):
    """What the HTTP side needs of the network behind it."""

    def follow(self, job: Job) -> AsyncGenerator[list[JobEvent], None]:
        """Submit a job and yield its events, all that wait at a time; the last is its `JobEnd`."""
        ...

    async def submit(self, job: Job) -> JobStatus:
        """Submit a job that nobody waits for; return its status when it is in the ledger."""
        ...

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record."""
        ...

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first."""
        ...

    async def cancel(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """End a job; return its record after its end."""
        ...

    async def health(self) -> Health:
        """Return whether jobs can be served."""
        ...


# --- bodies ----------------------------------------------------------------------------------------------------------


class ErrorDetail(BaseModel):
    """What went wrong, what it is called, and which parameter is at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetail


class JobBody(BaseModel):
    """A job as the ledger has it."""

    id: str
    object: Literal["job"] = "job"
    tenant_id: str
    model: str
    version: str
    status: JobStatus
    attempts: int
    input: str | None
    result: str | None
    finish_reason: str | None
    error: ErrorDetail | None
    prompt_tokens: int
    completion_tokens: int
    seed: int
    worker_id: str | None
    created_at: float
    started_at: float | None
    ended_at: float | None

    @classmethod
    def of(cls, record: JobRecord) -> JobBody:
        """Return a record as it is answered."""
        return cls(
            id=record.id,
            tenant_id=record.tenant_id,
            model=record.model,
            version=record.version,
            status=record.status,
            attempts=record.attempt,
            input=record.input,
            result=record.result,
            finish_reason=record.finish_reason,
            error=_error_detail(from_info(record.error)) if record.error else None,
            prompt_tokens=record.usage.prompt_tokens,
            completion_tokens=record.usage.completion_tokens,
            seed=record.sampling.seed,
            worker_id=record.worker_id,
            created_at=record.created_at,
            started_at=record.started_at,
            ended_at=record.ended_at,
        )


class JobList(BaseModel):
    """A page of jobs, newest first; the next one begins `before` the last id. Texts are left out."""

    object: Literal["list"] = "list"
    data: list[JobBody]
    has_more: bool


class TenantFilter(BaseModel):
    """What a job's routes take in the query; anything else is refused, so that no filter is ignored."""

    model_config = ConfigDict(extra="forbid")

    tenant_id: str | None = None
    """Only this tenant's: another one's job is not found."""


class JobFilter(TenantFilter):
    """What the listing takes in the query."""

    status: JobStatus | None = None
    model: str | None = None
    before: Annotated[str | None, Field(description="only jobs older than this id")] = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class Readiness(BaseModel):
    """What `/readyz` says when jobs can be served."""

    status: Literal["ready"] = "ready"
    workers: int
    ready_workers: int
    queued: int
    running: int


class Liveness(BaseModel):
    """What `/healthz` says."""

    status: Literal["ok"] = "ok"
    version: str = __version__


# --- the application -------------------------------------------------------------------------------------------------

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is not valid",
        404: "No such job, model or route",
        405: "The route does not take this method",
        409: "The job is not in a state that allows this",
        413: "The body is too large",
        429: "The tenant's requests of this minute are used up; `Retry-After` says when to try again",
        500: "A mistake of Tether",
        502: "The job failed",
        503: "No orchestrator, worker, store or place in the queue; `Retry-After` says when to try again",
        504: "The job's deadline passed",
    }.items()
}


def create_app(network: Network, settings: GatewaySettings) -> FastAPI:
    """Return the HTTP application over `network`."""
    app = FastAPI(
        title="Tether",
        version=__version__,
        summary="Ordinary machines that serve language models together.",
        responses=_ERRORS,
        root_path=settings.root_path,
        redirect_slashes=False,
        docs_url=None,  # the framework's page loads its scripts from others
        redoc_url=None,
        exception_handlers={
            TetherError: _answer_error,
            RequestValidationError: _answer_invalid,
            HTTPException: _answer_http,
            Exception: _answer_bug,
        },
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    open_requests = _OpenRequests(settings.max_open_requests)

    @app.post("/infer", responses={200: {"model": InferAnswer}, 202: {"model": InferAccepted}})
    async def infer(body: InferRequest, request: Request) -> Response:
        """Run one input on one model, and answer with the result, with events, or with the job's id."""
        job = to_job(body, settings)
        try:
            return await _answer_job(network, open_requests, job, request, settings)
        except TetherError as exc:
            return _failure(job, None, exc.to_info())

    @app.get("/v1/jobs/{job_id}")
    async def get_job(job_id: str, query: Annotated[TenantFilter, Query()]) -> JobBody:
        """Return a job, with its input and result where they are kept."""
        return JobBody.of(await network.job(_checked_id(job_id), query.tenant_id))

    @app.get("/v1/jobs")
    async def list_jobs(query: Annotated[JobFilter, Query()]) -> JobList:
        """Return jobs, newest first, without their texts."""
        records = await network.jobs(query.tenant_id, query.status, query.model, query.before, query.limit + 1)
        data = [JobBody.of(record) for record in records[: query.limit]]
        return JobList(data=data, has_more=len(records) > query.limit)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel_job(job_id: str, query: Annotated[TenantFilter, Query()]) -> JobBody:
        """Cancel a job that has not ended; answer with the job after its end."""
        return JobBody.of(await network.cancel(_checked_id(job_id), query.tenant_id))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Show the API to people, without asking anybody else for anything."""
        return HTMLResponse(render(app.openapi()))

    @app.get("/healthz", responses={})
    async def healthz() -> Liveness:
        """Say that this gateway is alive."""
        return Liveness()

    @app.get("/readyz")
    async def readyz() -> Readiness:
        """Say whether a job could be served now, or what is missing."""
        health = await network.health()
        if health.store is not None:
            raise from_info(health.store)
        if health.num_ready_workers == 0:
            raise NoWorker(f"{health.num_workers} workers are connected, none of them is ready")
        return Readiness(
            workers=health.num_workers,
            ready_workers=health.num_ready_workers,
            queued=health.num_queued,
            running=health.num_running,
        )

    app.add_middleware(_Guard, max_body_bytes=settings.max_body_bytes, hosts=frozenset(settings.hosts))
    return app


class _OpenRequests:
    """The requests that wait for jobs; one too many is refused at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_open = 0

    async def follow(self, network: Network, job: Job) -> AsyncGenerator[list[JobEvent], None]:
        """Follow the job, if there is room for one more."""
        if self._num_open >= self._most:
            raise QueueFull(f"this gateway has {self._num_open} requests open, which is all it takes; try again soon")
        self._num_open += 1
        try:
            async with contextlib.aclosing(network.follow(job)) as batches:
                async for events in batches:
                    yield events
        finally:
            self._num_open -= 1


# --- answers ---------------------------------------------------------------------------------------------------------

Batches = AsyncGenerator[list[JobEvent], None]


async def _answer_job(
    network: Network, open_requests: _OpenRequests, job: Job, request: Request, settings: GatewaySettings
) -> Response:
    """Answer in the way that the client asked for."""
    if not job.wait:
        status = await network.submit(job)
        headers = {"Location": f"{settings.root_path}/v1/jobs/{job.id}", **_job_headers(job)}
        return JSONResponse({"jobId": job.id, "status": status}, 202, headers)
    batches = open_requests.follow(network, job)
    if job.stream:
        return await _answer_stream(batches, job, settings)
    return await _answer_whole(batches, job, request)


async def _answer_whole(batches: Batches, job: Job, request: Request) -> Response:
    """Gather the answer; a client that leaves cancels the job."""
    answer = Answer(job)

    async def gather() -> None:
        async with contextlib.aclosing(batches):
            async for events in batches:
                for event in events:
                    answer.add(event)

    await _unless_client_leaves(gather(), request)
    if answer.end is None:
        raise JobCancelled("the client left")  # nobody reads this, but the log does
    if answer.end.error is not None:
        return _failure(job, answer.end, answer.end.error)
    return JSONResponse(answer.body(), headers=_job_headers(job, answer.end))


async def _unless_client_leaves(work: Awaitable[None], request: Request) -> None:
    """Await `work`; cancel it when the client closes its connection."""

    async def until_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(until_left())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _answer_stream(batches: Batches, job: Job, settings: GatewaySettings) -> Response:
    """Answer with events. A refusal that comes before any of them is an ordinary error with its own status."""
    first = await anext(batches)
    refusal = next((event for event in first if isinstance(event, JobEnd) and event.error is not None), None)
    if refusal is not None and refusal.error is not None and refusal.attempt == 0:
        await batches.aclose()
        return _failure(job, refusal, refusal.error)

    async def lines() -> AsyncGenerator[bytes, None]:
        answer = Answer(job)
        failure: TetherError | None = None
        try:
            async with contextlib.aclosing(_with_pauses(first, batches, settings.keepalive_seconds)) as portions:
                async for events in portions:
                    if not events:
                        yield b": still here\n\n"
                    elif portion := b"".join(map(answer.line, events)):
                        yield portion
        except TetherError as exc:
            failure = exc
        if answer.end is not None and answer.end.error is not None:
            failure = from_info(answer.end.error)
        if failure is not None:
            yield sse({"jobId": job.id, "error": _error_detail(failure).model_dump()})

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **_job_headers(job)}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def _with_pauses(first: list[JobEvent], batches: Batches, seconds: float) -> Batches:
    """Yield `first` and then `batches`, and an empty list each time that nothing came for `seconds`."""
    coming: asyncio.Task[list[JobEvent] | None] | None = None

    async def take() -> list[JobEvent] | None:
        return await anext(batches, None)

    try:
        yield first
        while True:
            coming = coming or asyncio.create_task(take())
            done, _ = await asyncio.wait([coming], timeout=seconds)
            if not done:
                yield []
                continue
            events, coming = coming.result(), None
            if events is None:
                return
            yield events
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await batches.aclose()


def _checked_id(job_id: str) -> str:
    """Return what may be a job's id; what is far too long is none, and need not be asked for or repeated."""
    if len(job_id) > MAX_NAME:
        raise JobNotFound
    return job_id


def _failure(job: Job, end: JobEnd | None, info: ErrorInfo) -> Response:
    """Answer a job that failed, with the field's name as the client wrote it."""
    error = from_info(info)
    error.param = FIELDS.get(info.param, info.param) if info.param is not None else None
    return _error_response(error, _job_headers(job, end))


def _job_headers(job: Job, end: JobEnd | None = None) -> dict[str, str]:
    headers = {"x-tether-job-id": job.id}
    if end is not None:
        headers["x-tether-attempts"] = str(end.attempt)
    return headers


# --- errors ----------------------------------------------------------------------------------------------------------


def _error_detail(error: TetherError) -> ErrorDetail:
    return ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)


def _error_response(error: TetherError, headers: dict[str, str] | None = None) -> Response:
    """Return an error in the one form that all have."""
    headers = dict(headers or {})
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return JSONResponse(ErrorBody(error=_error_detail(error)).model_dump(), error.status, headers)


async def _answer_error(_: Request, error: Exception) -> Response:
    return _error_response(error if isinstance(error, TetherError) else InternalError())


async def _answer_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(InternalError())


async def _answer_http(_: Request, error: Exception) -> Response:
    """Translate what the framework itself refuses."""
    if not isinstance(error, HTTPException):
        return _error_response(InternalError())
    match error.status_code:
        case 404:
            return _error_response(RouteNotFound("there is no such route; /docs lists them"))
        case 405:
            return _error_response(MethodNotAllowed(), dict(error.headers or {}))
        case 413:
            return _error_response(BodyTooLarge(error.detail))
        case status if status < 500:
            return _error_response(InvalidRequest(_why_unreadable(error)))
        case _:
            return _error_response(InternalError())


def _why_unreadable(error: HTTPException) -> str:
    """Say what the framework found wrong with a body; it tells only that something is."""
    match error.__cause__:
        case UnicodeDecodeError():
            return "the body is not UTF-8"
        case RecursionError():
            return "the body is nested too deeply"
        case ValueError():
            return "the body has a number that is too large"
        case _:
            return error.detail


async def _answer_invalid(_: Request, error: Exception) -> Response:
    """Say the first thing that is wrong with a request, and where."""
    if not isinstance(error, RequestValidationError) or not error.errors():
        return _error_response(InternalError())
    first = error.errors()[0]
    place, kind = [str(part) for part in first["loc"][1:]], first["type"]
    param = ".".join(place) or None
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return _error_response(
            InvalidRequest(f"the body is not JSON: {reason} at character {place[0] if place else 0}")
        )
    if not place:
        return _error_response(
            InvalidRequest("the body must be a JSON object, sent with the header Content-Type: application/json")
        )
    if kind == "missing":
        message = f"the field {param!r} is missing"
    elif kind == "extra_forbidden":
        known = InferRequest.model_fields if first["loc"][0] == "body" else JobFilter.model_fields
        near = difflib.get_close_matches(place[-1], known, n=1)
        message = f"there is no {'field' if first['loc'][0] == 'body' else 'parameter'} {param!r}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    else:
        text = re.sub(r"^Input should be ", "it should be ", first["msg"])
        message = f"{param}: {text[:1].lower()}{text[1:]}"
    return _error_response(InvalidRequest(message, param=param))


# --- around every request --------------------------------------------------------------------------------------------


class _Guard:
    """Bounds the body, gives each request an id, and answers only for its own names, before anything is read.

    Without the last a web page could have its own name resolve to this machine, and read every job through a browser here
    (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, hosts: frozenset[str]) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[\x21-\x7e]{1,128}", request_id):
            request_id = secrets.token_hex(8)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if (
            headers.get("content-length", "0").isdecimal()
            and int(headers.get("content-length", 0)) > self._max_body_bytes
        ):
            await _error_response(BodyTooLarge(self._limit), {"Connection": "close"})(scope, receive, send_with_id)
            return
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if host not in self._hosts:
            message = f"this gateway does not answer for {host[:MAX_NAME]!r}; start it with --allowed-host to let it"
            await _error_response(InvalidRequest(message, param="host"))(scope, receive, send_with_id)
            return
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._limit)
            return message

        await self._app(scope, receive_bounded, send_with_id)

    @property
    def _limit(self) -> str:
        return f"the body is larger than {self._max_body_bytes} bytes, the most that this gateway takes"


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, without the 422 that the framework adds and this gateway never answers."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
