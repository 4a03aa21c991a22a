from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import msgspec
import pytest
import trio

from tether.credentials import issue
from tether.dialling import MAX_TARGETS, Dialler
from tether.errors import DeadlineExceeded, ErrorInfo, LinkClosed, LinkError, LinkFull, NotAMember, ProtocolViolation
from tether.identity import Identity
from tether.link import PING, Link, LinkSettings
from tether.links import Links
from tether.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    ControlNews,
    GetHealth,
    GetJob,
    Goodbye,
    Health,
    Hello,
    InferTokens,
    Jobs,
    LinkMessage,
    Ping,
    Refused,
    Signed,
    Welcome,
    control_topic,
    decode_link,
    encode,
)
from tether.network import Issuer, Network
from tether.news import Listener
from tether.node_key import NodeKey
from tether.records import Role
from tether.testing import InMemoryNetwork, InMemoryTransport, in_trio
from tether.wire import Stream

NOW = 1_800_000_000.0
DAY = 86_400.0


class Node:
    """A node under test: its links, and all that happened on them."""

    def __init__(
        self,
        memory: InMemoryNetwork,
        network: Network,
        *roles: Role,
        name: str = "",
        key: NodeKey | None = None,
        settings: LinkSettings | None = None,
    ) -> None:
        self.key = key or NodeKey.generate()
        self.identity = Identity(network, self.key, roles)
        self.transport = memory.transport(self.key, is_listening="orchestrator" in roles)
        self.now = NOW
        self.name = name or "+".join(roles)
        self.links = Links(
            self.transport,
            self.identity,
            name=self.name,
            region="here",
            boot_id=self.name + self.key.peer_id[-4:],
            settings=settings,
            clock=lambda: self.now,
        )
        self.events: list[str] = []
        self.reasons: list[str] = []
        self.refusals: list[Exception] = []
        self.received: list[LinkMessage] = []
        self._changed = trio.Event()
        self.links.on_up(lambda link: self._note(f"up {link.name}"))
        self.links.on_down(self._on_down)
        self.dialler = Dialler(self.links, on_refused=self._on_refused)

    def _on_down(self, link: Link, reason: str) -> None:
        self.reasons.append(reason)
        self._note(f"down {link.name}")

    def _on_refused(self, _: str, error: Exception) -> None:
        self.refusals.append(error)
        self._note("refused")

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    def take(self, message_type: type) -> Node:
        """Collect messages of this type."""

        def collect(_: Link, message: LinkMessage) -> None:
            self.received.append(message)
            self._wake()

        self.links.on(message_type, collect)
        return self

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.wait()

    async def until_up(self, other: Node) -> Link:
        await self.until(lambda: self.links.get(other.links.peer_id))
        link = self.links.get(other.links.peer_id)
        assert link is not None
        return link

    async def until_down(self) -> str:
        await self.until(lambda: self.reasons)
        return self.reasons[-1]


@asynccontextmanager
async def running(*nodes: Node, dials: tuple[tuple[Node, Node], ...] = ()) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.links.run)
        for node, target in dials:
            nursery.start_soon(node.dialler.run, lambda target=target: target.transport.addresses)
        yield nursery
        nursery.cancel_scope.cancel()


def _tokens(position: int = 0, text: str = "x") -> InferTokens:
    return InferTokens("job", 1, position, (position,), text)


class World:
    """A network of an orchestrator and a worker that dials it."""

    def __init__(self, *, piece_bytes: int | None = None, settings: LinkSettings | None = None) -> None:
        self.memory = InMemoryNetwork(piece_bytes=piece_bytes)
        self.network = Network.found()
        self.orchestrator = self.node("orchestrator", settings=settings).take(InferTokens)
        self.worker = self.node("worker", settings=settings)

    def node(
        self, *roles: Role, name: str = "", key: NodeKey | None = None, settings: LinkSettings | None = None
    ) -> Node:
        return Node(self.memory, self.network, *roles, name=name, key=key, settings=settings)

    @asynccontextmanager
    async def linked(self) -> AsyncIterator[tuple[Link, Link]]:
        """Run both; give the orchestrator's link to the worker, and the worker's to the orchestrator."""
        async with running(self.orchestrator, self.worker, dials=((self.worker, self.orchestrator),)):
            to_orchestrator = await self.worker.until_up(self.orchestrator)
            to_worker = await self.orchestrator.until_up(self.worker)
            yield to_worker, to_orchestrator


def _framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@asynccontextmanager
async def raw_peer(world: World, key: NodeKey | None = None) -> AsyncIterator[InMemoryTransport]:
    """A peer that speaks bytes."""
    transport = world.memory.transport(key)

    async def ignore(_: Stream) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(transport.run, ignore)
        yield transport
        nursery.cancel_scope.cancel()


def _signed_by_an_invite(identity: Identity) -> tuple[Signed, ...]:
    network, invite, ends = identity.network, NodeKey.generate(), NOW + 3_600.0
    return (
        issue(
            network.issuer.key,
            network.public_key,
            invite.public_key,
            roles=(),
            may_issue=identity.roles,
            now=NOW,
            expires_at=ends,
        ),
        issue(invite, network.public_key, identity.key.public_key, roles=identity.roles, now=NOW, expires_at=ends),
    )


def _hello(identity: Identity, **changes: object) -> Hello:
    hello = Hello(1, "boot", tuple(sorted(identity.roles)), "raw", "here", identity.chain(NOW))
    return msgspec.structs.replace(hello, **changes)


async def _read_message(stream: Stream, buffer: bytearray) -> LinkMessage | None:
    while len(buffer) < 4 or len(buffer) < 4 + int.from_bytes(buffer[:4], "big"):
        data = await stream.read()
        if not data:
            return None
        buffer += data
    size = int.from_bytes(buffer[:4], "big")
    message = decode_link(bytes(buffer[4 : 4 + size]))
    del buffer[: 4 + size]
    return message


# --- a link's beginning


@in_trio(clock_jumps=True)
async def test_a_link_comes_up_on_both_sides_and_each_knows_the_other() -> None:
    world = World()
    async with world.linked() as (to_worker, to_orchestrator):
        assert to_worker.peer_id == world.worker.links.peer_id
        assert to_worker.roles == {"worker"}
        assert (to_worker.name, to_worker.region) == ("worker", "here")
        assert to_orchestrator.roles == {"orchestrator"}
        assert to_orchestrator.addresses == world.orchestrator.transport.addresses
        assert world.orchestrator.links.with_role("worker") == (to_worker,)
        assert world.orchestrator.links.with_role("gateway") == ()
        assert world.orchestrator.links.up == (to_worker,)
        assert world.orchestrator.events == ["up worker"]
        assert to_worker.is_open
        assert "worker" in repr(to_worker)


@in_trio(clock_jumps=True)
async def test_messages_arrive_in_order_whatever_the_pieces() -> None:
    world = World(piece_bytes=3)
    async with world.linked() as (_, to_orchestrator):
        sent = [_tokens(position, "é" * position) for position in range(50)]
        for message in sent:
            to_orchestrator.send(message)
        await world.orchestrator.until(lambda: len(world.orchestrator.received) == 50)
        assert world.orchestrator.received == sent


@pytest.mark.parametrize(
    ("spoil", "error", "reason"),
    [
        (lambda identity: _hello(identity, chain=()), NotAMember, "shows no credential"),
        (lambda identity: _hello(identity, roles=("orchestrator",)), NotAMember, "does not make it orchestrator"),
        (lambda identity: _hello(identity, roles=()), ProtocolViolation, "at least one role"),
        (lambda identity: _hello(identity, protocol=99), ProtocolViolation, "same version of Tether on both"),
        (lambda _: _hello(Identity(Network.found(), NodeKey.generate(), ["worker"])), NotAMember, "another network"),
        (lambda identity: _hello(identity, chain=_signed_by_an_invite(identity)), NotAMember, "signed by an invite"),
        (lambda identity: _hello(identity, name="two\nlines"), ProtocolViolation, "malformed frame"),
        (lambda identity: _hello(identity, region="\x1b[2J"), ProtocolViolation, "malformed frame"),
        (lambda identity: _hello(identity, boot_id="\u202e"), ProtocolViolation, "malformed frame"),
        (lambda _: Ping(), ProtocolViolation, "a link begins with hello, not with ping"),
    ],
)
def test_who_is_no_member_is_refused_with_the_reason(
    spoil: Callable[[Identity], LinkMessage], error: type[LinkError], reason: str
) -> None:
    @in_trio(clock_jumps=True)
    async def main() -> None:
        world = World()
        identity = Identity(world.network, NodeKey.generate(), ["worker"])
        async with running(world.orchestrator), raw_peer(world, identity.key) as raw:
            stream = await raw.dial(world.orchestrator.transport.addresses[0])
            await stream.write(_framed(encode(spoil(identity))))
            answer = await _read_message(stream, bytearray())
            assert isinstance(answer, Refused)
            assert answer.error.code == error.code
            assert reason in answer.error.message
            stream.abort()
            assert world.orchestrator.events == []

    main()


@in_trio(clock_jumps=True)
async def test_a_credential_of_another_peer_is_worth_nothing() -> None:
    world = World()
    member = Identity(world.network, NodeKey.generate(), ["worker"])
    async with running(world.orchestrator), raw_peer(world) as raw:
        stream = await raw.dial(world.orchestrator.transport.addresses[0])
        await stream.write(_framed(encode(_hello(member))))
        answer = await _read_message(stream, bytearray())
        assert isinstance(answer, Refused)
        assert "issued to another peer" in answer.error.message


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x00\x00", _framed(b"{}")[:5], b"\xff\xff\xff\xff", _framed(b"\xff" * 10), (100_000).to_bytes(4, "big")],
)
def test_a_peer_without_a_hello_is_cut_off_within_three_seconds(sent: bytes) -> None:
    @in_trio(clock_jumps=True)
    async def main() -> None:
        world = World()
        async with running(world.orchestrator), raw_peer(world) as raw:
            stream = await raw.dial(world.orchestrator.transport.addresses[0])
            started = trio.current_time()
            await stream.write(sent)
            answer = await _read_message(stream, bytearray())
            if answer is not None:
                assert isinstance(answer, Refused)
                assert await _read_message(stream, bytearray()) is None
            assert trio.current_time() - started < 3.5
            assert world.orchestrator.events == []

    main()


@in_trio(clock_jumps=True)
async def test_an_orchestrator_that_is_no_member_is_not_trusted_by_who_dials_it() -> None:
    world = World()
    foreign = Node(world.memory, Network.found(), "orchestrator")
    async with running(world.worker, foreign, dials=((world.worker, foreign),)):
        await world.worker.until(lambda: world.worker.refusals)
        assert isinstance(world.worker.refusals[0], NotAMember)
        assert world.worker.events == ["refused"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Ping(), "hello is answered with welcome, not with ping"),
        (Refused(ErrorInfo("draining", "this node is stopping")), "this node is stopping"),
        (None, "no answer to hello within 3 s"),
    ],
)
def test_a_dialled_peer_that_does_not_welcome_is_no_link(
    answer: LinkMessage | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_trio(clock_jumps=True)
    async def main() -> None:
        world = World()
        transport = world.memory.transport()

        async def answers(stream: Stream) -> None:
            await stream.read()
            if answer is not None:
                await stream.write(_framed(encode(answer)))
            await trio.sleep_forever()

        async with running(world.worker) as nursery:
            await nursery.start(transport.run, answers)
            nursery.start_soon(world.worker.dialler.run, lambda: transport.addresses)
            with trio.move_on_after(4.0):
                await world.worker.until(lambda: world.worker.events)
            assert world.worker.events == []

    with caplog.at_level(logging.WARNING, "tether.dialling"):
        main()
    assert message in caplog.text


@in_trio(clock_jumps=True)
async def test_a_dialled_peer_that_is_no_orchestrator_is_no_link() -> None:
    world = World()
    impostor = Identity(world.network, NodeKey.generate(), ["worker"])
    transport = world.memory.transport(impostor.key)

    async def welcomes(stream: Stream) -> None:
        await stream.read()
        await stream.write(_framed(encode(Welcome(1, "b", ("worker",), "raw", "here", impostor.chain(NOW)))))
        await trio.sleep_forever()

    async with running(world.worker) as nursery:
        await nursery.start(transport.run, welcomes)
        nursery.start_soon(world.worker.dialler.run, lambda: transport.addresses)
        await world.worker.until(lambda: world.worker.refusals)
        assert "not an orchestrator" in str(world.worker.refusals[0])


# --- what may be sent


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (_framed(b"not json"), "malformed frame"),
        (_framed(b"\xff\xfe"), "malformed frame"),
        (_framed(b'{"type":"no.such.message"}'), "malformed frame"),
        (_framed(b'{"type":"infer.tokens","job_id":1}'), "malformed frame"),
        (_framed(b""), "malformed frame"),
        (_framed(b"[" * 100_000), "malformed frame"),
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), "a frame of 1048577 bytes; 1048576 is the most"),
        (_framed(encode(Cancel("job"))), "worker may not send cancel"),
        (_framed(encode(Hello(1, "b", ("worker",), "n", "r", ()))), "nobody here takes hello"),
        (_framed(encode(Welcome(1, "b", ("worker",), "n", "r", ()))), "nobody here takes welcome"),
    ],
)
def test_a_bad_frame_closes_its_link_alone(frame: bytes, reason: str) -> None:
    @in_trio(clock_jumps=True)
    async def main() -> None:
        world = World()
        async with world.linked() as (_, to_orchestrator):
            bad = Identity(world.network, NodeKey.generate(), ["worker"])
            async with raw_peer(world, bad.key) as raw:
                stream = await raw.dial(world.orchestrator.transport.addresses[0])
                await stream.write(_framed(encode(_hello(bad))))
                buffer = bytearray()
                assert isinstance(await _read_message(stream, buffer), Welcome)
                await stream.write(_framed(encode(_tokens(7))) + frame)
                assert reason in await world.orchestrator.until_down()
                assert world.orchestrator.received == [_tokens(7)], "what came before it counts"
            to_orchestrator.send(_tokens(8))
            await world.orchestrator.until(lambda: len(world.orchestrator.received) == 2)
            assert world.worker.reasons == []

    main()


@in_trio(clock_jumps=True)
async def test_garbled_bytes_close_the_link_and_it_comes_up_again() -> None:
    world = World()
    async with world.linked() as (_, to_orchestrator):
        world.memory.garble(world.worker.links.peer_id, world.orchestrator.links.peer_id)
        to_orchestrator.send(_tokens())
        assert "protocol violation" in await world.orchestrator.until_down()
        await world.orchestrator.until(lambda: world.orchestrator.events == ["up worker", "down worker", "up worker"])


@in_trio(clock_jumps=True)
async def test_a_connection_that_ends_within_a_frame_says_so() -> None:
    world = World()
    member = Identity(world.network, NodeKey.generate(), ["worker"])
    async with running(world.orchestrator), raw_peer(world, member.key) as raw:
        stream = await raw.dial(world.orchestrator.transport.addresses[0])
        await stream.write(_framed(encode(_hello(member))))
        assert isinstance(await _read_message(stream, bytearray()), Welcome)
        await stream.write(_framed(encode(_tokens()))[:20])
        stream.abort()
        assert await world.orchestrator.until_down() == "the connection ended in the middle of a frame"


@in_trio(clock_jumps=True)
async def test_a_message_that_is_too_large_fails_at_its_sender() -> None:
    world = World()
    async with world.linked() as (_, to_orchestrator):
        with pytest.raises(ProtocolViolation, match=r"infer.tokens message of \d+ bytes; 1048576 is the most"):
            to_orchestrator.send(_tokens(text="x" * MAX_FRAME_BYTES))
        to_orchestrator.send(_tokens(text="x" * (MAX_FRAME_BYTES - 200)))
        await world.orchestrator.until(lambda: world.orchestrator.received)
        assert to_orchestrator.is_open


@in_trio(clock_jumps=True)
async def test_the_buffer_is_bounded_and_empties_when_the_peer_reads_again() -> None:
    world = World(settings=LinkSettings(max_buffer_bytes=1 << 20, silence_seconds=60.0, write_seconds=60.0))
    async with world.linked() as (_, to_orchestrator):
        world.memory.freeze(world.orchestrator.links.peer_id)
        sent = 0
        while to_orchestrator.num_buffered_bytes < (1 << 20) - 20_000:
            to_orchestrator.send(_tokens(sent, "x" * 10_000))
            sent += 1
        with pytest.raises(LinkFull, match="already wait to be sent to orchestrator"):
            to_orchestrator.send(_tokens(sent, "x" * 20_000))
        assert 50 < sent < 110
        assert (1 << 20) - 20_000 < to_orchestrator.num_buffered_bytes <= 1 << 20
        assert to_orchestrator.is_open, "a full buffer is the sender's to act on"
        world.memory.thaw(world.orchestrator.links.peer_id)
        await world.orchestrator.until(lambda: len(world.orchestrator.received) == sent)
        await trio.testing.wait_all_tasks_blocked()
        assert to_orchestrator.num_buffered_bytes == 0
        to_orchestrator.send(_tokens(sent))


@in_trio(clock_jumps=True)
async def test_sending_never_runs_a_handler_and_never_blocks() -> None:
    world = World()
    async with world.linked() as (_, to_orchestrator):
        to_orchestrator.send(_tokens())
        assert world.orchestrator.received == []


@in_trio(clock_jumps=True)
async def test_a_handler_that_raises_closes_its_link_alone(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.orchestrator = world.node("orchestrator")

    def fails(_: Link, message: InferTokens) -> None:
        raise RuntimeError(f"cannot take {message.position}")

    world.orchestrator.links.on(InferTokens, fails)
    other = world.node("worker", name="other")
    async with world.linked() as (_, to_orchestrator), running(other, dials=((other, world.orchestrator),)):
        await world.orchestrator.until_up(other)
        to_orchestrator.send(_tokens(5))
        assert await world.orchestrator.until_down() == "this node failed to handle infer.tokens"
        assert world.orchestrator.links.get(other.links.peer_id) is not None
    assert "cannot take 5" in caplog.text


@in_trio(clock_jumps=True)
async def test_a_callback_that_raises_on_up_closes_that_link(caplog: pytest.LogCaptureFixture) -> None:
    world = World()

    def fails(link: Link) -> None:
        raise RuntimeError(f"no {link.name}")

    world.orchestrator.links.on_up(fails)
    async with running(world.orchestrator, world.worker, dials=((world.worker, world.orchestrator),)):
        assert await world.orchestrator.until_down() == "this node failed to take the link"
    assert "no worker" in caplog.text


@in_trio(clock_jumps=True)
async def test_a_callback_that_raises_on_down_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    world = World()

    def fails(link: Link, reason: str) -> None:
        raise RuntimeError(f"{link.name}: {reason}")

    world.worker.links.on_down(fails)
    async with world.linked() as (_, to_orchestrator):
        to_orchestrator.close()
        await world.worker.until(lambda: world.worker.events[-2:] == ["down orchestrator", "up orchestrator"])
    assert "RuntimeError" in caplog.text


def test_a_message_type_has_one_handler() -> None:
    node = World().orchestrator
    with pytest.raises(ValueError, match=r"infer.tokens has a handler already"):
        node.take(InferTokens)
    with pytest.raises(ValueError, match="jobs has a handler already"):
        node.take(Jobs)


# --- a link's end


@in_trio(clock_jumps=True)
async def test_a_frozen_peer_is_noticed_by_its_silence() -> None:
    world = World()
    async with world.linked() as (_, to_orchestrator):
        await trio.sleep(20.0)
        assert world.worker.reasons == world.orchestrator.reasons == [], "pings keep an idle link alive"
        started = trio.current_time()
        world.memory.freeze(world.worker.links.peer_id)
        assert await world.orchestrator.until_down() == "silent for 3 s"
        assert 1.9 <= trio.current_time() - started <= 3.5
        assert world.orchestrator.links.get(world.worker.links.peer_id) is None
        assert world.orchestrator.events == ["up worker", "down worker"]
        await world.worker.until_down()
        with pytest.raises(LinkClosed, match="the link to orchestrator is closed"):
            to_orchestrator.send(_tokens())


@in_trio(clock_jumps=True)
async def test_bytes_that_make_no_message_are_as_good_as_silence() -> None:
    world = World()
    member = Identity(world.network, NodeKey.generate(), ["worker"])
    async with running(world.orchestrator), raw_peer(world, member.key) as raw:
        stream = await raw.dial(world.orchestrator.transport.addresses[0])
        await stream.write(_framed(encode(_hello(member))))
        assert await stream.read()
        for _ in range(20):
            await trio.sleep(1.5)
            await stream.write(PING)
        assert world.orchestrator.reasons == [], "whole messages are signs of life"
        started = trio.current_time()
        await stream.write((1000).to_bytes(4, "big"))
        while not world.orchestrator.reasons:
            await trio.sleep(1.5)
            with suppress(LinkClosed):  # it may be down by now
                await stream.write(b"x")
        assert world.orchestrator.reasons[0].startswith("no whole message for ")
        assert trio.current_time() - started <= 7.5


@in_trio(clock_jumps=True)
async def test_a_large_message_on_a_slow_line_has_the_time_that_it_takes() -> None:
    world = World()
    member = Identity(world.network, NodeKey.generate(), ["worker"])
    frame = _framed(encode(_tokens(text="x" * 100_000)))
    async with running(world.orchestrator), raw_peer(world, member.key) as raw:
        stream = await raw.dial(world.orchestrator.transport.addresses[0])
        await stream.write(_framed(encode(_hello(member))))
        for start in range(0, len(frame), 6_000):
            await trio.sleep(1.0)
            await stream.write(frame[start : start + 6_000])
        await world.orchestrator.until(lambda: world.orchestrator.received)
        assert world.orchestrator.reasons == []


@in_trio(clock_jumps=True)
async def test_a_patient_node_and_an_impatient_one_stay_linked() -> None:
    world = World()
    world.worker = world.node("worker", settings=LinkSettings(silence_seconds=60.0))
    async with world.linked():
        await trio.sleep(30.0)
        assert world.worker.reasons == world.orchestrator.reasons == []


@in_trio(clock_jumps=True)
async def test_a_dead_peer_is_noticed_at_once_and_dialled_again() -> None:
    world = World()
    async with world.linked():
        started = trio.current_time()
        world.memory.end(world.worker.links.peer_id, world.orchestrator.links.peer_id)
        await world.worker.until(lambda: len(world.worker.events) == 3)
        assert trio.current_time() - started < 0.5
        assert world.worker.events == ["up orchestrator", "down orchestrator", "up orchestrator"]
        await world.orchestrator.until(lambda: len(world.orchestrator.events) == 3)
        assert world.orchestrator.events == ["up worker", "down worker", "up worker"]


@in_trio(clock_jumps=True)
async def test_a_close_says_why_and_what_was_sent_before_it_arrives() -> None:
    world = World()
    async with world.linked() as (_, to_orchestrator):
        for position in range(100):
            to_orchestrator.send(_tokens(position, "x" * 5_000))
        to_orchestrator.close("going home")
        to_orchestrator.close("twice")
        assert world.worker.reasons == ["going home"], "it is down here at once"
        assert not to_orchestrator.is_open
        assert await world.orchestrator.until_down() == "the peer left: going home"
        assert len(world.orchestrator.received) == 100
        assert world.orchestrator.reasons == ["the peer left: going home"]


@in_trio(clock_jumps=True)
async def test_a_close_does_not_wait_for_ever_for_a_frozen_peer() -> None:
    world = World()
    async with world.linked() as (to_worker, _):
        world.memory.freeze(world.worker.links.peer_id)
        started = trio.current_time()
        to_worker.close()
        while world.memory.num_streams(world.worker.links.peer_id, world.orchestrator.links.peer_id):
            await world.memory.changed()
        assert trio.current_time() - started < 7.0


@in_trio(clock_jumps=True)
async def test_a_node_that_closes_tells_everybody_and_stops() -> None:
    world = World()
    async with trio.open_nursery() as nursery:
        stopped = trio.Event()

        async def run_worker(*, task_status: trio.TaskStatus[None]) -> None:
            await world.worker.links.run(task_status=task_status)
            stopped.set()

        await nursery.start(world.orchestrator.links.run)
        await nursery.start(run_worker)
        nursery.start_soon(world.worker.dialler.run, lambda: world.orchestrator.transport.addresses)
        link = await world.worker.until_up(world.orchestrator)
        link.send(_tokens())
        await world.worker.links.close("shutting down")
        await stopped.wait()
        assert await world.orchestrator.until_down() == "the peer left: shutting down"
        assert world.orchestrator.received == [_tokens()]
        assert world.worker.reasons == ["shutting down"]
        nursery.cancel_scope.cancel()


@in_trio(clock_jumps=True)
async def test_a_node_that_is_cancelled_takes_its_links_down() -> None:
    world = World()
    async with world.linked():
        pass
    assert world.worker.reasons == world.orchestrator.reasons == ["this node stops"]
    assert world.worker.links.up == ()


@in_trio(clock_jumps=True)
async def test_the_newest_link_of_a_peer_wins() -> None:
    world = World()
    key = NodeKey.generate()
    first = world.node("worker", name="first", key=key)
    async with running(world.orchestrator, first, dials=((first, world.orchestrator),)):
        await world.orchestrator.until_up(first)
        world.memory.freeze(key.peer_id)
        # The same key again, while the old link still looks alive.
        second = Identity(world.network, key, ["worker"])
        world.memory.thaw(key.peer_id)
        async with raw_peer(world, key) as raw:
            stream = await raw.dial(world.orchestrator.transport.addresses[0])
            await stream.write(_framed(encode(_hello(second, name="second"))))
            assert isinstance(await _read_message(stream, bytearray()), Welcome)
            await world.orchestrator.until(lambda: len(world.orchestrator.events) >= 3)
            assert world.orchestrator.events[:3] == ["up first", "down first", "up second"]
            assert world.orchestrator.reasons[0] == "a newer link took its place"


@in_trio(clock_jumps=True)
async def test_two_that_dial_each_other_at_once_settle_on_one_link() -> None:
    world = World()
    one, other = world.node("orchestrator", name="one"), world.node("orchestrator", name="other")
    for node in (one, other):
        node.take(InferTokens)
    async with running(one, other, dials=((one, other), (other, one))):
        await one.until_up(other)
        await other.until_up(one)
        await trio.sleep(60.0)
        assert len(one.links.up) == len(other.links.up) == 1
        assert world.memory.num_streams(one.links.peer_id, other.links.peer_id) == 1
        assert len(one.events) <= 3, "they do not take turns for ever"
        assert len(other.events) <= 3
        dialled = [node for node in (one, other) if node.links.up[0].is_dialled]  # type: ignore[attr-defined]
        assert len(dialled) == 1


@in_trio(clock_jumps=True)
async def test_a_peer_whose_membership_ends_is_let_go() -> None:
    world = World()
    async with world.linked():
        world.orchestrator.now = NOW + 90 * DAY
        await trio.sleep(120.0)
        assert world.orchestrator.reasons == [], "five minutes are forgiven"
        world.orchestrator.now = NOW + 90 * DAY + 301
        assert await world.orchestrator.until_down() == "the peer's membership ended"
        assert await world.worker.until_down() == "the peer left: the peer's membership ended"


# --- dialling


@in_trio(clock_jumps=True)
async def test_a_peer_that_is_away_is_dialled_until_it_is_back() -> None:
    world = World()
    pair = (world.worker.links.peer_id, world.orchestrator.links.peer_id)
    async with world.linked():
        world.memory.cut(*pair)
        await world.worker.until_down()
        await trio.sleep(40.0)
        world.memory.heal(*pair)
        healed = trio.current_time()
        await world.worker.until_up(world.orchestrator)
        assert trio.current_time() - healed <= 15.5


@in_trio(clock_jumps=True)
async def test_further_orchestrators_are_learned_from_a_welcome() -> None:
    world = World()
    second = world.node("orchestrator", name="second")
    async with running(
        world.orchestrator,
        second,
        world.worker,
        dials=((second, world.orchestrator), (world.worker, world.orchestrator)),
    ):
        await world.worker.until_up(world.orchestrator)
        await second.until_up(world.orchestrator)
        world.memory.end(world.worker.links.peer_id, world.orchestrator.links.peer_id)
        await world.worker.until_up(second)
        assert set(world.worker.links.orchestrator_addresses) == {
            *world.orchestrator.transport.addresses,
            *second.transport.addresses,
        }


@in_trio(clock_jumps=True)
async def test_an_orchestrator_dials_the_others_but_never_itself() -> None:
    world = World()
    async with running(world.orchestrator, dials=((world.orchestrator, world.orchestrator),)):
        await trio.sleep(5.0)
        assert world.orchestrator.events == []
    assert world.orchestrator.links.get(world.orchestrator.links.peer_id) is None


@in_trio(clock_jumps=True)
async def test_one_link_is_kept_to_a_peer_of_several_addresses() -> None:
    world = World()

    def addresses() -> list[str]:
        real = world.orchestrator.transport.addresses[0]
        return [real.replace("/memory/", "/memory/9"), real, real, "nonsense"]

    async with running(world.orchestrator, world.worker) as nursery:
        nursery.start_soon(world.worker.dialler.run, addresses)
        await world.worker.until_up(world.orchestrator)
        await trio.sleep(30.0)
        assert world.worker.events == ["up orchestrator"]


@in_trio(clock_jumps=True)
async def test_only_so_many_are_dialled_and_those_that_are_given_come_first() -> None:
    world = World()
    world.worker.links.hearsay.learn(f"/memory/9/p2p/told-{number}" for number in range(200))

    def addresses() -> list[str]:
        return [f"/memory/9/p2p/given-{number}" for number in range(300)] + [*world.orchestrator.transport.addresses]

    dialled: set[str] = set()
    dial = world.worker.transport.dial

    async def note(address: str) -> Stream:
        dialled.add(address)
        return await dial(address)

    world.worker.transport.dial = note  # type: ignore[method-assign,assignment]
    async with running(world.worker) as nursery:
        nursery.start_soon(world.worker.dialler.run, addresses)
        await trio.sleep(30.0)
    assert dialled == {f"/memory/9/p2p/given-{number}" for number in range(MAX_TARGETS)}


@in_trio(clock_jumps=True)
async def test_what_a_worker_says_as_an_orchestrator_on_a_topic_is_not_heard() -> None:
    world = World()
    second = world.node("orchestrator", name="second")
    async with running(
        world.orchestrator,
        second,
        world.worker,
        dials=((second, world.orchestrator), (world.worker, world.orchestrator)),
    ) as nursery:
        await world.orchestrator.until(lambda: len(world.orchestrator.links.up) == 2)
        listener = Listener(
            world.orchestrator.transport,
            "here",
            is_orchestrator=world.orchestrator.links.has_orchestrator,
            clock=lambda: NOW,
        )
        nursery.start_soon(listener.run)
        await trio.testing.wait_all_tasks_blocked()
        for sequence, node in enumerate((world.worker, second)):
            news = ControlNews(node.links.peer_id, "boot", sequence, (), 0, 0, draining=False, sent_at=NOW)
            await node.transport.publish(control_topic("here"), encode(news))
        await trio.testing.wait_all_tasks_blocked()
        assert [heard.orchestrator_id for heard in listener.orchestrators] == [second.links.peer_id]
        assert listener.num_rejected == 1


@in_trio(clock_jumps=True)
async def test_a_refusal_is_said_once_and_retried_slowly(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    stranger = Node(world.memory, Network.found(), "worker")
    with caplog.at_level(logging.WARNING, "tether.dialling"):
        async with running(world.orchestrator, stranger, dials=((stranger, world.orchestrator),)):
            await stranger.until(lambda: len(stranger.refusals) == 2)
            assert trio.current_time() >= 15.0
    assert isinstance(stranger.refusals[0], NotAMember)
    lines = [r.message for r in caplog.records if r.__dict__.get("action") == "dial_failed"]
    assert len(lines) == 1
    assert "signed by the key of another network" in lines[0]


def _joined(founder: Network, *roles: Role, days: float) -> Network:
    machine = NodeKey.generate()
    credential = issue(
        founder.issuer.key,
        founder.public_key,
        machine.public_key,
        roles=roles,
        may_issue=roles,
        now=NOW,
        expires_at=NOW + days * DAY,
    )
    return Network(founder.public_key, Issuer(machine, (credential,)))


@in_trio(clock_jumps=True)
async def test_a_machine_whose_membership_ends_soon_is_renewed_by_its_first_link() -> None:
    world = World()
    world.worker = Node(world.memory, _joined(world.network, "worker", days=0.04), "worker", name="worker")
    async with world.linked():
        assert world.worker.identity.expires_at(NOW) == NOW + 90 * DAY


@in_trio(clock_jumps=True)
async def test_a_link_that_lasts_is_begun_anew_when_the_membership_ends_soon() -> None:
    world = World()
    world.worker = Node(
        world.memory,
        _joined(world.network, "worker", days=40),
        "worker",
        name="worker",
        settings=LinkSettings(renewal_seconds=5.0),
    )
    async with world.linked():
        await trio.sleep(6.0)
        assert world.worker.events == ["up orchestrator"], "it ends in 40 days still"
        world.worker.now += 20 * DAY
        world.orchestrator.now += 20 * DAY
        await world.worker.until_down()
        await world.worker.until_up(world.orchestrator)
        assert world.worker.identity.expires_at(world.worker.now) == NOW + 110 * DAY
        await trio.sleep(6.0)
        assert world.worker.events == ["up orchestrator", "down orchestrator", "up orchestrator"]


# --- asking


def _answering(node: Node) -> Node:
    def answer(link: Link, message: GetHealth) -> None:
        link.send(Health(message.request_id, None, 1, 1, 0, 0))

    node.links.on(GetHealth, answer)
    return node


@in_trio(clock_jumps=True)
async def test_a_question_is_answered_with_its_own_reply() -> None:
    world = World()
    gateway = world.node("gateway")
    _answering(world.orchestrator)
    replies: dict[int, Health] = {}
    async with running(world.orchestrator, gateway, dials=((gateway, world.orchestrator),)):
        link = await gateway.until_up(world.orchestrator)

        async def ask(number: int) -> None:
            replies[number] = await gateway.links.ask(link, GetHealth, Health)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, number)
    assert len({reply.request_id for reply in replies.values()}) == 10


@in_trio(clock_jumps=True)
async def test_a_question_without_an_answer_ends_in_time_and_a_late_reply_is_dropped() -> None:
    world = World()
    gateway = world.node("gateway")
    asked: list[tuple[Link, GetJob]] = []
    world.orchestrator.links.on(GetJob, lambda link, message: asked.append((link, message)))
    async with running(world.orchestrator, gateway, dials=((gateway, world.orchestrator),)):
        link = await gateway.until_up(world.orchestrator)
        with pytest.raises(DeadlineExceeded, match="orchestrator did not answer within 2 s"):
            await gateway.links.ask(link, lambda number: GetJob(number, "job"), Jobs, timeout_seconds=2.0)
        asked[0][0].send(Jobs(asked[0][1].request_id))
        asked[0][0].send(Jobs(999))
        await trio.sleep(5.0)
        assert link.is_open


@in_trio(clock_jumps=True)
async def test_a_question_fails_when_its_link_goes() -> None:
    world = World()
    gateway = world.node("gateway")
    world.orchestrator.links.on(GetJob, lambda link, _: link.close("not today"))
    async with running(world.orchestrator, gateway, dials=((gateway, world.orchestrator),)):
        link = await gateway.until_up(world.orchestrator)
        with pytest.raises(LinkClosed, match="closed before it answered: the peer left: not today"):
            await gateway.links.ask(link, lambda number: GetJob(number, "job"), Jobs)
        with pytest.raises(LinkClosed):
            await gateway.links.ask(link, lambda number: GetJob(number, "job"), Jobs)


# --- oneself


@in_trio(clock_jumps=True)
async def test_a_message_to_oneself_arrives_later_in_order_without_the_network() -> None:
    world = World()
    node = world.node("orchestrator", "worker", "gateway").take(InferTokens)
    with pytest.raises(LinkClosed, match="not running"):
        node.links.local.send(_tokens())
    async with running(node):
        local = node.links.local
        assert local.is_local
        assert local.is_open
        assert node.links.get(node.links.peer_id) is local
        assert node.links.up == (local,)
        assert node.events == [f"up {node.name}"]
        for position in range(5):
            local.send(_tokens(position))
        assert node.received == []
        await node.until(lambda: len(node.received) == 5)
        assert node.received == [_tokens(position) for position in range(5)]
        local.close("no")
        assert local.is_open
        assert local.num_buffered_bytes == 0
    assert node.events == [f"up {node.name}", f"down {node.name}"]


@in_trio(clock_jumps=True)
async def test_a_handler_that_answers_its_own_node_does_not_recurse() -> None:
    node = World().node("orchestrator", "worker")
    depth = deepest = count = 0
    done = trio.Event()

    def again(link: Link, message: InferTokens) -> None:
        nonlocal depth, deepest, count
        depth += 1
        deepest, count = max(deepest, depth), count + 1
        if count < 5_000:
            link.send(message)
        else:
            done.set()
        depth -= 1

    node.links.on(InferTokens, again)
    async with running(node):
        node.links.local.send(_tokens())
        await done.wait()
    assert deepest == 1


@in_trio(clock_jumps=True)
async def test_a_node_can_ask_itself() -> None:
    node = _answering(World().node("orchestrator", "gateway"))
    async with running(node):
        assert (await node.links.ask(node.links.local, GetHealth, Health)).num_workers == 1


@in_trio(clock_jumps=True)
async def test_the_link_to_oneself_is_bounded_and_knows_its_roles(caplog: pytest.LogCaptureFixture) -> None:
    node = World().node("orchestrator", "worker", settings=LinkSettings(max_local_messages=2))

    def fails(*_: object) -> None:
        raise RuntimeError("a mistake")

    node.links.on(InferTokens, fails)
    async with running(node):
        with pytest.raises(ProtocolViolation, match=r"orchestrator\+worker may not send cancel"):
            node.links.local.send(Cancel("job"))
        node.links.local.send(_tokens())
        node.links.local.send(Goodbye())
        with pytest.raises(LinkFull):
            node.links.local.send(_tokens())
        await trio.testing.wait_all_tasks_blocked()
        node.links.local.send(_tokens())
        await trio.testing.wait_all_tasks_blocked()
    assert caplog.text.count("the handler of infer.tokens failed") == 2
    assert "a mistake" in caplog.text
    assert "no role of this node takes goodbye" in caplog.text


@in_trio(clock_jumps=True)
async def test_a_node_of_one_role_hears_nothing_of_its_local_link() -> None:
    world = World()
    async with running(world.orchestrator):
        assert world.orchestrator.links.up == ()
        assert world.orchestrator.links.local.is_open
        assert world.orchestrator.events == []


# --- the run itself


@in_trio(clock_jumps=True)
async def test_a_transport_that_cannot_start_says_why_without_a_group() -> None:
    world = World()

    class Broken(InMemoryTransport):
        async def run(self, *_: object, **__: object) -> None:
            raise LinkClosed("no network")

    node = world.worker
    links = Links(Broken(world.memory, node.key, is_listening=False), node.identity, name="n", region="r", boot_id="b")
    with pytest.raises(LinkClosed, match="no network"):
        await links.run()


@in_trio(clock_jumps=True)
async def test_a_refused_peer_that_does_not_hang_up_is_cut_off() -> None:
    world = World()
    async with running(world.orchestrator), raw_peer(world) as raw:
        stream = await raw.dial(world.orchestrator.transport.addresses[0])
        await stream.write(_framed(encode(Ping())))
        buffer = bytearray()
        assert isinstance(await _read_message(stream, buffer), Refused)
        assert await _read_message(stream, buffer) is None
