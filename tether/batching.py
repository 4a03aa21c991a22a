"""Which sequences take part in the next step, and with how many tokens: policy alone, without torch and without time.

A sequence has tokens that are known (its prompt, and what was generated) and a number of them that the cache already
holds. With one token missing it decodes; with more it is read, a chunk a step, so that a long prompt never delays the
others' tokens by more than a chunk. Everyone is served in the order of arrival. When the cache cannot hold all, the
youngest is put back: it keeps its tokens, waits at the front, and is read again when there is room.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

BLOCK_TOKENS = 8
"""Lengths in the cache are multiples of this: views change once a block, not once a token, and an accelerator's attention
wants its mask aligned."""
MIN_SHARE_TOKENS = 32
"""A prompt's part of a shared chunk is not cut finer: below it a step costs as much as a token."""


class Schedulable(Protocol):
    """What the policy needs to know of a sequence."""

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt, emitted and generated."""

    @property
    def num_computed(self) -> int:
        """Of these, the first ones that the cache holds; less than `num_tokens`."""

    @property
    def leader(self) -> Self | None:
        """Another sequence with the same prompt, which is read first so that this one can share it."""


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True)
class Limits:
    """What a batch may take."""

    slots: int
    """Sequences at once."""
    kv_tokens: int
    """Tokens in the cache: the number of sequences times the longest one's length, since each has a row as long."""
    chunk_tokens: int = 128
    """Prompt tokens read in one step while others decode."""
    idle_chunk_tokens: int = 2048
    """Prompt tokens read in one step while nobody decodes."""
    max_waiting: int = 8
    """Sequences kept beyond the slots; one more is refused."""


@dataclass(frozen=True)
class Plan(Generic[S]):
    """One step: who decodes a token, and whose prompts are read, each by at most `width` tokens."""

    decode: tuple[S, ...]
    prefill: tuple[S, ...]
    width: int

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


def round_up(tokens: int) -> int:
    """Return a length as the cache has it: whole blocks."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class Batch(Generic[S]):
    """The sequences that run, oldest first, and those that wait, in order."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: list[S] = []
        self.waiting: deque[S] = deque()
        self._kv_tokens = limits.kv_tokens

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    @property
    def num_free_kv_tokens(self) -> int:
        """Room in the cache beside the running sequences."""
        return max(0, self._kv_tokens - self._need(0))

    def can_take(self, num_sequences: int) -> bool:
        """Whether that many more may wait; False is for whoever is pushing."""
        return len(self.running) + len(self.waiting) + num_sequences <= self.limits.slots + self.limits.max_waiting

    def add(self, sequence: S) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def can_admit(self) -> bool:
        """Whether the one that has waited longest can join now: a slot, room for its tokens, and its leader read.

        A sequence that is alone may always try, or it would wait for ever.
        """
        if not self.waiting or len(self.running) >= self.limits.slots:
            return False
        head = self.waiting[0]
        if head.leader is not None and head.leader in self.running and _num_missing(head.leader) > 1:
            return False
        return not self.running or self._need(1, head.num_tokens) <= self._kv_tokens

    def admit(self) -> S:
        """Let the one that has waited longest join; ask `can_admit` first."""
        sequence = self.waiting.popleft()
        self.running.append(sequence)
        return sequence

    def is_crowded(self) -> bool:
        """Whether the next step needs more room than there is, and somebody can be put back for it."""
        return len(self.running) > 1 and self._need(0) > self._kv_tokens

    def put_back(self) -> S:
        """Return the youngest running sequence to the front of those that wait."""
        sequence = self.running.pop()
        self.waiting.appendleft(sequence)
        return sequence

    def shrink(self) -> None:
        """Count on less than what runs now: the memory was not there. Forgotten when the batch is empty."""
        self._kv_tokens = min(self._kv_tokens, self._need(0) - 1)

    def remove(self, sequence: S) -> None:
        """Forget a sequence, running or waiting: it ended, or was cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if not self.running:
            self._kv_tokens = self.limits.kv_tokens

    def step(self) -> Plan[S]:
        """Return what to run next: every sequence that decodes, and the oldest prompts within the token budget.

        The budget bounds sequences times width, which is what a padded forward pass costs; the oldest `budget //
        MIN_SHARE_TOKENS` prompts share it evenly, so that a short one behind a long one is not held up.
        """
        decode: list[S] = []
        reading: list[S] = []
        for sequence in self.running:
            (decode if sequence.num_tokens - sequence.num_computed == 1 else reading).append(sequence)
        if not reading:
            return Plan(tuple(decode), (), 0)
        budget = self.limits.chunk_tokens if decode else self.limits.idle_chunk_tokens
        chosen = reading[: max(1, budget // MIN_SHARE_TOKENS)]
        width = min(max(_num_missing(sequence) for sequence in chosen), max(1, budget // len(chosen)))
        return Plan(tuple(decode), tuple(chosen), width)

    def _need(self, num_more: int, length: int = 0) -> int:
        longest = max((sequence.num_tokens for sequence in self.running), default=0)
        return (len(self.running) + num_more) * round_up(max(longest, length) + 1)


def _num_missing(sequence: Schedulable) -> int:
    return sequence.num_tokens - sequence.num_computed
