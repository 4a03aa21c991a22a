"""From token ids to an answer: its text, where it ends, and the random numbers; without torch.

Everything here is a function of the ids so far (and of seed and position), never of when they came: a job that goes on
elsewhere with the ids already emitted replays them through the same machine, and tells not a character twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tether.errors import InvalidRequest
from tether.records import FinishReason, Sampling

MAX_STOP_STRINGS = 16

_MASK = (1 << 64) - 1
_INCOMPLETE = "\ufffd"


def check_sampling(sampling: Sampling) -> None:
    """Raise `InvalidRequest`, naming the parameter, for values that no model can follow."""
    if sampling.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", param="max_tokens")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest("temperature must be 0 or more", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be above 0 and at most 1", param="top_p")
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are allowed", param="stop")
    if not all(sampling.stop):
        raise InvalidRequest("a stop string must not be empty", param="stop")


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) for the token at `position` of an answer.

    Counter-based: splitmix64 (Steele, Lea, Flood 2014) of the seed and the position, so that it needs no state.
    """
    mixed = _splitmix64(_splitmix64(seed & _MASK) + position * 0x9E3779B97F4A7C15 & _MASK)
    return (mixed >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


class TextStream:
    """Token ids in, whole characters out; `decode` turns ids into text.

    A tokenizer may need its neighbours to decode a token (a leading space, a character's bytes), so the tokens of the
    last whole piece are decoded again with the new ones, and what they add is told; the ids before are not touched again.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._told: list[int] = []
        self._told_text = ""
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the whole characters that this token completes."""
        self._waiting.append(token_id)
        text = self._decode(self._told + self._waiting)
        if len(text) <= len(self._told_text) or text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Return what is still incomplete, as it stands; nothing comes after it."""
        return self._advance(self._decode(self._told + self._waiting)) if self._waiting else ""

    def _advance(self, text: str) -> str:
        added = text[len(self._told_text) :]
        self._told, self._waiting = self._waiting, []
        self._told_text = self._decode(self._told)
        return added


class Answer:
    """The ids of one answer, the text that may be told, and why it ended.

    The answer ends at an end-of-sequence id (counted as one of its ids, without text), at a stop string (whose text is not
    told; of several, the one that is complete first counts), or after `max_tokens` ids. Text that may still become a stop
    string is held back.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_ids: frozenset[int],
        stop: tuple[str, ...],
        max_tokens: int,
    ) -> None:
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stream = TextStream(decode)
        self._end_ids = end_ids
        self._stop = stop
        self._max_tokens = max_tokens
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take the next id and return the text to tell with it."""
        self.ids.append(token_id)
        if token_id in self._end_ids:
            self.finish_reason = "stop"
            return self._held + self._stream.flush()
        text = self._held + self._stream.push(token_id)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        if len(self.ids) >= self._max_tokens:
            self.finish_reason = "length"
            return text + self._stream.flush()
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
