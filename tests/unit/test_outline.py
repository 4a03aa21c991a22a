"""What is kept of a conversation whose input is not tells its answer as it was told live, and says nothing of what was said."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import make_job
from tether.active import job_of
from tether.job_routes import telling_of
from tether.messages import JobEnd, JobEvent, JobTokens
from tether.openai_responses import response_of
from tether.outline import outline_of
from tether.records import Chat, ChatMessage, Job, JobRecord, Tool, Usage
from tether.retelling import story_of

SECRET = "only for the model"
CALL = '{"name": "weather", "arguments": {"place": "Paris"}}'
ANSWER = f"Wait. <tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
WEATHER = Tool("weather", SECRET, msgspec.Raw(b'{"type": "object", "description": "only for the model"}'))


def conversation(**changes: Any) -> Chat:
    chat = Chat(
        (ChatMessage("system", SECRET), ChatMessage("user", SECRET)),
        (WEATHER,),
        has_instructions=True,
        previous_id="resp_before",
    )
    return msgspec.structs.replace(chat, **changes)


def job(chat: Chat, form: Any = "chat", **changes: Any) -> Job:
    return make_job(msgspec.json.encode(chat).decode(), **{"form": form, "keep": "result", **changes})


def kept(of: Job, result: str = ANSWER, **changes: Any) -> JobRecord:
    """What the ledger has of a job after its end."""
    names = set(JobRecord.__struct_fields__) & set(Job.__struct_fields__)
    facts: dict[str, Any] = {
        **{name: getattr(of, name) for name in names},
        **dict.fromkeys(("input", "error", "orchestrator_id", "worker_id", "started_at")),
        "status": "completed",
        "attempt": 1,
        "result": result,
        "finish_reason": "stop",
        "usage": Usage(3, 4),
        "ended_at": 2.0,
        "outline": outline_of(of),
        **changes,
    }
    return JobRecord(**facts)


def told(of: Job, events: list[JobEvent]) -> tuple[dict[str, Any], Any]:
    """The whole answer, and the calls as a stream tells them."""
    telling, pieces = telling_of(of, seen=None, include_usage=False), []
    for event in events:
        for each in telling.events(event):
            choice = (each.data.get("choices") or [{}])[0]
            pieces += choice.get("delta", {}).get("tool_calls", [])
            if each.data.get("type") == "response.output_item.done":
                pieces.append(each.data["item"])
    return telling.body(), pieces


def live(of: Job, cuts: Sequence[int] = ()) -> list[JobEvent]:
    places = [0, *sorted(cuts), len(ANSWER)]
    pieces = [ANSWER[begin:end] for begin, end in itertools.pairwise(places)]
    tokens = [JobTokens(of.id, 1, position, (position,), text) for position, text in enumerate(pieces)]
    return [*tokens, JobEnd(of.id, "completed", 1, "stop", Usage(3, 4))]


@given(cuts=st.lists(st.integers(0, len(ANSWER)), max_size=5), parallel=st.booleans())
def test_calls_are_told_after_the_end_as_they_were_told_live(*, cuts: list[int], parallel: bool) -> None:
    new = job(conversation(parallel=parallel))
    record = kept(new)
    before, calls = told(new, live(new, cuts))
    after, _ = told(job_of(record), story_of(record))
    (choice,) = after["choices"]
    assert choice == before["choices"][0]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("tool_calls", 2 if parallel else 1)
    assert calls[0]["id"] == choice["message"]["tool_calls"][0]["id"]


@pytest.mark.parametrize("only_calls", [False, True])
def test_a_response_that_is_found_again_has_its_items_and_how_its_tools_could_be_called(*, only_calls: bool) -> None:
    new = job(conversation(only_calls=only_calls), "response")
    record = kept(new)
    before, items = told(new, live(new))
    found = response_of(job_of(record), record, story_of(record))
    assert [item["type"] for item in items] == ["message", "function_call"] + ["function_call"] * (not only_calls)
    assert found["output"] == before["output"] == items
    for name in ("parallel_tool_calls", "tool_choice", "previous_response_id", "status", "usage"):
        assert found[name] == before[name], name
    (tool,) = found["tools"]
    assert (tool["name"], tool["description"], tool["parameters"]) == ("weather", None, None)
    assert found["instructions"] is None


def test_an_outline_has_nothing_of_what_was_said() -> None:
    outline = outline_of(job(conversation()))
    assert outline is not None
    assert SECRET not in outline
    assert "weather" in outline


@pytest.mark.parametrize(
    "other",
    [
        job(conversation(), keep="all"),
        job(conversation(), keep="nothing"),
        job(Chat((ChatMessage("user", "x"),))),
        make_job("x", form="text", keep="result"),
        make_job("no conversation", form="chat", keep="result"),
        make_job("half a pair: \ud800", form="chat", keep="result"),
        make_job('{"messages": 1}', form="response", keep="result"),
        make_job(
            '{"messages": [], "tools": [' + '{"name": "f", "parameters": ' + "[" * 9999, form="chat", keep="result"
        ),
    ],
    ids=["all", "nothing", "no tools", "text", "no JSON", "no UTF-8", "no chat", "deep"],
)
def test_there_is_none_where_there_is_nothing_to_keep(other: Job) -> None:
    assert outline_of(other) is None


def test_a_job_from_before_there_were_outlines_is_told_as_its_text() -> None:
    record = kept(job(conversation()), outline=None)
    body, _ = told(job_of(record), story_of(record))
    assert body["choices"][0]["message"]["content"] == ANSWER
