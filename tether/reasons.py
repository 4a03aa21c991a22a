"""Why workers take no job: each one's reason, how many have which, and the same in words. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Literal, get_args

import msgspec

Reason = Literal[
    "no_such_model",
    "no_such_version",
    "no_embeddings",
    "draining",
    "paused",
    "loading",
    "full",
    "too_little_memory",
    "failed_before",
]
"""Why a worker cannot take a job now."""

MAX_DETAILS = 3
"""Of one reason, that are said in a sentence; a fleet may have many."""


class Rejection(msgspec.Struct, frozen=True):
    """A worker that cannot take a job, and why."""

    worker_id: str
    reason: Reason
    detail: str = ""
    """What the reason leaves open, for people: why it has paused, who drains it."""


def count(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Return how many workers there are for every reason that there is."""
    found = Counter(each.reason for each in rejections)
    return {reason: found[reason] for reason in get_args(Reason)}


def told(rejections: Collection[Rejection], always: Collection[Reason] = ()) -> str:
    """Return the same for people: `draining 1 (by an operator), paused 3 (on battery 2, outside 20:00-08:00 1)`.

    A reason that nobody has is left out, unless it is `always` said.
    """
    return ", ".join(
        f"{reason.replace('_', ' ')} {number}{_details(reason, number, rejections)}"
        for reason, number in count(rejections).items()
        if number or reason in always
    )


def _details(reason: str, number: int, rejections: Iterable[Rejection]) -> str:
    found = Counter(each.detail for each in rejections if each.reason == reason and each.detail)
    if not found:
        return ""
    (detail, frequency), *others = found.most_common()
    if frequency == number:
        return f" ({detail})"
    said = [f"{each} {times}" for each, times in [(detail, frequency), *others][:MAX_DETAILS]]
    left_out = sum(times for _, times in others[MAX_DETAILS - 1 :])
    return f" ({', '.join([*said, f'others {left_out}'] if left_out else said)})"
