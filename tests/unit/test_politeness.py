"""When a worker takes no jobs of its own accord."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from tether.errors import UsageError
from tether.machine import Machine
from tether.politeness import Facts, Hours, Politeness


def facts(**changes: object) -> Facts:
    plain: dict[str, object] = {
        "minute_of_day": 12 * 60,
        "idle_seconds": 900.0,
        "others_share": 0.1,
        "on_battery": False,
        "free_memory_share": 0.5,
    }
    return Facts(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"on_battery": True}, "on battery"),
        ({"idle_seconds": 3.0}, "its owner is at work"),
        ({"others_share": 0.8}, "other programs are busy"),
        ({"free_memory_share": 0.02}, "short of memory"),
        (dict.fromkeys(("idle_seconds", "others_share", "on_battery", "free_memory_share")), ""),
    ],
)
def test_a_polite_worker_gives_way_to_its_owner_and_says_why(changes: dict[str, object], reason: str) -> None:
    assert Politeness(polite=True).why_not(facts(**changes), is_paused=False) == reason
    assert Politeness().why_not(facts(**changes), is_paused=False) == ""


def test_what_lets_a_worker_go_on_is_weaker_than_what_paused_it() -> None:
    policy = Politeness(polite=True)
    for changes in ({"others_share": 0.4}, {"free_memory_share": 0.08}):
        assert policy.why_not(facts(**changes), is_paused=False) == ""
        assert policy.why_not(facts(**changes), is_paused=True) != ""
    assert policy.why_not(facts(others_share=0.2, free_memory_share=0.2), is_paused=True) == ""


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("20:00-08:00", ("20:00", "23:59", "00:00", "07:59"), ("08:00", "19:59")),
        ("9:30-17:00", ("09:30", "16:59"), ("09:29", "17:00")),
        ("18:00-24:00", ("18:00", "23:59"), ("00:00", "17:59")),
    ],
)
def test_outside_its_hours_a_worker_takes_no_jobs_polite_or_not(
    hours: str, inside: tuple[str, ...], outside: tuple[str, ...]
) -> None:
    parsed = Hours.parse(hours)
    for polite in (False, True):
        policy = Politeness(polite, parsed)
        for times, reason in ((inside, ""), (outside, f"outside {parsed}")):
            for each in times:
                minute = int(each[:2]) * 60 + int(each[3:])
                assert policy.why_not(facts(minute_of_day=minute), is_paused=False) == reason, each


@pytest.mark.parametrize(
    "text", ["", "8-20", "25:00-08:00", "20:60-08:00", "24:30-08:00", "08:00-08:00", "24:00-00:00", "20:00"]
)
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--hours"):
        Hours.parse(text)


def test_the_machine_says_what_it_knows() -> None:
    machine = Machine()
    found = machine.look()
    assert 0 <= found.minute_of_day < 1440
    assert found.free_memory_share is not None
    assert 0 < found.free_memory_share <= 1
    assert found.others_share is not None
    assert 0 <= found.others_share <= 1
    assert found.idle_seconds is None or found.idle_seconds >= 0


def test_somebody_who_is_logged_in_without_a_terminal_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    users = [SimpleNamespace(terminal=None), SimpleNamespace(terminal="null")]
    monkeypatch.setattr(psutil, "users", lambda: users)
    assert Machine().look().idle_seconds is not None
