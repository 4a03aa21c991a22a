from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.support import make_job as job
from tether.active import ActiveJob, Assigned, Busy, Ended, Ending, Lost, Stop, job_of
from tether.answers import PORTION_CHARS, PORTION_TOKENS
from tether.errors import ErrorInfo, LinkClosed, LinkFull
from tether.link import Link
from tether.messages import InferEnd, InferTokens, JobAccepted, JobEnd, JobStarted, JobTokens, LinkMessage, NotLive
from tether.records import JobRecord, Usage
from tether.testing import in_trio

STOP = Stop("cancelled", ErrorInfo("job_cancelled", "client gone"))
ENDED = Ended(InferEnd("job", 1, "stop", Usage(2, 3)))


class FakeLink(Link):
    def __init__(self) -> None:
        super().__init__("peer", roles=["gateway"], name="gateway", region="here", boot_id="boot")
        self.sent: list[LinkMessage] = []
        self.error: Exception | None = None
        self.closed_for: str | None = None

    def send(self, message: LinkMessage) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append(message)

    def close(self, reason: str = "") -> None:
        self.closed_for = reason


def active_job(*, deadline: float = float("inf"), gateway: Link | None = None, stream: bool = True) -> ActiveJob:
    return ActiveJob(job(id="job", stream=stream), arrival=1, deadline=deadline, gateway=gateway)


def started(active: ActiveJob) -> ActiveJob:
    active.accepted = True
    active.begin_attempt()
    return active


def told(text: str, start: int, end: int) -> str:
    """The text that an answer's tokens from `start` to `end` add: a function of the tokens alone."""
    return text[3 * start : 3 * end]


# --- the answer ------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))),
    st.randoms(use_true_random=False),
)
def test_a_client_sees_each_token_once_however_attempts_and_portions_fall(
    sizes: tuple[int, int, int], random: object
) -> None:
    num_tokens, num_seen, num_told_before = sizes
    text = "".join(f"{n:02} " for n in range(num_tokens))
    pick = random.randint  # type: ignore[attr-defined]

    def portions(start: int, end: int) -> list[InferTokens]:
        found = []
        while start < end:
            size = pick(1, min(4, end - start))
            found.append(
                InferTokens("job", 1, start, tuple(range(start, start + size)), told(text, start, start + size))
            )
            start += size
        return found

    active = started(active_job())
    for tokens in portions(0, num_told_before):
        assert active.is_next(tokens)
        active.add(tokens)
    # Its gateway comes back with what its client has seen of an earlier life of this job.
    client = list(range(num_seen))
    client_text = told(text, 0, num_seen)
    active.adopt((tuple(client),), (client_text,))
    missed = list(active.beyond([(len(client), len(client_text))]))
    coming: list[InferTokens | JobTokens] = [*missed, *portions(num_told_before, num_tokens)]
    for heard in coming:
        new = heard if isinstance(heard, JobTokens) else active.add(heard)
        if new is not None:
            assert new.position == len(client)
            client += new.token_ids
            client_text += new.text
    assert client == active.token_ids == list(range(num_tokens))
    assert client_text == active.text == text


def test_text_that_lags_behind_its_tokens_is_told_when_it_is_there() -> None:
    active = started(active_job())
    first = active.add(InferTokens("job", 1, 0, (0, 1), ""))
    assert first == JobTokens("job", 1, 0, (0, 1), "")
    assert active.add(InferTokens("job", 1, 2, (), "é")) == JobTokens("job", 1, 2, (), "é")
    assert [*active.beyond([(2, 0)])] == [JobTokens("job", 1, 2, (), "é")]


def test_tokens_that_are_not_next_are_seen_as_such() -> None:
    active = started(active_job())
    active.add(InferTokens("job", 1, 0, (0, 1), "a"))
    assert [active.is_next(InferTokens("job", 1, position, (9,), "")) for position in (1, 2, 3)] == [False, True, False]


def test_the_next_attempt_goes_on_after_the_answer_so_far() -> None:
    active = started(active_job())
    active.add(InferTokens("job", 1, 0, (0, 1), "ab"))
    active.put(Lost("gone"))
    active.begin_attempt()
    assert active.attempt == 2
    assert not active.is_next(InferTokens("job", 2, 0, (0,), "a"))
    assert active.add(InferTokens("job", 2, 2, (2,), "c")) == JobTokens("job", 2, 2, (2,), "c")


def test_a_gateway_that_knows_less_takes_nothing_away() -> None:
    active = started(active_job())
    active.add(InferTokens("job", 1, 0, (0, 1, 2), "abc"))
    active.adopt(((0,),), ("a",))
    assert (active.token_ids, active.text) == ([0, 1, 2], "abc")


def test_what_is_missed_is_repeated_in_portions_that_fit_into_frames() -> None:
    active = started(active_job())
    count = 2 * PORTION_TOKENS + 5
    active.add(InferTokens("job", 1, 0, tuple(range(count)), "x" * (3 * PORTION_CHARS + 1)))
    portions = list(active.beyond([(3, 1)]))
    assert all(len(p.token_ids) <= PORTION_TOKENS and len(p.text) <= PORTION_CHARS for p in portions)
    assert [token for p in portions for token in p.token_ids] == list(range(3, count))
    assert sum(len(p.text) for p in portions) == 3 * PORTION_CHARS
    assert list(active.beyond([(count, 3 * PORTION_CHARS + 1)])) == []


# --- what was spent --------------------------------------------------------------------------------------------------


def test_every_attempts_tokens_count_and_the_prompt_once() -> None:
    active = started(active_job())
    active.add(InferTokens("job", 1, 0, (0, 1), ""))
    active.count_attempt(None)
    assert (active.attempt_tokens, active.usage) == (2, Usage(0, 2)), "what a lost worker told is spent"
    active.begin_attempt()
    active.add(InferTokens("job", 2, 2, (2,), ""))
    active.count_attempt(Usage(5, 4))
    assert (active.attempt_tokens, active.usage) == (4, Usage(5, 6)), "the worker knows better what it spent"
    active.begin_attempt()
    active.count_attempt(Usage(5, 0))
    assert active.usage == Usage(5, 6)


# --- turns -----------------------------------------------------------------------------------------------------------


@in_trio()
async def test_turns_come_in_the_order_in_which_they_were_put() -> None:
    active = started(active_job())
    active.put(Assigned("worker"))
    active.put(ENDED)
    active.put(STOP)
    assert [await active.next_turn() for _ in range(3)] == [Assigned("worker"), ENDED, STOP]


@in_trio()
async def test_of_stops_the_first_counts_and_of_an_attempts_ends_the_first() -> None:
    active = active_job()
    active.put(Lost("before any attempt"))
    active.begin_attempt()
    for turn in (Lost("gone"), ENDED, Busy(), STOP, Stop("expired", STOP.error)):
        active.put(turn)
    assert not active.is_attempt_open
    assert active.is_stopped
    assert [await active.next_turn() for _ in range(2)] == [Lost("gone"), STOP]
    active.begin_attempt()
    active.put(ENDED)
    assert await active.end_of_attempt() == ENDED


@in_trio()
async def test_any_number_of_frames_after_an_attempts_end_leaves_the_inbox_as_it_was() -> None:
    active = started(active_job())
    for _ in range(10_000):
        active.put(ENDED)
    assert len(active._turns) == 1


@in_trio(clock_jumps=True)
async def test_the_deadline_is_a_turn_and_comes_once() -> None:
    active = started(active_job(deadline=trio.current_time() + 20))
    turn = await active.next_turn()
    assert isinstance(turn, Stop)
    assert (turn.status, turn.error.code) == ("expired", "deadline_exceeded")
    assert turn.error.message == "the job was not done within its 20 s"
    active.put(STOP)
    with trio.move_on_after(100):
        await active.next_turn()
        pytest.fail("nothing more was to come")


@in_trio(clock_jumps=True)
async def test_what_came_before_the_deadline_counts_before_it() -> None:
    active = started(active_job(deadline=trio.current_time() + 20))
    active.put(ENDED)
    await trio.sleep(30)
    assert await active.next_turn() == ENDED


@in_trio()
async def test_the_end_of_an_attempt_is_waited_for_past_a_slot_that_is_held_already() -> None:
    active = started(active_job())
    active.put(Assigned("worker"))
    active.put(Busy())
    assert await active.end_of_attempt() == Busy()


# --- telling its gateway ---------------------------------------------------------------------------------------------


def test_a_job_without_a_gateway_tells_nobody() -> None:
    active_job().tell(JobAccepted("job", "queued"))


def test_a_gateway_whose_link_is_gone_hears_no_more() -> None:
    link = FakeLink()
    active = active_job(gateway=link)
    active.tell(JobAccepted("job", "queued"))
    link.error = LinkClosed()
    active.tell(JobAccepted("job", "queued"))
    assert (len(link.sent), active.gateway, active.gateway_id) == (1, None, "peer")
    assert link.closed_for is None


def test_a_gateway_that_does_not_read_loses_its_link_so_that_it_begins_anew() -> None:
    link = FakeLink()
    link.error = LinkFull()
    active = active_job(gateway=link)
    active.tell(JobAccepted("job", "queued"))
    assert (active.gateway, link.closed_for) == (None, "it does not read")


class ClosingLink(FakeLink):
    """A link whose end is told at once, as a real one's is."""

    def __init__(self, peer_id: str) -> None:
        super().__init__()
        self.peer_id = peer_id
        self.on_close: Callable[[Link], None] = lambda _: None

    def close(self, reason: str = "") -> None:
        super().close(reason)
        self.on_close(self)


def test_watchers_that_do_not_read_are_forgotten_and_the_others_hear_on() -> None:
    links = [ClosingLink(str(n)) for n in range(4)]
    active = started(active_job(gateway=links[0]))
    for link in links:
        link.on_close = active.forget_link
    for link in links[1:]:
        active.watch(link, ())
    links[1].error = links[2].error = LinkFull()
    active.tell(JobTokens("job", 1, 0, (0,), "0 "))
    active.tell_moved(("other", "boot"))
    assert [link.closed_for is not None for link in links] == [False, True, True, False]
    assert [type(message) for message in links[3].sent] == [JobAccepted, JobTokens, NotLive]
    assert list(active.watchers) == ["3"]


@in_trio()
async def test_a_gateway_that_does_not_read_when_another_one_takes_its_place_harms_nobody() -> None:
    old, new = ClosingLink("old"), ClosingLink("new")
    active = started(active_job(gateway=old, stream=False))
    old.on_close = active.forget_link
    active.tell(JobTokens("job", 1, 0, (0,), "0 "))
    active.tell(JobTokens("job", 1, 1, (1,), "1 "))
    old.error = LinkFull()
    active.attach(new)
    assert (active.gateway, active.watchers, old.closed_for) == (new, {}, "it does not read")


@in_trio(clock_jumps=True)
async def test_a_gateway_that_comes_back_says_how_much_is_left_of_the_deadline() -> None:
    active = started(active_job(deadline=trio.current_time() + 5))
    now = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def come_back() -> None:
            await trio.sleep(1)
            active.attach(FakeLink(), 30.0)

        nursery.start_soon(come_back)
        assert isinstance(await active.next_turn(), Stop)
    assert trio.current_time() - now == pytest.approx(31)


@in_trio()
async def test_what_a_client_sees_in_one_piece_is_told_in_one_piece() -> None:
    link = FakeLink()
    active = started(active_job(gateway=link, stream=False))
    active.tell(JobAccepted("job", "running"))
    active.tell(JobStarted("job", 1, "w", "worker"))
    for position in range(3):
        active.tell(JobTokens("job", 1, position, (position,), f"{position} "))
    active.tell(JobStarted("job", 2, "w", "worker"))
    active.tell(JobTokens("job", 2, 3, (3,), "3 "))
    assert link.sent == []
    active.tell_end(Ending("completed", "stop"))
    assert link.sent == [
        JobAccepted("job", "running"),
        JobStarted("job", 1, "w", "worker"),
        JobTokens("job", 1, 0, (0, 1, 2), "0 1 2 "),
        JobStarted("job", 2, "w", "worker"),
        JobTokens("job", 2, 3, (3,), "3 "),
        JobEnd("job", "completed", 1, "stop", Usage(), told=((0, 0),)),
    ]


@in_trio(clock_jumps=True)
async def test_a_gateway_is_never_further_behind_than_half_a_second_of_tokens() -> None:
    link = FakeLink()
    active = started(active_job(gateway=link, stream=False))
    for position in range(30):
        active.tell(JobTokens("job", 1, position, (position,), "x"))
        await trio.sleep(0.125)
    assert [len(m.token_ids) for m in link.sent if isinstance(m, JobTokens)] == [5] * 6


@in_trio()
async def test_what_was_held_for_a_gateway_that_left_is_not_told_to_the_next_one() -> None:
    first, second = FakeLink(), FakeLink()
    active = started(active_job(gateway=first, stream=False))
    active.tell(JobTokens("job", 1, 0, (0,), "0 "))
    active.gateway = None
    active.attach(second)
    active.tell_end(Ending("completed", "stop"))
    assert (first.sent, len(second.sent)) == ([], 1)


def test_a_refusal_is_told_as_attempt_0_and_an_end_with_its_attempt() -> None:
    link = FakeLink()
    active = active_job(gateway=link)
    active.tell_end(Ending.failed(ErrorInfo("no_worker", "none")))
    started(active).tell_end(Ending("completed", "stop"))
    active.tell_end(Ending.of(STOP))
    active.tell_end(Ending.of(Stop("expired", STOP.error)))
    ends = [(m.status, m.attempt, m.finish_reason) for m in link.sent if isinstance(m, JobEnd)]
    assert ends == [
        ("failed", 0, "error"),
        ("completed", 1, "stop"),
        ("cancelled", 1, "cancelled"),
        ("expired", 1, "error"),
    ]


def record(**changes: object) -> JobRecord:
    facts: dict[str, object] = dict.fromkeys(JobRecord.__struct_fields__)
    facts |= {
        "id": "job",
        "status": "completed",
        "attempt": 2,
        "result": "text",
        "finish_reason": "stop",
        "usage": Usage(1, 2),
    }
    return JobRecord(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "status", "code"),
    [
        (record(), "completed", None),
        (record(status="cancelled", error=STOP.error, result=None), "cancelled", "job_cancelled"),
        (record(status="running"), "failed", "job_conflict"),
        (None, "failed", "job_conflict"),
        (record(result=None), "completed", "job_conflict"),
    ],
)
def test_what_the_store_has_of_a_job_is_told(found: JobRecord | None, status: str, code: str | None) -> None:
    link = FakeLink()
    active_job(gateway=link).tell_record(found)
    (end,) = link.sent
    assert isinstance(end, JobEnd)
    assert end.status == status
    assert (end.error.code if end.error else None) == code


def test_an_answer_that_was_not_kept_is_no_loss_to_a_client_that_has_all_of_it() -> None:
    link = FakeLink()
    active = active_job(gateway=link)
    active.adopt(((0, 1),), ("ab",))
    active.tell_record(record(result=None))
    (end,) = link.sent
    assert isinstance(end, JobEnd)
    assert (end.error, end.usage) == (None, Usage(1, 2))


def test_a_job_is_the_same_after_it_was_in_the_store() -> None:
    new = job("hello", priority=3, region="here", session_key="s", keep="result", wait=False, tenant_id="t")
    found = record(
        **{name: getattr(new, name) for name in new.__struct_fields__ if name not in {"requests_per_minute", "key_id"}},
        status="running",
    )
    assert job_of(found) == new
