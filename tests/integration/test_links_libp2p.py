from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from tests.p2p import LinkNode, PeerProcess, StreamPeer, linking, running
from tests.ports import free_port
from tether.dialling import Dialler
from tether.errors import LinkClosed, LinkFull
from tether.identity import Identity
from tether.invites import create_invite, join
from tether.link import Link, LinkSettings
from tether.messages import GetHealth, Health, Hello, InferCancel, InferTokens, encode
from tether.network import Network
from tether.node_key import NodeKey
from tether.testing import in_trio
from tether.wire import Stream


def _framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@in_trio()
async def test_a_link_over_libp2p_comes_up_carries_messages_and_ends_with_a_goodbye() -> None:
    network = Network.found()
    orchestrator = LinkNode(network, "orchestrator").take(InferTokens)
    worker = LinkNode(network, "worker")
    async with linking(orchestrator, worker) as nursery:
        worker.dials(nursery, *orchestrator.transport.addresses)
        link = await worker.until_up(orchestrator.links.peer_id)
        sent = [InferTokens("job", 1, position, (position,), "é" * position) for position in range(200)]
        for message in sent:
            link.send(message)
        await orchestrator.changes.until(lambda: len(orchestrator.received) == 200)
        assert orchestrator.received == sent
        link.close("done")
        await orchestrator.changes.until(lambda: orchestrator.reasons)
        assert orchestrator.reasons == ["the peer left: done"]


@in_trio()
async def test_large_messages_go_both_ways_at_once() -> None:
    network = Network.found()
    orchestrator = LinkNode(network, "orchestrator")
    gateway = LinkNode(network, "gateway", "worker").take(InferCancel)
    orchestrator.take(InferTokens)
    async with linking(orchestrator, gateway) as nursery:
        gateway.dials(nursery, *orchestrator.transport.addresses)
        link = await gateway.until_up(orchestrator.links.peer_id)
        back = await orchestrator.until_up(gateway.links.peer_id)
        for number in range(15):
            link.send(InferTokens("job", 1, number, (), "x" * 1_000_000))
            back.send(InferCancel("y" * 1_000_000, number))
        await orchestrator.changes.until(lambda: len(orchestrator.received) == 15)
        await gateway.changes.until(lambda: len(gateway.received) == 15)
        assert not orchestrator.reasons


@in_trio()
async def test_who_is_no_member_has_no_link_and_no_connection() -> None:
    orchestrator = LinkNode(Network.found(), "orchestrator")
    stranger = LinkNode(Network.found(), "worker", settings=LinkSettings(refused_redial_seconds=60.0))
    refusals: list[Exception] = []
    refused = trio.Event()

    def note(_: str, error: Exception) -> None:
        refusals.append(error)
        refused.set()

    stranger.dialler = Dialler(stranger.links, on_refused=note)
    async with linking(orchestrator, stranger) as nursery:
        stranger.dials(nursery, *orchestrator.transport.addresses)
        await refused.wait()
        assert "signed by the key of another network" in str(refusals[0])
        while orchestrator.transport.num_connections:
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert orchestrator.events == []


@in_trio()
async def test_a_member_of_a_joined_machine_is_renewed_over_its_first_link(tmp_path: Path) -> None:
    network = Network.found()
    orchestrator = LinkNode(network, "orchestrator")
    async with linking(orchestrator) as nursery:
        token = create_invite(network, ["worker"], 3_600.0, orchestrator.transport.addresses)
        joined = join(tmp_path, token, time.time())
        worker = LinkNode(joined, "worker")
        await nursery.start(worker.links.run)
        worker.dials(nursery, *joined.addresses)
        await worker.until_up(orchestrator.links.peer_id)
        assert joined.may_issue(time.time())[1] > time.time() + 80 * 86_400


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\xff" * 100, _framed(b"{}"), _framed(encode(GetHealth(1)))])
def test_a_stream_without_a_hello_is_ended_and_disturbs_nobody(sent: bytes) -> None:
    @in_trio()
    async def main() -> None:
        network = Network.found()
        settings = LinkSettings(hello_seconds=0.5)
        orchestrator = LinkNode(network, "orchestrator", settings=settings, admission_seconds=1.0).take(InferTokens)
        worker, attacker = LinkNode(network, "worker"), StreamPeer(listen=[])
        async with linking(orchestrator, worker) as nursery, running(attacker):
            worker.dials(nursery, *orchestrator.transport.addresses)
            link = await worker.until_up(orchestrator.links.peer_id)
            stream = await attacker.transport.dial(orchestrator.transport.addresses[0])
            await stream.write(sent)
            await _drain(stream)
            link.send(InferTokens("job", 1, 0, (), "still there"))
            await orchestrator.changes.until(lambda: orchestrator.received)
            assert orchestrator.events == ["up worker"]

    main()


async def _drain(stream: Stream) -> None:
    while await stream.read():
        pass


@in_trio()
async def test_a_member_that_sends_garbage_loses_its_own_link_alone() -> None:
    network = Network.found()
    orchestrator = LinkNode(network, "orchestrator").take(InferTokens)
    worker = LinkNode(network, "worker")
    key = NodeKey.generate()
    bad, identity = StreamPeer(key, listen=[]), Identity(network, key, ["worker"])
    async with linking(orchestrator, worker) as nursery, running(bad):
        worker.dials(nursery, *orchestrator.transport.addresses)
        link = await worker.until_up(orchestrator.links.peer_id)
        stream = await bad.transport.dial(orchestrator.transport.addresses[0])
        hello = Hello(1, "boot", ("worker",), "bad", "here", identity.chain(time.time()))
        await stream.write(_framed(encode(hello)))
        await orchestrator.until_up(key.peer_id)
        await stream.write(b"\x00\xff\xff\xff" + bytes(100))
        await _drain(stream)
        await orchestrator.changes.until(lambda: orchestrator.reasons)
        assert "protocol violation: a frame of 16777215 bytes" in orchestrator.reasons[0]
        link.send(InferTokens("job", 1, 0, (), "still there"))
        await orchestrator.changes.until(lambda: orchestrator.received)


# --- peers in processes of their own


@in_trio(seconds=60.0)
async def test_a_killed_peer_is_noticed_at_once_and_a_restarted_one_links_again() -> None:
    network, key = Network.found(), NodeKey.generate()
    orchestrator = LinkNode(network, "orchestrator")
    async with linking(orchestrator):
        with PeerProcess(network, key, orchestrator.transport.addresses[0]) as peer:
            link = await orchestrator.until_up(key.peer_id)
            killed = trio.current_time()
            peer.kill()
            await orchestrator.changes.until(lambda: orchestrator.reasons)
            assert orchestrator.times[0] - killed < 1.0
            with pytest.raises(LinkClosed):
                link.send(InferCancel("job", 1))
        with PeerProcess(network, key, orchestrator.transport.addresses[0]):
            await orchestrator.until_up(key.peer_id)
    assert orchestrator.events[:3] == ["up worker", "down worker", "up worker"]


@in_trio(seconds=60.0)
async def test_a_frozen_peer_is_noticed_within_about_three_seconds_and_links_again_when_it_thaws() -> None:
    network, key = Network.found(), NodeKey.generate()
    orchestrator = LinkNode(network, "orchestrator")
    other = LinkNode(network, "worker", name="other")
    async with linking(orchestrator, other) as nursery:
        other.dials(nursery, *orchestrator.transport.addresses)
        await orchestrator.until_up(other.links.peer_id)
        with PeerProcess(network, key, orchestrator.transport.addresses[0]) as peer:
            await orchestrator.until_up(key.peer_id)
            peer.freeze()
            frozen = trio.current_time()
            await orchestrator.changes.until(lambda: orchestrator.reasons)
            assert orchestrator.reasons == ["silent for 3 s"]
            assert 1.9 < orchestrator.times[0] - frozen < 3.8
            assert orchestrator.links.get(other.links.peer_id) is not None
            peer.thaw()
            await orchestrator.until_up(key.peer_id)
        assert orchestrator.transport.num_connections <= 2


@in_trio(seconds=60.0)
async def test_a_frozen_peer_that_is_being_flooded_loses_its_link_whole_and_nothing_waits_for_it() -> None:
    # Defect 9: the write that is under way cannot end. It must not be cancelled and go on later on the same connection.
    network, key = Network.found(), NodeKey.generate()
    orchestrator = LinkNode(network, "orchestrator").take(InferTokens)
    async with linking(orchestrator):
        with PeerProcess(network, key, orchestrator.transport.addresses[0]) as peer:
            link = await orchestrator.until_up(key.peer_id)
            peer.freeze()
            frozen = trio.current_time()
            with pytest.raises(LinkFull):
                _flood(orchestrator, key)
            assert link.is_open
            await orchestrator.changes.until(lambda: orchestrator.reasons)
            assert orchestrator.times[0] - frozen < 6.0
            while orchestrator.transport.num_connections:
                await trio.testing.wait_all_tasks_blocked(0.01)
            assert trio.current_time() - frozen < 8.0
            peer.thaw()
            again = await orchestrator.until_up(key.peer_id)
            orchestrator.received.clear()
            again.send(InferCancel("after", 7))
            answer = InferTokens("after", 7, 0, (17, 4711), "a few words")
            await orchestrator.changes.until(lambda: answer in orchestrator.received)


def _flood(node: LinkNode, key: NodeKey) -> None:
    link = node.links.get(key.peer_id)
    assert link is not None
    for attempt in range(1_000):
        link.send(InferCancel("x" * 100_000, attempt))


@in_trio(seconds=60.0)
async def test_a_peer_that_floods_does_not_keep_others_from_being_heard() -> None:
    network, key = Network.found(), NodeKey.generate()
    orchestrator = LinkNode(network, "orchestrator")
    flood = 0

    def count(*_: object) -> None:
        nonlocal flood
        flood += 1
        orchestrator.changes.note()

    def answer(link: Link, message: GetHealth) -> None:
        link.send(Health(message.request_id, None, 1, 1, 0, 0))

    orchestrator.links.on(InferTokens, count)
    orchestrator.links.on(GetHealth, answer)
    gateway = LinkNode(network, "gateway")
    async with linking(orchestrator, gateway) as nursery:
        gateway.dials(nursery, *orchestrator.transport.addresses)
        link = await gateway.until_up(orchestrator.links.peer_id)
        with PeerProcess(network, key, orchestrator.transport.addresses[0], flood=True):
            await orchestrator.changes.until(lambda: flood > 1_000)
            for _ in range(20):
                await gateway.links.ask(link, GetHealth, Health, timeout_seconds=2.0)
            assert orchestrator.reasons == []


@in_trio(seconds=60.0)
async def test_the_newest_process_of_a_key_wins_while_the_old_one_is_frozen() -> None:
    network, key = Network.found(), NodeKey.generate()
    orchestrator = LinkNode(network, "orchestrator")
    async with linking(orchestrator):
        address = orchestrator.transport.addresses[0]
        with PeerProcess(network, key, address) as old:
            first = await orchestrator.until_up(key.peer_id)
            old.freeze()
            with PeerProcess(network, key, address):
                await orchestrator.changes.until(lambda: orchestrator.links.get(key.peer_id) not in {None, first})
                assert orchestrator.reasons[0] in {"a newer link took its place", "silent for 3 s"}
                second = orchestrator.links.get(key.peer_id)
                assert second is not None
                assert second.boot_id != first.boot_id


# --- orchestrators among themselves


@in_trio(seconds=60.0)
async def test_orchestrators_that_dial_each_other_settle_on_one_link_and_hear_each_others_topics() -> None:
    network = Network.found()
    nodes = [LinkNode(network, "orchestrator", name=name, with_topics=True) for name in "abc"]
    async with linking(*nodes) as nursery:
        everywhere = tuple(address for node in nodes for address in node.transport.addresses)
        for node in nodes:
            node.dials(nursery, *everywhere)
        for node in nodes:
            for other in nodes:
                if other is not node:
                    await node.until_up(other.links.peer_id)
        channels = [await node.transport.subscribe("tether/control/here") for node in nodes]
        heard: list[set[str]] = [set() for _ in nodes]

        async def listen(number: int) -> None:
            async for origin, _ in channels[number]:
                heard[number].add(origin)
                if all(len(each) == 2 for each in heard):
                    done.set()

        done = trio.Event()
        for number in range(3):
            nursery.start_soon(listen, number)
        # Lossy by contract, so it is repeated, as the real news are.
        while not done.is_set():
            for node in nodes:
                await node.transport.publish("tether/control/here", b"news")
            with trio.move_on_after(0.5):
                await done.wait()
        for node in nodes:
            assert len(node.links.up) == 2
            assert len(node.events) <= 6


@in_trio(seconds=60.0)
async def test_an_orchestrator_that_restarts_on_its_port_is_linked_again() -> None:
    network, key, port = Network.found(), NodeKey.generate(), free_port()
    listen = [f"/ip4/127.0.0.1/tcp/{port}"]
    worker = LinkNode(network, "worker")
    async with linking(worker) as nursery:
        worker.dials(nursery, f"{listen[0]}/p2p/{key.peer_id}")
        for _ in range(2):
            orchestrator = LinkNode(network, "orchestrator", key=key, listen=listen)
            async with linking(orchestrator):
                await worker.until_up(key.peer_id)
                await orchestrator.until_up(worker.links.peer_id)
            await worker.changes.until(lambda: worker.links.get(key.peer_id) is None)
    assert worker.events == ["up orchestrator", "down orchestrator"] * 2
