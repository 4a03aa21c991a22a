"""Answers that a JSON Schema or a regular expression describes: which token may come next; the only importer of llguidance.

A guide is a function of the ids so far, as all decoding is: a resumed answer advances a new guide over the emitted ids.
"""

from __future__ import annotations

from typing import Any

import torch

from tether.records import Sampling


class Guides:
    """A model's vocabulary, made ready once to guide any number of its answers."""

    def __init__(self, tokenizer: Any, num_vocabulary: int, end_ids: frozenset[int]) -> None:
        """Read a fast Hugging Face tokenizer (a second or so for 128,000 tokens: build it at the first guided job).

        `num_vocabulary` is the width of the model's logits; ids that the tokenizer does not have are never allowed.
        Raises `InvalidRequest` for a tokenizer that cannot guide.
        """
        raise NotImplementedError

    def compile(self, sampling: Sampling) -> Guide:
        """Return the guide of one answer; `sampling` has a schema or a regular expression.

        Takes milliseconds to, for the largest schemas, some tenths of a second. Raises `InvalidRequest`, naming
        `json_schema` or `regex`, for one that is not valid, that no grammar can express, or that is too large.
        """
        raise NotImplementedError


class Guide:
    """Where one answer stands in its grammar."""

    def fill_mask(self, mask: torch.Tensor) -> None:
        """Write which ids may come next: `mask` is int32 on the CPU, of shape (⌈vocabulary / 32⌉,), a bit for each id."""
        raise NotImplementedError

    def advance(self, token_id: int) -> None:
        """Take the next id of the answer; raises `InvalidRequest` (`emitted`) for one that may not come."""
        raise NotImplementedError
