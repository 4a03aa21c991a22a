"""How long a job will wait, from how long jobs held the slots of its model lately. Pure: the time is an argument."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

NUM_KEPT = 64
"""How many of the latest jobs count: enough for a mean, few enough to follow a change of load."""


def expected_wait(
    place: int, num_slots: int, held_seconds: Iterable[float], running_seconds: Iterable[float] = ()
) -> float | None:
    """Return in how many seconds the job at `place` (1 is next) gets a slot; None where no fact says it.

    All `num_slots` slots are taken, and come free at the rate `num_slots` / mean. The mean is that of the times for which
    the latest jobs held a slot (`held_seconds`), and of those that run longer than that already: what is stuck makes the wait
    longer before it ends. `place` counts whoever has a turn before the job, so the shares of the tenants are in it.
    """
    held = list(held_seconds)
    if not held or num_slots <= 0:
        return None
    mean = math.fsum(held) / len(held)
    held += [seconds for seconds in running_seconds if seconds > mean]
    return place * (math.fsum(held) / len(held)) / num_slots


class Pace:
    """How long jobs hold the slots of one model."""

    def __init__(self) -> None:
        self._held_seconds: deque[float] = deque(maxlen=NUM_KEPT)
        self._running: dict[str, float] = {}

    def begin(self, job_id: str, now: float) -> None:
        """A job has a slot from now on."""
        self._running[job_id] = now

    def end(self, job_id: str, now: float, *, counts: bool = True) -> None:
        """The job's slot is free again. One in which nothing ran does not count."""
        since = self._running.pop(job_id)
        if counts:
            self._held_seconds.append(now - since)

    def expected_wait(self, place: int, num_slots: int, now: float) -> float | None:
        """Return in how many seconds the job at `place` gets one of `num_slots` slots; None where no job has ended yet."""
        return expected_wait(place, num_slots, self._held_seconds, (now - since for since in self._running.values()))
