from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support import make_job as job
from tether.errors import QueueFull, TenantQueueFull
from tether.queueing import BACKGROUND_PRIORITY, JobQueue

DEMO = ("demo", "1.0")


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from(["demo", "other"])), max_size=40), st.data())
def test_each_line_is_in_order_of_priority_then_arrival_and_places_say_so(
    wanted: list[tuple[int, str]], data: st.DataObject
) -> None:
    queue = JobQueue(1000)
    waiting = {f"job-{arrival}": (-priority, arrival, model) for arrival, (priority, model) in enumerate(wanted)}
    for job_id, (negative_priority, arrival, model) in waiting.items():
        place = queue.push(job(id=job_id, priority=-negative_priority, model=model), arrival)
        assert place == queue.place(job_id)
    for job_id in data.draw(st.permutations(list(waiting)))[: len(waiting) // 2]:
        queue.remove(job_id)
        queue.remove(job_id)
        del waiting[job_id]
        assert job_id not in queue
    assert len(queue) == len(waiting)
    for model in ("demo", "other"):
        expected = [job_id for job_id, facts in sorted(waiting.items(), key=lambda i: i[1][:2]) if facts[2] == model]
        assert list(queue.line((model, "1.0"))) == expected
        assert [queue.place(job_id) for job_id in expected] == list(range(1, len(expected) + 1))
        assert ((model, "1.0") in queue.models) == bool(expected)


def test_a_job_that_comes_back_stands_where_it_stood() -> None:
    queue = JobQueue(10)
    for arrival in (1, 2, 3):
        queue.push(job(id=f"job-{arrival}"), arrival)
    queue.remove("job-1")
    assert queue.push(job(id="job-1"), 1) == 1
    assert queue.push(job(id="job-2"), 2) == 2, "twice is once"
    assert list(queue.line(DEMO)) == ["job-1", "job-2", "job-3"]


def test_jobs_in_the_background_stand_behind_all_others_and_take_turns_too() -> None:
    queue = JobQueue(10)
    back: dict[str, Any] = {"priority": BACKGROUND_PRIORITY}
    for arrival, (job_id, tenant, changes) in enumerate(
        [("b1", "x", back), ("b2", "x", back), ("b3", "y", back), ("low", "x", {"priority": -100}), ("one", "y", {})]
    ):
        new = job(id=job_id, tenant_id=tenant, **changes)
        place = queue.prospect(new, arrival)
        assert queue.push(new, arrival) == place
    assert list(queue.line(DEMO)) == ["low", "one", "b1", "b3", "b2"]
    assert [queue.place(job_id) for job_id in ("low", "one", "b1", "b3", "b2")] == [1, 2, 3, 4, 5]
    assert (queue.models, queue.waiting(DEMO)) == ([DEMO], {"x": 3, "y": 2})
    assert (queue.next_of(DEMO, "x"), queue.next_of(DEMO, "z")) == ("low", None)
    for job_id in ("low", "one", "b1"):
        queue.take(job_id)
    assert (queue.place("b3"), queue.next_of(DEMO, "x")) == (1, "b2")


def fill(queue: JobQueue, first_arrival: int = 0, **num_jobs: int) -> None:
    """Let each tenant bring so many jobs, one tenant after the other."""
    arrival = first_arrival
    for tenant, count in num_jobs.items():
        for _ in range(count):
            queue.push(job(id=f"{tenant}-{arrival}", tenant_id=tenant), arrival)
            arrival += 1


def serve(queue: JobQueue, count: int) -> str:
    """Give away so many slots; return whose they were, by the first letters."""
    served = ""
    for _ in range(count):
        job_id = next(queue.line(DEMO))
        served += job_id[0]
        queue.take(job_id)
        queue.remove(job_id)
    return served


def test_a_thousand_jobs_of_one_tenant_do_not_keep_another_s_one_waiting() -> None:
    queue = JobQueue(2000)
    fill(queue, many=1000)
    assert serve(queue, 10) == "m" * 10
    assert queue.push(job(id="one", tenant_id="one"), 5000) == 2
    assert serve(queue, 3) == "mom"


def test_tenants_take_turns_by_their_weights() -> None:
    queue = JobQueue(100)
    queue.weights = {"heavy": 3.0}
    fill(queue, heavy=9, light=9, other=9)
    assert sorted(serve(queue, 15)) == sorted("hhhlohhhlohhhlo")
    assert serve(queue, 8) == "lolololo"


def test_who_did_not_wait_has_no_credit_and_who_had_more_than_its_share_still_has() -> None:
    queue = JobQueue(100)
    fill(queue, alice=20)
    serve(queue, 10)
    fill(queue, 100, bob=20)
    assert serve(queue, 6).count("b") == 3, "what was free is nobody's debt"
    queue.weights = {"carol": 0.25}
    fill(queue, 200, carol=1)
    for arrival in range(201, 203):  # whoever comes one by one waits for its turn as if it had all of them in the line
        turns = 0
        while "carol-" + str(arrival - 1) in queue:
            serve(queue, 1)
            turns += 1
        assert turns <= 3 if arrival == 201 else turns > 6
        fill(queue, arrival, carol=1)


def test_priorities_order_a_tenant_s_own_jobs_and_no_others() -> None:
    queue = JobQueue(100)
    fill(queue, alice=2)
    queue.push(job(id="bob-low", tenant_id="bob", priority=-9), 10)
    assert queue.push(job(id="alice-high", tenant_id="alice", priority=100), 11) == 1
    assert list(queue.line(DEMO)) == ["alice-high", "bob-low", "alice-0", "alice-1"]


def test_a_job_that_comes_back_is_charged_to_its_tenant_once() -> None:
    queue = JobQueue(100)
    fill(queue, alice=3, bob=3)
    for _ in range(3):
        queue.take("alice-0")
        queue.push(job(id="alice-0", tenant_id="alice"), 0)
    assert list(queue.line(DEMO)) == ["bob-3", "alice-0", "bob-4", "alice-1", "bob-5", "alice-2"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.booleans()), max_size=40),
    st.dictionaries(st.sampled_from("abc"), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
)
def test_places_say_the_order_whoever_comes_and_goes(
    events: list[tuple[str, int, bool]], weights: dict[str, float]
) -> None:
    queue = JobQueue(1000)
    queue.weights = weights
    for arrival, (tenant, priority, also_serve) in enumerate(events):
        queue.push(job(id=f"job-{arrival}", tenant_id=tenant, priority=priority), arrival)
        if also_serve:
            queue.take(next(queue.line(DEMO)))
        line = list(queue.line(DEMO))
        assert [queue.place(job_id) for job_id in line] == list(range(1, len(line) + 1))
        assert len(line) == len(queue)


def test_a_queue_has_room_for_so_many_and_those_that_are_about_to_wait_count() -> None:
    queue = JobQueue(2)
    queue.expect(job(id="coming", tenant_id="one"))
    queue.push(job(tenant_id="two"), 1)
    with pytest.raises(QueueFull, match="2 jobs wait already"):
        queue.check_room(job(tenant_id="three"))
    queue.push(job(id="coming", tenant_id="one"), 2)
    with pytest.raises(QueueFull):
        queue.check_room(job(tenant_id="three"))
    queue.push(job(), 3)
    assert len(queue) == 3, "what was accepted before is never turned away"
    with pytest.raises(QueueFull):
        JobQueue(0).check_room(job())


def test_a_place_is_free_again_when_its_job_gets_a_slot_or_is_refused_or_ends() -> None:
    queue = JobQueue(1)
    new = job()
    for end in (queue.take, queue.remove):
        queue.expect(new)
        queue.push(new, 1)
        end(new.id)
        queue.check_room(job())
    queue.expect(new)
    assert queue.expects(new.id)
    queue.remove(new.id)
    assert not queue.expects(new.id)
    queue.check_room(job())


def test_one_tenant_s_flood_is_refused_for_itself_and_others_still_get_in() -> None:
    queue = JobQueue(100)
    fill(queue, flood=50)
    with pytest.raises(TenantQueueFull, match="50 jobs of this tenant wait already"):
        queue.check_room(job(tenant_id="flood"))
    fill(queue, 1000, second=25)
    with pytest.raises(TenantQueueFull):
        queue.check_room(job(tenant_id="second"))
    queue.check_room(job(tenant_id="third"))
    queue.weights = {"second": 2.0}
    queue.check_room(job(tenant_id="second"))


def test_a_tenant_s_own_bound_holds_beside_its_share() -> None:
    queue = JobQueue(100, max_per_tenant=2)
    fill(queue, one=2)
    with pytest.raises(TenantQueueFull):
        queue.check_room(job(tenant_id="one"))
    queue.check_room(job(tenant_id="other"))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.booleans()), max_size=30),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 3.0])),
    st.sampled_from("abcd"),
    st.integers(-1, 1),
)
@example(  # of thirds, whose sum depends on how it is made
    [
        (whose, 0, also_serve)
        for whose, also_serve in zip("bcbccccbc", (False,) * 4 + (True,) * 2 + (False,) * 3, strict=True)
    ],
    {"b": 0.5, "c": 3.0},
    "c",
    0,
)
def test_the_place_that_a_job_would_have_is_the_one_that_it_gets(
    events: list[tuple[str, int, bool]], weights: dict[str, float], tenant: str, priority: int
) -> None:
    queue = JobQueue(1000)
    queue.weights = weights
    for arrival, (whose, its_priority, also_serve) in enumerate(events):
        queue.push(job(id=f"job-{arrival}", tenant_id=whose, priority=its_priority), arrival)
        if also_serve:
            queue.take(next(queue.line(DEMO)))
    new = job(id="new", tenant_id=tenant, priority=priority)
    assert queue.prospect(new, 1000) == queue.push(new, 1000)


def test_each_tenant_s_next_job_and_number_are_known() -> None:
    queue = JobQueue(100)
    fill(queue, alice=2, bob=1)
    assert queue.waiting(DEMO) == {"alice": 2, "bob": 1}
    assert queue.next_of(DEMO, "alice") == "alice-0"
    assert queue.next_of(DEMO, "carol") is None
    assert queue.next_of(("other", "1.0"), "alice") is None
    assert queue.waiting(("other", "1.0")) == {}
