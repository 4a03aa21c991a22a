"""Connections of those who are not admitted yet: bounded in all and by address, so that strangers shut nobody out.

Anybody can open connections and say nothing on them. What they may hold is a share of their own, beside that of the peers
that were admitted; and where it is used up, whoever holds most of it pays.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable

MAX_NEWCOMERS = 256
MAX_NEWCOMERS_OF_ADDRESS = 32
"""A machine room behind one address links at once after a restart; what does not fit dials again within a second."""


class Newcomers:
    """Who came and is not admitted yet; of too many, the oldest of the address with the most is closed."""

    def __init__(self, most: int = MAX_NEWCOMERS, most_of_address: int = MAX_NEWCOMERS_OF_ADDRESS) -> None:
        self._most = most
        self._most_of_address = most_of_address
        self._by_source: dict[str, dict[Hashable, Callable[[], None]]] = {}
        self._sources: dict[Hashable, str] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def enter(self, newcomer: Hashable, host: str, close: Callable[[], None]) -> None:
        """Take somebody in who comes from the IP address `host`; calls the `close` of whoever has to go for it."""
        source, most = _source(host), self._most_of_address
        if is_loopback(host):
            most = self._most  # the roles of one machine, which start together
        if len(self._by_source.get(source, ())) >= most:
            self._turn_away(source)
        elif len(self._sources) >= self._most:
            self._turn_away(max(self._by_source, key=lambda each: len(self._by_source[each])))
        self._by_source.setdefault(source, {})[newcomer] = close
        self._sources[newcomer] = source

    def leave(self, newcomer: Hashable) -> None:
        """Forget somebody who was admitted, or is gone; nothing happens where that is known already."""
        if (source := self._sources.pop(newcomer, None)) is not None:
            of_source = self._by_source[source]
            del of_source[newcomer]
            if not of_source:
                del self._by_source[source]

    def _turn_away(self, source: str) -> None:
        oldest, close = next(iter(self._by_source[source].items()))
        self.leave(oldest)
        close()


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_loopback(host: str) -> bool:
    """Whether an IP address is this machine's own."""
    return _plain(host).is_loopback


def _source(host: str) -> str:
    """Return what counts as one address: of IPv6 a network of 64 bits, which is what one customer has."""
    address = _plain(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
