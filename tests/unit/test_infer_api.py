"""`POST /infer`: from its body to a job, with every parameter carried over or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from tether.errors import InvalidRequest
from tether.infer_api import FIELDS, InferRequest, to_job
from tether.records import Job, Sampling
from tether.settings import GatewaySettings

GOOD: dict[str, Any] = {"tenantId": "t", "modelId": "m", "version": "1", "input": "hi", "seed": 7}
EVERY: dict[str, Any] = {
    "maxTokens": 9,
    "temperature": 0.5,
    "topP": 0.9,
    "stop": ["x"],
    "topK": 5,
    "minP": 0.1,
    "repetitionPenalty": 1.2,
    "presencePenalty": -1,
    "frequencyPenalty": 0.5,
    "logitBias": {"3": -100, "0": 2.5},
    "minTokens": 4,
    "ignoreEos": True,
    "stopTokenIds": [3, 4],
    "logprobs": 2,
}


def job(**fields: Any) -> Job:
    return to_job(InferRequest.model_validate({**GOOD, **fields}), GatewaySettings())


def test_every_parameter_reaches_the_job() -> None:
    assert job(**EVERY).sampling == Sampling(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop=("x",),
        seed=7,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=0.5,
        logit_bias={3: -100.0, 0: 2.5},
        min_tokens=4,
        ignore_eos=True,
        stop_token_ids=(3, 4),
        logprobs=2,
    )


def test_what_is_left_out_has_the_networks_defaults() -> None:
    assert job().sampling == Sampling(seed=7)


def test_each_parameter_of_the_network_is_in_the_api_or_known_not_to_be() -> None:
    theirs = {FIELDS.get(name, name) for name in Sampling.__struct_fields__}
    # Several answers have no place in this API's answer.
    assert theirs - set(InferRequest.model_fields) == {"n"}


@pytest.mark.parametrize("schema", [{"type": "object", "properties": {"é": {}, "a": {}}}, True, {}])
def test_a_schema_is_carried_as_it_is_written_with_its_order(schema: Any) -> None:
    carried = job(jsonSchema=schema).sampling.json_schema
    assert carried is not None
    assert json.loads(carried) == schema
    assert carried == json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def test_a_regular_expression_is_carried_as_it_is_written() -> None:
    assert job(regex=r"a/b\d").sampling.regex == r"a/b\d"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("topK", -1),
        ("topK", 1.5),
        ("topK", True),
        ("minP", 1.01),
        ("minP", "0.1"),
        ("minP", float("nan")),
        ("repetitionPenalty", 0),
        ("repetitionPenalty", 11),
        ("presencePenalty", 2.1),
        ("frequencyPenalty", -2.1),
        ("frequencyPenalty", float("inf")),
        ("logitBias", {"a": 1}),
        ("logitBias", {"-1": 1}),
        ("logitBias", {"1": 101}),
        ("logitBias", {"1": "1"}),
        ("logitBias", {"1": None}),
        ("logitBias", {"01": 1}),
        ("logitBias", [[1, 1]]),
        ("logitBias", {str(token_id): 1 for token_id in range(1025)}),
        ("minTokens", -1),
        ("ignoreEos", 1),
        ("stopTokenIds", [-1]),
        ("stopTokenIds", [1.5]),
        ("stopTokenIds", [1 << 31]),
        ("stopTokenIds", list(range(65))),
        ("stopTokenIds", 5),
        ("jsonSchema", "{}"),
        ("jsonSchema", []),
        ("jsonSchema", 3),
        ("regex", ""),
        ("regex", "a" * 8193),
        ("regex", 5),
        ("n", 2),
        ("logprobs", 21),
        ("logprobs", True),
        ("logprobs", -1),
        ("top_k", 3),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        job(**{field: value})
    assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"maxTokens": 3, "minTokens": 4}, "minTokens", "minTokens must be between 0 and maxTokens"),
        ({"logitBias": {"9999999999": 1}}, "logitBias", "logitBias has token ids"),
        ({"jsonSchema": {}, "regex": "a"}, "regex", "jsonSchema and regex cannot both"),
        ({"jsonSchema": {}, "minTokens": 1}, "minTokens", "jsonSchema or regex"),
        ({"regex": "a", "ignoreEos": True}, "ignoreEos", "jsonSchema or regex"),
        ({"regex": "a\\"}, "regex", "escape"),
        ({"jsonSchema": {"a": float("nan")}}, "jsonSchema", "not JSON"),
        ({"jsonSchema": {"const": -(2**63)}}, "jsonSchema", "beyond"),
        ({"jsonSchema": {"enum": ["x" * 70_000]}}, "jsonSchema", "at most 65536 characters"),
    ],
)
def test_what_does_not_go_together_is_refused_in_the_apis_own_words(
    fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        job(**fields)
    assert caught.value.param == param
    assert says in caught.value.message


def test_a_schema_nested_without_end_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"items": nested}
    with pytest.raises((InvalidRequest, ValidationError)):
        job(jsonSchema=nested)
