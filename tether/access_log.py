"""Gives each request its id, and writes one line when it is over: who asked for what, and what came of it.

Never a key, never a prompt, and no query, which may hold either.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether.door import caller_of

log = logging.getLogger("tether.access")

PROBES = frozenset({"/healthz", "/readyz"})
"""Asked for every few seconds by those who watch over a gateway: logged only with -v."""
MAX_PATH = 200
CLIENT_LEFT = 499
"""The status of a request whose client left before it was answered, as nginx has it."""
_TENANT = "tether.tenant"
_REFUSED = "tether.refused"
_REQUEST_ID = "tether.request_id"


def note_tenant(scope: Scope, tenant_id: str) -> None:
    """Say on whose behalf a request's job is, which its body says where there are no keys."""
    scope[_TENANT] = tenant_id


def request_id_of(scope: Scope) -> str:
    """Return the id under which a request is logged, and which its answer's header `x-request-id` has."""
    request_id: str = scope.get(_REQUEST_ID, "unknown")
    return request_id


class Entry(msgspec.Struct, kw_only=True):
    """What is told of a request."""

    client: str
    method: str = ""
    path: str = ""
    status: int = 0
    duration_seconds: float = 0.0
    num_bytes: int = 0
    """Of the answer's body."""
    request_id: str = ""
    job_id: str = ""
    tenant_id: str = ""
    key_id: str = ""

    def write(self) -> None:
        """Write the line: words for people, the same as fields for programs."""
        self.path = self.path[:MAX_PATH]
        fields: dict[str, Any] = {name: value for name, value in msgspec.structs.asdict(self).items() if value != ""}
        about = "".join(f" {name}={fields[name]}" for name in ("job_id", "tenant_id", "key_id") if name in fields)
        log.log(
            logging.DEBUG if self.path in PROBES else logging.INFO,
            "%s %s %s %d %.3fs %dB%s",
            self.client or "-",
            self.method or "-",
            self.path or "-",
            self.status,
            self.duration_seconds,
            self.num_bytes,
            about,
            extra={"action": "request", **fields},
        )


def note_refusal(scope: Scope, told: Entry) -> None:
    """Say that a request was answered before its application could."""
    scope[_REFUSED] = told


class AccessLog:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, *, is_on: bool = True) -> None:
        self._app = app
        self._is_on = is_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and tell of it."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        watched = _Watched(scope, receive, send)
        try:
            await self._app(scope, watched.receive, watched.send)
        finally:
            if self._is_on:
                watched.write(time.perf_counter() - began)


def _printable(address: str) -> str:
    return address if address.isprintable() else address.encode("unicode_escape").decode()


class _Watched:
    """A request, and what is heard and said of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        client = scope.get("client") or ("",)
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not re.fullmatch(r"[\x21-\x7e]{1,128}", request_id):
            request_id = secrets.token_hex(8)
        scope[_REQUEST_ID] = request_id
        method = scope.get("method", "WEBSOCKET")
        # The path as it was sent, whose characters are those of a URL: a decoded one could steer an operator's terminal.
        path = scope["raw_path"].decode("ascii", "replace")
        self._entry = Entry(client=_printable(client[0]), method=method, path=path, request_id=request_id)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._entry.status:
            self._entry.status = CLIENT_LEFT
        return message

    async def send(self, message: Message) -> None:
        entry = self._entry
        match message["type"]:
            case "http.response.start" | "websocket.http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = entry.request_id
                entry.status = entry.status or message["status"]
                entry.job_id = headers.get("x-tether-job-id", "")
            case "http.response.body" | "websocket.http.response.body":
                entry.num_bytes += len(message.get("body", b""))
            case "websocket.accept":
                MutableHeaders(scope=message)["x-request-id"] = entry.request_id
                entry.status = 101
            case "websocket.close" if not entry.status:
                entry.status = 403  # as the server tells it
            case "websocket.send":
                entry.num_bytes += len(message.get("bytes") or message.get("text") or b"")
        await self._send(message)

    def write(self, seconds: float) -> None:
        entry, caller = self._entry, caller_of(self._scope)
        refused = self._scope.get(_REFUSED)
        if isinstance(refused, Entry):
            entry.status, entry.request_id, entry.num_bytes = refused.status, refused.request_id, refused.num_bytes
        entry.status = entry.status or CLIENT_LEFT
        entry.tenant_id, entry.key_id = caller.tenant_id or self._scope.get(_TENANT, ""), caller.key_id
        entry.duration_seconds = round(seconds, 6)
        entry.write()
