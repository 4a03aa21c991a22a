"""Guided answers: what a guide lets through parses and validates, and what it cannot follow is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tether.decoding import check_sampling
from tether.errors import InvalidRequest
from tether.guided import Guide, Guides
from tether.records import Sampling
from tether.sampling import Choice, Sampler

DEMO = Path(__file__).parents[2] / "tether/models/demo"
TOKENIZER = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
END = TOKENIZER.convert_tokens_to_ids("<|end|>")
SIZE = len(TOKENIZER) + 70
"""Like many models', these logits are wider than the vocabulary."""
GUIDES = Guides(TOKENIZER, SIZE, frozenset({END}))

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "grün", "青"]},
        "scores": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "colour", "scores"],
    "additionalProperties": False,
}


def schema(value: object, **fields: Any) -> Sampling:
    return Sampling(json_schema=json.dumps(value), **fields)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def text_of(ids: list[int]) -> str:
    text: str = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def allowed(guide: Guide) -> set[int]:
    mask = torch.zeros((SIZE + 31) // 32, dtype=torch.int32)
    guide.fill_mask(mask)
    return {token_id for token_id in range(SIZE) if int(mask[token_id // 32]) >> (token_id % 32) & 1}


def accepts(sampling: Sampling, text: str) -> bool:
    """Whether an answer may consist of just this text."""
    guide = GUIDES.compile(sampling)
    for token_id in ids_of(text):
        if token_id not in allowed(guide):
            return False
        guide.advance(token_id)
    return guide.is_complete and END in allowed(guide)


def outcome_of(sampling: Sampling) -> str:
    """Return `followed`, or the parameter that a refusal names."""
    try:
        check_sampling(sampling)
        guide = GUIDES.compile(sampling)
    except InvalidRequest as exc:
        return str(exc.param)
    return "followed" if allowed(guide) else "stuck"


def write(sampling: Sampling, seed: int, emitted: Iterable[int] = (), length: int = 400) -> list[int]:
    """Return the ids that a model of pure noise writes under a guide."""
    sampler = Sampler(SIZE, torch.device("cpu"), frozenset({END}))
    ids = list(emitted)
    row = sampler.open(sampling, [], ids, guide=GUIDES.compile(sampling))
    while len(ids) < length and (not ids or ids[-1] != END):
        noise = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(seed * 1000 + len(ids))) * 3
        (outcome,) = sampler.choose(noise, [row])
        assert isinstance(outcome, Choice)
        ids.append(outcome.token_id)
    return ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_model_says_the_answer_parses_and_validates(seed: int, temperature: float) -> None:
    ids = write(schema(PERSON, temperature=temperature, seed=seed), seed)
    assert ids[-1] == END
    found = json.loads(text_of(ids))
    assert list(found) == ["name", "age", "colour", "scores"]
    assert isinstance(found["name"], str)
    assert 1 <= len(found["name"]) <= 12
    assert isinstance(found["age"], int)
    assert 0 <= found["age"] <= 150
    assert found["colour"] in {"red", "grün", "青"}
    assert 1 <= len(found["scores"]) <= 3
    assert all(isinstance(score, bool) for score in found["scores"])


@pytest.mark.parametrize(
    "pattern", [r"[0-9]{3}-[0-9]{4}", r"(yes|no|ja|nein)[!?]{0,2}", r"^[ά-ώἀ-ὕ]{2,5}$", r"a/b\n(c)?"]
)
def test_whatever_the_model_says_the_whole_answer_matches_the_expression(pattern: str) -> None:
    for seed in range(5):
        ids = write(Sampling(regex=pattern, temperature=1.0, seed=seed), seed)
        assert re.fullmatch(pattern, text_of(ids)), text_of(ids)


def test_a_guided_answer_resumed_at_any_position_goes_on_with_the_same_ids() -> None:
    sampling = schema(PERSON, temperature=1.0, seed=5, repetition_penalty=1.1)
    whole = write(sampling, 5)
    for cut in range(len(whole)):
        assert write(sampling, 5, whole[:cut]) == whole


def test_emitted_ids_that_the_guide_does_not_allow_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="json_schema does not allow") as caught:
        write(schema(PERSON), 0, ids_of('{"name": 7'))
    assert caught.value.param == "emitted"


def test_ids_beyond_the_tokenizer_and_special_ones_never_come() -> None:
    guide = GUIDES.compile(Sampling(regex=r"(.|\n)*"))
    specials = set(TOKENIZER.all_special_ids)
    assert allowed(guide) & specials == {END}
    assert max(allowed(guide)) < len(TOKENIZER)


@pytest.mark.parametrize(
    ("sampling", "good", "bad"),
    [
        (schema(True), '[1, {"a": null}]', "[1,"),
        (schema({"type": "integer", "minimum": 5}), "7", "3"),
        (schema({"type": "string", "pattern": "b"}), '"abc"', '"ac"'),
        (schema({"type": "string", "pattern": "^b$"}), '"b"', '"bb"'),
        (schema({"oneOf": [{"type": "integer"}, {"type": "string"}]}), "3", "true"),
        (schema({"const": {"é": [1, 2]}}), '{"é": [1, 2]}', '{"é":[1,2]}'),
        (
            schema({"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}),
            "[[], [[]]]",
            "[1]",
        ),
        (schema({"type": "string", "format": "date"}), '"2026-11-23"', '"2026-13-23"'),
        (Sampling(regex="a/b"), "a/b", "a"),
        (Sampling(regex="^ab$"), "ab", "^ab$"),
        (Sampling(regex='a/ | "x"'), "a/ ", "x"),
        (Sampling(regex="a\nb"), "a\nb", "ab"),
    ],
)
def test_a_guide_lets_through_what_is_meant_and_nothing_else(sampling: Sampling, good: str, bad: str) -> None:
    assert accepts(sampling, good)
    assert not accepts(sampling, bad)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"type": "strin"}, "Invalid type"),
        (False, "false admits nothing"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"$ref": "#"}, "NoExtension"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "http://example.org/schema"}, "example.org"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"properties": {"a": 7}}, ""),
    ],
)
def test_a_schema_that_no_grammar_can_express_is_refused_with_the_reason(value: object, says: str) -> None:
    sampling = schema(value)
    check_sampling(sampling)
    with pytest.raises(InvalidRequest, match=r"json_schema cannot be followed: .") as caught:
        GUIDES.compile(sampling)
    assert caught.value.param == "json_schema"
    assert says in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("pattern", ["(a", r"(a)\1", "(?=a)b", r"a\b", "[]", "a{9,1}"])
def test_an_expression_that_no_grammar_can_express_is_refused_with_the_reason(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match=r"regex cannot be followed: .") as caught:
        GUIDES.compile(Sampling(regex=pattern))
    assert caught.value.param == "regex"
    assert "\n" not in caught.value.message


@settings(max_examples=150, deadline=None)
@given(st.text(min_size=1, max_size=12))
def test_any_expression_is_followed_or_refused(pattern: str) -> None:
    assert outcome_of(Sampling(regex=pattern)) in {"followed", "regex"}


NESTED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "properties", "items", "enum", "const", "anyOf", "allOf", "$ref", "required", "pattern", "a"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(NESTED)
def test_any_schema_is_followed_or_refused(value: object) -> None:
    assert outcome_of(schema(value)) in {"followed", "json_schema"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"object"', "null", "[" * 100_000, '{"a": "\ud800"}', "{}" + " " * 65_536]
)
def test_what_is_no_schema_at_all_is_refused_without_the_library(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(Sampling(json_schema=text))
    assert caught.value.param == "json_schema"


@pytest.mark.parametrize(
    "value",
    [
        {"const": -(2**63)},
        {"enum": [[{"a": 2**53 + 1}]]},
        {"type": "number", "minimum": 1e300},
        {"multipleOf": 784359},
        {"multipleOf": 12.34567},
        {"multipleOf": -3},
        {"multipleOf": 0},
        {"allOf": [{"type": "integer", "multipleOf": 1009}, {"multipleOf": 1013}]},
        {"anyOf": [{"multipleOf": 1 + 1 / 2**13}, {"multipleOf": 3}]},
        {"properties": {f"p{i}": {"multipleOf": 9973} for i in range(3)}},
        {"type": "array", "minItems": 2**40, "prefixItems": [True]},
        {"type": "string", "maxLength": 100_001},
    ],
)
def test_a_schema_that_would_occupy_or_end_the_process_is_refused_without_the_library(value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(schema(value))
    assert caught.value.param == "json_schema"


@pytest.mark.parametrize(
    "value",
    [
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 9973},
        {"allOf": [{"type": "number", "multipleOf": 0.25}, {"multipleOf": 3}]},
        {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
        {"properties": {"multipleOf": {"const": True}, "minItems": {"type": "string", "maxLength": 100_000}}},
    ],
)
def test_numbers_of_a_usual_size_are_followed(value: object) -> None:
    assert outcome_of(schema(value)) == "followed"


def test_a_schema_nested_too_deeply_is_refused() -> None:
    text = '{"items":' * 900 + "{}" + "}" * 900
    assert outcome_of(Sampling(json_schema=text)) == "json_schema"


def test_an_expression_that_becomes_too_complex_ends_its_own_row_only() -> None:
    sampler = Sampler(SIZE, torch.device("cpu"), frozenset({END}))
    runaway, calm = Sampling(regex="((a{1,500}){1,500}){1,500}"), Sampling(regex="(ab)*")
    rows = [sampler.open(sampling, [], guide=GUIDES.compile(sampling)) for sampling in (runaway, calm)]
    rows.append(sampler.open(Sampling(), []))
    logits = torch.zeros(3, SIZE)
    logits[:, ids_of("a")[0]] = 5.0
    for _ in range(100):
        outcomes = sampler.choose(logits, rows)
        assert isinstance(outcomes[1], Choice)
        assert isinstance(outcomes[2], Choice)
        if not isinstance(outcomes[0], Choice):
            break
    assert isinstance(outcomes[0], InvalidRequest)
    assert outcomes[0].param == "regex"


def test_a_schema_that_becomes_too_complex_with_a_chosen_id_ends_its_own_row_only() -> None:
    sampler = Sampler(SIZE, torch.device("cpu"), frozenset({END}))
    wide = schema({"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(500)}})
    rows = [sampler.open(wide, [], guide=GUIDES.compile(wide)), sampler.open(Sampling(), [])]
    broken, other = sampler.choose(torch.zeros(2, SIZE), rows)
    assert isinstance(broken, InvalidRequest)
    assert broken.param == "json_schema"
    assert "cannot be followed further" in broken.message
    assert isinstance(other, Choice)


def test_a_copied_guide_goes_its_own_way() -> None:
    guide = GUIDES.compile(Sampling(regex="a(b|c)"))
    guide.advance(ids_of("a")[0])
    other = guide.copy()
    guide.advance(ids_of("b")[0])
    assert guide.is_complete
    assert not other.is_complete
    other.advance(ids_of("c")[0])
    assert other.is_complete


def test_a_guide_and_a_sampling_that_asks_for_one_come_together() -> None:
    sampler = Sampler(SIZE, torch.device("cpu"), frozenset({END}))
    with pytest.raises(ValueError, match="belong together"):
        sampler.open(schema(PERSON), [])


@pytest.mark.parametrize(("tokenizer", "end_ids"), [(object(), frozenset({END})), (TOKENIZER, frozenset())])
def test_a_tokenizer_that_cannot_guide_says_so(tokenizer: object, end_ids: frozenset[int]) -> None:
    with pytest.raises(InvalidRequest, match="tokenizer cannot follow"):
        Guides(tokenizer, SIZE, end_ids)
