"""A network in memory, for tests: the same interface as libp2p's transport, and faults on demand.

    network = InMemoryNetwork()
    one = network.transport(identity.key)
    other = network.transport(identity2.key)
    ...
    network.cut(one.peer_id, other.peer_id)

Everything runs in one trio program. Nothing is encrypted: a transport is who its key says. What arrives is a stream of
bytes with no boundaries, cut into `piece_bytes` at most, and a reader that does not read makes the writer wait, as on a
real network.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import ParamSpec

import trio
import trio.testing

from tether.errors import LinkClosed, UsageError
from tether.node_key import NodeKey
from tether.wire import Stream, StreamHandler

P = ParamSpec("P")

WINDOW_BYTES = 256 << 10
"""What may be written and not yet read."""
TOPIC_MESSAGES = 4096


def in_trio(
    *, seconds: float | None = None, clock_jumps: bool = False
) -> Callable[[Callable[P, Awaitable[None]]], Callable[P, None]]:
    """Return a decorator that runs an async test under trio, for at most `seconds` (30, or 600 of a clock that jumps).

    With `clock_jumps` time is the program's own: whenever nothing can go on it jumps to the next deadline, so that a
    test of a silence of three seconds takes none. Nothing outside the program may be waited for then.
    """

    def decorate(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
        @functools.wraps(test)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            clock = trio.testing.MockClock(autojump_threshold=0.005) if clock_jumps else None

            async def bounded() -> None:
                if clock is not None:
                    _let_threads_end(clock)
                with trio.fail_after(seconds or (600.0 if clock_jumps else 30.0)):
                    await test(*args, **kwargs)

            trio.run(bounded, clock=clock)

        return run

    return decorate


def _let_threads_end(clock: trio.testing.MockClock) -> None:
    # A thread's work takes real time, on a busy machine much of it: while one is at it, time does not jump past it.
    threads, jump = trio.to_thread.current_default_thread_limiter(), clock._autojump  # noqa: SLF001 - no public way

    def jump_when_idle() -> None:
        if not threads.borrowed_tokens:
            jump()

    setattr(clock, "_autojump", jump_when_idle)  # noqa: B010 - a method of the library's object


class _Pipe:
    """One direction of a stream."""

    def __init__(self, network: InMemoryNetwork, sender: str, receiver: str) -> None:
        self._network = network
        self._sender = sender
        self._receiver = receiver
        self._buffer = bytearray()
        self._is_closed = False

    @property
    def _is_stuck(self) -> bool:
        return not self._network.frozen.isdisjoint((self._sender, self._receiver))

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        offset = 0
        while offset < len(data):
            while not self._is_closed and (self._is_stuck or len(self._buffer) >= WINDOW_BYTES):
                await self._network.changed()
            if self._is_closed:
                raise LinkClosed("the connection is closed")
            piece = data[offset : offset + WINDOW_BYTES - len(self._buffer)]
            offset += len(piece)
            self._buffer += self._network.garbled(self._sender, self._receiver, piece)
            self._network.change()

    async def read(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._is_closed and (self._is_stuck or not self._buffer):
            await self._network.changed()
        size = min(len(self._buffer), self._network.piece_bytes or len(self._buffer))
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        self._network.change()
        return data

    def close(self) -> None:
        self._is_closed = True
        self._network.change()


class InMemoryStream:
    """One end of a stream, on a connection of its own."""

    def __init__(self, peer_id: str, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._peer_id = peer_id
        self._incoming = incoming
        self._outgoing = outgoing
        self.is_aborted = False
        self.other: InMemoryStream | None = None

    @property
    def peer_id(self) -> str:
        """The peer at the other end."""
        return self._peer_id

    async def read(self) -> bytes:
        """Return the next bytes; b"" at the end."""
        if self.is_aborted:
            await trio.lowlevel.checkpoint()
            return b""
        data = await self._incoming.read()
        return b"" if self.is_aborted else data

    async def write(self, data: bytes) -> None:
        """Return when all of `data` is on its way; raise `LinkClosed` when it cannot be."""
        await self._outgoing.write(data)

    def abort(self) -> None:
        """Close both directions; what is on its way still arrives."""
        self.is_aborted = True
        self._incoming.close()
        self._outgoing.close()


class InMemoryNetwork:
    """Where the transports of a test meet, and where its faults are made."""

    def __init__(self, *, piece_bytes: int | None = None) -> None:
        """`piece_bytes` is the most that one read returns; 1 cuts every frame into its bytes."""
        self.piece_bytes = piece_bytes
        self.frozen: set[str] = set()
        self._cuts: set[frozenset[str]] = set()
        self._garble: dict[tuple[str, str], int] = {}
        self._transports: dict[str, InMemoryTransport] = {}
        self._streams: list[tuple[frozenset[str], InMemoryStream]] = []
        self._numbers = itertools.count(1)
        self._changed = trio.Event()

    def transport(self, key: NodeKey | None = None, *, is_listening: bool = True) -> InMemoryTransport:
        """Return a transport for the holder of `key` (a new one by default)."""
        return InMemoryTransport(self, key or NodeKey.generate(), is_listening=is_listening)

    def cut(self, one: str, other: str) -> None:
        """End every connection between two peers, and let none begin until `heal`."""
        pair = frozenset((one, other))
        self._cuts.add(pair)
        self.end(one, other)

    def heal(self, one: str, other: str) -> None:
        """Take `cut` back."""
        self._cuts.discard(frozenset((one, other)))

    def end(self, one: str, other: str) -> None:
        """End every connection between two peers, as a crash of either would; new ones may begin."""
        pair = frozenset((one, other))
        for ends, stream in self._streams:
            if ends == pair:
                stream.abort()
        self._streams = [(ends, stream) for ends, stream in self._streams if ends != pair]

    def freeze(self, peer_id: str) -> None:
        """Let nothing from or to a peer move, as if its process were stopped; its connections stay."""
        self.frozen.add(peer_id)
        self.change()

    def thaw(self, peer_id: str) -> None:
        """Take `freeze` back; what waited moves on."""
        self.frozen.discard(peer_id)
        self.change()

    def garble(self, sender: str, receiver: str, *, num_bytes: int = 4) -> None:
        """Turn over the next bytes that `sender` writes to `receiver`."""
        self._garble[sender, receiver] = num_bytes

    def num_streams(self, one: str, other: str) -> int:
        """Return how many streams there are between two peers."""
        pair = frozenset((one, other))
        return sum(ends == pair and not stream.is_aborted for ends, stream in self._streams) // 2

    def is_frozen(self, peer_id: str) -> bool:
        """Whether a peer is frozen."""
        return peer_id in self.frozen

    def change(self) -> None:
        """Wake all that waits for something to change."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def changed(self) -> None:
        """Return at the next change."""
        await self._changed.wait()

    def garbled(self, sender: str, receiver: str, data: bytes) -> bytes:
        """Return `data` as it arrives."""
        count = min(self._garble.pop((sender, receiver), 0), len(data))
        return bytes(byte ^ 0xFF for byte in data[:count]) + data[count:]

    def is_cut(self, one: str, other: str) -> bool:
        """Whether two peers cannot reach each other."""
        return frozenset((one, other)) in self._cuts

    def number(self) -> int:
        """Return a number that no address of this network has yet."""
        return next(self._numbers)

    def listening(self) -> Iterable[InMemoryTransport]:
        """Return the transports that run."""
        return tuple(self._transports.values())

    def add(self, transport: InMemoryTransport) -> None:
        """Let a transport be dialled."""
        self._transports[transport.peer_id] = transport

    def remove(self, transport: InMemoryTransport) -> None:
        """End all connections of a transport that stops."""
        if self._transports.get(transport.peer_id) is transport:
            del self._transports[transport.peer_id]
        for ends, _ in tuple(self._streams):
            if transport.peer_id in ends:
                self.end(*ends)

    def connect(self, dialler: str, address: str) -> tuple[InMemoryStream, InMemoryTransport, InMemoryStream]:
        """Return a new stream's near end, the transport that was dialled, and the far end."""
        place, _, peer_id = address.rpartition("/p2p/")
        if not place.startswith("/memory/") or not peer_id:
            raise UsageError(f"{address!r} is not an address in memory: /memory/<number>/p2p/<peer id>")
        target = self._transports.get(peer_id)
        if target is None or address not in target.addresses or self.is_cut(dialler, peer_id):
            raise LinkClosed(f"nobody answers at {address}")
        there, back = _Pipe(self, dialler, peer_id), _Pipe(self, peer_id, dialler)
        near, far = InMemoryStream(peer_id, back, there), InMemoryStream(dialler, there, back)
        near.other, far.other = far, near
        pair = frozenset((dialler, peer_id))
        self._streams = [(ends, stream) for ends, stream in self._streams if not stream.is_aborted]
        self._streams += [(pair, near), (pair, far)]
        return near, target, far


class InMemoryTransport:
    """A transport as `tether.wire` wants it, over an `InMemoryNetwork`."""

    def __init__(self, network: InMemoryNetwork, key: NodeKey, *, is_listening: bool) -> None:
        self._network = network
        self._peer_id = key.peer_id
        self._is_listening = is_listening
        self._addresses: tuple[str, ...] = ()
        self._nursery: trio.Nursery | None = None
        self._on_stream: StreamHandler | None = None
        self._subscribers: dict[str, list[trio.MemorySendChannel[tuple[str, bytes]]]] = {}
        self.admitted: dict[str, Stream] = {}

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        return self._peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node."""
        return self._addresses

    async def run(
        self, on_stream: StreamHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery, self._on_stream = nursery, on_stream
            if self._is_listening:
                self._addresses = (f"/memory/{self._network.number()}/p2p/{self._peer_id}",)
            self._network.add(self)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._network.remove(self)

    async def dial(self, address: str) -> InMemoryStream:
        """Return a new stream to the peer at `address`, or raise as the real transport does."""
        await trio.lowlevel.checkpoint()
        near, target, far = self._network.connect(self._peer_id, address)
        target.take(far)
        return near

    def take(self, stream: InMemoryStream) -> None:
        """Handle a stream that a peer opened."""
        if self._nursery is None or self._on_stream is None:
            raise LinkClosed("this transport is not running")
        self._nursery.start_soon(self._handle, stream)

    async def _handle(self, stream: InMemoryStream) -> None:
        if self._on_stream is not None:
            await self._on_stream(stream)
        stream.abort()

    def admit(self, stream: Stream) -> None:
        """Let the peer use topics."""
        self.admitted[stream.peer_id] = stream

    def expel(self, peer_id: str) -> None:
        """Take `admit` back, and close the connection."""
        if (stream := self.admitted.pop(peer_id, None)) is not None:
            stream.abort()

    async def publish(self, topic: str, payload: bytes) -> None:
        """Give the message to everybody that is subscribed and admitted this node."""
        await trio.lowlevel.checkpoint()
        for other in self._network.listening():
            if other is not self:
                other.deliver(topic, self._peer_id, payload)

    def deliver(self, topic: str, origin: str, payload: bytes) -> None:
        """Take a topic's message, where its origin is admitted and reachable."""
        is_reachable = not (
            self._network.is_cut(origin, self._peer_id)
            or self._network.is_frozen(origin)
            or self._network.is_frozen(self._peer_id)
        )
        if origin not in self.admitted or not is_reachable:
            return
        for channel in tuple(self._subscribers.get(topic, ())):
            try:
                channel.send_nowait((origin, payload))
            except trio.WouldBlock:
                continue
            except trio.BrokenResourceError:
                self._subscribers[topic].remove(channel)

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        """Return a channel of (origin, payload)."""
        await trio.lowlevel.checkpoint()
        send, receive = trio.open_memory_channel[tuple[str, bytes]](TOPIC_MESSAGES)
        self._subscribers.setdefault(topic, []).append(send)
        return receive
