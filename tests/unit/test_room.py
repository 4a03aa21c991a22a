from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tether.room import Room

tenants = st.sampled_from("abcd")


@given(st.integers(0, 40), st.lists(st.tuples(tenants, st.booleans()), max_size=120))
def test_no_more_than_all_places_are_given_and_whoever_has_none_gets_one_while_any_is_free(
    num_places: int, events: list[tuple[str, bool]]
) -> None:
    room = Room(num_places)
    taken: Counter[str] = Counter()
    for tenant, comes in events:
        if not comes:
            if taken[tenant]:
                room.leave(tenant)
                taken[tenant] -= 1
            continue
        num_free = num_places - taken.total()
        refusal = room.why_not(tenant)
        assert (refusal == "full") == (num_free == 0)
        if not taken[tenant] and num_free:
            assert refusal is None
        if refusal is None:
            room.take(tenant)
            taken[tenant] += 1
        assert len(room) == taken.total() <= num_places
        assert room.taken_by(tenant) == taken[tenant]


@given(st.integers(0, 60), st.lists(tenants, max_size=200))
def test_floods_of_so_many_tenants_leave_room_for_the_next(num_places: int, floods: list[str]) -> None:
    room = Room(num_places)
    for tenant in floods:
        if room.why_not(tenant) is None:
            room.take(tenant)
    num_free = num_places - len(room)
    assert num_free >= num_places >> len(set(floods)), "each flood takes at most half of what it finds"


@given(st.integers(1, 60), st.floats(0.1, 10.0))
def test_a_tenant_that_is_alone_has_its_weight_of_the_places_and_at_least_one(num_places: int, weight: float) -> None:
    room = Room(num_places)
    while room.why_not("a", weight) is None:
        room.take("a")
    share = num_places * weight / (1 + weight)
    assert max(1, share) <= len(room) + 1e-9
    assert len(room) <= share + 1


@given(st.integers(0, 40), st.integers(1, 40), st.lists(tenants, max_size=80))
def test_nobody_has_more_than_the_bound_of_each(num_places: int, most: int, floods: list[str]) -> None:
    room = Room(num_places, most)
    for tenant in floods:
        if room.why_not(tenant) is None:
            room.take(tenant)
        assert room.taken_by(tenant) <= most


def test_a_place_can_be_taken_back_by_whoever_had_it() -> None:
    room = Room(1)
    room.take("a")
    room.take("b")
    assert len(room) == 2
    room.leave("a")
    assert room.why_not("a") == "full"
    room.leave("b")
    assert room.why_not("a") is None
