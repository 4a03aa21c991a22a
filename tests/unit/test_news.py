from __future__ import annotations

import msgspec
import pytest
import trio

from tests.support import make_state
from tether import news
from tether.bounds import MAX_MODELS, MAX_STATES
from tether.credentials import CLOCK_LEEWAY_SECONDS
from tether.errors import LinkClosed
from tether.hearsay import MAX_ADDRESSES
from tether.messages import (
    ControlNews,
    ModelNews,
    News,
    PresenceNews,
    Signed,
    control_topic,
    decode_news,
    encode,
    model_topic,
    presence_topic,
)
from tether.news import FRESH_SECONDS, MAX_NEWS_BYTES, REPEAT_ROUNDS, Broadcaster, Listener
from tether.node_key import NodeKey, sign
from tether.records import ModelInfo, WorkerState
from tether.testing import InMemoryNetwork, InMemoryTransport, in_trio

NOW = 1_800_000_000.0


def control(
    orchestrator_id: str,
    *,
    sequence: int = 1,
    boot_id: str = "boot",
    queued: int = 0,
    sent_at: float = NOW,
    addresses: tuple[str, ...] | None = None,
) -> ControlNews:
    own = (f"/memory/1/p2p/{orchestrator_id}",) if addresses is None else addresses
    return ControlNews(orchestrator_id, boot_id, sequence, own, queued, 1, draining=False, sent_at=sent_at)


class Rooms:
    """A listener, and a worker's key to sign with."""

    def __init__(self) -> None:
        self.now = NOW
        self.strangers: set[str] = set()
        self.listener = Listener(
            InMemoryNetwork().transport(),
            "here",
            is_orchestrator=lambda peer_id: peer_id not in self.strangers,
            clock=lambda: self.now,
        )
        self.key = NodeKey.generate()

    def state(self, **changes: object) -> WorkerState:
        return make_state(self.key.peer_id, **{"sent_at": self.now, **changes})

    def hear(self, *states: WorkerState | Signed) -> None:
        signed = tuple(s if isinstance(s, Signed) else sign(self.key, encode(s)) for s in states)
        self.listener.hear("orchestrator", encode(PresenceNews(signed)))


# --- listening -------------------------------------------------------------------------------------------------------


def test_a_workers_state_counts_with_its_own_signature_whoever_passes_it_on() -> None:
    rooms = Rooms()
    rooms.hear(rooms.state())
    assert rooms.listener.workers == [rooms.state()]
    assert rooms.listener.num_rejected == 0


def test_nobody_but_a_linked_orchestrator_is_heard() -> None:
    rooms = Rooms()
    rooms.strangers = {"orchestrator", "one"}
    rooms.hear(rooms.state())
    rooms.listener.hear("one", encode(control("one")))
    assert (rooms.listener.workers, rooms.listener.orchestrators, rooms.listener.addresses) == ([], [], [])
    assert rooms.listener.num_rejected == 2


def test_a_state_that_does_not_count_takes_nothing_from_those_beside_it() -> None:
    rooms = Rooms()
    stale = sign(NodeKey.generate(), encode(rooms.state()))
    rooms.hear(stale, rooms.state())
    assert rooms.listener.workers == [rooms.state()]
    assert rooms.listener.num_rejected == 1


def test_a_state_is_believed_up_to_a_size_and_so_many_at_once() -> None:
    rooms = Rooms()
    models = tuple(ModelInfo(f"model-{number}", "x" * 255) for number in range(MAX_MODELS))
    rooms.hear(rooms.state(models=models))
    assert rooms.listener.num_rejected == 1
    rooms.hear(*[rooms.state()] * (MAX_STATES + 1))
    assert rooms.listener.num_rejected == 2
    assert rooms.listener.workers == []


def test_a_forged_state_does_not_count() -> None:
    rooms, other = Rooms(), NodeKey.generate()
    own = sign(rooms.key, encode(rooms.state()))
    for forged in (
        sign(other, encode(rooms.state())),
        Signed(own.signer, own.payload, bytes(64)),
        Signed(own.signer, own.payload.replace(b"here", b"away"), own.signature),
        Signed(b"", own.payload, own.signature),
        sign(rooms.key, b"not a state"),
        sign(rooms.key, encode(rooms.state(running=10**400))),
    ):
        rooms.hear(forged)
    assert rooms.listener.workers == []
    assert rooms.listener.num_rejected == 6


def test_a_newer_sequence_counts_and_an_older_one_is_a_repetition() -> None:
    rooms = Rooms()
    rooms.hear(rooms.state(sequence=2, running=2))
    rooms.hear(rooms.state(sequence=1, running=1))
    rooms.hear(rooms.state(sequence=2, running=9))
    assert [state.running for state in rooms.listener.workers] == [2]
    rooms.hear(rooms.state(sequence=3, running=3))
    assert [state.running for state in rooms.listener.workers] == [3]
    assert rooms.listener.num_rejected == 0


def test_a_new_boot_begins_its_sequence_anew_and_the_old_one_does_not_come_back() -> None:
    rooms = Rooms()
    rooms.hear(rooms.state(sequence=50, boot_id="old"))
    rooms.hear(rooms.state(sequence=1, boot_id="new", sent_at=NOW + 1))
    rooms.hear(rooms.state(sequence=51, boot_id="old"))
    assert [state.boot_id for state in rooms.listener.workers] == ["new"]


@pytest.mark.parametrize("age", [FRESH_SECONDS + 1, -FRESH_SECONDS - 1])
def test_a_state_of_another_time_does_not_count(age: float) -> None:
    rooms = Rooms()
    rooms.hear(rooms.state(sent_at=NOW - age))
    assert rooms.listener.workers == []
    assert rooms.listener.num_rejected == 1


def test_a_worker_that_is_not_heard_of_any_more_is_forgotten() -> None:
    rooms = Rooms()
    rooms.hear(rooms.state())
    rooms.now += FRESH_SECONDS
    assert rooms.listener.workers == []
    rooms.listener.hear("one", encode(control("one")))
    assert rooms.listener._workers == {}, "nor does it take memory"


def test_only_so_many_are_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "MAX_WORKERS", 2)
    monkeypatch.setattr(news, "MAX_ORCHESTRATORS", 2)
    rooms = Rooms()
    for _ in range(3):
        rooms.key = NodeKey.generate()
        rooms.hear(rooms.state())
        rooms.listener.hear(rooms.key.peer_id, encode(control(rooms.key.peer_id)))
    assert len(rooms.listener.workers) == len(rooms.listener.orchestrators) == 2
    assert rooms.listener.num_rejected == 2
    rooms.listener.hear(rooms.listener.orchestrators[0].orchestrator_id, encode(control("x")))
    assert rooms.listener.num_rejected == 3


def test_an_orchestrator_tells_only_of_itself_and_nothing_older() -> None:
    listener = Rooms().listener
    listener.hear("one", encode(control("one", sequence=2, queued=5)))
    listener.hear("one", encode(control("two")))
    listener.hear("one", encode(control("one", sequence=2, queued=9)))
    assert [found.num_queued for found in listener.orchestrators] == [5]
    assert listener.num_rejected == 2
    assert (listener.load("one"), listener.load("two")) == (6, 0)
    assert listener.addresses == ["/memory/1/p2p/one"]
    listener.hear("one", encode(control("one", sequence=1, boot_id="again", queued=0, sent_at=NOW + 1)))
    assert listener.load("one") == 1
    listener.hear("one", encode(control("one", sequence=3, queued=7)))
    assert listener.load("one") == 1, "the earlier boot does not come back"


@pytest.mark.parametrize("age", [CLOCK_LEEWAY_SECONDS + 1, -CLOCK_LEEWAY_SECONDS - 1])
def test_news_of_an_orchestrator_that_somebody_kept_does_not_count(age: float) -> None:
    listener = Rooms().listener
    listener.hear("one", encode(control("one", sent_at=NOW - age)))
    assert listener.orchestrators == []
    assert listener.num_rejected == 1


def test_an_orchestrator_tells_only_of_its_own_addresses_and_of_few() -> None:
    listener = Rooms().listener
    own = tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/one" for port in range(1, 301))
    others = tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/two-{port}" for port in range(1, 301))
    long = f"/dns4/{'x' * 1000}/tcp/1/p2p/one"
    listener.hear("one", encode(control("one", addresses=(*others, long, *own))))
    assert listener.addresses == list(own[:MAX_ADDRESSES])


def test_an_orchestrator_that_is_not_heard_of_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "FRESH_SECONDS", 0.0)
    listener = Rooms().listener
    listener.hear("one", encode(control("one")))
    assert listener.orchestrators == []
    listener.hear("two", encode(control("two")))
    assert list(listener._orchestrators) == ["two"]


def test_anything_else_on_a_topic_is_rejected_and_raises_nothing() -> None:
    listener = Rooms().listener
    for payload in (b"", b"{}", b"\xff", encode(make_state()), b'{"type":"presence.news"}'):
        listener.hear("one", payload)
    assert listener.num_rejected == 5
    listener.hear("one", encode(ModelNews("demo", "1.0", ())))
    assert listener.num_rejected == 5


# --- telling ---------------------------------------------------------------------------------------------------------


class Recorder(InMemoryTransport):
    """A transport that keeps what is published, and can refuse it."""

    def __init__(self) -> None:
        super().__init__(InMemoryNetwork(), NodeKey.generate(), is_listening=False)
        self.published: list[tuple[str, News]] = []
        self.is_away = False

    async def publish(self, topic: str, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_away:
            raise LinkClosed
        assert len(payload) <= MAX_NEWS_BYTES + 1024
        self.published.append((topic, decode_news(payload)))

    def of(self, kind: type[News]) -> list[News]:
        return [found for _, found in self.published if isinstance(found, kind)]


def broadcaster(transport: Recorder, states: list[tuple[WorkerState, Signed]]) -> Broadcaster:
    return Broadcaster(
        transport, "here", control=lambda sequence: control("me", sequence=sequence), states=lambda: states
    )


def signed_state(**changes: object) -> tuple[WorkerState, Signed]:
    key = NodeKey.generate()
    state = make_state(key.peer_id, **changes)
    return state, sign(key, encode(state))


@in_trio(clock_jumps=True)
async def test_each_second_an_orchestrator_tells_of_itself_and_of_its_workers_and_of_changes() -> None:
    transport = Recorder()
    states = [signed_state(), signed_state(models=(ModelInfo("demo", "1.0", slots=0),)), signed_state(draining=True)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcaster(transport, states).run)
        await trio.sleep(2.5)
        topics = [topic for topic, _ in transport.published]
        assert topics.count(control_topic("here")) == 3
        assert topics.count(presence_topic("here")) == 3
        assert [found.sequence for found in transport.of(ControlNews) if isinstance(found, ControlNews)] == [1, 2, 3]
        assert transport.of(PresenceNews) == [PresenceNews(tuple(signed for _, signed in states))] * 3
        assert topics.count(model_topic("demo", "1.0", "here")) == 1
        assert transport.of(ModelNews) == [ModelNews("demo", "1.0", (states[0][0].worker_id,))]
        states.clear()
        await trio.sleep(1)
        assert transport.of(ModelNews)[-1] == ModelNews("demo", "1.0", ())
        nursery.cancel_scope.cancel()


@in_trio(clock_jumps=True)
async def test_who_serves_a_model_is_repeated_for_those_who_came_late() -> None:
    transport = Recorder()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcaster(transport, [signed_state()]).run)
        await trio.sleep(REPEAT_ROUNDS + 0.5)
        assert len(transport.of(ModelNews)) == 2
        nursery.cancel_scope.cancel()


@in_trio(clock_jumps=True)
async def test_many_workers_are_told_of_in_portions_that_topics_let_through() -> None:
    transport = Recorder()
    states = [signed_state() for _ in range(300)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcaster(transport, states).run)
        await trio.sleep(0.5)
        portions = [found for found in transport.of(PresenceNews) if isinstance(found, PresenceNews)]
        assert len(portions) > 1
        assert [signed for portion in portions for signed in portion.states] == [signed for _, signed in states]
        nursery.cancel_scope.cancel()


@in_trio(clock_jumps=True)
async def test_topics_that_are_away_for_a_while_are_told_again_after_it() -> None:
    transport = Recorder()
    transport.is_away = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcaster(transport, [signed_state()]).run)
        await trio.sleep(1.5)
        transport.is_away = False
        await trio.sleep(1)
        assert transport.of(ControlNews)
        assert transport.of(PresenceNews)
        nursery.cancel_scope.cancel()


@in_trio()
async def test_a_listener_hears_what_a_broadcaster_tells() -> None:
    network = InMemoryNetwork()
    one, other = network.transport(), network.transport()
    state, signed = signed_state(sent_at=NOW)
    listener = Listener(other, "here", is_orchestrator=one.peer_id.__eq__, clock=lambda: NOW)

    async def ignore(_: object) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for transport in (one, other):
            await nursery.start(transport.run, ignore)
        other.admit(await other.dial(one.addresses[0]))
        nursery.start_soon(listener.run)
        await trio.testing.wait_all_tasks_blocked()
        told = Broadcaster(
            one,
            "here",
            control=lambda sequence: control(one.peer_id, sequence=sequence),
            states=lambda: [(state, signed)],
        )
        nursery.start_soon(told.run)
        await trio.testing.wait_all_tasks_blocked()
        assert listener.workers == [state]
        assert listener.load(one.peer_id) == 1
        nursery.cancel_scope.cancel()


def test_a_state_is_told_whole() -> None:
    state, signed = signed_state(held={"someone": 1})
    assert msgspec.json.decode(signed.payload, type=WorkerState) == state
