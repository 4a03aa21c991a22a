"""Links and topics over a py-libp2p host: the only importer of libp2p and multiaddr.

py-libp2p 0.8.1 is used as an authenticated, multiplexed stream transport behind a layer that works around ten measured
defects; docs/libp2p.md lists them with the remedy and the test for each. In short: TCP, Noise and yamux only; nothing
that a peer sends can end the host; limits are explicit and slots come back; every connection must carry an accepted link
within three seconds, and until then nothing but the link's protocol is served on it; a peer's topics run over the
connection that was admitted last; the library dials nobody on its own, and neither asks nor answers what is not needed
(identify, ping).
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, cast

import libp2p.pubsub.pubsub as pubsub_module
import multiaddr
import psutil
import trio
from libp2p import new_host
from libp2p.abc import INetConn, INetStream, INetwork, INotifee, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import BasicHost, _IdentifyNotifee
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.pubsub_notifee import PubsubNotifee
from libp2p.rcmgr import Direction
from libp2p.rcmgr.connection_limits import ConnectionLimits
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.yamux.yamux import DEFAULT_WINDOW_SIZE, Yamux, YamuxStream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.tools.anyio_service import TrioManager

from tether.errors import LinkClosed, PortTaken, ProtocolViolation, UsageError
from tether.node_key import NodeKey
from tether.noise_stream import NoiseStream
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
MAX_TOPIC_BYTES = 900 << 10
TOPIC_MESSAGES = 4096
"""What may wait in a subscription."""
MAX_CHILD_TASKS = 100_000
_PUBLISH_PATIENCE_SECONDS = 0.25
_PUBLISH_QUEUE = 16

ADDRESS_FORM = "/ip4/<address>/tcp/<port>/p2p/<peer id>"


# --- addresses -------------------------------------------------------------------------------------------------------


def parse_address(address: str) -> tuple[multiaddr.Multiaddr, str]:
    """Return a dialable address and the peer id in it; raise `UsageError` that shows the form for anything else."""
    try:
        parsed = multiaddr.Multiaddr(address)
        peer_id = parsed.value_for_protocol("p2p")
        parsed.value_for_protocol("tcp")
        ID.from_string(peer_id)
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address that can be dialled: {ADDRESS_FORM}") from exc
    return parsed, str(peer_id)


def _parse_listen(address: str) -> tuple[multiaddr.Multiaddr, str, int]:
    try:
        parsed = multiaddr.Multiaddr(address)
        protocols = [protocol.name for protocol in parsed.protocols()]
        host = str(parsed.value_for_protocol(protocols[0]))
        ipaddress.ip_address(host)
        port = int(parsed.value_for_protocol("tcp"))
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address to listen on: /ip4/<address>/tcp/<port>") from exc
    return parsed, host, port


def _check_port(host: str, port: int) -> None:
    # libp2p listens with SO_REUSEPORT, so a second process gets the same port without an error and half of the
    # connections. This probe binds without it, and fails where anybody listens.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"port {port} on {host} is taken; stop the process that listens there, or listen elsewhere: "
                    f"--listen /ip{6 if ':' in host else 4}/{host}/tcp/{port + 1}"
                ) from exc
            raise UsageError(f"cannot listen on {host} port {port}: {exc.strerror}") from exc


def _reachable(address: str) -> list[str]:
    """Return the address, or one for each of this machine's where it stands for all of them."""
    for wildcard, family, protocol in (("0.0.0.0", socket.AF_INET, "ip4"), ("::", socket.AF_INET6, "ip6")):  # noqa: S104 - compared with, not listened on
        prefix = f"/{protocol}/{wildcard}/"
        if address.startswith(prefix):
            own = [
                entry.address
                for entries in psutil.net_if_addrs().values()
                for entry in entries
                if entry.family == family and "%" not in entry.address
            ]
            own.sort(key=lambda ip: ipaddress.ip_address(ip).is_loopback)
            return [f"/{protocol}/{ip}/{address.removeprefix(prefix)}" for ip in own]
    return [address]


# --- streams ---------------------------------------------------------------------------------------------------------


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


# --- connections -----------------------------------------------------------------------------------------------------


class _Session(SecureSession):
    """libp2p's secure session over `NoiseStream`."""

    def __init__(self, session: SecureSession) -> None:
        conn = cast(NoiseTransportReadWriter, session.conn)
        super().__init__(
            local_peer=session.local_peer,
            local_private_key=session.local_private_key,
            remote_peer=session.remote_peer,
            remote_permanent_pubkey=session.remote_permanent_pubkey,
            is_initiator=session.is_initiator,
            conn=conn,
        )
        raw = cast(RawConnection, conn.read_writer.read_write_closer)
        self._bytes = NoiseStream(cast(TrioTCPStream, raw.stream).stream, conn.noise_state)

    async def read(self, n: int | None = None) -> bytes:
        try:
            return await self._bytes.read(n)
        except LinkClosed as exc:
            raise ConnectionClosedError(exc.message) from exc

    async def write(self, data: bytes) -> None:
        try:
            await self._bytes.write(data)
        except LinkClosed as exc:  # yamux expects this one where it gives credit for what was read before
            raise ConnectionClosedError(exc.message) from exc


class _Yamux(Yamux):
    """Yamux that says nothing of each frame and does not wait after it."""

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            await self.secured_conn.write(data)


class _Noise(Noise):
    """Noise whose sessions are read and written in few steps."""

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return _Session(cast(SecureSession, await super().secure_inbound(conn)))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return _Session(cast(SecureSession, await super().secure_outbound(conn, peer_id)))


# --- topics ----------------------------------------------------------------------------------------------------------


def _steady(async_fn: Callable[..., Awaitable[Any]], name: str, *, is_daemon: bool) -> Callable[..., Awaitable[None]]:
    async def steady(*args: Any) -> None:
        while True:
            try:
                await async_fn(*args)
            except Exception:
                log.warning("a task of libp2p's topics failed: %s", name, exc_info=True)
            else:
                return
            if not is_daemon:
                return
            await trio.sleep(1.0)

    return steady


class _SteadyManager(TrioManager):
    """Runs a pubsub service whose tasks may fail one by one without taking the service down (defects 2 and 6)."""

    def __init__(self, service: Any) -> None:
        super().__init__(service, max_children_per_task=MAX_CHILD_TASKS)

    def run_task(
        self,
        async_fn: Any,
        *args: Any,
        daemon: bool = False,
        name: str | None = None,
        _internal: bool = False,
    ) -> None:
        known_as = str(name or getattr(async_fn, "__qualname__", async_fn))
        task = async_fn if _internal else _steady(async_fn, known_as, is_daemon=daemon)
        super().run_task(task, *args, daemon=daemon, name=known_as, _internal=_internal)


class _Topics:
    """Gossipsub, tamed: lossy by contract, for news that the next message repeats."""

    def __init__(self, host: BasicHost, is_admitted: Callable[[str], bool]) -> None:
        self._own_id = str(host.get_id())
        self._is_admitted = is_admitted
        self._subscribers: dict[str, list[trio.MemorySendChannel[tuple[str, bytes]]]] = {}
        # Read at each subscription; the library's 32 loses most of a burst.
        pubsub_module.SUBSCRIPTION_CHANNEL_SIZE = TOPIC_MESSAGES
        self._router = GossipSub(
            # 1.1 on purpose: 1.2 sends an IDONTWANT to every mesh peer for every message.
            [PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            prune_back_off=10,
            do_px=False,
            spam_protection_enabled=False,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
            pending_messages_ttl=0.0,
        )
        self.pubsub = Pubsub(
            host,
            self._router,
            strict_signing=True,
            seen_ttl=120,
            max_inbound_rpc_size=1 << 20,
            max_subscriptions_per_peer=512,
            max_subscriptions_per_rpc=512,
            validation_timeout=1.0,
        )
        # From the clock in microseconds: after a restart with the same key no sequence number is used again.
        self.pubsub.counter = time.time_ns() // 1000
        self._push = self.pubsub.push_msg
        setattr(self.pubsub, "push_msg", self._push_safely)  # noqa: B010 - a method of the library's object

    async def run(self, nursery: trio.Nursery) -> None:
        """Start the services in `nursery`; return when they take peers."""
        for service in (self._router, self.pubsub):
            manager = _SteadyManager(service)
            nursery.start_soon(manager.run)
            await manager.wait_started()
        await self.pubsub.wait_until_ready()
        self._nursery = nursery

    async def _push_safely(self, forwarder: ID, message: rpc_pb2.Message) -> None:
        try:
            if str(forwarder) != self._own_id:
                origin = str(ID(message.from_id))
                if not self._is_admitted(str(forwarder)) or not self._is_admitted(origin):
                    log.debug("dropped a topic's message of %s, forwarded by %s", origin, forwarder)
                    return
                if len(message.topicIDs) != 1:
                    return
            await self._push(forwarder, message)
        except Exception as exc:  # noqa: BLE001 - a malformed message must not end pubsub (defect 2)
            log.warning("dropped a malformed topic message from %s: %r", forwarder, exc)

    def add_peer(self, peer_id: ID) -> None:
        """Open a stream for topics to a peer that was admitted; on its newest connection, if it had one (defect 8)."""
        if peer_id in self.pubsub.peers:
            # Forgets the stream, and opens one anew because the peer is connected.
            self.pubsub._handle_dead_peer(peer_id)  # noqa: SLF001 - the library has no public way
        else:
            self.pubsub.manager.run_task(self.pubsub._handle_new_peer_with_retry, peer_id)  # noqa: SLF001

    def remove_peer(self, peer_id: ID) -> None:
        """Forget a peer that left."""
        if self.pubsub.manager.is_running:
            self.pubsub._handle_dead_peer(peer_id)  # noqa: SLF001

    async def publish(self, topic: str, payload: bytes) -> None:
        if len(payload) > MAX_TOPIC_BYTES:
            raise ProtocolViolation(f"a topic's message of {len(payload)} bytes; {MAX_TOPIC_BYTES} is the most")
        # The library drops what does not fit a peer's queue of 32; a burst waits for room, but nobody slow holds it up.
        with trio.move_on_after(_PUBLISH_PATIENCE_SECONDS):
            # The library's queues tell nobody when they drain.
            while any(len(q) > _PUBLISH_QUEUE for q in self.pubsub.peer_queues.values()):  # noqa: ASYNC110
                await trio.sleep(0.002)
        await self.pubsub.publish(topic, payload)

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        send, receive = trio.open_memory_channel[tuple[str, bytes]](TOPIC_MESSAGES)
        if topic in self._subscribers:
            self._subscribers[topic].append(send)
        else:
            self._subscribers[topic] = [send]
            subscription = await self.pubsub.subscribe(topic)
            self._nursery.start_soon(self._pump, topic, subscription)
        return receive

    async def _pump(self, topic: str, subscription: Any) -> None:
        channels = self._subscribers[topic]
        async for message in subscription:
            origin = str(ID(message.from_id))
            if origin == self._own_id:
                continue
            for channel in tuple(channels):
                try:
                    channel.send_nowait((origin, bytes(message.data)))
                except trio.WouldBlock:
                    log.debug("a subscriber of %s does not keep up", topic)
                except trio.BrokenResourceError:
                    channel.close()
                    channels.remove(channel)
            if not channels:
                del self._subscribers[topic]
                await subscription.unsubscribe()
                return


# --- the transport ---------------------------------------------------------------------------------------------------


class _Gone(Exception):
    """An inbound connection ended; raised to make libp2p give its slot back (defect 3)."""


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
        with_topics: bool = False,
        admission_seconds: float = ADMISSION_SECONDS,
    ) -> None:
        """Build the host; nothing is opened before `run`.

        `listen` are multiaddresses such as `/ip4/0.0.0.0/tcp/4001` (port 0: any), `announce` what others are told
        instead, `max_peers` what both limits are sized for, twice over. Raises `UsageError` for malformed addresses.
        """
        # Read by yamux at each read: without a window update for every one, a round trip costs a fifth less.
        os.environ.setdefault("PY_YAMUX_RELEASE_ON_READ", "0")
        _hand_logs_over()
        self._key = key
        self._listen = [_parse_listen(address) for address in listen]
        self._announce = [_parse_announce(address) for address in announce]
        self._admission_seconds = admission_seconds
        self._addresses: tuple[str, ...] = ()
        self._on_stream: StreamHandler | None = None
        self._nursery: trio.Nursery | None = None
        self._admissions: dict[SwarmConn, trio.Event] = {}
        self._admitted: dict[str, SwarmConn] = {}
        self._num_early: Counter[SwarmConn] = Counter()
        self._closing: set[SwarmConn] = set()
        self._host = _build_host(key, 2 * max_peers)
        self._network = cast(Swarm, self._host.get_network())
        self._handle_stream = self._network.common_stream_handler
        self._network.set_stream_handler(self._handle_stream_safely)
        self._upgrade = self._network.upgrade_inbound_raw_conn
        setattr(self._network, "upgrade_inbound_raw_conn", self._upgrade_and_wait)  # noqa: B010 - as above
        setattr(self._host, "new_stream", self._new_topic_stream)  # noqa: B010 - only pubsub calls it
        handlers = self._host.multiselect.handlers
        handlers.clear()
        self._topics = _Topics(self._host, self._admitted.__contains__) if with_topics else None
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
                _check_port(host, port)
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
        found = self._announce or [each for address in own for each in _reachable(address)]
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
        self._admission_of(stream.connection).set()
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
    def _running_topics(self) -> _Topics:
        if self._topics is None or self._nursery is None:
            raise LinkClosed("this node has no topics, or is not running")
        return self._topics

    # --- connections -------------------------------------------------------------------------------------------------

    def _admission_of(self, connection: SwarmConn) -> trio.Event:
        return self._admissions.setdefault(connection, trio.Event())

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """Called by libp2p for each new connection."""
        del network
        connection = cast(SwarmConn, conn)
        if connection.direction is Direction.INBOUND and self._nursery is not None:
            self._nursery.start_soon(self._await_admission, connection)
        await trio.lowlevel.checkpoint()

    async def _await_admission(self, connection: SwarmConn) -> None:
        with trio.move_on_after(self._admission_seconds):
            await self._admission_of(connection).wait()
            return
        log.info("closing the connection of %s: no link", connection.muxed_conn.peer_id, extra={"action": "no_link"})
        self.close_soon(connection)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """Called by libp2p when a connection has ended."""
        del network
        connection = cast(SwarmConn, conn)
        self._admissions.pop(connection, None)
        self._num_early.pop(connection, None)
        self._closing.discard(connection)
        peer_id = str(connection.muxed_conn.peer_id)
        if self._admitted.get(peer_id) is connection:
            self.expel(peer_id)
        await trio.lowlevel.checkpoint()

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
            self._nursery.start_soon(_close, connection)

    async def _upgrade_and_wait(self, raw_conn: IRawConnection, maddr: multiaddr.Multiaddr) -> Any:
        muxed = cast(Yamux, await self._upgrade(raw_conn, maddr))
        await muxed.event_closed.wait()
        raise _Gone

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _handle_stream_safely(self, stream: INetStream) -> None:
        connection = cast(SwarmConn, cast(NetStream, stream).swarm_conn)
        peer_id = connection.muxed_conn.peer_id
        if not self._admission_of(connection).is_set():
            self._num_early[connection] += 1
            if self._num_early[connection] > MAX_EARLY_STREAMS:
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
            # This side may hear of topics before it has read the welcome that admits the other one.
            with trio.move_on_after(self._admission_seconds):
                await self._admission_of(connection).wait()
            if self._admission_of(connection).is_set():
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


def _parse_announce(address: str) -> str:
    try:
        parsed = multiaddr.Multiaddr(address)
        parsed.value_for_protocol("tcp")
    except (multiaddr.exceptions.Error, ValueError, LookupError, TypeError) as exc:
        raise UsageError(f"{address!r} is not an address to announce: /ip4/<address>/tcp/<port>") from exc
    return str(parsed).partition("/p2p/")[0]


def _build_host(key: NodeKey, max_connections: int) -> BasicHost:
    key_pair = create_new_key_pair(key.seed)
    limits = ResourceManager(
        limits=ResourceLimits(max_connections=2 * max_connections, max_streams=50_000),
        connection_limits=ConnectionLimits(
            max_established_inbound=max_connections,
            max_established_outbound=max_connections,
            max_established_total=max_connections,
            max_established_per_peer=4,
        ),
        # Each of these can refuse everybody for a minute because of a few.
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_memory_limits=False,
    )
    host = new_host(
        key_pair=key_pair,
        # The default also offers plaintext, where anybody can claim to be anybody (defect 4).
        sec_opt={NOISE: _Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)},
        muxer_opt={TProtocol(YAMUX): _Yamux},
        connection_config=ConnectionConfig(
            max_connections=max_connections,
            high_watermark=max_connections,
            low_watermark=0,
            min_connections=0,
            max_connections_per_peer=4,
            inbound_upgrade_timeout=5.0,
            inbound_stream_protocol_negotiation_timeout=5.0,
        ),
        resource_manager=limits,
        disable_identify_address_discovery=True,
    )
    network = cast(Swarm, host.get_network())
    # Who dials decides when to try again.
    network.retry_config = RetryConfig(max_retries=0)
    return cast(BasicHost, host)


async def _close_socket(connection: SwarmConn) -> None:
    # Before anything else: to say goodbye to a peer that does not read would wait for ever, and a write that is stuck
    # holds the lock that closing needs.
    try:
        await cast(Yamux, connection.muxed_conn).secured_conn.close()
    except Exception as exc:  # noqa: BLE001 - it may be closed already, in whatever way
        log.debug("cannot close a socket: %r", exc)


async def _close(connection: SwarmConn) -> None:
    with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
        await _close_socket(connection)
        try:
            await connection.close()
        except Exception as exc:  # noqa: BLE001 - as above
            log.debug("cannot close a connection: %r", exc)


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
