"""What is said on a socket: the client's messages, checked, and the gateway's. One JSON object a message.

An `id` is the client's own name for a job on its socket. Each `create` or `resume` with an id of its own ends in exactly one
`done` or `error` with that id; an `error` without an id is about a message, and ends nothing.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, ValidationError

from tether.errors import BodyTooLarge, InvalidRequest, TetherError
from tether.openai_schemas import Body, Name, check_writable
from tether.refusals import refusal, why_unreadable
from tether.replies import error_detail, error_headers

UNSUPPORTED_DATA: Final = 1003
INVALID_DATA: Final = 1007
POLICY_VIOLATION: Final = 1008
TOO_BIG: Final = 1009
GOING_AWAY: Final = 1001
"""Why a socket is closed (RFC 6455, 7.4.1)."""

ENVELOPE_BYTES: Final = 2048
"""What a message may have beside a body."""

_ID = r"[^\x00-\x1f\x7f-\x9f]{1,128}"
Id = Annotated[str, Field(pattern=f"^{_ID}$")]


class Create(Body):
    """Run a job: the body is one of the HTTP route at `url`."""

    type: Literal["create"]
    id: Id
    url: str
    body: dict[str, Any]
    idempotency_key: str | None = None
    """With it the job outlives the socket, and is the same as before where the same was asked for before."""
    after: str | None = None
    """The last event that the client has, of a job with this key."""


class Resume(Body):
    """Tell a job that runs or has ended, from its beginning or from behind an event on; it outlives the socket."""

    type: Literal["resume"]
    id: Id
    job_id: Name
    after: str | None = None
    include_usage: bool = False
    tenant_id: Name | None = None


class Cancel(Body):
    """End the job that has this id."""

    type: Literal["cancel"]
    id: Id


class Ping(Body):
    """Ask whether the gateway is there, for clients that cannot send a ping frame; answered with `pong`."""

    type: Literal["ping"]


ClientMessage = Create | Resume | Cancel | Ping

_KINDS: dict[str, type[ClientMessage]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(ClientMessage)
}


class Unreadable(Exception):
    """What came is no message at all; a socket on which nothing else comes is closed with `code`."""

    def __init__(self, error: TetherError, code: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.code = code


def read(frame: str | bytes, max_bytes: int) -> Any:
    """Return what a frame holds, as JSON; raise `Unreadable`."""
    if isinstance(frame, bytes):
        raise Unreadable(InvalidRequest("a message is text, and this one is binary"), UNSUPPORTED_DATA)
    if len(frame) > max_bytes or len(frame.encode("utf-8", "surrogatepass")) > max_bytes:
        raise Unreadable(
            BodyTooLarge(f"the message is larger than {max_bytes} bytes, the most that this gateway takes"), TOO_BIG
        )
    try:
        value = json.loads(frame)
        check_writable(value)
    except InvalidRequest as exc:
        raise Unreadable(exc, INVALID_DATA) from exc
    except (ValueError, RecursionError) as exc:
        why = why_unreadable("the message", exc) or f"the message is not JSON: {exc}"
        raise Unreadable(InvalidRequest(why), INVALID_DATA) from exc
    return value


def parse(value: Any) -> ClientMessage:
    """Return the message that a client's JSON is; raise `InvalidRequest` with what is wrong first."""
    if not isinstance(value, dict):
        raise InvalidRequest("a message is a JSON object")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1) if isinstance(kind, str) else []
        hint = f"did you mean {near[0]!r}?" if near else f"it is one of {', '.join(_KINDS)}"
        raise InvalidRequest(f"type: there is no such message; {hint}", param="type")
    try:
        return _KINDS[kind].model_validate(value)
    except ValidationError as exc:
        raise refusal(exc.errors(include_url=False), "field", _KINDS[kind].model_fields) from exc


def id_of(value: Any) -> str | None:
    """Return the id that a client's JSON gives to a job, however wrong the rest of it is; None where it gives none."""
    if not isinstance(value, dict) or value.get("type") not in ("create", "resume"):
        return None
    name = value.get("id")
    return name if isinstance(name, str) and re.fullmatch(_ID, name) else None


def error_message(error: TetherError, name: str | None = None, job_id: str | None = None) -> dict[str, Any]:
    """Return an error as a message: the same error, status and headers as an HTTP answer would have."""
    message: dict[str, Any] = {"type": "error", "id": name}
    if job_id is not None:
        message["job_id"] = job_id
    detail = error_detail(error).model_dump()
    return {**message, "status": error.status, "headers": error_headers(error), "error": detail}
