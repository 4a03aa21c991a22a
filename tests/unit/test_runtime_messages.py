"""The lines between a worker and its runtime child."""

from __future__ import annotations

import json

import pytest

from tether.errors import ErrorInfo, InvalidRequest, ProtocolViolation
from tether.records import ModelInfo, Sampling, Usage
from tether.runtime_messages import (
    Ask,
    BadLine,
    Cancel,
    End,
    Event,
    Failure,
    Fatal,
    Generate,
    Loading,
    Ready,
    Refused,
    Request,
    Result,
    Started,
    Tokens,
    decode_ask,
    decode_event,
    decode_request,
    encode,
)


@pytest.mark.parametrize(
    "request_",
    [Generate("a", "hi"), Generate("b", "é\n", Sampling(5, 0.8, 0.9, ("x",), -3), ((1, 2),), True), Cancel("a")],
)
def test_a_request_comes_back_as_it_went_on_one_line(request_: Request) -> None:
    line = encode(request_)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode_request(line) == request_


@pytest.mark.parametrize(
    "event",
    [
        Loading("weights", 0.3),
        Ready(ModelInfo("m", "1.0")),
        Fatal(ErrorInfo("model_unavailable", "no")),
        Started("a", 3),
        Tokens("a", 0, (1, 2), "é"),
        End("a", "stop", Usage(3, 2), tokens_per_second=1.5),
        End("a", "error", error=ErrorInfo("worker_failed", "x"), retry=True),
        Refused(None, ErrorInfo("invalid_request", "x")),
    ],
)
def test_an_event_comes_back_as_it_went_and_names_itself(event: Event) -> None:
    line = encode(event)
    assert decode_event(line) == event
    assert json.loads(line)["event"] == type(event).__name__.lower()


def test_a_request_needs_only_an_id_and_an_input() -> None:
    assert decode_request(b'{"id":"1","input":"hi","sampling":{"seed":4}}') == Generate("1", "hi", Sampling(seed=4))


@pytest.mark.parametrize(
    ("line", "request_id"),
    [
        (b"nope", None),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
        (b'{"input":"hi"}', None),
        (b'{"id":3,"input":"hi"}', None),
        (b'{"cancel":3}', None),
        (b'{"id":"x","input":3}', "x"),
        (b'{"id":"x","input":"hi","surprise":1}', "x"),
        (b'{"id":"x","input":"hi","sampling":{"max_token":1}}', "x"),
        (b'{"id":"x","input":"hi","emitted":["a"]}', "x"),
    ],
)
def test_a_line_that_is_no_request_says_what_is_wrong_and_whose_it_was(line: bytes, request_id: str | None) -> None:
    found = decode_request(line)
    assert isinstance(found, BadLine)
    assert found.id == request_id
    assert found.error.code == "invalid_request"


def test_a_line_by_hand_takes_sampling_fields_beside_the_input() -> None:
    assert decode_ask(b'{"input":"hi","max_tokens":3,"stop":["."]}') == Ask("hi", max_tokens=3, stop=(".",))
    assert Ask("hi", 3, 0.5, 0.9, ("a",), 7).sampling == Sampling(3, 0.5, 0.9, ("a",), 7)
    with pytest.raises(InvalidRequest):
        decode_ask(b'{"prompt":"hi"}')


def test_results_are_written_as_the_pilot_wrote_them() -> None:
    assert encode(Result("Paris.")) == b'{"result": "Paris."}\n'
    assert encode(Failure("no")) == b'{"error": "no"}\n'


@pytest.mark.parametrize("line", [b"", b"Loading weights: 100%", b"{}", b'{"event":"surprise"}'])
def test_what_is_no_event_breaks_the_protocol(line: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_event(line)
