"""Lets requests in by their API keys, before anything else of them is read, and breaks off those whose key ends."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether.auth import Access, Client
from tether.errors import InvalidKey, TetherError
from tether.replies import error_detail, error_response

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""What anybody may see: whether the gateway lives, and how it is used."""
_CLIENT = "tether.client"
_POLICY_VIOLATION = 1008  # RFC 6455, 7.4.1


def client_of(request: Request) -> Client:
    """Return who sends a request."""
    return caller_of(request.scope)


def caller_of(scope: Scope) -> Client:
    """Return who sends what has this scope, as far as it was let in."""
    client = scope.get(_CLIENT)
    return client if isinstance(client, Client) else Client()


class Door:
    """ASGI middleware: who sends a request is in its scope from here on (`client_of`)."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403 in the application's place, or let the request in."""
        if scope["type"] not in {"http", "websocket"} or path_of(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        looks = scope.get("method") in {"GET", "HEAD", "OPTIONS"}
        try:
            client = await self._access.client(Headers(scope=scope).get("authorization"), "look" if looks else "run")
        except TetherError as exc:
            if scope["type"] == "http":
                await error_response(exc)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": exc.message})
            return
        scope[_CLIENT] = client
        if client.is_anybody or scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._serve(client, scope, receive, send)

    async def _serve(self, client: Client, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request for as long as its client's key is good."""
        task = asyncio.current_task()
        ended = started = is_stream = False

        def on_end() -> None:
            nonlocal ended
            ended = True
            if task is not None:
                task.cancel()

        async def send_seen(message: Message) -> None:
            nonlocal started, is_stream
            if message["type"] == "http.response.start":
                started = True
                is_stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            await send(message)

        try:
            with self._access.hold(client, on_end):
                await self._app(scope, receive, send_seen)
        except asyncio.CancelledError:
            if not ended or task is None or task.uncancel() > 0:
                raise  # somebody else stops it
            error = InvalidKey("this API key was revoked or has expired while the answer was under way")
            if not started:
                await error_response(error)(scope, receive, send)
                return
            body = msgspec.json.encode({"error": error_detail(error).model_dump()})
            last = b"data: " + body + b"\n\n" if is_stream else b""
            await send({"type": "http.response.body", "body": last, "more_body": False})


def path_of(scope: Scope) -> str:
    """Return a request's path below the one under which a proxy serves it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
