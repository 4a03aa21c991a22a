"""The OpenAI dialect by itself: what becomes of a request, of an answer's events, and of a stream that was cut."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.support import make_state
from tether.cursor import Cursor
from tether.errors import InvalidRequest, UnsupportedParameter
from tether.inquiries import served_models
from tether.messages import JobAccepted, JobEnd, JobEvent, JobQueued, JobStarted, JobTokens
from tether.openai_api import ChatAnswer, CompletionAnswer, OpenAIAnswer, call_schema, chat_job, completion_job
from tether.openai_schemas import ChatRequest, CompletionRequest
from tether.records import Chat, ChatMessage, Job, ModelInfo, Sampling, TokenLogprobs, Tool, Usage
from tether.scheduler import newest_version
from tether.settings import GatewaySettings
from tether.telling import lines
from tether.tool_calls import ToolCallParser

HELLO = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Paris {"}}\n</tool_call>'


def chat(**fields: Any) -> Job:
    return chat_job(ChatRequest.model_validate({**HELLO, **fields}), GatewaySettings())


def completion(**fields: Any) -> Job:
    body = CompletionRequest.model_validate({"model": "demo", "prompt": "hello", **fields})
    return completion_job(body, GatewaySettings())


# --- to a job --------------------------------------------------------------------------------------------------------


def test_every_sampling_parameter_reaches_the_job() -> None:
    job = chat(
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop="end",
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": -100, "8": 2.5},
        logprobs=True,
        top_logprobs=3,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[9],
    )
    assert job.sampling == Sampling(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        n=2,
        stop=("end",),
        seed=-5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={7: -100, 8: 2.5},
        logprobs=3,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=(9,),
    )


def test_a_model_is_a_name_or_a_name_and_a_version() -> None:
    assert (chat().model, chat().version) == ("demo", "")
    named = chat(model="org/demo@1.0")
    assert (named.model, named.version) == ("org/demo", "1.0")
    with pytest.raises(InvalidRequest):
        chat(model="demo@")


def test_what_a_client_wrote_on_its_request_is_kept_with_the_job() -> None:
    job = chat(user="me", metadata={"a": "b"}, prompt_cache_key="s", tenantId="t", store=True, priority=3)
    assert (job.user, job.metadata, job.session_key, job.tenant_id) == ("me", {"a": "b"}, "s", "t")
    assert (job.keep, job.priority, job.form) == ("all", 3, "chat")


def test_a_conversation_becomes_what_the_template_reads() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"place": "x"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "c"},
    ]
    found = msgspec.json.decode(chat(messages=messages, tools=[WEATHER]).input, type=Chat)
    assert [message.role for message in found.messages] == ["system", "assistant", "tool"]
    assert found.messages[0].content == "be brief"
    assert found.messages[1].tool_calls[0].arguments == '{"place": "x"}'
    assert found.tools[0].name == "weather"


def test_a_call_that_has_to_be_made_is_a_schema_with_its_references() -> None:
    parameters = {"$ref": "#/$defs/place", "$defs": {"place": {"type": "object"}}}
    schema = json.loads(call_schema([Tool("f", parameters=msgspec.Raw(json.dumps(parameters).encode()))]))
    assert schema["properties"]["name"] == {"const": "f"}
    assert schema["properties"]["arguments"]["$ref"] == "#/properties/arguments/$defs/place"
    job = chat(tools=[WEATHER], tool_choice="required")
    assert job.sampling.json_schema is not None
    assert chat(tools=[WEATHER]).sampling.json_schema is None
    assert not msgspec.json.decode(chat(tools=[WEATHER], tool_choice="none").input, type=Chat).tools


def test_a_response_format_becomes_a_schema() -> None:
    assert chat(response_format={"type": "text"}).sampling.json_schema is None
    assert chat(response_format={"type": "json_object"}).sampling.json_schema == '{"type":"object"}'
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}
    assert chat(response_format=wanted).sampling.json_schema == '{"type":"integer"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        (
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": 1, "response_format": {"type": "json_object"}}, "min_tokens"),
        ({"logit_bias": {str(token_id): 1 for token_id in range(1025)}}, "logit_bias"),
        ({"deadline_seconds": 1e6}, "deadline_seconds"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("name", ChatRequest.unsupported)
def test_a_parameter_that_is_not_honoured_is_refused_unless_it_is_null(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        chat(**{name: "x"})
    assert caught.value.param == name
    assert chat(**{name: None}).model == "demo"


def test_a_completion_is_one_prompt_as_it_stands() -> None:
    assert (completion().form, completion(prompt=["x"]).input) == ("prompt", "x")
    assert completion(n=2, best_of=2).sampling.n == 2
    with pytest.raises(UnsupportedParameter):
        completion(best_of=2)
    for wrong in ([], ["a", "b"], [1, 2], "", None):
        with pytest.raises(ValidationError):
            completion(prompt=wrong)


# --- calls of tools --------------------------------------------------------------------------------------------------


def parsed(pieces: Iterable[str], *, parallel: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and the calls in some pieces of text, and check that each piece of a call follows the one before."""
    parser = ToolCallParser("key", ["weather"], parallel=parallel)
    content, ids = "", set()
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        text, found = parser.push(piece)
        content += text
        assert len({delta.index for delta in found}) == len(found)
        for delta in found:
            if delta.name:
                assert delta.index == len(calls)
                calls.append((delta.name, ""))
                ids.add(delta.id)
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
            assert delta.index == len(calls) - 1
    assert len(ids) == len(calls)
    return content + parser.flush(), calls


SUNNY = ("weather", '{"place": "Paris {"}')


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [SUNNY]),
        (f"Let me see. {CALL}", "Let me see. ", [SUNNY]),
        (CALL + "\n" + CALL, "", [SUNNY, SUNNY]),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"place": "Paris {"}}]', "", [SUNNY]),
        ('{"name": "weather", "parameters": {"place": "Paris {"}}', "", [SUNNY]),
        ('[{"name": "weather", "arguments": {}}, {"name": "weather", "arguments": {}}]', "", [("weather", "{}")] * 2),
        ('{"arguments": {"place": "Paris {"}, "name": "weather"}', "", [SUNNY]),
        ('{"id": "x", "name": "weather", "arguments": {"place": "Paris {"}}', "", [SUNNY]),
        ('{"name": "weather", "arguments": {"place": "Paris {"}, "id": {"x": "}"}} ' + CALL, "", [SUNNY, SUNNY]),
        ('{"name": "weather", "arguments": {"place": "Paris {"}' + CALL, "", [SUNNY, SUNNY]),
        (r'{"name": "weather", "arguments": "{\"place\": \"Paris {\"}"}' + CALL, "", [SUNNY, SUNNY]),
        (
            r'{"name": "we\u0061ther", "arguments": "\ud83e\udd8a\n\\ \/\u00e9"}',
            "",
            [("weather", "\U0001f98a\n\\ /\u00e9")],
        ),
        (
            r'{"name": "weather", "arguments": "a\ud83e b \uzzzz c"} and more',
            "and more",
            [("weather", "a\ufffdd83e b \ufffdzzzz c")],
        ),
        ('{"name": "weather", "arguments": {"a": [{"b": "\\"}"}]}}', "", [("weather", '{"a": [{"b": "\\"}"}]}')]),
        ('{"name": "weather", "arguments": {"place": "Par', "", [("weather", '{"place": "Par')]),
        ('{"name": "weather", "arguments": null}', "", [("weather", "null")]),
        ('{"name": "weather"}', "", [("weather", "{}")]),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"some": "json"}', '{"some": "json"}', []),
        ("1 < 2 and <tool", "1 < 2 and <tool", []),
        ("<tool_call>{broken", "<tool_call>{broken", []),
    ],
)
def test_calls_are_told_from_text_however_it_is_cut(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert parsed([text]) == (content, calls)
    assert parsed(text) == (content, calls)


@given(
    st.lists(
        st.sampled_from(
            [
                *CALL,
                CALL,
                '{"name": "weather", "arguments": "',
                "\\",
                "\\u",
                "\\q\\n",
                "\\ud83e",
                '"',
                "d8",
                "{",
                "}",
                ",",
                "x",
            ]
        ),
        max_size=30,
    ),
    st.data(),
)
def test_what_is_told_after_some_text_is_a_function_of_that_text(pieces: list[str], data: st.DataObject) -> None:
    text = '{"name": "weather", "arguments": ' + "".join(pieces)
    cut = data.draw(st.integers(0, len(text)))
    in_two, at_once = ToolCallParser("key", ["weather"]), ToolCallParser("key", ["weather"])
    told = [in_two.push(text[:cut]), in_two.push(text[cut:])]
    content, found = at_once.push(text)
    assert content == "".join(each for each, _ in told)
    for index in range(at_once.num_calls):
        pieces = [delta.arguments for _, deltas in told for delta in deltas if delta.index == index]
        assert "".join(pieces) == next(delta.arguments for delta in found if delta.index == index)
    assert parsed([text]) == parsed(text)
    assert in_two.flush() == at_once.flush()


def test_the_arguments_of_a_call_are_told_as_they_come_the_name_first() -> None:
    parser = ToolCallParser("key", ["weather"])
    told = [
        parser.push(piece)[1]
        for piece in ('<tool_call>{"name": "weather", ', '"arguments": {', '"place": "Par', 'is"}', "}")
    ]
    (name,) = told[1]
    assert (name.index, name.name, name.arguments) == (0, "weather", "{")
    assert [[delta.arguments for delta in found] for found in told[2:]] == [['"place": "Par'], ['is"}'], []]
    assert told[0] == []


@pytest.mark.parametrize("name", ['["weather"]', "{}", "7", "null"])
def test_a_call_whose_name_is_no_text_is_content(name: str) -> None:
    text = f'<tool_call>{{"arguments": {{}}, "name": {name}}}</tool_call>'
    assert parsed([text]) == (text, [])


def test_without_parallel_calls_there_is_one() -> None:
    assert parsed([CALL + CALL], parallel=False)[1] == [SUNNY]


# --- streams ---------------------------------------------------------------------------------------------------------


def events_of(texts: list[str], *, num_choices: int = 1, size: int = 1, logprobs: bool = False) -> list[JobEvent]:
    """Return a job's events; every choice has the same tokens, `size` of them in each event."""
    events: list[JobEvent] = [JobAccepted("j", "running", "1.0"), JobStarted("j", 1, "w", "w", "sha256:abc", "float32")]
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        for choice in range(num_choices):
            told = tuple(TokenLogprobs(-1.0, (), (text,)) for text in some) if logprobs else ()
            ids = tuple(range(start, start + len(some)))
            events.append(JobTokens("j", 1, start, ids, "".join(some), choice, told))
    choices: Any = ("stop",) * num_choices if num_choices > 1 else ()
    return [*events, JobEnd("j", "completed", 1, "stop", Usage(1, len(texts)), choices=choices)]


def make_job(*, num_choices: int = 1, tools: bool = False, form: Any = "chat", logprobs: int | None = None) -> Job:
    conversation = Chat((ChatMessage("user", "x"),), (Tool("weather"),) if tools else ())
    text = msgspec.json.encode(conversation).decode() if form == "chat" else "x"
    return Job("j", "t", "demo", "", text, Sampling(n=num_choices, logprobs=logprobs), stream=True, form=form)


def told(answer: OpenAIAnswer, events: Iterable[JobEvent]) -> list[tuple[str | None, Any]]:
    """Return the ids and the data of the stream's events."""
    found = []
    for block in b"".join(lines(answer, event) for event in events).decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if not fields:
            continue
        data = fields["data"]
        found.append((fields.get("id"), data if data == "[DONE]" else json.loads(data)))
    return found


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason_usage_and_done() -> None:
    stream = told(ChatAnswer(make_job(), include_usage=True), events_of(["a", "", "b"]))
    deltas = [data["choices"][0]["delta"] for _, data in stream[:-2]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    assert [data["choices"][0]["finish_reason"] for _, data in stream[:-2]] == [None, None, None, "stop"]
    assert stream[-2][1]["choices"] == []
    assert stream[-2][1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert stream[-1] == (None, "[DONE]")
    assert {data["system_fingerprint"] for _, data in stream[:-1]} == {"fp_abc_float32"}
    assert {data["model"] for _, data in stream[:-1]} == {"demo@1.0"}
    assert all(name for name, _ in stream[:-1])
    assert len({name for name, _ in stream[:-1]}) == len(stream) - 1


def test_a_job_that_waits_says_its_place_as_a_comment_and_in_a_chunk_that_adds_nothing() -> None:
    events = [JobQueued("j", 3, 10.04), JobQueued("j", 2, 8.0, 1.5)]
    answer = ChatAnswer(make_job(num_choices=2))
    comments = [lines(answer, event).split(b"\n")[0] for event in events]
    assert comments == [b": queued, place 3", b": queued, place 2, expected wait 1.5 s"]
    answer = ChatAnswer(make_job(num_choices=2))
    stream = told(answer, [*events, JobTokens("j", 1, 0, (0,), "a"), JobTokens("j", 1, 0, (0,), "b", 1)])
    assert [data["tether"]["queued"] for _, data in stream[:2]] == [
        {"place": 3, "expected_seconds": None, "deadline_seconds": 10.0},
        {"place": 2, "expected_seconds": 1.5, "deadline_seconds": 8.0},
    ]
    deltas = [data["choices"][0]["delta"] for _, data in stream]
    opening = {"role": "assistant", "content": ""}
    assert deltas == [opening, {"content": ""}, {"content": "a"}, opening, {"content": "b"}], "each choice begins once"
    assert [name for name, _ in stream][:3] == ["0,-", "0,-", "1,-"]


@pytest.mark.parametrize("form", ["chat", "prompt"])
@pytest.mark.parametrize("tools", [False, True])
@given(
    texts=st.lists(st.sampled_from(["a", "bc", "", "é🦊", "<tool", CALL, CALL[:30], CALL[30:], "{"]), max_size=6),
    num_choices=st.integers(1, 2),
    size=st.integers(1, 3),
    include_usage=st.booleans(),
    num_queued=st.integers(0, 2),
)
def test_a_stream_that_was_cut_anywhere_goes_on_from_its_last_event_and_tells_nothing_twice(
    form: str, tools: bool, texts: list[str], num_choices: int, size: int, include_usage: bool, num_queued: int
) -> None:
    kind = ChatAnswer if form == "chat" else CompletionAnswer
    job = make_job(num_choices=num_choices, tools=tools and form == "chat", form=form, logprobs=0)
    queued = [JobQueued("j", 2, 9.0)] * num_queued
    whole = told(
        kind(job, include_usage=include_usage), [*queued, *events_of(texts, num_choices=num_choices, logprobs=True)]
    )
    portions = [*queued, *events_of(texts, num_choices=num_choices, size=size, logprobs=True)]
    for place, (name, _) in enumerate(whole[:-1], 1):
        assert name is not None
        seen = Cursor.parse(name, num_choices, "after")
        assert str(seen) == name
        rest = told(kind(job, include_usage=include_usage, seen=seen), portions)
        assert [name for name, _ in rest[:num_queued]] == [name] * num_queued, "a place says nothing of the answer"
        assert summary([*whole[:place], *rest], num_choices) == summary(whole, num_choices)
        assert sum(data == "[DONE]" for _, data in rest) == 1


def summary(stream: list[tuple[str | None, Any]], num_choices: int) -> list[Any]:
    """Return what a client has made of a stream: of each choice the roles, text, calls and reasons."""
    found: list[Any] = [[[], "", [], [], []] for _ in range(num_choices)]
    num_usages = 0
    for _, data in stream:
        if data == "[DONE]":
            continue
        num_usages += bool(data.get("usage"))
        for choice in data["choices"]:
            of = found[choice["index"]]
            delta = choice.get("delta", choice)
            of[0] += [delta["role"]] if "role" in delta else []
            of[1] += delta.get("content", "") + delta.get("text", "")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    of[2].append([call["index"], call["id"], call["function"]["name"], ""])
                of[2][call["index"]][3] += call["function"]["arguments"]
            shown = choice["logprobs"] or {"tokens": []}
            of[4] += [each["token"] for each in shown["content"]] if "content" in shown else shown["tokens"]
            of[3] += [choice["finish_reason"]] if choice["finish_reason"] else []
    return [*found, num_usages]


def test_an_answer_that_is_a_call_has_no_content_and_its_calls_keep_their_ids() -> None:
    answer, again = ChatAnswer(make_job(tools=True)), ChatAnswer(make_job(tools=True))
    for event in events_of([CALL]):
        answer.add(event)
    choice = answer.body()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    call = choice["message"]["tool_calls"][0]
    assert call["function"] == {"name": "weather", "arguments": '{"place": "Paris {"}'}
    deltas = [data["choices"][0]["delta"] for _, data in told(again, events_of(list(CALL)))[:-1]]
    (first, *rest) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert first == {"index": 0, **call, "function": {"name": "weather", "arguments": "{"}}
    assert "{" + "".join(each["function"]["arguments"] for each in rest) == call["function"]["arguments"]
    assert all(set(each) == {"index", "function"} for each in rest)
    assert len(rest) == len(call["function"]["arguments"]) - 1, "one for each character that came"


def test_log_probabilities_are_told_with_the_text_of_their_tokens_each_once() -> None:
    texts = ["a", "", "b"]
    events = events_of(texts, logprobs=True)
    answer = ChatAnswer(make_job(logprobs=0))
    stream = told(answer, events)
    shown = [data["choices"][0]["logprobs"] for _, data in stream[:-1]]
    assert [[each["token"] for each in (one or {"content": []})["content"]] for one in shown] == [
        [],
        ["a"],
        ["", "b"],
        [],
    ]
    assert [each["token"] for each in answer.body()["choices"][0]["logprobs"]["content"]] == texts
    plain = CompletionAnswer(make_job(form="prompt", logprobs=0))
    for event in events:
        plain.add(event)
    assert plain.body()["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1]


@pytest.mark.parametrize("num_seen", range(4))
def test_a_streams_offsets_count_from_the_answers_beginning_also_where_it_goes_on(num_seen: int) -> None:
    events = events_of(["a", "", "bcd", "e"], logprobs=True)
    job = make_job(form="prompt", logprobs=0)
    whole = [(id_, data["choices"][0]["logprobs"]) for id_, data in told(CompletionAnswer(job), events)[:-1]]
    offsets = [one["text_offset"] for _, one in whole if one]
    assert offsets == [[0], [1, 1], [4]]
    seen = Cursor.parse(whole[num_seen][0] or "", 1, "after")
    rest = [data["choices"][0]["logprobs"] for _, data in told(CompletionAnswer(job, seen=seen), events)[:-1]]
    assert [one["text_offset"] for one in rest if one] == offsets[num_seen + 1 :]


@pytest.mark.parametrize("text", ["", "x", "1,2", "1,", "-1", "1e2", "9" * 40, "1\n", "u"])
def test_an_id_that_is_none_of_the_streams_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Cursor.parse(text, 1, "after")
    assert caught.value.param == "after"


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_name_alone_means_its_newest_version() -> None:
    models = tuple(ModelInfo("demo", version, slots=2) for version in ("1.9", "1.10", "1.2"))
    state = make_state("w", models=(*models, ModelInfo("other", "1", slots=1), ModelInfo("loading", "1", slots=0)))
    assert newest_version("demo", [state]) == "1.10"
    assert newest_version("none", [state]) is None
    found = [(model.name, model.version, model.is_newest) for model in served_models([state])]
    assert found == [("demo", "1.10", True), ("demo", "1.9", False), ("demo", "1.2", False), ("other", "1", True)]
