"""ASGI middleware that answers an exception which nobody expected in the form of all errors, and tells the log which it was.

The framework has one of its own, but outside all other middleware: a web page could not read its answer.
"""

from __future__ import annotations

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tether.access_log import request_id_of
from tether.errors import InternalError
from tether.replies import error_response, is_stream, last_event

log = logging.getLogger(__name__)


class LastResort:
    """Stands inside what adds headers to every answer, and outside everything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; an answer that has begun ends with an error where it is a stream, and else breaks off."""
        started = streams = False

        async def send_seen(message: Message) -> None:
            nonlocal started, streams
            started = True
            if message["type"] == "http.response.start":
                streams = is_stream(message)
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        except Exception as exc:
            if scope["type"] not in {"http", "websocket"} or (started and not streams):
                raise
            error = _mistake(scope, exc)
            if streams:
                await send({"type": "http.response.body", "body": last_event(error), "more_body": False})
            else:
                await error_response(error)(scope, receive, send)


def _mistake(scope: Scope, exc: Exception) -> InternalError:
    """Tell the log of an exception that nobody expected; return what the client is told."""
    request_id = request_id_of(scope)
    log.error(
        "%s %s failed (request %s)",
        scope.get("method", "WEBSOCKET"),
        scope["path"],
        request_id,
        exc_info=exc,
        extra={"action": "mistake", "request_id": request_id},
    )
    return InternalError(f"Tether made a mistake; the gateway's log says which, under the request id {request_id}")
