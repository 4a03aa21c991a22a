from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator

from tests.p2p import LOOPBACK, StreamPeer, naked, naked_host, peer_info, running, taken_port, until_heard
from tests.ports import free_port
from tether.addresses import parse_address
from tether.errors import LinkClosed, PortTaken, ProtocolViolation, UsageError
from tether.node_key import NodeKey
from tether.testing import InMemoryNetwork, in_trio
from tether.transport import LINK_PROTOCOL, Libp2pTransport
from tether.wire import Stream


def test_a_peer_id_is_what_libp2p_calls_the_key() -> None:
    for seed in (b"\x00" * 32, b"\x01" * 32, b"\xff" * 32, NodeKey.generate().seed):
        key_pair = create_new_key_pair(seed)
        assert NodeKey(seed).peer_id == str(ID.from_pubkey(key_pair.public_key))
        assert NodeKey(seed).public_key == key_pair.public_key.to_bytes()


@in_trio()
async def test_bytes_go_both_ways_and_each_side_knows_the_other() -> None:
    one, other = StreamPeer(), StreamPeer()
    async with running(one, other):
        near = await one.dial(other)
        far = other.streams[0]
        assert (near.peer_id, far.peer_id) == (other.transport.peer_id, one.transport.peer_id)
        sent = bytes(range(256)) * 4_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(near.write, sent)
            await other.changes.until(lambda: len(b"".join(other.data)) == len(sent))
        assert b"".join(other.data) == sent
        await far.write(b"back")
        assert await near.read() == b"back"


_LOG_SCRIPT = """
import logging, sys
from tether import console
console.configure_logging(verbose=int(sys.argv[1]))
from tether.node_key import NodeKey
from tether.transport import Libp2pTransport
Libp2pTransport(NodeKey.generate())
logging.getLogger("libp2p.transport.tcp").warning("Failed to open TCP stream")
"""


@pytest.mark.parametrize(("verbose", "heard"), [(0, False), (1, False), (2, True)])
def test_libp2p_is_heard_in_the_logs_format_and_only_when_very_verbose(verbose: int, heard: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LIBP2P_DEBUG"}
    done = subprocess.run(
        [sys.executable, "-c", _LOG_SCRIPT, str(verbose)], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "Failed to open TCP stream" in line]
    assert [" WARNING " in line for line in lines] == [True] * heard


@in_trio()
async def test_an_abort_is_seen_at_once_and_frees_the_connection() -> None:
    one, other = StreamPeer(), StreamPeer()
    async with running(one, other):
        stream = await one.dial(other)
        await stream.write(b"last words")
        await other.changes.until(lambda: other.data)
        stream.abort()
        stream.abort()
        with trio.fail_after(1.0):
            await other.changes.until(lambda: other.num_ended)
        assert await stream.read() == b""
        with pytest.raises(LinkClosed):
            await other.streams[0].write(b"too late")


@pytest.mark.parametrize("address", ["", "localhost:4001", "/ip4/127.0.0.1/tcp/1", "/ip4/1.2.3.4/p2p/x", "/nonsense/1"])
def test_an_address_of_another_form_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(UsageError, match="/ip4/<address>/tcp/<port>/p2p/<peer id>"):
        parse_address(address)


@pytest.mark.parametrize("address", ["4001", "/ip4/0.0.0.0", "/dns4/localhost/tcp/1", "/ip4/300.0.0.1/tcp/1"])
def test_a_malformed_listen_address_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(UsageError, match="/ip4/<address>/tcp/<port>"):
        Libp2pTransport(NodeKey.generate(), listen=[address])
    if not address.startswith("/dns4"):
        with pytest.raises(UsageError, match="is not an address to announce"):
            Libp2pTransport(NodeKey.generate(), announce=[address])


@in_trio()
async def test_a_port_that_is_taken_is_an_error_that_says_what_to_do() -> None:
    with taken_port() as port:
        peer = StreamPeer(listen=[f"/ip4/127.0.0.1/tcp/{port}"])
        with pytest.raises(PortTaken, match=rf"port {port} on 127.0.0.1 is taken; .*--listen"):
            await peer.transport.run(peer.on_stream)


@in_trio()
async def test_an_address_that_is_not_this_machines_is_an_error() -> None:
    peer = StreamPeer(listen=["/ip4/192.0.2.1/tcp/4001"])
    with pytest.raises(UsageError, match=r"cannot listen on 192.0.2.1 port 4001"):
        await peer.transport.run(peer.on_stream)


@in_trio()
async def test_who_listens_everywhere_tells_addresses_that_can_be_dialled() -> None:
    everywhere, announced = (
        StreamPeer(listen=["/ip4/0.0.0.0/tcp/0"]),
        StreamPeer(announce=["/dns4/example.org/tcp/4001"]),
    )
    dialler = StreamPeer(listen=[])
    async with running(everywhere, announced, dialler):
        addresses = everywhere.transport.addresses
        assert addresses
        assert not any("0.0.0.0" in address for address in addresses)
        assert addresses[-1].startswith("/ip4/127.0.0.1/tcp/"), "loopback comes last"
        assert (await dialler.transport.dial(addresses[-1])).peer_id == everywhere.transport.peer_id
        assert announced.transport.addresses == (f"/dns4/example.org/tcp/4001/p2p/{announced.transport.peer_id}",)
        assert dialler.transport.addresses == ()


@in_trio()
async def test_dialling_nobody_somebody_else_or_too_early_says_so() -> None:
    one, other = StreamPeer(), StreamPeer()
    stranger = NodeKey.generate().peer_id
    with pytest.raises(LinkClosed, match="not running"):
        await one.transport.dial(f"/ip4/127.0.0.1/tcp/1/p2p/{stranger}")
    async with running(one, other):
        with pytest.raises(LinkClosed, match="connection refused"):
            await one.transport.dial(f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{stranger}")
        with pytest.raises(LinkClosed, match="another peer answers there"):
            await one.transport.dial(other.address.replace(other.transport.peer_id, stranger))
        with pytest.raises(UsageError):
            await one.transport.dial("somewhere")


@in_trio()
async def test_a_peer_that_is_no_tether_node_cannot_be_dialled() -> None:
    peer = StreamPeer(listen=[])
    async with running(peer), naked(naked_host(), LOOPBACK) as address:
        with pytest.raises(LinkClosed, match="not supported"):
            await peer.transport.dial(address)
        assert peer.transport.num_connections == 0 or await _drained(peer)


async def _drained(peer: StreamPeer) -> bool:
    while peer.transport.num_connections:
        await trio.testing.wait_all_tasks_blocked(0.01)
    return True


@in_trio()
async def test_a_connection_without_an_accepted_link_is_closed() -> None:
    peer = StreamPeer(admits=False, admission_seconds=0.5)
    dialler = StreamPeer(listen=[])
    async with running(peer, dialler), naked(naked_host()):
        stranger = naked_host()
        async with naked(stranger):
            await stranger.connect(peer_info(peer.address))
            stream = await dialler.transport.dial(peer.address)
            assert peer.transport.num_connections == 2
            started = trio.current_time()
            assert await stream.read() == b""
            await _drained(peer)
            assert 0.1 < trio.current_time() - started < 2.5


@in_trio()
async def test_a_stranger_is_asked_nothing_and_served_nothing_but_the_link() -> None:
    peer = StreamPeer(admits=False, with_topics=True, admission_seconds=1.0)
    stranger = naked_host()
    opened: list[str] = []

    async def note(_: object) -> None:
        opened.append("a stream")

    for protocol in ("/ipfs/id/1.0.0", "/meshsub/1.1.0", "/meshsub/1.2.0"):
        stranger.set_stream_handler(TProtocol(protocol), note)
    async with running(peer), naked(stranger):
        await stranger.connect(peer_info(peer.address))
        served = await stranger.send_command(ID.from_string(peer.transport.peer_id), "ls")
        assert sorted(served) == ["/meshsub/1.1.0", LINK_PROTOCOL]
        stream = await stranger.new_stream(ID.from_string(peer.transport.peer_id), [TProtocol("/meshsub/1.1.0")])
        await stream.write(b"\x06garbage")
        with pytest.raises(StreamError), trio.fail_after(10):
            await stream.read(100)
        assert opened == []


@in_trio()
async def test_a_stranger_that_opens_many_streams_is_cut_off() -> None:
    peer = StreamPeer(admits=False, admission_seconds=20.0)
    stranger = naked_host()
    async with running(peer), naked(stranger):
        await stranger.connect(peer_info(peer.address))
        connection = stranger.get_network().get_connections(ID.from_string(peer.transport.peer_id))[0]
        for _ in range(12):
            try:
                stream = await connection.new_stream()
                await MultiselectCommunicator(stream).write("/multistream/1.0.0")
            except Exception:  # noqa: BLE001 - it is being cut off, in whatever way
                break
        with trio.fail_after(5):
            await _drained(peer)


async def _leave_in_the_middle(peer: StreamPeer) -> None:
    """Open a stream for topics as a stranger, and go without a word while it waits for the admission."""
    stranger = naked_host()
    async with naked(stranger):
        await stranger.connect(peer_info(peer.address))
        await stranger.new_stream(ID.from_string(peer.transport.peer_id), [TProtocol("/meshsub/1.1.0")])


@in_trio()
async def test_nothing_is_kept_of_strangers_that_left_while_a_stream_of_theirs_waited() -> None:
    peer = StreamPeer(admits=False, with_topics=True, admission_seconds=1.0)
    async with running(peer):
        for _ in range(6):
            await _leave_in_the_middle(peer)
        await _drained(peer)
        # A stranger that came last is closed when the same wait is over for all that came before.
        last = naked_host()
        async with naked(last):
            await last.connect(peer_info(peer.address))
            stream = await last.new_stream(ID.from_string(peer.transport.peer_id), [TProtocol("/meshsub/1.1.0")])
            with pytest.raises(StreamError), trio.fail_after(10):
                await stream.read(100)
        await _drained(peer)
        with trio.fail_after(10):
            while peer.transport._admissions or peer.transport._closing:
                await trio.testing.wait_all_tasks_blocked(0.01)


async def _until_hung_up(client: socket.socket) -> None:
    client.setblocking(False)
    while True:
        await trio.lowlevel.wait_readable(client)
        if not client.recv(1000):
            return


@in_trio()
async def test_silent_strangers_keep_nobody_out_and_take_no_admitted_connection() -> None:
    peer, member, later = StreamPeer(max_connections=40), StreamPeer(listen=[]), StreamPeer(listen=[])
    async with running(peer, member, later):
        stream = await member.dial(peer)
        port = int(peer.address.split("/")[4])
        with ExitStack() as stack:
            silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(60)]
            # All but the last twenty are turned away, the oldest first.
            for stranger in silent[:40]:
                with trio.fail_after(10):
                    await _until_hung_up(stranger)
            late = await later.dial(peer)
            for each, data in ((stream, b"still here"), (late, b"here too")):
                await each.write(data)
            await peer.changes.until(lambda: {b"still here", b"here too"} <= set(peer.data))
            limiter = peer.transport._network._inbound_limiter
            while limiter.borrowed_tokens > 2 + 19:
                await trio.testing.wait_all_tasks_blocked(0.01)
        while limiter.borrowed_tokens > 2:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(peer.transport._newcomers) == 0


@in_trio()
async def test_many_strangers_that_shook_hands_and_say_nothing_keep_nobody_out() -> None:
    peer = StreamPeer(admits=False, admission_seconds=60.0, max_connections=6)
    strangers = [StreamPeer(listen=[]) for _ in range(5)]
    async with running(peer, *strangers):
        streams = [await stranger.transport.dial(peer.address) for stranger in strangers]
        for stream in streams[:2]:
            with trio.fail_after(10):
                assert await stream.read() == b"", "of six connections three may be newcomers'"
        peer.transport.admit(next(each for each in peer.streams if each.peer_id == strangers[-1].transport.peer_id))
        assert len(peer.transport._newcomers) == 2


@in_trio()
async def test_many_peers_come_and_go_within_small_limits() -> None:
    hub = StreamPeer(max_peers=12, with_topics=True)
    async with running(hub):
        for _ in range(2):
            peers = [StreamPeer(listen=[]) for _ in range(22)]
            async with running(*peers):
                for peer in peers:
                    await peer.dial(hub)
                assert hub.transport.num_connections == 22
            with trio.fail_after(10):
                await _drained(hub)


# --- topics


async def _joined(one: StreamPeer, other: StreamPeer, topic: str) -> None:
    """Wait until both know that the other is subscribed."""
    for peer, remote in ((one, other), (other, one)):
        topics = peer.transport._topics
        assert topics is not None
        await topics.pubsub.wait_for_subscription(ID.from_string(remote.transport.peer_id), topic, timeout=10)


@in_trio()
async def test_a_burst_on_a_topic_arrives() -> None:
    one, other = StreamPeer(with_topics=True), StreamPeer(with_topics=True)
    async with running(one, other):
        news, own = await other.transport.subscribe("news"), await one.transport.subscribe("news")
        await one.dial(other)
        await _joined(one, other, "news")
        await until_heard(news, one, b"there")
        for number in range(300):
            await one.transport.publish("news", number.to_bytes(2, "big") + bytes(200))
        received: set[int] = set()
        while len(received) < 300:
            origin, payload = await news.receive()
            assert origin == one.transport.peer_id
            if payload != b"there":
                received.add(int.from_bytes(payload[:2], "big"))
        assert received == set(range(300))
        with pytest.raises(trio.WouldBlock):
            own.receive_nowait()


@in_trio()
async def test_several_subscribers_each_get_a_topic_and_one_that_left_gets_none() -> None:
    one, other = StreamPeer(with_topics=True), StreamPeer(with_topics=True)
    async with running(one, other):
        first, second = [await other.transport.subscribe("news") for _ in range(2)]
        await one.transport.subscribe("news")
        await one.dial(other)
        await _joined(one, other, "news")
        await until_heard(first, one, b"1")
        await until_heard(second, one, b"1")
        first.close()
        await until_heard(second, one, b"2")
        second.close()
        await one.transport.publish("news", b"3")
        topics = other.transport._topics
        assert topics is not None
        while topics.pubsub.topic_ids:
            await trio.testing.wait_all_tasks_blocked(0.01)


@in_trio()
async def test_news_of_somebody_who_is_not_admitted_here_is_dropped_though_a_member_forwards_it() -> None:
    hub, middle, outsider = (StreamPeer(with_topics=True) for _ in range(3))
    async with running(hub, middle, outsider):
        news = await hub.transport.subscribe("news")
        heard = await middle.transport.subscribe("news")
        await outsider.transport.subscribe("news")
        await middle.dial(hub)
        await outsider.dial(middle)
        await _joined(hub, middle, "news")
        await _joined(middle, outsider, "news")
        await until_heard(heard, outsider, b"from outside")
        assert await until_heard(news, middle, b"from a member") == []


@in_trio()
async def test_topics_have_their_limits() -> None:
    peer, without = StreamPeer(with_topics=True), StreamPeer()
    with pytest.raises(LinkClosed):
        await peer.transport.publish("news", b"")
    async with running(peer, without):
        with pytest.raises(ProtocolViolation, match="921600 is the most"):
            await peer.transport.publish("news", bytes(921_601))
        with pytest.raises(LinkClosed, match="no topics"):
            await without.transport.subscribe("news")
    with pytest.raises(TypeError):
        peer.transport.admit(_foreign_stream())


def _foreign_stream() -> Stream:
    class Foreign:
        peer_id = InMemoryNetwork().transport().peer_id

        async def read(self) -> bytes:
            return b""

        async def write(self, data: bytes) -> None:
            del data

        def abort(self) -> None:
            pass

    return Foreign()


@in_trio()
async def test_garbage_before_the_handshake_disturbs_nobody() -> None:
    peer, dialler = StreamPeer(), StreamPeer(listen=[])
    async with running(peer, dialler):
        port = int(peer.address.split("/")[4])
        for garbage in (
            b"",
            b"\x00" * 100,
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff" * 3,
        ):
            with socket.create_connection(("127.0.0.1", port)) as attacker:
                attacker.sendall(garbage)
        assert (await dialler.dial(peer)).peer_id == peer.transport.peer_id
