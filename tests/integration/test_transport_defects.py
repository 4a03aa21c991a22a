"""One test or two for each of the ten defects of py-libp2p 0.8.1 that docs/libp2p.md lists.

`…_of_the_library` shows that it still has the defect: when one of them fails after an upgrade, the remedy may go. The
others show that the remedy works, and must never fail.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Awaitable, Callable, Iterator

import multiaddr
import pytest
import trio
from google.protobuf.message import DecodeError
from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.tools.anyio_service import Service, TrioManager, background_trio_service
from libp2p.tools.anyio_service.exceptions import TooManyChildrenException

from tests.p2p import LOOPBACK, StreamPeer, naked, naked_host, peer_info, running, until_heard
from tests.ports import free_port
from tether.errors import LinkClosed
from tether.newcomers import MAX_NEWCOMERS
from tether.node_key import NodeKey
from tether.testing import in_trio
from tether.topics import MAX_CHILD_TASKS, SteadyManager
from tether.transport import Libp2pTransport
from tether.wire import Stream

ECHO = TProtocol("/test/echo/1.0.0")
BAD_UTF8_LINE = b"\x04\xff\xfe\xff\n"


# The library leaves sockets and channels of its defaults to the collector, which warns; those of Tether's transport are
# under test in test_transport.py, where any warning is an error.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def _survives(peer: StreamPeer) -> None:
    """Somebody else can link still."""
    after = StreamPeer(listen=[])
    async with running(after):
        stream = await after.dial(peer)
        await stream.write(b"still there")
        await peer.changes.until(lambda: b"still there" in peer.data)


async def _ends_a_naked_host(attack: Callable[[str], Awaitable[None]], *, handler: bool = False) -> bool:
    """Attack a host as the library makes it, and say whether that ended it."""
    host = naked_host()

    async def fails(_: INetStream) -> None:
        raise RuntimeError("a handler failed")

    if handler:
        host.set_stream_handler(ECHO, fails)
    try:
        with trio.fail_after(5):
            async with naked(host, LOOPBACK) as address:
                await attack(address)
                await trio.sleep_forever()
    except BaseExceptionGroup:
        return True
    except trio.TooSlowError:
        return False


# --- 1: an exception in any stream handler ends the host


async def _open_echo(address: str) -> None:
    client = naked_host()
    async with naked(client):
        info = peer_info(address)
        await client.connect(info)
        await client.new_stream(info.peer_id, [ECHO])


@in_trio()
async def test_1_of_the_library_a_handler_that_raises_ends_the_host() -> None:
    assert await _ends_a_naked_host(_open_echo, handler=True)


@in_trio()
async def test_1_a_handler_that_raises_ends_its_stream_alone() -> None:
    class Failing(StreamPeer):
        async def on_stream(self, stream: Stream) -> None:
            if not self.streams:
                self.streams.append(stream)
                self.changes.note()
                await stream.read()
                raise RuntimeError("a handler failed")
            await super().on_stream(stream)

    peer, client = Failing(), StreamPeer(listen=[])
    async with running(peer, client):
        stream = await client.dial(peer)
        await stream.write(b"fail")
        assert await stream.read() == b""
        await _survives(peer)


# --- 2: garbage from a stranger ends the host, or its pubsub


async def _send_bad_utf8(address: str) -> None:
    client = naked_host()
    async with naked(client):
        info = peer_info(address)
        await client.connect(info)
        stream = await client.get_network().new_stream(info.peer_id)
        await stream.write(BAD_UTF8_LINE)
        await _until_ended(stream)


async def _until_ended(stream: INetStream) -> None:
    try:
        while await stream.read(1000):
            pass
    except Exception:  # noqa: BLE001 - it is to end, in whatever way
        pass


@in_trio()
async def test_2_of_the_library_six_bytes_from_a_stranger_end_the_host() -> None:
    assert await _ends_a_naked_host(_send_bad_utf8)


@in_trio()
async def test_2_bad_utf8_from_a_stranger_ends_its_stream_alone() -> None:
    peer = StreamPeer()
    async with running(peer):
        await _send_bad_utf8(peer.address)
        await _survives(peer)


@in_trio()
async def test_2_garbage_for_topics_from_a_member_ends_its_stream_alone() -> None:
    peer, other = StreamPeer(with_topics=True), StreamPeer(with_topics=True)
    member = StreamPeer(listen=[])
    async with running(peer, other, member):
        news = await peer.transport.subscribe("news")
        await other.transport.subscribe("news")
        await member.dial(peer)
        connection = member.transport._admitted[peer.transport.peer_id]
        garbage = await connection.new_stream()
        await member.transport._select(garbage, [PROTOCOL_ID_V11])
        await garbage.write(b"\x06\xff\xff\xff\xff\xff\xff")
        await _until_ended(garbage)
        await _survives(peer)
        await other.dial(peer)
        topics = other.transport._topics
        assert topics is not None
        await topics.pubsub.wait_for_subscription(ID.from_string(peer.transport.peer_id), "news", timeout=10)
        await until_heard(news, other, b"still there")


# An id of the kind that does not hold its key, as RSA's are, so that the key is looked for in the message.
OLD_KIND_OF_ID = ID(b"\x12\x20" + bytes(32))
MALFORMED = rpc_pb2.Message(
    data=b"x", topicIDs=["news"], from_id=OLD_KIND_OF_ID.to_bytes(), seqno=b"1", key=b"\xff\xff", signature=b"s"
)


@in_trio()
async def test_2_of_the_library_a_message_with_a_malformed_key_ends_pubsub() -> None:
    pubsub = Pubsub(naked_host(), GossipSub([PROTOCOL_ID_V11], 6, 4, 12), strict_signing=True)
    with pytest.raises(DecodeError):
        await pubsub.push_msg(OLD_KIND_OF_ID, MALFORMED)


@in_trio()
async def test_2_a_message_with_a_malformed_key_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    peer, member = StreamPeer(with_topics=True), StreamPeer(listen=[])
    async with running(peer, member):
        await member.dial(peer)
        topics = peer.transport._topics
        assert topics is not None
        forwarder = ID.from_string(member.transport.peer_id)
        await topics.pubsub.push_msg(forwarder, MALFORMED)
        assert "dropped a malformed" not in caplog.text, "nobody of that id is admitted"
        peer.transport._admitted[str(OLD_KIND_OF_ID)] = peer.transport._admitted[member.transport.peer_id]
        await topics.pubsub.push_msg(forwarder, MALFORMED)
        assert topics.pubsub.manager.is_running
    assert "dropped a malformed topic message" in caplog.text


@in_trio()
async def test_2_a_task_of_pubsub_that_fails_does_not_end_pubsub() -> None:
    peer = StreamPeer(with_topics=True)

    async def fails() -> None:
        raise RuntimeError("a task failed")

    async with running(peer):
        topics = peer.transport._topics
        assert topics is not None
        topics.pubsub.manager.run_task(fails)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert topics.pubsub.manager.is_running


# --- 3: the slot of an inbound connection never comes back


async def _come_and_go(address: str, times: int) -> int:
    """Return how many connections in a row worked."""
    for number in range(times):
        client = naked_host()
        async with naked(client):
            info = peer_info(address)
            try:
                with trio.fail_after(3):
                    await client.connect(info)
                    await client.new_stream(info.peer_id, [TProtocol("/ipfs/ping/1.0.0")])
            except Exception:  # noqa: BLE001 - the slots are used up
                return number
    return times


@in_trio()
async def test_3_of_the_library_slots_are_used_up_over_its_lifetime() -> None:
    config = ConnectionConfig(max_connections=4, min_connections=0, low_watermark=0, high_watermark=4)
    async with naked(naked_host(connection_config=config), LOOPBACK) as address:
        assert await _come_and_go(address, 6) == 4


@in_trio()
async def test_3_slots_come_back() -> None:
    peer = StreamPeer(max_peers=2)
    async with running(peer):
        limiter = peer.transport._network._inbound_limiter
        assert limiter.total_tokens == 4 + MAX_NEWCOMERS
        for _ in range(10):
            client = StreamPeer(listen=[])
            async with running(client):
                stream = await client.dial(peer)
                await stream.write(b"x")
            # The slot comes back first, and the swarm forgets the connection a moment later: both count against the limit.
            while limiter.borrowed_tokens or peer.transport.num_connections:
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(peer.streams) == 10


# --- 4: the default believes who speaks plaintext


async def _dials_in_plaintext(address: str) -> bool:
    key_pair = create_new_key_pair()
    client = new_host(
        key_pair=key_pair, sec_opt={TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(local_key_pair=key_pair)}
    )
    async with client.run([]):
        try:
            with trio.fail_after(5):
                await client.connect(peer_info(address))
        except Exception:  # noqa: BLE001 - refused, in whatever way
            return False
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(3):
                await client.close()
    return True


@in_trio()
async def test_4_of_the_library_plaintext_is_accepted() -> None:
    host = new_host(key_pair=create_new_key_pair())
    async with host.run([multiaddr.Multiaddr(LOOPBACK)]):
        assert await _dials_in_plaintext(str(host.get_addrs()[0]))
        await host.close()


@in_trio()
async def test_4_who_speaks_plaintext_is_refused() -> None:
    peer = StreamPeer()
    async with running(peer):
        assert not await _dials_in_plaintext(peer.address)
        assert peer.streams == []
        await _survives(peer)


# --- 5: limits far below a thousand


def test_5_of_the_library_the_limits_are_a_few_hundred() -> None:
    network = new_host(key_pair=create_new_key_pair()).get_network()
    assert isinstance(network, Swarm)
    assert network.connection_config.max_connections == 300
    assert network._resource_manager is not None
    assert network._resource_manager.connection_limits.max_established_inbound == 256


def test_5_all_limits_are_twice_the_peers_and_the_newcomers() -> None:
    transport = Libp2pTransport(NodeKey.generate(), max_peers=1200)
    network, limits = transport._network, transport._network._resource_manager
    assert limits is not None
    room = 2400 + MAX_NEWCOMERS
    assert network.connection_config.max_connections == room
    assert network._inbound_limiter.total_tokens == room
    assert limits.connection_limits.max_established_inbound == room
    assert limits.connection_limits.max_established_total == room
    assert limits.limits.max_connections >= room
    assert limits.circuit_breaker is None, "five refusals would refuse everybody for a minute"


# --- 6: a service of 1,000 tasks ends


class _ManyTasks(Service):
    def __init__(self) -> None:
        self.started = trio.Event()

    async def run(self) -> None:
        for _ in range(1_001):
            self.manager.run_task(trio.sleep_forever)
        self.started.set()
        await self.manager.wait_finished()


@in_trio()
async def test_6_of_the_library_the_thousandth_peer_ends_pubsub() -> None:
    with pytest.RaisesGroup(TooManyChildrenException, flatten_subgroups=True, allow_unwrapped=True):
        async with background_trio_service(_ManyTasks()) as manager:
            await manager.wait_finished()


@in_trio()
async def test_6_pubsub_takes_more_than_a_thousand_peers() -> None:
    service = _ManyTasks()
    manager = SteadyManager(service)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await service.started.wait()
        assert manager.is_running
        assert MAX_CHILD_TASKS >= 100_000
        nursery.cancel_scope.cancel()
    assert isinstance(manager, TrioManager)


# --- 7: a peer that is frozen is not noticed: test_links_libp2p.py freezes a process


# --- 8: who reconnects while the old connection looks alive publishes to nobody


@in_trio()
async def test_8_who_comes_again_under_the_same_key_is_heard_on_topics() -> None:
    key = NodeKey.generate()
    hub, old, new = StreamPeer(with_topics=True), StreamPeer(key, with_topics=True), StreamPeer(key, with_topics=True)
    async with running(hub, old):
        news = await hub.transport.subscribe("news")
        for peer in (old, new):
            # The old one goes on running: for the hub its connection is alive.
            async with running(*[peer] * (peer is new)):
                await peer.transport.subscribe("news")
                await peer.dial(hub)
                topics = peer.transport._topics
                assert topics is not None
                await topics.pubsub.wait_for_subscription(ID.from_string(hub.transport.peer_id), "news", timeout=10)
                await until_heard(news, peer, b"new" if peer is new else b"old")


# --- 9: a write that is cancelled garbles the connection, which stays: test_links_libp2p.py floods a frozen process


# --- 10: a failed dial blocks the peer for a minute


@in_trio()
async def test_10_of_the_library_a_peer_that_is_back_cannot_be_dialled_for_a_minute() -> None:
    host, port = naked_host(), free_port()
    address = f"/ip4/127.0.0.1/tcp/{port}"
    client = naked_host()
    async with naked(client):
        info = peer_info(f"{address}/p2p/{host.get_id()}")
        with pytest.raises(Exception, match="unable to connect"):
            await client.connect(info)
        async with naked(host, address):
            with pytest.raises(Exception, match="recently failed"):
                await client.connect(info)


@in_trio()
async def test_10_a_peer_that_is_back_is_dialled_at_once() -> None:
    key, port = NodeKey.generate(), free_port()
    back = StreamPeer(key, listen=[f"/ip4/127.0.0.1/tcp/{port}"])
    client = StreamPeer(listen=[])
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{key.peer_id}"
    async with running(client):
        for _ in range(2):
            with pytest.raises(LinkClosed, match="connection refused"):
                await client.transport.dial(address)
        async with running(back):
            started = trio.current_time()
            assert (await client.transport.dial(address)).peer_id == key.peer_id
            assert trio.current_time() - started < 2.0
