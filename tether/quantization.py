"""Weights in 8 or 4 bits on a processor: a loaded model's linear layers replaced, everything else left as it is.

Reading the weights is what a token costs on a processor, so fewer bytes are more tokens (docs/decisions/0006 has the
figures). Embeddings, norms, attention and cache stay in the model's own type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

GROUP_SIZE = 32
"""In 4 bits this many weights of a row share a scale and an offset."""
SMALLEST_SIDE = 32
"""A layer with fewer inputs or outputs is a router or a gate: nothing is gained there and much can be lost."""


class Int8Linear(nn.Module):
    """A linear layer in integers: a scale for each output, and a scale for each row of the input, found as it comes.

    The sums are of integers and therefore exact: a row's result is the same whatever other rows are with it. Error
    against float32: about 1 % of the output's norm for normally distributed weights and inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        top = _largest_int8()
        wide = weight.detach().float()
        scale = wide.abs().amax(dim=1).clamp_(min=torch.finfo(torch.float32).tiny).div_(top)
        self.out_features, self.in_features = wide.shape
        self.weight = nn.Parameter((wide / scale[:, None]).round_().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`, of the inputs' type, for inputs of shape (…, in_features)."""
        rows = inputs.reshape(-1, self.in_features).float()
        row_scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).mul_(1 / 127)
        whole = (rows / row_scale).round_().to(torch.int8)
        # Not-a-number in a row is lost in `whole` and comes back with its scale.
        out = torch._int_mm(whole, self.weight.t()) * row_scale  # noqa: SLF001 - what torchao calls for the same
        out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        return out.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, a scale and an offset for each group of a row; inputs are rounded to bfloat16."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        wide = weight.detach().float()
        self.out_features, self.in_features = wide.shape
        groups = wide.view(self.out_features, -1, GROUP_SIZE)
        low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
        # Rounded as they will be used, so that the numbers below are the best for the scale that is kept.
        scale = ((high - low) / 15).clamp_(min=1e-8).bfloat16().float()
        # The kernel computes (number - 8) * scale + offset.
        offset = (low + 8 * scale).bfloat16().float()
        numbers = ((groups - offset) / scale + 8).round_().clamp_(0, 15).to(torch.int32).view_as(wide)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)  # noqa: SLF001 - no public name
        self.weight = nn.Parameter(packed, requires_grad=False)
        scales = torch.cat([scale, offset], dim=2).transpose(0, 1).contiguous().bfloat16()
        self.scale = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return `inputs @ weight.T + bias`, of the inputs' type, for inputs of shape (…, in_features)."""
        rows = inputs.reshape(-1, self.in_features).bfloat16()
        out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP_SIZE, self.scale)  # noqa: SLF001
        if self.bias is not None:
            out = out + self.bias
        return out.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


def quantize(model: nn.Module, dtype: str, on_progress: Callable[[float], None] = lambda _: None) -> int:
    """Replace the model's linear layers by ones in `dtype`, `int8` or `int4`; return how many weights that were.

    One layer at a time, each old one given up before the next, so that memory never holds the model twice. A layer whose
    shape 4 bits do not fit is kept in 8. `on_progress` is told the share of the layers that are done.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | Conv1D) and min(child.weight.shape) >= SMALLEST_SIDE
    ]
    num_weights = 0
    for number, (parent, name, layer) in enumerate(places, 1):
        weight: Any = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        fits = weight.shape[1] % GROUP_SIZE == 0 and weight.shape[0] % 16 == 0
        kind = Int4Linear if dtype == "int4" and fits else Int8Linear
        setattr(parent, name, kind(weight, layer.bias))
        places[number - 1] = (parent, name, nn.Identity())
        num_weights += weight.numel()
        del layer, weight
        on_progress(number / len(places))
    return num_weights


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of the model were replaced: their rounding makes much of a last digit that differs."""
    return any(isinstance(module, Int8Linear | Int4Linear) for module in model.modules())


def _largest_int8() -> int:
    """Return the largest number that a weight becomes.

    Without VNNI instructions the products are summed in pairs in 16 bits, which 127 can overflow and 63 cannot (oneDNN's
    "Nuances of int8 computations").
    """
    if torch.backends.cpu.get_cpu_capability().startswith("AVX") and not torch.cpu._is_vnni_supported():  # noqa: SLF001
        return 63
    return 127
