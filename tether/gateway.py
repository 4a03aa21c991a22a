"""The gateway's HTTP side: routes, streaming, the one table from errors to answers. The only importer of fastapi.

A request becomes a `Job`, and a job's events become a JSON answer or server-sent events (infer_api.py says how); in
between it belongs to the network behind the bridge (submissions.py).
"""

from __future__ import annotations

import asyncio
import difflib
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.websockets import WebSocket

from tether import __version__, api_document, explain_api
from tether.api_page import render
from tether.auth import Access
from tether.desk import Desk, Network, TenantFilter, checked_id, page_of
from tether.door import Door, client_of, path_of
from tether.errors import (
    BodyTooLarge,
    Draining,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NoWorker,
    RouteNotFound,
    TetherError,
    UpgradeRequired,
    from_info,
)
from tether.explain_api import ExplainFilter, ExplanationBody
from tether.file_desk import BatchFilter, BatchRequest, FileDesk, FileFilter, FileQuery
from tether.guard import Cors, Guard
from tether.infer_api import InferAccepted, InferAnswer, InferRequest
from tether.job_routes import JOB_ROUTES
from tether.last_resort import LastResort
from tether.messages import Health
from tether.openai_api import model_body
from tether.openai_embeddings import EmbeddingRequest
from tether.openai_responses import ResponseRequest
from tether.openai_schemas import ChatRequest, CompletionRequest
from tether.records import JobRecord, JobStatus, ServedModel
from tether.refusals import refusal, why_unreadable
from tether.replies import (
    ErrorDetail,
    WaitingBody,
    error_detail,
    error_response,
)
from tether.response_desk import DeletedResponse, ItemFilter, ResponseDesk, ResponseFilter
from tether.settings import GatewaySettings
from tether.sockets import Sockets

# --- bodies ----------------------------------------------------------------------------------------------------------


class JobBody(BaseModel):
    """A job as the ledger has it."""

    id: str
    object: Literal["job"] = "job"
    tenant_id: str
    model: str
    version: str
    status: JobStatus
    attempts: int
    exact: bool
    input: str | None
    result: str | None
    finish_reason: str | None
    error: ErrorDetail | None
    prompt_tokens: int
    completion_tokens: int
    seed: int
    worker_id: str | None
    waiting: WaitingBody | None
    """Where it stands in the queue, while it does."""
    user: str | None
    metadata: dict[str, str]
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
            exact=record.exact,
            input=record.input,
            result=record.result,
            finish_reason=record.finish_reason,
            error=error_detail(from_info(record.error)) if record.error else None,
            prompt_tokens=record.usage.prompt_tokens,
            completion_tokens=record.usage.completion_tokens,
            seed=record.sampling.seed,
            worker_id=record.worker_id,
            waiting=WaitingBody.of(record.waiting) if record.waiting is not None else None,
            user=record.user,
            metadata=record.metadata,
            created_at=record.created_at,
            started_at=record.started_at,
            ended_at=record.ended_at,
        )


class JobList(BaseModel):
    """A page of jobs, newest first; the next one begins `before` the last id. Texts are left out."""

    object: Literal["list"] = "list"
    data: list[JobBody]
    has_more: bool


class ModelBody(BaseModel):
    """A model that can be served now."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    version: str
    context_window: int
    """Tokens that prompt and answer may have together."""
    workers: int
    slots: int
    toy: bool


class ModelList(BaseModel):
    """The models that can be served now."""

    object: Literal["list"] = "list"
    data: list[ModelBody]


class JobFilter(TenantFilter):
    """What the listing takes in the query."""

    status: JobStatus | None = None
    model: str | None = None
    before: Annotated[str | None, Field(description="only jobs older than this id")] = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class StreamFilter(TenantFilter):
    """What a job's stream takes in the query."""

    after: Annotated[str | None, Field(description="the id of the last event that you have")] = None
    include_usage: bool = False


_FILTERS: tuple[type[BaseModel], ...] = (
    JobFilter,
    StreamFilter,
    ResponseFilter,
    ExplainFilter,
    FileFilter,
    BatchFilter,
)


class Readiness(BaseModel):
    """What `/readyz` says when jobs can be served."""

    status: Literal["ready"] = "ready"
    workers: int
    ready_workers: int
    queued: int
    running: int
    reasons: dict[str, int]
    """How many of the other workers take no job, by why."""


class Liveness(BaseModel):
    """What `/healthz` says."""

    status: Literal["ok"] = "ok"
    version: str = __version__


# --- the application -------------------------------------------------------------------------------------------------


def create_app(network: Network, settings: GatewaySettings, stopping: asyncio.Event | None = None) -> FastAPI:
    """Return the HTTP application over `network`; from `stopping` on it takes no new jobs on sockets, and is not ready."""
    stopping = stopping or asyncio.Event()
    app = FastAPI(
        title="Tether",
        version=__version__,
        summary="Ordinary machines that serve language models together.",
        responses=api_document.ERRORS,
        root_path=settings.root_path,
        redirect_slashes=False,
        docs_url=None,  # the framework's page loads its scripts from others
        redoc_url=None,
        exception_handlers={
            TetherError: _answer_error,
            RequestValidationError: _answer_invalid,
            HTTPException: _answer_http,
        },
    )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    desk = Desk(network, settings)

    @app.post("/infer", responses={200: {"model": InferAnswer}, 202: {"model": InferAccepted}})
    async def infer(body: InferRequest, request: Request) -> Response:
        """Run one input on one model, and answer with the result, with events, or with the job's id."""
        return await desk.serve("/infer", body, request)

    _add_openai_routes(app, network, desk)
    _add_response_routes(app, ResponseDesk(network, desk))
    _add_file_routes(app, FileDesk(network, settings))
    _add_sockets(app, Sockets(desk, settings, stopping))

    @app.get("/v1/jobs/{job_id}/stream", response_class=StreamingResponse)
    async def stream_job(job_id: str, request: Request, query: Annotated[StreamFilter, Query()]) -> Response:
        """Tell a job's events from its beginning, or from behind an event; `Last-Event-ID` counts before `after`."""
        tenant_id = client_of(request).tenant_to_see(query.tenant_id, job_id=checked_id(job_id))
        return await desk.stream(job_id, tenant_id, request, query.after, include_usage=query.include_usage)

    @app.get("/v1/jobs/{job_id}")
    async def get_job(job_id: str, request: Request, query: Annotated[TenantFilter, Query()]) -> JobBody:
        """Return a job, with its input and result where they are kept."""
        tenant_id = client_of(request).tenant_to_see(query.tenant_id, job_id=checked_id(job_id))
        return JobBody.of(await network.job(job_id, tenant_id))

    @app.get("/v1/jobs")
    async def list_jobs(request: Request, query: Annotated[JobFilter, Query()]) -> JobList:
        """Return jobs, newest first, without their texts."""
        tenant_id = client_of(request).tenant_to_see(query.tenant_id)
        ask = partial(network.jobs, tenant_id, query.status, query.model)
        records = await page_of(ask, query.before, query.limit + 1)
        data = [JobBody.of(record) for record in records[: query.limit]]
        return JobList(data=data, has_more=len(records) > query.limit)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel_job(job_id: str, request: Request, query: Annotated[TenantFilter, Query()]) -> JobBody:
        """Cancel a job that has not ended; answer with the job after its end."""
        client = client_of(request)
        tenant_id = client.tenant_to_see(query.tenant_id, job_id=checked_id(job_id))
        return JobBody.of(await network.cancel(job_id, tenant_id, client.actor))

    _add_explain(app, network, settings)

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
        if stopping.is_set():
            raise Draining("this gateway is stopping")
        health = await network.health()
        if health.store is not None:
            raise from_info(health.store)
        if health.num_ready_workers == 0:
            raise _not_ready(health)
        return Readiness(
            workers=health.num_workers,
            ready_workers=health.num_ready_workers,
            queued=health.num_queued,
            running=health.num_running,
            reasons=health.reasons,
        )

    _add_middleware(app, network, settings)
    return app


def _not_ready(health: Health) -> NoWorker:
    if health.num_workers == 0:
        return NoWorker("no worker is connected: start one, such as `tether worker --model demo`")
    return NoWorker(
        f"no worker takes jobs now: {health.why}; `tether workers list` says which is which", reasons=health.reasons
    )


def _add_middleware(app: FastAPI, network: Network, settings: GatewaySettings) -> None:
    """Add what stands around every route, the innermost first."""
    app.add_middleware(Door, access=Access(network, always=not settings.is_loopback))
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(LastResort)
    if settings.cors_origins:
        app.add_middleware(Cors, settings=settings)


def _add_explain(app: FastAPI, network: Network, settings: GatewaySettings) -> None:
    """Add the route that says what would happen to a job."""

    @app.get("/v1/explain")
    async def explain(request: Request, query: Annotated[ExplainFilter, Query()]) -> ExplanationBody:
        """Say what would happen to a job that came now, and why, worker by worker."""
        client = client_of(request)
        job = explain_api.to_job(query, settings, client)
        return ExplanationBody.of(await network.explain(job, sees_all=client.sees_all))


def _add_sockets(app: FastAPI, sockets: Sockets) -> None:
    """Add the route for many jobs on one socket, and an answer for a handshake anywhere else."""

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        """Run several jobs on one socket (sockets.py)."""
        await sockets.serve(websocket)

    @app.get("/v1/stream", include_in_schema=False)
    async def no_socket() -> Response:
        """Say what the route is."""
        return error_response(UpgradeRequired(), {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"})

    @app.websocket("/{path:path}")
    async def nowhere(websocket: WebSocket) -> None:
        """Refuse a handshake in the form that all errors have."""
        error = RouteNotFound("there is no such socket; it is at /v1/stream")
        await error_response(error)(websocket.scope, websocket.receive, websocket.send)


def _add_openai_routes(app: FastAPI, network: Network, desk: Desk) -> None:
    """Add the routes of the OpenAI dialect."""

    @app.post("/v1/chat/completions", responses=api_document.CHAT)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, in OpenAI's form."""
        return await desk.serve("/v1/chat/completions", body, request)

    @app.post("/v1/completions", responses=api_document.COMPLETION)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Go on with a prompt as it stands, in OpenAI's form."""
        return await desk.serve("/v1/completions", body, request)

    @app.post("/v1/responses", responses=api_document.RESPONSE)
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer in the form of OpenAI's Responses."""
        return await desk.serve("/v1/responses", body, request)

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Return a vector for each input, in OpenAI's form."""
        return await desk.serve("/v1/embeddings", body, request)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """Return the models that can be served now."""
        return ModelList(data=[ModelBody(**model_body(model)) for model in await network.models()])

    @app.get("/v1/models/{model:path}")
    async def get_model(model: str) -> ModelBody:
        """Return a model that can be served now, by its name or as `name@version`."""
        return ModelBody(**model_body(_find_model(await network.models(), model)))


def _add_response_routes(app: FastAPI, desk: ResponseDesk) -> None:
    """Add the routes of responses that were made before."""

    @app.get("/v1/responses/{response_id}", responses=api_document.RESPONSE)
    async def get_response(response_id: str, request: Request, query: Annotated[ResponseFilter, Query()]) -> Response:
        """Return a response as far as it is, or stream it from its beginning or from behind an event."""
        return await desk.get(response_id, request, query)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(
        response_id: str, request: Request, query: Annotated[TenantFilter, Query()]
    ) -> DeletedResponse:
        """Delete what is kept of a response, which is cancelled where it has not ended."""
        return await desk.delete(response_id, request, query)

    @app.get("/v1/responses/{response_id}/input_items")
    async def get_input_items(
        response_id: str, request: Request, query: Annotated[ItemFilter, Query()]
    ) -> dict[str, Any]:
        """Return what the model read for a response, as items."""
        return await desk.items(response_id, request, query)

    @app.post("/v1/responses/{response_id}/cancel", responses=api_document.RESPONSE_FOUND)
    async def cancel_response(response_id: str, request: Request, query: Annotated[TenantFilter, Query()]) -> Response:
        """Cancel a response that has not ended."""
        return await desk.cancel(response_id, request, query)


def _add_file_routes(app: FastAPI, desk: FileDesk) -> None:
    """Add the routes of files and batches."""

    @app.post("/v1/files", openapi_extra=api_document.UPLOAD)
    async def upload_file(request: Request) -> Response:
        """Upload the requests of a batch, one JSON object on each line."""
        return await desk.upload(request)

    @app.get("/v1/files")
    async def list_files(request: Request, query: Annotated[FileFilter, Query()]) -> Response:
        """Return files, newest first."""
        return await desk.files(request, query)

    @app.get("/v1/files/{file_id}")
    async def get_file(file_id: str, request: Request, query: Annotated[FileQuery, Query()]) -> Response:
        """Return what is known of a file."""
        return await desk.file(file_id, request, query)

    @app.get("/v1/files/{file_id}/content", response_class=StreamingResponse)
    async def get_content(file_id: str, request: Request, query: Annotated[FileQuery, Query()]) -> Response:
        """Return a file's content."""
        return await desk.content(file_id, request, query)

    @app.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, request: Request, query: Annotated[FileQuery, Query()]) -> Response:
        """Delete a file."""
        return await desk.delete(file_id, request, query)

    @app.post("/v1/batches")
    async def create_batch(body: BatchRequest, request: Request) -> Response:
        """Run the requests of a file when there is room, within a day."""
        return await desk.create_batch(body, request)

    @app.get("/v1/batches")
    async def list_batches(request: Request, query: Annotated[BatchFilter, Query()]) -> Response:
        """Return batches, newest first."""
        return await desk.batches(request, query)

    @app.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str, request: Request, query: Annotated[FileQuery, Query()]) -> Response:
        """Return a batch, as far as it is."""
        return await desk.batch(batch_id, request, query)

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request, query: Annotated[FileQuery, Query()]) -> Response:
        """Cancel a batch that has not ended; what is done by then is in its files."""
        return await desk.cancel_batch(batch_id, request, query)


def _find_model(models: list[ServedModel], name: str) -> ServedModel:
    for model in models:
        if name == f"{model.name}@{model.version}" or (model.is_newest and name == model.name):
            return model
    near = difflib.get_close_matches(name, [model.name for model in models], n=3, cutoff=0.5)
    served = ", ".join(sorted({model.name for model in models})) or "nothing"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"served now: {served}"
    raise ModelNotFound(f"no worker serves a model {name!r}; {hint}", param="model")


# --- errors ----------------------------------------------------------------------------------------------------------


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(error if isinstance(error, TetherError) else InternalError())


async def _answer_http(request: Request, error: Exception) -> Response:
    """Translate what the framework itself refuses."""
    if not isinstance(error, HTTPException):
        return error_response(InternalError())
    match error.status_code:
        case 404:
            return error_response(RouteNotFound("there is no such route; /docs lists them"))
        case 405:
            return error_response(MethodNotAllowed(), {"Allow": ", ".join(_methods(request))})
        case 413:
            return error_response(BodyTooLarge(error.detail))
        case status if status < 500:
            return error_response(InvalidRequest(why_unreadable("the body", error.__cause__) or error.detail))
        case _:
            return error_response(InternalError())


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Say the first thing that is wrong with a request, and where."""
    if not isinstance(error, RequestValidationError) or not error.errors():
        return error_response(InternalError())
    first = error.errors()[0]
    kind, (part, *place) = first["type"], first["loc"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return error_response(InvalidRequest(f"the body is not JSON: {reason} at character {place[0] if place else 0}"))
    if not place:
        return error_response(
            InvalidRequest("the body must be a JSON object, sent with the header Content-Type: application/json")
        )
    wrong = {**first, "loc": place}
    if part == "body":
        route = JOB_ROUTES.get(path_of(request.scope))
        schema = BatchRequest if route is None else route.body
        return error_response(refusal([wrong], "field", schema.model_fields))
    known = [name for each in _FILTERS for name in each.model_fields]
    return error_response(refusal([wrong], "parameter", known))


def _methods(request: Request) -> list[str]:
    """Return the methods that a request's path takes; the framework tells those of its first route alone."""
    app: FastAPI = request.app
    found = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in found for method in getattr(route, "methods", None) or ()})


# --- the document ------------------------------------------------------------------------------------------------------


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document."""
    if app.openapi_schema is None:
        servers = [{"url": app.root_path}] if app.root_path else None
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes, servers=servers
        )
        app.openapi_schema = api_document.finish(document)
    return app.openapi_schema
