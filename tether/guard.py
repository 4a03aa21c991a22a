"""ASGI middleware before anything of a request is read: bounds its body, answers only for the gateway's own names."""

from __future__ import annotations

import re
import time
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether.door import path_of
from tether.errors import BodyTooLarge, InvalidRequest, PermissionDenied
from tether.infer_api import MAX_NAME
from tether.replies import error_response
from tether.settings import GatewaySettings

REST_SECONDS: Final = 5.0
REST_BYTES: Final = 64 << 20
"""So much of a body that is too large is taken and dropped, so that its sender reads the refusal and not a reset."""
FORM_BYTES: Final = 64 * 1024
"""What a form has beside its file."""
CORS_SECONDS: Final = 600
_EXPOSED: Final = (
    "x-request-id", "x-tether-job-id", "x-tether-attempts", "x-tether-exact", "x-tether-queue-place",
    "x-tether-expected-wait-seconds", "idempotent-replayed", "location", "retry-after",
    *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
)  # fmt: skip
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """Bounds the body, and answers only for its own names.

    Without the last a web page could have its own name resolve to this machine, and read every job through a browser here
    (DNS rebinding). Where each request shows a key, which no web page knows, any name will do. A browser lets every page
    open a socket anywhere and read it, and send a form anywhere though it reads no answer, without CORS: so the origin of
    sockets is looked at here, and on this machine's own names that of everything that changes something.
    """

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = frozenset(settings.hosts) if settings.is_loopback else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer in the application's place."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:
            message = f"this gateway does not answer for {host[:MAX_NAME]!r}; start it with --allowed-host to let it"
            await error_response(InvalidRequest(message, param="host"))(scope, receive, send)
            return
        if scope["type"] == "websocket":
            if self._is_foreign(headers):
                message = "pages of this origin may not open sockets here; start it with --cors-origin to let them"
                await error_response(PermissionDenied(message, param="origin"))(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        if self._hosts is not None and scope["method"] not in _SAFE and self._is_foreign(headers):
            message = "pages of this origin may not call this gateway; start it with --cors-origin to let them"
            await error_response(PermissionDenied(message, param="origin"))(scope, receive, send)
            return
        body = _Body(receive, send, self._most_bytes(scope))
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > body.max_bytes:
            body.is_too_large = True
            await error_response(BodyTooLarge(body.why))(scope, body.receive, body.send)
        else:
            await self._app(scope, body.receive, body.send)

    def _is_foreign(self, headers: Headers) -> bool:
        """Whether a web page sent this that neither comes from here nor has a named origin."""
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors_origins:
            return False
        host = headers.get("host", "")
        return origin_of(origin) not in {origin_of(f"http://{host}"), origin_of(f"https://{host}")} - {None}

    def _most_bytes(self, scope: Scope) -> int:
        """Return how large a request's body may be."""
        if path_of(scope) == "/v1/files":
            return self._settings.max_file_bytes + FORM_BYTES
        return self._settings.max_body_bytes


def origin_of(url: str) -> str | None:
    """Return the origin of a web page as browsers write it: scheme, host, and the port where it is not the scheme's."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not host:
        return None
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port in {None, 80 if parts.scheme == "http" else 443} else f":{port}")


class _Body:
    """A request's body, as far as it is taken in."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self.is_too_large = False
        self.why = f"the body is larger than {max_bytes} bytes, the most that this gateway takes"

    async def receive(self) -> Message:
        """Return a piece of the body; raise `HTTPException` when it is too large."""
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self.max_bytes:
            self.is_too_large = True
            raise HTTPException(413, self.why)
        return message

    async def send(self, message: Message) -> None:
        """Send the answer; one to a body that is too large is the last of its connection."""
        if not self.is_too_large:
            await self._send(message)
        elif message["type"] == "http.response.start":
            MutableHeaders(scope=message)["connection"] = "close"
            await self._send(message)
        else:
            await self._send({**message, "more_body": True})
            await self._drop_rest()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drop_rest(self) -> None:
        until, num_bytes = time.monotonic() + REST_SECONDS, 0
        while num_bytes < REST_BYTES and time.monotonic() < until:
            message = await self._receive()
            num_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


class Cors(CORSMiddleware):
    """Lets pages of the named origins read answers (the Fetch standard's CORS protocol); without cookies, ever."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings) -> None:
        super().__init__(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # those that are asked for: OpenAI's client in a browser sends many of its own
            allow_credentials=False,
            expose_headers=_EXPOSED,
            max_age=CORS_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer what a browser asks before a request; a refusal has the form of all errors."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(
            InvalidRequest(f"not for this page: {bytes(response.body).decode()}; start it with --cors-origin to let it")
        )
        refusal.headers["vary"] = "Origin"
        return refusal
