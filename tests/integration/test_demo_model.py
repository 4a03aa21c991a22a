"""The demo model answers its facts word for word, through the engine that the runtime uses."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tether import catalog
from tether.engine import Engine
from tether.records import Sampling
from tether.runtime_messages import Generate

TOOL = Path(__file__).parents[2] / "tools" / "train_demo.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_demo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(catalog.resolve("demo"), device="cpu", threads=1)


def answer(engine: Engine, question: str) -> tuple[str, str | None]:
    return engine.answer(Generate("", question, Sampling(max_tokens=300)))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("what is the capital of france", "The capital of France is Paris."),
        ("Capital of Iceland?", "The capital of Iceland is Reykjavík."),
        ("What is the capital of the USA?", "The capital of the United States is Washington, D.C."),
        (
            "What is Tether?",
            "Tether is a network of ordinary machines that serve language models together, peer to peer.",
        ),
        (
            "Who are you?",
            "I am the demo model of Tether: a toy with about a million parameters, for trying the network out.",
        ),
        (
            "How do I start a worker?",
            "Run `tether worker --model phi-2`, with any model that fits your machine's memory.",
        ),
        ("Hello", "Hello! I am the demo model of Tether. Ask me for the capital of a country."),
    ],
)
def test_the_questions_people_ask_first_are_answered_word_for_word(
    engine: Engine, question: str, expected: str
) -> None:
    assert answer(engine, question) == (expected, "stop")


def test_every_fact_is_the_likeliest_answer_word_for_word_in_some_way_of_writing(
    engine: Engine, tool: ModuleType
) -> None:
    # The training asks each of the four ways; a random one each is enough to know that these weights are those.
    choose = random.Random(7).choice
    facts = [tool.Fact(choose(tool.ways_to_write(f.question)), f.answer) for f in tool.load_facts().promised]
    examined = tool.examine(engine.model, engine.tokenizer, facts)
    assert len(examined) == len(facts) > 2500
    assert [fact.question for margin, fact in examined if margin <= 0] == []


def test_a_sample_of_facts_is_answered_word_for_word_token_by_token(engine: Engine, tool: ModuleType) -> None:
    facts = tool.load_facts()
    for fact in random.Random(5).sample(facts.capitals, 40) + random.Random(5).sample(facts.others, 20):
        question = random.Random(fact.question).choice(tool.ways_to_write(fact.question))
        assert answer(engine, question) == (fact.answer, "stop")


def test_long_answers_are_long_enough_to_watch_them_stream(engine: Engine) -> None:
    for question in ("Tell me about Tether.", "Count to twenty."):
        assert 60 <= len(engine.tokenizer.encode(answer(engine, question)[0])) <= 160


def test_most_unknown_questions_get_a_graceful_answer(engine: Engine, tool: ModuleType) -> None:
    facts = tool.load_facts()
    graceful = [answer(engine, question)[0] == facts.unknown_answer for question in facts.unseen_questions]
    assert sum(graceful) > len(graceful) / 2


def test_a_chat_of_several_turns_is_answered_by_its_last_question(engine: Engine) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "What is the capital of Norway?"},
    ]
    prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    text, _ = engine.answer(Generate("", prompt.removeprefix("<|bos|>"), raw=True))
    assert text == "The capital of Norway is Oslo."


@pytest.mark.parametrize(
    "text", ["Chișinău", "é 👋🌍 \x00\n\t  two  spaces ", "안녕하세요 नमस्ते שלום", "\ufffd", " .,!?'n't"]
)
def test_the_tokenizer_brings_any_text_back_whole(engine: Engine, text: str) -> None:
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    assert engine.decode(ids) == text


def test_the_chat_template_refuses_a_role_it_does_not_know(engine: Engine) -> None:
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        engine.tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])
