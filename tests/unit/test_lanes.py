"""Lanes: what is divided comes back whole and in order, and a part's failure is the whole's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from tether.lanes import LANE_ROWS, LANE_TOKENS, Lanes, divided


@pytest.mark.parametrize("num_items", [1, 2, 7, 8, 32])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_parts_are_all_items_in_their_order_and_of_nearly_one_size(num_items: int, num_parts: int) -> None:
    if num_parts > num_items:
        return
    parts = divided(range(num_items), num_parts)
    assert [item for part in parts for item in part] == list(range(num_items))
    sizes = [len(part) for part in parts]
    assert len(parts) == num_parts
    assert max(sizes) - min(sizes) <= 1


def test_only_work_that_is_worth_it_is_divided() -> None:
    lanes = Lanes(2)
    assert lanes.num_parts(LANE_ROWS, 1) == 1
    assert lanes.num_parts(2 * LANE_ROWS, 1) == 2
    assert lanes.num_parts(8 * LANE_ROWS, 1) == 2
    assert lanes.num_parts(1, 100 * LANE_TOKENS) == 1
    assert lanes.num_parts(2, LANE_TOKENS) == 2
    assert lanes.num_parts(2, LANE_TOKENS // 2 - 1) == 1
    assert Lanes(1).num_parts(8 * LANE_ROWS, 1) == 1


def test_parts_run_side_by_side_and_come_back_in_order() -> None:
    meeting = threading.Barrier(3, timeout=30)

    def part(number: int) -> int:
        meeting.wait()
        return number

    assert Lanes(3).run([partial(part, number) for number in range(3)]) == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_is_raised_when_all_parts_are_over(failing: int) -> None:
    over: list[int] = []

    def part(number: int) -> int:
        if number == failing:
            raise MemoryError("no room")
        over.append(number)
        return number

    lanes = Lanes(3)
    parts: list[Callable[[], int]] = [partial(part, number) for number in range(3)]
    with pytest.raises(MemoryError):
        lanes.run(parts)
    assert sorted(over) == [number for number in range(3) if number != failing]
    failing = -1
    assert lanes.run(parts) == [0, 1, 2]
