"""Recorded passes: the same logits to the bit as the model's own, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.integration.test_runtime_families import CONTEXT, FAMILIES, PROMPT, load, make_model, run, save_tokenizer
from tether.engine import Engine
from tether.forward import BatchRunner
from tether.kvcache import Window, _zeros
from tether.lanes import Lanes
from tether.recording import Masks, Pass
from tether.records import Sampling
from tether.runtime_messages import Generate


def runner_of(engine: Engine) -> BatchRunner:
    assert isinstance(engine.runner, BatchRunner)
    return engine.runner


def is_recorded(engine: Engine) -> bool:
    return set(runner_of(engine)._recorded) == {True, False}


def jobs() -> list[Generate]:
    """Of all lengths, so that some join while others decode, and rows are padded."""
    return [
        Generate(str(place), PROMPT[: 5 + 13 * place], Sampling(max_tokens=3 + 5 * place, ignore_eos=True), raw=True)
        for place in range(6)
    ]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "granite-mamba"])
def test_a_recorded_pass_gives_the_models_own_logits_to_the_bit(tmp_path: Path, family: str) -> None:
    engine = load(make_model(family, tmp_path))
    runner = runner_of(engine)
    assert is_recorded(engine)
    shapes = set()

    def checked(recorded: Pass) -> Pass:
        def both(ids: torch.Tensor, positions: torch.Tensor, masks: Masks, window: Window) -> torch.Tensor:
            logits = recorded(ids, positions, masks, window)
            assert torch.equal(logits, runner._plain(ids, positions, masks, window))
            shapes.add(tuple(ids.shape))
            return logits

        return both

    runner._recorded = {way: checked(recorded) for way, recorded in runner._recorded.items()}
    run(engine, *jobs())
    assert len(shapes) > 5


def test_a_pass_that_depends_on_its_numbers_is_not_recorded_and_runs_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(3)
    # "dynamic" asks how long the longest sequence is and takes other angles beyond what the model was trained on.
    config = LlamaConfig(
        vocab_size=save_tokenizer(tmp_path), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=CONTEXT, initializer_range=0.5, bos_token_id=0, eos_token_id=0,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    engine = load(tmp_path)
    assert not runner_of(engine)._recorded
    request = Generate("one", PROMPT, Sampling(max_tokens=8, ignore_eos=True), raw=True)
    prompt = engine.prompt_ids(request)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert run(engine, request).ids("one") == expected[0, len(prompt) :].tolist()


def test_a_batch_that_is_divided_over_threads_answers_as_an_undivided_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama3", tmp_path)
    requests = [
        Generate(
            str(place), PROMPT[: 5 + 7 * place], Sampling(3 + 4 * place, 0.8 * (place % 2), seed=place, ignore_eos=True),
            raw=True,
        )
        for place in range(9)
    ]  # fmt: skip
    whole, divided = load(folder, slots=6), load(folder, slots=6)
    sizes = []
    lanes = Lanes(3)
    run_parts = lanes.run

    def run_and_count(parts: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        sizes.append(len(parts))
        return run_parts(parts)

    monkeypatch.setattr(lanes, "run", run_and_count)
    monkeypatch.setattr("tether.lanes.LANE_ROWS", 1)
    monkeypatch.setattr("tether.lanes.LANE_TOKENS", 1)
    runner_of(divided)._lanes = lanes
    expected, found = run(whole, *requests), run(divided, *requests)
    for request in requests:
        assert found.ids(request.id) == expected.ids(request.id)
        assert found.text(request.id) == expected.text(request.id)
    assert set(sizes) == {1, 2, 3}


def test_a_part_that_fails_ends_its_jobs_and_the_next_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(make_model("tinyllama", tmp_path), slots=6)
    expected = run(engine, *jobs())
    runner = runner_of(engine)
    runner._lanes = Lanes(2)
    monkeypatch.setattr("tether.lanes.LANE_ROWS", 1)
    recorded, calls = runner._recorded[True], []

    def fail_once(ids: torch.Tensor, positions: torch.Tensor, masks: Masks, window: Window) -> torch.Tensor:
        calls.append(window.first)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return recorded(ids, positions, masks, window)

    monkeypatch.setitem(runner._recorded, True, fail_once)
    ends = run(engine, *jobs()).ends
    assert any(end.error is not None for end in ends.values())
    again = run(engine, *jobs())
    assert all(again.ids(request.id) == expected.ids(request.id) for request in jobs())


def test_a_model_with_recurrent_layers_is_not_recorded(tmp_path: Path) -> None:
    assert not runner_of(load(make_model("granite-mamba", tmp_path)))._recorded


def test_rows_that_are_long_from_the_start_are_never_copied_for_a_longer_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(make_model("tinyllama", tmp_path))
    cache = runner_of(engine).cache

    def refuse(*_: object) -> None:
        raise AssertionError("rows were copied")

    monkeypatch.setattr(cache, "resize", refuse)
    answers = run(engine, *jobs(), Generate("long", 4 * PROMPT, Sampling(max_tokens=2), raw=True))
    assert all(end.error is None or end.error.code == "context_length_exceeded" for end in answers.ends.values())
    assert answers.ends["5"].error is None


def test_a_processors_rows_take_no_memory_before_they_are_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = _zeros((64, 16, 4096, 128), torch.empty(0))
    assert zeros.nbytes == 2 << 30
    assert not zeros[63, 15, 4095].any()
    zeros[:8, :, :16] = 1
    assert process.memory_info().rss - before < 64 << 20
