"""Sampling parameters through the engine, with the demo model: guided output, ends, penalties, and resumption."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tether import catalog
from tether.engine import Engine
from tether.errors import InvalidRequest
from tether.guided import Guide, Guides
from tether.records import Sampling
from tether.runtime_messages import End, Generate, Tokens

QUESTION = "What is the capital of France?"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Europe", "Asia"]},
        "known": {"type": "boolean"},
    },
    "required": ["capital", "continent", "known"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(catalog.resolve("demo"), device="cpu", threads=1)


def run(engine: Engine, *requests: Generate) -> dict[str, tuple[list[Tokens], End]]:
    """Run requests together and return what was told of each."""
    told: dict[str, list[Tokens]] = {}
    ends: dict[str, End] = {}
    for request in requests:
        told[request.id] = []
        engine.add(request)
    while len(ends) < len(requests):
        for event in engine.step():
            if isinstance(event, Tokens):
                told[event.id].append(event)
            elif isinstance(event, End):
                ends[event.id] = event
    return {request.id: (told[request.id], ends[request.id]) for request in requests}


def text_of(events: list[Tokens]) -> str:
    return "".join(event.text for event in events)


def guided(**fields: Any) -> Sampling:
    return Sampling(json_schema=json.dumps(CITY), max_tokens=200, **fields)


@pytest.mark.parametrize("sampling", [guided(), guided(temperature=1.5, seed=3, top_p=0.9, repetition_penalty=1.1)])
def test_an_answer_under_a_schema_parses_and_validates(engine: Engine, sampling: Sampling) -> None:
    text, reason = engine.answer(Generate("", QUESTION, sampling))
    found = json.loads(text)
    assert reason == "stop"
    assert list(found) == ["capital", "continent", "known"]
    assert isinstance(found["capital"], str)
    assert len(found["capital"]) <= 20
    assert found["continent"] in {"Europe", "Asia"}
    assert isinstance(found["known"], bool)


def test_a_schema_is_compiled_once_for_all_choices(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls = 0
    compile_one = Guides.compile

    def compile_and_count(guides: Guides, sampling: Sampling) -> Guide:
        nonlocal num_calls
        num_calls += 1
        return compile_one(guides, sampling)

    monkeypatch.setattr(Guides, "compile", compile_and_count)
    sampling = guided(n=4, temperature=1.5)
    tokens, end = run(engine, Generate("n", QUESTION, sampling))["n"]
    assert num_calls == 1
    assert len({text_of([each for each in tokens if each.choice == choice]) for choice in range(4)}) > 1
    for choice in range(4):
        json.loads(text_of([each for each in tokens if each.choice == choice]))
    assert end.choices == ("stop",) * 4


def test_an_answer_under_a_regular_expression_matches_whole(engine: Engine) -> None:
    text, reason = engine.answer(Generate("", QUESTION, Sampling(regex=r"(The|A) [a-z]{3,8} is [A-Z][a-z]+\.")))
    assert reason == "stop"
    assert re.fullmatch(r"(The|A) [a-z]{3,8} is [A-Z][a-z]+\.", text)


def test_what_no_grammar_can_express_is_refused_before_any_work(engine: Engine) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.add(Generate("x", QUESTION, Sampling(json_schema='{"not": {}}')))
    assert caught.value.param == "json_schema"
    assert engine.is_idle


def test_an_expression_that_becomes_too_complex_ends_its_own_job_only(engine: Engine) -> None:
    bias = {engine.encode("a", raw=True)[-1]: 100.0, **dict.fromkeys(engine.end_ids, -100.0)}
    told = run(
        engine,
        Generate("runaway", QUESTION, Sampling(regex="((a{1,500}){1,500}){1,500}", logit_bias=bias)),
        Generate("calm", QUESTION, Sampling()),
    )
    error = told["runaway"][1].error
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "regex")
    assert not told["runaway"][1].retry
    assert text_of(told["calm"][0]) == "The capital of France is Paris."


@pytest.mark.parametrize(
    "sampling",
    [
        guided(temperature=1.0, seed=8),
        Sampling(max_tokens=25, temperature=2.0, seed=5, top_k=40, min_p=0.01, frequency_penalty=0.5),
        Sampling(max_tokens=25, repetition_penalty=1.5, min_tokens=20, logprobs=2),
    ],
)
def test_an_answer_resumed_at_any_position_goes_on_with_the_same_ids_and_text(
    engine: Engine, sampling: Sampling
) -> None:
    whole, end = run(engine, Generate("whole", QUESTION, sampling))["whole"]
    ids = [event.token_ids[0] for event in whole]
    requests = [Generate(str(cut), QUESTION, sampling, (tuple(ids[:cut]),)) for cut in range(len(ids))]
    for cut in range(0, len(ids), 8):
        for name, (events, resumed_end) in run(engine, *requests[cut : cut + 8]).items():
            assert [event.token_ids[0] for event in events] == ids[int(name) :]
            assert text_of(events) == text_of(whole[int(name) :])
            assert resumed_end.finish_reason == end.finish_reason


def test_ends_are_the_callers_to_choose(engine: Engine) -> None:
    plain = run(engine, Generate("x", QUESTION))["x"][0]
    stop_id = plain[3].token_ids[0]
    stopped, end = run(engine, Generate("x", QUESTION, Sampling(stop_token_ids=(stop_id,))))["x"]
    assert (text_of(stopped), end.finish_reason) == (text_of(plain[:3]), "stop")
    assert len(stopped) == 4
    longer, end = run(engine, Generate("x", QUESTION, Sampling(min_tokens=len(plain) + 5, max_tokens=60)))["x"]
    assert len(longer) > len(plain) + 4
    ignoring, end = run(engine, Generate("x", QUESTION, Sampling(ignore_eos=True, max_tokens=len(plain) + 10)))["x"]
    assert (len(ignoring), end.finish_reason) == (len(plain) + 10, "length")


def test_log_probabilities_come_with_each_token_that_asks_for_them(engine: Engine) -> None:
    events = run(engine, Generate("x", QUESTION, Sampling(logprobs=3)))["x"][0]
    for event in events:
        (logprobs,) = event.logprobs
        assert len(logprobs.top) == 3
        assert logprobs.top[0] == (event.token_ids[0], logprobs.logprob)
    assert not any(event.logprobs for event in run(engine, Generate("x", QUESTION))["x"][0])


def test_the_choices_of_one_prompt_differ_and_each_can_be_had_again(engine: Engine) -> None:
    sampling = Sampling(n=3, temperature=3.0, seed=4, max_tokens=20)
    first, second = (run(engine, Generate("x", QUESTION, sampling))["x"][0] for _ in range(2))
    texts = [
        [text_of([event for event in events if event.choice == choice]) for choice in range(3)]
        for events in (first, second)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
