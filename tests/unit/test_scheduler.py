from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support import make_job as job
from tests.support import make_state
from tether import reasons
from tether.errors import ModelNotFound, NoWorker
from tether.records import Job, ModelInfo
from tether.scheduler import WEIGHTS, WorkerView, best, choose, fade, newest_version, refusal, unready, version_key

DEMO = ("demo", "1.0")


def view(
    worker_id: str = "worker",
    *,
    slots: int = 2,
    assigned: int = 0,
    elsewhere: int = 0,
    failures: float = 0.0,
    busy: bool = False,
    speed: float = 0.0,
    first_token: float = 0.0,
    free_kv_tokens: int | None = None,
    model: str = "demo",
    version: str = "1.0",
    **state: object,
) -> WorkerView:
    served = ModelInfo(
        model,
        version,
        slots=slots,
        tokens_per_second=speed,
        time_to_first_token_seconds=first_token,
        free_kv_tokens=free_kv_tokens,
    )
    models = (served,)
    return WorkerView(
        make_state(worker_id, models=models, **state),
        assigned={(model, version): assigned},
        num_elsewhere=elsewhere,
        recent_failures=failures,
        busy=busy,
    )


@st.composite
def clusters(draw: st.DrawFn) -> list[WorkerView]:
    count = draw(st.integers(0, 8))
    return [
        view(
            f"worker-{number}",
            slots=draw(st.integers(0, 3)),
            assigned=draw(st.integers(0, 3)),
            elsewhere=draw(st.integers(0, 2)),
            failures=draw(st.sampled_from([0.0, 0.5, 2.0])),
            busy=draw(st.booleans()),
            speed=draw(st.sampled_from([0.0, 10.0, 50.0])),
            first_token=draw(st.sampled_from([0.0, 0.1, 3.0])),
            free_kv_tokens=draw(st.sampled_from([None, 0, 10_000])),
            model=draw(st.sampled_from(["demo", "other"])),
            version=draw(st.sampled_from(["1.0", "2.0"])),
            region=draw(st.sampled_from(["here", "there"])),
            draining=draw(st.booleans()),
            paused=draw(st.sampled_from(["", "on battery"])),
        )
        for number in range(count)
    ]


jobs = st.builds(
    lambda region, session, number: job(region=region, session_key=session, id=f"job-{number}"),
    st.sampled_from([None, "here", "there"]),
    st.sampled_from([None, "alice", "bob"]),
    st.integers(0, 1000),
)
tried_sets = st.frozensets(st.tuples(st.sampled_from([f"worker-{n}" for n in range(8)]), st.just("boot")))


# --- choosing --------------------------------------------------------------------------------------------------------


@given(jobs, clusters(), tried_sets)
def test_nobody_who_cannot_take_the_job_is_chosen_and_everybody_has_one_answer(
    new: Job, workers: list[WorkerView], tried: frozenset[tuple[str, str]]
) -> None:
    decision = choose(new, workers, tried=tried)
    by_id = {each.state.worker_id: each for each in workers}
    for candidate in decision.candidates:
        chosen = by_id[candidate.worker_id]
        model = chosen.model(new)
        assert model is not None
        assert (model.name, model.version) == (new.model, new.version)
        assert not chosen.state.draining
        assert not chosen.busy
        assert chosen.assigned[DEMO] + chosen.num_elsewhere < model.slots
    answered = [c.worker_id for c in decision.candidates] + [r.worker_id for r in decision.rejections]
    assert sorted(answered) == sorted(by_id)
    assert sum(decision.counts().values()) == len(decision.rejections)


@given(jobs, clusters(), tried_sets)
def test_the_quick_answer_is_the_full_decisions_first(
    new: Job, workers: list[WorkerView], tried: frozenset[tuple[str, str]]
) -> None:
    assert best(new, workers, tried=tried) == choose(new, workers, tried=tried).worker_id


@given(jobs, clusters(), tried_sets, st.randoms(use_true_random=False))
def test_the_order_in_which_workers_are_listed_changes_nothing(
    new: Job, workers: list[WorkerView], tried: frozenset[tuple[str, str]], shuffle: random.Random
) -> None:
    shuffled = list(workers)
    shuffle.shuffle(shuffled)
    assert choose(new, shuffled, tried=tried).candidates == choose(new, workers, tried=tried).candidates


@given(jobs, clusters())
def test_a_score_is_the_sum_of_its_named_parts_and_the_best_comes_first(new: Job, workers: list[WorkerView]) -> None:
    candidates = choose(new, workers).candidates
    for candidate in candidates:
        assert candidate.parts.keys() == WEIGHTS.keys()
        assert candidate.score == math.fsum(candidate.parts.values())
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)


def test_the_parts_weigh_region_session_free_slots_speed_and_failures() -> None:
    workers = [
        view("near", region="here", slots=4, assigned=1, speed=25.0, first_token=0.5),
        view("fast", region="there", slots=2, speed=50.0, first_token=2.0, failures=1.5),
    ]
    new = job(region="here")
    near, fast = sorted(choose(new, workers).candidates, key=lambda c: c.worker_id, reverse=True)
    assert near.parts == {
        "region": 100.0,
        "affinity": 0.0,
        "free_slots": 22.5,
        "speed": 10.0,
        "first_token": 10.0,
        "failures": 0.0,
        "exact": 0.0,
    }
    assert fast.parts == {
        "region": 0.0,
        "affinity": 0.0,
        "free_slots": 30.0,
        "speed": 20.0,
        "first_token": 2.5,
        "failures": -120.0,
        "exact": 0.0,
    }


def test_an_answer_that_has_begun_goes_to_a_worker_that_goes_on_exactly() -> None:
    same, other = ModelInfo("demo", "1.0", "weights", slots=2), ModelInfo("demo", "1.0", "others", slots=9)
    workers = [view("same", region="there", failures=1.0), view("other", region="here", slots=9)]
    for worker, model in zip(workers, (same, other), strict=True):
        worker.state = msgspec.structs.replace(worker.state, models=(model,))
    new = job(region="here")
    assert best(new, workers) == "other"
    assert best(new, workers, like=same.fingerprint) == "same"
    assert best(new, workers, like="weights/float16/") == "other", "where there is none, anybody goes on"
    assert best(new, workers, like=same.fingerprint, tried=frozenset({("same", "boot")})) == "other"


def test_paused_and_drained_workers_take_no_jobs_and_are_counted_by_their_reasons_with_what_these_leave_open() -> None:
    workers = [view("a", paused="on battery"), view("b", paused="on battery"), view("c", paused="outside 20:00-08:00")]
    workers += [view("d", paused="on battery"), view("e", draining=True)]
    workers[3].drained = True
    decision = choose(job(), workers)
    assert {reason: count for reason, count in decision.counts().items() if count} == {"paused": 3, "draining": 2}
    assert not decision.can_wait
    assert [rejection.detail for rejection in decision.rejections] == [
        "on battery", "on battery", "outside 20:00-08:00", "by an operator", "stopping"
    ]  # fmt: skip
    error = refusal(job(), decision, workers)
    assert "draining 2 (by an operator 1, stopping 1), paused 3 (on battery 2, outside 20:00-08:00 1)" in error.message
    assert (error.reasons["paused"], error.reasons["draining"]) == (3, 2)


def test_of_many_pauses_the_most_frequent_are_said_and_the_others_counted() -> None:
    workers = [
        view(f"{why}{number}", paused=f"for {why}") for why in "abcde" for number in range(3 if why == "e" else 1)
    ]
    assert reasons.told(unready(workers)) == "paused 7 (for e 3, for a 1, for b 1, others 2)"


def test_workers_that_take_no_job_whatever_its_model_are_told_from_those_that_are_ready_or_full() -> None:
    workers = [view("ready"), view("full", assigned=2), view("other", model="other"), view("loading", slots=0)]
    workers += [view("paused", paused="on battery"), view("draining", draining=True)]
    found = {rejection.worker_id: rejection.reason for rejection in unready(workers)}
    assert found == {"loading": "loading", "paused": "paused", "draining": "draining"}
    assert reasons.told(unready(workers)) == "draining 1 (stopping), paused 1 (on battery), loading 1"
    assert reasons.told(unready(workers[:2])) == ""


def test_of_two_versions_one_whose_workers_have_paused_comes_last() -> None:
    workers = [view("old"), view("new", version="2.0")]
    assert newest_version("demo", [each.state for each in workers]) == "2.0"
    workers[1].state = msgspec.structs.replace(workers[1].state, paused="on battery")
    assert newest_version("demo", [each.state for each in workers]) == "1.0"


def test_a_wish_of_the_client_outweighs_comfort_and_a_fresh_failure_outweighs_a_session() -> None:
    assert best(job(region="there"), [view("idle", slots=9), view("there", region="there", assigned=1)]) == "there"
    workers = [view("a"), view("b")]
    new = job(session_key="alice")
    favourite = best(new, workers)
    for each in workers:
        each.recent_failures = float(each.state.worker_id == favourite)
    assert best(new, workers) != favourite


@given(st.text(min_size=1, max_size=20), st.integers(2, 8), st.integers(0, 7))
def test_a_session_keeps_its_worker_when_another_one_leaves(session: str, count: int, leaving: int) -> None:
    workers = [view(f"worker-{number}") for number in range(count)]
    new = job(session_key=session)
    favourite = best(new, workers)
    assume(favourite != f"worker-{leaving % count}")
    assert best(new, [each for each in workers if each.state.worker_id != f"worker-{leaving % count}"]) == favourite


def test_sessions_and_equal_workers_spread() -> None:
    workers = [view(f"worker-{number}") for number in range(4)]
    by_session = {best(job(session_key=f"session {number}"), workers) for number in range(100)}
    by_job = {best(job(), workers) for _ in range(100)}
    assert len(by_session) == len(by_job) == 4


def test_a_worker_that_failed_at_the_job_is_asked_again_only_when_nobody_else_serves_the_model() -> None:
    tried = frozenset({("a", "boot")})
    assert best(job(), [view("a", slots=9, speed=100.0), view("b")], tried=tried) == "b"
    assert best(job(), [view("a"), view("b", assigned=2)], tried=tried) is None, "b may have room soon"
    assert choose(job(), [view("a"), view("b", assigned=2)], tried=tried).can_wait
    assert best(job(), [view("a"), view("b", draining=True), view("c", model="other")], tried=tried) == "a"
    assert best(job(), [view("a", boot_id="another"), view("b", assigned=2)], tried=tried) == "a", "it started anew"


@pytest.mark.parametrize(
    ("worker", "reason", "can_wait"),
    [
        (view(model="other"), "no_such_model", False),
        (view(version="2.0"), "no_such_version", False),
        (view(draining=True), "draining", False),
        (view(slots=0), "loading", True),
        (view(assigned=2), "full", True),
        (view(assigned=1, elsewhere=1), "full", True),
        (view(busy=True), "full", True),
        (view(assigned=1, free_kv_tokens=200), "too_little_memory", True),
    ],
)
def test_each_reason_has_its_name_and_says_if_waiting_may_help(worker: WorkerView, reason: str, can_wait: bool) -> None:
    decision = choose(job(), [worker])
    assert [rejection.reason for rejection in decision.rejections] == [reason]
    assert decision.can_wait == can_wait
    assert decision.worker_id is None


def test_one_model_that_loads_does_not_keep_the_worker_from_serving_another() -> None:
    models = (ModelInfo("demo", "1.0", slots=1), ModelInfo("other", "1.0", slots=0))
    worker = WorkerView(make_state(models=models, loading=True), assigned={})
    assert best(job(), [worker]) == "worker"
    assert best(job(model="other"), [worker]) is None


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "workers", "known", "kind", "message"),
    [
        (job(), [], [], ModelNotFound, "no worker serves a model 'demo'; served now: nothing"),
        (job(model="dem"), [view()], [], ModelNotFound, "no worker serves a model 'dem'; did you mean 'demo'?"),
        (job(model="x"), [view()], ["phi-2"], ModelNotFound, "no worker serves a model 'x'; served now: demo, phi-2"),
        (job(version="3"), [view()], [], ModelNotFound, "model 'demo' is served in version 1.0, not '3'"),
        (
            job(),
            [],
            ["demo"],
            NoWorker,
            "no worker can take a job for 'demo' now (no worker is connected); try again soon",
        ),
        (
            job(),
            [view("a", draining=True), view("b", draining=True), view("c", model="other")],
            [],
            NoWorker,
            "no worker can take a job for 'demo' now (no such model 1, draining 2 (stopping), full 0, too little memory 0); try again soon",
        ),
    ],
)
def test_a_refusal_says_what_is_missing(
    new: Job, workers: list[WorkerView], known: list[str], kind: type[Exception], message: str
) -> None:
    error = refusal(new, choose(new, workers), workers, known)
    assert type(error) is kind
    assert error.message == message


def test_a_refusal_names_some_of_many_models() -> None:
    error = refusal(job(model="x"), choose(job(model="x"), []), [], [f"model-{number:04}" for number in range(1000)])
    assert error.message.endswith("model-0049 and 950 more")


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("1.9", "1.10"),
        ("1.9", "1." + "1" * 5000),
        ("1." + "1" * 5000, "1." + "2" * 5000),
        ("1.0-rc", "1.0-rd"),
        ("a", "1"),
    ],
)
def test_numbers_in_versions_count_as_numbers_however_long(older: str, newer: str) -> None:
    assert version_key(older) < version_key(newer)
    assert version_key("1.010") == version_key("1.10")


def test_failures_fade_by_half_each_half_life() -> None:
    assert fade([]) == 0.0
    assert fade([0.0, 60.0, 120.0]) == 1.75
    assert fade([30.0], half_life_seconds=10.0) == 0.125
    assert fade([600.0]) == 0.0, "or a failure would decide between equals for ever"


def test_the_weights_stand_in_the_order_of_the_parts() -> None:
    assert list(WEIGHTS) == ["region", "affinity", "free_slots", "speed", "first_token", "failures", "exact"]
    assert msgspec.json.encode(choose(job(), [view()]).candidates[0].parts)


def test_memory_counts_for_prompt_and_answer_and_only_where_jobs_run() -> None:
    long, short = job("x" * 900), job("x" * 90)  # 300 and 30 tokens by guess, and 256 for the answer
    busy = view(assigned=1, free_kv_tokens=300)
    assert best(short, [busy]) == "worker"
    assert best(long, [busy]) is None
    assert best(long, [view(free_kv_tokens=0)]) == "worker", "nothing runs there, so what it said is from a busier time"
    assert best(long, [view(assigned=1)]) == "worker", "it has not said"
    assert "too little memory 1" in refusal(long, choose(long, [busy]), [busy]).message
