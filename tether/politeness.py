"""When a worker takes no jobs of its own accord: while its owner needs the machine, or outside given hours. Pure.

What pauses a worker is stronger than what lets it go on, so that it does not change its mind every few seconds.
"""

from __future__ import annotations

import re

import msgspec

from tether.errors import UsageError

AT_REST_SECONDS = 120.0
"""An owner who has touched nothing for so long is away."""
BUSY_SHARE = 0.5
QUIET_SHARE = 0.25
"""Other programs that take more of the processors than the one pause a worker, until they take less than the other."""
LOW_MEMORY_SHARE = 0.05
ENOUGH_MEMORY_SHARE = 0.10
"""The same for the part of the memory that is free."""


class Hours(msgspec.Struct, frozen=True):
    """A part of each day by the machine's own clock, in minutes from midnight; it may go over midnight."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Return what `20:00-08:00` says; raise `UsageError` for anything else."""
        found = re.fullmatch(r"(\d{1,2}):(\d\d)-(\d{1,2}):(\d\d)", text.strip())
        numbers = [int(each) for each in found.groups()] if found is not None else []
        if not numbers or max(numbers[::2]) > 24 or max(numbers[1::2]) > 59 or max(_minutes(numbers)) > 1440:
            raise UsageError(f"--hours is a part of the day such as 20:00-08:00, not {text!r}")
        begin, end = _minutes(numbers)
        if begin % 1440 == end % 1440 and (begin, end) != (0, 1440):
            raise UsageError("--hours begins and ends at the same time: leave it out to lend the machine all day")
        return cls(begin, end)

    def holds(self, minute_of_day: int) -> bool:
        """Whether a minute of the day lies within."""
        if self.begin < self.end:
            return self.begin <= minute_of_day < self.end
        return minute_of_day >= self.begin or minute_of_day < self.end

    def __str__(self) -> str:
        return "-".join(f"{minutes // 60:02}:{minutes % 60:02}" for minutes in (self.begin, self.end))


def _minutes(numbers: list[int]) -> tuple[int, int]:
    return numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """How the machine is now; None for what it does not say."""

    minute_of_day: int
    idle_seconds: float | None = None
    """Since its owner touched keyboard or mouse, or typed into a terminal."""
    others_share: float | None = None
    """Of all processors, what programs other than this worker take: 0 to 1."""
    on_battery: bool | None = None
    free_memory_share: float | None = None


class Politeness(msgspec.Struct, frozen=True):
    """What a worker gives way to."""

    polite: bool = False
    """To its owner: at work, on battery, or short of memory."""
    hours: Hours | None = None
    """Outside of these it takes no jobs; None: it takes them all day."""

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to look at."""
        return self.polite or self.hours is not None

    def why_not(self, facts: Facts, *, is_paused: bool) -> str:
        """Return why the worker takes no jobs now, for people; empty where it takes them."""
        if self.hours is not None and not self.hours.holds(facts.minute_of_day):
            return f"outside {self.hours}"
        if not self.polite:
            return ""
        if facts.on_battery:
            return "on battery"
        if facts.idle_seconds is not None and facts.idle_seconds < AT_REST_SECONDS:
            return "its owner is at work"
        busy, low = (QUIET_SHARE, ENOUGH_MEMORY_SHARE) if is_paused else (BUSY_SHARE, LOW_MEMORY_SHARE)
        if facts.others_share is not None and facts.others_share > busy:
            return "other programs are busy"
        if facts.free_memory_share is not None and facts.free_memory_share < low:
            return "short of memory"
        return ""
