from __future__ import annotations

import time

import pytest
import trio

from tether.errors import LinkClosed, UsageError
from tether.testing import WINDOW_BYTES, InMemoryNetwork, InMemoryStream, InMemoryTransport, in_trio
from tether.wire import Stream


async def _pair(
    network: InMemoryNetwork, nursery: trio.Nursery
) -> tuple[InMemoryTransport, InMemoryTransport, InMemoryStream, InMemoryStream]:
    """Return two transports, and both ends of a stream from the first to the second."""
    one, other = network.transport(), network.transport()
    taken: list[Stream] = []
    taken_one = trio.Event()

    async def take(stream: Stream) -> None:
        taken.append(stream)
        taken_one.set()
        await trio.sleep_forever()

    await nursery.start(one.run, take)
    await nursery.start(other.run, take)
    near = await one.dial(other.addresses[0])
    await taken_one.wait()
    far = taken[0]
    assert isinstance(far, InMemoryStream)
    return one, other, near, far


async def _read_exactly(stream: Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await stream.read()
    return data


@in_trio()
async def test_both_ends_know_each_other_and_bytes_arrive_in_order() -> None:
    async with trio.open_nursery() as nursery:
        one, other, near, far = await _pair(InMemoryNetwork(), nursery)
        assert (near.peer_id, far.peer_id) == (other.peer_id, one.peer_id)
        await near.write(b"a question")
        assert await far.read() == b"a question"
        await far.write(b"an ")
        await far.write(b"answer")
        assert await _read_exactly(near, 9) == b"an answer"
        nursery.cancel_scope.cancel()


@in_trio()
async def test_pieces_can_be_as_small_as_a_byte() -> None:
    async with trio.open_nursery() as nursery:
        _, _, near, far = await _pair(InMemoryNetwork(piece_bytes=1), nursery)
        await near.write(b"abc")
        assert [await far.read() for _ in range(3)] == [b"a", b"b", b"c"]
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_writer_waits_for_its_reader() -> None:
    async with trio.open_nursery() as nursery:
        _, _, near, far = await _pair(InMemoryNetwork(), nursery)
        await near.write(bytes(WINDOW_BYTES))
        written = trio.Event()

        async def write_more() -> None:
            await near.write(b"x")
            written.set()

        nursery.start_soon(write_more)
        await trio.testing.wait_all_tasks_blocked()
        assert not written.is_set()
        await far.read()
        await written.wait()
        nursery.cancel_scope.cancel()


@in_trio()
async def test_what_was_written_before_the_end_still_arrives() -> None:
    async with trio.open_nursery() as nursery:
        _, _, near, far = await _pair(InMemoryNetwork(), nursery)
        await near.write(b"last words")
        near.abort()
        near.abort()
        assert await far.read() == b"last words"
        assert await far.read() == b""
        assert await near.read() == b""
        with pytest.raises(LinkClosed):
            await far.write(b"too late")
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_cut_ends_connections_and_prevents_new_ones_until_it_heals() -> None:
    async with trio.open_nursery() as nursery:
        network = InMemoryNetwork()
        one, other, near, far = await _pair(network, nursery)
        assert network.num_streams(one.peer_id, other.peer_id) == 1
        network.cut(one.peer_id, other.peer_id)
        assert await near.read() == await far.read() == b""
        assert network.num_streams(one.peer_id, other.peer_id) == 0
        with pytest.raises(LinkClosed, match="nobody answers"):
            await one.dial(other.addresses[0])
        network.heal(one.peer_id, other.peer_id)
        assert (await one.dial(other.addresses[0])).peer_id == other.peer_id
        nursery.cancel_scope.cancel()


@in_trio()
async def test_nothing_of_a_frozen_peer_moves_until_it_thaws() -> None:
    async with trio.open_nursery() as nursery:
        network = InMemoryNetwork()
        one, other, near, far = await _pair(network, nursery)
        await near.write(b"before")
        network.freeze(other.peer_id)
        assert network.is_frozen(other.peer_id)
        read: list[bytes] = []

        async def read_one() -> None:
            read.append(await far.read())

        async with trio.open_nursery() as reading:
            reading.start_soon(read_one)
            reading.start_soon(near.write, b"while frozen")
            await trio.testing.wait_all_tasks_blocked()
            assert not read
            network.thaw(other.peer_id)
        assert b"".join(read).startswith(b"before")
        assert not network.is_frozen(one.peer_id)
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_garbled_write_arrives_changed_once() -> None:
    async with trio.open_nursery() as nursery:
        network = InMemoryNetwork()
        one, other, near, far = await _pair(network, nursery)
        network.garble(one.peer_id, other.peer_id, num_bytes=2)
        await near.write(b"\x00\x00\x00")
        assert await _read_exactly(far, 3) == b"\xff\xff\x00"
        await near.write(b"\x00")
        assert await far.read() == b"\x00"
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_transport_that_stops_ends_its_connections_and_cannot_be_dialled() -> None:
    async with trio.open_nursery() as nursery:
        network = InMemoryNetwork()
        async with trio.open_nursery() as inner:
            one, _, near, _ = await _pair(network, inner)
            inner.cancel_scope.cancel()
        assert await near.read() == b""
        other = network.transport()

        async def ignore(_: Stream) -> None:
            await trio.sleep_forever()

        await nursery.start(other.run, ignore)
        with pytest.raises(LinkClosed):
            await other.dial(one.addresses[0])
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_transport_that_does_not_listen_has_no_address() -> None:
    network = InMemoryNetwork()
    one = network.transport(is_listening=False)

    async def ignore(_: Stream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(one.run, ignore)
        assert one.addresses == ()
        with pytest.raises(UsageError, match="/memory/<number>/p2p/<peer id>"):
            await one.dial("somewhere")
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_topic_reaches_who_is_subscribed_and_admitted_its_origin() -> None:
    async with trio.open_nursery() as nursery:
        network = InMemoryNetwork()
        one, other, _, far = await _pair(network, nursery)
        news = await other.subscribe("news")
        own = await one.subscribe("news")
        await one.publish("news", b"not admitted")
        other.admit(far)
        await one.publish("news", b"heard")
        await one.publish("sports", b"not subscribed")
        network.freeze(one.peer_id)
        await one.publish("news", b"frozen")
        network.thaw(one.peer_id)
        other.expel(one.peer_id)
        await one.publish("news", b"expelled")
        assert news.receive_nowait() == (one.peer_id, b"heard")
        for channel in (news, own):
            with pytest.raises(trio.WouldBlock):
                channel.receive_nowait()
        nursery.cancel_scope.cancel()


def test_a_test_that_hangs_is_ended() -> None:
    @in_trio(seconds=0.01)
    async def hangs() -> None:
        await trio.sleep_forever()

    with pytest.raises(trio.TooSlowError):
        hangs()


def test_with_a_clock_that_jumps_a_minute_takes_no_time() -> None:
    @in_trio(seconds=120.0, clock_jumps=True)
    async def waits() -> None:
        before = trio.current_time()
        await trio.sleep(60)
        assert trio.current_time() - before >= 60

    waits()


@in_trio(clock_jumps=True)
async def test_a_clock_that_jumps_waits_for_threads() -> None:
    began = trio.current_time()
    with trio.move_on_after(60.0):
        await trio.to_thread.run_sync(time.sleep, 0.1)
        assert trio.current_time() == began
        await trio.sleep_forever()
    assert trio.current_time() == began + 60.0
