"""A model's forward pass, recorded once and run without Python: TorchScript of the unmodified model on this cache.

A small model's pass on a processor is mostly Python: a recorded one takes between a third and three quarters of the time, with
the same kernels in the same order, so with the same logits to the bit. What Python would have decided is recorded as it was
decided: a pass whose decisions depend on its numbers cannot be recorded, torch says so, and it stays as it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tether.kvcache import KvCache, Window

log = logging.getLogger(__name__)

Masks = dict[str, torch.Tensor]
"""The additive mask of each kind of layer, (rows, 1, tokens, seen)."""
Pass = Callable[[torch.Tensor, torch.Tensor, Masks, Window], torch.Tensor]
"""Ids and positions, both (rows, tokens), masks and a window of the cache, to the last logits, (rows, vocabulary)."""


HARMLESS = "sdpa_attention.py"
"""Where transformers asks for a number of tokens only to tell whether a mask that we always give can be left out."""


class NotRecordable(ValueError):
    """This model's pass takes decisions that a recording would not take again."""


def plain(model: Any, cache: KvCache, options: dict[str, Any]) -> Pass:
    """Return the pass as the model has it."""

    def run(ids: torch.Tensor, positions: torch.Tensor, masks: Masks, window: Window) -> torch.Tensor:
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        with cache.through(window):
            out = model(input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, **options)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    return run


def record(run: Pass, ids: torch.Tensor, positions: torch.Tensor, masks: Masks, window: Window) -> Pass:
    """Return a pass as a recording of this one; later ones may differ in every size, and run side by side.

    Raises `NotRecordable`.
    """
    whole = _Whole(run, tuple(masks), window).eval()
    inputs = (ids, positions, tuple(masks.values()), window.places, window.views)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", torch.jit.TracerWarning)  # type: ignore[attr-defined] # public, by a star import
        try:
            # TorchScript is finished rather than developed, but torch's compiler wants a C++ compiler on the user's machine.
            script = torch.jit.freeze(torch.jit.trace(whole, inputs, check_trace=False))  # type: ignore[no-untyped-call]
        except RuntimeError as exc:
            raise NotRecordable(_first_line(exc)) from exc
    for warning in found:
        if not warning.filename.endswith(HARMLESS):
            raise NotRecordable(f"{_first_line(warning.message)} ({warning.filename}:{warning.lineno})")

    def replay(ids: torch.Tensor, positions: torch.Tensor, masks: Masks, window: Window) -> torch.Tensor:
        logits: torch.Tensor = script(ids, positions, tuple(masks.values()), window.places, window.views)
        return logits

    return replay


class _Whole(nn.Module):
    """A pass with all that it reads and writes as arguments."""

    def __init__(self, run: Pass, kinds: tuple[str, ...], window: Window) -> None:
        super().__init__()
        self._run = run
        self._kinds = kinds
        self._window = window

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: tuple[torch.Tensor, ...],
        places: tuple[torch.Tensor, ...],
        views: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Return the last logits, (rows, vocabulary)."""
        return self._run(ids, positions, dict(zip(self._kinds, masks, strict=True)), self._window.given(places, views))


def _first_line(message: object) -> str:
    return str(message).strip().partition("\n")[0][:200]
