"""Lets requests in by their API keys, before anything else of them is read, and breaks off those whose key ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether import quotas
from tether.auth import Access, Client
from tether.errors import InvalidKey, TetherError
from tether.replies import error_response, is_stream, last_event

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""What anybody may see: whether the gateway lives, and how it is used."""
PROTOCOL: Final = "tether"
"""The subprotocol of the sockets here, for clients that offer one."""
KEY_PROTOCOL: Final = "openai-insecure-api-key."
"""A browser can set no header on a socket: it offers its key as a subprotocol that begins so, as OpenAI's clients do."""
KEY_ENDED: Final = "this API key was revoked or has expired while the answer was under way"
KEY_GONE: Final = "its API key was revoked or has expired"
"""The reason of the jobs that are cancelled then."""
_Hold = Callable[[Callable[[], None]], AbstractContextManager[None]]
_CLIENT: Final = "tether.client"
_HOLD: Final = "tether.hold"


def client_of(request: HTTPConnection) -> Client:
    """Return who sends a request."""
    return caller_of(request.scope)


def caller_of(scope: Scope) -> Client:
    """Return who sends what has this scope, as far as it was let in."""
    client = scope.get(_CLIENT)
    return client if isinstance(client, Client) else Client()


def while_key_is_good(scope: Scope, on_end: Callable[[], None]) -> AbstractContextManager[None]:
    """Watch over a socket's key while the block runs; `on_end` is called once when the key ends before it."""
    hold: _Hold | None = scope.get(_HOLD)
    return nullcontext() if hold is None else hold(on_end)


class _Ending:
    """Why a request is broken off, once it is."""

    reason: str | None = None


_ENDING: ContextVar[_Ending | None] = ContextVar("tether.ending", default=None)
"""Of the request that this task serves."""


def why_broken_off() -> Callable[[], str | None]:
    """Return what tells why the request that this task serves was broken off; None while its client stays or just leaves."""
    ending = _ENDING.get()
    return lambda: ending.reason if ending is not None else None


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
        looks = scope.get("method") in {"GET", "HEAD", "OPTIONS"}  # a socket, which has no method, runs jobs
        try:
            client = await self._access.client(_authorization(scope), "look" if looks else "run")
        except TetherError as exc:
            await error_response(exc)(scope, receive, send)  # of a socket, the answer to its handshake
            return
        scope[_CLIENT] = client
        if client.is_anybody:
            await self._app(scope, receive, send)
            return
        _ENDING.set(ending := _Ending())

        def hold(on_end: Callable[[], None]) -> AbstractContextManager[None]:
            def end() -> None:
                ending.reason = KEY_GONE
                on_end()

            return self._access.hold(client, end)

        if scope["type"] == "websocket":
            scope[_HOLD] = hold
            await self._app(scope, receive, send)
        else:
            await self._serve(client, hold, scope, receive, send)

    async def _serve(self, client: Client, hold: _Hold, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request for as long as its client's key is good."""
        task = asyncio.current_task()
        ended = started = streams = False

        def on_end() -> None:
            nonlocal ended
            ended = True
            if task is not None:
                task.cancel()

        async def send_seen(message: Message) -> None:
            nonlocal started, streams
            if message["type"] == "http.response.start":
                started = True
                # A job's answer says what its admission left; any other, what was left when its key was last looked at.
                told = MutableHeaders(scope=message)
                if not any(name.startswith("x-ratelimit-") for name in told):
                    told.update(quotas.headers(client.limits))
                streams = is_stream(message)
            await send(message)

        try:
            with hold(on_end):
                await self._app(scope, receive, send_seen)
        except asyncio.CancelledError:
            if not ended or task is None or task.uncancel() > 0:
                raise  # somebody else stops it
            error = InvalidKey(KEY_ENDED)
            if not started:
                await error_response(error)(scope, receive, send)
                return
            last = last_event(error) if streams else b""
            await send({"type": "http.response.body", "body": last, "more_body": False})


def _authorization(scope: Scope) -> str | None:
    """Return what a request shows to be let in, as the header `Authorization` says it."""
    shown = Headers(scope=scope).get("authorization")
    offered = [each for each in scope.get("subprotocols", ()) if each.startswith(KEY_PROTOCOL)]
    if shown is None and offered:
        return f"Bearer {offered[0].removeprefix(KEY_PROTOCOL)}"
    return shown


def path_of(scope: Scope) -> str:
    """Return a request's path below the one under which a proxy serves it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"
