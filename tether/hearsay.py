"""Where orchestrators can be dialled, as far as peers have said."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import trio

MAX_LEARNED_ORCHESTRATORS = 64
MAX_ADDRESSES = 8
"""What is kept of one orchestrator."""
MAX_ADDRESS_CHARS = 512
"""The longest name of a host, a port and a peer id make fewer."""


class Hearsay:
    """What peers have said of where orchestrators are; of too many, those that were told of last."""

    def __init__(self, own_id: str) -> None:
        self._own_id = own_id
        self._learned: dict[str, tuple[str, ...]] = {}
        self.changed = trio.Event()
        """Something new was said; whoever waits for it puts another event here first."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """All that is known; never this node's own."""
        return tuple(address for known in self._learned.values() for address in known)

    def learn(self, addresses: Iterable[str]) -> None:
        """Take in what a peer says; what it says of an orchestrator replaces what was known of that."""
        known_now = by_peer(addresses)
        known_now.pop(self._own_id, None)
        for peer_id, known in known_now.items():
            if self._learned.get(peer_id) != known:
                self._learned.pop(peer_id, None)
                self._learned[peer_id] = known[:MAX_ADDRESSES]
                self.changed.set()
        while len(self._learned) > MAX_LEARNED_ORCHESTRATORS:
            del self._learned[next(iter(self._learned))]


def peer_of(address: str) -> str:
    """Return the peer id that an address ends in."""
    return address.rpartition("/p2p/")[2]


def own_addresses(addresses: Iterable[str], peer_id: str) -> tuple[str, ...]:
    """Return those of the addresses that are this peer's, as many as are kept of one."""
    own = (address for address in addresses if peer_of(address) == peer_id and len(address) <= MAX_ADDRESS_CHARS)
    return tuple(islice(dict.fromkeys(own), MAX_ADDRESSES))


def by_peer(addresses: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return addresses by the peer that each is of, in their order, each once."""
    found: dict[str, tuple[str, ...]] = {}
    for address in addresses:
        peer_id = peer_of(address)
        if address not in (known := found.get(peer_id, ())):
            found[peer_id] = (*known, address)
    return found
