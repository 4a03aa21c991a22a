"""From token ids to an answer: its text, where it ends, and the random numbers; without torch.

Everything here is a function of the ids so far (and of seed and position), never of when they came: a job that goes on
elsewhere with the ids already emitted replays them through the same machine, and tells not a character twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import msgspec

from tether.bounds import MAX_CHOICES
from tether.errors import InvalidRequest
from tether.records import FinishReason, Sampling

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20
MAX_SCHEMA_CHARACTERS = 65_536
MAX_REGEX_CHARACTERS = 8_192
MAX_SCHEMA_NUMBER = 1 << 53
"""Beyond it JSON's readers disagree."""
MAX_SCHEMA_COUNT = 100_000
"""Of items, properties or characters that a schema may ask for."""
MAX_SCHEMA_STEPS = 20_000
"""The digits of all `multipleOf` in a schema as numbers, together."""

_MASK = (1 << 64) - 1
_INCOMPLETE = "\ufffd"
_LARGEST_ID = (1 << 31) - 1
_COUNTS = frozenset({"minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"})
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, math.inf),
    "min_p": (0.0, 1.0),
    # OpenAI's ranges; the penalty for repetition keeps a logit finite.
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.1, 10.0),
    "max_tokens": (1, math.inf),
    "top_k": (0, math.inf),
    "n": (1, MAX_CHOICES),
}


def check_sampling(sampling: Sampling) -> None:
    """Raise `InvalidRequest`, naming the parameter, for values that no model can follow.

    What depends on the model is checked where it is known: ids by `check_ids`, a schema or a regular expression by
    `tether.guided`.
    """
    for param, (least, most) in _RANGES.items():
        value = getattr(sampling, param)
        if not (math.isfinite(value) and least <= value <= most):
            wanted = f"{least:g} or more" if most == math.inf else f"between {least:g} and {most:g}"
            raise InvalidRequest(f"{param} must be {wanted}", param=param)
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be above 0 and at most 1", param="top_p")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs must be between 0 and {MAX_LOGPROBS}", param="logprobs")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise InvalidRequest("min_tokens must be between 0 and max_tokens", param="min_tokens")
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings are allowed", param="stop")
    if not all(sampling.stop):
        raise InvalidRequest("a stop string must not be empty", param="stop")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"at most {MAX_STOP_TOKEN_IDS} stop token ids are allowed", param="stop_token_ids")
    if len(sampling.logit_bias) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"at most {MAX_LOGIT_BIASES} tokens may have a bias", param="logit_bias")
    if not all(-100 <= bias <= 100 for bias in sampling.logit_bias.values()):
        raise InvalidRequest("a bias in logit_bias must be between -100 and 100", param="logit_bias")
    check_ids(sampling, _LARGEST_ID + 1)
    if sampling.is_guided:
        _check_guide(sampling)


def check_ids(sampling: Sampling, num_vocabulary: int) -> None:
    """Raise `InvalidRequest` for ids that are none of a vocabulary's, 0 to `num_vocabulary` - 1."""
    for param, ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if not all(0 <= token_id < num_vocabulary for token_id in ids):
            raise InvalidRequest(f"{param} has token ids that this model does not have", param=param)


def _check_guide(sampling: Sampling) -> None:
    """Check what can be said of a guide without the library that compiles it."""
    if sampling.json_schema is not None and sampling.regex is not None:
        raise InvalidRequest("json_schema and regex cannot both say what may come", param="regex")
    if sampling.json_schema is not None:
        _check_schema(sampling.json_schema)
    if sampling.regex is not None:
        _check_regex(sampling.regex)
    # A guide decides where an answer may end; a second rule could leave no token at all.
    if sampling.min_tokens:
        raise InvalidRequest("min_tokens does not go together with json_schema or regex", param="min_tokens")
    if sampling.ignore_eos:
        raise InvalidRequest("ignore_eos does not go together with json_schema or regex", param="ignore_eos")


def _check_schema(text: str) -> None:
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequest(f"json_schema must have at most {MAX_SCHEMA_CHARACTERS} characters", param="json_schema")
    try:
        schema = msgspec.json.decode(text.encode())
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidRequest(f"json_schema is not JSON: {exc}", param="json_schema") from exc
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("json_schema must be a JSON object, true or false", param="json_schema")
    _check_schema_numbers(schema)


def _check_schema_numbers(schema: Any) -> None:
    """Refuse numbers that would keep the library which compiles the schema busy for minutes, or end its process.

    Seen with llguidance 1.9.1: an integer near -2**63 in `const` or `enum` overflows its stack; `multipleOf` takes time and
    memory in proportion to its digits, 0.5 s for 99991 and minutes for 784359, and several together to their least common
    multiple; `minItems` beside `prefixItems` takes memory in proportion.
    """
    steps: list[Fraction] = []
    for keyword, value in _numbers(schema):
        if not -MAX_SCHEMA_NUMBER <= value <= MAX_SCHEMA_NUMBER:
            raise InvalidRequest(f"json_schema has a number beyond {MAX_SCHEMA_NUMBER}", param="json_schema")
        if keyword in _COUNTS and value > MAX_SCHEMA_COUNT:
            raise InvalidRequest(f"{keyword} in json_schema must be at most {MAX_SCHEMA_COUNT}", param="json_schema")
        if keyword == "multipleOf":
            if value <= 0:
                raise InvalidRequest("multipleOf in json_schema must be above 0", param="json_schema")
            steps.append(Fraction(str(value)))
    together = Fraction(
        math.lcm(*(step.numerator for step in steps)), math.gcd(*(step.denominator for step in steps)) or 1
    )
    if sum(map(_digits, steps)) + _digits(together) > MAX_SCHEMA_STEPS:
        raise InvalidRequest("multipleOf in json_schema has too many digits", param="json_schema")


def _numbers(schema: Any) -> Iterator[tuple[str, int | float]]:
    """Yield each number in a schema with the keyword that it belongs to."""
    waiting: list[tuple[str, Any]] = [("", schema)]
    while waiting:
        keyword, value = waiting.pop()
        if isinstance(value, dict):
            waiting.extend(value.items())
        elif isinstance(value, list):
            waiting.extend((keyword, item) for item in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield keyword, value


def _digits(step: Fraction) -> int:
    """Return the digits of a decimal fraction as a whole number, without the zeros at its end: 1250 and 0.125 have 125."""
    # A denominator of twos and fives divides the power of ten that has as many digits as it has bits.
    digits = int(step * 10 ** step.denominator.bit_length())
    while digits and digits % 10 == 0:
        digits //= 10
    return digits


def _check_regex(text: str) -> None:
    if not 0 < len(text) <= MAX_REGEX_CHARACTERS:
        raise InvalidRequest(f"regex must have 1 to {MAX_REGEX_CHARACTERS} characters", param="regex")
    # The library that compiles it would drop the last character without a word.
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise InvalidRequest("regex ends in the middle of an escape", param="regex")


def ending_ids(sampling: Sampling, end_ids: frozenset[int]) -> frozenset[int]:
    """Return the ids that end an answer, of which `end_ids` are the model's own: what `Answer` takes."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else end_ids)


def uniform(seed: int, position: int, choice: int = 0) -> float:
    """Return the random number in [0, 1) for the token at `position` of an answer, the `choice`-th of its prompt.

    Counter-based: splitmix64 (Steele, Lea, Flood 2014) of the seed, the choice and the position, so that it needs no state.
    """
    stream = _splitmix64(seed & _MASK)
    if choice:
        stream = _splitmix64((stream ^ choice) & _MASK)
    mixed = _splitmix64(stream + position * 0x9E3779B97F4A7C15 & _MASK)
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

    The answer ends at one of `end_ids` (see `ending_ids`; counted as one of its ids, without text), at a stop string (whose text is not
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
        text = self._stream.push(token_id)
        if not self._stop and len(self.ids) < self._max_tokens:
            return text
        text = self._held + text
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
