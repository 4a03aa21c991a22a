from __future__ import annotations

from pathlib import Path

import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.support import make_job as job
from tests.support import open_world, until
from tests.unit.test_scheduler import clusters, jobs, view
from tether.explain import Outlook, explain
from tether.messages import JobQueued
from tether.quotas import Limit
from tether.records import Explanation, Job, ModelInfo
from tether.scheduler import WorkerView, best, choose
from tether.settings import OrchestratorSettings
from tether.testing import in_trio


def told(
    new: Job, workers: list[WorkerView], *limits: Limit, sees_all: bool = False, **num_waiting: int
) -> Explanation:
    outlook = Outlook(new, choose(new, workers), None, None, num_waiting)
    return explain(outlook, workers, limits, orchestrator=("id", "name"), sees_all=sees_all, now=100.0)


@given(jobs, clusters())
def test_the_first_worker_that_is_told_is_the_one_that_would_be_asked_and_everybody_is_told_once(
    new: Job, workers: list[WorkerView]
) -> None:
    found = told(new, workers)
    chosen = best(new, workers)
    assert (found.workers[0].worker_id if chosen is not None else None) == chosen
    assert (found.outcome == "runs") == (chosen is not None)
    assert sorted(each.worker_id for each in found.workers) == sorted(each.state.worker_id for each in workers)
    for each in found.workers:
        assert (each.score is None) != (each.reason is None)
        assert each.score is None or abs(sum(each.parts.values()) - each.score) < 1e-6
    scores = [each.score for each in found.workers if each.score is not None]
    assert scores == sorted(scores, reverse=True)


@given(st.integers(0, 5), st.integers(0, 5))
def test_only_who_sees_all_is_told_of_other_tenants_jobs(own: int, others: int) -> None:
    for sees_all, number in ((False, None), (True, own + others)):
        found = told(job(), [view()], sees_all=sees_all, tenant=own, other=others)
        assert (found.num_own_waiting, found.num_waiting) == (own, number)


def test_limits_are_told_with_what_is_left_and_one_that_is_used_up_refuses() -> None:
    minute = Limit("", "", "requests", 60, 10, 7)
    key = Limit("key-1", "demo", "tokens", 86_400, 1000, 900)
    found = told(job("x"), [view()], minute)
    (left,) = found.limits
    assert (found.outcome, left.name, left.of, left.most, left.left) == ("runs", "requests_per_minute", "tenant", 10, 3)
    assert left.reset_seconds == 20.0
    found = told(job("x"), [view()], minute, key)
    assert found.outcome == "refused"
    assert found.error is not None
    assert found.error.code == "insufficient_quota"
    assert (found.limits[1].of, found.limits[1].model, found.limits[1].left) == ("key", "demo", 100)


@in_trio()
async def test_what_is_told_is_what_happens_then_and_asking_changes_nothing(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        node = await world.orchestrator(settings=OrchestratorSettings(max_queued=3))
        models = (ModelInfo("demo", "1.0", slots=1),)
        workers = {worker.id: worker for worker in [await world.hand_worker(node, name=n, models=models) for n in "ab"]}
        gateway = await world.gateway()
        running = [job(), job()]
        for new in running:
            found = await gateway.submissions.explain(new)
            assert (found.outcome, found.orchestrator_id, found.orchestrator_name) == ("runs", node.id, "orchestrator")
            gateway.client(new)
            await workers[found.workers[0].worker_id].start_of(new)
        found = await gateway.submissions.explain(job(version=""))
        assert (found.outcome, found.version) == ("waits", "1.0")
        assert [each.reason for each in found.workers] == ["full", "full"]
        assert found.waiting is not None
        assert found.waiting.place == 1
        assert sum(world.store.counts().values()) == 2, "nothing was made by asking"
        waiting = [gateway.client(job()), gateway.client(job())]
        for client in waiting:
            await client.until(JobQueued)
        found = await gateway.submissions.explain(job(), sees_all=True)
        assert found.error is not None
        assert (found.outcome, found.error.code, found.num_waiting) == ("refused", "tenant_queue_full", 2)
        assert (await gateway.submissions.explain(job(tenant_id="other"))).waiting is not None
        found = await gateway.submissions.explain(job(model="dema"))
        assert found.error is not None
        assert (found.outcome, found.error.code) == ("refused", "model_not_found")
        node.orchestrator._draining = True
        found = await gateway.submissions.explain(job())
        assert found.error is not None
        assert found.error.code == "draining"
        world.database.is_away = True
        await until(lambda: node.housekeeping.store_error)
        found = await gateway.submissions.explain(job())
        assert found.error is not None
        assert found.error.code == "store_unavailable"
        world.database.is_away = False
        for client in waiting:
            client.leave()
        for new in running:
            next(worker for worker in workers.values() if any(s.job.id == new.id for s in worker.starts)).end(new)
        await trio.lowlevel.checkpoint()
