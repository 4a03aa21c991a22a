"""What the OpenAPI document says of answers: every error, streams, and the bodies in OpenAI's form.

Requests are described by their models; these are what a client may rely on beside them, as JSON schemas.
"""

from __future__ import annotations

from typing import Any, Final

from tether.door import OPEN_PATHS
from tether.replies import ErrorBody

Responses = dict[int | str, dict[str, Any]]

ERRORS: Final[Responses] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is not valid",
        401: "The gateway needs an API key, and this is none that is good",
        403: "The API key may not do that",
        404: "No such job, file, batch, model or route",
        405: "The route does not take this method",
        408: "The request did not come in time",
        409: "The job is not in a state that allows this",
        413: "The body is too large",
        429: "A limit, or the tenant's share of the queue, is reached; `Retry-After` says when to try again",
        431: "The request's line and headers are too large",
        500: "A mistake of Tether",
        502: "The job failed",
        503: "No orchestrator, worker, store or place in the queue; `Retry-After` says when to try again",
        504: "The job's deadline passed",
    }.items()
}

UPLOAD: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has at least these fields."""
    return {"type": "object", "required": sorted(properties), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_MAYBE_TEXT: Final = {"type": ["string", "null"]}
_USAGE: Final = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)


def _frame(name: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        id=_TEXT,
        object={"const": name},
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_MAYBE_TEXT,
        choices=_list(choice),
        usage=_USAGE,
    )


_CHAT: Final = _frame(
    "chat.completion",
    _object(index=_COUNT, message=_object(role={"const": "assistant"}, content=_MAYBE_TEXT), finish_reason=_TEXT),
)
_COMPLETION: Final = _frame("text_completion", _object(index=_COUNT, text=_TEXT, finish_reason=_TEXT))
_RESPONSE: Final = _object(
    id=_TEXT,
    object={"const": "response"},
    created_at={"type": "number"},
    model=_TEXT,
    status={"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
    output=_list({"type": "object"}),
)


def _answer(schema: dict[str, Any], *, streams: bool = False) -> Responses:
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {}
    return {200: {"content": content}}


CHAT: Final = _answer(_CHAT, streams=True)
COMPLETION: Final = _answer(_COMPLETION, streams=True)
RESPONSE: Final = _answer(_RESPONSE, streams=True)
RESPONSE_FOUND: Final = _answer(_RESPONSE)


def finish(document: dict[str, Any]) -> dict[str, Any]:
    """Return the framework's document with keys, and without the 422 that it adds and this gateway never answers."""
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path not in OPEN_PATHS:
                operation["security"] = [{}, {"key": []}]  # without keys in the network, nobody needs one
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document
