"""Behind nginx and Caddy from Debian, as `deploy/` has them: streams, uploads, addresses, paths, restarts."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.test_openai_clients import events_of, script, text_of
from tests.ports import free_port
from tests.processes import Machine, Process, eventually
from tests.proxies import Kind, Proxy
from tests.sockets import talk
from tests.sockets import text_of as said_on_socket

KINDS: tuple[Kind, ...] = ("nginx", "caddy")
NUM_TOKENS = 20
STREAM = {"model": "demo", "messages": script(f"tokens={NUM_TOKENS} every=0.1"), "stream": True}
WHOLE = "".join(f"{position} " for position in range(NUM_TOKENS))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose gateway logs as programs read it."""
    with Machine(tmp_path_factory.mktemp("network")) as machine:
        processes = [machine.start("orchestrator"), machine.start("worker", **machine.scripted(slots=16))]
        start_gateway(machine)
        machine.wait_ready(*processes)
        yield machine
        assert not any("Traceback" in process.output for process in machine._processes)


def start_gateway(machine: Machine, *arguments: str) -> Process:
    gateway = machine.start("gateway", "--log-format", "json", *arguments)
    gateway.wait_for("gateway  ")
    return gateway


@pytest.fixture(scope="module", params=KINDS)
def proxy(request: pytest.FixtureRequest, network: Machine) -> Iterator[Proxy]:
    with Proxy(request.param, network.folder / request.param, network.port) as found:
        yield found


def entries(process: Process) -> list[dict[str, Any]]:
    """Return what a gateway logged of requests."""
    lines = [json.loads(line) for line in process.output.splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("action") == "request"]


def gateway_of(machine: Machine) -> Process:
    """Return the gateway at the machine's own port."""
    found = [process for process in machine._processes if "gateway" in process.log.name and process.is_alive]
    return found[-1]


def entry_of(process: Process, request_id: str) -> dict[str, Any]:
    def find() -> dict[str, Any] | None:
        return next((each for each in entries(process) if each["request_id"] == request_id), None)

    return eventually(find, what=f"the line of {request_id}")


def test_a_streams_chunks_arrive_one_by_one_while_later_ones_are_still_to_come(network: Machine, proxy: Proxy) -> None:
    arrivals: list[float] = []
    text = ""
    with proxy.http.stream("POST", "/v1/chat/completions", json=STREAM) as answer:
        for piece in answer.iter_raw():
            if b'"content"' not in piece:
                continue
            arrivals.append(time.monotonic())
            text += piece.decode()
            if len(arrivals) == 1:
                job = network.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}").json()
                assert job["status"] == "running"
                assert f'"{NUM_TOKENS - 1} "' not in text
    gaps = sorted(1000 * (later - earlier) for earlier, later in itertools.pairwise(arrivals))
    print(f"gaps between chunks sent each 100 ms: median {gaps[len(gaps) // 2]:.0f}, largest {gaps[-1]:.0f} ms")  # noqa: T201
    # On busy cores a few come together; a proxy that buffers sends one or two pieces.
    assert len(arrivals) >= NUM_TOKENS // 2
    assert text_of([event for event in events_of(text) if event[1] != "[DONE]"]) == WHOLE


def test_a_stream_goes_on_through_the_proxy_when_the_gateway_behind_it_is_killed_and_started_again(
    network: Machine, proxy: Proxy
) -> None:
    headers = {"Idempotency-Key": f"restart-{proxy.port}"}
    text = ""
    with (
        contextlib.suppress(httpx.TransportError),
        proxy.http.stream("POST", "/v1/chat/completions", json=STREAM, headers=headers) as answer,
    ):
        for piece in answer.iter_text():
            text += piece
            if '"3 "' in text:
                gateway_of(network).kill()
    assert "[DONE]" not in text
    seen = events_of(text[: text.rfind("\n\n") + 2])
    away = proxy.http.get("/v1/models")
    assert (away.status_code, away.json()["error"]["code"], away.headers["retry-after"]) == (503, "no_gateway", "2")
    start_gateway(network)
    eventually(lambda: proxy.http.get("/readyz").status_code == 200, what="the gateway behind the proxy")
    resumed = proxy.http.post(
        "/v1/chat/completions", json=STREAM, headers={**headers, "Last-Event-ID": str(seen[-1][0])}
    )
    rest = events_of(resumed.text)
    assert rest[-1] == (None, "[DONE]")
    assert text_of([*seen, *rest]) == WHOLE
    job_id = resumed.headers["x-tether-job-id"]
    again = proxy.http.get(f"/v1/jobs/{job_id}/stream", headers={"Last-Event-ID": str(seen[-1][0])})
    assert text_of([*seen, *events_of(again.text)]) == WHOLE


def test_a_client_that_leaves_the_proxy_ends_its_job(network: Machine, proxy: Proxy) -> None:
    body = {**STREAM, "messages": script("tokens=1000 every=0.05")}
    with proxy.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_raw())
        job_id = answer.headers["x-tether-job-id"]
    eventually(lambda: network.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled", what="the end")


def test_a_job_on_a_websocket_is_streamed_as_it_comes_and_cancelled_through_the_proxy(
    network: Machine, proxy: Proxy
) -> None:
    with talk(proxy.url.replace("localhost", "127.0.0.1"), ssl=proxy.context) as socket:
        socket.chat("a", "tokens=1000 every=0.05")
        (accepted,) = [each for each in socket.until("accepted", "a") if each["type"] == "accepted"]
        heard = [each for _ in range(3) for each in socket.until("event", "a")]
        job = f"/v1/jobs/{accepted['job_id']}"
        assert network.http.get(job).json()["status"] == "running", "not held back until the end"
        socket.say(type="cancel", id="a")
        heard += socket.run("a")
        assert said_on_socket(heard).startswith("0 1 ")
        assert heard[-1]["error"]["code"] == "job_cancelled"
        eventually(lambda: network.http.get(job).json()["status"] == "cancelled", what="the end")


def test_a_large_body_goes_through_and_one_over_the_limit_is_refused_by_the_gateway(proxy: Proxy) -> None:
    body = {"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=1 " + "x" * 250_000}
    assert proxy.http.post("/infer", json=body).status_code == 200
    for size in (300_000, 20_000_000):
        refused = proxy.http.post("/infer", json={**body, "input": "x" * size})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large"), size


def test_the_log_has_the_clients_own_address_whatever_it_claims(network: Machine, proxy: Proxy) -> None:
    with proxy.client("127.0.0.7") as http:
        http.get("/v1/models", headers={"X-Request-Id": f"near-{proxy.port}", "X-Forwarded-For": "203.0.113.9"})
    entry = entry_of(gateway_of(network), f"near-{proxy.port}")
    assert (entry["client"], entry["path"], entry["status"]) == ("127.0.0.7", "/v1/models", 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gateway_below_a_path_of_the_proxy_names_itself_by_it(network: Machine, kind: Kind) -> None:
    port = free_port()
    gateway = network.start("gateway", "--port", str(port), "--root-path", "/tether")
    gateway.wait_for(f":{port}")
    with Proxy(kind, network.folder / f"{kind}-below", port, path="/tether") as proxy:
        eventually(lambda: proxy.http.get("/tether/readyz").status_code == 200, what="the gateway")
        document = proxy.http.get("/tether/openapi.json").json()
        assert [server["url"] for server in document["servers"]] == ["/tether"]
        assert proxy.http.get("/tether/docs").status_code == 200
        body = {"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=1", "wait": False}
        accepted = proxy.http.post("/tether/infer", json=body)
        assert accepted.headers["location"].startswith("/tether/v1/jobs/")
        assert proxy.http.get(accepted.headers["location"]).status_code == 200
        # A misspelt field finds its neighbour below a path as without one.
        wrong = proxy.http.post("/tether/infer", json={**body, "inptu": 1}).json()["error"]
        assert "did you mean 'input'" in wrong["message"]
        # A proxy that takes the path away is served too.
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200
    gateway.stop()


def test_only_a_trusted_proxy_says_who_the_client_is(network: Machine) -> None:
    for trusted, seen in (("127.0.0.1", "203.0.113.9"), ("192.0.2.1,198.51.100.0/24", "127.0.0.1"), ("", "127.0.0.1")):
        port = free_port()
        gateway = network.start("gateway", "--log-format", "json", "--port", str(port), "--trusted-proxies", trusted)
        gateway.wait_for(f":{port}")
        headers = {"X-Forwarded-For": "10.0.0.1, 203.0.113.9", "X-Request-Id": "spoof"}
        httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers)
        assert entry_of(gateway, "spoof")["client"] == seen, trusted
        gateway.stop()


def test_the_log_says_who_asked_and_what_came_of_it_but_no_key_and_no_prompt(network: Machine) -> None:
    body = {"model": "demo", "messages": script("tokens=3 password=hunter2"), "tenantId": "acme"}
    answer = network.http.post(
        "/v1/chat/completions?token=sk-query",
        json=body,
        headers={"X-Request-Id": "told", "Authorization": "Bearer sk-anything"},
    )
    gateway = gateway_of(network)
    entry = entry_of(gateway, "told")
    assert (entry["method"], entry["path"], entry["status"]) == ("POST", "/v1/chat/completions", answer.status_code)
    assert (entry["job_id"], entry["tenant_id"]) == (answer.headers["x-tether-job-id"], "acme")
    assert entry["num_bytes"] == len(answer.content)
    assert 0 < entry["duration_seconds"] < 60
    assert "sk-" not in gateway.output
    assert "hunter2" not in gateway.output
