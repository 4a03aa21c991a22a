"""What a client, and a web page, is told when something breaks that nobody thought of."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.played import SILENCE_SECONDS, PlayedNetwork
from tether.access_log import AccessLog
from tether.gateway import create_app
from tether.messages import Authenticated, JobAccepted, JobStarted, JobTokens
from tether.settings import GatewaySettings

ORIGIN = "https://chat.example.org"
MESSAGES = [{"role": "user", "content": "x"}]
BODIES: dict[str, dict[str, Any]] = {
    "/infer": {"tenantId": "t", "modelId": "demo", "version": "1", "input": "x"},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES},
    "/v1/completions": {"model": "demo", "prompt": "x"},
    "/v1/responses": {"model": "demo", "input": "x"},
    "/v1/embeddings": {"model": "demo", "input": "x"},
}
BEGINNING = (JobAccepted("j", "running", "1.0"), JobStarted("j", 1, "w", "w"), JobTokens("j", 1, 0, (1,), "a"))


class BrokenAuthority(PlayedNetwork):
    """Breaks before a request is even let in."""

    async def authenticate(self, key_digest: str | None) -> Authenticated:  # noqa: ARG002 - the interface has it
        raise KeyError("a bug")


def ask(network: PlayedNetwork, call: Callable[[httpx.AsyncClient], Any]) -> httpx.Response:
    """Ask as a web page does."""

    async def run() -> httpx.Response:
        settings = GatewaySettings(keepalive_seconds=SILENCE_SECONDS, cors_origins=(ORIGIN,))
        transport = httpx.ASGITransport(app=AccessLog(create_app(network, settings)))  # an exception would be raised
        headers = {"origin": ORIGIN, "x-request-id": "mine-1"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http:
            answer: httpx.Response = await call(http)
            return answer

    return asyncio.run(run())


def check_error(error: dict[str, Any]) -> None:
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
    assert "mine-1" in error["message"]
    assert "a bug" not in error["message"]


@pytest.mark.parametrize("network", [PlayedNetwork(RuntimeError("a bug")), BrokenAuthority()], ids=["job", "key"])
@pytest.mark.parametrize("path", BODIES)
def test_a_mistake_of_ours_is_an_error_that_a_web_page_can_read(
    caplog: pytest.LogCaptureFixture, network: PlayedNetwork, path: str
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = ask(network, lambda http: http.post(path, json=BODIES[path]))
    assert answer.status_code == 500
    check_error(answer.json()["error"])
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    [record] = [each for each in caplog.records if each.name == "tether.last_resort"]
    assert "mine-1" in record.getMessage()
    assert record.exc_info is not None


def test_a_route_without_a_job_that_breaks_is_answered_so_too() -> None:
    answer = ask(PlayedNetwork(), lambda http: http.get("/readyz"))  # nobody plays it
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (500, ORIGIN)
    check_error(answer.json()["error"])


@pytest.mark.parametrize("path", [path for path in BODIES if path != "/v1/embeddings"])
def test_a_mistake_in_mid_stream_is_its_last_event(path: str) -> None:
    network = PlayedNetwork(*BEGINNING, None, RuntimeError("a bug"))
    answer = ask(network, lambda http: http.post(path, json={**BODIES[path], "stream": True}))
    assert answer.status_code == 200
    *_, last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    check_error(json.loads(last.removeprefix("data: "))["error"])
    assert "[DONE]" not in answer.text
    assert network.num_closed == 1
