"""One link: who its peer is, its frames, and the bounded buffer of what waits to be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import cast

import msgspec
import trio

from tether.credentials import Membership
from tether.errors import LinkClosed, LinkFull, ProtocolViolation
from tether.messages import MAX_FRAME_BYTES, SENDERS, Hello, LinkMessage, Ping, Welcome, decode_link, encode
from tether.records import Role
from tether.wire import Stream

MAX_HELLO_BYTES = 64 << 10
"""Four credentials and some addresses take 3 KiB; strangers may not make this node hold a whole frame."""
MAX_WRITE_BYTES = 256 << 10
"""What one write takes at most (but always a whole frame), so that its deadline does not depend on the backlog."""
MIN_FRAME_BYTES_PER_SECOND = 4 << 10
"""A peer that sends a frame more slowly is as good as silent."""
_STALL_GRACE_SECONDS = 0.25


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
    membership: Membership | None = None
    """What the peer's credentials prove; None of oneself."""

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


# --- frames ------------------------------------------------------------------------------------------------------------


def framed(payload: bytes) -> bytes:
    """Return a payload as a frame: its length in four bytes, and itself."""
    return len(payload).to_bytes(4, "big") + payload


PING = framed(encode(Ping()))


def tag_of(message_type: type) -> str:
    """Return what a type of messages is called in its frames."""
    return str(cast(type[msgspec.Struct], message_type).__struct_config__.tag)


_ALLOWED: dict[Role, frozenset[type]] = {
    role: frozenset(sent for sent, roles in SENDERS.items() if role in roles)
    for role in cast(tuple[Role, ...], ("gateway", "orchestrator", "worker", "operator"))
}


def allowed_from(roles: Iterable[Role]) -> frozenset[type]:
    """Return the types of messages that a peer of these roles may send."""
    return frozenset().union(*(_ALLOWED[role] for role in roles))


class Frames:
    """Whole frames out of the pieces that a stream brings."""

    def __init__(self) -> None:
        self.limit = MAX_HELLO_BYTES
        self.num_taken = 0
        """Whole frames since the beginning."""
        self._buffer = bytearray()
        self._start = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether all that came is whole frames that were taken."""
        return len(self._buffer) == self._start

    @property
    def num_partial_bytes(self) -> int:
        """What came of a frame that is not whole yet."""
        return len(self._buffer) - self._start

    def feed(self, data: bytes) -> None:
        """Add what the stream brought."""
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
        self.num_taken += 1
        return bytes(memoryview(self._buffer)[begin:end])


async def first_message(stream: Stream, frames: Frames) -> LinkMessage:
    """Return what a peer says first; raise `LinkClosed` at the stream's end, `ProtocolViolation` for what is no message."""
    while (payload := frames.pop()) is None:
        data = await stream.read()
        if not data:
            raise LinkClosed("the connection ended before the link began")
        frames.feed(data)
    return decode_link(payload)


async def write_whole(stream: Stream, data: bytes, seconds: float) -> bool:
    """Write, and say whether it went out. A write is never cancelled halfway: that would garble all that follows."""
    try:
        with trio.CancelScope(shield=True), trio.fail_after(seconds):
            await stream.write(data)
    except (LinkClosed, trio.TooSlowError):
        stream.abort()
        return False
    await trio.lowlevel.checkpoint_if_cancelled()
    return True


async def read_within(stream: Stream, seconds: float) -> bytes | None:
    """Return the next bytes; b"" at the end, and None after so long a silence."""
    with trio.move_on_after(seconds):
        return await stream.read()
    # This whole process may have been stopped for that long: then what came meanwhile is there to be read.
    with trio.move_on_after(min(_STALL_GRACE_SECONDS, seconds / 4)):
        return await stream.read()
    return None


# --- over a stream -----------------------------------------------------------------------------------------------------


class StreamLink(Link):
    """A link over a stream: its buffer and its state. What happens to it is decided by whoever has it."""

    def __init__(
        self,
        stream: Stream,
        frames: Frames,
        shown: Hello | Welcome,
        *,
        addresses: tuple[str, ...],
        membership: Membership,
        is_dialled: bool,
        settings: LinkSettings,
        on_close: Callable[[StreamLink, str], None],
    ) -> None:
        """`shown` is what the peer said of itself; `on_close` takes the link down gracefully, for a reason."""
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
        self.membership = membership
        self.expires_at = membership.expires_at
        self.is_dialled = is_dialled
        self.allowed: frozenset[type] = allowed_from(self.roles)
        self.gone = trio.Event()
        """The link is down."""
        self.ended = trio.Event()
        """Nothing of it runs any more."""
        self.wake = trio.Event()
        self.reason: str | None = None
        self._on_close = on_close
        self._settings = settings
        self._waiting: deque[bytes] = deque()
        self._num_waiting_bytes = 0
        self._num_taken = 0
        self._waited_seconds = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the link is up."""
        return self.reason is None

    @property
    def num_buffered_bytes(self) -> int:
        """What waits to be written, and what is being written now."""
        return self._num_waiting_bytes

    @property
    def has_waiting(self) -> bool:
        """Whether there is something to write."""
        return bool(self._waiting)

    def send(self, message: LinkMessage) -> None:
        """Put `message` into the buffer; raises as `Link.send` says."""
        if self.reason is not None:
            raise LinkClosed(f"the link to {self.name} is closed: {self.reason}")
        payload = encode(message)
        if len(payload) > MAX_FRAME_BYTES:
            raise ProtocolViolation(
                f"a {tag_of(type(message))} message of {len(payload)} bytes; {MAX_FRAME_BYTES} is the most"
            )
        if self._num_waiting_bytes + len(payload) > self._settings.max_buffer_bytes:
            raise LinkFull(f"{self._num_waiting_bytes} bytes already wait to be sent to {self.name}")
        self.put(framed(payload))

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
        """Say that what was taken has gone out."""
        self._num_waiting_bytes -= num_bytes

    async def feed(self) -> str | None:
        """Take in what the stream brings next, when all whole frames are taken; return why the link is to end, if it is.

        Bytes alone are no sign of life: a frame has the time of a silence, and what its size takes on a slow line.
        """
        frames, silence = self.frames, self._settings.silence_seconds
        if frames.is_between_frames or frames.num_taken > self._num_taken:
            self._num_taken, self._waited_seconds = frames.num_taken, 0.0
        elif self._waited_seconds > silence + frames.num_partial_bytes / MIN_FRAME_BYTES_PER_SECOND:
            return f"no whole message for {self._waited_seconds:.1f} s"
        asked_at = trio.current_time()
        data = await read_within(self.stream, silence)
        if data is None:
            return f"silent for {silence:g} s"
        if not data:
            return "the connection ended" + ("" if frames.is_between_frames else " in the middle of a frame")
        if not frames.is_between_frames:
            # This whole process may have been stopped for longer.
            self._waited_seconds += min(trio.current_time() - asked_at, silence)
        if self.is_open:
            frames.feed(data)
        return None

    def close(self, reason: str = "") -> None:
        """Say `Goodbye` and close; see `Link.close`."""
        self._on_close(self, reason)
