"""From logits to ids: against one-row references, against transformers, by frequency, and resumed anywhere."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tether import sampling
from tether.decoding import uniform
from tether.errors import InvalidRequest, OutputInvalid
from tether.records import Sampling, TokenLogprobs
from tether.sampling import LEAST_LOGPROB, Choice, Row, Sampler

CPU = torch.device("cpu")
END = frozenset({0})
INFINITY = float("inf")


def sampler(num_vocabulary: int, end_ids: frozenset[int] = END) -> Sampler:
    return Sampler(num_vocabulary, CPU, end_ids)


def ids_of(outcomes: Sequence[object]) -> list[int]:
    ids = []
    for outcome in outcomes:
        assert isinstance(outcome, Choice), outcome
        ids.append(outcome.token_id)
    return ids


def choose_one(
    logits: Sequence[float], sampling: Sampling, prompt: Sequence[int] = (), emitted: Sequence[int] = ()
) -> int:
    chooser = sampler(len(logits))
    return ids_of(chooser.choose(torch.tensor([logits]), [chooser.open(sampling, prompt, emitted)]))[0]


# --- against a reference that does one row, one number at a time -----------------------------------------------------


def shaped(logits: list[float], sampling: Sampling, prompt: list[int], emitted: list[int]) -> list[float]:
    """Return the logits after bias, ban and penalties."""
    work = list(logits)
    for token_id, bias in sampling.logit_bias.items():
        work[token_id] += bias
    if len(emitted) < sampling.min_tokens:
        for token_id in END | set(sampling.stop_token_ids):
            work[token_id] = -INFINITY
    for token_id in range(len(work)):
        if token_id in prompt or token_id in emitted:
            penalty = sampling.repetition_penalty
            work[token_id] = work[token_id] * penalty if work[token_id] < 0 else work[token_id] / penalty
        times = emitted.count(token_id)
        work[token_id] -= times * sampling.frequency_penalty
        work[token_id] -= sampling.presence_penalty if times else 0.0
    return work


def reference(logits: list[float], sampling: Sampling, prompt: list[int], emitted: list[int]) -> int | None:
    """Return the id to take, by the definitions, in plain Python; None where there is nothing to choose."""
    work = shaped(logits, sampling, prompt, emitted)
    best = max(work)
    if not math.isfinite(best):
        return None
    if sampling.temperature == 0:
        return work.index(best)
    scale = 2.0 ** min(52, 62 - len(work).bit_length())
    units = [int(math.exp((value - best) / sampling.temperature) * scale) for value in work]
    if 0 < sampling.top_k < len(units):
        least = sorted(units, reverse=True)[sampling.top_k - 1]
        units = [unit if unit >= least else 0 for unit in units]
    if sampling.top_p < 1:
        wanted, reached, least = sampling.top_p * sum(units), 0, 0
        for unit in sorted(units, reverse=True):
            if reached >= wanted:
                break
            reached, least = reached + unit, unit
        units = [unit if unit >= least else 0 for unit in units]
    units = [unit if unit >= sampling.min_p * scale else 0 for unit in units]
    target = min(int(uniform(sampling.seed, len(emitted)) * sum(units)), sum(units) - 1)
    for token_id, unit in enumerate(units):
        target -= unit
        if target < 0:
            return token_id
    raise AssertionError("the sum of all units is above the target")


SIZE = 9
ID = st.integers(0, SIZE - 1)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(100),
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    seed=st.integers(0, 2**63 - 1),
    top_k=st.integers(0, SIZE + 2),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.1, 10)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    logit_bias=st.dictionaries(ID, st.floats(-100, 100), max_size=3),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(ID, max_size=2).map(tuple),
)
LOGIT = st.one_of(st.floats(-20, 20), st.sampled_from([0.0, 1.0, -INFINITY]))
ROWS = st.tuples(
    st.lists(LOGIT, min_size=SIZE, max_size=SIZE), SAMPLINGS, st.lists(ID, max_size=5), st.lists(ID, max_size=8)
)


@settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=6))
def test_every_row_of_a_mixed_batch_is_chosen_by_the_definitions(rows: list[Any]) -> None:
    chooser = sampler(SIZE)
    opened = [chooser.open(sampling, prompt, emitted) for _, sampling, prompt, emitted in rows]
    logits = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    before = logits.clone()
    for outcome, row in zip(chooser.choose(logits, opened), rows, strict=True):
        wanted = reference(*row)
        assert isinstance(outcome, OutputInvalid) if wanted is None else ids_of([outcome]) == [wanted]
    assert torch.equal(logits, before)


# --- against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "processors"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.3, top_k=7), [TemperatureLogitsWarper(1.3), TopKLogitsWarper(7)]),
        (Sampling(temperature=1.0, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Sampling(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (Sampling(temperature=1.0, repetition_penalty=1.7), [RepetitionPenaltyLogitsProcessor(1.7)]),
        (Sampling(temperature=1.0, repetition_penalty=0.6), [RepetitionPenaltyLogitsProcessor(0.6)]),
        (
            Sampling(temperature=1.5, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(1.5),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_draws_are_those_of_the_distribution_that_transformers_makes(sampling: Sampling, processors: list[Any]) -> None:
    torch.manual_seed(1)
    logits = torch.randn(300, 50, dtype=torch.float64) * 2
    prompt = [3, 4, 5, 5]
    history: list[int] = []
    chooser = sampler(50)
    row = chooser.open(sampling, prompt)
    for position, scores in enumerate(logits):
        wanted = LogitsProcessorList(processors)(torch.tensor([prompt + history]), scores[None].clone())[0].softmax(-1)
        expected = int((wanted.cumsum(-1) <= uniform(sampling.seed, position)).sum())
        (found,) = ids_of(chooser.choose(scores[None], [row]))
        assert found == expected
        history.append(found)


# --- by frequency ----------------------------------------------------------------------------------------------------


def chi_square(counts: Counter[int], wanted: dict[int, float]) -> float:
    total = sum(counts.values())
    assert set(counts) <= set(wanted)
    return sum((counts[token_id] - total * share) ** 2 / (total * share) for token_id, share in wanted.items())


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(temperature=1.0), {0: 0.05, 1: 0.1, 2: 0.15, 3: 0.3, 4: 0.4}),
        (Sampling(temperature=0.5), {0: 0.0025, 1: 0.01, 2: 0.0225, 3: 0.09, 4: 0.16}),
        (Sampling(temperature=1.0, top_k=3), {2: 0.15, 3: 0.3, 4: 0.4}),
        (Sampling(temperature=1.0, top_p=0.71), {2: 0.15, 3: 0.3, 4: 0.4}),
        (Sampling(temperature=1.0, top_p=0.69), {3: 0.3, 4: 0.4}),
        (Sampling(temperature=1.0, min_p=0.3), {2: 0.15, 3: 0.3, 4: 0.4}),
        (Sampling(temperature=1.0, logit_bias={0: math.log(4)}), {0: 0.2, 1: 0.1, 2: 0.15, 3: 0.3, 4: 0.4}),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, wanted: dict[int, float]) -> None:
    chooser = sampler(5)
    logits = torch.tensor([0.05, 0.1, 0.15, 0.3, 0.4]).log().expand(100, 5)
    rows = [chooser.open(Sampling(**_fields(sampling) | {"seed": seed}), []) for seed in range(100)]
    counts = Counter(found for _ in range(100) for found in ids_of(chooser.choose(logits, rows)))
    whole = sum(wanted.values())
    # 18.5 is the 99.9th percentile for four degrees of freedom; seeds are fixed.
    assert chi_square(counts, {token_id: share / whole for token_id, share in wanted.items()}) < 18.5


def _fields(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def test_the_choices_of_one_prompt_draw_independently() -> None:
    chooser = sampler(4)
    rows = [chooser.open(Sampling(temperature=1.0, seed=5), [], choice=choice) for choice in range(16)]
    answers = list(zip(*(ids_of(chooser.choose(torch.zeros(16, 4), rows)) for _ in range(64)), strict=True))
    assert len(set(answers)) == 16
    pairs = Counter(
        4 * one + other for first in range(15) for one, other in zip(*answers[first : first + 2], strict=True)
    )
    assert chi_square(pairs, dict.fromkeys(range(16), 1 / 16)) < 37.7  # 99.9th percentile for fifteen degrees


# --- resumed ---------------------------------------------------------------------------------------------------------


def logits_after(ids: Sequence[int], size: int = 40) -> torch.Tensor:
    """A model: logits that depend on all ids so far."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**31)
    return torch.randn(size, generator=generator) * 3


def answer(chooser: Sampler, row: Row, ids: list[int], length: int) -> list[int]:
    while len(ids) < length:
        ids = ids + ids_of(chooser.choose(logits_after(ids)[None], [row]))
    return ids


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.9, seed=3),
        Sampling(repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.4),
        Sampling(
            temperature=1.2, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.1, frequency_penalty=1.0, seed=9
        ),
        Sampling(temperature=2.0, min_tokens=15, logit_bias={0: 20.0, 7: -5.0}, seed=-4),
    ],
)
def test_an_answer_resumed_at_any_position_goes_on_with_the_same_ids(sampling: Sampling) -> None:
    chooser = sampler(40)
    prompt = [1, 2, 3, 2]
    whole = answer(chooser, chooser.open(sampling, prompt), [], 25)
    for cut in range(25):
        assert answer(chooser, chooser.open(sampling, prompt, whole[:cut]), whole[:cut], 25) == whole


def test_a_row_does_not_depend_on_its_company() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.3, seed=12)
    chooser = sampler(40)
    alone = answer(chooser, chooser.open(sampling, [5]), [], 20)
    others = [
        Sampling(),
        Sampling(temperature=0.3, top_k=5),
        Sampling(presence_penalty=2.0, logprobs=2),
        Sampling(logit_bias={3: 4.0}),
    ]
    rows = [chooser.open(other, [9]) for other in others]
    row, ids = chooser.open(sampling, [5]), list[int]()
    for step in range(20):
        company = rows[: step % 5]
        logits = torch.stack([logits_after([step, n]) for n in range(len(company))] + [logits_after(ids)])
        ids.append(ids_of(chooser.choose(logits, [*company, row]))[-1])
    assert ids == alone


def test_a_closed_row_leaves_no_counts_to_the_next_one() -> None:
    chooser = sampler(4)
    penalised = Sampling(repetition_penalty=10.0, frequency_penalty=2.0)
    first = chooser.open(penalised, [3], [3, 3])
    assert ids_of(chooser.choose(torch.tensor([[0.0, 0.5, 0.0, 1.0]]), [first])) == [1]
    chooser.close(first)
    chooser.close(first)
    rows = [chooser.open(penalised, [0]) for _ in range(9)]
    assert len({row.slot for row in rows}) == 9
    assert ids_of(chooser.choose(torch.tensor([[0.0, 0.5, 0.0, 1.0]]).expand(9, 4), rows)) == [3] * 9


# --- ends, ids, rows that cannot go on -------------------------------------------------------------------------------


def test_no_end_is_chosen_before_min_tokens() -> None:
    logits = [[9.0, 8.0, 7.0, 6.0]]
    chooser = sampler(4)
    row = chooser.open(Sampling(min_tokens=3, stop_token_ids=(1,)), [])
    assert [ids_of(chooser.choose(torch.tensor(logits), [row]))[0] for _ in range(5)] == [2, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("sampling", "param"),
    [(Sampling(logit_bias={4: 1.0}), "logit_bias"), (Sampling(stop_token_ids=(4,)), "stop_token_ids")],
)
def test_ids_that_the_vocabulary_does_not_have_are_refused(sampling: Sampling, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampler(4).open(sampling, [])
    assert caught.value.param == param


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.5, top_k=2, frequency_penalty=1.0)])
@pytest.mark.parametrize("broken", [[float("nan"), 1.0, 2.0], [INFINITY, 1.0, 2.0], [-INFINITY] * 3])
def test_a_broken_row_fails_alone(sampling: Sampling, broken: list[float]) -> None:
    chooser = sampler(3)
    rows = [chooser.open(sampling, []) for _ in range(3)]
    outcomes = chooser.choose(torch.tensor([[0.0, 90.0, 0.0], broken, [0.0, 0.0, 90.0]]), rows)
    assert isinstance(outcomes[1], OutputInvalid)
    assert ids_of([outcomes[0], outcomes[2]]) == [1, 2]
    assert [row.position for row in rows] == [1, 0, 1]


def test_no_rows_are_no_choices() -> None:
    assert sampler(3).choose(torch.zeros(0, 3), []) == []


def test_a_token_that_is_ruled_out_is_never_taken() -> None:
    chooser = sampler(5)
    rows = [chooser.open(Sampling(temperature=50.0, seed=seed), []) for seed in range(500)]
    logits = torch.tensor([-INFINITY, 0.0, -INFINITY, 0.0, -INFINITY]).expand(500, 5)
    assert set(ids_of(chooser.choose(logits, rows))) == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_extreme_temperatures_neither_overflow_nor_fail(temperature: float) -> None:
    found = {choose_one([1.0, 2.0, 3.0], Sampling(temperature=temperature, seed=seed)) for seed in range(50)}
    assert found == ({0, 1, 2} if temperature > 1 else {2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_may_be_of_any_type(dtype: torch.dtype) -> None:
    chooser = sampler(3)
    rows = [chooser.open(Sampling(), []), chooser.open(Sampling(temperature=0.01, repetition_penalty=2.0), [1])]
    assert ids_of(chooser.choose(torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.5, 0.0]], dtype=dtype), rows)) == [2, 0]


def test_a_rounding_error_that_swaps_two_likely_tokens_does_not_change_the_choice() -> None:
    for seed in range(500):
        sampling = Sampling(temperature=1.0, seed=seed)
        assert choose_one([1.0, 1.0, 0.5], sampling) == choose_one([1.0, 1.0 + 1e-7, 0.5], sampling)


@pytest.mark.parametrize(("spread", "least", "most"), [(3.0, 0, 32), (1.5, 32, 4), (0.001, 4, 1), (0.0, 4, 1)])
def test_top_p_over_a_large_vocabulary_keeps_what_a_whole_sort_keeps(spread: float, least: int, most: int) -> None:
    size = 6000
    torch.manual_seed(4)
    logits = torch.randn(1, size, dtype=torch.float64) * spread
    probabilities = logits[0].softmax(-1)
    ordered = probabilities.sort(descending=True).values
    kept = int((ordered.cumsum(-1) - ordered < 0.7).sum())
    assert (size // least if least else 0) < kept < size // most
    chooser = sampler(size)
    rows = [chooser.open(Sampling(temperature=1.0, top_p=0.7, seed=seed), []) for seed in range(60)]
    for row, token_id in zip(rows, ids_of(chooser.choose(logits.expand(60, size), rows)), strict=True):
        assert probabilities[token_id] >= ordered[kept - 1]
        allowed = probabilities.where(probabilities >= ordered[kept - 1], 0.0)
        cumulated = allowed.cumsum(-1)
        assert token_id == int((cumulated <= uniform(row.sampling.seed, 0) * cumulated[-1]).sum())


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_the_models_own_whatever_the_choice() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 12)
    wanted = logits.double().log_softmax(-1)
    chooser = sampler(12)
    rows = [
        chooser.open(sampling, [1], [2])
        for sampling in (
            Sampling(logprobs=0),
            Sampling(),
            Sampling(logprobs=5, temperature=1.0, top_k=2, seed=1),
            Sampling(logprobs=20, logit_bias={7: 100.0}),
        )
    ]
    outcomes = chooser.choose(logits, rows)
    ids = ids_of(outcomes)
    told = [outcome.logprobs for outcome in outcomes if isinstance(outcome, Choice)]
    assert told[1] is None
    for place, count in ((0, 0), (2, 5), (3, 12)):
        found = told[place]
        assert isinstance(found, TokenLogprobs)
        assert found.logprob == pytest.approx(float(wanted[place, ids[place]]), abs=1e-9)
        assert [token_id for token_id, _ in found.top] == wanted[place].argsort(descending=True)[:count].tolist()
        assert [value for _, value in found.top] == pytest.approx(
            wanted[place].sort(descending=True).values[:count].tolist()
        )
    assert ids[3] == 7


def test_a_token_that_the_model_rules_out_has_a_finite_log_probability() -> None:
    chooser = sampler(2)
    (outcome,) = chooser.choose(torch.tensor([[-INFINITY, 0.0]]), [chooser.open(Sampling(logprobs=2), [])])
    assert outcome == Choice(1, TokenLogprobs(0.0, ((1, 0.0), (0, LEAST_LOGPROB))))


@given(rows=st.integers(1, 3), num_ids=st.integers(1, 3000), seed=st.integers(0, 1 << 30), steps=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_the_likeliest_id_is_the_first_of_the_greatest_however_it_is_looked_for(
    rows: int, num_ids: int, seed: int, steps: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randint(-steps, steps + 1, (rows, num_ids), generator=chance).float()
    logits[0, seed % num_ids] = [float("-inf"), float("inf"), float("nan"), 0.0][seed % 4]
    # Enough rows for blocks, which few logits are not worth.
    many = logits.repeat(1 + (1 << 17) // logits.numel(), 1)
    peaks, ids = sampling._likeliest(many)
    for row, peak, found in zip(many[:rows], peaks, ids, strict=False):
        if row.isnan().any():
            assert peak.isnan()
        else:
            assert peak == row.max()
            assert found == (row == row.max()).nonzero()[0, 0]
