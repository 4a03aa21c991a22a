"""A gateway that is asked to stop: what is open ends well, what is new goes elsewhere, and a second signal is at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.test_openai_clients import events_of, script, text_of
from tests.ports import free_port
from tests.processes import Machine, Process, eventually
from tests.raw_http import RawClient, request


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with a gateway that stays; each test stops one of its own."""
    with Machine(tmp_path_factory.mktemp("network")) as machine:
        up = machine.start("up", **machine.scripted(slots=16))
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


def start_gateway(machine: Machine, *arguments: str) -> tuple[Process, httpx.Client]:
    port = free_port()
    gateway = machine.start("gateway", "--port", str(port), *arguments)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)
    gateway.wait_for(f":{port}")
    eventually(lambda: http.get("/readyz").status_code == 200, what="the gateway")
    return gateway, http


def body_of(num_tokens: int, every: float) -> dict[str, Any]:
    return {"model": "demo", "messages": script(f"tokens={num_tokens} every={every}"), "stream": True}


def whole(num_tokens: int) -> str:
    return "".join(f"{position} " for position in range(num_tokens))


def refuses(http: httpx.Client) -> bool:
    """Whether nobody listens where a client has its address."""
    try:
        httpx.get(f"{http.base_url}/healthz")
    except httpx.ConnectError:
        return True
    return False


def test_what_is_open_ends_and_nothing_new_is_taken(network: Machine) -> None:
    gateway, http = start_gateway(network)
    port = http.base_url.port
    assert port is not None
    text = ""
    with RawClient(port) as idle, http.stream("POST", "/v1/chat/completions", json=body_of(30, 0.1)) as answer:
        idle.send(request("GET", "/healthz"))
        assert idle.answer().status == 200
        pieces = answer.iter_text()
        while '"0 "' not in text:
            text += next(pieces)
        gateway.send(signal.SIGTERM)
        gateway.wait_for("stopping")
        idle.send(request("GET", "/readyz"))
        ready = idle.answer()
        assert (ready.status, ready.error["code"]) == (503, "draining")
        assert idle.ends()
        eventually(lambda: refuses(http), what="the end of listening")
        assert '"29 "' not in text
        text += "".join(pieces)
    assert text.endswith("data: [DONE]\n\n")
    assert text_of(events_of(text)) == whole(30)
    assert gateway.wait() == 0
    http.close()


def test_what_is_too_long_for_the_grace_time_is_handed_over_to_another_gateway(network: Machine) -> None:
    gateway, http = start_gateway(network, "--grace", "0.5")
    headers = {"Idempotency-Key": "handed-over"}
    text = ""
    with http.stream("POST", "/v1/chat/completions", json=body_of(40, 0.1), headers=headers) as answer:
        for piece in answer.iter_text():
            if not text:
                gateway.send(signal.SIGTERM)
            text += piece
    *events, (last_id, last) = events_of(text)
    assert (last_id, '"draining"' in last) == (None, True)
    assert gateway.wait() == 0
    assert events
    assert whole(40).startswith(text_of(events))
    rest = network.http.post(
        "/v1/chat/completions", json=body_of(40, 0.1), headers={**headers, "Last-Event-ID": str(events[-1][0])}
    )
    assert rest.headers["idempotent-replayed"] == "true"
    assert text_of([*events, *events_of(rest.text)]) == whole(40)
    assert network.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}").json()["attempts"] == 1
    http.close()


def test_a_second_signal_ends_it_at_once(network: Machine) -> None:
    gateway, http = start_gateway(network)
    with http.stream("POST", "/v1/chat/completions", json=body_of(1000, 0.1)) as answer:
        next(answer.iter_text())
        gateway.send(signal.SIGTERM)
        gateway.wait_for("stopping")
        began = time.monotonic()
        gateway.send(signal.SIGTERM)
        assert gateway.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10  # and not the grace time of 20 s
    http.close()


def test_a_gateway_with_idle_connections_stops_without_waiting_for_them(network: Machine) -> None:
    gateway, http = start_gateway(network)
    assert http.get("/healthz").status_code == 200
    began = time.monotonic()
    assert gateway.stop() == 0
    assert time.monotonic() - began < 10
    http.close()
