"""A job's events as an HTTP answer: gathered into one body or told as server-sent events; and the one form of all errors."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Awaitable

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from tether import quotas
from tether.errors import ErrorInfo, JobCancelled, QueueFull, RateLimits, TenantQueueFull, TetherError, from_info
from tether.event_stream import EventStream, client_left
from tether.messages import JobAccepted, JobEnd, JobEvent, JobQueued, JobTokens
from tether.records import Job, Waiting
from tether.room import Room
from tether.settings import GatewaySettings
from tether.telling import Telling, Told, sse, tell

Batches = AsyncGenerator[list[JobEvent], None]

FIRST_TOKEN_SECONDS = 1.0
"""How long a stream's status may wait for the first token: so long a failure can still be told by the status."""


class ErrorDetail(BaseModel):
    """What went wrong, what it is called, and which parameter is at fault."""

    message: str
    type: str
    param: str | None
    code: str


class RefusalDetail(ErrorDetail):
    """Why no worker takes a job."""

    reasons: dict[str, int]
    """How many workers cannot, for each reason that there is."""


class ErrorBody(BaseModel):
    """The form of every error."""

    error: RefusalDetail | ErrorDetail


class WaitingBody(BaseModel):
    """Where a job stands in the queue; 1 is next."""

    place: int
    expected_seconds: float | None
    """When it is likely to get a slot; null while nobody can say."""

    @classmethod
    def of(cls, waiting: Waiting) -> WaitingBody:
        """Return where a job stands as it is answered."""
        return cls(place=waiting.place, expected_seconds=waiting.expected_seconds)


class OpenRequests:
    """The requests that wait for jobs; one too many is refused at once, and one tenant cannot have all of them."""

    def __init__(self, most: int) -> None:
        self._room = Room(most)

    async def read(self, batches: Batches, tenant_id: str) -> Batches:
        """Yield the job's events, if there is room for one more of its tenant."""
        refusal = self._refusal(tenant_id)
        if refusal is not None:
            await batches.aclose()
            raise refusal
        self._room.take(tenant_id)
        try:
            async with contextlib.aclosing(batches):
                async for events in batches:
                    yield events
        finally:
            self._room.leave(tenant_id)

    def _refusal(self, tenant_id: str) -> TetherError | None:
        match self._room.why_not(tenant_id):
            case "full":
                return QueueFull(
                    f"this gateway has {len(self._room)} requests open, which is all it takes; try again soon"
                )
            case "share":
                num_own = self._room.taken_by(tenant_id)
                return TenantQueueFull(f"this gateway has {num_own} requests of this tenant open, which is its share")
            case None:
                return None


async def answer_whole(
    batches: Batches, job: Job, answer: Telling, request: Request, headers: dict[str, str] | None = None
) -> Response:
    """Gather the answer; a client that leaves closes `batches`, which cancels the job where nobody comes back for it."""
    limits: RateLimits | None = None

    async def gather() -> None:
        nonlocal limits
        async with contextlib.aclosing(batches):
            async for events in batches:
                limits = limits or _limits(events)
                for event in events:
                    answer.add(event)

    await _unless_client_leaves(gather(), request)
    if answer.end is None:
        raise JobCancelled("the client left")  # nobody reads this, but the log does
    if answer.end.error is not None:
        return failure(job, answer.end, answer.end.error, answer.fields, limits)
    told = {**job_headers(job, answer.end), **quotas.headers(limits), **(headers or {})}
    return JSONResponse(answer.body(), headers=told)


async def _unless_client_leaves(work: Awaitable[None], request: Request) -> None:
    """Await `work`; cancel it when the client closes its connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(client_left(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def answer_stream(
    batches: Batches, job: Job, answer: Telling, settings: GatewaySettings, headers: dict[str, str] | None = None
) -> Response:
    """Answer with events. A refusal that comes before any of them is an ordinary error with its own status."""
    first: list[JobEvent] = []
    beginning = asyncio.ensure_future(_read_beginning(batches, answer, first))
    patience = FIRST_TOKEN_SECONDS if answer.waits_for_token else settings.keepalive_seconds
    try:
        await asyncio.wait([beginning], timeout=patience)
    except asyncio.CancelledError:
        await _stop(beginning)
        await batches.aclose()
        raise
    if beginning.done():
        beginning.result()
    end = first[-1] if first else None
    if isinstance(end, JobEnd) and end.error is not None and (end.attempt == 0 or answer.waits_for_token):
        await batches.aclose()
        if not any(isinstance(event, JobTokens) for event in first):
            return failure(job, end, end.error, answer.fields, _limits(first))

    async def portions() -> AsyncGenerator[bytes, None]:
        broken: TetherError | None = None
        try:
            async with contextlib.aclosing(batches):
                try:
                    num_told = len(first)
                    yield tell(answer, first)
                    await beginning
                finally:
                    await _stop(beginning)
                yield tell(answer, first[num_told:])
                async for events in batches:
                    yield tell(answer, events)
        except TetherError as exc:
            broken = exc
        if answer.end is not None and answer.end.error is not None:
            broken = named(from_info(answer.end.error), answer.fields)
        if broken is not None:
            yield sse(answer.error(error_detail(broken).model_dump()))

    sent = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **job_headers(job), **(headers or {})}
    sent |= quotas.headers(_limits(first)) | waiting_headers(_waiting(first))
    return EventStream(portions(), sent, silence_seconds=settings.keepalive_seconds)


def _limits(events: list[JobEvent]) -> RateLimits | None:
    """Return what is left to the client, as the job's acceptance says it."""
    return next((event.limits for event in events if isinstance(event, JobAccepted)), None)


def _waiting(events: list[JobEvent]) -> Waiting | None:
    """Return where the job stood at last, if it waited and has not begun yet."""
    for event in reversed(events):
        match event:
            case JobQueued(place=place, expected_seconds=seconds):
                return Waiting(place, seconds)
            case JobAccepted(waiting=waiting):
                return waiting
            case _:
                return None
    return None


async def _stop(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _read_beginning(batches: Batches, answer: Telling, first: list[JobEvent]) -> None:
    """Put the events into `first` from which a stream's status can be told."""
    async for events in batches:
        first += events
        if not answer.waits_for_token or any(isinstance(event, _DECISIVE) for event in events):
            return


_DECISIVE = (JobQueued, JobTokens, JobEnd)
"""What shows a stream's status: it goes on, or it has failed."""


def failure(
    job: Job, end: JobEnd | None, info: ErrorInfo, fields: dict[str, str], limits: RateLimits | None = None
) -> Response:
    """Answer a job that failed, with the field's name as the client wrote it."""
    return error_response(named(from_info(info), fields), {**job_headers(job, end), **quotas.headers(limits)})


def named(error: TetherError, fields: dict[str, str]) -> TetherError:
    """Return an error with its parameter as its client calls it."""
    error.param = fields.get(error.param, error.param) if error.param is not None else None
    return error


def job_headers(job: Job, end: JobEnd | None = None) -> dict[str, str]:
    """Return the headers that name a job."""
    headers = {"x-tether-job-id": job.id}
    if end is not None:
        headers["x-tether-attempts"] = str(end.attempt)
        if not end.exact:
            headers["x-tether-exact"] = "false"
    return headers


def waiting_headers(waiting: Waiting | None) -> dict[str, str]:
    """Return the headers that say where a job stands in the queue, and for how long it is likely to."""
    if waiting is None:
        return {}
    headers = {"x-tether-queue-place": str(waiting.place)}
    if waiting.expected_seconds is not None:
        headers["x-tether-expected-wait-seconds"] = f"{waiting.expected_seconds:g}"
    return headers


def error_detail(error: TetherError) -> ErrorDetail:
    """Return an error as it is told."""
    if error.reasons:
        return RefusalDetail(
            message=error.message, type=error.type, param=error.param, code=error.code, reasons=error.reasons
        )
    return ErrorDetail(message=error.message, type=error.type, param=error.param, code=error.code)


def error_response(error: TetherError, headers: dict[str, str] | None = None) -> Response:
    """Return an error in the one form that all have."""
    headers = {**(headers or {}), **error_headers(error)}
    return JSONResponse(ErrorBody(error=error_detail(error)).model_dump(), error.status, headers)


def last_event(error: TetherError) -> bytes:
    """Return the last event of a stream that breaks off, whatever it was telling."""
    return sse(Told({"error": error_detail(error).model_dump()}))


def is_stream(start: Message) -> bool:
    """Whether an answer that begins with this message is server-sent events."""
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def error_headers(error: TetherError) -> dict[str, str]:
    """Return the headers that an error's answer has."""
    headers = quotas.headers(error.limits)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return headers
