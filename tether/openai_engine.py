"""Another server behind the runtime's protocol: any that speaks OpenAI's dialect (vLLM, Ollama, llama.cpp's).

    python -m tether.openai_engine --model qwen2.5:7b --base-url http://127.0.0.1:11434/v1 --stream

For models that outgrow this machine's transformers. Such a server tells text and no token ids, so each piece of text that it
sends counts as one token, with the id -1, and a job that another worker had begun goes on by its text: the answer so far is
given as the beginning of the assistant's message. That is a continuation and not a replay: a sampled answer may go on
differently, and a stop string that straddles the cut is not seen.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import os
import queue
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from tether.bounds import MAX_COUNT
from tether.catalog import near_matches
from tether.chat import as_template, decode_chat
from tether.decoding import check_sampling
from tether.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelUnavailable,
    OutputInvalid,
    QueueFull,
    WorkerFailed,
    from_info,
)
from tether.records import ChatMessage, FinishReason, ModelInfo, Sampling, Usage
from tether.runtime import serve_by_hand, serve_stream, take_standard_streams
from tether.runtime_messages import End, Event, Generate, Stage, Started, Stats, Tokens, describe

log = logging.getLogger(__name__)

UNKNOWN_ID = -1
"""The id of a piece of text whose tokens are not known."""
REMOTE = "remote"
"""`ModelInfo.dtype` of a model whose weights another server holds: nobody can continue its answers by token."""
NO_LIMIT = sys.maxsize
"""The server's memory is its own affair: what this worker promises of it is its slots."""
START_SECONDS = 10.0
SILENCE_SECONDS = 120.0
"""A server that sends nothing for so long has failed at the request; a long prompt is read in less."""
WAIT_SECONDS = 0.02
"""How long a step waits for something to tell before new lines are read."""
MAX_ERROR_BYTES = 64 << 10
MAX_LINE_BYTES = 1 << 20
_TEMPLATE_WORDS = ("context length", "context size", "maximum context", "context window", "too long")

_NOT_FORWARDED = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "logprobs",
    "regex",
)
"""What the dialect has no word for; a server would ignore it without a word, so it is refused here."""


class Upstream:
    """An OpenAI-compatible server at a base URL such as `http://127.0.0.1:8000/v1`; every call opens a connection."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Raises `ModelUnavailable` for what is no http or https URL."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
            raise ModelUnavailable(f"--base-url is a URL such as http://127.0.0.1:8000/v1, not `{base_url}`")
        self.base_url = base_url
        self._secure = parts.scheme == "https"
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def connect(self, timeout_seconds: float) -> http.client.HTTPConnection:
        """Return a connection that is not open yet."""
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout_seconds, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout_seconds)

    def send(
        self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any] | None = None
    ) -> http.client.HTTPResponse:
        """Send a request, a POST where there is a body, and return the answer's head; blocks."""
        payload = None if body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", self._path + path, payload, self._headers)
        return connection.getresponse()

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the server lists; blocks. Raises `ModelUnavailable` saying what to do when it does not."""
        connection = self.connect(START_SECONDS)
        try:
            response = self.send(connection, "/models")
            text = response.read(MAX_LINE_BYTES)
        except (OSError, http.client.HTTPException) as exc:
            why = "refuses connections" if isinstance(exc, ConnectionRefusedError) else f"does not answer ({exc})"
            raise ModelUnavailable(f"{self.base_url} {why}: start the server there, or correct --base-url") from exc
        finally:
            connection.close()
        if response.status in {401, 403}:
            raise ModelUnavailable(
                f"{self.base_url} wants a key (HTTP {response.status}): put it in an environment variable and name that "
                "with --api-key-env"
            )
        found = _json(text)
        listed = found.get("data") if isinstance(found, dict) else None
        if response.status != 200 or not isinstance(listed, list):
            raise ModelUnavailable(
                f"{self.base_url}/models is not an OpenAI-compatible list (HTTP {response.status}): "
                "--base-url mostly ends in /v1"
            )
        return [entry for entry in listed if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


class _Live:
    """A request on its way, and the thread that listens to the server for it."""

    def __init__(self, request: Generate, connection: http.client.HTTPConnection) -> None:
        self.request = request
        self.connection = connection
        self.position = len(request.emitted[0]) if request.emitted else 0
        self.usage = Usage()
        self.num_pieces = 0
        self.began = time.monotonic()
        self.first_at: float | None = None
        self.is_cancelled = False

    def close(self) -> None:
        """Close the server's stream, so that it stops generating; its thread wakes and ends."""
        self.is_cancelled = True
        raw = self.connection.sock
        if raw is not None:
            try:
                raw.shutdown(socket.SHUT_RDWR)
            except OSError as exc:
                log.debug("the connection was closed already: %s", exc)


class RemoteEngine:
    """Answers requests by a server, `slots` at once; an engine as `runtime.Loop` wants it."""

    def __init__(self, upstream: Upstream, model: str, info: ModelInfo) -> None:
        self.info = info
        self._upstream = upstream
        self._model = model
        self._live: dict[str, _Live] = {}
        self._heard: queue.SimpleQueue[tuple[_Live, Event]] = queue.SimpleQueue()
        self._told_now: list[Event] = []
        self._tokens_per_second = 0.0
        self._first_token_seconds = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to hear and nothing to tell."""
        return not self._live and not self._told_now

    def knows(self, request_id: str) -> bool:
        """Whether a request with this id is live."""
        return request_id in self._live

    def add(self, request: Generate) -> None:
        """Hand a request, whose id is not live, to the server.

        Raises `InvalidRequest` for what the dialect cannot say, `QueueFull` when every slot is taken.
        """
        check_sampling(request.sampling)
        _check_forwarded(request.sampling)
        if request.chat and decode_chat(request.input).tools:
            raise InvalidRequest("this model is served by another server, which is not asked with tools", param="tools")
        if len(self._live) >= self.info.slots:
            raise QueueFull("every slot of this runtime is taken")
        live = _Live(request, self._upstream.connect(SILENCE_SECONDS))
        remaining = request.sampling.max_tokens - live.position
        self._told_now.append(Started(request.id, 0))
        if remaining < 1:
            self._told_now.append(End(request.id, "length"))
            return
        self._live[request.id] = live
        threading.Thread(target=self._serve, args=(live, remaining), name=request.id, daemon=True).start()

    def cancel(self, request_id: str) -> bool:
        """End a live request; the server's stream is closed. False: it is not live."""
        live = self._live.pop(request_id, None)
        if live is None:
            return False
        live.close()
        self._told_now.append(self._end(live, "cancelled"))
        return True

    def step(self) -> list[Event]:
        """Return what has been heard since the last step; wait a moment where that is nothing."""
        events, self._told_now = self._told_now, []
        try:
            while self._live:
                live, event = self._heard.get(timeout=0.0 if events else WAIT_SECONDS)
                if self._live.get(live.request.id) is not live:
                    continue  # cancelled meanwhile, and told so
                if isinstance(event, End):
                    del self._live[live.request.id]
                    event = msgspec.structs.replace(event, stats=self._stats)
                events.append(event)
        except queue.Empty:
            return events
        return events

    def answer(self, request: Generate) -> tuple[str, FinishReason]:
        """Return the whole text of a request, and how it ended, while nothing else runs; raises what it ended with."""
        self.add(request)
        text = ""
        while True:
            for event in self.step():
                if isinstance(event, Tokens):
                    text += event.text
                elif isinstance(event, End):
                    if event.error is not None:
                        raise from_info(event.error)
                    return text, event.finish_reason

    @property
    def _stats(self) -> Stats:
        return Stats(
            tokens_per_second=round(self._tokens_per_second, 2),
            time_to_first_token_seconds=round(self._first_token_seconds, 4),
            free_kv_tokens=NO_LIMIT,
            running=len(self._live),
        )

    # --- in a request's own thread -----------------------------------------------------------------------------------

    def _serve(self, live: _Live, remaining: int) -> None:
        try:
            reason = self._listen(live, remaining)
            end = self._end(live, reason)
        except (OSError, http.client.HTTPException) as exc:
            error = WorkerFailed(f"the server behind this worker failed: {exc or type(exc).__name__}")
            end = End(live.request.id, "error", self._usage(live), error.to_info(), retry=True)
        except Exception as exc:  # noqa: BLE001 - one request's failure is its own end, whatever the server sent
            error_info, retry = describe(exc)
            end = End(live.request.id, "error", self._usage(live), error_info, retry)
        finally:
            live.connection.close()
        self._heard.put((live, end))

    def _listen(self, live: _Live, remaining: int) -> FinishReason:
        path, body = _request_body(self._model, live.request, remaining)
        response = self._upstream.send(live.connection, path, body)
        if live.is_cancelled:
            return "cancelled"
        if response.status != 200:
            _raise_refusal(response.status, response.read(MAX_ERROR_BYTES), live.request)
        finish_reason: FinishReason | None = None
        for chunk in _chunks(response):
            if isinstance(usage := chunk.get("usage"), dict):
                live.usage = Usage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")))
            text, reason = _piece(chunk)
            if text:
                self._tell(live, text)
            if reason is not None:
                finish_reason = "length" if reason == "length" else "stop"
        if finish_reason is None:
            raise WorkerFailed("the server behind this worker broke off in mid-answer")
        return finish_reason

    def _tell(self, live: _Live, text: str) -> None:
        now = time.monotonic()
        if live.first_at is None:
            live.first_at = now
            self._first_token_seconds = _average(self._first_token_seconds, now - live.began)
        # A server may tell one token's text in pieces: beyond what was asked for, a piece counts as none.
        ids = (UNKNOWN_ID,) if live.position < live.request.sampling.max_tokens else ()
        self._heard.put((live, Tokens(live.request.id, live.position, ids, text)))
        live.position += len(ids)
        live.num_pieces += len(ids)

    def _usage(self, live: _Live) -> Usage:
        """Return the tokens as the server counts them, or the pieces where it does not say."""
        return Usage(live.usage.prompt_tokens, live.usage.completion_tokens or live.num_pieces)

    def _end(self, live: _Live, reason: FinishReason) -> End:
        usage = self._usage(live)
        if live.first_at is not None and usage.completion_tokens > 1 and reason != "cancelled":
            seconds = time.monotonic() - live.first_at
            if seconds > 0:
                self._tokens_per_second = _average(self._tokens_per_second, (usage.completion_tokens - 1) / seconds)
        return End(live.request.id, reason, usage, tokens_per_second=round(self._tokens_per_second, 2))


def _count(said: object) -> int:
    """Return a count that the server says; 0 where it says none."""
    return min(max(0, said), MAX_COUNT) if isinstance(said, int) else 0


def _average(known: float, new: float) -> float:
    return known + (new - known) * (0.2 if known else 1.0)


def _check_forwarded(sampling: Sampling) -> None:
    plain = Sampling()
    for name in _NOT_FORWARDED:
        if getattr(sampling, name) != getattr(plain, name):
            raise InvalidRequest(f"this model is served by another server, which has no {name}", param=name)
    if sampling.n != 1:
        raise InvalidRequest("this model is served by another server, one answer for each request", param="n")


def _as_openai(message: ChatMessage) -> dict[str, Any]:
    """Return a message as the dialect writes it: with the arguments of calls as text."""
    found = as_template(message)
    for call, known in zip(found.get("tool_calls", ()), message.tool_calls, strict=False):
        call["function"]["arguments"] = known.arguments
    return found


def _request_body(model: str, request: Generate, remaining: int) -> tuple[str, dict[str, Any]]:
    """Return the path and the JSON of a request to the server."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": remaining,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # Some servers keep it in 32 bits with a sign.
        "seed": sampling.seed & 0x7FFFFFFF,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.presence_penalty:
        body["presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        body["frequency_penalty"] = sampling.frequency_penalty
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.json_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": json.loads(sampling.json_schema)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.raw:
        return "/completions", {**body, "prompt": request.input + request.emitted_text}
    if request.chat:
        body["messages"] = [_as_openai(message) for message in decode_chat(request.input).messages]
    else:
        body["messages"] = [{"role": "user", "content": request.input}]
    if request.emitted_text:
        body["messages"].append({"role": "assistant", "content": request.emitted_text})
        # vLLM begins a new message without these; Ollama and llama.cpp go on by themselves, and ignore them.
        body["continue_final_message"] = True
        body["add_generation_prompt"] = False
    return "/chat/completions", body


def _raise_refusal(status: int, text: bytes, request: Generate) -> None:
    """Raise what a server's refusal means for the request."""
    found = _json(text)
    error = found.get("error", found) if isinstance(found, dict) else {}
    said = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    message = str(said or f"HTTP {status}")[:500]
    if status in {401, 403}:
        # The operator's mistake, not the client's: another worker may have a key that works.
        raise WorkerFailed(f"the server behind this worker refuses its key (HTTP {status})")
    if status in {408, 425, 429} or status >= 500 or not 400 <= status < 500:
        raise WorkerFailed(f"the server behind this worker refused: {message} (HTTP {status})")
    folded = message.lower()
    if code == "context_length_exceeded" or any(words in folded for words in _TEMPLATE_WORDS):
        raise ContextLengthExceeded(message, param="input")
    if request.emitted_text and "continue_final_message" in folded:
        raise WorkerFailed(f"the server behind this worker cannot go on with an answer: {message}")
    raise InvalidRequest(f"the server behind this worker refused: {message} (HTTP {status})")


def _chunks(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a stream of server-sent events, up to `[DONE]` or its end."""
    while line := response.readline(MAX_LINE_BYTES):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        chunk = _json(data)
        if not isinstance(chunk, dict):
            raise OutputInvalid("the server behind this worker sent an event that is not JSON")
        if error := chunk.get("error"):
            said = error.get("message") if isinstance(error, dict) else error
            raise WorkerFailed(f"the server behind this worker failed in mid-answer: {str(said)[:500]}")
        yield chunk


def _piece(chunk: dict[str, Any]) -> tuple[str, str | None]:
    """Return the text that a chunk adds and why the answer ended with it, if it did."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", None
    delta = choices[0].get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choices[0].get("text")
    reason = choices[0].get("finish_reason")
    return text if isinstance(text, str) else "", reason if isinstance(reason, str) else None


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def connect(args: argparse.Namespace, on_progress: Callable[[Stage, float], None]) -> RemoteEngine:
    """Return the engine for a server that answers and lists the model; raise `ModelUnavailable` for any other. Blocks."""
    on_progress("warm-up", 0.0)
    api_key = None
    if args.api_key_env and not (api_key := os.environ.get(args.api_key_env)):
        raise ModelUnavailable(f"the environment variable {args.api_key_env}, named by --api-key-env, is not set")
    upstream = Upstream(args.base_url, api_key)
    listed = {entry["id"]: entry for entry in upstream.models()}
    entry = listed.get(args.model) or listed.get(f"{args.model}:latest")  # Ollama's way to write a name without a tag
    if entry is None:
        near = near_matches(args.model, listed) or list(listed)[:5]
        hint = f"it has {', '.join(f'`{name}`' for name in near)}" if near else "it has none"
        raise ModelUnavailable(f"{args.base_url} serves no model `{args.model}`; {hint}")
    meta = entry.get("meta")
    # vLLM says the first, llama.cpp's server the second, Ollama neither.
    context = entry.get("max_model_len") or (meta.get("n_ctx_train") if isinstance(meta, dict) else None)
    info = ModelInfo(
        name=args.served_name or args.model,
        version=args.served_version or "1.0",
        revision=f"remote:{entry['id']}",
        dtype=REMOTE,
        context_tokens=_count(context),
        slots=args.slots,
    )
    log.warning(
        "%s is served by %s, which tells no token ids: a job that moves here from a lost worker goes on by its text, "
        "not by its tokens",
        info.name,
        upstream.base_url,
    )
    on_progress("warm-up", 1.0)
    return RemoteEngine(upstream, entry["id"], info)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command's options; those of the other runtime that mean nothing here are let through."""
    parser = argparse.ArgumentParser(
        prog="python -m tether.openai_engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the model's name at that server")
    parser.add_argument("--base-url", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds its key")
    parser.add_argument("--slots", type=int, default=4, help="jobs at once (default: 4)")
    parser.add_argument("--as", dest="served_name", metavar="NAME", help="serve it under this name")
    parser.add_argument("--as-version", dest="served_version", metavar="VERSION", help="serve it as this version")
    parser.add_argument("--stream", action="store_true", help="speak the worker's protocol")
    parser.add_argument("--log-level", default="WARNING", help="of what goes to stderr")
    args = parser.parse_args(argv)
    if args.slots < 1:
        parser.error("--slots must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the child and return its exit code."""
    args = parse(argv)
    requests, pipe = take_standard_streams()
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return (serve_stream if args.stream else serve_by_hand)(args, requests, pipe, connect)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
