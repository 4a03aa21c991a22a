"""Linear layers in few bits, and which type a model is loaded in; small tensors, no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tether import catalog, loading
from tether.catalog import ModelSpec, resolve
from tether.errors import ModelUnavailable
from tether.quantization import Int4Linear, Int8Linear, quantize

CPU = torch.device("cpu")


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


def big(folder: Path, num_parameters: int) -> ModelSpec:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSpec("big", "1.0", "folder", str(folder), num_parameters=num_parameters)


@pytest.mark.parametrize(("kind", "limit"), [(Int8Linear, 0.015), (Int4Linear, 0.09)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_a_layer_in_few_bits_is_near_the_exact_one(
    seeded: None, kind: type[Int8Linear | Int4Linear], limit: float, dtype: torch.dtype, has_bias: bool
) -> None:
    exact = nn.Linear(128, 96, bias=has_bias)
    inputs = torch.randn(2, 5, 128)
    small = kind(exact.weight, exact.bias)
    found = small(inputs.to(dtype))
    assert found.shape == (2, 5, 96)
    assert found.dtype == dtype
    assert relative_error(found.float(), exact(inputs)) < limit


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@torch.inference_mode()
def test_a_row_is_the_same_whatever_rows_are_with_it(seeded: None, kind: type[Int8Linear | Int4Linear]) -> None:
    layer = kind(torch.randn(96, 128), torch.randn(96))
    rows = torch.randn(33, 128) * torch.logspace(-3, 3, 33)[:, None]
    together = layer(rows)
    for number in range(33):
        assert torch.equal(layer(rows[number : number + 1])[0], together[number])


@torch.inference_mode()
def test_a_row_that_is_no_number_stays_one_and_harms_no_other(seeded: None) -> None:
    layer = Int8Linear(torch.randn(64, 64), None)
    rows = torch.randn(3, 64)
    clean = layer(rows)
    rows[1, 7] = torch.nan
    found = layer(rows)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@torch.inference_mode()
def test_a_row_of_zeros_gives_the_bias(seeded: None) -> None:
    bias = torch.randn(64)
    assert torch.equal(Int8Linear(torch.randn(64, 64), bias)(torch.zeros(1, 64))[0], bias)
    assert torch.equal(Int8Linear(torch.zeros(64, 64), bias)(torch.randn(1, 64))[0], bias)


@torch.inference_mode()
def test_quantizing_replaces_what_is_worth_it_and_tells_how_far_it_is(seeded: None) -> None:
    model = nn.ModuleDict({
        "wide": nn.Linear(64, 96),
        "odd": nn.Linear(50, 64),
        "router": nn.Linear(64, 4),
        "gpt2": Conv1D(96, 64),
        "words": nn.Embedding(10, 64),
    })  # fmt: skip
    inputs = torch.randn(3, 64)
    exact = model["gpt2"](inputs)
    told: list[float] = []
    assert quantize(model, "int4", told.append) == 64 * 96 + 50 * 64 + 64 * 96
    assert isinstance(model["wide"], Int4Linear)
    assert isinstance(model["odd"], Int8Linear), "50 inputs make no whole groups"
    assert isinstance(model["router"], nn.Linear)
    assert isinstance(model["words"], nn.Embedding)
    assert relative_error(model["gpt2"](inputs), exact) < 0.1
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_the_measured_type_is_taken_only_where_it_is_clearly_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = big(tmp_path, 1_000_000)
    for seconds, dtype in ((0.5, "bfloat16"), (0.9, "float32"), (2.0, "float32")):
        measured = {"float32": 1.0, "bfloat16": seconds}
        monkeypatch.setattr(loading, "measure_linear", lambda *_shape, found=measured: found)
        assert loading.choose_dtype(spec, tmp_path, CPU) == dtype


def test_float32_is_not_taken_where_the_memory_is_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = big(tmp_path, 1_000_000_000)
    monkeypatch.setattr(loading, "measure_linear", lambda *_shape: {"float32": 0.1, "bfloat16": 1.0})
    monkeypatch.setattr(catalog, "free_memory_bytes", lambda: 3_000_000_000)
    assert loading.choose_dtype(spec, tmp_path, CPU) == "bfloat16"
    monkeypatch.setattr(catalog, "free_memory_bytes", lambda: 5_000_000_000)
    assert loading.choose_dtype(spec, tmp_path, CPU) == "float32"


def test_nothing_is_measured_for_a_toy_an_accelerator_or_a_type_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_shape: int) -> dict[str, float]:
        raise AssertionError("measured")

    monkeypatch.setattr(loading, "measure_linear", refuse)
    spec = big(tmp_path, 1_000_000)
    assert loading.choose_dtype(resolve("demo"), tmp_path, CPU) == "float32"
    assert loading.choose_dtype(spec, tmp_path, torch.device("cuda")) == "float32"
    assert loading.choose_dtype(spec.with_dtype("int8"), tmp_path, CPU) == "int8"


def test_a_measurement_names_both_types() -> None:
    assert {dtype for dtype, seconds in loading.measure_linear(32, 64).items() if seconds > 0} == {
        "float32",
        "bfloat16",
    }


def test_few_bits_need_little_memory_and_are_for_a_processor() -> None:
    phi = resolve("phi-2")
    needs = [phi.with_dtype(dtype).memory_need_bytes or 0 for dtype in ("float32", "bfloat16", "int8", "int4")]
    assert needs == sorted(needs, reverse=True)
    assert phi.with_dtype("int8").compute_dtype == "bfloat16"
    with pytest.raises(ModelUnavailable, match="choose `--dtype bfloat16`"):
        loading.check_dtype(phi.with_dtype("int8"), torch.device("cuda"))
    with pytest.raises(ModelUnavailable, match="int8, int4"):
        phi.with_dtype("int2")


def test_an_unknown_device_is_refused_in_one_line() -> None:
    with pytest.raises(ModelUnavailable, match="has no device `tpu`"):
        loading.choose_device("tpu")
