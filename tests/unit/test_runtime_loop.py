"""The runtime's loop over a scripted engine: order, cancelling, refusals, and one end for each request."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from io import BytesIO

import pytest

from tether import runtime
from tether.errors import ContextLengthExceeded, InvalidRequest, OutputInvalid
from tether.records import FinishReason, ModelInfo, Sampling, Usage
from tether.runtime import Loop, Pipe, answer, read_lines
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
    describe,
)


class ScriptedEngine:
    """Answers each request with its own input, a character a step; `!` fails, an empty input is refused."""

    def __init__(self) -> None:
        self.info = ModelInfo("scripted", "1")
        self.texts: dict[str, str] = {}
        self.places: dict[str, int] = {}
        self.events: list[Event] = []

    @property
    def is_idle(self) -> bool:
        return not self.texts and not self.events

    def knows(self, request_id: str) -> bool:
        return request_id in self.texts

    def add(self, request: Generate) -> None:
        if not request.input:
            raise ContextLengthExceeded("too long", param="input")
        if request.input == "!":
            raise RuntimeError("surprise")
        self.texts[request.id] = request.input
        self.places[request.id] = 0
        self.events.append(Started(request.id, len(request.input)))

    def cancel(self, request_id: str) -> bool:
        if request_id not in self.texts:
            return False
        self._end(request_id, "cancelled")
        return True

    def step(self) -> list[Event]:
        for request_id, text in list(self.texts.items()):
            place = self.places[request_id]
            self.places[request_id] += 1
            self.events.append(Tokens(request_id, place, (ord(text[place]),), text[place]))
            if place + 1 == len(text):
                self._end(request_id, "stop")
        events, self.events = self.events, []
        return events

    def answer(self, request: Generate) -> tuple[str, FinishReason]:
        self.add(request)
        return request.input, "stop"

    def _end(self, request_id: str, reason: FinishReason) -> None:
        text = self.texts.pop(request_id)
        self.events.append(End(request_id, reason, Usage(len(text), self.places[request_id])))


class Bench:
    """A loop whose requests and events the test holds in its hands."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        self._reading = os.fdopen(reading, "rb")
        self._writing = writing
        self.engine = ScriptedEngine()
        self.inbox: queue.SimpleQueue[Request | BadLine] = queue.SimpleQueue()
        self.loop = Loop(self.engine, Pipe(writing), self.inbox)

    def turn(self, *requests: Request | BadLine) -> list[Event]:
        for request in requests:
            self.inbox.put(request)
        self.loop.take_requests()
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
    assert bench.idle() == [Tokens("a", 1, (105,), "i"), End("a", "stop", Usage(2, 2))]


def test_all_requests_that_have_come_go_into_one_step(bench: Bench) -> None:
    events = bench.turn(Generate("a", "1"), Generate("b", "2"), Generate("c", "3"))
    assert [event.id for event in events if isinstance(event, End)] == ["a", "b", "c"]


def test_cancelling_ends_a_request_before_its_next_token(bench: Bench) -> None:
    bench.turn(Generate("a", "hello"))
    assert bench.turn(Cancel("a")) == [End("a", "cancelled", Usage(5, 1))]


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


@pytest.mark.parametrize(
    ("text", "code", "retry"), [("", "context_length_exceeded", False), ("!", "worker_failed", True)]
)
def test_a_request_that_the_engine_does_not_take_ends_at_once_and_disturbs_nobody(
    bench: Bench, text: str, code: str, retry: bool
) -> None:
    bench.turn(Generate("a", "hi"))
    end, *others = bench.turn(Generate("b", text))
    assert isinstance(end, End)
    assert end.error
    assert (end.id, end.finish_reason, end.error.code, end.retry) == ("b", "error", code, retry)
    assert others[0] == Tokens("a", 1, (105,), "i")


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
def test_a_failure_is_told_with_whether_another_worker_might_do_better(
    failure: Exception, code: str, retry: bool
) -> None:
    error, again = describe(failure)
    assert (error.code, again) == (code, retry)


def test_a_line_that_is_no_request_is_refused_and_the_loop_goes_on(bench: Bench) -> None:
    error = InvalidRequest("not JSON").to_info()
    bench.turn(Generate("a", "abc"))
    assert bench.turn(BadLine(None, error)) == [Refused(None, error), Tokens("a", 1, (98,), "b")]
    assert bench.turn(BadLine("a", error))[0] == Refused("a", error)


def test_a_bad_request_with_an_id_of_its_own_ends_under_that_id(bench: Bench) -> None:
    error = InvalidRequest("wrong type").to_info()
    assert bench.turn(BadLine("x", error)) == [End("x", "error", error=error, retry=False)]


def test_an_answer_by_hand_is_one_result_or_one_failure() -> None:
    engine = ScriptedEngine()
    assert answer(engine, b'{"input":"hi"}') == Result("hi")
    assert answer(engine, b'{"input":""}') == Failure("too long")
    assert isinstance(answer(engine, b"nope"), Failure)
    assert isinstance(answer(engine, None), Failure)
    assert answer(engine, b'{"input":"!"}') == Failure("the model failed: RuntimeError")


def test_an_overlong_line_is_skipped_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "MAX_LINE_BYTES", 10)
    lines = b"short\n" + b"x" * 35 + b"\n\n  \n0123456789\nlast"
    assert list(read_lines(BytesIO(lines))) == [b"short\n", None, b"0123456789\n", b"last"]


def test_sampling_by_hand_reaches_the_engine() -> None:
    seen: list[Generate] = []

    class Engine(ScriptedEngine):
        def answer(self, request: Generate) -> tuple[str, FinishReason]:
            seen.append(request)
            return super().answer(request)

    answer(Engine(), b'{"input":"x","max_tokens":5,"temperature":0.5,"seed":3,"raw":true}')
    assert seen[0].sampling == Sampling(max_tokens=5, temperature=0.5, seed=3)
    assert seen[0].raw
