"""The routes that run jobs: what each takes, the job that becomes of it, and how its answer is told.

A request comes by HTTP or as a message on a socket; from here on there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel, ValidationError

from tether.cursor import Cursor
from tether.errors import InvalidRequest
from tether.infer_api import Answer, InferRequest, to_job
from tether.openai_api import ChatAnswer, CompletionAnswer, chat_job, completion_job
from tether.openai_embeddings import EmbeddingAnswer, EmbeddingRequest, embedding_job
from tether.openai_responses import ResponseAnswer, ResponseRequest, response_job
from tether.openai_schemas import ChatRequest, CompletionRequest
from tether.records import Job
from tether.refusals import refusal
from tether.settings import GatewaySettings
from tether.telling import Telling


class MakeTelling(Protocol):
    """Makes what tells a job's answer, from behind `seen` on."""

    def __call__(self, job: Job, *, seen: Cursor | None = None) -> Telling: ...  # noqa: D102 - as the class says


class JobRoute(NamedTuple):
    """A route that runs jobs."""

    body: type[BaseModel]
    make_job: Callable[[Any, GatewaySettings, str | None], Job]
    """From a body, and the tenant where a key says it."""
    telling: Callable[[Any], MakeTelling]
    """How the answer to a body is told."""


def _with_usage(kind: type[ChatAnswer | CompletionAnswer]) -> Callable[[Any], MakeTelling]:
    def telling(body: ChatRequest | CompletionRequest) -> MakeTelling:
        options = body.stream_options
        return partial(kind, include_usage=options is not None and bool(options.include_usage))

    return telling


JOB_ROUTES: Mapping[str, JobRoute] = {
    "/infer": JobRoute(InferRequest, to_job, lambda _: Answer),
    "/v1/chat/completions": JobRoute(ChatRequest, chat_job, _with_usage(ChatAnswer)),
    "/v1/completions": JobRoute(CompletionRequest, completion_job, _with_usage(CompletionAnswer)),
    "/v1/responses": JobRoute(ResponseRequest, response_job, lambda _: ResponseAnswer),
    "/v1/embeddings": JobRoute(
        EmbeddingRequest, embedding_job, lambda body: partial(EmbeddingAnswer, encoding=body.encoding_format or "float")
    ),
}


def parse_body(path: str, value: Any) -> BaseModel:
    """Return the body of a request to the route at `path`; raise `InvalidRequest` with what is wrong first."""
    route = JOB_ROUTES.get(path)
    if route is None:
        raise InvalidRequest(f"url is one of {', '.join(JOB_ROUTES)}", param="url")
    try:
        return route.body.model_validate(value)
    except ValidationError as exc:
        raise refusal(exc.errors(include_url=False), "field", route.body.model_fields) from exc


def telling_of(job: Job, *, seen: Cursor | None, include_usage: bool) -> Telling:
    """Return what tells a job in the form of the route that it came by."""
    match job.form:
        case "text":
            return Answer(job, seen=seen)
        case "response":
            return ResponseAnswer(job, seen=seen)
        case "chat":
            return ChatAnswer(job, include_usage=include_usage, seen=seen)
        case "prompt":
            return CompletionAnswer(job, include_usage=include_usage, seen=seen)
        case "embedding":
            return EmbeddingAnswer(job, seen=seen)
