"""HTTP/1.1 as bytes: bounds on how large and how slow a request and its reader may be, and what is no HTTP at all.

What can be answered before an application sees a request is answered here, in the one form of all errors.
"""

from __future__ import annotations

import asyncio
import secrets
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, cast

import httptools
import msgspec
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from tether.access_log import Entry, note_refusal
from tether.errors import HeadTooLarge, InvalidRequest, RequestTimeout, TetherError
from tether.replies import error_detail

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How large and how slow a client may be."""

    head_bytes: int = 128 * 1024
    """Of a request line and headers; several requests that come in one piece may count together."""
    head_seconds: float = 15.0
    """For all of a request's head, however it is sent; also for a new connection that says nothing."""
    body_seconds: float = 30.0
    body_bytes_a_second: int = 16 * 1024
    """A body has `body_seconds` in total, and more of it so many bytes a second."""
    stalled_seconds: float = 60.0
    """How long a client may leave what it was sent unread."""
    linger_seconds: float = 1.0
    """How long a refused client's bytes are still taken, so that it reads the refusal and not a reset; and how long an
    idle connection is kept when the gateway stops, for a request that is on its way."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with `limits`; another class has others."""

    limits: ClassVar[Limits] = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._num_body_bytes = 0
        self._in_head = False
        self._is_deaf = False
        """Nothing more is read: what came was no HTTP, or was refused."""
        self._is_stopping = False
        self._is_invited = False
        """The request asks for another protocol, which is none of ours."""
        self._late: asyncio.TimerHandle | None = None
        """Ends the wait for the rest of a head or of a body."""
        self._stalled: asyncio.TimerHandle | None = None

    # --- what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._on_time()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes in, and refuse what is no HTTP or has a head that is too large."""
        if self._is_deaf:
            return
        self._unset_keepalive_if_required()
        self._num_head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            else:
                self._stay(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            if isinstance(exc.__context__, HeadTooLarge):
                self._refuse(exc.__context__)
            else:
                self._on_malformed()
        else:
            if self._in_head and self._num_head_bytes > self.limits.head_bytes:
                self._refuse(HeadTooLarge())
            elif self._late is None and self._is_idle:
                self._await_head()  # empty lines, which may come before a request

    def eof_received(self) -> None:
        """Close; there is no request half of whose connection is used."""

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # --- what the parser calls

    def on_message_begin(self) -> None:
        """Wait for a request's head."""
        super().on_message_begin()
        self._in_head = True
        self._await_head()

    def on_headers_complete(self) -> None:
        """Wait for the body."""
        if self._num_head_bytes > self.limits.head_bytes and self._head_bytes > self.limits.head_bytes:
            raise HeadTooLarge  # it came in one piece with its end
        self._in_head, self._num_head_bytes, self._num_body_bytes = False, 0, 0
        self._is_invited = self.parser.should_upgrade() and not self._should_upgrade()
        if self._is_invited:
            return
        super().on_headers_complete()
        if self._is_stopping and self.cycle is not None:
            self.cycle.keep_alive = False
        self._await_body()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body in."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Wait for nothing more of this request."""
        if self._is_invited:
            return
        self._num_head_bytes = 0
        self._on_time()
        super().on_message_complete()

    @property
    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    # --- what the server calls

    def handle_websocket_upgrade(self) -> None:
        """Leave the connection to another protocol."""
        self._on_time()
        super().handle_websocket_upgrade()

    def shutdown(self) -> None:
        """Close when the request under way is answered; an idle connection soon, for what may be on its way."""
        self._is_stopping = True
        if self.cycle is not None:
            self.cycle.keep_alive = False
        if self._is_idle:
            self.loop.call_later(self.limits.linger_seconds, self._close_if_idle)

    def _should_upgrade(self) -> bool:
        """Whether this begins a WebSocket; a handshake that is none is a request like any other."""
        headers = dict(self.headers)
        is_handshake = self.parser.get_method() == b"GET" and headers.get(b"sec-websocket-version") == b"13"
        return is_handshake and b"sec-websocket-key" in headers and super()._should_upgrade()

    # --- time

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _close_if_idle(self) -> None:
        if self._is_idle:
            self.transport.close()

    def _on_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _await_head(self) -> None:
        self._on_time()
        self._late = self.loop.call_later(self.limits.head_seconds, self._on_late_head)

    def _await_body(self) -> None:
        self._on_time()
        self._body_began = self.loop.time()
        self._late = self.loop.call_later(self.limits.body_seconds, self._on_late_body)

    def _on_late_head(self) -> None:
        self._late = None
        if not self._is_idle:
            self._hear_no_more()  # it is behind a request that is being answered
        elif self._num_head_bytes == 0:
            self.transport.close()
        else:
            self._refuse(RequestTimeout("the request's head did not come in time"))

    def _on_late_body(self) -> None:
        limits = self.limits
        allowed = limits.body_seconds + self._num_body_bytes / limits.body_bytes_a_second
        remaining = self._body_began + allowed - self.loop.time()
        if self.flow.read_paused:
            remaining = max(remaining, 1.0)  # it is the application that does not read
        if remaining > 0:
            self._late = self.loop.call_later(remaining, self._on_late_body)
            return
        self._late = None
        self._refuse(RequestTimeout("the request's body did not come in time"))

    # --- refusals

    def _stay(self, rest: bytes) -> None:
        """Take a request that asks for another protocol (Java's client: h2c) as any other, as RFC 9110 (7.8) has it.

        The parser takes what follows such a head for the other protocol, also where it is a body.
        """
        self._is_invited = False
        method, old = self.parser.get_method(), dict(self.headers)
        if method == b"CONNECT":
            self._on_malformed()
            return
        kept = [each for each in self.headers if each[0] not in {b"connection", b"upgrade", b"http2-settings"}]
        if b"close" in old.get(b"connection", b"").lower():
            kept.append((b"connection", b"close"))
        head = b"".join([method, b" ", self.url, b" HTTP/1.1\r\n", *(b"%s: %s\r\n" % each for each in kept), b"\r\n"])
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + rest)

    def _on_malformed(self) -> None:
        """Refuse what is no HTTP, unless it stands behind a request: then that one is answered as the last."""
        if not self._is_idle and not self.cycle.more_body:
            self._hear_no_more()
        else:
            self._refuse(InvalidRequest("this is not a valid HTTP/1.1 request"))

    def _hear_no_more(self) -> None:
        self._is_deaf = True
        self.cycle.keep_alive = False

    def _refuse(self, error: TetherError) -> None:
        """Answer in the application's place, where that did not begin to, and close."""
        self._on_time()
        self._is_deaf = True
        is_answered = not self._is_idle and (self.cycle.response_started or bool(self.pipeline))
        if is_answered or self.transport.is_closing():
            self.transport.close()
            return
        told = Entry(client=self.client[0] if self.client else "", status=error.status, request_id=secrets.token_hex(8))
        body = msgspec.json.encode({"error": error_detail(error).model_dump()})
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"x-request-id: {told.request_id}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        told.num_bytes = len(body)
        if self._is_idle:
            told.write()
        else:
            note_refusal(cast("Scope", self.cycle.scope), told)
            # The application hears that its client has left, and nobody hears what it says to that.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._late = self.loop.call_later(self.limits.linger_seconds, self.transport.close)


class SocketProtocol(WSProtocol):
    """uvicorn's protocol for WebSockets: the application ends its sockets, and a client that is dead is cut off."""

    def shutdown(self) -> None:
        """The server stops: what is no socket yet is refused; the application ends the others in its own time."""
        if not self.handshake_complete:
            super().shutdown()

    def keepalive_timeout(self) -> None:
        """A ping was not answered: what is still to be sent to that client would wait for ever."""
        super().keepalive_timeout()
        self.transport.abort()

    async def send(self, message: ASGISendEvent) -> None:
        """Send a message, or say that nobody is there: also where that was found out here, as after a ping."""
        await self.writable.wait()
        if self.close_sent:
            raise ClientDisconnected
        await super().send(message)
