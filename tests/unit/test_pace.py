from __future__ import annotations

import heapq
import random
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tether.pace import NUM_KEPT, Pace, expected_wait

seconds = st.floats(0.001, 1000.0)
some_seconds = st.lists(seconds, min_size=1, max_size=20)
places = st.integers(1, 1000)
slots = st.integers(1, 100)


@given(places, slots, some_seconds, st.lists(seconds, max_size=20))
def test_a_wait_is_longer_further_back_and_shorter_with_more_slots(
    place: int, num_slots: int, held: list[float], running: list[float]
) -> None:
    wait = expected_wait(place, num_slots, held, running)
    behind = expected_wait(place + 1, num_slots, held, running)
    wider = expected_wait(place, num_slots + 1, held, running)
    assert wait is not None
    assert behind is not None
    assert wider is not None
    assert 0 < wider < wait < behind


@given(places, slots, some_seconds, st.lists(seconds, max_size=20), st.floats(0.1, 10.0))
def test_a_wait_is_measured_in_the_jobs_own_times(
    place: int, num_slots: int, held: list[float], running: list[float], factor: float
) -> None:
    # A time that is the mean but for rounding may count in one of the two and not in the other.
    assume(all(each != pytest.approx(sum(held) / len(held), rel=1e-9) for each in running))
    wait = expected_wait(place, num_slots, held, running)
    scaled = expected_wait(place, num_slots, [factor * each for each in held], [factor * each for each in running])
    assert wait is not None
    assert scaled == pytest.approx(factor * wait, rel=1e-3)


@given(places, slots, some_seconds, st.lists(seconds, max_size=20), seconds)
def test_who_runs_long_makes_a_wait_longer_and_who_has_just_begun_changes_nothing(
    place: int, num_slots: int, held: list[float], running: list[float], more: float
) -> None:
    wait = expected_wait(place, num_slots, held, running)
    assert wait is not None
    mean = sum(held) / len(held)
    assert expected_wait(place, num_slots, held, [*running, mean / 2]) == wait
    most = max([*held, *running]) + more
    longer = expected_wait(place, num_slots, held, [*running, most])
    assert longer is not None
    assert longer > wait


@given(places, st.lists(seconds, max_size=5))
def test_nobody_can_say_before_the_first_end_or_without_a_slot(place: int, running: list[float]) -> None:
    assert expected_wait(place, 4, [], running) is None
    assert expected_wait(place, 0, [1.0], running) is None


def waited(num_slots: int, place: int, draw: Callable[[], float]) -> float:
    """Let jobs run in so many slots, then let `place` jobs wait; return when the last of these gets a slot."""
    ends = [draw() * (number + 1) / num_slots for number in range(num_slots)]
    heapq.heapify(ends)
    for _ in range(10 * num_slots):
        now = heapq.heapreplace(ends, ends[0] + draw())
    start = now
    for _ in range(place):
        now = heapq.heapreplace(ends, ends[0] + draw())
    return now - start


@pytest.mark.parametrize("num_slots", [1, 3, 16])
@pytest.mark.parametrize("place", [1, 10, 50])
@pytest.mark.parametrize("law", ["same", "uniform", "exponential"])
def test_a_line_that_is_played_waits_for_about_so_long(num_slots: int, place: int, law: str) -> None:
    numbers = random.Random(7)
    draws: dict[str, Callable[[], float]] = {
        "same": lambda: 2.0,
        "uniform": lambda: numbers.uniform(1.0, 3.0),
        "exponential": lambda: numbers.expovariate(0.5),
    }
    draw = draws[law]
    told = expected_wait(place, num_slots, [draw() for _ in range(NUM_KEPT)])
    assert told is not None
    seen = [waited(num_slots, place, draw) for _ in range(60)]
    assert sum(seen) / len(seen) == pytest.approx(told, rel=0.3, abs=2.0 / num_slots)


def test_a_pace_follows_the_latest_jobs() -> None:
    pace = Pace()
    assert pace.expected_wait(1, 1, 0.0) is None
    for number in range(2 * NUM_KEPT):
        length = 1.0 if number < NUM_KEPT else 5.0
        pace.begin(f"{number}", 100.0)
        pace.end(f"{number}", 100.0 + length)
    assert pace.expected_wait(3, 1, 0.0) == 15.0
    pace.begin("nothing ran", 0.0)
    pace.end("nothing ran", 0.0, counts=False)
    assert pace.expected_wait(3, 1, 0.0) == 15.0
    pace.begin("stuck", 0.0)
    assert pace.expected_wait(1, 1, 5.0) == 5.0
    stuck = pace.expected_wait(1, 1, 1000.0)
    assert stuck is not None
    assert stuck > 15.0
