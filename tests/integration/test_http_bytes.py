"""The gateway's HTTP server at the level of bytes: slow, stalled and malformed clients, on a real socket."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.raw_http import RawClient, elapsed, request
from tether.access_log import AccessLog
from tether.guard import Cors, Guard
from tether.http import bind
from tether.protocol import BoundedProtocol, Limits
from tether.settings import GatewaySettings

QUICK = Limits(
    head_bytes=16 * 1024,
    head_seconds=0.6,
    body_seconds=0.6,
    body_bytes_a_second=100_000,
    stalled_seconds=0.6,
    linger_seconds=0.3,
)
BOUND_SECONDS = 10.0
"""What is over in half a second on quiet cores is over in so long on busy ones."""
MAX_BODY = 20_000
ORIGIN = "https://chat.example.org"


class QuickProtocol(BoundedProtocol):
    limits = QUICK


class Served:
    """An application that says how much it was sent; `/wait` answers when it is let, `/flood` never ends."""

    def __init__(self, sock: socket.socket) -> None:
        self.port: int = sock.getsockname()[1]
        self.may_answer = threading.Event()
        self.num_left = 0
        self.server = uvicorn.Server(
            uvicorn.Config(
                AccessLog(Cors(Guard(self._app, SETTINGS), SETTINGS)),
                http=QuickProtocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                timeout_keep_alive=5,
            )
        )

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        incoming = Request(scope, receive)
        response: Any
        try:
            body = await incoming.body()
        except ClientDisconnect:
            self.num_left += 1
            return
        if scope["path"] == "/flood":

            async def flood() -> Any:
                try:
                    while True:
                        yield b"x" * 65536
                        await asyncio.sleep(0)
                finally:
                    self.num_left += 1

            response = StreamingResponse(flood())
        else:
            if scope["path"] == "/wait":
                await asyncio.to_thread(self.may_answer.wait, BOUND_SECONDS)
            response = JSONResponse({"path": scope["path"], "length": len(body)})
        await response(scope, receive, send)


SETTINGS = GatewaySettings(max_body_bytes=MAX_BODY, cors_origins=(ORIGIN,))


@contextmanager
def serving() -> Iterator[Served]:
    with bind("127.0.0.1", 0) as sock:
        served = Served(sock)

        async def serve() -> None:
            # The sockets' own copies: uvicorn closes what it is given.
            await served.server.serve(sockets=[sock.dup()])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            yield served
        finally:
            served.may_answer.set()
            served.server.should_exit = True
            thread.join(BOUND_SECONDS)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


def until(condition: Any) -> None:
    deadline = time.monotonic() + BOUND_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_head_that_is_dribbled_is_refused_after_a_bound_in_total(served: Served) -> None:
    began = time.monotonic()
    with RawClient(served.port) as client:
        assert client.dribble(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10_000, 0.02)
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert answer.headers["connection"] == "close"
        assert client.ends()
    assert elapsed(began) < BOUND_SECONDS


def test_a_body_that_is_dribbled_is_refused_after_a_bound_in_total(served: Served) -> None:
    num_left = served.num_left
    with RawClient(served.port) as client:
        client.send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n")
        assert client.dribble(b"x" * 5000, 0.02)
        assert (client.answer().error["code"], client.ends()) == ("request_timeout", True)
    until(lambda: served.num_left == num_left + 1)  # the application hears of it, and waits no more


def test_a_large_body_that_comes_steadily_has_the_time_that_it_needs(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY}\r\n\r\n")
        began = time.monotonic()
        sent = 0
        while sent < MAX_BODY:  # at half the time that the bound leaves for it
            due = (elapsed(began) / (QUICK.body_seconds + MAX_BODY / QUICK.body_bytes_a_second)) * 2 * MAX_BODY
            piece = min(MAX_BODY, int(due)) - sent
            if piece > 0:
                client.send(b"x" * piece)
                sent += piece
            threading.Event().wait(0.01)
        assert json.loads(client.answer().body)["length"] == MAX_BODY


def test_a_connection_that_says_nothing_is_closed(served: Served) -> None:
    with RawClient(served.port) as client:
        assert client.ends()


def test_empty_lines_behind_a_request_do_not_hold_a_connection_for_ever(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send(request("GET", "/"))
        assert client.answer().status == 200
        client.send("\r\n")
        answer_or_end = client.ends() or client.answer().status == 408
        assert answer_or_end


def test_a_head_that_is_too_large_is_refused_though_its_sender_goes_on(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send("GET / HTTP/1.1\r\nHost: localhost\r\n")
        try:
            for _ in range(20):
                client.send(b"a: " + b"b" * 4000 + b"\r\n")
        except ConnectionError:
            pass
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (431, "head_too_large")


def test_a_head_that_is_too_large_and_comes_in_one_piece_is_refused(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send(request("POST", "/", b"x" * 15_000))  # a body does not count
        assert client.answer().status == 200
        client.send(request("GET", "/", b"", *[f"X-{number}: {'x' * 50}" for number in range(400)]))
        assert client.answer().error["code"] == "head_too_large"


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_in_the_form_of_all_errors(served: Served, head: bytes) -> None:
    with RawClient(served.port) as client:
        client.send(head)
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (400, "invalid_request")
        assert client.ends()


def test_requests_that_come_in_one_piece_are_answered_in_order(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send(b"".join(request("POST", f"/{number}", b"x" * number) for number in range(50)))
        for number in range(50):
            assert json.loads(client.answer().body) == {"path": f"/{number}", "length": number}


def test_garbage_behind_a_request_does_not_break_into_its_answer() -> None:
    with serving() as served, RawClient(served.port) as client:
        client.send(request("GET", "/wait") + b"\x00garbage\r\n\r\n")
        client.send(b"more of it")
        served.may_answer.set()
        answer = client.answer()
        assert (answer.status, json.loads(answer.body)["path"]) == (200, "/wait")
        assert client.ends()


def test_a_client_that_does_not_read_is_let_go(served: Served) -> None:
    num_left = served.num_left
    with RawClient(served.port) as client:
        client.send(request("GET", "/flood"))
        until(lambda: served.num_left == num_left + 1)


def test_continue_is_said_only_to_a_body_that_will_be_taken(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.answer().status == 100
        client.send("abc")
        assert json.loads(client.answer().body)["length"] == 3
        client.send(f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_BODY + 1}\r\n")
        client.send("Expect: 100-continue\r\n\r\n")
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_body_over_the_limit_is_refused_and_its_sender_reads_the_refusal(served: Served) -> None:
    for _ in range(5):  # a reset would overtake the answer only sometimes
        with RawClient(served.port) as client:
            client.send("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
            client.send(b"x" * 3_000_000)
            answer = client.answer()
            assert (answer.status, answer.error["code"]) == (413, "body_too_large")
            assert (answer.headers["connection"], client.ends()) == ("close", True)


def test_a_body_of_another_form_of_upgrade_is_a_request_as_any_other(served: Served) -> None:
    with RawClient(served.port) as client:
        client.send(request("POST", "/", b"abc", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
        assert json.loads(client.answer().body)["length"] == 3


def test_a_server_that_stops_answers_what_is_on_its_way_and_closes_idle_connections() -> None:
    with serving() as served, RawClient(served.port) as idle, RawClient(served.port) as busy:
        idle.send(request("GET", "/"))
        assert idle.answer().status == 200
        busy.send(request("GET", "/wait"))
        served.server.should_exit = True
        until(lambda: any(connection._is_stopping for connection in list(served.server.server_state.connections)))  # type: ignore[union-attr]
        idle.send(request("GET", "/late"))
        late = idle.answer()
        assert (late.status, late.headers["connection"], idle.ends()) == (200, "close", True)
        served.may_answer.set()
        assert (busy.answer().status, busy.ends()) == (200, True)


def test_one_line_is_logged_for_each_request_also_for_those_that_were_refused(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tether.access")
    with RawClient(served.port) as client:
        client.send(request("POST", "/a?secret=sk-1", b"prompt", "X-Request-Id: mine", "Authorization: Bearer sk-2"))
        assert client.answer().headers["x-request-id"] == "mine"
        client.send("POST /b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
        assert client.answer().status == 408
    with RawClient(served.port) as client:
        client.send("nonsense\r\n\r\n")
        assert client.answer().status == 400
    with RawClient(served.port) as client:
        client.send("POST /c HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n")
    until(lambda: any(getattr(record, "path", "") == "/c" for record in caplog.records))
    found = [record.__dict__ for record in caplog.records]
    assert [(each.get("method"), each.get("path"), each["status"]) for each in found] == [
        ("POST", "/a", 200),
        ("POST", "/b", 408),
        (None, None, 400),
        ("POST", "/c", 499),
    ]
    assert found[0]["request_id"] == "mine"
    assert found[0]["client"] == "127.0.0.1"
    assert found[0]["num_bytes"] == len('{"path":"/a","length":6}')
    assert found[0]["duration_seconds"] > 0
    assert "sk-" not in caplog.text
    assert "prompt" not in caplog.text


def test_what_a_client_sends_cannot_steer_the_terminal_that_shows_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tether.access")
    with RawClient(served.port) as client:
        client.send(request("GET", "/%1b%5d0;pwned%07", b"", "X-Forwarded-For: \x9b31m, 9"))
        assert client.answer().status == 200
    until(lambda: caplog.records)
    assert "/%1b%5d0;pwned%07" in caplog.text
    assert caplog.text.strip().isprintable()


# --- pages of other origins ------------------------------------------------------------------------------------------


def preflight(served: Served, origin: str, method: str = "POST") -> Any:
    with RawClient(served.port) as client:
        headers = (f"Origin: {origin}", f"Access-Control-Request-Method: {method}")
        client.send(request("OPTIONS", "/", b"", *headers, "Access-Control-Request-Headers: authorization,x-any"))
        return client.answer()


def test_a_page_of_a_named_origin_may_call_and_reads_every_answer(served: Served) -> None:
    asked = preflight(served, ORIGIN)
    assert asked.status == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert asked.headers["access-control-allow-headers"] == "authorization,x-any"
    with RawClient(served.port) as client:
        client.send(request("POST", "/", b"x", f"Origin: {ORIGIN}"))
        assert client.answer().headers["access-control-allow-origin"] == ORIGIN
        client.send(request("POST", "/", b"x" * (MAX_BODY + 1), f"Origin: {ORIGIN}"))
        refused = client.answer()
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (413, ORIGIN)
    exposed = refused.headers["access-control-expose-headers"]
    assert all(name in exposed for name in ("retry-after", "x-tether-queue-place", "x-tether-exact", "x-ratelimit-"))
    assert not [name for each in (asked, refused) for name in each.headers if "credentials" in name]


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_a_page_of_another_origin_changes_nothing_by_a_form_which_no_browser_asks_about(
    served: Served, origin: str
) -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--\r\n'
    with RawClient(served.port) as client:
        kind = "Content-Type: multipart/form-data; boundary=x"
        client.send(request("POST", "/v1/files", form, kind, f"Origin: {origin}"))
        answer = client.answer()
        assert (answer.status, answer.error["param"]) == (403, "origin")
    with RawClient(served.port) as client:
        client.send(request("POST", "/v1/files", form, kind, "Origin: http://localhost"))
        assert client.answer().status == 200, "a page of its own"


@pytest.mark.parametrize(
    ("origin", "method"), [("https://evil.example", "POST"), ("null", "POST"), ("*", "POST"), (ORIGIN, "PATCH")]
)
def test_a_page_of_another_origin_is_refused(served: Served, origin: str, method: str) -> None:
    asked = preflight(served, origin, method)
    assert (asked.status, asked.error["type"]) == (400, "invalid_request_error")
    assert "access-control-allow-origin" not in asked.headers
    assert asked.headers["vary"] == "Origin"
    with RawClient(served.port) as client:
        client.send(request("GET", "/", b"", f"Origin: {origin}" if origin != ORIGIN else "Origin: https://x.example"))
        assert "access-control-allow-origin" not in client.answer().headers
