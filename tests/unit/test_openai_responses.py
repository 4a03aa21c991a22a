"""A response's stream: its events have the same numbers however the text came, so it goes on behind any of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import make_job
from tether.cursor import Cursor
from tether.errors import WorkerLost
from tether.messages import JobAccepted, JobEnd, JobEvent, JobQueued, JobStarted, JobTokens
from tether.openai_responses import ResponseAnswer
from tether.records import Chat, ChatMessage, Job, Tool, Usage
from tether.telling import Told

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Paris"}}\n</tool_call>'
PIECES = st.lists(st.sampled_from(["a", "bc d", "é🦊", "\n", "<tool", CALL]), max_size=5)


def job() -> Job:
    chat = Chat((ChatMessage("user", "x"),), (Tool("weather"),))
    return make_job(msgspec.json.encode(chat).decode(), form="response", id="j")


def events_of(text: str, cuts: list[int]) -> Iterator[JobEvent]:
    yield JobAccepted("j", "running", "1.0")
    yield JobStarted("j", 1, "w", "w", "rev", "float32")
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    for number, (begin, end) in enumerate(itertools.pairwise(places)):
        yield JobTokens("j", 1, number, (number,), text[begin:end])
    yield JobEnd("j", "completed", 1, "stop", Usage(1, 2))


def stream(text: str, cuts: list[int], after: int | None = None) -> list[Told]:
    seen = None if after is None else Cursor.parse(str(after), 1, "after")
    answer = ResponseAnswer(job(), seen=seen)
    return [told for event in events_of(text, cuts) for told in answer.events(event)]


def whole(events: list[Told]) -> list[tuple[int, str, Any]]:
    """What a stream says, however its text was cut: each character and each other event, with its number."""
    found: list[tuple[int, str, Any]] = []
    for told in events:
        data, number = told.data, told.data["sequence_number"]
        assert (told.id, told.name) == (str(number), data["type"])
        if "delta" not in data:
            said = {name: value for name, value in data.items() if name != "sequence_number"}
            found.append((number, data["type"], msgspec.json.encode(said).decode()))
            continue
        for back, character in enumerate(reversed(data["delta"])):
            found.insert(len(found) - back, (number - back, data["type"], (character, data["item_id"])))
    return found


CUTS = st.lists(st.integers(1, 300), max_size=12)


@given(PIECES.map("".join), CUTS, CUTS)
@example(f"Hello \n{CALL}", [5], [])
def test_events_have_the_same_numbers_however_the_text_was_cut(text: str, cuts: list[int], others: list[int]) -> None:
    one, other = whole(stream(text, cuts)), whole(stream(text, others))
    assert one == other
    numbers = [number for number, _, _ in one]
    assert numbers[:2] == [0, 1]
    assert numbers[2:] == list(range(3, 1 + len(numbers)))  # 2 is for those who wait


@given(PIECES.map("".join), CUTS, CUTS, st.data())
def test_a_stream_goes_on_behind_any_event_and_says_nothing_twice(
    text: str, cuts: list[int], others: list[int], data: st.DataObject
) -> None:
    full = stream(text, cuts)
    cut = data.draw(st.integers(1, len(full)))
    rest = stream(text, others, after=full[cut - 1].data["sequence_number"])
    assert whole(full[:cut]) + whole(rest) == whole(full)


def test_who_waits_is_told_under_one_number_and_goes_on_from_there() -> None:
    answer = ResponseAnswer(job())
    queued = JobQueued("j", 2, 9.0)
    first = [told.data for event in (JobAccepted("j", "queued"), queued, queued) for told in answer.events(event)]
    assert [(data["type"], data["sequence_number"]) for data in first] == [
        ("response.created", 0),
        ("response.in_progress", 1),
        ("response.queued", 2),
        ("response.queued", 2),
    ]
    assert first[-1]["response"]["status"] == "queued"
    rest = stream("ab", [1], after=2)
    assert rest[0].data["sequence_number"] == 3
    again = ResponseAnswer(job(), seen=Cursor.parse("2", 1, "after"))
    (told,) = [told for event in (JobAccepted("j", "queued"), queued) for told in again.events(event)]
    assert (told.data["type"], told.id) == ("response.queued", "2")


def test_an_error_comes_after_all_that_was_told() -> None:
    answer = ResponseAnswer(job(), seen=Cursor.parse("40", 1, "after"))
    assert list(answer.events(JobAccepted("j", "running"))) == []
    error = answer.error({"code": WorkerLost.code, "message": "lost"})
    assert error.data["sequence_number"] == 41
