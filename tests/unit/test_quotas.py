from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import make_job
from tether.errors import InsufficientQuota, JobTooLarge, RateLimited, RateLimits
from tether.quotas import DAY, LIMITS, MINUTE, Limit, duration, headers, rate_limits, refusal, reserved_tokens
from tether.records import Sampling

NOW = 1_800_000_030.25


def limit(name: str, most: int, spent: int = 0, *, key_id: str = "", model: str = "") -> Limit:
    unit, window_seconds = LIMITS[name]
    return Limit(key_id, model, unit, window_seconds, most, spent)


def test_a_job_reserves_its_prompt_and_every_answer_that_it_may_have() -> None:
    job = make_job("x" * 9, sampling=Sampling(max_tokens=10, n=3))
    assert reserved_tokens(job) == 3 + 30
    assert reserved_tokens(msgspec.structs.replace(job, input="🦊\ud800")) == 2 + 30


def test_a_refusal_names_the_limit_that_lasts_longest() -> None:
    limits = [limit("requests_per_minute", 2, 2), limit("tokens_per_day", 100, 95), limit("jobs_at_once", 1, 1)]
    error = refusal(limits, 6, NOW)
    assert type(error) is InsufficientQuota
    assert error.message == "the tenant's tokens per day is 100, of which 5 are left; this job may use 6"
    assert error.retry_after_seconds == DAY - NOW % DAY
    error = refusal(limits, 5, NOW)
    assert type(error) is RateLimited
    assert error.retry_after_seconds == 29.75
    error = refusal([limits[2]], 5, NOW)
    assert (type(error), error.retry_after_seconds) == (RateLimited, 2.0)


def test_a_job_that_never_fits_is_the_request_s_fault() -> None:
    for name in ("job_tokens", "tokens_per_minute", "tokens_per_day"):
        error = refusal([limit("requests_per_minute", 1, 1), limit(name, 10, key_id="k", model="demo")], 11, NOW)
        assert (type(error), error.status, error.param) == (JobTooLarge, 400, "max_tokens")
        assert "this key's" in error.message
        assert error.message.endswith("on demo is 10")


def test_who_lost_a_race_that_is_over_may_come_again_at_once() -> None:
    error = refusal([limit("requests_per_minute", 2, 1)], 5, NOW)
    assert (type(error), error.retry_after_seconds) == (RateLimited, 1.0)
    assert type(refusal([], 5, NOW)) is RateLimited


@given(st.lists(st.tuples(st.sampled_from(sorted(LIMITS)), st.integers(0, 50), st.integers(0, 60)), max_size=8))
def test_what_is_left_is_told_of_the_tightest_limit_of_each_unit(facts: list[tuple[str, int, int]]) -> None:
    limits = [limit(*each) for each in facts]
    told = rate_limits(limits, NOW)
    for unit in ("requests", "tokens"):
        found = [each for each in limits if each.unit == unit]
        if not found:
            assert told is None or getattr(told, f"limit_{unit}") is None
            continue
        assert told is not None
        assert getattr(told, f"remaining_{unit}") == max(0, min(each.left for each in found))
        assert 0 < getattr(told, f"reset_{unit}_seconds") <= DAY


def test_headers_are_those_that_clients_of_openai_read() -> None:
    assert headers(None) == headers(RateLimits()) == {}
    limits = (limit("requests_per_minute", 5, 2), limit("tokens_per_day", 10, 12))
    assert headers(rate_limits(limits, NOW)) == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "10",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": duration(DAY - NOW % DAY),
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1s"), (59, "59s"), (MINUTE, "1m0s"), (3599.5, "1h0m0s"), (86400, "24h0m0s")]
)
def test_durations_read_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
