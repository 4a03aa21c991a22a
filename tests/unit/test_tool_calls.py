"""Calls of functions by themselves: the same from any cut of a text, sendable whatever a model wrote, cheap to look for."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tether.tool_calls import MAX_CALL_CHARS, MAX_HEAD_CHARS, CallDelta, ToolCallParser

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Paris"}}\n</tool_call>'
PIECES = [
    *(
        "a",
        "[",
        "]",
        "{",
        "}",
        '"',
        ",",
        " ",
        "\n",
        " \n",
        "<tool",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "TOOL",
    ),
    *('{"a": ', '"name": "weather"', '"arguments": {"x": 1}', '{"name": "other", "arguments": {}}', "\\ud800", CALL),
]


def told(pieces: list[str], names: tuple[str, ...] = ("weather",)) -> tuple[str, list[tuple[str, str]], str]:
    """Return the content, the calls and what is left at the end."""
    parser = ToolCallParser("key", names)
    content, deltas = "", list[CallDelta]()
    for piece in pieces:
        text, found = parser.push(piece)
        content += text
        deltas += found
    calls = []
    for index in range(parser.num_calls):
        of_it = [delta for delta in deltas if delta.index == index]
        calls.append((of_it[0].name, "".join(delta.arguments for delta in of_it)))
    return content, calls, parser.flush()


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.lists(st.integers(1, 200), max_size=6))
@example(f"Hello \n{CALL}", [5])
@example("[TOOL_CALLS]x", [1])
def test_any_cut_of_a_text_tells_what_the_whole_tells(text: str, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = told([text])
    assert told([text[begin:end] for begin, end in itertools.pairwise(places)]) == whole
    assert told(list(text)) == whole


@pytest.mark.parametrize("size", [1, 1000, MAX_CALL_CHARS * 3])
@pytest.mark.parametrize(
    "text",
    [
        '{"a": "' + "x" * (MAX_CALL_CHARS - 100) + '", "name": "weather"}',
        '{"a": "' + "x" * MAX_CALL_CHARS + '", "name": "weather"}',
        '{"name": "' + "x" * MAX_HEAD_CHARS + '", "arguments": {}}',
        '{"name": ' + " " * MAX_HEAD_CHARS + '"weather", "arguments": {}} and more',
    ],
)
def test_the_bounds_are_at_the_same_place_however_a_text_is_cut(text: str, size: int) -> None:
    assert told([text[place : place + size] for place in range(0, len(text), size)]) == told([text])


def test_an_object_that_is_too_long_for_a_call_is_told_as_content_and_what_follows_as_it_comes() -> None:
    parser = ToolCallParser("key", ["weather"])
    text = '{"a": "' + "x" * MAX_CALL_CHARS
    assert parser.push(text) == (text, [])
    assert parser.push(CALL) == (CALL, [])
    assert parser.flush() == ""


@pytest.mark.parametrize("text", ['{"some": "json"}', '{"name": "other", "arguments": {', "<tool_call>what?", "[1, 2"])
def test_what_is_certain_to_be_no_call_is_told_at_once(text: str) -> None:
    assert told([text]) == (text, [], "")


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('{"a": ' + "1" * 5000 + "}", '{"a": ' + "1" * 5000 + "}", []),
        ('{"arguments": {"a": "\\ud800"}, "name": "weather"}', "", [("weather", '{"a": "\ufffd"}')]),
        ('{"arguments": "\\ud800", "name": "weather"}', "", [("weather", "\ufffd")]),
        ('{"name": "weather", "arguments": "\\udc00"}', "", [("weather", "\ufffd")]),
        ('{"name": "weather", "arguments": "\\udc00\\ud83e\\udd8a"}', "", [("weather", "\ufffd\U0001f98a")]),
        ('{"name": "\\ud800", "arguments": {}}', '{"name": "\\ud800", "arguments": {}}', []),
        ('{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", []),
    ],
)
def test_whatever_a_model_writes_can_be_sent(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    found = told([text])
    assert found == (content, calls, "")
    assert told(list(text)) == found
    msgspec.json.encode(found)


def test_looking_for_a_call_takes_time_in_proportion_to_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = 0
    pattern = ToolCallParser._begin_call.__globals__["_HEAD"]

    class Counting:
        def match(self, text: str, start: int = 0, end: int = 1 << 62) -> object:
            nonlocal matched
            matched += min(len(text), end) - start
            return pattern.match(text, start, end)

    monkeypatch.setattr("tether.tool_calls._HEAD", Counting())
    pieces = ['{"name": "'] + ["aaaa"] * 8192
    told(pieces)
    assert matched <= len(pieces) * MAX_HEAD_CHARS
