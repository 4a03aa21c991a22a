from __future__ import annotations

import msgspec
import pytest
import trio

from tests.support import make_job as job
from tests.support import make_state
from tether.active import ActiveJob
from tether.errors import ProtocolViolation
from tether.link import Link
from tether.messages import Presence, Signed, encode
from tether.node_key import NodeKey, sign
from tether.records import ModelInfo
from tether.roster import FAILURES_KEPT, MAX_REMEMBERED, Roster, tells_news
from tether.testing import in_trio

ME = "orchestrator"


class FakeWorker:
    """A worker's key and its link."""

    def __init__(self, *, slots: int = 1, boot_id: str = "boot", key: NodeKey | None = None) -> None:
        self.key = key or NodeKey.generate()
        self.link = Link(self.key.peer_id, roles=["worker"], name="worker", region="here", boot_id=boot_id)
        self.boot_id = boot_id
        self.slots = slots
        self.sequence = 0

    @property
    def id(self) -> str:
        return self.key.peer_id

    def presence(self, *, sequence: int | None = None, **changes: object) -> Presence:
        self.sequence = sequence or self.sequence + 1
        state = make_state(
            self.id,
            boot_id=self.boot_id,
            sequence=self.sequence,
            models=(ModelInfo("demo", "1.0", slots=self.slots),),
        )
        return Presence(sign(self.key, encode(msgspec.structs.replace(state, **changes))))


def active(model: str = "demo", version: str = "1.0") -> ActiveJob:
    return ActiveJob(job(model=model, version=version), arrival=1, deadline=float("inf"), gateway=None)


def test_a_worker_is_known_from_its_first_state_until_its_link_is_down() -> None:
    roster, worker = Roster(ME), FakeWorker(slots=3)
    assert roster.get(worker.id) is roster.get(None) is None
    assert roster.hear(worker.link, worker.presence()) is None
    entry = roster.get(worker.id)
    assert entry is not None
    assert (len(roster), list(roster), roster.num_slots) == (1, [entry], 3)
    assert roster.states == [entry.state]
    assert entry.boot == (worker.id, "boot")
    assert roster.remove(worker.link) is entry
    assert roster.remove(worker.link) is None
    assert (len(roster), roster.num_slots, roster._serving) == (0, 0, {})


def test_a_state_that_is_not_the_workers_own_is_a_violation() -> None:
    roster, worker, other = Roster(ME), FakeWorker(), FakeWorker()
    own = worker.presence().state
    for forged in (
        other.presence(),
        worker.presence(worker_id=other.id),
        Presence(sign(other.key, own.payload)),
        Presence(Signed(own.signer, own.payload, bytes(64))),
        Presence(Signed(own.signer, own.payload + b" ", own.signature)),
    ):
        with pytest.raises(ProtocolViolation):
            roster.hear(worker.link, forged)
    with pytest.raises(ProtocolViolation, match="malformed"):
        roster.hear(worker.link, Presence(sign(worker.key, b"{}")))
    assert len(roster) == 0


def test_an_older_state_of_the_same_boot_changes_nothing() -> None:
    roster, worker = Roster(ME), FakeWorker()
    roster.hear(worker.link, worker.presence(sequence=5))
    for sequence in (4, 5):
        roster.hear(worker.link, worker.presence(sequence=sequence, draining=True))
    assert [state.draining for state in roster.states] == [False]
    roster.hear(worker.link, worker.presence(sequence=6, draining=True))
    assert [state.draining for state in roster.states] == [True]


def test_an_older_link_does_not_take_a_newer_one_with_it() -> None:
    roster, before = Roster(ME), FakeWorker()
    roster.hear(before.link, before.presence())
    roster.remove(before.link)
    again = FakeWorker(key=before.key, boot_id="another")
    roster.hear(again.link, again.presence())
    assert roster.remove(before.link) is None
    assert roster.get(again.id) is not None


@in_trio()
async def test_slots_are_given_and_taken_back_by_model() -> None:
    roster, worker = Roster(ME), FakeWorker()
    models = (ModelInfo("demo", "1.0", slots=1), ModelInfo("other", "1.0", slots=1))
    roster.hear(worker.link, worker.presence(models=models))
    first, second, other = active(), active(), active(model="other")
    assert roster.best(first) == worker.id
    entry = roster.assign(first, worker.id)
    assert first.slot is entry
    assert roster.best(second) is None
    assert roster.best(other) == worker.id
    assert [roster.release(first), roster.release(first)] == [True, False]
    assert roster.best(second) == worker.id
    assert not any(entry.view.assigned.values())


@in_trio()
async def test_what_a_worker_runs_for_others_takes_slots_and_what_it_runs_for_me_is_not_counted_twice() -> None:
    roster, worker = Roster(ME), FakeWorker(slots=3)
    roster.hear(worker.link, worker.presence(running=2, held={ME: 1, "another": 1}))
    roster.assign(active(), worker.id)
    assert roster.best(active()) == worker.id
    roster.hear(worker.link, worker.presence(running=3, held={ME: 1, "another": 2}))
    assert roster.best(active()) is None


@in_trio()
async def test_a_model_that_a_worker_no_longer_serves_is_not_asked_of_it() -> None:
    roster, worker = Roster(ME), FakeWorker()
    roster.hear(worker.link, worker.presence())
    roster.hear(worker.link, worker.presence(models=(ModelInfo("demo", "2.0", slots=1),)))
    assert roster.best(active()) is None
    assert roster.best(active(version="2.0")) == worker.id
    assert [rejection.reason for rejection in roster.choose(active().job).rejections] == ["no_such_version"]


@in_trio(clock_jumps=True)
async def test_a_busy_worker_is_left_alone_for_longer_each_time_until_it_takes_a_job() -> None:
    roster, worker = Roster(ME), FakeWorker()
    roster.hear(worker.link, worker.presence())
    entry = roster.get(worker.id)
    assert entry is not None
    pauses = []
    for _ in range(6):
        assert roster.best(active()) == worker.id
        seconds = roster.mark_busy(entry)
        assert seconds is not None
        assert roster.mark_busy(entry) is None, "many jobs that meet it at once are one meeting"
        assert roster.best(active()) is None
        await trio.sleep(seconds)
        pauses.append(seconds)
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    roster.mark_taken(entry)
    assert roster.mark_busy(entry) == 0.2


@in_trio()
async def test_a_state_that_says_of_more_room_ends_the_pause_of_a_busy_worker() -> None:
    roster, worker = Roster(ME), FakeWorker(slots=2)
    roster.hear(worker.link, worker.presence(running=1))
    entry = roster.get(worker.id)
    assert entry is not None
    roster.mark_busy(entry)
    roster.hear(worker.link, worker.presence(running=1))
    assert roster.best(active()) is None, "nothing new in this"
    roster.hear(worker.link, worker.presence(running=0))
    assert roster.best(active()) == worker.id


@in_trio(clock_jumps=True, seconds=10_000)
async def test_failures_count_fade_and_outlive_the_link() -> None:
    roster, bad, good = Roster(ME), FakeWorker(), FakeWorker()
    for worker in (bad, good):
        roster.hear(worker.link, worker.presence())
    entry = roster.get(bad.id)
    assert entry is not None
    for _ in range(FAILURES_KEPT + 5):
        roster.mark_failed(entry)
    assert len(entry.failures) == FAILURES_KEPT
    assert {roster.best(active()) for _ in range(20)} == {good.id}
    roster.remove(bad.link)
    roster.mark_failed(entry)  # the attempt's end is noticed after the link's
    again = FakeWorker(key=bad.key, boot_id="another")
    roster.hear(again.link, again.presence())
    assert {roster.best(active()) for _ in range(20)} == {good.id}
    await trio.sleep(3600)
    assert {roster.best(active()) for _ in range(50)} == {good.id, bad.id}


@in_trio()
async def test_only_so_many_lost_workers_are_remembered() -> None:
    roster = Roster(ME)
    worker = FakeWorker()
    roster.hear(worker.link, worker.presence())
    entry = roster.get(worker.id)
    assert entry is not None
    roster.mark_failed(entry)
    for number in range(MAX_REMEMBERED + 10):
        roster._remember(f"worker-{number}", entry.failures)
    assert len(roster._failures) == MAX_REMEMBERED


def test_news_is_more_than_counts_and_speeds() -> None:
    state = make_state()
    faster = (msgspec.structs.replace(state.models[0], tokens_per_second=9.0),)
    assert tells_news(None, state)
    assert not tells_news(
        state, msgspec.structs.replace(state, sequence=2, sent_at=1.0, running=3, held={"x": 3}, models=faster)
    )
    for change in ({"draining": True}, {"boot_id": "b"}, {"models": ()}, {"loading": True}, {"region": "there"}):
        assert tells_news(state, msgspec.structs.replace(state, **change))


def test_whoever_listens_hears_of_news_and_not_of_counts() -> None:
    roster, worker, heard = Roster(ME), FakeWorker(), []
    roster.on_news(lambda: heard.append(len(roster)))
    roster.hear(worker.link, worker.presence())
    roster.hear(worker.link, worker.presence(running=1))
    assert heard == [1]
    roster.hear(worker.link, worker.presence(draining=True))
    assert heard == [1, 1]
