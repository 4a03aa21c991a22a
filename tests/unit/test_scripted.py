"""The runtime without a model, as the process that it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tether.errors import ErrorInfo
from tether.records import ModelInfo, Usage
from tether.runtime_messages import (
    Cancel,
    End,
    Event,
    Generate,
    Loading,
    Ready,
    Refused,
    Request,
    Started,
    Tokens,
    decode_event,
    encode,
)

ONE_TOKEN = [Started("a", 1), Tokens("a", 0, (0,), "0 "), End("a", "stop", Usage(1, 1))]


class Runtime:
    """A running child."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tether.scripted", "--model", "demo", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def send(self, *requests: Request) -> None:
        self.write(b"".join(map(encode, requests)))

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def next(self) -> Event:
        assert self.process.stdout is not None
        return decode_event(self.process.stdout.readline())

    def until_end(self) -> list[Event]:
        events = [self.next()]
        while not isinstance(events[-1], End | Refused):
            events.append(self.next())
        return events

    def close(self) -> int:
        self.process.communicate(timeout=20)
        return self.process.returncode


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    found = Runtime("--stream", "--dtype", "float32")
    assert [found.next() for _ in range(2)] == [Loading("weights", 0.5), Loading("weights", 1.0)]
    assert found.next() == Ready(
        ModelInfo("demo", "1.0", revision="script", context_tokens=4096, slots=64, embeds=True)
    )
    yield found
    found.close()


def test_a_prompt_without_a_script_is_answered_with_one_token(runtime: Runtime) -> None:
    for prompt in ("", "What is the capital of France?", "tokens=1"):
        runtime.send(Generate("a", prompt))
        assert runtime.until_end() == ONE_TOKEN


def test_a_script_says_how_many_tokens_and_an_answer_goes_on_after_those_emitted(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=4 every=0.001", emitted=((0, 1),)))
    assert runtime.until_end() == [
        Started("a", 1),
        Tokens("a", 2, (2,), "2 "),
        Tokens("a", 3, (3,), "3 "),
        End("a", "stop", Usage(1, 2)),
    ]
    runtime.send(Generate("a", "tokens=2", emitted=((0, 1),)))
    assert runtime.until_end() == [Started("a", 1), End("a", "stop", Usage(1, 0))]


def test_a_script_can_fail_and_say_whether_another_may_try(runtime: Runtime) -> None:
    runtime.send(Generate("a", "error=context_length_exceeded"))
    error = ErrorInfo("context_length_exceeded", "as the script says")
    assert runtime.until_end()[-1] == End("a", "error", Usage(1, 0), error)
    runtime.send(Generate("a", "error=internal_error retry=1"))
    end = runtime.until_end()[-1]
    assert isinstance(end, End)
    assert end.retry


def test_a_script_can_leave_a_token_out(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=3 skip_at=1"))
    assert [event.position for event in runtime.until_end() if isinstance(event, Tokens)] == [0, 2]


def test_a_script_can_crash_the_process(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=3 crash_at=1"))
    assert [type(runtime.next()) for _ in range(2)] == [Started, Tokens]
    assert runtime.process.wait(20) == 3


def test_a_sequence_is_cancelled_and_another_goes_on(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=100000 every=0.001"))
    assert [type(runtime.next()) for _ in range(2)] == [Started, Tokens]
    runtime.send(Cancel("nothing"), Cancel("a"))
    end = runtime.until_end()[-1]
    assert isinstance(end, End)
    assert (end.finish_reason, end.error) == ("cancelled", None)
    runtime.send(Generate("a", ""))
    assert runtime.until_end() == ONE_TOKEN


def test_a_deaf_sequence_ends_by_itself(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=5 every=0.01 deaf=1"))
    assert isinstance(runtime.next(), Started)
    runtime.send(Cancel("a"))
    end = runtime.until_end()[-1]
    assert end == End("a", "stop", Usage(1, 5))


def test_a_live_id_and_a_line_that_is_no_request_are_refused_and_change_nothing(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=3 every=0.05"))
    assert isinstance(runtime.next(), Started)
    runtime.send(Generate("a", ""))
    refused = runtime.next()
    assert isinstance(refused, Refused)
    assert (refused.id, refused.error.message) == ("a", "this id is live")
    runtime.write(b"not json\n")
    refused = runtime.next()
    assert isinstance(refused, Refused)
    assert refused.id is None
    assert runtime.until_end()[-1] == End("a", "stop", Usage(1, 3))


def test_several_lines_at_once_and_a_line_in_pieces_are_all_heard(runtime: Runtime) -> None:
    lines = b"".join(encode(Generate(f"id-{n}", "")) for n in range(100))
    for begin in range(0, len(lines), 333):
        runtime.write(lines[begin : begin + 333])
    ends = [runtime.until_end()[-1] for _ in range(100)]
    assert [end.id for end in ends if isinstance(end, End)] == [f"id-{n}" for n in range(100)]


def test_it_exits_when_its_worker_is_gone(runtime: Runtime) -> None:
    runtime.send(Generate("a", "tokens=100000 every=0.01"))
    assert runtime.close() == 0


def test_slots_and_load_time_are_options() -> None:
    found = Runtime("--slots", "2", "--load-seconds", "0.01")
    events = [found.next() for _ in range(3)]
    assert isinstance(events[2], Ready)
    assert events[2].model.slots == 2
    assert found.close() == 0
