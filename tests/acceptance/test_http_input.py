"""What no client library would send, against a real gateway: an error in the one form, never a 500, never a hang."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.processes import Machine
from tests.raw_http import Answer, RawClient, request

GOOD = json.dumps({"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=1"}).encode()
MAX_BODY = 262_144


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("served")) as machine:
        up = machine.start("up", "--cors-origin", "https://chat.example.org", **machine.scripted())
        machine.wait_ready(up)
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output
        assert machine.infer("tokens=1").status_code == 200


def ask(served: Machine, *pieces: bytes) -> Answer:
    with RawClient(served.port) as client:
        for piece in pieces:
            client.send(piece)
        return client.answer()


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


CHUNKED = (
    b"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\x00" * 100, 400),
        (b"\xff\xfe\x00{", 400),
        (GOOD[:-1], 400),
        (GOOD + b"}", 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"input":' + b"[" * 900 + b"]" * 900 + b"}", 400),
        (b"9" * 100_000, 400),
        (b'"' + b"x" * 200_000 + b'"', 400),
        (b"NaN", 400),
        (b"x" * (MAX_BODY + 1), 413),
        # Of a key that comes twice the last one counts, as in nearly every JSON reader.
        (GOOD[:-1] + b',"input":7}', 400),
        (b'{"input":7,' + GOOD[1:], 200),
    ],
)
def test_a_body_that_is_no_request_is_refused(served: Machine, body: bytes, status: int) -> None:
    for path in ("/infer",) if status == 200 else ("/infer", "/v1/chat/completions", "/v1/responses"):
        answer = ask(served, request("POST", path, body))
        assert answer.status == status, (path, answer)
        assert status == 200 or answer.error["type"] == "invalid_request_error"


def test_chunks_are_a_body_too_and_bounded_alike(served: Machine) -> None:
    assert ask(served, CHUNKED, chunked(GOOD[:10], GOOD[10:]), b"0\r\n\r\n").status == 200
    answer = ask(served, CHUNKED, chunked(*[b"x" * 10_000] * 30))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.headers["connection"] == "close"
    assert ask(served, CHUNKED, chunked(GOOD[:10]), b"zz\r\n").error["code"] == "invalid_request"


def test_a_body_whose_sender_leaves_is_forgotten(served: Machine) -> None:
    for _ in range(20):
        with RawClient(served.port) as client:
            client.send(request("POST", "/infer", GOOD)[:-5])
    assert ask(served, request("GET", "/healthz")).status == 200


def test_a_flood_of_headers_is_refused(served: Machine) -> None:
    many = [f"X-{number}: {'x' * 50}" for number in range(4000)]
    answer = ask(served, request("GET", "/healthz", b"", *many))
    assert (answer.status, answer.error["code"]) == (431, "head_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "route_not_found"),
        ("GET", "//", 404, "route_not_found"),
        ("GET", "/v1", 404, "route_not_found"),
        ("GET", "/v1/jobs/", 404, None),
        ("GET", "/v1/%2e%2e/%00", 404, "route_not_found"),
        ("GET", "/v1/models/%ff%fe", 404, "model_not_found"),
        ("GET", "/v1/jobs/%00", 404, "job_not_found"),
        ("GET", "/v1/jobs?limit=1&limit=%ff", 400, "invalid_request"),
        ("PUT", "/infer", 405, "method_not_allowed"),
        ("HEAD", "/infer", 405, None),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
        ("TRACE", "/infer", 405, "method_not_allowed"),
        ("PROPFIND", "/infer", 405, "method_not_allowed"),
        ("GET", "http://localhost/healthz", 200, None),
        ("OPTIONS", "*", 404, None),
    ],
)
def test_unknown_routes_and_methods_are_refused(
    served: Machine, method: str, path: str, status: int, code: str | None
) -> None:
    with RawClient(served.port) as client:
        client.send(request(method, path))
        if method == "HEAD":
            head = client._until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 405 ")
            return
        answer = client.answer()
    assert answer.status == status, answer
    assert code is None or answer.error["code"] == code


def test_requests_in_one_piece_are_answered_in_order_also_behind_a_refused_one(served: Machine) -> None:
    with RawClient(served.port) as client:
        client.send(request("POST", "/infer", GOOD) + request("GET", "/no") + request("GET", "/healthz"))
        assert [client.answer().status for _ in range(3)] == [200, 404, 200]


def test_continue_is_not_said_to_a_body_over_the_limit(served: Machine) -> None:
    head = "POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
    assert ask(served, f"{head}Content-Length: 99999999\r\n\r\n".encode()).error["code"] == "body_too_large"
    with RawClient(served.port) as client:
        client.send(f"{head}Content-Length: {len(GOOD)}\r\n\r\n")
        assert client.answer().status == 100
        client.send(GOOD)
        assert client.answer().status == 200


def test_only_pages_of_named_origins_may_call(served: Machine) -> None:
    for origin, allowed in (("https://chat.example.org", True), ("https://evil.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked = served.http.options("/v1/chat/completions", headers=headers)
        assert (asked.status_code == 200) is allowed
        found = served.http.get("/v1/models", headers={"Origin": origin})
        assert found.headers.get("access-control-allow-origin") == (origin if allowed else None)
        assert "access-control-allow-credentials" not in {*asked.headers, *found.headers}
