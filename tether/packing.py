"""Linear layers whose weights lie in memory as oneDNN reads them: same numbers, same size, fewer seconds.

torch multiplies float32 on a processor with MKL, which on an AMD machine needs up to three times as long for a few rows as oneDNN on
weights that were put in order once (docs/decisions/0006 has the figures). torch's own compiler does the same when it freezes a
model; it is done here without a compiler.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

log = logging.getLogger(__name__)

SMALLEST_WEIGHTS = 1 << 16
"""A layer with fewer weights is over before the call is."""
ROWS_HINT = 32
"""How many rows the order of the weights is best for; the one for 32 is good for 1 and for 512 too."""
MEASURED_ROWS = (1, 8)
"""One sequence, and a small batch: both are what a processor is used for."""
CLEARLY_FASTER = 0.9
"""A packed layer must need less than this part of the time."""


class PackedLinear(nn.Module):
    """A linear layer with packed weights, in the type that it had; results differ from torch's own by rounding alone."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # An attribute and no parameter: nothing can be done with it but to multiply.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)  # noqa: SLF001 - what torch's compiler calls
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`, for inputs of shape (…, in_features)."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")  # noqa: SLF001
        return out


def is_available() -> bool:
    """Whether torch has oneDNN here."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.inference_mode()
def pack(model: nn.Module) -> int:
    """Replace those of the model's linear layers that are faster packed, shape by shape; return how many weights that were.

    Layers that share their weights with another, as a last one does with the embedding, stay: a copy would cost memory. Takes some
    50 ms for each shape, and one layer's memory at a time. A device other than a processor is left as it is.
    """
    if not is_available():
        return 0
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + 1
    is_faster: dict[tuple[torch.Size, torch.dtype], bool] = {}
    num_weights = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear | Conv1D) or not _fits(layer) or owners[layer.weight.data_ptr()] > 1:
                continue
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            packed = PackedLinear(weight, layer.bias)
            kind = (weight.shape, weight.dtype)
            if kind not in is_faster:
                plain, other = seconds_of([layer, packed], weight.shape[1], weight.dtype)
                is_faster[kind] = other < CLEARLY_FASTER * plain
                log.info("a layer of %s takes %.0f us, packed %.0f us", tuple(weight.shape), 1e6 * plain, 1e6 * other)
            if is_faster[kind]:
                setattr(parent, name, packed)
                num_weights += weight.numel()
            del layer, weight, packed
    return num_weights


def num_parameters(model: nn.Module) -> int:
    """Return how many parameters a model has, those that are packed included, which torch no longer counts."""
    packed: int = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, PackedLinear))
    return packed + sum(parameter.numel() for parameter in model.parameters())


def seconds_of(
    layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], num_inputs: int, dtype: torch.dtype
) -> list[float]:
    """Return the seconds that each layer takes for one row and a small batch together.

    The best of several runs, in turns, so that a busy moment counts for none.
    """
    inputs = [torch.ones(rows, num_inputs, dtype=dtype) for rows in MEASURED_ROWS]
    best = [[math.inf] * len(inputs) for _ in layers]
    for _ in range(6):
        for seconds, layer in zip(best, layers, strict=True):
            for place, rows in enumerate(inputs):
                began = time.perf_counter()
                layer(rows)
                seconds[place] = min(seconds[place], time.perf_counter() - began)
    return [sum(seconds) for seconds in best]


def _fits(layer: nn.Linear | Conv1D) -> bool:
    weight = layer.weight
    is_known = weight.dtype in {torch.float32, torch.bfloat16}
    return weight.device.type == "cpu" and is_known and weight.numel() >= SMALLEST_WEIGHTS
