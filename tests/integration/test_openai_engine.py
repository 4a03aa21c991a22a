"""Another server lent to the network: real processes on both sides of real pipes and real HTTP on loopback."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tether.errors import UsageError
from tether.node import _offer, check_models
from tether.records import ModelInfo, Sampling, Usage
from tether.runtime_messages import (
    Cancel,
    End,
    Event,
    Fatal,
    Generate,
    Loading,
    Ready,
    Request,
    Tokens,
    decode_event,
    encode,
)
from tether.settings import WorkerSettings

PATIENCE_SECONDS = 30.0
MODEL = "served-model"
SERVER = Path(__file__).with_name("openai_server.py")


class Server:
    """The stand-in for vLLM, in a process of its own on a free port."""

    def __init__(self, key: str | None = None) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        environment = {**os.environ, **({"SERVER_KEY": key} if key else {})}
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), str(listening.fileno())], pass_fds=[listening.fileno()], env=environment
        )
        listening.close()  # the process has it; who connects before it serves waits in its queue
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)

    def body(self, prompt: str) -> dict[str, Any]:
        """The request that came with this prompt."""
        found: dict[str, Any] = next(b for b in self.get("/seen") if b["messages"][0]["content"] == prompt)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)


class Child:
    """The forwarding runtime, whose events arrive in a queue."""

    def __init__(self, url: str, *options: str, env: dict[str, str] | None = None, model: str = MODEL) -> None:
        command = [sys.executable, "-m", "tether.openai_engine", "--stream", "--model", model, "--base-url", url]
        self.process = subprocess.Popen(
            [*command, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def send(self, request: Request) -> None:
        assert self.process.stdin
        self.process.stdin.write(encode(request))
        self.process.stdin.flush()

    def next(self) -> Event:
        line = self._lines.get(timeout=PATIENCE_SECONDS)
        assert line, "the child ended"
        return decode_event(line)

    def started(self) -> Ready | Fatal:
        while isinstance(event := self.next(), Loading):
            pass
        assert isinstance(event, Ready | Fatal)
        return event

    def ready(self) -> ModelInfo:
        event = self.started()
        assert isinstance(event, Ready), event
        return event.model

    def until_end(self, request_id: str) -> tuple[list[Tokens], End]:
        tokens = []
        while not (isinstance(event := self.next(), End) and event.id == request_id):
            if isinstance(event, Tokens) and event.id == request_id:
                tokens.append(event)
        return tokens, event

    def ask(self, text: str, sampling: Sampling | None = None, **more: Any) -> tuple[list[Tokens], End]:
        self.send(Generate("ask", text, sampling or Sampling(), **more))
        return self.until_end("ask")

    def close(self) -> str:
        """Close its stdin and return what it wrote to stderr."""
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.process.stdin.close()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()
            self._thread.join()
            self.process.stdout.close()
            errors = self.process.stderr.read().decode()
            self.process.stderr.close()
        return errors


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def child(server: Server) -> Iterator[Child]:
    found = Child(server.url, "--slots", "3", "--as", "big", "--as-version", "2.0")
    model = found.ready()
    assert (model.name, model.version, model.slots, model.dtype) == ("big", "2.0", 3, "remote")
    assert (model.context_tokens, model.revision) == (128, f"remote:{MODEL}")
    yield found
    found.close()


def text_of(tokens: list[Tokens]) -> str:
    return "".join(event.text for event in tokens)


def test_an_answer_streams_piece_by_piece_with_the_servers_own_count(child: Child) -> None:
    tokens, end = child.ask("words=3")
    assert [(event.position, event.token_ids, event.text) for event in tokens] == [
        (0, (-1,), "w0 "),
        (1, (-1,), "w1 "),
        (2, (-1,), "w2 "),
    ]
    assert (end.finish_reason, end.usage, end.error) == ("stop", Usage(7, 3), None)
    assert end.stats is not None
    assert end.stats.time_to_first_token_seconds > 0


def test_a_server_that_tells_tokens_in_pieces_has_no_more_of_them_than_were_asked_for(child: Child) -> None:
    tokens, end = child.ask("words=2 letters=1", Sampling(max_tokens=2))
    assert text_of(tokens) == "w0 w1 "
    assert [token for event in tokens for token in event.token_ids] == [-1, -1]
    assert [event.position for event in tokens] == [0, 1, 2, 2, 2, 2]
    assert (end.finish_reason, end.usage) == ("stop", Usage(7, 2))


def test_sampling_is_forwarded_in_the_dialects_words(child: Child, server: Server) -> None:
    schema = '{"type": "object"}'
    sampling = Sampling(
        max_tokens=2,
        temperature=0.5,
        top_p=0.9,
        stop=("END",),
        seed=2**40 + 3,
        presence_penalty=0.5,
        json_schema=schema,
    )
    tokens, end = child.ask("words=9 sampled", sampling)
    assert len(tokens) == 2
    assert end.finish_reason == "length"
    body = server.body("words=9 sampled")
    expected = {"model": MODEL, "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "stop": ["END"], "seed": 3}
    assert expected.items() <= body.items()
    assert body["presence_penalty"] == 0.5
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_an_answer_that_was_begun_goes_on_by_its_text(child: Child, server: Server) -> None:
    tokens, end = child.ask("words=4 begun", emitted=((5, 6),), emitted_text="w0 w1 ")
    assert [(event.position, event.text) for event in tokens] == [(2, "w2 "), (3, "w3 ")]
    assert end.finish_reason == "stop"
    body = server.body("words=4 begun")
    assert body["messages"][1] == {"role": "assistant", "content": "w0 w1 "}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert body["max_tokens"] == 254


def test_a_raw_prompt_is_a_completion(child: Child) -> None:
    tokens, end = child.ask("words=2", raw=True)
    assert text_of(tokens) == "w0 w1 "
    assert end.finish_reason == "stop"


@pytest.mark.parametrize(
    ("script", "code", "retry"),
    [
        ("status=400 say=no_such_thing", "invalid_request", False),
        ("status=400 say=This_model's_maximum_context_length_is_128_tokens", "context_length_exceeded", False),
        ("status=422", "invalid_request", False),
        ("status=401", "worker_failed", True),
        ("status=429", "worker_failed", True),
        ("status=500", "worker_failed", True),
        ("status=503", "worker_failed", True),
        ("error_at=1", "worker_failed", True),
        ("cut_at=2", "worker_failed", True),
    ],
)
def test_a_refusal_says_whether_another_worker_might_do_better(
    child: Child, script: str, code: str, retry: bool
) -> None:
    _, end = child.ask(script)
    assert end.finish_reason == "error"
    assert end.error is not None
    assert (end.error.code, end.retry) == (code, retry)


def test_what_the_dialect_has_no_word_for_is_refused(child: Child) -> None:
    for param, sampling in {
        "top_k": Sampling(top_k=5),
        "n": Sampling(n=2),
        "regex": Sampling(regex="a+"),
        "max_tokens": Sampling(max_tokens=0),
    }.items():
        _, end = child.ask("words=1", sampling)
        assert end.error is not None
        assert (end.error.code, end.error.param, end.retry) == ("invalid_request", param, False)


def test_a_cancel_closes_the_servers_stream_and_frees_the_slot(child: Child, server: Server) -> None:
    child.send(Generate("slow", "words=100000 every=0.01", Sampling(max_tokens=100_000)))
    while not isinstance(child.next(), Tokens):
        pass
    child.send(Cancel("slow"))
    _, end = child.until_end("slow")
    assert end.finish_reason == "cancelled"
    assert end.usage.completion_tokens >= 1
    server.get("/left")
    assert child.ask("words=1")[1].finish_reason == "stop"


def test_more_jobs_than_slots_are_told_so(child: Child) -> None:
    slow = [f"slow-{number}" for number in range(3)]
    for request_id in slow:
        child.send(Generate(request_id, "words=100000 every=0.01", Sampling(max_tokens=100_000)))
    _, end = child.ask("words=1")
    assert end.error is not None
    assert (end.error.code, end.retry) == ("queue_full", True)
    for request_id in slow:
        child.send(Cancel(request_id))
        child.until_end(request_id)


def test_jobs_run_at_the_same_time(child: Child) -> None:
    child.send(Generate("long", "words=100000 every=0.01", Sampling(max_tokens=100_000)))
    while not isinstance(child.next(), Tokens):
        pass
    assert text_of(child.ask("words=2")[0]) == "w0 w1 "
    child.send(Cancel("long"))
    assert child.until_end("long")[1].finish_reason == "cancelled"


def test_a_server_that_dies_in_mid_answer_is_a_failure_that_another_worker_may_mend() -> None:
    server = Server()
    child = Child(server.url)
    try:
        child.ready()
        tokens, end = child.ask("words=5 break_at=2")
        assert text_of(tokens) == "w0 w1 "
        assert end.error is not None
        assert (end.error.code, end.retry) == ("worker_failed", True)
        _, end = child.ask("words=1")
        assert end.error is not None
        assert end.retry
    finally:
        child.close()
        server.close()


def test_it_says_at_start_that_jobs_go_on_by_text(server: Server) -> None:
    child = Child(server.url)
    child.ready()
    assert "goes on by its text" in child.close()


def fatal(url: str, *options: str, model: str = MODEL, env: dict[str, str] | None = None) -> str:
    child = Child(url, *options, model=model, env=env)
    try:
        event = child.started()
        assert isinstance(event, Fatal), event
        assert event.error.code == "model_unavailable"
        return event.error.message
    finally:
        child.close()


def test_a_server_that_cannot_be_used_is_one_line_at_start(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        free = closed.getsockname()[1]
    assert "refuses connections: start the server there" in fatal(f"http://127.0.0.1:{free}/v1")
    assert f"serves no model `served-mode`; it has `{MODEL}`" in fatal(server.url, model="served-mode")
    assert "--base-url mostly ends in /v1" in fatal(server.url.removesuffix("/v1"))
    assert "is a URL such as" in fatal("localhost:8000")
    assert "NO_SUCH_KEY" in fatal(server.url, "--api-key-env", "NO_SUCH_KEY")


def test_a_key_comes_from_the_environment_variable_that_is_named() -> None:
    server = Server(key="sk-secret")
    try:
        assert "--api-key-env" in fatal(server.url)
        child = Child(server.url, "--api-key-env", "SOME_KEY", env={"SOME_KEY": "sk-secret"})
        child.ready()
        assert child.ask("words=1")[1].finish_reason == "stop"
        child.close()
    finally:
        server.close()


def test_a_worker_takes_the_other_servers_word_for_a_models_name() -> None:
    settings = WorkerSettings(models=("qwen2.5:7b",), engine="openai", base_url="http://127.0.0.1:1/v1", slots=2)
    assert [(spec.name, spec.version) for spec in check_models(settings)] == [("qwen2.5:7b", "1.0")]


def test_the_runtime_is_given_the_variable_with_the_key_whatever_its_name() -> None:
    settings = WorkerSettings(
        models=("m",), engine="openai", base_url="http://127.0.0.1:1/v1", api_key_env="TETHER_UPSTREAM_KEY"
    )
    (spec,) = check_models(settings)
    assert _offer(spec, settings).variables == ("TETHER_UPSTREAM_KEY",)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"engine": "openai"}, "--base-url"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "--base-url"),
        ({"engine": "other"}, "--engine"),
        ({"api_key_env": "KEY"}, "--api-key-env"),
        ({"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "dtype": "int8"}, "--dtype"),
        ({"slots": 0}, "--slots"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        WorkerSettings(**changes)
