"""From logits to token ids, for all rows of a step at once: bias, penalties, temperature, truncation, the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tether.errors import OutputInvalid
from tether.guided import Guide
from tether.records import Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Choice:
    """What came out for one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    """Where the row's sampling asks for them."""


class Row:
    """What the sampler keeps of one sequence from `Sampler.open` to `Sampler.close`; its fields are the sampler's."""


class Sampler:
    """Chooses the next token of every sequence in a batch.

    Usage: `row = sampler.open(...)` when a sequence starts or resumes; each step `sampler.choose(logits, rows)`, which also
    takes the chosen ids in (counts, guide, position); `sampler.close(row)` when it leaves. Not thread-safe.
    """

    def __init__(self, num_vocabulary: int, device: torch.device, end_ids: frozenset[int]) -> None:
        """Make a sampler for logits of `num_vocabulary` columns on `device`; `end_ids` are the model's own."""
        raise NotImplementedError

    def open(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        emitted: Sequence[int] = (),
        *,
        choice: int = 0,
        guide: Guide | None = None,
    ) -> Row:
        """Return the state of a sequence whose answer so far is `emitted`; `choice` tells the `n` answers of a job apart.

        A guided sampling needs its new `guide`, which is advanced over `emitted` here. Raises `InvalidRequest` for ids
        that the vocabulary does not have and for emitted ids that the guide does not allow.
        """
        raise NotImplementedError

    def close(self, row: Row) -> None:
        """Give a row's memory back; closing twice does nothing."""
        raise NotImplementedError

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Choice | OutputInvalid]:
        """Choose the next id of each row, given the logits, of shape (len(rows), vocabulary), any float dtype.

        A row whose logits leave nothing to choose (NaN, infinity, all ruled out) or whose guide gave up has an error in its
        place, not raised: its sequence ends with it, and the other rows are not touched by it. `logits` is left as it is.
        One host synchronisation.
        """
        raise NotImplementedError
