"""What links and topics ask of whatever carries them: authenticated streams, and news that may be lost.

`tether.transport` has the real one, over libp2p, and `tether.testing` one in memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio


class Stream(Protocol):
    """One ordered stream of bytes to an authenticated peer."""

    @property
    def peer_id(self) -> str:
        """The peer at the other end, as the encryption handshake proved it."""

    async def read(self) -> bytes:
        """Return the next bytes, as many as are there; b"" at the end, however it came. Safe to cancel."""

    async def write(self, data: bytes) -> None:
        """Return when the transport has taken all of `data`; raise `LinkClosed` when it cannot. Never cancel it."""

    def abort(self) -> None:
        """Close the stream and the connection under it; returns at once, never raises, may be repeated."""


StreamHandler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """Authenticated streams between peers, and topics that may lose any message."""

    @property
    def peer_id(self) -> str:
        """This node's peer id."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node, each ending in `/p2p/<peer id>`; known once `run` has started."""

    async def run(
        self, on_stream: StreamHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled; `on_stream` runs for the life of each stream that a peer opens.

        Raises `PortTaken` before it starts where a listen address is in use.
        """

    async def dial(self, address: str) -> Stream:
        """Return a new stream to the peer at `address` (`…/p2p/<peer id>`), on a connection of its own.

        Raises `UsageError` for an address of another form, `LinkClosed` when the peer cannot be reached in time or is
        not the one named.
        """

    def admit(self, stream: Stream) -> None:
        """The peer proved on this stream that it is a member: keep the connection under it, and let it use topics.

        Of several connections of a peer the one admitted last counts.
        """

    def expel(self, peer_id: str) -> None:
        """Take `admit` back, and close the connection that was admitted."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Tell whoever is subscribed; the message may be lost."""

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        """Return a channel of (origin's peer id, payload) of what admitted peers publish; the newest is lost when full.

        Closing the channel ends the subscription.
        """
