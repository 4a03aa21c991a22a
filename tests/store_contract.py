"""What every store promises: the same tests run on a SQLite file and on a real rqlited."""

from __future__ import annotations

import functools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import ParamSpec

import msgspec
import pytest
import trio

from tether import audit, keys
from tether.attempts import Attempts
from tether.batch_store import BatchLedger, BatchStore
from tether.database import Applied, Statement, Value
from tether.errors import ErrorInfo, InsufficientQuota, InternalError, JobConflict, JobTooLarge, RateLimited, SetupError
from tether.ledger import Ledger
from tether.named_queries import Query, Write, load_queries
from tether.quotas import DAY, Limit
from tether.records import (
    Actor,
    BatchRecord,
    Caller,
    Chat,
    ChatMessage,
    FileRecord,
    Job,
    JobRecord,
    ModelInfo,
    NodeRecord,
    Sampling,
    TokenLogprobs,
    Tool,
    Usage,
    WorkerState,
)
from tether.store import Store
from tether.stored import Admission, Allowance, HeldJob, WorkerSlot
from tether.tenant_store import TenantStore

P = ParamSpec("P")

NOW = 1_800_000_030.25  # 29.75 s before the end of a quota window
ORCHESTRATOR = "orchestrator-1"
BOOT = "boot-1"
WORKER = WorkerSlot("worker-1", "worker-boot-1", slots=2)
TABLES = (
    "jobs",
    "attempts",
    "workers",
    "nodes",
    "models",
    "tenants",
    "api_keys",
    "quota_counters",
    "quota_limits",
    "secrets",
    "idempotency_keys",
    "files",
    "file_parts",
    "batches",
    "batch_lines",
    "audit_events",
)
AWKWARD_TEXTS = [
    "'; DROP TABLE jobs; --",
    'a "quoted" :id ? ?1 $x @y \\ \\u0000 %s {}',
    "before\0after",
    "🦊 ünïcödé \u202e \U0010ffff",
    "line\nbreak\ttab\r\n",
    "x" * 200_000,
    "",
]

SAMPLES: dict[str, Value] = {
    **dict.fromkeys(("number", "slots", "limit", "priority", "wait", "stream", "toy", "exact"), 1),
    **dict.fromkeys(("requests_per_minute", "window_start", "window_seconds", "context_tokens"), 60),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), 2),
    **dict.fromkeys(("now", "created_at", "started_at", "seen_at", "weight", "deadline_seconds", "expires_at"), 1.5),
    **dict.fromkeys(("num_bytes", "num_parts", "num_lines", "most_bytes", "after"), 1),
    "purpose": "batch",
    "status": "failed",
    "keep": "all",
    "states": "[]",
    "asked": "[]",
    "used": "{}",
    "details": "{}",
    "since": 1.5,
    "lines": "[]",
    "unit": "requests",
    **dict.fromkeys(("most", "used_tokens", "given_back", "reserved_tokens"), 1),
}

OpenStore = Callable[[], Store]


ADMIN = Actor("key-1", "ops")


def trio_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test on trio, with a bound."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            with trio.fail_after(60):
                await test(*args, **kwargs)

        trio.run(bounded)

    return run


@asynccontextmanager
async def running_ledger(store: Store, *, max_batch: int = 200, max_waiting: int = 4096) -> AsyncIterator[Ledger]:
    """A ledger whose `run` is running."""
    ledger = Ledger(store, max_batch=max_batch, max_waiting=max_waiting)
    async with trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        yield ledger
        nursery.cancel_scope.cancel()


def job(job_id: str = "job-1", **changes: object) -> Job:
    """A plain job."""
    plain = Job(id=job_id, tenant_id="tenant-1", model="demo", version="1.0", input="hello", created_at=NOW - 1)
    return msgspec.structs.replace(plain, **changes)


async def admit(
    ledger: Ledger,
    new: Job,
    worker: WorkerSlot | None = None,
    *,
    boot: str = BOOT,
    orchestrator_id: str = ORCHESTRATOR,
    now: float = NOW,
) -> Admission:
    return await ledger.admit(new, orchestrator_id=orchestrator_id, orchestrator_boot=boot, now=now, worker=worker)


async def reserve(
    ledger: Ledger, job_id: str, number: int, worker: WorkerSlot = WORKER, *, boot: str = BOOT, now: float = NOW
) -> bool:
    return await ledger.reserve(
        job_id, number, worker=worker, orchestrator_id=ORCHESTRATOR, orchestrator_boot=boot, now=now
    )


async def complete(
    ledger: Ledger,
    job_id: str,
    attempt: int = 1,
    *,
    result: str = "hi",
    now: float = NOW + 2,
    logprobs: str | None = None,
) -> bool:
    return await ledger.finish(
        job_id,
        attempt,
        status="completed",
        finish_reason="stop",
        result=result,
        usage=Usage(prompt_tokens=5, completion_tokens=7),
        now=now,
        logprobs=logprobs,
    )


def record(store: Store, job_id: str = "job-1") -> JobRecord:
    found = store.job(job_id)
    assert found is not None
    return found


def requests_used(store: Store, tenant_id: str = "tenant-1") -> int:
    sql = "SELECT coalesce(sum(used), 0) AS used FROM quota_counters WHERE tenant_id = :tenant_id AND unit = 'requests'"
    return int(store._database.query(Statement(sql, {"tenant_id": tenant_id}), settled=True)[0]["used"] or 0)


def spent(store: Store, *, key_id: str = "", model: str = "demo", now: float = NOW) -> dict[str, int]:
    """What of each limit of tenant-1 is spent; a limit of a key or a model by `name@key/model`."""
    (limits,) = store.allowances([Allowance("tenant-1", key_id, model, None)], now=now)
    return {
        limit.name + (f"@{limit.key_id}/{limit.model}" if limit.key_id or limit.model else ""): limit.spent
        for limit in limits
    }


def sized(job_id: str, tokens: int, **changes: object) -> Job:
    """A job that reserves so many tokens: two for its prompt, the rest for its answer."""
    return job(job_id, sampling=Sampling(max_tokens=tokens - 2), **changes)


def tenant_query(tenant_id: str, **changes: Value) -> Query:
    """A write that is easy to look at, and to get wrong: a weight of None is refused."""
    params: dict[str, Value] = {"id": tenant_id, "weight": 1.0, "now": NOW, "created_at": NOW, **changes}
    return Query("insert_tenant", params)


class StoreContract:
    """Fixtures to give: `store`, migrated and empty, and `open_store_again`, which opens the same one once more."""

    # --- admission ---------------------------------------------------------------------------------------------------

    @trio_test
    async def test_an_admitted_job_is_running_on_its_reserved_slot(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            admission = await admit(ledger, job(), WORKER)
        assert admission == Admission(accepted=True, reserved=True, duplicate=False)
        (attempt,) = store.attempts("job-1")
        assert (attempt.number, attempt.worker_id, attempt.status) == (1, "worker-1", "running")
        assert attempt.started_at == NOW

    @trio_test
    async def test_every_field_of_a_job_comes_back_as_it_was(self, store: Store) -> None:
        new = job(
            sampling=Sampling(max_tokens=3, temperature=0.5, top_p=0.25, stop=("a", "'"), seed=2**62),
            wait=False,
            stream=True,
            priority=-3,
            deadline_seconds=12.5,
            region="eu",
            session_key="session-1",
            keep="result",
        )
        async with running_ledger(store) as ledger:
            await admit(ledger, new, WORKER)
        assert record(store) == JobRecord(
            id="job-1",
            tenant_id="tenant-1",
            model="demo",
            version="1.0",
            status="running",
            attempt=1,
            input="hello",
            result=None,
            finish_reason=None,
            error=None,
            usage=Usage(),
            sampling=new.sampling,
            wait=False,
            stream=True,
            priority=-3,
            deadline_seconds=12.5,
            region="eu",
            session_key="session-1",
            keep="result",
            orchestrator_id=ORCHESTRATOR,
            worker_id="worker-1",
            created_at=NOW - 1,
            started_at=NOW,
            ended_at=None,
        )

    @trio_test
    async def test_a_job_without_a_worker_is_queued(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            admission = await admit(ledger, job())
        assert admission == Admission(accepted=True, reserved=False, duplicate=False)
        assert (record(store).status, record(store).attempt, record(store).started_at) == ("queued", 0, None)
        assert store.attempts("job-1") == []

    @trio_test
    async def test_a_job_for_a_full_worker_is_queued(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            reserved = [(await admit(ledger, job(f"job-{number}"), WORKER)).reserved for number in range(3)]
        assert reserved == [True, True, False]
        assert record(store, "job-2").status == "queued"

    @trio_test
    async def test_attempts_on_an_earlier_boot_take_no_slot_of_a_restarted_worker(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job("job-1"), WorkerSlot("worker-1", "old", 1))
            assert (await admit(ledger, job("job-2"), WorkerSlot("worker-1", "new", 1))).reserved

    @trio_test
    async def test_a_repeated_admission_is_counted_once_and_told_what_became_of_the_first(self, store: Store) -> None:
        new = job(requests_per_minute=5)
        async with running_ledger(store) as ledger:
            await admit(ledger, new, WORKER)
            again = await admit(ledger, new, WORKER)
            elsewhere = await admit(ledger, new, WorkerSlot("worker-2", "b", 9))
            another_boot = await admit(ledger, new, WORKER, boot="boot-2")
        assert (again.accepted, again.reserved, again.duplicate) == (True, True, True)
        assert again.record == record(store)
        assert again.held
        assert (elsewhere.reserved, elsewhere.duplicate, elsewhere.held) == (False, True, True)
        assert (another_boot.reserved, another_boot.duplicate, another_boot.held) == (False, True, False)
        assert requests_used(store) == 1
        assert len(store.attempts("job-1")) == 1

    @trio_test
    async def test_a_repeated_admission_passes_a_limit_that_is_used_up(self, store: Store) -> None:
        new = job(requests_per_minute=1)
        async with running_ledger(store) as ledger:
            await admit(ledger, new)
            assert (await admit(ledger, new)).duplicate

    @trio_test
    async def test_a_job_id_of_another_tenant_is_a_conflict(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job())
            with pytest.raises(JobConflict):
                await admit(ledger, job(tenant_id="tenant-2"))

    @trio_test
    async def test_over_the_limit_nothing_is_written_and_the_window_s_end_is_told(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            for number in range(2):
                await admit(ledger, job(f"job-{number}", requests_per_minute=2), WORKER)
            with pytest.raises(RateLimited) as caught:
                await admit(ledger, job("job-2", requests_per_minute=2), WORKER)
            assert caught.value.retry_after_seconds == pytest.approx(29.75)
            assert store.job("job-2") is None
            assert (await admit(ledger, job("job-2", requests_per_minute=2), now=NOW + 30)).accepted
            assert (await admit(ledger, job("job-3", tenant_id="tenant-2", requests_per_minute=2))).accepted

    @trio_test
    async def test_a_tenant_s_own_limit_goes_before_the_gateway_s(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", requests_per_minute=1, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, job("job-1", requests_per_minute=100))
            for limit in (100, None):
                with pytest.raises(RateLimited):
                    await admit(ledger, job("job-2", requests_per_minute=limit))
            TenantStore(store).set_tenant("tenant-1", requests_per_minute=0, now=NOW)
            with pytest.raises(RateLimited):
                await admit(ledger, job("job-2"), now=NOW + 60)
            TenantStore(store).set_tenant("tenant-1", requests_per_minute=None, now=NOW)
            assert (await admit(ledger, job("job-2"))).accepted

    @trio_test
    async def test_racing_admissions_pass_a_limit_exactly(self, store: Store, open_store_again: OpenStore) -> None:
        outcomes: list[bool] = []

        async def try_one(ledger: Ledger, job_id: str) -> None:
            try:
                outcomes.append((await admit(ledger, job(job_id, requests_per_minute=17))).accepted)
            except RateLimited:
                outcomes.append(False)

        async with (
            running_ledger(store, max_batch=3) as one,
            running_ledger(open_store_again(), max_batch=4) as two,
            trio.open_nursery() as nursery,
        ):
            for number in range(60):
                nursery.start_soon(try_one, (one, two)[number % 2], f"job-{number}")
        assert (outcomes.count(True), outcomes.count(False)) == (17, 43)
        assert len(store.jobs(limit=100)) == requests_used(store) == 17

    @trio_test
    async def test_racing_orchestrators_never_exceed_a_worker_s_slots(
        self, store: Store, open_store_again: OpenStore
    ) -> None:
        slot = WORKER._replace(slots=3)
        reserved: list[str] = []

        async def try_one(ledger: Ledger, job_id: str) -> None:
            if (await admit(ledger, job(job_id), slot)).reserved:
                reserved.append(job_id)

        async with (
            running_ledger(store, max_batch=2) as one,
            running_ledger(open_store_again(), max_batch=2) as two,
        ):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(try_one, (one, two)[number % 2], f"job-{number}")
            assert len(reserved) == 3
            assert store.counts()["running"] == 3
            await complete(one, reserved[0])
            queued = store.jobs(status="queued")[0]
            assert await reserve(two, queued.id, 1, slot)
            assert not await reserve(one, store.jobs(status="queued")[0].id, 1, slot)

    # --- quotas ------------------------------------------------------------------------------------------------------

    @trio_test
    async def test_tokens_are_reserved_with_the_job_and_settled_with_its_end(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_minute=100, tokens_per_day=1000, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 60), WORKER)
            assert spent(store) == {"tokens_per_minute": 60, "tokens_per_day": 60}
            with pytest.raises(RateLimited, match="100, of which 40 are left; this job may use 41") as caught:
                await admit(ledger, sized("job-2", 41))
            assert caught.value.retry_after_seconds == pytest.approx(29.75)
            assert caught.value.limits is not None
            assert (caught.value.limits.limit_tokens, caught.value.limits.remaining_tokens) == (100, 40)
            await admit(ledger, sized("job-3", 40))
            for _ in range(2):  # twice is once
                assert await complete(ledger, "job-1")
            assert spent(store) == {"tokens_per_minute": 52, "tokens_per_day": 52}, "12 used and 40 reserved"
            await admit(ledger, sized("job-2", 41))

    @trio_test
    async def test_a_job_is_settled_in_the_window_in_which_it_was_admitted(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_minute=100, requests_per_minute=1, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 100), WORKER)
            await admit(ledger, sized("job-2", 100), now=NOW + 60)
            await complete(ledger, "job-1", now=NOW + 61)
            assert spent(store) == {"requests_per_minute": 1, "tokens_per_minute": 12}
            assert spent(store, now=NOW + 61) == {"requests_per_minute": 1, "tokens_per_minute": 100}

    @trio_test
    async def test_a_job_that_was_refused_after_all_gives_everything_back(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_day=100, requests_per_day=1, jobs_at_once=1, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 100), WORKER)
            for _ in range(2):
                await ledger.finish("job-1", 1, status="failed", finish_reason="error", refused=True, now=NOW)
            assert spent(store) == {"requests_per_day": 0, "tokens_per_day": 0, "jobs_at_once": 0}
            await admit(ledger, sized("job-2", 100), WORKER)

    @trio_test
    async def test_the_idempotency_key_of_a_job_that_was_refused_after_all_is_free(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            claim = functools.partial(ledger.claim_key, "tenant-1", "key", fingerprint="f")
            for job_id in ("job-1", "job-2"):
                assert await claim(job_id=job_id, now=NOW) == "job-1", "it is kept while its job is"
            await admit(ledger, job("job-1"), WORKER)
            await ledger.finish("job-1", 1, status="failed", finish_reason="error", refused=True, now=NOW)
            assert await claim(job_id="job-2", now=NOW) == "job-2"
            await admit(ledger, job("job-2"), WORKER)
            await ledger.finish("job-2", 1, status="failed", finish_reason="error", now=NOW)
            assert await claim(job_id="job-3", now=NOW) == "job-2"

    @trio_test
    async def test_a_repeated_admission_reserves_once(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_day=100, requests_per_day=9, now=NOW)
        async with running_ledger(store) as ledger:
            for _ in range(3):
                await admit(ledger, sized("job-1", 60), WORKER)
        assert spent(store) == {"requests_per_day": 1, "tokens_per_day": 60}

    @trio_test
    async def test_limits_hold_for_a_key_a_model_and_a_key_on_a_model(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", key_id="key-1", requests_per_day=3, now=NOW)
        TenantStore(store).set_tenant("tenant-1", model="demo", requests_per_day=2, now=NOW)
        TenantStore(store).set_tenant("tenant-1", key_id="key-1", model="phi-2", requests_per_day=1, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, job("job-1", key_id="key-1"))
            await admit(ledger, job("job-2", key_id="key-2"))
            with pytest.raises(InsufficientQuota, match="tenant's requests per day on demo is 2"):
                await admit(ledger, job("job-3", key_id="key-2"))
            await admit(ledger, job("job-3", key_id="key-1", model="phi-2"))
            with pytest.raises(InsufficientQuota, match="this key's requests per day on phi-2 is 1"):
                await admit(ledger, job("job-4", key_id="key-1", model="phi-2"))
            await admit(ledger, job("job-4", key_id="key-1", model="qwen"))
            with pytest.raises(InsufficientQuota, match="this key's requests per day is 3"):
                await admit(ledger, job("job-5", key_id="key-1", model="qwen"))
            await admit(ledger, job("job-5", key_id="key-2", model="qwen"))
            await admit(ledger, job("job-6", tenant_id="tenant-2", key_id="key-3"))
        assert spent(store, key_id="key-1") == {"requests_per_day@/demo": 2, "requests_per_day@key-1/": 3}

    @trio_test
    async def test_jobs_at_once_are_those_that_are_live(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", jobs_at_once=2, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, job("job-1"), WORKER)
            await admit(ledger, job("job-2"))
            with pytest.raises(RateLimited, match="so many are live"):
                await admit(ledger, job("job-3"))
            await complete(ledger, "job-1")
            await admit(ledger, job("job-3"))
            assert await ledger.adopt(orchestrator_id=ORCHESTRATOR, orchestrator_boot="boot-2", now=NOW) == 2
            with pytest.raises(RateLimited):
                await admit(ledger, job("job-4"))

    @trio_test
    async def test_a_job_that_no_wait_would_let_through_is_told_so(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", job_tokens=50, tokens_per_minute=80, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 50))
            with pytest.raises(JobTooLarge, match=r"51 tokens .* job tokens is 50") as caught:
                await admit(ledger, sized("job-2", 51))
            assert caught.value.param == "max_tokens"
            TenantStore(store).set_tenant("tenant-1", job_tokens=None, now=NOW)
            with pytest.raises(JobTooLarge, match="tokens per minute is 80"):
                await admit(ledger, sized("job-2", 81))
            with pytest.raises(RateLimited):
                await admit(ledger, sized("job-2", 51))

    @trio_test
    async def test_a_limit_that_comes_or_goes_while_a_job_runs_stays_exact(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_day=100, now=NOW)
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 60), WORKER)
            TenantStore(store).set_tenant("tenant-1", tokens_per_day=None, tokens_per_minute=100, now=NOW)
            await admit(ledger, sized("job-2", 70), WORKER)
            await complete(ledger, "job-1")
            assert spent(store) == {"tokens_per_minute": 70}
            TenantStore(store).set_tenant("tenant-1", tokens_per_day=100, tokens_per_minute=None, now=NOW)
            await complete(ledger, "job-2")
            assert spent(store) == {"tokens_per_day": 12}
            TenantStore(store).set_tenant("tenant-1", tokens_per_minute=100, now=NOW)
            assert spent(store) == {"tokens_per_minute": 12, "tokens_per_day": 12}

    @trio_test
    async def test_racing_orchestrators_pass_a_quota_of_tokens_exactly(
        self, store: Store, open_store_again: OpenStore
    ) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_day=17 * 12 + 5, now=NOW)
        outcomes: list[bool] = []

        async def try_one(ledger: Ledger, job_id: str) -> None:
            try:
                await admit(ledger, sized(job_id, 12), WORKER._replace(slots=99))
            except RateLimited:
                outcomes.append(False)
            else:
                outcomes.append(await complete(ledger, job_id))

        async with (
            running_ledger(store, max_batch=3) as one,
            running_ledger(open_store_again(), max_batch=4) as two,
            trio.open_nursery() as nursery,
        ):
            for number in range(60):
                nursery.start_soon(try_one, (one, two)[number % 2], f"job-{number}")
        assert (outcomes.count(True), outcomes.count(False)) == (17, 43)
        assert spent(store) == {"tokens_per_day": 17 * 12}

    @trio_test
    async def test_an_admission_says_what_it_left_of_each_limit_that_holds(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_minute=100, requests_per_day=9, jobs_at_once=3, now=NOW)
        TenantStore(store).set_tenant("tenant-1", key_id="key-1", tokens_per_minute=50, now=NOW)
        async with running_ledger(store) as ledger:

            async def left(new: Job) -> tuple[int, int]:
                limits = (await admit(ledger, new)).limits
                assert limits is not None
                assert limits == await ledger.rate_limits(new, now=NOW)
                return limits.remaining_requests, limits.remaining_tokens

            assert await left(sized("job-1", 30)) == (8, 70)
            assert await left(sized("job-2", 20, key_id="key-1")) == (7, 30)
            again = await admit(ledger, sized("job-2", 20, key_id="key-1"))
            assert again.duplicate
            assert again.limits is not None
            assert (again.limits.remaining_requests, again.limits.remaining_tokens) == (7, 30)
            assert await left(job("job-3", tenant_id="tenant-2", requests_per_minute=5)) == (4, 0)
            assert (await admit(ledger, job("job-4", tenant_id="tenant-3"))).limits is None

    @trio_test
    async def test_what_is_left_is_told_to_many_at_once(self, store: Store) -> None:
        TenantStore(store).set_tenant("tenant-1", tokens_per_minute=100, now=NOW)
        found: dict[str, int | None] = {}
        async with running_ledger(store) as ledger:
            await admit(ledger, sized("job-1", 60))

            async def ask(new: Job) -> None:
                left = await ledger.rate_limits(new, now=NOW)
                found[new.tenant_id] = None if left is None else left.remaining_tokens or left.remaining_requests

            async with trio.open_nursery() as nursery:
                for number in range(9):
                    limit = number if number > 2 else None
                    nursery.start_soon(ask, job(tenant_id=f"tenant-{number}", requests_per_minute=limit))
        assert found == {"tenant-0": None, "tenant-1": 40, "tenant-2": None} | {f"tenant-{n}": n for n in range(3, 9)}

    # --- tenants and keys --------------------------------------------------------------------------------------------

    def test_a_tenant_has_its_weight_and_its_limits_until_it_is_removed(self, store: Store) -> None:
        TenantStore(store).create_tenant(
            "acme", weight=2.5, limits={"tokens_per_day": 9, "jobs_at_once": None}, now=NOW
        )
        with pytest.raises(SetupError, match="already"):
            TenantStore(store).create_tenant("acme", limits={"tokens_per_day": 1}, now=NOW + 1)
        TenantStore(store).set_tenant("acme", model="demo", job_tokens=7, now=NOW + 1)
        (tenant,) = TenantStore(store).tenants()
        assert tenant == TenantStore(store).tenant("acme")
        assert (tenant.weight, tenant.created_at) == (2.5, NOW)
        assert tenant.limits == (Limit("", "", "tokens", DAY, 9), Limit("", "demo", "job_tokens", 0, 7))
        assert (tenant.most("tokens_per_day"), tenant.most("job_tokens")) == (9, None)
        assert TenantStore(store).weights() == {"acme": 2.5}
        key, found = TenantStore(store).create_key("acme", now=NOW)
        assert TenantStore(store).remove_tenant("acme", now=NOW + 2)
        assert not TenantStore(store).remove_tenant("acme", now=NOW + 2)
        assert (TenantStore(store).tenants(), TenantStore(store).caller(keys.digest(key), now=NOW + 2)) == ([], None)
        assert TenantStore(store).has_keys(), "to take the last key back does not open the door"
        assert [each.id for each in TenantStore(store).keys("acme")] == [found.id]

    def test_a_key_opens_the_door_until_it_is_revoked_or_expires(
        self, store: Store, open_store_again: OpenStore
    ) -> None:
        assert not TenantStore(store).has_keys()
        assert TenantStore(store).caller(keys.digest(keys.new_key()), now=NOW) is None
        key, record_of_key = TenantStore(store).create_key(
            "acme", scopes=frozenset({"read-only", "models"}), name="ci", now=NOW
        )
        brief, record_of_brief = TenantStore(store).create_key("acme", expires_at=NOW + 10, now=NOW)
        other = open_store_again()
        assert TenantStore(other).has_keys()
        assert TenantStore(other).caller(keys.digest(key), now=NOW) == Caller(
            record_of_key.id, "acme", frozenset({"read-only", "models"})
        )
        assert TenantStore(other).caller(keys.digest(brief), now=NOW + 4) == Caller(
            record_of_brief.id, "acme", frozenset({"models"}), 6.0
        )
        assert TenantStore(other).caller(keys.digest(brief), now=NOW + 10) is None
        assert TenantStore(other).caller(keys.digest(keys.new_key()), now=NOW) is None
        assert TenantStore(store).revoke_key(record_of_key.id, now=NOW + 1)
        assert not TenantStore(store).revoke_key(record_of_key.id, now=NOW + 2)
        assert not TenantStore(store).revoke_key("no such key", now=NOW)
        assert TenantStore(other).caller(keys.digest(key), now=NOW) is None
        found = TenantStore(store).key(record_of_key.id)
        assert found is not None
        assert (found.revoked_at, found.prefix, found.name) == (NOW + 1, key[:9], "ci")
        texts = [str(value) for row in store.read("keys", tenant_id=None) for value in row.values()]
        assert not any(key[9:] in text or brief[9:] in text for text in texts), "no key is stored"

    def test_a_rotated_key_has_a_successor_with_its_limits(self, store: Store) -> None:
        key, old = TenantStore(store).create_key("acme", scopes=frozenset({"admin"}), name="ops", now=NOW)
        TenantStore(store).set_tenant("acme", key_id=old.id, tokens_per_day=5, now=NOW)
        with pytest.raises(SetupError, match="no key"):
            TenantStore(store).rotate_key("no such key", now=NOW)
        second_key, second = TenantStore(store).rotate_key(old.id, grace_seconds=60, now=NOW + 1)
        assert (second.tenant_id, second.scopes, second.name) == ("acme", ("admin",), "ops")
        tenant = TenantStore(store).tenant("acme")
        assert tenant is not None
        assert tenant.most("tokens_per_day", key_id=second.id) == 5
        assert TenantStore(store).caller(keys.digest(key), now=NOW + 60) is not None
        assert TenantStore(store).caller(keys.digest(key), now=NOW + 61) is None
        TenantStore(store).rotate_key(second.id, now=NOW + 2)
        assert TenantStore(store).caller(keys.digest(second_key), now=NOW + 2) is None
        with pytest.raises(SetupError, match="was rotated before"):
            TenantStore(store).rotate_key(second.id, now=NOW + 3)

    def test_a_rotated_key_s_successor_has_a_whole_life_of_its_own(self, store: Store) -> None:
        tenants = TenantStore(store)
        _, old = tenants.create_key("acme", expires_at=NOW + 3600, now=NOW)
        key, second = tenants.rotate_key(old.id, grace_seconds=60, now=NOW + 3000)
        assert second.expires_at == NOW + 3000 + 3600
        with pytest.raises(SetupError, match=f"{second.id} is in its place"):
            tenants.rotate_key(old.id, now=NOW + 3030)
        found = tenants.key(old.id)
        assert found is not None
        assert (found.replaced_by, found.expires_at) == (second.id, NOW + 3060)
        _, third = tenants.rotate_key(second.id, lifetime_seconds=10, now=NOW + 4000)
        assert third.expires_at == NOW + 4010
        assert tenants.caller(keys.digest(key), now=NOW + 4000) is None
        with pytest.raises(SetupError, match="has expired"):
            tenants.rotate_key(third.id, now=NOW + 4010)
        tenants.revoke_key(third.id, now=NOW + 4010)
        with pytest.raises(SetupError, match="was revoked"):
            tenants.rotate_key(third.id, now=NOW + 4011)

    def test_each_act_of_an_operator_has_a_line_and_what_changed_nothing_has_none(self, store: Store) -> None:
        store.who = "ann@here"
        TenantStore(store).create_tenant("acme", weight=2, limits={"tokens_per_day": 9}, now=NOW)
        with pytest.raises(SetupError):
            TenantStore(store).create_tenant("acme", now=NOW + 1)
        TenantStore(store).set_tenant("acme", now=NOW + 2)
        TenantStore(store).set_tenant("acme", model="demo", jobs_at_once=None, now=NOW + 3)
        key, one = TenantStore(store).create_key("acme", name="ci", now=NOW + 4)
        second_key, two = TenantStore(store).rotate_key(one.id, grace_seconds=60, now=NOW + 5)
        _, three = TenantStore(store).rotate_key(two.id, now=NOW + 6)
        with pytest.raises(SetupError):
            TenantStore(store).rotate_key(two.id, now=NOW + 7)
        _, four = TenantStore(store).create_key("acme", scopes=frozenset({"admin"}), expires_at=NOW + 99, now=NOW + 8)
        for at in (NOW + 9, NOW + 10):
            TenantStore(store).revoke_key(four.id, now=at)
            TenantStore(store).revoke_key("no such key", now=at)
        for at in (NOW + 11, NOW + 12):
            TenantStore(store).remove_tenant("acme", now=at)
        TenantStore(store).set_tenant("late", now=NOW + 13)
        models, acme = ["models"], "acme"
        events = store.audit_events()
        assert [(e.at - NOW, e.action, e.subject, e.details) for e in reversed(events)] == [
            (0, "tenant.created", acme, {"weight": 2, "limits": {"tokens_per_day": 9}}),
            (3, "tenant.changed", acme, {"model": "demo", "limits": {"jobs_at_once": None}}),
            (4, "key.created", one.id, {"tenant": acme, "name": "ci", "scopes": models}),
            (
                5,
                "key.rotated",
                one.id,
                {"tenant": acme, "name": "ci", "scopes": models, "new_key": two.id, "grace_seconds": 60},
            ),
            (6, "key.rotated", two.id, {"tenant": acme, "name": "ci", "scopes": models, "new_key": three.id}),
            (8, "key.created", four.id, {"tenant": acme, "scopes": ["admin"], "expires_at": NOW + 99}),
            (9, "key.revoked", four.id, {}),
            (11, "tenant.removed", acme, {}),
            (11, "key.revoked", one.id, {"tenant": acme}),
            (11, "key.revoked", three.id, {"tenant": acme}),
            (13, "tenant.created", "late", {}),
        ]
        assert {event.who for event in events} == {"ann@here"}
        assert store.audit_events(limit=1) == events[:1]
        assert store.audit_events(since=NOW + 11) == events[:4]
        texts = [str(value) for row in store.read("audit_events", since=0, limit=99) for value in row.values()]
        assert not any(secret[3:] in text for text in texts for secret in (key, second_key)), "no secret is told"

    def test_an_act_that_is_sent_again_has_one_line_and_one_that_is_refused_has_none(self, store: Store) -> None:
        told = store.told("tenant.changed", "acme", NOW)
        for _ in range(2):
            store.write((told, tenant_query("acme")))
        (refused,) = store.write_batch([(store.told("tenant.created", "b", NOW), tenant_query("b", weight=None))])
        assert isinstance(refused, InternalError)
        assert [event.subject for event in store.audit_events()] == ["acme"]

    def test_an_act_beside_the_store_can_have_a_line_too(self, store: Store) -> None:
        store.record_event("invite.created", "12D3KooW", now=NOW, roles=["worker"])
        (event,) = store.audit_events()
        assert (event.action, event.subject, event.details) == ("invite.created", "12D3KooW", {"roles": ["worker"]})
        assert event.who == store.who
        assert "@" in event.who

    @trio_test
    async def test_what_is_done_to_another_tenants_things_is_told_once_and_only_where_it_is_done(
        self, store: Store
    ) -> None:
        def told(action: audit.Action, subject: str, at: float, by: Actor | None = ADMIN) -> Write:
            return audit.told_of(by, action, subject, owner="tenant", now=NOW + at)

        assert told("job.cancelled", "job-1", 0, None) == told("job.cancelled", "job-1", 0, Actor("k", "tenant")) == ()
        async with running_ledger(store) as ledger:
            batches = BatchLedger(ledger)
            file = FileRecord("file-1", "tenant", "a.jsonl", "batch", 0, 0, NOW)
            await batches.save_file(file, most_bytes=99)
            batch = BatchRecord("batch_1", "tenant", "", "/v1/completions", file.id, NOW, NOW + 99)
            await batches.create(batch)
            for at in (1, 2):
                cancelled = await batches.cancel("batch_1", now=NOW + at, told=told("batch.cancelled", "batch_1", at))
                assert cancelled == (at == 1)
                deleted = await batches.delete_file(file.id, "tenant", told=told("file.deleted", file.id, at))
                assert deleted == (at == 1)
            await admit(ledger, job("job-1"))
            await ledger.forget("job-1", told=told("job.forgotten", "job-1", 3))
            for at in (4, 5):
                await ledger.write(told("job.cancelled", "job-1", at))
            assert await complete(ledger, "job-1", 0)
            await ledger.write(told("job.cancelled", "job-1", 6))
            for at in (7, 8):
                await ledger.forget("job-1", told=told("job.forgotten", "job-1", at))
        assert [(e.at - NOW, e.action, e.subject, e.who, e.details) for e in reversed(store.audit_events())] == [
            (1, "batch.cancelled", "batch_1", "key-1", {"tenant": "tenant"}),
            (1, "file.deleted", "file-1", "key-1", {"tenant": "tenant"}),
            (4, "job.cancelled", "job-1", "key-1", {"tenant": "tenant"}),
            (7, "job.forgotten", "job-1", "key-1", {"tenant": "tenant"}),
        ]

    @trio_test
    async def test_a_batch_that_an_operator_ends_is_told_once(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            batches = BatchLedger(ledger)
            await batches.save_file(FileRecord("file-1", "tenant", "a.jsonl", "batch", 0, 0, NOW), most_bytes=99)
            await batches.create(BatchRecord("batch_1", "tenant", "", "/v1/completions", "file-1", NOW, NOW + 99))
            for at in (1, 2):
                assert BatchStore(store).cancel("batch_1", tenant_id="tenant", now=NOW + at) == (at == 1)
        (event,) = store.audit_events()
        assert (event.at, event.action, event.who) == (NOW + 1, "batch.cancelled", store.who)
        assert (event.subject, event.details) == ("batch_1", {"tenant": "tenant"})

    @trio_test
    async def test_a_worker_is_told_as_drained_and_resumed_once_each(self, store: Store) -> None:
        worker = WorkerState("worker-1", BOOT, 1, NOW, "one", "eu", "cpu", (ModelInfo("demo", "1.0"),))
        store.drain_worker("worker-1", now=NOW)
        async with running_ledger(store) as ledger:
            await ledger.save_workers([worker], orchestrator_id=ORCHESTRATOR, now=NOW)
        store.resume_worker("worker-1", now=NOW + 1)
        for at in (NOW + 2, NOW + 3):
            store.drain_worker("worker-1", now=at)
        for at in (NOW + 4, NOW + 5):
            store.resume_worker("worker-1", now=at)
        told = [(event.at - NOW, event.action, event.subject) for event in store.audit_events()]
        assert told == [(4, "worker.resumed", "worker-1"), (2, "worker.drained", "worker-1")]

    @trio_test
    async def test_when_keys_were_used_is_remembered_in_one_write(self, store: Store) -> None:
        _, one = TenantStore(store).create_key("acme", now=NOW)
        _, two = TenantStore(store).create_key("acme", now=NOW + 1)
        async with running_ledger(store) as ledger:
            await ledger.save_keys_used({})
            await ledger.save_keys_used({one.id: NOW + 5, two.id: NOW + 6, "no such key": NOW})
            await ledger.save_keys_used({one.id: NOW + 4})
        assert [key.last_used_at for key in TenantStore(store).keys(None)] == [NOW + 5, NOW + 6]

    # --- attempts ----------------------------------------------------------------------------------------------------

    @trio_test
    async def test_a_reservation_begins_the_attempt_and_can_be_repeated(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job())
            assert await reserve(ledger, "job-1", 1, now=NOW + 1)
            assert await reserve(ledger, "job-1", 1, now=NOW + 1)
            assert not await reserve(ledger, "job-1", 1, WorkerSlot("worker-2", "b", 1))
        found = record(store)
        assert (found.status, found.attempt, found.worker_id, found.started_at) == ("running", 1, "worker-1", NOW + 1)
        assert len(store.attempts("job-1")) == 1

    @trio_test
    async def test_a_reservation_needs_the_holder_the_next_number_and_a_live_job(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job())
            assert not await reserve(ledger, "job-1", 1, boot="another life")
            assert not await reserve(ledger, "job-1", 2)
            assert not await reserve(ledger, "no such job", 1)
            assert await complete(ledger, "job-1", 0)
            assert not await reserve(ledger, "job-1", 1)
        assert store.attempts("job-1") == []

    @trio_test
    async def test_the_next_attempt_waits_for_the_last_one_to_be_closed(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), WORKER)
            assert not await reserve(ledger, "job-1", 2, WorkerSlot("worker-2", "b", 1))
            assert await ledger.end_attempt("job-1", 1, status="lost", error_code="link_closed", now=NOW + 1)
            assert not await ledger.end_attempt("job-1", 1, status="failed", now=NOW + 2)
            assert await reserve(ledger, "job-1", 2, WorkerSlot("worker-2", "b", 1))
        first, second = store.attempts("job-1")
        assert (first.status, first.error_code, first.ended_at) == ("lost", "link_closed", NOW + 1)
        assert (second.status, second.worker_id) == ("running", "worker-2")
        assert record(store).worker_id == "worker-2"

    @trio_test
    async def test_a_requeued_job_frees_its_slot_and_can_be_requeued_again(self, store: Store) -> None:
        slot = WORKER._replace(slots=1)
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), slot)
            for _ in range(2):
                assert await ledger.requeue("job-1", 1, status="busy", completion_tokens=4, now=NOW + 1)
            assert record(store).status == "queued"
            assert (await admit(ledger, job("job-2"), slot)).reserved
            assert not await ledger.requeue("job-2", 7, status="lost", now=NOW)
            await complete(ledger, "job-2")
            assert not await ledger.requeue("job-2", 1, status="lost", now=NOW)
        (attempt,) = store.attempts("job-1")
        assert (attempt.status, attempt.completion_tokens) == ("busy", 4)

    # --- ends --------------------------------------------------------------------------------------------------------

    @trio_test
    async def test_the_end_is_written_with_its_attempt_and_frees_the_slot(self, store: Store) -> None:
        slot = WORKER._replace(slots=1)
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), slot)
            assert await complete(ledger, "job-1")
            assert (await admit(ledger, job("job-2"), slot)).reserved
        found = record(store)
        assert (found.status, found.finish_reason, found.result, found.ended_at) == ("completed", "stop", "hi", NOW + 2)
        assert found.usage == Usage(5, 7)
        (attempt,) = store.attempts("job-1")
        assert (attempt.status, attempt.completion_tokens, attempt.ended_at) == ("completed", 7, NOW + 2)

    @trio_test
    async def test_a_job_has_one_end_and_the_same_end_can_be_repeated(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), WORKER)
            assert await complete(ledger, "job-1")
            before = record(store)
            assert await complete(ledger, "job-1")
            assert not await complete(ledger, "job-1", now=NOW + 3)
            assert not await ledger.finish("job-1", 1, status="cancelled", finish_reason="cancelled", now=NOW + 2)
            assert not await complete(ledger, "no such job")
        assert record(store) == before

    @trio_test
    async def test_an_end_from_an_older_attempt_is_fenced_off(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), WORKER)
            await ledger.requeue("job-1", 1, status="lost", now=NOW)
            await reserve(ledger, "job-1", 2)
            assert not await complete(ledger, "job-1", 1)
            assert record(store).status == "running"
            assert await complete(ledger, "job-1", 2)

    @trio_test
    async def test_a_failed_job_says_why(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), WORKER)
            error = ErrorInfo("worker_failed", "it's gone")
            await ledger.finish(
                "job-1",
                1,
                status="failed",
                finish_reason="error",
                error=error,
                usage=Usage(5, 9),
                attempt_tokens=2,
                now=NOW,
            )
        assert (record(store).error, record(store).usage) == (error, Usage(5, 9))
        (attempt,) = store.attempts("job-1")
        assert (attempt.status, attempt.error_code, attempt.completion_tokens) == ("failed", "worker_failed", 2)

    @pytest.mark.parametrize(
        ("keep", "kept"), [("all", ("hello", "hi")), ("result", (None, "hi")), ("nothing", (None, None))]
    )
    @trio_test
    async def test_the_end_keeps_of_the_texts_what_the_job_allows(
        self, store: Store, keep: str, kept: tuple[str | None, str | None]
    ) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(keep=keep), WORKER)
            await complete(ledger, "job-1")
        assert (record(store).input, record(store).result) == kept

    @pytest.mark.parametrize(("keep", "is_kept"), [("all", True), ("result", True), ("nothing", False)])
    @trio_test
    async def test_log_probabilities_are_kept_as_long_as_the_answer(
        self, store: Store, keep: str, *, is_kept: bool
    ) -> None:
        logprobs = ((TokenLogprobs(-0.5, ((3, -0.5),), ("é", "é")),),)
        async with running_ledger(store) as ledger:
            await admit(ledger, job(keep=keep), WORKER)
            await complete(ledger, "job-1", logprobs=msgspec.json.encode(logprobs).decode())
        assert record(store).logprobs == (logprobs if is_kept else ())
        store.purge(now=NOW + 99, texts_before=NOW + 50, rows_before=0.0)
        assert record(store).logprobs == ()

    @trio_test
    async def test_the_outline_of_a_conversation_is_kept_as_long_as_its_answer(self, store: Store) -> None:
        chat = Chat((ChatMessage("user", "a secret"),), (Tool("f", "another"),))
        new = partial(job, form="chat", input=msgspec.json.encode(chat).decode())
        async with running_ledger(store) as ledger:
            for job_id, keep in (("job-1", "result"), ("job-2", "result"), ("job-3", "nothing"), ("job-4", "all")):
                await admit(ledger, new(job_id, keep=keep), WORKER)
                await complete(ledger, job_id, attempt=record(store, job_id).attempt)
            outline = record(store).outline
            assert outline is not None
            assert [tool.name for tool in msgspec.json.decode(outline, type=Chat).tools] == ["f"]
            assert (record(store).input, record(store, "job-3").outline, record(store, "job-4").outline) == (None,) * 3
            assert record(store, "job-2").outline == outline
            await ledger.forget("job-2")
            assert record(store, "job-2").outline is None
        store.purge(now=NOW + 99, texts_before=NOW + 50, rows_before=0.0)
        assert record(store).outline is None

    @pytest.mark.parametrize("text", AWKWARD_TEXTS, ids=range(len(AWKWARD_TEXTS)))
    @trio_test
    async def test_any_text_comes_back_as_it_was(self, store: Store, text: str) -> None:
        new = job(input=text, tenant_id=text[:50], model=text[:50], session_key=text, region=text[:50])
        async with running_ledger(store) as ledger:
            await admit(ledger, new, WORKER)
            await complete(ledger, "job-1", result=text)
        found = record(store)
        assert (found.input, found.result, found.session_key) == (text, text, text)
        assert [listed.id for listed in store.jobs(tenant_id=text[:50], model=text[:50])] == ["job-1"]

    # --- recovery ----------------------------------------------------------------------------------------------------

    @trio_test
    async def test_a_restarted_orchestrator_adopts_its_live_jobs(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job("job-1"), WORKER)
            await admit(ledger, job("job-2"))
            await admit(ledger, job("job-3"), WORKER)
            await complete(ledger, "job-3")
            await admit(ledger, job("job-4"), WORKER, orchestrator_id="orchestrator-2")
            for expected in (2, 0):
                adopted = await ledger.adopt(orchestrator_id=ORCHESTRATOR, orchestrator_boot="boot-2", now=NOW + 5)
                assert adopted == expected
            live = store.live_jobs(ORCHESTRATOR)
            assert [(found.id, found.status, found.attempt, found.input) for found in live] == [
                ("job-1", "queued", 1, "hello"),
                ("job-2", "queued", 0, "hello"),
            ]
            (lost,) = store.attempts("job-1")
            assert (lost.status, lost.error_code) == ("lost", "orchestrator_lost")
            assert Attempts.of([lost]).num_failures == 0, "that an orchestrator is lost is no fault of the job's"
            assert not await reserve(ledger, "job-1", 2)
            assert await reserve(ledger, "job-1", 2, boot="boot-2")
        assert record(store, "job-4").status == "running"

    @trio_test
    async def test_of_several_that_take_a_job_over_one_gets_it_and_its_holder_is_fenced_off(
        self, store: Store, open_store_again: OpenStore
    ) -> None:
        slot = WORKER._replace(slots=1, fingerprint="weights")
        taken: list[str] = []

        async def take(ledger: Ledger, boot: str) -> None:
            params = {"holder": (ORCHESTRATOR, BOOT), "orchestrator_id": "other", "orchestrator_boot": boot}
            if await ledger.take_over("job-1", **params, now=NOW + 1):  # type: ignore[arg-type]
                taken.append(boot)

        async with running_ledger(store) as one, running_ledger(open_store_again()) as two:
            await admit(one, job(), slot)
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(take, (one, two)[number % 2], f"boot-{number}")
            (winner,) = taken
            await take(two, winner)
            assert taken == [winner, winner], "a repetition finds that it was done"
            (attempt,) = store.attempts("job-1")
            assert (attempt.status, attempt.error_code, attempt.fingerprint) == ("lost", "orchestrator_lost", "weights")
            assert (record(store).status, record(store).attempt) == ("queued", 1)
            late = {"holder": (ORCHESTRATOR, BOOT), "now": NOW + 2}
            assert not await one.requeue("job-1", 1, status="lost", **late)  # type: ignore[arg-type]
            assert not await one.release("job-1", 1, **late)  # type: ignore[arg-type]
            assert not await one.finish("job-1", 1, status="completed", finish_reason="stop", **late)  # type: ignore[arg-type]
            assert not await reserve(one, "job-1", 2, slot)
            assert await two.reserve(
                "job-1", 2, worker=slot, orchestrator_id="other", orchestrator_boot=winner, exact=False, now=NOW + 3
            )
            await take(two, "too late")
            assert taken == [winner, winner]
        assert (record(store).status, record(store).exact) == ("running", False)
        assert store.jobs()[0].exact is False

    @trio_test
    async def test_a_job_that_is_given_away_frees_its_slot_and_is_anybody_s(self, store: Store) -> None:
        slot = WORKER._replace(slots=1)
        me, other = (ORCHESTRATOR, BOOT), ("other", "boot")
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), slot)
            for expected in (True, False):
                assert await ledger.release("job-1", 1, holder=me, completion_tokens=4, now=NOW) is expected
            assert store.holders() == {(ORCHESTRATOR, "")}
            (attempt,) = store.attempts("job-1")
            assert (attempt.status, attempt.error_code, attempt.completion_tokens) == ("lost", "handed_over", 4)
            assert (await admit(ledger, job("job-2"), slot)).reserved
            again = await admit(ledger, job())
            assert (again.held, again.holder) == (False, (ORCHESTRATOR, ""))
            params = {"orchestrator_id": other[0], "orchestrator_boot": other[1], "now": NOW}
            assert not await ledger.take_over("job-1", holder=me, **params)  # type: ignore[arg-type]
            assert await ledger.take_over("job-1", holder=(ORCHESTRATOR, ""), **params)  # type: ignore[arg-type]
            await complete(ledger, "job-2")
            assert not await ledger.take_over("job-2", holder=me, **params)  # type: ignore[arg-type]

    @trio_test
    async def test_a_drained_worker_stays_so_through_its_restarts_until_it_is_resumed(self, store: Store) -> None:
        def state(boot_id: str, paused: str = "") -> WorkerState:
            return WorkerState(
                "worker-1", boot_id, 1, NOW, "one", "eu", "cpu", (ModelInfo("demo", "1.0"),), paused=paused
            )

        async with running_ledger(store) as ledger:
            assert not store.drain_worker("worker-1", now=NOW)
            await ledger.save_workers([state("a")], orchestrator_id=ORCHESTRATOR, now=NOW)
            for at in (NOW, NOW + 1):
                assert store.drain_worker("worker-1", now=at)
            await ledger.save_workers([state("b", "on battery")], orchestrator_id=ORCHESTRATOR, now=NOW + 1)
        (worker,) = store.workers()
        assert (worker.drained_at, worker.paused, worker.status) == (NOW, "on battery", "draining")
        assert store.drained_workers() == {"worker-1": NOW}
        assert store.resume_worker("worker-1", now=NOW + 2)
        assert store.drained_workers() == {}
        assert [(worker.paused, worker.status) for worker in store.workers()] == [("on battery", "paused")]

    # --- listings ----------------------------------------------------------------------------------------------------

    @trio_test
    async def test_jobs_are_listed_newest_first_in_pages_and_by_what_is_asked(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            for number in range(6):
                model = ("demo", "phi-2")[number % 2]
                await admit(ledger, job(f"job-{number}", tenant_id=f"tenant-{number % 3}", model=model))
            await complete(ledger, "job-3", 0)

        def ids(**filters: object) -> list[str]:
            return [found.id for found in store.jobs(**filters)]  # type: ignore[arg-type]

        assert ids() == ["job-5", "job-4", "job-3", "job-2", "job-1", "job-0"]
        assert ids(limit=2) == ["job-5", "job-4"]
        assert ids(limit=2, before="job-4") == ["job-3", "job-2"]
        assert ids(tenant_id="tenant-0") == ["job-3", "job-0"]
        assert ids(tenant_id="tenant-0", status="queued") == ["job-0"]
        assert ids(tenant_id="tenant-0", model="phi-2", before="job-9") == ["job-3"]
        assert ids(model="phi-2") == ["job-5", "job-3", "job-1"]
        assert ids(model="phi-2", status="queued", before="job-5") == ["job-1"]
        assert ids(status="completed") == ["job-3"]
        assert ids(tenant_id="nobody") == []
        listed = store.jobs(status="completed")[0]
        assert (listed.input, listed.result, listed.usage) == (None, None, Usage(5, 7))
        assert store.counts() == {
            "queued": 5,
            "running": 0,
            "completed": 1,
            "failed": 0,
            "cancelled": 0,
            "expired": 0,
        }

    @trio_test
    async def test_another_tenant_s_job_is_not_there(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job())
        assert store.job("job-1", "tenant-1") is not None
        assert store.job("job-1", "tenant-2") is None
        assert store.job("no such job") is None

    # --- who takes part ----------------------------------------------------------------------------------------------

    @trio_test
    async def test_workers_are_remembered_by_their_newest_state(self, store: Store) -> None:
        demo = ModelInfo("demo", "1.0", slots=2, toy=True, tokens_per_second=1.5)
        first = WorkerState("worker-1", BOOT, 5, NOW, "it's mine", "eu", "cpu", (demo,), running=1)
        other = msgspec.structs.replace(first, worker_id="worker-2", name="b", draining=True)
        async with running_ledger(store) as ledger:
            await ledger.save_workers([], orchestrator_id=ORCHESTRATOR, now=NOW)
            await ledger.save_workers([first, other], orchestrator_id=ORCHESTRATOR, now=NOW)
            older = msgspec.structs.replace(first, sequence=4, running=9)
            newer = msgspec.structs.replace(first, sequence=6, running=2, loading=True)
            await ledger.save_workers([newer], orchestrator_id=ORCHESTRATOR, now=NOW + 1)
            await ledger.save_workers([older], orchestrator_id=ORCHESTRATOR, now=NOW + 2)
            two, one = store.workers()
            assert (one.id, one.name, one.status, one.running) == ("worker-1", "it's mine", "loading", 2)
            assert (one.joined_at, one.seen_at, one.models) == (NOW, NOW + 1, (demo,))
            assert (two.id, two.status) == ("worker-2", "draining")

            await ledger.worker_gone("worker-1", "another boot", orchestrator_id=ORCHESTRATOR, now=NOW + 3)
            await ledger.worker_gone("worker-1", BOOT, orchestrator_id="another", now=NOW + 3)
            assert [found.status for found in store.workers()] == ["draining", "loading"]
            await ledger.worker_gone("worker-2", BOOT, orchestrator_id=ORCHESTRATOR, now=NOW + 3)
            assert [(found.id, found.status) for found in store.workers()] == [
                ("worker-1", "loading"),
                ("worker-2", "gone"),
            ]
            reborn = msgspec.structs.replace(other, boot_id="new", sequence=1, draining=False)
            await ledger.save_workers([reborn], orchestrator_id=ORCHESTRATOR, now=NOW + 4)
        two, one = store.workers()
        assert (two.status, two.joined_at) == ("ready", NOW + 4)

    @trio_test
    async def test_nodes_and_leases_are_remembered_by_boot(self, store: Store) -> None:
        node = NodeRecord(ORCHESTRATOR, "orchestrator", "a", "eu", ("/ip4/127.0.0.1/tcp/1",), "0.1.0", NOW, NOW)
        gateway = msgspec.structs.replace(node, role="gateway")
        async with running_ledger(store) as ledger:
            await ledger.save_node(node, boot_id=BOOT)
            await ledger.save_node(gateway, boot_id=BOOT)
            assert store.nodes() == [gateway, node]
            for _ in range(3):
                assert await ledger.renew_lease(ORCHESTRATOR, BOOT, now=NOW + 1)
            assert not await ledger.renew_lease(ORCHESTRATOR, "another boot", now=NOW + 1)
            (lease,) = store.leases()
            assert (lease.orchestrator_id, lease.orchestrator_boot, lease.renewals) == (ORCHESTRATOR, BOOT, 3)
            await ledger.save_node(node, boot_id="boot-2")
            (lease,) = store.leases()
            assert (lease.orchestrator_boot, lease.renewals) == ("boot-2", 0)

    @trio_test
    async def test_a_node_is_gone_when_its_newest_boot_left_and_up_again_with_the_next_one(self, store: Store) -> None:
        node = NodeRecord(ORCHESTRATOR, "orchestrator", "a", "eu", (), "0.1.0", NOW, NOW)
        async with running_ledger(store) as ledger:
            await ledger.save_node(node, boot_id=BOOT)
            await ledger.save_node(msgspec.structs.replace(node, started_at=NOW + 5, seen_at=NOW + 5), boot_id=BOOT)
            assert store.nodes() == [msgspec.structs.replace(node, seen_at=NOW + 5)], "a boot starts once"
            await ledger.node_gone(ORCHESTRATOR, "orchestrator", "another boot", now=NOW + 6)
            await ledger.node_gone(ORCHESTRATOR, "gateway", BOOT, now=NOW + 6)
            assert store.nodes()[0].status == "up"
            await ledger.node_gone(ORCHESTRATOR, "orchestrator", BOOT, now=NOW + 7)
            assert store.nodes() == [msgspec.structs.replace(node, seen_at=NOW + 7, status="gone")]
            assert not await ledger.renew_lease(ORCHESTRATOR, BOOT, now=NOW + 8)
            await ledger.save_node(msgspec.structs.replace(node, started_at=NOW + 9), boot_id="boot-2")
            assert [(n.status, n.started_at) for n in store.nodes()] == [("up", NOW + 9)]

    @trio_test
    async def test_a_job_can_be_ended_only_while_the_holder_that_was_named_holds_it(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await admit(ledger, job(), WORKER)
            held = HeldJob("job-1", 1, ORCHESTRATOR, BOOT)
            assert store.held_job("job-1") == held
            assert store.holders() == {(ORCHESTRATOR, BOOT)}
            assert store.held_jobs(ORCHESTRATOR, BOOT) == [held]
            assert store.held_jobs(ORCHESTRATOR, "boot-2") == []
            assert store.held_job_ids(ORCHESTRATOR, BOOT) == {"job-1"}
            for holder, done in (
                ((ORCHESTRATOR, "boot-2"), False),
                (("another", BOOT), False),
                ((ORCHESTRATOR, BOOT), True),
            ):
                assert done is await ledger.finish(
                    "job-1", 1, status="expired", finish_reason="error", holder=holder, now=NOW
                )
            assert store.held_job("job-1") is None
            assert (store.holders(), store.held_jobs(ORCHESTRATOR, BOOT)) == (set(), [])
        assert (record(store).status, store.attempts("job-1")[0].status) == ("expired", "expired")

    @trio_test
    async def test_models_are_remembered_after_nobody_serves_them(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            await ledger.save_models([ModelInfo("demo", "1.0", toy=True)], description="A toy.", now=NOW)
            await ledger.save_models([ModelInfo("demo", "1.0", toy=True, context_tokens=9)], now=NOW + 1)
        (model,) = store.models()
        assert (model.name, model.toy, model.context_tokens, model.description) == ("demo", True, 9, "A toy.")
        assert (model.first_seen_at, model.seen_at) == (NOW, NOW + 1)

    def test_a_tenant_keeps_its_limit_and_its_weight(self, store: Store) -> None:
        assert TenantStore(store).tenant("tenant-1") is None
        TenantStore(store).set_tenant("tenant-1", requests_per_minute=3, weight=2, now=NOW)
        TenantStore(store).set_tenant("tenant-1", requests_per_minute=4, weight=2, now=NOW + 1)
        tenant = TenantStore(store).tenant("tenant-1")
        assert tenant is not None
        assert (tenant.most("requests_per_minute"), tenant.weight, tenant.created_at) == (4, 2.0, NOW)

    # --- retention ---------------------------------------------------------------------------------------------------

    @trio_test
    async def test_old_texts_go_first_and_old_jobs_later_and_live_ones_never(self, store: Store) -> None:
        async with running_ledger(store) as ledger:
            for number in range(4):
                await admit(ledger, job(f"job-{number}"), WORKER._replace(slots=9))
                if number:
                    await complete(ledger, f"job-{number}", now=NOW + number)
        assert store.purge(now=NOW + 9, texts_before=NOW + 2.5, rows_before=NOW) == 2
        assert record(store, "job-1").result is None
        assert record(store, "job-1").usage == Usage(5, 7)
        assert record(store, "job-3").result == "hi"
        assert store.purge(now=NOW + 9, texts_before=NOW + 2.5, rows_before=NOW + 1.5) == 1
        assert [found.id for found in store.jobs()] == ["job-3", "job-2", "job-0"]
        assert store.attempts("job-1") == []
        assert record(store, "job-0").input == "hello"
        assert store.purge(now=NOW + 90_000, texts_before=NOW, rows_before=NOW) == 0
        assert requests_used(store) == 0

    # --- group commit ------------------------------------------------------------------------------------------------

    def test_a_refused_write_changes_nothing_and_leaves_its_neighbours_alone(self, store: Store) -> None:
        results = store.write_batch(
            [
                (tenant_query("a"),),
                (tenant_query("b"), tenant_query("c", weight=None)),
                (tenant_query("d"), tenant_query("e")),
                (Query("no such query", {}),),
                (Query("insert_tenant", {"id": "f"}),),
                (tenant_query("g\ud800"),),
                (),
                (tenant_query("h"),),
            ]
        )
        one = Applied(1, [])
        assert results[0] == (one,)
        assert isinstance(results[1], InternalError)
        assert results[2] == (one, one)
        assert all(isinstance(result, InternalError) for result in results[3:6])
        assert results[6:] == [(), (one,)]
        assert [row["id"] for row in store.read("tenants")] == ["a", "d", "e", "h"]

    @trio_test
    async def test_writes_are_applied_in_the_order_in_which_they_came(self, store: Store) -> None:
        issued: list[int] = []

        async def set_weight(ledger: Ledger, number: int) -> None:
            issued.append(number)
            await ledger.write((Query("set_tenant", {"id": "a", "weight": float(number), "now": NOW}),))

        async with running_ledger(store, max_batch=7) as ledger, trio.open_nursery() as nursery:
            for number in range(1, 51):
                nursery.start_soon(set_weight, ledger, number)
        tenant = TenantStore(store).tenant("a")
        assert tenant is not None
        assert tenant.weight == issued[-1]

    def test_two_that_migrate_at_once_apply_each_migration_once(
        self, store: Store, open_store_again: OpenStore
    ) -> None:
        for table in ("schema_migrations", *TABLES):
            store._database.execute([Statement(f"DROP TABLE {table}", {})])
        for view in ("job_records", "job_listing"):
            store._database.execute([Statement(f"DROP VIEW {view}", {})])
        stores = [store, *(open_store_again() for _ in range(3))]
        applied: list[int] = []
        barrier = threading.Barrier(len(stores))

        def migrate(each: Store) -> None:
            barrier.wait()
            applied.extend(migration.version for migration in each.migrate())

        threads = [threading.Thread(target=migrate, args=(each,)) for each in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(applied) == [migration.version for migration in store.schema_status().applied]
        store.check()

    def test_every_named_query_can_be_run(self, store: Store) -> None:
        for name, (sql, names) in load_queries().items():
            params = {each: SAMPLES.get(each, "x") for each in names}
            if sql.startswith("SELECT"):
                assert isinstance(store._database.query(Statement(sql, params)), list), name
            else:
                assert len(store.write((Query(name, params),))) == 1, name
