"""Quotas: which limits there are, what a job reserves, why one is refused, what is left. Pure; the store counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from tether.errors import InsufficientQuota, JobTooLarge, RateLimited, RateLimits, TetherError
from tether.records import Job

Unit = Literal["requests", "tokens", "jobs", "job_tokens"]

MINUTE: Final = 60
DAY: Final = 86_400

LIMITS: Final[dict[str, tuple[Unit, int]]] = {
    "requests_per_minute": ("requests", MINUTE),
    "tokens_per_minute": ("tokens", MINUTE),
    "requests_per_day": ("requests", DAY),
    "tokens_per_day": ("tokens", DAY),
    "jobs_at_once": ("jobs", 0),
    "job_tokens": ("job_tokens", 0),
}
"""Every limit by the name that people give it: its unit, and its window in seconds."""

_NAMES = {limit: name for name, limit in LIMITS.items()}

BYTES_PER_TOKEN: Final = 4
"""Only the worker has the model's tokenizer; before it, a prompt is taken to have a token for so many bytes of UTF-8."""


class Limit(msgspec.Struct, frozen=True):
    """A limit, for a tenant (`key_id` and `model` empty), one of its keys, a model, or a key on a model."""

    key_id: str
    model: str
    unit: Unit
    window_seconds: int
    most: int
    spent: int = 0
    """Used and reserved in the present window; jobs that are live, for `jobs`."""

    @property
    def name(self) -> str:
        """The name that people give it."""
        return _NAMES.get((self.unit, self.window_seconds), self.unit)

    @property
    def left(self) -> int:
        """What of it may still be spent; less than 0 where an answer used more than it had reserved."""
        return self.most - self.spent

    def reset_seconds(self, now: float) -> float:
        """Return how long its present window still lasts."""
        return self.window_seconds - now % self.window_seconds if self.window_seconds else 0.0

    def need(self, tokens: int) -> int:
        """Return what a job that reserves `tokens` asks of it."""
        return tokens if self.unit in {"tokens", "job_tokens"} else 1


def reserved_tokens(job: Job) -> int:
    """Return the tokens that a job is taken to use at most: its prompt, estimated, and all that it may answer."""
    prompt_tokens = -(-len(job.input.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)
    return prompt_tokens + job.sampling.max_tokens * job.sampling.n


def passed(limits: Iterable[Limit], tokens: int) -> list[Limit]:
    """Return the limits that a job which reserves `tokens` would go beyond."""
    return [limit for limit in limits if limit.need(tokens) > limit.left]


def refusal(limits: Iterable[Limit], tokens: int, now: float) -> TetherError:
    """Return why a job that reserves `tokens` was refused: of all limits in its way the one that lasts longest.

    A job that no wait would let through is told so. Where none is in its way any more, it may come again at once.
    """
    limits = tuple(limits)
    left = rate_limits(limits, now)
    for limit in limits:
        if limit.need(tokens) > limit.most and limit.unit in {"tokens", "job_tokens"}:
            return JobTooLarge(
                f"the job may use {tokens} tokens (its prompt and max_tokens), and {_words(limit)} is {limit.most}",
                param="max_tokens",
                limits=left,
            )
    in_the_way = passed(limits, tokens)
    if not in_the_way:
        return RateLimited("too many came at once; try again", retry_after_seconds=1.0, limits=left)
    worst = max(in_the_way, key=lambda limit: (limit.window_seconds, limit.unit == "tokens"))
    if worst.unit == "jobs":
        message = f"{_words(worst)} is {worst.most}, and so many are live; wait for one to end"
        return RateLimited(message, retry_after_seconds=2.0, limits=left)
    kind = InsufficientQuota if worst.window_seconds >= DAY else RateLimited
    need = f"; this job may use {tokens}" if worst.unit == "tokens" else ""
    message = f"{_words(worst)} is {worst.most}, of which {max(0, worst.left)} are left{need}"
    return kind(message, retry_after_seconds=max(1.0, worst.reset_seconds(now)), limits=left)


def rate_limits(limits: Iterable[Limit], now: float) -> RateLimits | None:
    """Return what is left of the tightest limits, as answers tell it; None where there is no limit."""
    limits = tuple(limits)
    requests = _tightest(limits, "requests")
    tokens = _tightest(limits, "tokens")
    if requests is None and tokens is None:
        return None
    told = RateLimits()
    if requests is not None:
        told = msgspec.structs.replace(
            told,
            limit_requests=requests.most,
            remaining_requests=max(0, requests.left),
            reset_requests_seconds=requests.reset_seconds(now),
        )
    if tokens is not None:
        told = msgspec.structs.replace(
            told,
            limit_tokens=tokens.most,
            remaining_tokens=max(0, tokens.left),
            reset_tokens_seconds=tokens.reset_seconds(now),
        )
    return told


def headers(told: RateLimits | None) -> dict[str, str]:
    """Return `x-ratelimit-*` headers, as OpenAI's API has them."""
    if told is None:
        return {}
    found: dict[str, str] = {}
    for unit, most, left, reset_seconds in (
        ("requests", told.limit_requests, told.remaining_requests, told.reset_requests_seconds),
        ("tokens", told.limit_tokens, told.remaining_tokens, told.reset_tokens_seconds),
    ):
        if most is not None:
            found[f"x-ratelimit-limit-{unit}"] = str(most)
            found[f"x-ratelimit-remaining-{unit}"] = str(left)
            found[f"x-ratelimit-reset-{unit}"] = duration(reset_seconds)
    return found


def duration(seconds: float) -> str:
    """Return a duration as OpenAI's headers write it: `6m0s`, `1h0m0s`, `29s`."""
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _tightest(limits: tuple[Limit, ...], unit: Unit) -> Limit | None:
    return min((limit for limit in limits if limit.unit == unit), key=lambda limit: limit.left, default=None)


def _words(limit: Limit) -> str:
    whose = "this key's" if limit.key_id else "the tenant's"
    return f"{whose} {limit.name.replace('_', ' ')}" + (f" on {limit.model}" if limit.model else "")
