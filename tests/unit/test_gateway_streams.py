"""A stream over a network that is played: what a client reads when nothing comes, and when something breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import msgspec
import pytest
from openai import APIStatusError, AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.played import SILENCE_SECONDS, PlayedNetwork
from tether.errors import NoOrchestrator, NoWorker, QueueFull
from tether.gateway import create_app
from tether.messages import (
    JobAccepted,
    JobEnd,
    JobEvent,
    JobQueued,
    JobStarted,
    JobTokens,
    KeyClaimed,
)
from tether.records import JobRecord, Sampling, Usage
from tether.settings import GatewaySettings

ACCEPTED = JobAccepted("j", "running", "1.0")
STARTED = JobStarted("j", 1, "w", "w", "rev", "float32")
END = JobEnd("j", "completed", 1, "stop", Usage(1, 2))


def tokens(position: int, text: str) -> JobTokens:
    return JobTokens("j", 1, position, (position,), text)


async def chunks_of(network: PlayedNetwork) -> list[ChatCompletionChunk]:
    """Ask with the real client, streamed."""
    app = create_app(network, GatewaySettings(keepalive_seconds=SILENCE_SECONDS))
    transport = httpx2.ASGITransport(app=app)
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        AsyncOpenAI(base_url="http://localhost/v1", api_key="sk-any", max_retries=0, http_client=http) as client,
    ):
        messages: Any = [{"role": "user", "content": "x"}]
        stream: AsyncStream[ChatCompletionChunk] = await client.chat.completions.create(
            model="demo", messages=messages, stream=True
        )
        return [chunk async for chunk in stream]


def test_a_client_reads_on_through_silences_and_queues_in_mid_stream() -> None:
    queued = JobQueued("j", 1, 60.0)
    network = PlayedNetwork(
        ACCEPTED, queued, None, STARTED, None, tokens(0, "a"), None, queued, STARTED, tokens(1, "b"), None, END
    )
    chunks = asyncio.run(chunks_of(network))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert network.num_closed == 1


@pytest.mark.parametrize(
    ("events", "status", "code"),
    [
        ([NoOrchestrator()], 503, "no_orchestrator"),
        ([JobEnd("j", "failed", 0, "error", Usage(), QueueFull("full").to_info())], 503, "queue_full"),
        ([ACCEPTED, STARTED, JobEnd("j", "failed", 1, "error", Usage(), NoWorker("x").to_info())], 503, "no_worker"),
    ],
)
def test_what_fails_before_the_first_token_is_a_status(events: list[Any], status: int, code: str) -> None:
    with pytest.raises(APIStatusError) as caught:
        asyncio.run(chunks_of(PlayedNetwork(*events)))
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert int(caught.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('{"a": ' + "1" * 5000 + "}", '{"a": ' + "1" * 5000 + "}", None),
        ('{"arguments": {"a": "\\ud800"}, "name": "f"}', None, '{"a": "\ufffd"}'),
        ('{"name": "f", "arguments": "\\udc00"}', None, "\ufffd"),
    ],
)
def test_whatever_a_model_writes_with_tools_is_an_answer(
    text: str, content: str | None, arguments: str | None, streams: bool
) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": streams}
    body["tools"] = [{"type": "function", "function": {"name": "f"}}]

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(
            app=create_app(PlayedNetwork(ACCEPTED, STARTED, tokens(0, text), END), GatewaySettings())
        )
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/v1/chat/completions", json=body)

    answer = asyncio.run(ask())
    assert answer.status_code == 200
    if streams:
        events = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
        told = [msgspec.json.decode(event)["choices"][0]["delta"] for event in events]
        found = "".join(delta.get("content") or "" for delta in told) or None
        calls = [call for delta in told for call in delta.get("tool_calls", ())]
    else:
        message = answer.json()["choices"][0]["message"]
        found, calls = message["content"], message.get("tool_calls", [])
    assert found == content
    assert "".join(call["function"]["arguments"] for call in calls) == (arguments or "")


class ClaimedNetwork(PlayedNetwork):
    """Every idempotency key is new."""

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:  # noqa: ARG002
        return KeyClaimed(0, job_id)


class EndedNetwork(PlayedNetwork):
    """Every idempotency key is a job's that has ended, and whose input was not kept."""

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:  # noqa: ARG002
        record = JobRecord(
            id="j", tenant_id=tenant_id, model="demo", version="1.0", status="completed", attempt=1, input=None,
            result=CALL, finish_reason="stop", error=None, usage=Usage(), sampling=Sampling(), wait=True, stream=False,
            priority=0, deadline_seconds=9.0, region=None, session_key=None, keep="result", orchestrator_id=None,
            worker_id=None, created_at=0.0, started_at=None, ended_at=1.0, form="chat",
        )  # fmt: skip
        return KeyClaimed(0, "j", record)

    async def watch(self, job_id: str, tenant_id: str | None) -> AsyncGenerator[list[JobEvent], None]:  # noqa: ARG002
        yield [ACCEPTED, STARTED, tokens(0, CALL), END]


CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'


def test_the_same_request_has_its_calls_again_where_its_input_was_not_kept() -> None:
    async def ask() -> httpx2.Response:
        app = create_app(EndedNetwork(), GatewaySettings())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as http:
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "keep": "result",
            }
            return await http.post("/v1/chat/completions", json=body, headers={"idempotency-key": "k"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (200, "true")
    message = answer.json()["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]["arguments"]) == (None, '{"a": 1}')


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(
    ("path", "param", "more"),
    [
        ("/v1/chat/completions", "tools", {"tool_choice": "required"}),
        ("/v1/responses", "tools", {}),
        ("/infer", "jsonSchema", {}),
    ],
)
def test_a_schema_has_a_bounded_nesting(path: str, param: str, more: dict[str, Any], keyed: bool) -> None:
    async def ask(depth: int) -> httpx2.Response:
        schema = nested(depth)
        function = {"name": "f", "parameters": schema}
        bodies: dict[str, dict[str, Any]] = {
            "/v1/chat/completions": {
                "model": "m",
                "messages": [{"role": "user", "content": "x"}],
                "tools": [{"type": "function", "function": function}],
            },
            "/v1/responses": {"model": "m", "input": "x", "tools": [{"type": "function", **function}]},
            "/infer": {"tenantId": "t", "modelId": "m", "version": "1", "input": "x", "jsonSchema": schema},
        }
        app = create_app(ClaimedNetwork(ACCEPTED, STARTED, tokens(0, "{}"), END), GatewaySettings())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as http:
            headers = {"idempotency-key": "k"} if keyed else {}
            return await http.post(path, json={**bodies[path], **more}, headers=headers)

    assert asyncio.run(ask(60)).status_code == 200
    for depth in (65, 200, 300):
        refused = asyncio.run(ask(depth))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
