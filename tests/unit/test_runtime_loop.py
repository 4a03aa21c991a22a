"""The runtime's loop over a scripted engine: order, cancelling, refusals, and one end for each request."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from io import BytesIO
from typing import Any, cast

import pytest

from tether import runtime
from tether.errors import ContextLengthExceeded, InvalidRequest, OutputInvalid
from tether.records import FinishReason, Sampling, Usage
from tether.runtime import MAX_WAITING, Loop, Pipe, answer, read_lines
from tether.runtime_messages import (
    BadLine,
    Cancel,
    End,
    Event,
    Failure,
    Generate,
    Refused,
    Request,
    Result,
    Started,
    Tokens,
    decode_event,
)


class ScriptedSequence:
    """Answers a request with its own input, a character a token; `!` fails as the test says."""

    def __init__(self, request: Generate, failure: Exception) -> None:
        self._text = request.input
        self._failure = failure
        self._position = len(request.emitted)
        self.finish_reason: FinishReason | None = None
        self.seconds_running = 0.5

    @property
    def usage(self) -> Usage:
        return Usage(len(self._text), self._position)

    def step(self) -> tuple[int, int, str]:
        position, character = self._position, self._text[self._position]
        if character == "!":
            raise self._failure
        self._position += 1
        if self._position == len(self._text):
            self.finish_reason = "stop"
        return position, ord(character), character


class ScriptedEngine:
    def __init__(self) -> None:
        self.failure: Exception = RuntimeError("surprise")

    def start(self, request: Generate) -> ScriptedSequence:
        if not request.input:
            raise ContextLengthExceeded("too long", param="input")
        return ScriptedSequence(request, self.failure)


class Bench:
    """A loop whose requests and events the test holds in its hands."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._reading = os.fdopen(reading, "rb")
        self._writing = writing
        self.engine = ScriptedEngine()
        self.inbox: queue.SimpleQueue[Request | BadLine] = queue.SimpleQueue()
        self.loop = Loop(cast(Any, self.engine), Pipe(writing), self.inbox)

    def turn(self, *requests: Request | BadLine) -> list[Event]:
        for request in requests:
            self.inbox.put(request)
        self.loop.take_requests()
        self.loop.admit()
        self.loop.step()
        return [decode_event(line) for line in (self._reading.read() or b"").splitlines()]

    def idle(self) -> list[Event]:
        """A turn with a request that has no effect, so that an idle loop does not wait."""
        return self.turn(Cancel("nobody"))

    def close(self) -> None:
        self._reading.close()
        os.close(self._writing)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_each_token_is_told_in_its_own_turn_and_then_the_end(bench: Bench) -> None:
    assert bench.turn(Generate("a", "hi")) == [Started("a", 2), Tokens("a", 0, (104,), "h")]
    assert bench.idle() == [
        Tokens("a", 1, (105,), "i"),
        End("a", "stop", Usage(2, 2), tokens_per_second=4.0),
    ]


def test_requests_run_one_after_the_other_in_the_order_they_came(bench: Bench) -> None:
    events = bench.turn(Generate("a", "1"), Generate("b", "2"), Generate("c", "3"))
    events += bench.idle() + bench.idle()
    assert [event.id for event in events if isinstance(event, End)] == ["a", "b", "c"]


def test_cancelling_before_the_first_token_makes_none(bench: Bench) -> None:
    events = bench.turn(Generate("a", "hello"), Generate("b", "hello"), Cancel("a"), Cancel("b"))
    assert events == [End("a", "cancelled"), End("b", "cancelled")]


def test_cancelling_in_mid_answer_ends_it_before_the_next_token(bench: Bench) -> None:
    bench.turn(Generate("a", "hello"))
    assert bench.turn(Cancel("a")) == [End("a", "cancelled", Usage(5, 1), tokens_per_second=2.0)]


def test_cancelling_what_is_not_live_changes_nothing(bench: Bench) -> None:
    bench.turn(Generate("a", "hello"))
    assert bench.turn(Cancel("b"), Cancel("b")) == [Tokens("a", 1, (101,), "e")]


def test_a_live_id_a_second_time_is_refused_and_the_first_goes_on(bench: Bench) -> None:
    bench.turn(Generate("a", "hello"))
    refused, tokens = bench.turn(Generate("a", "other"))
    assert isinstance(refused, Refused)
    assert (refused.id, refused.error.code) == ("a", "invalid_request")
    assert tokens == Tokens("a", 1, (101,), "e")


def test_an_ended_id_may_come_again(bench: Bench) -> None:
    bench.turn(Generate("a", "x"))
    assert Started("a", 1) in bench.turn(Generate("a", "y"))


def test_one_request_more_than_the_child_keeps_is_told_that_the_queue_is_full(bench: Bench) -> None:
    bench.turn(Generate("live", "hello"))
    events = bench.turn(*(Generate(str(number), "x") for number in range(MAX_WAITING + 1)))
    (end,) = [event for event in events if isinstance(event, End)]
    assert (end.id, end.retry) == (str(MAX_WAITING), True)
    assert end.error
    assert end.error.code == "queue_full"


@pytest.mark.parametrize(
    ("failure", "code", "retry"),
    [
        (RuntimeError("surprise"), "worker_failed", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "worker_failed", True),
        (MemoryError(), "worker_failed", True),
        (OutputInvalid("not a number"), "output_invalid", True),
        (InvalidRequest("no"), "invalid_request", False),
    ],
)
def test_a_model_that_fails_ends_that_request_and_no_other(
    bench: Bench, failure: Exception, code: str, retry: bool
) -> None:
    bench.engine.failure = failure
    bench.turn(Generate("a", "x!"), Generate("b", "y"))
    (end,) = bench.idle()
    assert isinstance(end, End)
    assert end.error
    assert (end.id, end.finish_reason, end.error.code, end.retry) == ("a", "error", code, retry)
    assert end.usage == Usage(2, 1)
    assert Tokens("b", 0, (121,), "y") in bench.idle()


def test_a_prompt_that_does_not_fit_ends_at_once_and_is_not_to_be_tried_again(bench: Bench) -> None:
    (end,) = bench.turn(Generate("a", ""))
    assert isinstance(end, End)
    assert end.error
    assert (end.error.code, end.error.param, end.retry) == ("context_length_exceeded", "input", False)


def test_a_line_that_is_no_request_is_refused_and_the_loop_goes_on(bench: Bench) -> None:
    error = InvalidRequest("not JSON").to_info()
    bench.turn(Generate("a", "abc"))
    assert bench.turn(BadLine(None, error)) == [Refused(None, error), Tokens("a", 1, (98,), "b")]
    assert bench.turn(BadLine("a", error))[0] == Refused("a", error)


def test_a_bad_request_with_an_id_of_its_own_ends_under_that_id(bench: Bench) -> None:
    error = InvalidRequest("wrong type").to_info()
    assert bench.turn(BadLine("x", error)) == [End("x", "error", error=error, retry=False)]


def test_an_answer_by_hand_is_one_result_or_one_failure() -> None:
    engine = cast(Any, ScriptedEngine())
    assert answer(engine, b'{"input":"hi"}') == Result("hi")
    assert answer(engine, b'{"input":""}') == Failure("too long")
    assert isinstance(answer(engine, b"nope"), Failure)
    assert isinstance(answer(engine, None), Failure)
    assert answer(engine, b'{"input":"x!"}') == Failure("the model failed: RuntimeError")


def test_an_overlong_line_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_LINE_BYTES", 10)
    lines = b"short\n" + b"x" * 35 + b"\n\n  \n0123456789\nlast"
    assert list(read_lines(BytesIO(lines))) == [b"short\n", None, b"0123456789\n", b"last"]


def test_sampling_by_hand_reaches_the_engine() -> None:
    seen: list[Generate] = []

    class Engine(ScriptedEngine):
        def start(self, request: Generate) -> ScriptedSequence:
            seen.append(request)
            return super().start(request)

    answer(cast(Any, Engine()), b'{"input":"x","max_tokens":5,"temperature":0.5,"seed":3,"raw":true}')
    assert seen[0].sampling == Sampling(max_tokens=5, temperature=0.5, seed=3)
    assert seen[0].raw
