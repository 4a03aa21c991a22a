"""Links over a py-libp2p host: connections that must carry an accepted link, and the stream of each.

py-libp2p 0.8.1 is used as an authenticated, multiplexed stream transport behind a layer that works around ten measured
defects; docs/libp2p.md lists them with the remedy and the test for each. In short: TCP, Noise and yamux only; nothing
that a peer sends can end the host; limits are explicit and slots come back; every connection must carry an accepted link
within three seconds, and until then nothing but the link's protocol is served on it; a peer's topics run over the
connection that was admitted last; the library dials nobody on its own, and neither asks nor answers what is not needed
(identify, ping).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

import multiaddr
import trio
from libp2p.abc import INetConn, INetStream, INetwork, INotifee, IRawConnection
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import _IdentifyNotifee
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.pubsub.pubsub_notifee import PubsubNotifee
from libp2p.rcmgr import Direction
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE, Yamux, YamuxStream

from tether.addresses import check_port, parse_address, parse_announce, parse_listen, reachable
from tether.errors import LinkClosed
from tether.host import build_host, tcp_of
from tether.newcomers import MAX_NEWCOMERS, Newcomers
from tether.node_key import NodeKey
from tether.tasks import start_if_open
from tether.topics import Topics
from tether.wire import Stream, StreamHandler

log = logging.getLogger(__name__)

LINK_PROTOCOL = TProtocol("/tether/link/1.0.0")
READ_BYTES = 1 << 16
DIAL_SECONDS = 15.0
ADMISSION_SECONDS = 3.0
"""From a peer's connection to its accepted link."""
CLOSE_SECONDS = 2.0
MAX_EARLY_STREAMS = 8
"""Streams that a peer may open before it is admitted; it needs one."""


class Libp2pStream:
    """A link's stream on its connection."""

    def __init__(self, transport: Libp2pTransport, connection: SwarmConn, stream: NetStream) -> None:
        self.connection = connection
        self._transport = transport
        # Past libp2p's own stream, whose state nobody here asks for.
        self._stream = cast(YamuxStream, stream.muxed_stream)
        self._peer_id = str(connection.muxed_conn.peer_id)
        self._num_unreleased = 0

    @property
    def peer_id(self) -> str:
        """The peer at the other end: Noise proved that it holds the key."""
        return self._peer_id

    async def read(self) -> bytes:
        """Return the next bytes; b"" at the end: libp2p does not tell a clean end from a crash."""
        stream = self._stream
        try:
            data = await stream.conn.read_stream(stream.stream_id, READ_BYTES)
            self._num_unreleased += len(data)
            if self._num_unreleased >= DEFAULT_WINDOW_SIZE // 2:
                await self._release()
        except Exception as exc:  # noqa: BLE001 - whatever ends a stream in libp2p ends it here
            log.debug("the stream of %s ended: %r", self._peer_id, exc)
            return b""
        return data

    async def _release(self) -> None:
        """Let the peer send as much again as was read.

        In halves of the window, where yamux's own `read` does so at every second read, for as much as the message costs.
        """
        num_bytes, self._num_unreleased = self._num_unreleased, 0
        self._stream.recv_window += num_bytes
        await self._stream.send_window_update(num_bytes)

    async def write(self, data: bytes) -> None:
        """Return when libp2p has taken all of `data`; raise `LinkClosed` when it cannot. Never cancel it (defect 9)."""
        try:
            await self._stream.write(data)
        except Exception as exc:
            raise LinkClosed(f"the connection ended: {exc!r}") from exc

    def abort(self) -> None:
        """Close the connection; returns at once."""
        self._transport.close_soon(self.connection)


class _Gone(Exception):
    """An inbound connection ended; raised to make libp2p give its slot back (defect 3)."""


class _Admission:
    """Whether a connection carries an accepted link: undecided until it does, or has ended."""

    def __init__(self) -> None:
        self.decided = trio.Event()
        self.is_admitted = False
        self.num_early_streams = 0


def _hand_logs_over() -> None:
    """Send libp2p's log where everybody's goes.

    Its import, which comes after the command line has set logging up, cuts its logger off and lets warnings spill to
    stderr. It logs each peer that goes away as an error, and the links say the same once, in their own words: so it is
    heard only where the root logger lets debugging through (`-vv`), or as LIBP2P_DEBUG says.
    """
    if not os.environ.get("LIBP2P_DEBUG"):
        library = logging.getLogger("libp2p")
        library.propagate = True
        library.setLevel(logging.DEBUG if logging.getLogger().isEnabledFor(logging.DEBUG) else logging.CRITICAL)


class Libp2pTransport(INotifee):
    """Authenticated streams and topics over libp2p; see `tether.wire.Transport` for the interface."""

    def __init__(
        self,
        key: NodeKey,
        *,
        listen: Sequence[str] = (),
        announce: Sequence[str] = (),
        max_peers: int = 1000,
        max_connections: int | None = None,
        with_topics: bool = False,
        admission_seconds: float = ADMISSION_SECONDS,
    ) -> None:
        """Build the host; nothing is opened before `run`.

        `listen` are multiaddresses such as `/ip4/0.0.0.0/tcp/4001` (port 0: any), `announce` what others are told
        instead. There is room for twice `max_peers`, and `MAX_NEWCOMERS` that are not admitted yet, but for no more
        than `max_connections` together. Raises `UsageError` for malformed addresses.
        """
        # Read by yamux at each read: without a window update for every one, a round trip costs a fifth less.
        os.environ.setdefault("PY_YAMUX_RELEASE_ON_READ", "0")
        _hand_logs_over()
        self._key = key
        self._listen = [parse_listen(address) for address in listen]
        self._announce = [parse_announce(address) for address in announce]
        self._admission_seconds = admission_seconds
        self._addresses: tuple[str, ...] = ()
        self._on_stream: StreamHandler | None = None
        self._nursery: trio.Nursery | None = None
        self._admissions: dict[SwarmConn, _Admission] = {}
        self._admitted: dict[str, SwarmConn] = {}
        self._closing: set[SwarmConn] = set()
        room = 2 * max_peers + MAX_NEWCOMERS
        if max_connections is not None:
            room = min(room, max_connections)
        self._newcomers = Newcomers(min(MAX_NEWCOMERS, room // 2))
        self._host = build_host(key, room)
        self._network = cast(Swarm, self._host.get_network())
        self._handle_stream = self._network.common_stream_handler
        self._network.set_stream_handler(self._handle_stream_safely)
        self._handle_inbound = self._network._handle_inbound_connection  # noqa: SLF001 - the library has no public way
        setattr(self._network, "_handle_inbound_connection", self._accept)  # noqa: B010 - a method of its object
        self._upgrade = self._network.upgrade_inbound_raw_conn
        setattr(self._network, "upgrade_inbound_raw_conn", self._upgrade_and_wait)  # noqa: B010 - as above
        setattr(self._host, "new_stream", self._new_topic_stream)  # noqa: B010 - only pubsub calls it
        handlers = self._host.multiselect.handlers
        handlers.clear()
        self._topics = Topics(self._host, self._admitted.__contains__) if with_topics else None
        for protocol, handler in tuple(handlers.items()):
            if handler is not None:
                handlers[protocol] = self._after_admission(handler)
        self._host.set_stream_handler(LINK_PROTOCOL, cast(StreamHandlerFn, self._handle_link))
        # Identify would open a stream to every stranger, and pubsub another one before it is admitted.
        self._silenced = [n for n in self._network.notifees if isinstance(n, (_IdentifyNotifee, PubsubNotifee))]
        for notifee in self._silenced:
            self._network.remove_notifee(notifee)
        self._network.register_notifee(self)

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        return self._key.peer_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node: what was announced, or what it listens on."""
        return self._addresses

    @property
    def num_connections(self) -> int:
        """How many connections there are, admitted or not."""
        return len(self._network.get_connections())

    async def run(
        self, on_stream: StreamHandler, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen and serve until cancelled. Raises `PortTaken`, or `UsageError` for an address that is not this machine's."""
        for _, host, port in self._listen:
            if port:
                check_port(host, port)
        self._on_stream = on_stream
        async with self._host.run([address for address, _, _ in self._listen]), trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                # It would dial peers that this node once knew, on its own.
                await self._network.auto_connector.stop()
                if self._topics is not None:
                    await self._topics.run(nursery)
                self._addresses = self._find_addresses()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None
                # Inside `run`: a host that is only left keeps its sockets, and its peers notice nothing.
                with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
                    for connection in self._network.get_connections():
                        await _close_socket(cast(SwarmConn, connection))
                    await self._host.close()
                nursery.cancel_scope.cancel()

    def _find_addresses(self) -> tuple[str, ...]:
        own = [str(address) for address in self._host.get_transport_addrs()]
        found = self._announce or [each for address in own for each in reachable(address)]
        return tuple(f"{address}/p2p/{self.peer_id}" for address in dict.fromkeys(found))

    async def dial(self, address: str) -> Libp2pStream:
        """Return a link's stream to the peer at `address`, on a new connection.

        Raises `UsageError` for an address of another form, `LinkClosed` when the peer cannot be reached within 15 s, or
        is not the one named.
        """
        target, peer_id = parse_address(address)
        if self._nursery is None:
            raise LinkClosed("this node is not running")
        connection: SwarmConn | None = None
        stream: NetStream | None = None
        try:
            with trio.fail_after(DIAL_SECONDS):
                # Straight to the address: `connect` would return an old connection that only looks alive, refuse a peer
                # for a minute after a failure (defect 10), and take a quarter of a second more.
                connection = cast(SwarmConn, await self._network.dial_addr(target, ID.from_string(peer_id)))
                stream = await connection.new_stream()
                await self._select(stream, [LINK_PROTOCOL])
        except trio.TooSlowError as exc:
            raise LinkClosed(f"cannot reach {address}: no answer within {DIAL_SECONDS:g} s") from exc
        except Exception as exc:
            raise LinkClosed(f"cannot reach {address}: {_why(exc)}") from exc
        finally:
            if connection is not None and (stream is None or stream.get_protocol() is None):
                self.close_soon(connection)
        return Libp2pStream(self, connection, stream)

    async def _select(self, stream: NetStream, protocols: Sequence[TProtocol]) -> None:
        selected = await self._host.multiselect_client.select_one_of(
            protocols, MultiselectCommunicator(stream), int(DIAL_SECONDS)
        )
        stream.set_protocol(selected)

    def admit(self, stream: Stream) -> None:
        """Keep the connection under the stream, and let its peer use topics over it from now on."""
        if not isinstance(stream, Libp2pStream):
            raise TypeError("this stream is not one of this transport's")
        self._admitted[stream.peer_id] = stream.connection
        admission = self._admission_of(stream.connection)
        admission.is_admitted = True
        admission.decided.set()
        self._newcomers.leave(tcp_of(stream.connection))
        if self._topics is not None:
            self._topics.add_peer(stream.connection.muxed_conn.peer_id)

    def expel(self, peer_id: str) -> None:
        """Take `admit` back, and close the connection that was admitted."""
        if (connection := self._admitted.pop(peer_id, None)) is not None:
            if self._topics is not None:
                self._topics.remove_peer(connection.muxed_conn.peer_id)
            self.close_soon(connection)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Tell whoever is subscribed, as far as that goes; raise `ProtocolViolation` for more than 900 KiB."""
        await self._running_topics.publish(topic, payload)

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        """Return a channel of (origin's peer id, payload): what admitted peers publish from now on."""
        return await self._running_topics.subscribe(topic)

    @property
    def _running_topics(self) -> Topics:
        if self._topics is None or self._nursery is None:
            raise LinkClosed("this node has no topics, or is not running")
        return self._topics

    # --- connections -------------------------------------------------------------------------------------------------

    def _admission_of(self, connection: SwarmConn) -> _Admission:
        admission = self._admissions.get(connection)
        if admission is None:
            admission = _Admission()
            if connection.is_closed:
                # Kept it would be for good: what drops it, `disconnected`, is called once, and may have been.
                admission.decided.set()
            else:
                self._admissions[connection] = admission
        return admission

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """Called by libp2p for each new connection."""
        del network
        connection = cast(SwarmConn, conn)
        if connection.direction is Direction.INBOUND and self._nursery is not None:
            start_if_open(self._nursery, self._await_admission, connection)
        await trio.lowlevel.checkpoint()

    async def _await_admission(self, connection: SwarmConn) -> None:
        with trio.move_on_after(self._admission_seconds):
            await self._admission_of(connection).decided.wait()
            return
        log.info("closing the connection of %s: no link", connection.muxed_conn.peer_id, extra={"action": "no_link"})
        self.close_soon(connection)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """Called by libp2p when a connection has ended."""
        del network
        connection = cast(SwarmConn, conn)
        self._forget(connection)
        peer_id = str(connection.muxed_conn.peer_id)
        if self._admitted.get(peer_id) is connection:
            self.expel(peer_id)
        await trio.lowlevel.checkpoint()

    def _forget(self, connection: SwarmConn) -> None:
        self._closing.discard(connection)
        if (admission := self._admissions.pop(connection, None)) is not None:
            admission.decided.set()

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None:
        """Called by libp2p; nothing is to be done."""
        del network, stream
        await trio.lowlevel.checkpoint()

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None:
        """Called by libp2p; nothing is to be done."""
        del network, stream
        await trio.lowlevel.checkpoint()

    async def listen(self, network: INetwork, multiaddr: multiaddr.Multiaddr) -> None:
        """Called by libp2p; nothing is to be done."""
        del network, multiaddr
        await trio.lowlevel.checkpoint()

    async def listen_close(self, network: INetwork, multiaddr: multiaddr.Multiaddr) -> None:
        """Called by libp2p; nothing is to be done."""
        del network, multiaddr
        await trio.lowlevel.checkpoint()

    def close_soon(self, connection: SwarmConn) -> None:
        """Close a connection in the background, once."""
        if connection not in self._closing and not connection.is_closed and self._nursery is not None:
            self._closing.add(connection)
            start_if_open(self._nursery, self._close, connection)

    async def _close(self, connection: SwarmConn) -> None:
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
                await _close_socket(connection)
                try:
                    await connection.close()
                except Exception as exc:  # noqa: BLE001 - it may be closed already, in whatever way
                    log.debug("cannot close a connection: %r", exc)
        finally:
            # Where closing took too long, `disconnected` is not called.
            self._forget(connection)

    async def _accept(self, raw: ReadWriteCloser, maddr: multiaddr.Multiaddr) -> None:
        """Called by libp2p for each TCP connection that it accepts, before it takes a slot and shakes hands."""
        tcp = cast(TrioTCPStream, raw)
        socket = tcp.stream.socket
        try:
            host = str(socket.getpeername()[0])
        except OSError:  # it has left already
            await tcp.close()
            return
        # Whoever is turned away sees its socket closed, and gives its slot back as if the peer had left.
        self._newcomers.enter(tcp, host, socket.close)
        try:
            await self._handle_inbound(raw, maddr)
        finally:
            self._newcomers.leave(tcp)

    async def _upgrade_and_wait(self, raw_conn: IRawConnection, maddr: multiaddr.Multiaddr) -> Any:
        muxed = cast(Yamux, await self._upgrade(raw_conn, maddr))
        await muxed.event_closed.wait()
        raise _Gone

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _handle_stream_safely(self, stream: INetStream) -> None:
        connection = cast(SwarmConn, cast(NetStream, stream).swarm_conn)
        peer_id = connection.muxed_conn.peer_id
        admission = self._admission_of(connection)
        if not admission.is_admitted:
            admission.num_early_streams += 1
            if admission.num_early_streams > MAX_EARLY_STREAMS:
                log.warning("closing the connection of %s: too many streams at once", peer_id)
                self.close_soon(connection)
        try:
            await self._handle_stream(stream)
        except Exception as exc:  # noqa: BLE001 - whatever a peer sends must not end the host (defect 1)
            log.warning("a stream of %s failed: %r", peer_id, exc, extra={"action": "stream_failed"})
        finally:
            await self._reset(stream)

    async def _reset(self, stream: INetStream) -> None:
        # A handler that only returns leaks the stream, and leaves the peer waiting.
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
            try:
                if not cast(NetStream, stream).is_closed:
                    await stream.reset()
            except Exception as exc:  # noqa: BLE001 - the stream's connection may be gone already
                log.debug("cannot reset a stream: %r", exc)

    def _after_admission(self, handler: StreamHandlerFn) -> StreamHandlerFn:
        async def gated(stream: INetStream) -> None:
            connection = cast(SwarmConn, cast(NetStream, stream).swarm_conn)
            # Taken once: the connection may end meanwhile, and nothing of it may begin anew then.
            admission = self._admission_of(connection)
            # This side may hear of topics before it has read the welcome that admits the other one.
            with trio.move_on_after(self._admission_seconds):
                await admission.decided.wait()
            if admission.is_admitted and not connection.is_closed:
                await handler(stream)
            else:
                log.info("refused a stream of %s", connection.muxed_conn.peer_id, extra={"action": "stream_refused"})

        return cast(StreamHandlerFn, gated)

    async def _handle_link(self, stream: INetStream) -> None:
        net_stream = cast(NetStream, stream)
        link_stream = Libp2pStream(self, cast(SwarmConn, net_stream.swarm_conn), net_stream)
        try:
            if self._on_stream is not None:
                await self._on_stream(link_stream)
        finally:
            link_stream.abort()

    async def _new_topic_stream(self, peer_id: ID, protocol_ids: Sequence[TProtocol]) -> INetStream:
        """Open a stream for topics on the connection that was admitted last."""
        connection = self._admitted.get(str(peer_id))
        if connection is None:
            raise SwarmException(f"{peer_id} is not admitted")
        stream = await connection.new_stream()
        try:
            await self._select(stream, protocol_ids)
        except MultiselectClientError as exc:
            if "not supported" in str(exc):
                raise
            raise SwarmException(f"cannot open a stream for topics to {peer_id}: {exc}") from exc
        finally:
            if stream.get_protocol() is None:
                await self._reset(stream)
        return stream


async def _close_socket(connection: SwarmConn) -> None:
    # Before anything else: to say goodbye to a peer that does not read would wait for ever, and a write that is stuck
    # holds the lock that closing needs.
    try:
        await cast(Yamux, connection.muxed_conn).secured_conn.close()
    except Exception as exc:  # noqa: BLE001 - it may be closed already, in whatever way
        log.debug("cannot close a socket: %r", exc)


def _why(exc: BaseException) -> str:
    """Return in a few words why a dial failed."""
    cause: BaseException | None = exc
    last = str(exc)
    while cause is not None:
        if "does not correspond" in str(cause) or "mismatch" in str(cause):
            return "another peer answers there"
        for inner in _leaves(cause):
            if isinstance(inner, OSError) and inner.strerror:
                return inner.strerror.lower()
        last = str(cause) or last
        cause = cause.__cause__ or cause.__context__
    return last or type(exc).__name__


def _leaves(exc: BaseException) -> Iterable[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
