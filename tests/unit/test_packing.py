"""Packed linear layers: torch's own results, and only where they are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tether import packing
from tether.packing import PackedLinear, num_parameters, pack, seconds_of

pytestmark = pytest.mark.skipif(not packing.is_available(), reason="torch has no oneDNN here")
Layers = Sequence[Callable[[torch.Tensor], torch.Tensor]]


@pytest.fixture
def always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "seconds_of", lambda layers, *_: [1.0 / (place + 1) for place in range(len(layers))])


class Tied(nn.Module):
    middle: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 256)
        self.middle = nn.Linear(256, 256)
        self.small = nn.Linear(256, 8)
        self.last = nn.Linear(256, 512, bias=False)
        self.last.weight = self.embedding.weight


@pytest.mark.parametrize("rows", [1, 2, 8, 31, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_gives_what_torchs_own_gives(rows: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(257, 311, bias=bias).to(dtype)
    inputs = torch.randn(rows, 3, 257).to(dtype)
    with torch.inference_mode():
        found, expected = PackedLinear(layer.weight, layer.bias)(inputs), layer(inputs)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_layers_are_packed_but_not_small_ones_nor_those_that_share_their_weights(always_faster: None) -> None:
    model = Tied()
    before = num_parameters(model)
    assert pack(model) == 256 * 256
    assert num_parameters(model) == before == 512 * 256 + 256 * 256 + 256 + 256 * 8 + 8
    assert isinstance(model.middle, PackedLinear)
    assert type(model.small) is nn.Linear
    assert type(model.last) is nn.Linear
    assert model.last.weight is model.embedding.weight


def test_a_layer_of_gpt2_is_packed_the_right_way_round(always_faster: None) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Conv1D(512, 256))
    inputs = torch.randn(4, 256)
    with torch.inference_mode():
        expected = model(inputs)
        assert pack(model)
        assert torch.allclose(model(inputs), expected, atol=1e-5)


def test_a_layer_that_is_not_faster_packed_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "seconds_of", lambda *_: [1.0, 0.95])
    model = nn.Sequential(nn.Linear(256, 256))
    assert pack(model) == 0
    assert type(model[0]) is nn.Linear


def test_half_precision_that_onednn_does_not_multiply_stays_as_it_is(always_faster: None) -> None:
    assert pack(nn.Sequential(nn.Linear(256, 256).half())) == 0


def test_each_layer_has_its_seconds() -> None:
    assert all(0 < seconds < 10 for seconds in seconds_of([nn.Linear(8, 8), nn.Linear(8, 8)], 8, torch.float32))
