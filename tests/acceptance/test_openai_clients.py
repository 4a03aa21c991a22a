"""Clients that people have already, unmodified, against real processes: the `openai` package, and curl."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.ports import free_port
from tests.processes import ANSWER, QUESTION, Machine, eventually

ASK: Any = [{"role": "user", "content": QUESTION}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"place": "Paris"}}</tool_call>'


def script(text: str) -> Any:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with the demo model."""
    with Machine(tmp_path_factory.mktemp("demo")) as machine:
        up = machine.start("up")
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose model says what the test wants, and that must be as it was after all tests."""
    with Machine(tmp_path_factory.mktemp("scripted")) as machine:
        up = machine.start("up", **machine.scripted(slots=8))
        machine.wait_ready(up)
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output
        assert machine.infer("tokens=1").status_code == 200


def client_of(machine: Machine) -> OpenAI:
    return OpenAI(base_url=f"{machine.url}/v1", api_key="sk-any", max_retries=0)


@pytest.fixture
def client(demo: Machine) -> Iterator[OpenAI]:
    with client_of(demo) as found:
        yield found


@pytest.fixture
def scripts(scripted: Machine) -> Iterator[OpenAI]:
    with client_of(scripted) as found:
        yield found


# --- the openai package ----------------------------------------------------------------------------------------------


def test_a_chat_is_answered(client: OpenAI) -> None:
    found = client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason, choice.message.role) == (ANSWER, "stop", "assistant")
    assert (found.model, found.object) == ("demo@1.0", "chat.completion")
    assert found.system_fingerprint is not None
    assert found.system_fingerprint.endswith("_float32")
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 2


def test_a_chat_is_streamed_and_says_what_it_used(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo@1.0", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 1
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_an_async_client_has_many_chats_at_once(demo: Machine) -> None:
    async def main() -> None:
        async with AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="sk-any", max_retries=0) as client:

            async def ask() -> str:
                stream = await client.chat.completions.create(model="demo", messages=ASK, temperature=0, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            assert await asyncio.gather(*(ask() for _ in range(4))) == [ANSWER] * 4

    asyncio.run(main())


def test_a_completion_goes_on_with_its_prompt(client: OpenAI) -> None:
    prompt = "The capital of"
    found = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=4, logprobs=2)
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.tokens is not None
    assert "".join(found.choices[0].logprobs.tokens) == found.choices[0].text
    stream = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_the_same_seed_gives_the_same_answers_and_each_choice_its_own(client: OpenAI) -> None:
    def sampled(**fields: Any) -> list[str | None]:
        found = client.chat.completions.create(
            model="demo",
            messages=script("no question"),
            temperature=2,
            seed=7,
            n=3,
            max_tokens=12,
            logit_bias={"3": -50},
            **fields,
        )
        return [choice.message.content for choice in found.choices]

    first = sampled()
    assert len(set(first)) > 1
    assert sampled() == first
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="demo",
        messages=script("no question"),
        temperature=2,
        seed=7,
        n=3,
        max_tokens=12,
        logit_bias={"3": -50},
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == first


def test_log_probabilities_come_with_the_tokens(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, logprobs=True, top_logprobs=3, max_tokens=3
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(each.token for each in logprobs.content) == found.choices[0].message.content
    for each in logprobs.content:
        assert each.logprob <= 0
        assert each.top_logprobs[0].token == each.token
        assert bytes(each.bytes or []).decode() == each.token


def test_a_stop_string_ends_the_answer_and_is_not_told(client: OpenAI) -> None:
    found = client.chat.completions.create(model="demo", messages=ASK, temperature=0, stop=["Paris"])
    assert found.choices[0].message.content == ANSWER.split("Paris", maxsplit=1)[0]


def test_an_answer_follows_its_schema(client: OpenAI) -> None:
    wanted: Any = {
        "type": "json_schema",
        "json_schema": {
            "name": "yes",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"sure": {"type": "boolean"}},
                "required": ["sure"],
                "additionalProperties": False,
            },
        },
    }
    found = client.chat.completions.create(model="demo", messages=ASK, response_format=wanted, max_tokens=50)
    assert isinstance(json.loads(found.choices[0].message.content or "")["sure"], bool)


def test_a_model_without_tools_in_its_template_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=ASK, tools=[WEATHER])
    assert caught.value.param == "tools"


def test_a_prompt_over_the_context_is_an_error_with_its_code_streamed_or_not(client: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="demo", messages=script("x " * 9000), stream=stream)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_the_models_are_listed_and_an_unknown_one_names_the_nearest(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo@1.0").id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dmeo")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="did you mean 'demo'"):
        client.chat.completions.create(model="dmeo", messages=ASK)


def test_what_the_model_says_becomes_calls_of_tools_streamed_or_not(scripts: OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": script(f"say={quote('Wait. ' + CALL + CALL)}"), "tools": [WEATHER]}
    (choice,) = scripts.chat.completions.create(**asked).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Wait. ")
    calls = choice.message.tool_calls or []
    assert [call.type for call in calls] == ["function", "function"]
    with scripts.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert [call.function.arguments for call in final.message.tool_calls or []] == ['{"place": "Paris"}'] * 2
    (choice,) = scripts.chat.completions.create(**asked, parallel_tool_calls=False).choices
    assert len(choice.message.tool_calls or []) == 1
    answered = [
        *asked["messages"],
        {"role": "assistant", "tool_calls": [call.model_dump() for call in calls]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
        {"role": "user", "content": "tokens=2"},
    ]
    found = scripts.chat.completions.create(model="demo", messages=answered, tools=[WEATHER])
    assert found.choices[0].message.content == "0 1 "


def test_the_arguments_of_a_call_are_streamed_as_they_come_and_go_on_from_any_event(
    scripted: Machine, scripts: OpenAI
) -> None:
    asked: Any = {"model": "demo", "messages": script(f"say={quote(CALL + CALL)} every=0.02"), "tools": [WEATHER]}
    with scripts.chat.completions.stream(**asked) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert [call.function.arguments for call in final.message.tool_calls or []] == ['{"place": "Paris"}'] * 2
    assert {piece.name for piece in pieces} == {"weather"}
    assert len([piece for piece in pieces if piece.arguments_delta]) > 2, "one for each call would be two"
    answer = scripted.http.post("/v1/chat/completions", json={**asked, "stream": True})
    events = [(name, json.loads(data)) for name, data in events_of(answer.text)[:-1]]

    def calls_in(stream: list[tuple[str | None, Any]]) -> list[list[str]]:
        found: list[list[str]] = []
        for _, chunk in stream:
            for call in chunk["choices"][0]["delta"].get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(found)
                    found.append([call["id"], call["function"]["name"], ""])
                found[call["index"]][2] += call["function"]["arguments"]
        return found

    whole = calls_in(events)
    assert [call[1:] for call in whole] == [["weather", '{"place": "Paris"}']] * 2
    job_id = answer.headers["x-tether-job-id"]
    for place, (name, _) in enumerate(events, 1):
        rest = scripted.http.get(f"/v1/jobs/{job_id}/stream", params={"after": name or ""}).text
        told = [(name, json.loads(data)) for name, data in events_of(rest)[:-1]]
        assert calls_in([*events[:place], *told]) == whole


def test_calls_are_found_again_as_calls_at_any_gateway_where_only_the_result_is_kept(
    scripted: Machine, scripts: OpenAI
) -> None:
    port = free_port()
    other = scripted.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    text, only = quote("Wait. " + CALL + CALL), {"keep": "result"}
    chat = scripts.chat.completions.create(
        model="demo", messages=script(f"say={text}"), tools=[WEATHER], extra_body=only
    )
    tool: Any = {"type": "function", **WEATHER["function"]}
    made = scripts.responses.create(model="demo", input=f"say={text}", tools=[tool], extra_body=only)
    calls = [call.model_dump() for call in chat.choices[0].message.tool_calls or []]
    assert [call["function"]["name"] for call in calls] == ["weather"] * 2
    for url in (scripted.url, f"http://127.0.0.1:{port}"):
        with OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            eventually(lambda client=client: list(client.models.list()), what="the other gateway")  # type: ignore[misc]
            stream = client.get(f"/jobs/{chat.id.removeprefix('chatcmpl-')}/stream", cast_to=httpx.Response)
            chunks = [json.loads(data)["choices"][0] for _, data in events_of(stream.text)[:-1]]
            told = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
            assert [{**call, "index": None} for call in told] == [{**call, "index": None} for call in calls]
            assert chunks[-1]["finish_reason"] == "tool_calls"
            found = client.responses.retrieve(made.id)
            assert found.output == made.output
            again = list(client.responses.retrieve(made.id, stream=True))[-1]
            assert again.type == "response.completed"
            assert again.response.output == made.output
    with pytest.raises(openai.NotFoundError):
        scripts.responses.input_items.list(made.id)
    other.stop()


def test_what_a_client_wrote_on_its_request_is_shown_with_the_job(scripted: Machine, scripts: OpenAI) -> None:
    found = scripts.chat.completions.with_raw_response.create(
        model="demo", messages=script("tokens=1"), user="me", metadata={"why": "test"}
    )
    job = scripted.http.get(f"/v1/jobs/{found.headers['x-tether-job-id']}").json()
    assert (job["user"], job["metadata"], job["version"]) == ("me", {"why": "test"}, "1.0")


def test_a_failure_in_mid_stream_is_one_error_and_no_done(scripted: Machine, scripts: OpenAI) -> None:
    ask = script("tokens=9 every=0.01 skip_at=4")
    with pytest.raises(openai.APIError, match="skipped or repeated") as caught:
        list(scripts.chat.completions.create(model="demo", messages=ask, stream=True))
    assert caught.value.code == "worker_failed"
    body = {"model": "demo", "messages": ask, "stream": True}
    *events, (name, last) = events_of(scripted.http.post("/v1/chat/completions", json=body).text)
    assert (name, set(json.loads(last))) == (None, {"error"})
    assert text_of(events) == "0 1 2 3 "
    assert all(name for name, _ in events)


def test_a_failure_before_the_first_token_is_a_status(scripts: OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            scripts.chat.completions.create(model="demo", messages=script("error=output_invalid"), stream=stream)
        assert (caught.value.status_code, caught.value.code) == (502, "output_invalid")


# --- responses -------------------------------------------------------------------------------------------------------


def test_a_response_is_answered_streamed_and_found_again(client: OpenAI) -> None:
    found = client.responses.create(model="demo", input=QUESTION, temperature=0)
    assert (found.output_text, found.status, found.error) == (ANSWER, "completed", None)
    assert found.usage is not None
    assert found.usage.total_tokens > 2
    again = client.responses.retrieve(found.id)
    assert (again.id, again.output_text, again.status) == (found.id, ANSWER, "completed")
    with client.responses.stream(model="demo", input=ASK, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    short = client.responses.create(model="demo", input=ASK, temperature=0, max_output_tokens=3)
    assert short.incomplete_details is not None
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_response_follows_a_schema_and_instructions_are_a_system_message(client: OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "n", "schema": {"type": "boolean"}}}
    found = client.responses.create(model="demo", input="sure?", instructions="be sure", text=wanted)
    assert json.loads(found.output_text) in {True, False}


def test_a_response_has_the_calls_of_tools_as_items(scripts: OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    asked: Any = {"model": "demo", "input": f"every=0.02 say={quote('Wait. ' + CALL)}", "tools": [tool]}
    found = scripts.responses.create(**asked)
    assert [item.type for item in found.output] == ["message", "function_call"]
    call: Any = found.output[1]
    assert (call.name, call.arguments) == ("weather", '{"place": "Paris"}')
    with scripts.responses.stream(**asked) as stream:
        events = list(stream)
        assert [item.type for item in stream.get_final_response().output] == ["message", "function_call"]
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert ("".join(pieces), len(pieces) > 1) == (call.arguments, True)
    (ended,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert ended.arguments == call.arguments
    answered: Any = [
        {"role": "user", "content": "how is it?"},
        *[item.model_dump(exclude_none=True) for item in found.output],
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        {"role": "user", "content": "tokens=2"},
    ]
    assert scripts.responses.create(model="demo", input=answered).output_text == "0 1 "


def test_a_response_in_the_background_is_looked_for_and_cancelled(scripts: OpenAI) -> None:
    short = scripts.responses.create(model="demo", input="tokens=2", background=True)
    assert short.status in {"queued", "in_progress"}
    eventually(lambda: scripts.responses.retrieve(short.id).status == "completed", what="the end")
    assert scripts.responses.retrieve(short.id).output_text == "0 1 "
    long = scripts.responses.create(model="demo", input="tokens=1000 every=0.1", background=True)
    assert scripts.responses.cancel(long.id).status == "cancelled"
    assert scripts.responses.retrieve(long.id).status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        scripts.responses.retrieve("resp_none")


def test_a_response_in_the_background_is_streamed_and_goes_on_without_its_client(
    scripted: Machine, scripts: OpenAI
) -> None:
    whole = "".join(f"{position} " for position in range(12))
    asked: Any = {"model": "demo", "input": "tokens=12 every=0.05", "background": True, "stream": True}
    events = list(scripts.responses.create(**asked))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert (events[-1].type, events[-1].response.output_text) == ("response.completed", whole)
    assert events[-1].response.background

    def leave_behind(num_chars: int) -> tuple[str, str, int]:
        """Leave a stream; return the response's id, the text that came and the last event's number."""
        response_id, text = "", ""
        with scripts.responses.create(**asked) as stream:
            for event in stream:
                if event.type == "response.created":
                    response_id = event.response.id
                text += event.delta if event.type == "response.output_text.delta" else ""
                if len(text) >= num_chars:
                    return response_id, text, event.sequence_number
        raise AssertionError("the stream ended by itself")

    response_id, text, number = leave_behind(5)
    rest = list(scripts.responses.retrieve(response_id, stream=True, starting_after=number))
    assert text + "".join(event.delta for event in rest if event.type == "response.output_text.delta") == whole
    assert all(event.sequence_number > number for event in rest)
    response_id, text, _ = leave_behind(2)
    assert len(text) < len(whole)
    eventually(lambda: scripts.responses.retrieve(response_id).status == "completed", what="the end")
    found = scripts.responses.retrieve(response_id)
    assert (found.status, found.output_text, found.background) == ("completed", whole, True)
    attempts = scripted.http.get(f"/v1/jobs/{response_id.removeprefix('resp_')}").json()["attempts"]
    assert attempts == 1


def test_the_stream_of_a_response_in_the_background_that_is_cancelled_ends_with_an_error(scripts: OpenAI) -> None:
    asked: Any = {"model": "demo", "input": "tokens=1000 every=0.05", "background": True, "stream": True}
    with scripts.responses.create(**asked) as stream:
        created: Any = next(iter(stream))
        assert scripts.responses.cancel(created.response.id).status == "cancelled"
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "job_cancelled"
    assert scripts.responses.retrieve(created.response.id).status == "cancelled"


def test_a_response_s_stream_goes_on_behind_an_event_at_any_gateway_while_it_runs_and_after_its_end(
    scripted: Machine, scripts: OpenAI
) -> None:
    port = free_port()
    other = scripted.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    whole = "".join(f"{position} " for position in range(12))
    headers = {"Idempotency-Key": "a-response"}  # its client comes back, so it goes on
    pieces, number, response_id = "", -1, ""
    asked: Any = {"model": "demo", "input": "tokens=12 every=0.05", "stream": True, "extra_headers": headers}
    with scripts.responses.create(**asked) as stream:
        for event in stream:
            number = event.sequence_number
            if event.type == "response.created":
                response_id = event.response.id
            if event.type == "response.output_text.delta":
                pieces += event.delta
                if len(pieces) > 5:
                    break
    for url in (f"{scripted.url}/v1", f"http://127.0.0.1:{port}/v1"):
        with OpenAI(base_url=url, api_key="any") as client:
            eventually(lambda client=client: list(client.models.list()), what="the other gateway")  # type: ignore[misc]
            rest = list(client.responses.retrieve(response_id, stream=True, starting_after=number))
            assert pieces + "".join(e.delta for e in rest if e.type == "response.output_text.delta") == whole
            assert all(event.sequence_number > number for event in rest)
            assert (rest[-1].type, rest[-1].response.output_text) == ("response.completed", whole)  # type: ignore[union-attr]
            with client.responses.stream(response_id=response_id) as again:
                assert again.get_final_response().output_text == whole
        ways: list[tuple[str, dict[str, Any]]] = [
            (f"/responses/{response_id}?stream=true", {"Last-Event-ID": str(number)}),
            (f"/jobs/{response_id.removeprefix('resp_')}/stream?after={number}", {}),
        ]
        for path, header in ways:
            told = events_of(httpx.get(url + path, headers=header, timeout=30).text)
            assert pieces + "".join(json.loads(data).get("delta", "") for _, data in told) == whole
            assert [event_id for event_id, _ in told] == [str(json.loads(data)["sequence_number"]) for _, data in told]
    other.stop()


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=true&starting_after=x", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("starting_after=1", "starting_after"),
        ("stream=perhaps", "stream"),
        ("include=logprobs", "include"),
    ],
)
def test_a_place_in_no_response_s_stream_is_refused(scripted: Machine, scripts: OpenAI, query: str, param: str) -> None:
    found = scripts.responses.create(model="demo", input="tokens=1")
    answer = scripted.http.get(f"/v1/responses/{found.id}?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    for place in ("1e", "-", "1u"):
        wrong = scripted.http.get(f"/v1/responses/{found.id}?stream=true", headers={"Last-Event-ID": place})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "Last-Event-ID")
    chat = scripts.chat.completions.create(model="demo", messages=script("tokens=1"))
    job_id = chat.id.removeprefix("chatcmpl-")
    assert scripted.http.get(f"/v1/responses/resp_{job_id}?stream=true").status_code == 404


def test_a_response_that_was_deleted_is_gone_whatever_it_was(scripted: Machine, scripts: OpenAI) -> None:
    done = scripts.responses.create(model="demo", input="tokens=2", metadata={"for": "us"}, user="me")
    live = scripts.responses.create(model="demo", input="tokens=1000 every=0.1", background=True)
    failed = scripts.responses.create(model="demo", input="tokens=1000 every=0.1", background=True)
    scripts.responses.cancel(failed.id)
    for response_id in (done.id, live.id, failed.id):
        answer = scripted.http.delete(f"/v1/responses/{response_id}")
        assert answer.json() == {"id": response_id, "object": "response", "deleted": True}
        for ask in (scripts.responses.retrieve, scripts.responses.delete, scripts.responses.input_items.list):
            with pytest.raises(openai.NotFoundError):
                ask(response_id)
        job = scripted.http.get(f"/v1/jobs/{response_id.removeprefix('resp_')}").json()
        assert (job["input"], job["result"], job["user"], job["metadata"]) == (None, None, None, {})
        assert job["status"] == ("completed" if response_id == done.id else "cancelled")
    with pytest.raises(openai.NotFoundError):
        scripts.responses.create(model="demo", input="tokens=1", previous_response_id=done.id)
    with pytest.raises(openai.NotFoundError):
        scripts.responses.delete("resp_none")


def test_a_response_goes_on_after_another_one_with_its_whole_conversation(scripted: Machine, scripts: OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    first = scripts.responses.create(
        model="demo", input=f"say={quote('Wait. ' + CALL)}", tools=[tool], instructions="be brief"
    )
    call: Any = first.output[1]
    outcome: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    second = scripts.responses.create(
        model="demo",
        input=[*outcome, {"role": "user", "content": "tokens=2"}],
        previous_response_id=first.id,
        instructions="be kind",
    )
    assert (second.output_text, second.previous_response_id, second.instructions) == ("0 1 ", first.id, "be kind")
    with scripts.responses.stream(model="demo", input="tokens=3", previous_response_id=second.id) as stream:
        third = stream.get_final_response()
    assert third.output_text == "0 1 2 "
    assert scripts.responses.retrieve(third.id).previous_response_id == second.id
    items: Any = list(scripts.responses.input_items.list(third.id, order="asc"))
    assert [(item.type, getattr(item, "role", None)) for item in items] == [
        ("message", "user"),
        ("message", "assistant"),
        ("function_call", None),
        ("function_call_output", None),
        ("message", "user"),
        ("message", "assistant"),
        ("message", "user"),
    ]
    assert [items[place].content[0].text for place in (1, 4, 5, 6)] == ["Wait. ", "tokens=2", "0 1 ", "tokens=3"]
    assert (items[2].arguments, items[3].output) == (call.arguments, "sunny")
    pages: Any = list(scripts.responses.input_items.list(third.id, limit=2))  # the newest first, in pages
    assert [item.id for item in pages] == [item.id for item in reversed(items)]
    asked = json.loads(scripted.http.get(f"/v1/jobs/{second.id.removeprefix('resp_')}").json()["input"])
    assert [message["content"] for message in asked["messages"] if message["role"] == "system"] == ["be kind"]


def test_a_response_that_is_not_there_was_not_kept_or_is_another_tenant_s_is_gone_on_after_by_nobody(
    scripts: OpenAI,
) -> None:
    kept = scripts.responses.create(model="demo", input="tokens=1", extra_body={"tenantId": "one"})
    unkept = scripts.responses.create(model="demo", input="tokens=1", store=False)
    half = scripts.responses.create(model="demo", input="tokens=1", extra_body={"keep": "result"})
    chat = scripts.chat.completions.create(model="demo", messages=script("tokens=1"))
    for previous in ("resp_none", kept.id, unkept.id, half.id, chat.id.removeprefix("chatcmpl-")):
        with pytest.raises(openai.NotFoundError) as caught:
            scripts.responses.create(model="demo", input="tokens=1", previous_response_id=previous)
        assert (caught.value.code, caught.value.param) == ("response_not_found", "previous_response_id")
    assert scripts.responses.create(
        model="demo", input="tokens=1", previous_response_id=kept.id, extra_body={"tenantId": "one"}
    ).output_text
    for missing in (unkept.id, chat.id.removeprefix("chatcmpl-")):
        with pytest.raises(openai.NotFoundError, match=r"not kept|no response"):
            scripts.responses.retrieve(missing)
        with pytest.raises(openai.NotFoundError):
            scripts.responses.input_items.list(missing)
    assert scripts.responses.retrieve(half.id).output_text == "0 "
    long = scripts.responses.create(model="demo", input="tokens=1000 every=0.1", background=True)
    with pytest.raises(openai.ConflictError, match="not ended"):
        scripts.responses.create(model="demo", input="tokens=1", previous_response_id=long.id)
    scripts.responses.cancel(long.id)
    with pytest.raises(openai.ConflictError, match="cancelled"):
        scripts.responses.create(model="demo", input="tokens=1", previous_response_id=long.id)


def test_a_response_that_breaks_off_is_an_error(scripts: OpenAI) -> None:
    with pytest.raises(openai.APIError, match="skipped or repeated"):
        list(scripts.responses.create(model="demo", input="tokens=9 every=0.01 skip_at=4", stream=True))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input.0"),
        ({"input": [{"type": "function_call"}]}, "input.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.json_schema.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"previous_response_id": 7}, "previous_response_id"),
        ({"store": False, "background": True}, "store"),
        ({"store": False, "keep": "all"}, "store"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["x"]}, "include"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"inptu": 1}, "inptu"),
        ({"n": 2}, "n"),
    ],
)
def test_a_wrong_parameter_of_a_response_is_named(scripted: Machine, fields: dict[str, Any], param: str) -> None:
    answer = scripted.http.post("/v1/responses", json={"model": "demo", "input": "tokens=1", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


# --- streams that go on ----------------------------------------------------------------------------------------------


def events_of(text: str) -> list[tuple[str | None, str]]:
    """Return the ids and the data of a stream's events."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":")]
        fields = dict(lines)
        if "data" in fields:
            found.append((fields.get("id"), fields["data"]))
    return found


def text_of(events: list[tuple[str | None, str]], choice: int = 0) -> str:
    chunks = [json.loads(data) for _, data in events if data != "[DONE]"]
    told = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice]
    return "".join(each["delta"].get("content", "") for each in told)


def cut(machine: Machine, body: dict[str, Any], headers: dict[str, str], num_events: int) -> tuple[str, list[Any]]:
    """Read some events of a stream and close the connection; return the job's id and the events."""
    text = ""
    with machine.http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        for piece in answer.iter_text():
            text += piece
            whole = events_of(text[: text.rfind("\n\n") + 2])
            if len(whole) >= num_events:
                return answer.headers["x-tether-job-id"], whole
    raise AssertionError(text)


LONG = {"model": "demo", "messages": script("tokens=12 every=0.05"), "n": 2, "stream": True}
WHOLE = "".join(f"{position} " for position in range(12))


def test_a_stream_goes_on_where_it_was_cut_at_any_gateway_while_the_job_runs_and_after_its_end(
    scripted: Machine,
) -> None:
    port = free_port()
    other = scripted.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    job_id, seen = cut(scripted, LONG, {"Idempotency-Key": "cut"}, 7)
    last = seen[-1][0]
    for url in (scripted.url, f"http://127.0.0.1:{port}"):
        with httpx.Client(base_url=url, timeout=30) as http:
            eventually(lambda http=http: http.get("/v1/models").status_code == 200, what="the other gateway")  # type: ignore[misc]
            for way in ({"params": {"after": last}}, {"headers": {"Last-Event-ID": last}}):
                rest = events_of(http.get(f"/v1/jobs/{job_id}/stream", **way).text)  # type: ignore[arg-type]
                assert rest[-1] == (None, "[DONE]")
                for choice in (0, 1):
                    assert text_of([*seen, *rest], choice) == WHOLE
            again = http.post(
                "/v1/chat/completions", json=LONG, headers={"Idempotency-Key": "cut", "Last-Event-ID": last}
            )
            assert again.headers["idempotent-replayed"] == "true"
            assert text_of([*seen, *events_of(again.text)]) == WHOLE
    assert scripted.http.get(f"/v1/jobs/{job_id}").json()["attempts"] == 1
    other.stop()


def test_a_stream_that_goes_on_after_the_job_s_end_tells_its_log_probabilities_and_weights_too(
    demo: Machine, tmp_path: Path
) -> None:
    body = {
        "model": "demo",
        "messages": ASK,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "stream": True,
    }
    answer = demo.http.post("/v1/chat/completions", json=body)
    events = [(name, json.loads(data)) for name, data in events_of(answer.text)[:-1]]
    job_id = answer.headers["x-tether-job-id"]

    def shown(stream: list[tuple[str | None, Any]], choice: int) -> list[Any]:
        told = [each for _, chunk in stream for each in chunk["choices"] if each["index"] == choice]
        return [token for each in told for token in (each["logprobs"] or {"content": []})["content"]]

    port = free_port()
    other = demo.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        eventually(lambda: http.get("/v1/models").status_code == 200, what="the other gateway")
        for place, (name, _) in enumerate(events, 1):
            rest = http.get(f"/v1/jobs/{job_id}/stream", params={"after": name or ""}).text
            told = [(name, json.loads(data)) for name, data in events_of(rest)[:-1]]
            assert {chunk["system_fingerprint"] for _, chunk in told} <= {events[0][1]["system_fingerprint"]}
            for choice in (0, 1):
                assert shown([*events[:place], *told], choice) == shown(events, choice)
    assert "".join(each["token"] for each in shown(events, 0)) == ANSWER
    other.stop()
    unkept = demo.http.post("/v1/chat/completions", json={**body, "store": False})
    gone = demo.http.get(f"/v1/jobs/{unkept.headers['x-tether-job-id']}/stream")
    assert gone.status_code == 409


def test_an_infer_answer_has_log_probabilities_whole_streamed_and_from_an_event_on(demo: Machine) -> None:
    whole = demo.infer(logprobs=2).json()
    assert "".join(each["token"] for each in whole["logprobs"]) == whole["result"] == ANSWER
    for each in whole["logprobs"]:
        assert each["logprob"] <= 0
        assert each["top"][0]["token"] == each["token"]
        assert len(each["top"]) == 2
    assert "logprobs" not in demo.infer().json()
    answer = demo.infer(logprobs=2, stream=True)
    events = [(name, json.loads(data)) for name, data in events_of(answer.text)]
    told = [each for _, event in events if event["type"] == "tokens" for each in event["logprobs"]]
    at_end = events[-1][1]["logprobs"]
    assert at_end[:-1] == told, "the end has no text"
    assert [each["token"] for each in at_end] == [each["token"] for each in whole["logprobs"]]
    name, first = next((name, event) for name, event in events if event["type"] == "tokens")
    rest = demo.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}/stream", params={"after": name or ""}).text
    later = [json.loads(data) for _, data in events_of(rest)]
    assert [each for event in later if event["type"] == "tokens" for each in event["logprobs"]] == told[
        len(first["logprobs"]) :
    ]


def test_the_same_key_gives_the_same_job_and_another_body_a_conflict(scripted: Machine) -> None:
    body = {"model": "demo", "messages": script("tokens=3")}

    def post(key: str, **fields: Any) -> httpx.Response:
        return scripted.http.post("/v1/chat/completions", json={**body, **fields}, headers={"Idempotency-Key": key})

    first, again = post("key"), post("key")
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["choices"] == again.json()["choices"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (post("key", n=2).status_code, post("key", n=2).json()["error"]["code"]) == (409, "job_conflict")
    assert post("key", tenantId="other").json()["id"] != first.json()["id"]
    assert post("").status_code == post("x" * 256).status_code == post("a b").status_code == 400


def test_requests_with_one_key_that_race_at_two_gateways_are_one_job(scripted: Machine) -> None:
    port = free_port()
    other = scripted.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    urls = [scripted.url, f"http://127.0.0.1:{port}"] * 4
    for url in urls[:2]:
        eventually(lambda url=url: httpx.get(f"{url}/v1/models").status_code == 200, what=url)  # type: ignore[misc]
    body = {"model": "demo", "messages": script("tokens=5 every=0.05"), "tenantId": "racer"}

    def post(url: str, number: int) -> Any:
        more = {"stream": True} if number % 3 == 0 else {}
        headers = {"Idempotency-Key": f"race-{bool(more)}"}
        return httpx.post(f"{url}/v1/chat/completions", json={**body, **more}, headers=headers, timeout=30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, urls, range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.headers["x-tether-job-id"] for answer in answers}) == 2
    for number, answer in enumerate(answers):
        if number % 3 == 0:
            assert text_of(events_of(answer.text)) == "0 1 2 3 4 "
        else:
            assert answer.json()["choices"][0]["message"]["content"] == "0 1 2 3 4 "
    assert len(scripted.http.get("/v1/jobs", params={"tenant_id": "racer"}).json()["data"]) == 2
    other.stop()


def test_a_job_without_a_key_ends_with_its_client(scripted: Machine) -> None:
    body = {"model": "demo", "messages": script("tokens=1000 every=0.05"), "stream": True}
    job_id, _ = cut(scripted, body, {}, 3)
    eventually(lambda: scripted.http.get(f"/v1/jobs/{job_id}").json()["status"] == "cancelled", what="the end")
    answer = scripted.http.get(f"/v1/jobs/{job_id}/stream")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_cancelled")


def test_all_choices_go_on_exactly_when_their_worker_dies(machine: Machine) -> None:
    machine.wait_ready(machine.start("up", **machine.scripted()))
    up = machine._processes[0]
    body = {**LONG, "messages": script("tokens=12 every=0.1")}
    text = ""
    with machine.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        killed = False
        for piece in answer.iter_text():
            text += piece
            if not killed and len(events_of(text[: text.rfind("\n\n") + 2])) >= 5:
                killed = True
                for child in up.children:
                    child.kill()
    events = events_of(text)
    assert [text_of(events, 0), text_of(events, 1), events[-1][1]] == [WHOLE, WHOLE, "[DONE]"]
    assert machine.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}").json()["attempts"] > 1


def test_an_infer_stream_goes_on_too(scripted: Machine) -> None:
    answer = scripted.infer("tokens=3", stream=True)
    job_id = answer.headers["x-tether-job-id"]
    rest = events_of(scripted.http.get(f"/v1/jobs/{job_id}/stream", params={"after": "2"}).text)
    assert json.loads(rest[-1][1])["result"] == "0 1 2 "


# --- curl ------------------------------------------------------------------------------------------------------------


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60, check=True).stdout


def test_curl_reads_a_stream_line_by_line(demo: Machine) -> None:
    body = json.dumps({"model": "demo", "messages": ASK, "temperature": 0, "stream": True})
    headers = ("-H", "Content-Type: application/json", "-H", "Authorization: Bearer sk-any")
    text = curl("-i", "-N", f"{demo.url}/v1/chat/completions", *headers, "-d", body)
    head, _, stream = text.partition("\n\n")
    assert "200 OK" in head
    assert "text/event-stream" in head
    assert "cache-control: no-cache" in head.lower()
    assert "x-accel-buffering: no" in head.lower()
    assert stream.endswith("data: [DONE]\n\n")
    assert text_of(events_of(stream)) == ANSWER


# --- bad input -------------------------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "model": [None, 7, "", [], "x" * 201, "@1", "demo@"],
    "messages": [None, "hi", [], {}, [None], [{}], [{"role": "king", "content": "x"}], [{"role": "user"}]],
    "max_tokens": [0, -1, 1.5, "8", True, 10**9, []],
    "max_completion_tokens": [0, "8", 10**12],
    "temperature": [-0.1, 2.1, "hot", [], True, 1e999],
    "top_p": [0, 1.1, "x"],
    "n": [0, 129, 1.5, "2"],
    "stop": [7, [""], [7], ["x"] * 17, {}, "x" * 201],
    "seed": ["1", 1.5, 2**63],
    "presence_penalty": [-2.1, 2.1, "x"],
    "frequency_penalty": [-2.1, 2.1, "x"],
    "logit_bias": [[], {"a": 1}, {"1": 101}, {"1": "x"}, {"-1": 1}],
    "logprobs": ["yes", 1],
    "top_logprobs": [3, 21, "x"],
    "stream": ["yes", 1],
    "stream_options": [True, {"other": 1}, {"include_usage": "x"}],
    "response_format": ["text", {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "text", "json_schema": {}}],
    "tools": ["x", [{}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]],
    "tool_choice": ["must", 7, "required", {"type": "function"}],
    "parallel_tool_calls": ["x"],
    "user": [7, "", "x" * 201],
    "metadata": [[], {"a": 1}, {"a": "x" * 513}, {str(number): "" for number in range(17)}],
    "top_k": [-1, 1.5],
    "min_p": [-1, 2],
    "repetition_penalty": [0, 11],
    "min_tokens": [-1, 10**9],
    "stop_token_ids": [[-1], ["x"], [1] * 65],
    "ignore_eos": ["x"],
    "tenantId": [7, ""],
    "priority": [101, "x"],
    "deadline_seconds": [0, -1, "x", 1e9],
    "region": [7],
    "session_key": [7],
    "keep": ["some"],
    "modalities": [["audio"], []],
    "service_tier": ["flex"],
    "functions": [[]],
    "reasoning_effort": ["high"],
    "audio": [{}],
    "mesages": ["x"],
}


@pytest.mark.parametrize("param", sorted(WRONG))
def test_a_wrong_parameter_is_named_streamed_or_not(scripted: Machine, param: str) -> None:
    for value in WRONG[param]:
        for more in ({}, {"stream": True}):
            body = {"model": "demo", "messages": script("tokens=1"), **more, param: value}
            text = json.dumps(body).encode()
            answer = scripted.http.post(
                "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), (param, value, error)
            assert set(error) == {"message", "type", "param", "code"}
            named = error["param"] or ""
            assert named.split(".")[0] in {param, *({"messages"} if param == "mesages" else ())}, (value, error)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("prompt", None),
        ("prompt", ["a", "b"]),
        ("prompt", [1, 2]),
        ("prompt", ""),
        ("logprobs", 6),
        ("logprobs", True),
        ("echo", True),
        ("suffix", "x"),
        ("best_of", 3),
        ("messages", []),
        ("max_completion_tokens", 3),
    ],
)
def test_a_wrong_parameter_of_a_completion_is_named(scripted: Machine, param: str, value: Any) -> None:
    answer = scripted.http.post("/v1/completions", json={"model": "demo", "prompt": "tokens=1", param: value})
    assert (answer.status_code, answer.json()["error"]["param"].split(".")[0]) == (400, param)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 50_000, b'{"a":' * 9_000]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_no_json_object_is_refused(scripted: Machine, path: str, body: bytes) -> None:
    answer = scripted.http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, set(answer.json())) == (400, {"error"})


def test_awkward_values_deep_inside_are_refused_or_served_but_never_a_mistake_of_ours(scripted: Machine) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"a": deep}
    lone = '{"model": "demo", "messages": [{"role": "user", "content": "tokens=1 \\ud800"}]}'
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    schema = {"type": "json_schema", "json_schema": {"name": "f", "schema": deep}}
    huge = json.dumps({"model": "demo", "messages": script("tokens=1"), "seed": 1}).replace(
        '"seed": 1', '"seed": 1' + "0" * 5000
    )
    nan = json.dumps({"model": "demo", "messages": script("tokens=1"), "temperature": float("nan")})
    headers = {"content-type": "application/json"}
    for content in (
        lone,
        huge,
        nan,
        json.dumps({"model": "demo", "messages": script("tokens=1"), "tools": [tool]}),
        json.dumps({"model": "demo", "messages": script("tokens=1"), "tools": [tool], "tool_choice": "required"}),
        json.dumps({"model": "demo", "messages": script("tokens=1"), "response_format": schema}),
        json.dumps({"model": "demo\0", "messages": script("tokens=1")}),
    ):
        answer = scripted.http.post("/v1/chat/completions", content=content, headers=headers)
        assert answer.status_code in {200, 400, 404}, answer.text


def test_a_place_in_no_stream_is_refused(scripted: Machine) -> None:
    job_id = scripted.infer("tokens=1").json()["jobId"]
    for after in ("x", "1,2", "-1", "9" * 50):
        assert scripted.http.get(f"/v1/jobs/{job_id}/stream", params={"after": after}).status_code == 400
    assert scripted.http.get("/v1/jobs/nothing/stream").status_code == 404
    assert scripted.http.get(f"/v1/jobs/{job_id}/stream", params={"tenant_id": "other"}).status_code == 404
    body = {"model": "demo", "messages": script("tokens=1"), "stream": True}
    answer = scripted.http.post("/v1/chat/completions", json=body, headers={"Last-Event-ID": "0"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")
