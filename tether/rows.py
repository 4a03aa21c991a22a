"""Which row of the KV cache belongs to whom, and what ended sequences left there for others to reuse; without torch.

Rows that decode lie at the front and those that are read follow them, so that a forward pass works on a slice of the
cache. Behind an ended sequence its tokens are kept while there is room; a new sequence that begins with the same tokens
takes the row over, or copies the common part, and is read from there on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items
from typing import Any, Protocol

MIN_REUSED_TOKENS = 8
"""A common prefix below this is read again: less work than moving it."""


class RowOwner(Protocol):
    """What a row must know of the sequence that it belongs to."""

    row: int
    num_computed: int
    tokens: list[int]


class Memory(Protocol):
    """The tensors behind the rows."""

    def swap_rows(self, one: int, other: int, num_one: int, num_other: int) -> None:
        """Exchange two rows, of which so many tokens count."""

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first tokens of a row those of another."""

    def clear_row(self, row: int) -> None:
        """Make a row ready for a sequence that begins at its first token."""

    def reserve(self, num_rows: int) -> int:
        """Ask for that many rows in all; return how many there are now, perhaps fewer."""


class Rows:
    """Rows by number: each is owned, kept for reuse, or empty."""

    def __init__(self, memory: Memory, *, exact_only: bool = False) -> None:
        """`exact_only`: a row's state stands for all of its tokens and for no part of them (recurrent layers)."""
        self._memory = memory
        self._exact_only = exact_only
        self._owners: list[RowOwner | None] = []
        self._kept: list[list[int]] = []
        self._stamps: list[int] = []
        self._clock = itertools.count()

    @property
    def num_kept_tokens(self) -> int:
        """Tokens that wait for somebody who begins with them."""
        return sum(len(kept) for kept in self._kept)

    @property
    def num_owned(self) -> int:
        """Rows that belong to somebody."""
        return sum(owner is not None for owner in self._owners)

    @property
    def longest_owned(self) -> int:
        """The most tokens that an owned row holds."""
        return max((owner.num_computed for owner in self._owners if owner is not None), default=0)

    def take(self, owner: RowOwner) -> int:
        """Give the owner a row, and return how many of its tokens are there already: all but one at most."""
        source, num_common = self._best_match(owner.tokens)
        if source is not None and self._is_worth_taking(source, num_common):
            row = source
        else:
            row = self._find_free(avoid=source)
            if source is not None and source != row:
                self._memory.copy_row(source, row, num_common)
            elif source is None:
                self._memory.clear_row(row)
        self._owners[row], self._kept[row] = owner, []
        owner.row = row
        return num_common

    def release(self, owner: RowOwner, *, keep: bool) -> None:
        """Take the row back; with `keep`, what it holds may be reused."""
        row = owner.row
        self._owners[row] = None
        self._kept[row] = owner.tokens[: owner.num_computed] if keep else []
        self._stamps[row] = next(self._clock)
        owner.row = -1

    def arrange(self, decoding: Items[RowOwner], reading: Items[RowOwner]) -> bool:
        """Move rows until the decoding owners have the first ones and the reading ones those behind, in any order.

        Returns whether anything moved.
        """
        moved = self._gather(decoding, 0)
        return self._gather(reading, len(decoding)) or moved

    def compact(self) -> None:
        """Move all owned rows to the front."""
        self._gather([owner for owner in self._owners if owner is not None], 0)

    def limit(self, num_rows: int) -> None:
        """Forget rows from `num_rows` on; the memory has them no more. Owned ones must have been moved below."""
        del self._owners[num_rows:], self._kept[num_rows:], self._stamps[num_rows:]

    def forget(self) -> None:
        """Keep nothing of what ended sequences left."""
        self._kept = [[] for _ in self._kept]

    def _gather(self, owners: Items[RowOwner], first: int) -> bool:
        last = first + len(owners)
        outside = [owner for owner in owners if not first <= owner.row < last]
        if not outside:
            return False
        here = {owner.row for owner in owners}
        for owner, row in zip(outside, [row for row in range(first, last) if row not in here], strict=True):
            self._swap(owner.row, row)
        return True

    def _swap(self, one: int, other: int) -> None:
        self._memory.swap_rows(one, other, self._num_held(one), self._num_held(other))
        for column in (self._owners, self._kept, self._stamps):
            _exchange(column, one, other)
        for row in (one, other):
            if (owner := self._owners[row]) is not None:
                owner.row = row

    def _num_held(self, row: int) -> int:
        owner = self._owners[row]
        return len(self._kept[row]) if owner is None else owner.num_computed

    def _best_match(self, tokens: list[int]) -> tuple[int | None, int]:
        """Return the row with the longest usable common prefix, ended or live, and the prefix's length."""
        best, num_best = None, MIN_REUSED_TOKENS - 1
        # The last token is always computed: its logits are what the next one is chosen from.
        most = len(tokens) - 1
        for row, (owner, kept) in enumerate(zip(self._owners, self._kept, strict=True)):
            held = kept if owner is None else owner.tokens
            num_held = self._num_held(row)
            if num_held <= num_best or held[:1] != tokens[:1]:
                continue
            num_common = num_common_prefix(held, tokens, min(num_held, most))
            if self._exact_only and (num_common < num_held or owner is not None):
                continue
            if num_common > num_best:
                best, num_best = row, num_common
        return (None, 0) if best is None else (best, num_best)

    def _is_worth_taking(self, row: int, num_common: int) -> bool:
        """Whether to take a kept row over, and lose its other tokens, rather than copy the common part."""
        if self._owners[row] is not None:
            return False
        return self._exact_only or 2 * num_common >= len(self._kept[row])

    def _find_free(self, avoid: int | None) -> int:
        free = [row for row, owner in enumerate(self._owners) if owner is None]
        for row in free:
            if not self._kept[row]:
                return row
        num_rows = len(self._owners)
        num_now = self._memory.reserve(num_rows + 1)
        if num_now > num_rows:
            more = num_now - num_rows
            self._owners += [None] * more
            self._kept += [[] for _ in range(more)]
            self._stamps += [0] * more
            return num_rows
        candidates = [row for row in free if row != avoid] or free
        if not candidates:
            raise MemoryError("no row of the KV cache is free")
        row = min(candidates, key=self._stamps.__getitem__)
        self._kept[row] = []
        return row


def _exchange(column: list[Any], one: int, other: int) -> None:
    column[one], column[other] = column[other], column[one]


def num_common_prefix(one: list[int], other: list[int], most: int) -> int:
    """Return how many of the first `most` items are equal, by halving: comparing slices is fast, items one by one not."""
    if one[:most] == other[:most]:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
