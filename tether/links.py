"""Links: one long-lived, authenticated, multiplexed stream to each peer, and everything that goes over it.

A link begins with `Hello` and `Welcome`, in which each side shows its credentials; from then on both send typed messages
in frames of four bytes of length and one JSON object. What arrives is checked against the peer's roles and handed to the
one handler of its type, synchronously and in order. What is sent is put into a bounded buffer, and one task writes all
that waits in one go: under load the price of encryption and of a frame is paid once for many messages.

Nothing here knows libp2p: a `Transport` brings authenticated streams, `tether.transport` has the real one and
`tether.testing` one in memory.

Rules that hold for every link:

- The stream's authenticated peer counts; an id inside a payload never does.
- Silence for `silence_seconds` is death. `on_up` and `on_down` are called once each, in that order, and for two links of
  the same peer never interleaved: the older one is down before the newer one is up.
- The newest link of a peer wins. Two peers that dial each other at the same time settle on the link that the peer with
  the smaller id dialled.
- A malformed, oversized, forbidden or unexpected frame closes that link alone, and so does a handler that raises: the
  state that the handler kept for this peer cannot be trusted any more, and a fresh link begins without it. A handler
  therefore catches what its own `send` to other links raises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from tether.identity import Identity
from tether.messages import LinkMessage
from tether.records import Role

M = TypeVar("M")
R = TypeVar("R")


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

    def admit(self, peer_id: str) -> None:
        """Let this peer use topics, and keep its connections."""

    def expel(self, peer_id: str) -> None:
        """Take `admit` back, and close the peer's connections."""

    async def publish(self, topic: str, payload: bytes) -> None:
        """Tell whoever is subscribed; the message may be lost."""

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        """Return a channel of (origin's peer id, payload) of what admitted peers publish; the newest is lost when full.

        Closing the channel ends the subscription.
        """


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How patient and how big links are."""

    silence_seconds: float = 3.0
    """A peer that says nothing for so long is dead; a third of it is the longest that this side stays silent."""
    hello_seconds: float = 3.0
    """From a stream's beginning to its accepted `Hello`."""
    write_seconds: float = 5.0
    """The longest that one piece may take to be written; then the connection is aborted."""
    max_buffer_bytes: int = 16 << 20
    """What may wait to be written on one link."""
    max_local_messages: int = 65_536
    """What may wait on the link to oneself."""
    min_redial_seconds: float = 0.2
    max_redial_seconds: float = 15.0
    """Pauses between dials grow from the one to the other, with jitter."""
    refused_redial_seconds: float = 30.0
    """The pause after a peer refused this node as no member."""
    close_seconds: float = 1.0
    """How long a graceful close waits for what is still to be written."""


class Link:
    """A link that is up, or was: who the peer is, and the way to send to it."""

    peer_id: str
    roles: frozenset[Role]
    """What the peer said it is, within what its credential allows."""
    name: str
    region: str
    boot_id: str
    """Another one after each start of the peer's process."""
    addresses: tuple[str, ...]
    """Where the peer can be dialled; empty for most."""
    is_local: bool
    """This is the link to oneself."""

    @property
    def is_open(self) -> bool:
        """Whether `send` can work."""
        raise NotImplementedError

    @property
    def num_buffered_bytes(self) -> int:
        """What waits to be written."""
        raise NotImplementedError

    def send(self, message: LinkMessage) -> None:
        """Put `message` into the link's buffer; never blocks, delivers in order.

        Raises `LinkClosed` when the link is down, `LinkFull` when the buffer is, and `ProtocolViolation` when the
        message is larger than `MAX_FRAME_BYTES`. In each case nothing was sent, and the link stays as it was.
        """
        raise NotImplementedError

    def close(self, reason: str = "") -> None:
        """Say `Goodbye` and close, after what waits is written (for at most `close_seconds`); `on_down` is called at once."""
        raise NotImplementedError


OnUp = Callable[[Link], None]
OnDown = Callable[[Link, str], None]
OnRefused = Callable[[str, Exception], None]


class Links:
    """All links of one node: accepts them, dials them, keeps them alive, dispatches what arrives.

    Build it, register handlers, then `run`. Everything is to be called from the trio thread that runs it.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        *,
        name: str,
        region: str,
        boot_id: str,
        settings: LinkSettings | None = None,
    ) -> None:
        """`identity` says this node's roles, shows its credentials and checks the others'."""
        raise NotImplementedError

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        raise NotImplementedError

    @property
    def local(self) -> Link:
        """The link to oneself: always open while `run` runs; never touches the network.

        What is sent on it arrives at this node's own handlers with this same link as its sender, later, in order, and
        never from inside `send`. `on_up` is called for it at start, and `on_down` at the end, where the node has
        several roles; a node of one role has nobody in itself to talk to.
        """
        raise NotImplementedError

    @property
    def up(self) -> tuple[Link, ...]:
        """The links that are up, the local one included where the node has several roles."""
        raise NotImplementedError

    def get(self, peer_id: str) -> Link | None:
        """Return the peer's link, the local one for this node's own id, or None when it has none."""
        raise NotImplementedError

    def with_role(self, role: Role) -> tuple[Link, ...]:
        """Return the links that are up to peers of this role."""
        raise NotImplementedError

    def on(self, message_type: type[M], handler: Callable[[Link, M], None]) -> None:
        """Hand each message of this type to `handler`; raise `ValueError` where the type has a handler already.

        A handler is called synchronously and in order, so it must not take long. A message of a type without a handler
        closes the link that it came on.
        """
        raise NotImplementedError

    def on_up(self, callback: OnUp) -> None:
        """Call `callback(link)` once for each link that comes up, before any of its messages."""
        raise NotImplementedError

    def on_down(self, callback: OnDown) -> None:
        """Call `callback(link, reason)` once for each link that was up, after the last of its messages."""
        raise NotImplementedError

    def on_refused(self, callback: OnRefused) -> None:
        """Call `callback(address, error)` each time a dialled peer refuses this node, or is itself no member."""
        raise NotImplementedError

    async def ask(
        self,
        link: Link,
        make_message: Callable[[int], LinkMessage],
        reply_type: type[R],
        *,
        timeout_seconds: float = 5.0,
    ) -> R:
        """Send `make_message(request_id)` and return the reply (`Jobs` or `Health`) with that `request_id`.

        Raises what `send` raises, `LinkClosed` when the link goes down meanwhile, and `DeadlineExceeded` when no reply
        came in time. A reply that says an error is returned as it is.
        """
        raise NotImplementedError

    async def keep_dialling(self, addresses: Callable[[], Iterable[str]]) -> None:
        """Keep one link to every orchestrator that is known; runs until cancelled, while `run` runs.

        `addresses()` is called in a thread, again and again, and may read files; what `Welcome`s tell of further
        orchestrators is dialled too, and this node itself never is.
        """
        raise NotImplementedError

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the transport and all links until cancelled or closed; started when the transport listens."""
        raise NotImplementedError

    async def close(self, reason: str = "") -> None:
        """Say `Goodbye` on every link, wait shortly for it to be written, and let `run` return."""
        raise NotImplementedError


_Handler = Callable[[Link, Any], None]
