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

import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar, cast, get_args

import msgspec
import trio

from tether import messages
from tether.credentials import CLOCK_LEEWAY_SECONDS
from tether.errors import (
    DeadlineExceeded,
    LinkClosed,
    LinkError,
    LinkFull,
    NotAMember,
    ProtocolViolation,
    TetherError,
    from_info,
)
from tether.identity import Identity
from tether.messages import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    SENDERS,
    Goodbye,
    Hello,
    LinkMessage,
    Ping,
    Refused,
    Welcome,
    decode_link,
    encode,
)
from tether.records import Role

log = logging.getLogger(__name__)

M = TypeVar("M")
R = TypeVar("R")

MAX_HELLO_BYTES = 64 << 10
"""Four credentials and some addresses take 3 KiB; strangers may not make this node hold a whole frame."""
MAX_WRITE_BYTES = 256 << 10
"""What one write takes at most (but always a whole frame), so that its deadline does not depend on the backlog."""
MAX_LEARNED_ORCHESTRATORS = 64
MAX_QUIET_SECONDS = 1.0
"""After so long without a message a ping is sent."""
_RENEWAL_DUE_SECONDS = 29 * 86_400.0
_STALL_GRACE_SECONDS = 0.25


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


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How patient and how big links are."""

    silence_seconds: float = 3.0
    """A peer that says nothing for so long is dead. This side is never silent for more than a third of it, nor for more
    than a second, so that nodes may differ in their patience upward of three seconds."""
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
    expiry_seconds: float = 60.0
    """How often it is checked whether a peer's membership ended."""
    renewal_seconds: float = 86_400.0
    """How often a link is begun anew while this machine's own membership ends soon: a new hello gets it renewed."""
    address_seconds: float = 0.5
    """How often the known addresses of orchestrators are looked at."""


class Link:
    """A link that is up, or was: who the peer is, and the way to send to it."""

    is_local = False
    """Whether this is the link to oneself."""

    def __init__(
        self,
        peer_id: str,
        *,
        roles: Iterable[Role],
        name: str,
        region: str,
        boot_id: str,
        addresses: tuple[str, ...] = (),
    ) -> None:
        self.peer_id = peer_id
        self.roles: frozenset[Role] = frozenset(roles)
        """What the peer said it is, within what its credential allows."""
        self.name = name
        self.region = region
        self.boot_id = boot_id
        """Another one after each start of the peer's process."""
        self.addresses = addresses
        """Where the peer can be dialled; empty for most."""

    @property
    def is_open(self) -> bool:
        """Whether the link is up."""
        raise NotImplementedError

    @property
    def num_buffered_bytes(self) -> int:
        """What waits to be written; 0 for the local link."""
        raise NotImplementedError

    def send(self, message: LinkMessage) -> None:
        """Put `message` into the link's buffer; never blocks, delivers in order.

        Raises `LinkClosed` when the link is down, `LinkFull` when the buffer is, and `ProtocolViolation` when the
        message is larger than `MAX_FRAME_BYTES`. In each case nothing was sent, and the link stays as it was.
        """
        raise NotImplementedError

    def close(self, reason: str = "") -> None:
        """Say `Goodbye` and close, after what waits is written (for at most `close_seconds`).

        `on_down` is called at once. The local link stays as it is.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {'+'.join(sorted(self.roles))} {self.peer_id[-8:]}>"


OnUp = Callable[[Link], None]
OnDown = Callable[[Link, str], None]
OnRefused = Callable[[str, TetherError], None]
_Handler = Callable[[Link, Any], None]


def _framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


_PING = _framed(encode(Ping()))


def _tag(message_type: type) -> str:
    return str(cast(type[msgspec.Struct], message_type).__struct_config__.tag)


_ALLOWED: dict[Role, frozenset[type]] = {
    role: frozenset(sent for sent, roles in SENDERS.items() if role in roles)
    for role in cast(tuple[Role, ...], ("gateway", "orchestrator", "worker", "operator"))
}


class _Frames:
    """Whole frames out of the pieces that a stream brings."""

    def __init__(self) -> None:
        self.limit = MAX_HELLO_BYTES
        self._buffer = bytearray()
        self._start = 0

    @property
    def is_between_frames(self) -> bool:
        return len(self._buffer) == self._start

    def feed(self, data: bytes) -> None:
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data

    def pop(self) -> bytes | None:
        """Return the next frame's payload, or None until it is whole; raise `ProtocolViolation` when it is too large."""
        begin = self._start + 4
        if len(self._buffer) < begin:
            return None
        size = int.from_bytes(self._buffer[self._start : begin], "big")
        if size > self.limit:
            raise ProtocolViolation(f"a frame of {size} bytes; {self.limit} is the most here")
        end = begin + size
        if len(self._buffer) < end:
            return None
        self._start = end
        return bytes(memoryview(self._buffer)[begin:end])


class _StreamLink(Link):
    """A link over a stream. `Links` decides what happens to it; this holds its buffer and its state."""

    def __init__(
        self,
        links: Links,
        stream: Stream,
        frames: _Frames,
        shown: Hello | Welcome,
        *,
        addresses: tuple[str, ...],
        expires_at: float,
        is_dialled: bool,
        settings: LinkSettings,
    ) -> None:
        super().__init__(
            stream.peer_id,
            roles=shown.roles,
            name=shown.name,
            region=shown.region,
            boot_id=shown.boot_id,
            addresses=addresses,
        )
        frames.limit = MAX_FRAME_BYTES
        self.stream = stream
        self.frames = frames
        self.expires_at = expires_at
        self.is_dialled = is_dialled
        self.allowed: frozenset[type] = frozenset().union(*(_ALLOWED[role] for role in self.roles))
        self.gone = trio.Event()
        """The link is down."""
        self.ended = trio.Event()
        """Nothing of it runs any more."""
        self.wake = trio.Event()
        self.reason: str | None = None
        self._links = links
        self._settings = settings
        self._waiting: deque[bytes] = deque()
        self._num_waiting_bytes = 0

    @property
    def is_open(self) -> bool:
        return self.reason is None

    @property
    def num_buffered_bytes(self) -> int:
        return self._num_waiting_bytes

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def send(self, message: LinkMessage) -> None:
        if self.reason is not None:
            raise LinkClosed(f"the link to {self.name} is closed: {self.reason}")
        payload = encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise ProtocolViolation(
                f"a {_tag(type(message))} message of {len(payload)} bytes; {MAX_FRAME_BYTES} is the most"
            )
        if self._num_waiting_bytes + len(payload) > self._settings.max_buffer_bytes:
            raise LinkFull(f"{self._num_waiting_bytes} bytes already wait to be sent to {self.name}")
        self.put(_framed(payload))

    def put(self, frame: bytes) -> None:
        """Queue a frame, full or not."""
        self._waiting.append(frame)
        self._num_waiting_bytes += len(frame)
        self.wake.set()

    def take(self) -> bytes:
        """Return all that waits, in one piece, up to about `MAX_WRITE_BYTES`; it counts until `written`."""
        taken: list[bytes] = []
        size = 0
        while self._waiting and size < MAX_WRITE_BYTES:
            frame = self._waiting.popleft()
            taken.append(frame)
            size += len(frame)
        return b"".join(taken)

    def written(self, num_bytes: int) -> None:
        self._num_waiting_bytes -= num_bytes

    def close(self, reason: str = "") -> None:
        self._links._close(self, reason)  # noqa: SLF001 - the two are one thing in two classes


class _LocalLink(Link):
    """The link to oneself: a bounded queue that a task drains."""

    is_local = True

    def __init__(
        self, peer_id: str, *, roles: frozenset[Role], name: str, region: str, boot_id: str, bound: int
    ) -> None:
        super().__init__(peer_id, roles=roles, name=name, region=region, boot_id=boot_id)
        self.allowed: frozenset[type] = frozenset().union(*(_ALLOWED[role] for role in roles))
        self.is_running = False
        self.wake = trio.Event()
        self.waiting: deque[LinkMessage] = deque()
        self._bound = bound

    @property
    def is_open(self) -> bool:
        return self.is_running

    @property
    def num_buffered_bytes(self) -> int:
        return 0

    def send(self, message: LinkMessage) -> None:
        if not self.is_running:
            raise LinkClosed("this node is not running")
        if type(message) not in self.allowed:
            raise ProtocolViolation(f"a node that is {'+'.join(sorted(self.roles))} may not send {_tag(type(message))}")
        if len(self.waiting) >= self._bound:
            raise LinkFull(f"{len(self.waiting)} messages already wait in this node")
        self.waiting.append(message)
        self.wake.set()

    def close(self, reason: str = "") -> None:
        """Do nothing: a node cannot part with itself."""


class _Question:
    """A request that waits for its reply."""

    def __init__(self, link: Link, reply_type: type) -> None:
        self.link = link
        self.reply_type = reply_type
        self.done = trio.Event()
        self.reply: Any = None
        self.reason = ""


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
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`identity` says this node's roles, shows its credentials and checks the others'; `clock` tells Unix seconds."""
        self._transport = transport
        self._identity = identity
        self._name = name
        self._region = region
        self._boot_id = boot_id
        self._settings = settings or LinkSettings()
        self._clock = clock
        self._local = _LocalLink(
            transport.peer_id,
            roles=identity.roles,
            name=name,
            region=region,
            boot_id=boot_id,
            bound=self._settings.max_local_messages,
        )
        self._links: dict[str, _StreamLink] = {}
        self._handlers: dict[type, _Handler] = {}
        self._on_up: list[OnUp] = []
        self._on_down: list[OnDown] = []
        self._on_refused: list[OnRefused] = []
        self._questions: dict[int, _Question] = {}
        self._request_ids = itertools.count(1)
        self._learned: dict[str, tuple[str, ...]] = {}
        self._targets: dict[str, tuple[str, ...]] = {}
        self._dialling: set[str] = set()
        self._look_again = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._is_closing = False
        for reply_type in get_args(messages.Reply):
            self.on(reply_type, self._answer)

    # --- what roles use ----------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        return self._transport.peer_id

    @property
    def name(self) -> str:
        """What people call this node."""
        return self._name

    @property
    def roles(self) -> frozenset[Role]:
        """This node's roles."""
        return self._identity.roles

    @property
    def local(self) -> Link:
        """The link to oneself: always open while `run` runs; never touches the network.

        What is sent on it arrives at this node's own handlers with this same link as its sender, later, in order, and
        never from inside `send`. `on_up` is called for it at start, and `on_down` at the end, where the node has
        several roles; a node of one role has nobody in itself to talk to. A handler that raises is logged, and the next
        message is its own.
        """
        return self._local

    @property
    def up(self) -> tuple[Link, ...]:
        """The links that are up, the local one first where the node has several roles."""
        own = (self._local,) if self._local.is_open and self._has_several_roles else ()
        return (*own, *self._links.values())

    @property
    def orchestrator_addresses(self) -> tuple[str, ...]:
        """Where orchestrators can be dialled, as far as this node knows: itself, its links' peers, and hearsay."""
        own = self._transport.addresses if "orchestrator" in self.roles else ()
        return tuple(dict.fromkeys((*own, *(a for known in self._learned.values() for a in known))))

    def get(self, peer_id: str) -> Link | None:
        """Return the peer's link, the local one for this node's own id, or None when it has none that is up."""
        if peer_id == self._local.peer_id:
            return self._local if self._local.is_open else None
        return self._links.get(peer_id)

    def with_role(self, role: Role) -> tuple[Link, ...]:
        """Return the links that are up to peers of this role."""
        return tuple(link for link in self.up if role in link.roles)

    def on(self, message_type: type[M], handler: Callable[[Link, M], None]) -> None:
        """Hand each message of this type to `handler`; raise `ValueError` where the type has a handler already.

        A handler is called synchronously and in order, so it must not take long. A message of a type without a handler
        closes the link that it came on. Replies are taken by `ask`.
        """
        if message_type in self._handlers:
            raise ValueError(f"{_tag(message_type)} has a handler already")
        self._handlers[message_type] = handler

    def on_up(self, callback: OnUp) -> None:
        """Call `callback(link)` once for each link that comes up, before any of its messages."""
        self._on_up.append(callback)

    def on_down(self, callback: OnDown) -> None:
        """Call `callback(link, reason)` once for each link that was up, after the last of its messages."""
        self._on_down.append(callback)

    def on_refused(self, callback: OnRefused) -> None:
        """Call `callback(address, error)` each time a dialled peer refuses this node, or is itself no member."""
        self._on_refused.append(callback)

    async def ask(
        self,
        link: Link,
        make_message: Callable[[int], LinkMessage],
        reply_type: type[R],
        *,
        timeout_seconds: float = 5.0,
    ) -> R:
        """Send `make_message(request_id)` and return the reply with that `request_id`.

        Raises what `send` raises, `LinkClosed` when the link goes down meanwhile, and `DeadlineExceeded` when no reply
        came in time. A reply that says an error is returned as it is.
        """
        request_id = next(self._request_ids)
        question = _Question(link, reply_type)
        self._questions[request_id] = question
        try:
            link.send(make_message(request_id))
            with trio.fail_after(timeout_seconds):
                await question.done.wait()
        except trio.TooSlowError as exc:
            raise DeadlineExceeded(f"{link.name} did not answer within {timeout_seconds:g} s") from exc
        finally:
            del self._questions[request_id]
        if question.reply is None:
            raise LinkClosed(f"the link to {link.name} closed before it answered: {question.reason}")
        return cast(R, question.reply)

    def _answer(self, link: Link, reply: messages.Reply) -> None:
        question = self._questions.get(reply.request_id)
        if question is None or question.link is not link or not isinstance(reply, question.reply_type):
            log.debug("nobody waits for a reply", extra={"action": "late_reply", "peer_id": link.peer_id})
            return
        question.reply = reply
        question.done.set()

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the transport and all links until cancelled or closed; started when the transport listens.

        Raises what the transport raises, `PortTaken` among it.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await nursery.start(self._transport.run, self._accept)
                    nursery.start_soon(self._drain_local)
                    nursery.start_soon(self._watch_expiry)
                    self._local.is_running = True
                    if self._has_several_roles:
                        self._announce_local()
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._stop()
        except BaseExceptionGroup as group:
            raise _only(group) from group.__cause__

    async def close(self, reason: str = "") -> None:
        """Say `Goodbye` on every link, wait shortly for it to be written, and let `run` return."""
        self._is_closing = True
        open_links = list(self._links.values())
        for link in open_links:
            link.close(reason)
        with trio.move_on_after(self._settings.close_seconds):
            for link in open_links:
                await link.ended.wait()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _stop(self) -> None:
        self._is_closing = True
        for link in list(self._links.values()):
            self._down(link, "this node stops")
        if self._local.is_running:
            self._local.is_running = False
            self._fail_questions(self._local, "this node stops")
            if self._has_several_roles:
                self._call_on_down(self._local, "this node stops")

    @property
    def _has_several_roles(self) -> bool:
        return len(self.roles) > 1

    def _announce_local(self) -> None:
        for callback in self._on_up:
            callback(self._local)

    async def _drain_local(self) -> None:
        link = self._local
        while True:
            if not link.waiting:
                link.wake = trio.Event()
                await link.wake.wait()
            # Only what is there now: a handler that sends to its own node again must let others run in between.
            for _ in range(len(link.waiting)):
                message = link.waiting.popleft()
                handler = self._handlers.get(type(message))
                if handler is None:
                    log.error("no role of this node takes %s", _tag(type(message)), extra={"action": "no_handler"})
                    continue
                try:
                    handler(link, message)
                except Exception:
                    log.exception("the handler of %s failed", _tag(type(message)), extra={"action": "handler_failed"})
            await trio.lowlevel.checkpoint()

    async def _watch_expiry(self) -> None:
        while True:
            await trio.sleep(self._settings.expiry_seconds)
            now = self._clock()
            for link in list(self._links.values()):
                if now > link.expires_at + CLOCK_LEEWAY_SECONDS:
                    link.close("the peer's membership ended")

    # --- a link's beginning ------------------------------------------------------------------------------------------

    async def _accept(self, stream: Stream) -> None:
        frames = _Frames()
        hello: LinkMessage | None = None
        try:
            with trio.move_on_after(self._settings.hello_seconds):
                hello = await _first(stream, frames)
            if hello is None:
                log.info("no hello from %s in time", stream.peer_id, extra={"action": "no_hello"})
                stream.abort()
                return
            link, welcome = self._check_hello(stream, frames, hello)
        except LinkError as exc:
            await self._refuse(stream, exc)
            return
        link.put(_framed(encode(welcome)))
        self._up(link)
        await self._serve(link)

    def _check_hello(self, stream: Stream, frames: _Frames, hello: LinkMessage) -> tuple[_StreamLink, Welcome]:
        if self._is_closing:
            raise LinkClosed("this node is stopping")
        if not isinstance(hello, Hello):
            raise ProtocolViolation(f"a link begins with hello, not with {_tag(type(hello))}")
        expires_at = self._check_peer(stream.peer_id, hello)
        now = self._clock()
        own_chain = self._identity.chain(now)
        if not self._is_preferred(stream.peer_id, hello.boot_id, is_dialled=False):
            raise LinkClosed("this node keeps the link that it dialled itself")
        addresses = tuple(a for a in hello.addresses if a.endswith(f"/p2p/{stream.peer_id}"))[:8]
        link = _StreamLink(
            self,
            stream,
            frames,
            hello,
            addresses=addresses,
            expires_at=expires_at,
            is_dialled=False,
            settings=self._settings,
        )
        welcome = Welcome(
            PROTOCOL_VERSION,
            self._boot_id,
            tuple(sorted(self.roles)),
            self._name,
            self._region,
            own_chain,
            self.orchestrator_addresses,
            self._identity.renew(hello.chain, now),
        )
        return link, welcome

    def _check_peer(self, peer_id: str, shown: Hello | Welcome) -> float:
        """Return until when the peer is what it says; raise `ProtocolViolation` or `NotAMember` where it is not."""
        if shown.protocol != PROTOCOL_VERSION:
            raise ProtocolViolation(
                f"one side speaks version {shown.protocol} of the link protocol and the other {PROTOCOL_VERSION}; "
                "use the same version of Tether on both"
            )
        if peer_id == self.peer_id:
            raise ProtocolViolation("a node needs no link to itself")
        membership = self._identity.verify(shown.chain, peer_id, self._clock())
        if not shown.roles:
            raise ProtocolViolation("a peer has at least one role")
        if beyond := frozenset(shown.roles) - membership.roles:
            raise NotAMember(f"the peer's credential does not make it {', '.join(sorted(beyond))}")
        return membership.expires_at

    def _is_preferred(self, peer_id: str, boot_id: str, *, is_dialled: bool) -> bool:
        """Whether a new link to this peer is to replace the one that there may be.

        The newest wins, except between two live processes that dialled each other at once: both keep the link that the
        smaller id dialled, whichever of the two came up last on which side.
        """
        old = self._links.get(peer_id)
        if old is None or old.boot_id != boot_id or old.is_dialled == is_dialled:
            return True
        return is_dialled == (self.peer_id < peer_id)

    async def _refuse(self, stream: Stream, error: LinkError) -> None:
        level = logging.INFO if isinstance(error, LinkClosed) else logging.WARNING
        log.log(level, "refused a link from %s: %s", stream.peer_id, error.message, extra={"action": "link_refused"})
        with trio.move_on_after(self._settings.hello_seconds):
            if await self._write_whole(stream, _framed(encode(Refused(error.to_info())))):
                # The peer closes when it has read the reason; closing first could take the reason from it.
                while await stream.read():
                    pass
        stream.abort()

    async def _dial(self, address: str) -> None:
        """Dial, and bring the link up. Raises `LinkError` (`NotAMember` from either side's view) or `UsageError`."""
        stream = await self._transport.dial(address)
        frames = _Frames()
        now = self._clock()
        try:
            hello = Hello(
                PROTOCOL_VERSION,
                self._boot_id,
                tuple(sorted(self.roles)),
                self._name,
                self._region,
                self._identity.chain(now),
                self._transport.addresses if "orchestrator" in self.roles else (),
            )
            answer: LinkMessage | None = None
            with trio.move_on_after(self._settings.hello_seconds):
                if await self._write_whole(stream, _framed(encode(hello))):
                    answer = await _first(stream, frames)
            link, welcome = self._check_answer(stream, frames, answer)
            if welcome.renewed:
                await trio.to_thread.run_sync(self._identity.store_renewed, welcome.renewed, now)
        except BaseException:
            stream.abort()
            raise
        if not self._is_preferred(link.peer_id, link.boot_id, is_dialled=True) or self._is_closing:
            stream.abort()
            return
        self._learn(welcome.orchestrators)
        self._up(link)
        if self._nursery is None:
            raise LinkClosed("this node is not running")
        self._nursery.start_soon(self._serve, link)
        await trio.to_thread.run_sync(self._identity.network.remember_addresses, self.orchestrator_addresses)

    def _check_answer(self, stream: Stream, frames: _Frames, answer: LinkMessage | None) -> tuple[_StreamLink, Welcome]:
        if isinstance(answer, Refused):
            error = from_info(answer.error)
            raise error if isinstance(error, LinkError) else LinkError(error.message)
        if answer is None:
            raise LinkClosed(f"no answer to hello within {self._settings.hello_seconds:g} s")
        if not isinstance(answer, Welcome):
            raise ProtocolViolation(f"hello is answered with welcome, not with {_tag(type(answer))}")
        expires_at = self._check_peer(stream.peer_id, answer)
        if "orchestrator" not in answer.roles:
            raise NotAMember("the peer is not an orchestrator")
        link = _StreamLink(
            self,
            stream,
            frames,
            answer,
            addresses=tuple(a for a in answer.orchestrators if a.endswith(f"/p2p/{stream.peer_id}")),
            expires_at=expires_at,
            is_dialled=True,
            settings=self._settings,
        )
        return link, answer

    def _learn(self, addresses: Iterable[str]) -> None:
        by_peer = _by_peer(addresses)
        by_peer.pop(self.peer_id, None)
        for peer_id, known in by_peer.items():
            if self._learned.get(peer_id) != known:
                self._learned.pop(peer_id, None)
                self._learned[peer_id] = known[:8]
                self._look_again.set()
        while len(self._learned) > MAX_LEARNED_ORCHESTRATORS:
            del self._learned[next(iter(self._learned))]

    # --- a link's life -----------------------------------------------------------------------------------------------

    def _up(self, link: _StreamLink) -> None:
        if (old := self._links.get(link.peer_id)) is not None:
            self._down(old, "a newer link took its place")
        self._links[link.peer_id] = link
        self._transport.admit(link.stream)
        if "orchestrator" in link.roles:
            self._learn(link.addresses)
        log.info(
            "link up: %s (%s)",
            link.name,
            "+".join(sorted(link.roles)),
            extra={"action": "link_up", "peer_id": link.peer_id},
        )
        try:
            for callback in self._on_up:
                callback(link)
        except Exception:
            log.exception("what is called when a link comes up failed", extra={"action": "handler_failed"})
            self._down(link, "this node failed to take the link")

    def _down(self, link: _StreamLink, reason: str, *, is_graceful: bool = False) -> None:
        """Take the link down once: nothing is received from it any more, and its peer may come anew."""
        if link.reason is not None:
            if not is_graceful:
                link.stream.abort()
            return
        link.reason = reason
        link.gone.set()
        link.wake.set()
        if self._links.get(link.peer_id) is link:
            del self._links[link.peer_id]
        if not is_graceful:
            self._cut(link)
        log.info("link down: %s: %s", link.name, reason, extra={"action": "link_down", "peer_id": link.peer_id})
        self._fail_questions(link, reason)
        self._call_on_down(link, reason)

    def _cut(self, link: _StreamLink) -> None:
        link.stream.abort()
        if link.peer_id not in self._links:
            self._transport.expel(link.peer_id)

    def _call_on_down(self, link: Link, reason: str) -> None:
        for callback in self._on_down:
            try:
                callback(link, reason)
            except Exception:
                log.exception("what is called when a link goes down failed", extra={"action": "handler_failed"})

    def _fail_questions(self, link: Link, reason: str) -> None:
        for question in self._questions.values():
            if question.link is link and question.reply is None:
                question.reason = reason
                question.done.set()

    def _close(self, link: _StreamLink, reason: str) -> None:
        if link.reason is None:
            link.put(_framed(encode(Goodbye(reason))))
            self._down(link, reason or "closed by this node", is_graceful=True)

    async def _serve(self, link: _StreamLink) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, link)
                self._down(link, await self._read(link))
                nursery.cancel_scope.cancel()
        finally:
            self._down(link, "this node stops")
            self._cut(link)
            link.ended.set()

    async def _write(self, link: _StreamLink) -> None:
        """Write all that waits, in one go and again; ping when nothing does; after a graceful close, wait for the end."""
        while True:
            if not link.has_waiting:
                if not link.is_open:
                    break
                link.wake = trio.Event()
                with trio.move_on_after(min(MAX_QUIET_SECONDS, self._settings.silence_seconds / 3)) as quiet:
                    await link.wake.wait()
                if quiet.cancelled_caught:
                    link.put(_PING)
            data = link.take()
            if not await self._write_whole(link.stream, data):
                self._down(link, "a write failed, or took too long")
                return
            link.written(len(data))
        # The peer ends the stream when it has read the goodbye; ending it first could take what it has not read.
        await trio.sleep(self._settings.close_seconds)
        link.stream.abort()

    async def _write_whole(self, stream: Stream, data: bytes) -> bool:
        """Write, and say whether it went out. A write is never cancelled halfway: that would garble all that follows."""
        try:
            with trio.CancelScope(shield=True), trio.fail_after(self._settings.write_seconds):
                await stream.write(data)
        except (LinkClosed, trio.TooSlowError):
            stream.abort()
            return False
        await trio.lowlevel.checkpoint_if_cancelled()
        return True

    async def _read(self, link: _StreamLink) -> str:
        """Dispatch what arrives, in order, until there is a reason to stop; return it."""
        while True:
            try:
                # Once it is closed what still arrives is read, so that the peer is not stuck, but not heard.
                while link.is_open and (payload := link.frames.pop()) is not None:
                    if (reason := self._receive(link, payload)) is not None:
                        return reason
            except ProtocolViolation as exc:
                log.warning("closing the link to %s: %s", link.name, exc.message, extra={"action": "link_violation"})
                return f"protocol violation: {exc.message}"
            data = await self._read_some(link.stream)
            if data is None:
                return f"silent for {self._settings.silence_seconds:g} s"
            if not data:
                return "the connection ended" + ("" if link.frames.is_between_frames else " in the middle of a frame")
            if link.is_open:
                link.frames.feed(data)

    async def _read_some(self, stream: Stream) -> bytes | None:
        with trio.move_on_after(self._settings.silence_seconds):
            return await stream.read()
        # This whole process may have been stopped for that long: then what came meanwhile is there to be read.
        with trio.move_on_after(min(_STALL_GRACE_SECONDS, self._settings.silence_seconds / 4)):
            return await stream.read()
        return None

    def _receive(self, link: _StreamLink, payload: bytes) -> str | None:
        """Hand one message to its handler; return why the link is to end, if it is."""
        message = decode_link(payload)
        kind = type(message)
        if kind is Ping:
            return None
        if isinstance(message, Goodbye):
            return f"the peer left: {message.reason}" if message.reason else "the peer left"
        if kind not in link.allowed:
            raise ProtocolViolation(f"{'+'.join(sorted(link.roles))} may not send {_tag(kind)}")
        handler = self._handlers.get(kind)
        if handler is None:
            raise ProtocolViolation(f"nobody here takes {_tag(kind)}")
        try:
            handler(link, message)
        except Exception:
            log.exception(
                "the handler of %s failed; closing the link to %s",
                _tag(kind),
                link.name,
                extra={"action": "handler_failed", "peer_id": link.peer_id},
            )
            return f"this node failed to handle {_tag(kind)}"
        return None

    # --- dialling ----------------------------------------------------------------------------------------------------

    async def keep_dialling(self, addresses: Callable[[], Iterable[str]]) -> None:
        """Keep one link to every orchestrator that is known; runs until cancelled or closed, while `run` runs.

        `addresses()` is called in a thread, again and again, and may read files; what `Welcome`s tell of further
        orchestrators is dialled too, and this node itself never is.
        """
        async with trio.open_nursery() as nursery:
            while not self._is_closing:
                self._look_again = trio.Event()
                given = await trio.to_thread.run_sync(lambda: tuple(addresses()))
                targets = _by_peer((*given, *(a for known in self._learned.values() for a in known)))
                targets.pop(self.peer_id, None)
                self._targets = targets
                for peer_id in targets:
                    if peer_id not in self._dialling:
                        self._dialling.add(peer_id)
                        nursery.start_soon(self._keep_dialling_peer, peer_id)
                with trio.move_on_after(self._settings.address_seconds):
                    await self._look_again.wait()
            nursery.cancel_scope.cancel()

    async def _keep_dialling_peer(self, peer_id: str) -> None:
        pause = self._settings.min_redial_seconds
        said: str | None = None
        try:
            while peer_id in self._targets and not self._is_closing:
                since = trio.current_time()
                if (link := self._links.get(peer_id)) is not None:
                    await self._until_redial(link)
                    said = None
                    if trio.current_time() - since > self._settings.max_redial_seconds:
                        pause = self._settings.min_redial_seconds
                else:
                    error = await self._dial_any(self._targets[peer_id])
                    if error is None and peer_id in self._links:
                        continue
                    if error is not None and error.message != said:
                        said = error.message
                        log.warning(
                            "no link to the orchestrator %s: %s", peer_id, said, extra={"action": "dial_failed"}
                        )
                    if isinstance(error, NotAMember):
                        pause = self._settings.refused_redial_seconds
                await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret
                pause = min(2 * pause, max(pause, self._settings.max_redial_seconds))
        finally:
            self._dialling.discard(peer_id)

    async def _until_redial(self, link: _StreamLink) -> None:
        """Wait until the link is gone; meanwhile begin it anew, once a day, while this machine's membership ends soon."""
        while link.is_open:
            with trio.move_on_after(self._settings.renewal_seconds):
                await link.gone.wait()
            now = self._clock()
            if link.is_open and link.is_dialled and self._identity.expires_at(now) - now < _RENEWAL_DUE_SECONDS:
                await self._dial_any(link.addresses)

    async def _dial_any(self, addresses: Iterable[str]) -> TetherError | None:
        """Dial a peer's addresses in turn; return None when one worked (or a link came up meanwhile), or the last error."""
        error: TetherError | None = None
        for address in addresses:
            try:
                await self._dial(address)
            except TetherError as exc:
                error = exc
                if isinstance(exc, NotAMember):
                    for callback in self._on_refused:
                        callback(address, exc)
            else:
                return None
            if _peer_of(address) in self._links:
                return None
        return error


def _peer_of(address: str) -> str:
    return address.rpartition("/p2p/")[2]


def _by_peer(addresses: Iterable[str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for address in addresses:
        peer_id = _peer_of(address)
        if address not in (known := found.get(peer_id, ())):
            found[peer_id] = (*known, address)
    return found


async def _first(stream: Stream, frames: _Frames) -> LinkMessage:
    while (payload := frames.pop()) is None:
        data = await stream.read()
        if not data:
            raise LinkClosed("the connection ended before the link began")
        frames.feed(data)
    return decode_link(payload)


def _only(group: BaseExceptionGroup) -> BaseException:
    """Return the one error inside a nursery's group, or the group where there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
