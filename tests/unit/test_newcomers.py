from __future__ import annotations

import pytest

from tether.newcomers import MAX_NEWCOMERS, MAX_NEWCOMERS_OF_ADDRESS, Newcomers


class Door:
    """Newcomers by name, and who was turned away."""

    def __init__(self, most: int = 4, most_of_address: int = 2) -> None:
        self.newcomers = Newcomers(most, most_of_address)
        self.turned_away: list[str] = []

    def enter(self, name: str, host: str) -> None:
        self.newcomers.enter(name, host, lambda: self.turned_away.append(name))


def test_of_one_address_the_oldest_goes_when_there_are_too_many() -> None:
    door = Door()
    for name in "abcd":
        door.enter(name, "192.0.2.1")
    door.enter("x", "192.0.2.2")
    assert door.turned_away == ["a", "b"]
    assert len(door.newcomers) == 3


def test_of_too_many_in_all_the_oldest_of_the_address_with_the_most_goes() -> None:
    door = Door()
    door.enter("a", "192.0.2.1")
    door.enter("b", "192.0.2.2")
    door.enter("c", "192.0.2.2")
    door.enter("d", "192.0.2.3")
    door.enter("e", "192.0.2.4")
    assert door.turned_away == ["b"]
    door.enter("f", "192.0.2.5")
    assert door.turned_away == ["b", "a"], "one each: the one that came first"
    assert len(door.newcomers) == 4


def test_who_was_admitted_or_is_gone_is_in_nobodys_way() -> None:
    door = Door()
    for name in "abcdefgh":
        door.enter(name, "192.0.2.1")
        door.newcomers.leave(name)
        door.newcomers.leave(name)
    assert door.turned_away == []
    assert len(door.newcomers) == 0
    assert door.newcomers._by_source == {}, "nor does an address take memory"


def test_a_network_of_ipv6_counts_as_one_address_and_an_ipv4_address_is_one_however_it_is_written() -> None:
    door = Door(most=100)
    for number in range(4):
        door.enter(f"six {number}", f"2001:db8::{number}")
    door.enter("six elsewhere", "2001:db8:0:1::1")
    door.enter("link-local", "fe80::1%eth0")
    for host in ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.1"):
        door.enter(f"four {host}", host)
    assert door.turned_away == ["six 0", "six 1", "four 192.0.2.1"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_this_machines_own_may_have_all_places(host: str) -> None:
    door = Door()
    for name in "abcd":
        door.enter(name, host)
    assert door.turned_away == []
    door.enter("e", host)
    assert door.turned_away == ["a"]
    door.enter("other", "192.0.2.1")
    assert door.turned_away == ["a", "b"]


def test_one_address_leaves_room_for_others_by_default() -> None:
    assert 1 < MAX_NEWCOMERS_OF_ADDRESS < MAX_NEWCOMERS // 2
