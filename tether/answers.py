"""The answers of a job as far as they were told: what an orchestrator keeps to go on elsewhere, and a gateway to resubmit.

A job has `n` answers to its one prompt, its choices. Tokens carry the position of the first one within their choice, so
none counts twice; the text told with the first tokens of a choice is a function of their ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from tether.messages import InferTokens, JobEvent, JobTokens
from tether.records import ChoiceResult, FinishReason, TokenLogprobs

PORTION_TOKENS = 8192
PORTION_LOGPROBS = 512
PORTION_CHARS = 65_536
"""What one message repeats of an answer at most, so that it fits into a frame."""
RECORD_CHARS = 768 * 1024
"""What a job's texts and log-probabilities may have together for the latter to be kept: a record has to fit into a frame."""


class Portion(Protocol):
    """Tokens of one choice, as any message tells them."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...  # noqa: D102 - as the messages say
    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]: ...  # noqa: D102


class ChoiceSoFar:
    """One choice as far as it was told."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_chars = 0
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._next_token = 0
        self._next_char = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Those of all tokens; None where some are not known."""
        has_all = bool(self._logprobs) and len(self._logprobs) == len(self.token_ids)
        return tuple(self._logprobs) if has_all else None

    @property
    def num_told_chars(self) -> int:
        """Characters up to which the attempt has told it, with those before the attempt."""
        return self._next_char

    def begin_attempt(self) -> None:
        """What comes next goes on after all that is known."""
        self._next_token, self._next_char = len(self.token_ids), self.num_chars

    def is_next(self, position: int) -> bool:
        """Whether tokens at this position follow what the attempt told before."""
        return position == self._next_token

    def adopt(self, token_ids: Sequence[int], text: str) -> None:
        """Take over what somebody else has of it, where that is more; an attempt that runs counts from its end on."""
        if len(token_ids) > len(self.token_ids):
            self.token_ids, self._texts, self.num_chars = list(token_ids), [text], len(text)
            self._logprobs = []

    def take(self, portion: Portion) -> None:
        """Append what is new."""
        if portion.logprobs and len(self._logprobs) == len(self.token_ids):
            self._logprobs += portion.logprobs
        self.token_ids += portion.token_ids
        self._texts.append(portion.text)
        self.num_chars += len(portion.text)

    def add(self, tokens: InferTokens) -> JobTokens | None:
        """Take in what an attempt tells, which is next; return what is new of it, or None.

        Where the attempt is behind the answer, its text is cut where the answer's ends.
        """
        ids, text, logprobs = tokens.token_ids, tokens.text, tokens.logprobs
        num_known = len(self.token_ids) - self._next_token
        chars_known = max(0, self.num_chars - self._next_char)
        self._next_token += len(ids)
        self._next_char += len(text)
        if num_known or chars_known:
            ids, text, logprobs = ids[num_known:], text[chars_known:], logprobs[num_known:]
        if not ids and not text:
            return None
        new = JobTokens(tokens.job_id, tokens.attempt, len(self.token_ids), ids, text, tokens.choice, logprobs)
        self.take(new)
        return new

    def beyond(self, num_tokens: int, num_chars: int) -> Iterator[tuple[int, Portion]]:
        """Yield what somebody misses who has so many tokens and characters: positions and portions."""
        text = self.text
        has_logprobs = bool(self._logprobs) and len(self._logprobs) == len(self.token_ids)
        step = PORTION_LOGPROBS if has_logprobs else PORTION_TOKENS
        while num_tokens < len(self.token_ids) or num_chars < len(text):
            ids = tuple(self.token_ids[num_tokens : num_tokens + step])
            portion = text[num_chars : num_chars + PORTION_CHARS]
            logprobs = tuple(self._logprobs[num_tokens : num_tokens + step]) if has_logprobs else ()
            yield num_tokens, InferTokens("", 0, num_tokens, ids, portion, 0, logprobs)
            num_tokens += len(ids)
            num_chars += len(portion)


class AnswersSoFar:
    """All choices of a job."""

    def __init__(self, num_choices: int) -> None:
        self.choices = [ChoiceSoFar() for _ in range(num_choices)]

    def knows(self, choice: int) -> bool:
        """Whether the job has such a choice."""
        return 0 <= choice < len(self.choices)

    @property
    def emitted(self) -> tuple[tuple[int, ...], ...]:
        """The ids so far, of each choice; nothing at all before the first."""
        if not any(choice.token_ids for choice in self.choices):
            return ()
        return tuple(tuple(choice.token_ids) for choice in self.choices)

    @property
    def texts(self) -> tuple[str, ...]:
        """The text so far, of each choice; nothing at all before the first."""
        if not any(choice.token_ids or choice.num_chars for choice in self.choices):
            return ()
        return tuple(choice.text for choice in self.choices)

    @property
    def seen(self) -> tuple[tuple[int, int], ...]:
        """The number of tokens and of characters, of each choice."""
        return tuple((len(choice.token_ids), choice.num_chars) for choice in self.choices)

    def lacks(self, told: Sequence[tuple[int, int]]) -> bool:
        """Whether anything is missing of so many tokens and characters of each choice."""
        return any(
            tokens > known[0] or chars > known[1] for known, (tokens, chars) in zip(self.seen, told, strict=False)
        )

    def adopt(self, emitted: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Take over what somebody else has, where that is more."""
        for choice, ids, text in zip(self.choices, emitted, texts, strict=False):
            choice.adopt(ids, text)

    def beyond(self, job_id: str, attempt: int, seen: Sequence[tuple[int, int]] = ()) -> Iterator[JobTokens]:
        """Yield what somebody misses who has seen so many tokens and characters of each choice."""
        for number, choice in enumerate(self.choices):
            num_tokens, num_chars = seen[number] if number < len(seen) else (0, 0)
            for position, portion in choice.beyond(num_tokens, num_chars):
                ids, text = portion.token_ids, portion.text
                yield JobTokens(job_id, attempt, position, ids, text, number, portion.logprobs)

    def result(self, finish_reason: FinishReason, choices: Sequence[FinishReason]) -> str:
        """Return the answer as the ledger keeps it."""
        if len(self.choices) == 1:
            return self.choices[0].text
        ends = [*choices, *[finish_reason] * len(self.choices)]
        found = [ChoiceResult(choice.text, end) for choice, end in zip(self.choices, ends, strict=False)]
        return msgspec.json.encode(found).decode()

    def logprobs(self, num_chars: int) -> str | None:
        """Return the log-probabilities as the ledger keeps them, beside texts of `num_chars`; None where it keeps none."""
        found = [choice.logprobs for choice in self.choices]
        if any(each is None for each in found):
            return None
        text = msgspec.json.encode(found).decode()
        return text if len(text) + num_chars <= RECORD_CHARS else None


def choices_of(result: str, num_choices: int, finish_reason: FinishReason) -> list[ChoiceResult]:
    """Return the answers of a job from its result in the ledger."""
    if num_choices == 1:
        return [ChoiceResult(result, finish_reason)]
    return msgspec.json.decode(result, type=list[ChoiceResult])


def joined(events: list[JobEvent]) -> Iterator[JobEvent]:
    """Yield events in order, tokens that follow one another as one event for each choice."""
    for kind, run in itertools.groupby(events, type):
        same = list(run)
        if kind is JobTokens and len(same) > 1:
            by_choice: dict[int, list[JobTokens]] = {}
            for event in same:
                if isinstance(event, JobTokens):
                    by_choice.setdefault(event.choice, []).append(event)
            yield from map(_joined_tokens, by_choice.values())
        else:
            yield from same


def _joined_tokens(run: list[JobTokens]) -> JobTokens:
    ids = tuple(token for tokens in run for token in tokens.token_ids)
    logprobs = tuple(each for tokens in run for each in tokens.logprobs)
    text, first = "".join(tokens.text for tokens in run), run[0]
    return JobTokens(first.job_id, run[-1].attempt, first.position, ids, text, first.choice, logprobs)
