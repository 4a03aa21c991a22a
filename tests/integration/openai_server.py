"""A server that streams as vLLM does, in its own process: `python openai_server.py PORT_FD`. Its prompt is its script.

    words=N       the answer has N words "w0 w1 …" (3)
    every=S       seconds before each word (0)
    letters=1     each letter is an event of its own
    status=CODE   refused with this HTTP status; say=TEXT is the message, with "_" for spaces
    break_at=N    the process dies before word N
    error_at=N    an error event comes before word N
    cut_at=N      the stream ends before word N

An answer that is begun (a last message of the assistant) goes on after its words. `GET /seen` tells the bodies that came,
`GET /left` answers when a client has left its stream.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = os.environ.get("SERVER_KEY")
MODEL = "served-model"


class ScriptedServer:
    """The routes, and what came in on them."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.left = asyncio.Event()

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/seen", self.seen),
                Route("/left", self.wait_for_leaver),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        if KEY and request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
        return None

    async def models(self, request: Request) -> Response:
        return self._refusal(request) or JSONResponse({"data": [{"id": MODEL, "max_model_len": 128}]})

    async def seen(self, _request: Request) -> Response:
        return JSONResponse(self.bodies)

    async def wait_for_leaver(self, _request: Request) -> Response:
        await self.left.wait()
        return JSONResponse({})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        script = dict(word.split("=", 1) for word in prompt.split() if "=" in word)
        if "status" in script:
            message = script.get("say", "as the script says").replace("_", " ")
            return JSONResponse({"error": {"message": message}}, int(script["status"]))
        return self._refusal(request) or StreamingResponse(self._watched(body, script), media_type="text/event-stream")

    async def _watched(self, body: dict[str, Any], script: dict[str, str]) -> AsyncIterator[str]:
        is_whole = False
        try:
            async for event in _events(body, script):
                yield event
            is_whole = True
        finally:
            if not is_whole:
                self.left.set()


async def _events(body: dict[str, Any], script: dict[str, str]) -> AsyncIterator[str]:
    is_chat = "messages" in body
    begun = body["messages"][-1]["content"] if is_chat and body["messages"][-1]["role"] == "assistant" else ""
    first, last = len(begun.split()), int(script.get("words", "3"))
    if is_chat:
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for number in range(first, min(last, first + body["max_tokens"])):
        await asyncio.sleep(float(script.get("every", "0")))
        if script.get("break_at") == str(number):
            os._exit(1)
        if script.get("cut_at") == str(number):
            return
        if script.get("error_at") == str(number):
            yield _event({"error": {"message": "the engine died"}})
            return
        word = f"w{number} "
        for text in word if "letters" in script else [word]:
            piece = {"delta": {"content": text}} if is_chat else {"text": text}
            yield _event({"choices": [{"index": 0, "finish_reason": None, **piece}]})
    reason = "length" if last - first > body["max_tokens"] else "stop"
    yield _event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": reason}]})
    yield _event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": last - first}})
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    uvicorn.Server(uvicorn.Config(ScriptedServer().app, log_level="warning")).run(sockets=[listening])
