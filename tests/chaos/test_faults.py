"""The plan of the chaos suite: the same for the same seed, and each stream loses its worker once."""

from __future__ import annotations

from random import Random

from tests.chaos.faults import FAULTS, TOLERANCES, Aim, is_hit, strikes
from tests.chaos.history import Ended, History, Started, Told

WHOLE = "0 1 2 3 4 5 6 7 8 9 "


def stream(number: int, *, worker: str = "one", attempt: int = 1, num_chars: int = len(WHOLE)) -> History:
    return History(number, "stream", "north", WHOLE, [Started(0.0, worker, attempt), Told(1.0, "", num_chars)])


def test_the_same_seed_makes_the_same_plan_and_another_one_another() -> None:
    assert strikes(Random(1), 20, 100) == strikes(Random(1), 20, 100) != strikes(Random(2), 20, 100)
    places = [[Aim(seed).place(stream(number)) for number in range(20)] for seed in (1, 1, 2)]
    assert places[0] == places[1] != places[2]


def test_strikes_hit_everybody_and_come_at_different_moments() -> None:
    found = strikes(Random(3), 200, 100)
    assert {strike.choose(["one", "two"]) for strike in found} == {"one", "two"}
    waits = [each.after_pieces for each in found]
    assert 50 <= min(waits) < 70
    assert 130 < max(waits) <= 150


def test_a_stream_loses_its_worker_once_and_not_before_its_place() -> None:
    aim = Aim(1)
    place = aim.place(stream(0))
    assert 0 < place < len(WHOLE)
    assert aim.due([stream(0, num_chars=place - 1)]) == []
    assert aim.due([stream(0, num_chars=place), stream(0)]) == ["one"]
    moved = stream(0, attempt=2)
    assert (aim.due([moved]), is_hit(moved), is_hit(stream(0))) == ([], True, False)
    ended = stream(0)
    ended.seen.append(Ended(2.0, WHOLE, None))
    assert aim.due([ended]) == []


def test_the_places_are_all_over_the_answers() -> None:
    places = {Aim(5).place(stream(number)) for number in range(300)}
    assert min(places) <= 2
    assert max(places) >= len(WHOLE) * 4 // 5
    assert len(places) > 10


def test_each_fault_says_what_it_may_do() -> None:
    assert FAULTS.keys() == TOLERANCES.keys()
