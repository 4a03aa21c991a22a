"""A stream over a network that is played: what a client reads when nothing comes, and when something breaks."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk

from tests.played import SILENCE_SECONDS, PlayedNetwork
from tether.errors import NoOrchestrator, NoWorker, QueueFull
from tether.gateway import create_app
from tether.messages import (
    JobAccepted,
    JobEnd,
    JobQueued,
    JobStarted,
    JobTokens,
)
from tether.records import Usage
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
