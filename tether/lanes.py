"""Lanes: a few threads that compute the parts of a pass side by side; without torch.

A tiny model's kernels are too short to be divided over cores one by one: waiting for each other at each of them costs more than it
saves, and on cores that others use too it costs a hundred times as much. Parts of a whole pass wait once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LANE_ROWS = 8
"""A pass over fewer rows gains nothing from being divided further."""
LANE_TOKENS = 64
"""A prompt's part of fewer tokens neither."""


class Lanes:
    """So many threads, the caller's own among them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._others = ThreadPoolExecutor(count - 1, thread_name_prefix="lane") if count > 1 else None

    def num_parts(self, num_rows: int, num_tokens: int) -> int:
        """Return into how many parts a pass over rows that have so many new tokens each is divided."""
        if num_tokens > 1:
            return max(1, min(self.count, num_rows, num_rows * num_tokens // LANE_TOKENS))
        return max(1, min(self.count, num_rows // LANE_ROWS))

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """Run the parts side by side, at least one, and return what each returns; raise what one of them raises, when all are over."""
        first, *rest = parts
        if self._others is None or not rest:
            return [part() for part in parts]
        futures = [self._others.submit(part) for part in rest]
        try:
            found = first()
        finally:
            for future in futures:
                future.exception()
        return [found, *(future.result() for future in futures)]


def divided(items: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Return the items in parts of nearly the same size, in their order."""
    size, longer = divmod(len(items), num_parts)
    ends = [size * (place + 1) + min(place + 1, longer) for place in range(num_parts)]
    return [items[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
