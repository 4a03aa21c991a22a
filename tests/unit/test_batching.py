"""The batch's policy and its rows: order, budget, back-pressure, putting back, and what a row holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.batching import Batch, Limits, Plan, round_up
from tether.rows import MIN_REUSED_TOKENS, Rows, num_common_prefix


class Job:
    """A sequence that reads its prompt and then makes so many tokens."""

    def __init__(self, num_prompt: int, num_new: int = 5, leader: Job | None = None) -> None:
        self.num_prompt = num_prompt
        self.num_tokens = num_prompt
        self.num_computed = 0
        self.num_left = num_new
        self.leader = leader


def advance(batch: Batch[Job], plan: Plan[Job]) -> list[Job]:
    """Do what a plan says; return those that ended."""
    ended = []
    for job in [*plan.decode, *plan.prefill]:
        job.num_computed = min(job.num_tokens, job.num_computed + (plan.width if job in plan.prefill else 1))
        if job.num_computed == job.num_tokens:
            job.num_tokens += 1
            job.num_left -= 1
            if not job.num_left:
                batch.remove(job)
                ended.append(job)
    return ended


def fill(batch: Batch[Job], *jobs: Job) -> None:
    for job in jobs:
        batch.add(job)
    while batch.can_admit():
        batch.admit()


def limits(slots: int = 4, kv_tokens: int = 10_000, chunk_tokens: int = 128) -> Limits:
    return Limits(slots, kv_tokens, chunk_tokens=chunk_tokens, idle_chunk_tokens=256, max_waiting=2)


def test_a_new_sequence_is_read_and_then_decodes() -> None:
    batch: Batch[Job] = Batch(limits())
    job = Job(10)
    fill(batch, job)
    plan = batch.step()
    assert (plan.decode, plan.prefill, plan.width) == ((), (job,), 10)
    advance(batch, plan)
    assert batch.step() == Plan((job,), (), 0)


def test_nothing_to_do_is_an_empty_plan() -> None:
    batch: Batch[Job] = Batch(limits())
    assert batch.is_empty
    assert not batch.step()
    assert not batch.can_admit()


def test_a_long_prompt_takes_a_chunk_a_step_while_others_decode() -> None:
    batch: Batch[Job] = Batch(limits())
    first, long = Job(5, num_new=50), Job(500)
    fill(batch, first)
    advance(batch, batch.step())
    fill(batch, long)
    widths = []
    while long.num_computed < 500:
        plan = batch.step()
        assert plan.decode == (first,)
        widths.append(plan.width)
        advance(batch, plan)
    assert widths == [128, 128, 128, 116]


def test_prompts_that_come_together_share_the_budget_evenly() -> None:
    batch: Batch[Job] = Batch(limits(slots=8))
    first = Job(5, num_new=50)
    fill(batch, first)
    advance(batch, batch.step())
    long, short = Job(1000), Job(20)
    fill(batch, long, short)
    plan = batch.step()
    assert (plan.prefill, plan.width) == ((long, short), 64)
    advance(batch, plan)
    assert short in batch.step().decode


def test_one_more_than_the_slots_waits_and_takes_the_place_of_the_first_to_end() -> None:
    batch: Batch[Job] = Batch(limits(slots=2))
    one, two, three = Job(3), Job(3), Job(3)
    fill(batch, one, two, three)
    assert batch.running == [one, two]
    batch.remove(one)
    assert batch.can_admit()
    assert batch.admit() is three


def test_back_pressure_is_told_before_more_is_taken() -> None:
    batch: Batch[Job] = Batch(limits(slots=2))
    assert batch.can_take(4)
    assert not batch.can_take(5)
    fill(batch, Job(3), Job(3), Job(3))
    assert batch.can_take(1)
    assert not batch.can_take(2)


def test_one_whose_tokens_have_no_room_waits_and_nobody_overtakes_it() -> None:
    batch: Batch[Job] = Batch(limits(kv_tokens=240))
    small, large, other = Job(50), Job(150), Job(10)
    fill(batch, small, large, other)
    assert batch.running == [small]
    batch.remove(small)
    assert batch.admit() is large


def test_one_that_is_too_large_for_the_cache_may_try_alone() -> None:
    batch: Batch[Job] = Batch(limits(kv_tokens=10))
    batch.add(Job(50))
    assert batch.can_admit()


def test_the_youngest_is_put_back_when_the_sequences_outgrow_the_cache() -> None:
    batch: Batch[Job] = Batch(limits(kv_tokens=2 * round_up(20)))
    old, young, next_one = Job(10, num_new=100), Job(10, num_new=100), Job(3)
    fill(batch, old, young)
    batch.add(next_one)
    while not batch.is_crowded():
        advance(batch, batch.step())
    assert batch.put_back() is young
    assert not batch.is_crowded()
    assert list(batch.waiting) == [young, next_one]
    assert not batch.can_admit()


def test_after_memory_ran_out_less_is_counted_on_until_the_batch_is_empty() -> None:
    batch: Batch[Job] = Batch(limits())
    fill(batch, Job(10), Job(10))
    batch.shrink()
    assert batch.is_crowded()
    back = batch.put_back()
    assert not batch.can_admit()
    batch.remove(batch.running[0])
    assert batch.admit() is back
    fill(batch, Job(10))
    assert len(batch.running) == 2


def test_a_choice_waits_until_the_prompt_that_it_shares_is_read() -> None:
    batch: Batch[Job] = Batch(limits())
    leader = Job(300)
    follower = Job(300, leader=leader)
    fill(batch, leader, follower)
    assert batch.running == [leader]
    advance(batch, batch.step())
    assert not batch.can_admit()
    advance(batch, batch.step())
    assert batch.admit() is follower


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 6),
    kv_tokens=st.integers(16, 600),
    chunk_tokens=st.integers(1, 64),
    jobs=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_everyone_ends_in_whatever_way_they_come_and_no_limit_is_passed(
    slots: int, kv_tokens: int, chunk_tokens: int, jobs: list[tuple[int, int, int]], seed: int
) -> None:
    chance = random.Random(seed)
    batch: Batch[Job] = Batch(limits(slots, kv_tokens, chunk_tokens))
    coming = sorted(((Job(prompt, new), at) for prompt, new, at in jobs), key=lambda pair: pair[1])
    num_ended, step = 0, 0
    while num_ended < len(jobs):
        while coming and coming[0][1] <= step:
            batch.add(coming.pop(0)[0])
        while batch.is_crowded():
            batch.put_back().num_computed = 0
        while batch.can_admit():
            batch.admit()
        everyone = [*batch.running, *batch.waiting]
        if everyone and chance.random() < 0.05:
            batch.remove(chance.choice(everyone))
            num_ended += 1
        plan = batch.step()
        assert len(batch.running) <= slots
        if len(batch.running) > 1:
            assert batch.num_free_kv_tokens <= kv_tokens
            assert len(batch.running) * max(job.num_tokens for job in batch.running) <= kv_tokens
        if plan.decode:
            assert plan.width * len(plan.prefill) <= chunk_tokens
        assert set(plan.decode) | set(plan.prefill) <= set(batch.running)
        assert plan or not batch.running
        num_ended += len(advance(batch, plan))
        step += 1
        assert step < 20_000
    assert batch.is_empty


# --- rows ------------------------------------------------------------------------------------------------------------


class Tape:
    """Rows in memory as lists, to see that tokens are where the rows say."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self.rows: list[list[int]] = []

    def swap_rows(self, one: int, other: int, num_one: int, num_other: int) -> None:
        first, second = self.rows[one][:num_one], self.rows[other][:num_other]
        self.rows[one], self.rows[other] = second, first

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        self.rows[target] = self.rows[source][:num_tokens]

    def clear_row(self, row: int) -> None:
        self.rows[row] = []

    def reserve(self, num_rows: int) -> int:
        while len(self.rows) < min(num_rows, self.max_rows):
            self.rows.append([])
        return len(self.rows)


class Owner:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.row = -1
        self.num_computed = 0


def begin(rows: Rows, tape: Tape, tokens: list[int]) -> tuple[Owner, int]:
    owner = Owner(tokens)
    owner.num_computed = reused = rows.take(owner)
    compute(tape, owner, len(tokens))
    return owner, reused


def compute(tape: Tape, owner: Owner, num_tokens: int) -> None:
    held = tape.rows[owner.row]
    assert held[: owner.num_computed] == owner.tokens[: owner.num_computed]
    tape.rows[owner.row] = owner.tokens[:num_tokens]
    owner.num_computed = num_tokens


def test_the_next_turn_of_a_conversation_takes_its_row_over() -> None:
    tape = Tape(4)
    rows = Rows(tape)
    owner, _ = begin(rows, tape, list(range(20)))
    row = owner.row
    rows.release(owner, keep=True)
    again, reused = begin(rows, tape, [*range(20), 7, 8])
    assert (again.row, reused) == (row, 20)


def test_the_last_token_is_always_computed() -> None:
    tape = Tape(4)
    rows = Rows(tape)
    owner, _ = begin(rows, tape, list(range(20)))
    rows.release(owner, keep=True)
    assert begin(rows, tape, list(range(20)))[1] == 19


def test_a_beginning_shared_with_a_live_sequence_is_copied() -> None:
    tape = Tape(4)
    rows = Rows(tape)
    one, _ = begin(rows, tape, [*range(20), 1])
    other, reused = begin(rows, tape, [*range(20), 2])
    assert reused == 20
    assert one.row != other.row


def test_what_is_broken_or_too_short_is_not_used_again() -> None:
    tape = Tape(4)
    rows = Rows(tape)
    broken, _ = begin(rows, tape, list(range(20)))
    rows.release(broken, keep=False)
    short, reused = begin(rows, tape, list(range(MIN_REUSED_TOKENS - 1)))
    assert reused == 0
    rows.release(short, keep=True)
    assert begin(rows, tape, list(range(20)))[1] == 0


def test_the_oldest_left_over_is_given_up_first() -> None:
    tape = Tape(2)
    rows = Rows(tape)
    old, _ = begin(rows, tape, [1] * 20)
    new, _ = begin(rows, tape, [2] * 20)
    rows.release(old, keep=True)
    rows.release(new, keep=True)
    begin(rows, tape, [3] * 20)
    assert begin(rows, tape, [2] * 20)[1] == 19


def test_a_recurrent_state_is_used_only_as_a_whole() -> None:
    tape = Tape(4)
    rows = Rows(tape, exact_only=True)
    owner, _ = begin(rows, tape, list(range(20)))
    assert begin(rows, tape, [*range(20), 5])[1] == 0
    rows.release(owner, keep=True)
    assert begin(rows, tape, [*range(19), 5, 6])[1] == 0
    assert begin(rows, tape, [*range(20), 6])[1] == 20


def test_no_row_left_is_said() -> None:
    tape = Tape(1)
    rows = Rows(tape)
    begin(rows, tape, [1])
    with pytest.raises(MemoryError):
        rows.take(Owner([2]))


@settings(max_examples=200, deadline=None)
@given(max_rows=st.integers(2, 7), exact=st.booleans(), seed=st.integers(0, 10_000))
def test_each_owner_finds_its_own_tokens_in_its_row_whatever_moved(max_rows: int, exact: bool, seed: int) -> None:
    chance = random.Random(seed)
    tape = Tape(max_rows)
    rows = Rows(tape, exact_only=exact)
    live: list[Owner] = []
    for _ in range(60):
        if len(live) < max_rows and chance.random() < 0.5:
            # Few beginnings, so that they are shared.
            tokens = [chance.randrange(2)] * chance.randint(1, 15) + [chance.randrange(3)] * chance.randint(0, 15)
            owner = Owner(tokens)
            owner.num_computed = rows.take(owner)
            live.append(owner)
        elif live and chance.random() < 0.4:
            rows.release(live.pop(chance.randrange(len(live))), keep=chance.random() < 0.8)
        decoding = chance.sample(live, chance.randint(0, len(live)))
        reading = [owner for owner in live if owner not in decoding]
        rows.arrange(decoding, reading)
        assert sorted(owner.row for owner in decoding) == list(range(len(decoding)))
        assert sorted(owner.row for owner in live) == list(range(len(live)))
        for owner in live:
            compute(tape, owner, chance.randint(owner.num_computed, len(owner.tokens)))
        assert rows.num_owned == len(live)


@given(one=st.lists(st.integers(0, 1), max_size=40), other=st.lists(st.integers(0, 1), max_size=40))
def test_the_common_prefix_is_found_by_halving(one: list[int], other: list[int]) -> None:
    most = min(len(one), len(other))
    expected = next((place for place in range(most) if one[place] != other[place]), most)
    assert num_common_prefix(one, other, most) == expected
