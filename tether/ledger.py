"""The ledger: the store's writes on trio. Those that arrive together go into one transaction; each caller gets its own result."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
import trio

from tether import quotas
from tether.database import Applied, Value
from tether.errors import ErrorInfo, JobConflict, RateLimits, StoreUnavailable, TetherError, from_info
from tether.named_queries import Query, Write, WriteResult, counts
from tether.outline import outline_of
from tether.quotas import Limit
from tether.records import FinishReason, Job, ModelInfo, NodeRecord, Role, Usage, WorkerState
from tether.store import Store
from tether.stored import Admission, Allowance, AttemptEnd, JobEndStatus, WorkerSlot, convert, to_job

log = logging.getLogger(__name__)

MAX_MODELS_KEPT: Final = 10_000

T = TypeVar("T")

HANDED_OVER: Final = "handed_over"
"""The error code of an attempt that ended because its orchestrator gave the job away; no worker's fault."""

_encode_json = msgspec.json.Encoder().encode


class _Waiting:
    """A caller whose write waits for its transaction."""

    __slots__ = ("abandoned", "done", "num_chars", "result", "write")

    def __init__(self, write: Write) -> None:
        self.write = write
        # Of the longest query: its others name the same text, or none.
        self.num_chars = max(
            (sum(len(value) for value in params.values() if isinstance(value, str)) for _, params in write),
            default=0,
        )
        self.done = trio.Event()
        self.result: WriteResult | None = None
        self.abandoned = False


class _Asking:
    """Those whose limits the next read answers."""

    def __init__(self) -> None:
        self.limits: dict[Allowance, tuple[Limit, ...]] = {}
        self.done = trio.Event()


class Ledger:
    """Group commit: writes that arrive together go into one transaction, in the order in which they arrived.

    `run` must be running (`await nursery.start(ledger.run)`). Every method raises `StoreUnavailable` when the store
    cannot be reached within its deadline, when more than `max_waiting` writes wait, or when `run` has ended; the write
    may then be applied or not, and can be sent again. A caller that is cancelled before its write was begun withdraws
    it; afterwards the write goes on without it.
    """

    def __init__(
        self, store: Store, *, max_batch: int = 200, max_waiting: int = 4096, max_batch_chars: int = 4 << 20
    ) -> None:
        self.store = store
        self._max_batch = max_batch
        self._max_batch_chars = max_batch_chars  # so that a batch of long prompts is not slower than its time limit
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._arrived = trio.Event()
        self._asking = _Asking()
        self._ask_lock = trio.Lock()
        self._running = False
        self._busy_since: float | None = None
        self._failure: ErrorInfo | None = None
        self._back = trio.Event()
        # One batch at a time; reads have threads of their own, so that neither waits for the other.
        self._write_limiter = trio.CapacityLimiter(1)
        self._read_limiter = trio.CapacityLimiter(3)

    @property
    def busy_seconds(self) -> float:
        """How long the transaction that is under way has been; 0 while none is."""
        return 0.0 if self._busy_since is None else trio.current_time() - self._busy_since

    @property
    def failure(self) -> ErrorInfo | None:
        """Why the last transaction was not applied; None where it was."""
        return self._failure

    async def wait_back(self, most_seconds: float) -> None:
        """Wait until a transaction is applied after one that was not, but no longer than so many seconds."""
        with trio.move_on_after(most_seconds):
            await self._back.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit what waits, until cancelled; then let the batch that was begun finish, and refuse the rest."""
        self._running = True
        task_status.started()
        try:
            while True:
                while not self._waiting:
                    self._arrived = trio.Event()
                    await self._arrived.wait()
                await trio.lowlevel.checkpoint_if_cancelled()
                batch = self._take_batch()
                if batch:
                    await self._commit(batch)
        finally:
            self._running = False
            while self._waiting:
                _settle(self._waiting.popleft(), StoreUnavailable("this node is stopping and writes no more"))

    async def write(self, write: Write) -> tuple[int, ...]:
        """Apply a write, in turn, and return the rows that each of its statements affected."""
        return counts(await self._apply(write))

    async def _apply(self, write: Write) -> tuple[Applied, ...]:
        if not self._running:
            raise StoreUnavailable("this node is stopping and writes no more")
        if len(self._waiting) >= self._max_waiting:
            raise StoreUnavailable(f"{self._max_waiting} writes wait for the store already")
        waiting = _Waiting(write)
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            await waiting.done.wait()
        finally:
            waiting.abandoned = True  # matters only to a write that nobody has begun yet
        if isinstance(waiting.result, TetherError):
            raise from_info(waiting.result.to_info()) from waiting.result
        assert waiting.result is not None  # noqa: S101  # `done` is set after it
        return waiting.result

    async def read(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run one of the store's blocking reads in a thread: `await ledger.read(ledger.store.job, job_id)`."""
        return await trio.to_thread.run_sync(
            partial(call, *args, **kwargs), limiter=self._read_limiter, abandon_on_cancel=True
        )

    def _take_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        num_chars = 0
        while self._waiting and len(batch) < self._max_batch and num_chars < self._max_batch_chars:
            waiting = self._waiting.popleft()
            if not waiting.abandoned:
                batch.append(waiting)
                num_chars += waiting.num_chars
        return batch

    async def _commit(self, batch: list[_Waiting]) -> None:
        self._busy_since = trio.current_time()
        try:
            # What was handed to the store is answered, whoever is cancelled meanwhile.
            with trio.CancelScope(shield=True):
                results = await trio.to_thread.run_sync(
                    self.store.write_batch, [waiting.write for waiting in batch], limiter=self._write_limiter
                )
            if self._failure is not None:
                self._failure = None
                self._back.set()
                self._back = trio.Event()
        except TetherError as exc:
            self._failure = exc.to_info()
            # Those that came meanwhile need not wait for another deadline to hear the same.
            batch += self._waiting
            self._waiting.clear()
            results = [exc] * len(batch)
        except BaseException:
            for waiting in batch:
                _settle(waiting, StoreUnavailable("the write failed; the log says why"))
            raise
        finally:
            self._busy_since = None
        for waiting, result in zip(batch, results, strict=True):
            _settle(waiting, result)

    # Jobs.

    async def admit(
        self,
        job: Job,
        *,
        orchestrator_id: str,
        orchestrator_boot: str,
        now: float,
        worker: WorkerSlot | tuple[str, str, int] | None = None,
    ) -> Admission:
        """Count the job against every limit that holds for it, insert it and reserve a slot for attempt 1, all at once.

        Without `worker`, or when it has no free slot, the job is queued. A job that is there already is neither
        counted nor changed. Raises `RateLimited` (with the seconds to the window's end) when a limit is reached,
        `JobTooLarge` when no wait would help, and `JobConflict` when the id belongs to another tenant's job.
        """
        slot = WorkerSlot(*worker) if worker is not None else WorkerSlot("", "", 0)
        params: dict[str, Value] = {
            **_job_params(job),
            **slot._asdict(),
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        write: Write = (Query("insert_job", params), Query("count_job", params))
        if worker is not None:
            write += (Query("insert_first_attempt", params),)
        inserted, counted, *attempts = await self._apply(write)
        if inserted.num_rows:
            limits = quotas.rate_limits([convert(row, Limit) for row in counted.rows], now)
            if counted.num_rows and not counted.rows:  # rqlite sees no RETURNING behind a SELECT from a function
                limits = await self.rate_limits(job, now=now)
            reserved = any(attempt.num_rows for attempt in attempts)
            return Admission(accepted=True, reserved=reserved, duplicate=False, limits=limits)
        return await self._settle_admission(job, slot, (orchestrator_id, orchestrator_boot), now)

    async def _settle_admission(self, job: Job, slot: WorkerSlot, holder: tuple[str, str], now: float) -> Admission:
        rows = await self.read(self.store.read, "admitted", settled=True, id=job.id)
        if not rows:
            (limits,) = await self.read(self.store.allowances, [_allowance(job)], now=now)
            raise quotas.refusal(limits, quotas.reserved_tokens(job), now)
        row = rows[0]
        if row["tenant_id"] != job.tenant_id:
            raise JobConflict(f"there is another job with the id {job.id}")
        found = (str(row["orchestrator_id"]), str(row["orchestrator_boot"]))
        held = found == holder
        first = (row["attempt"], row["worker_id"], row["worker_boot"], row["attempt_status"])
        reserved = held and first == (1, slot.worker_id, slot.worker_boot, "running")
        left = await self.rate_limits(job, now=now)
        return Admission(
            accepted=True,
            reserved=reserved,
            duplicate=True,
            held=held,
            holder=found,
            limits=left,
            record=to_job(row),
        )

    async def rate_limits(self, job: Job, *, now: float) -> RateLimits | None:
        """Return what is left of the limits that hold for a job; None without any, or while the store is away."""
        return quotas.rate_limits(await self.limits(job, now=now), now)

    async def limits(self, job: Job, *, now: float) -> tuple[Limit, ...]:
        """Return every limit that holds for a job, with what of it is spent; none while the store is away.

        Those who ask while the store is being read are answered together by the next read.
        """
        asking, mine = self._asking, _allowance(job)
        is_first = not asking.limits
        asking.limits[mine] = ()
        if is_first:
            with trio.CancelScope(shield=True):  # the others wait for this one's read
                async with self._ask_lock:
                    self._asking = _Asking()
                    try:
                        asked = list(asking.limits)
                        limits = await self.read(self.store.allowances, asked, now=now)
                        asking.limits = dict(zip(asked, limits, strict=True))
                    except TetherError as exc:
                        log.debug("limits not read: %s", exc.message)
                    finally:
                        asking.done.set()
        await asking.done.wait()
        return asking.limits[mine]

    async def reserve(
        self,
        job_id: str,
        number: int,
        *,
        worker: WorkerSlot | tuple[str, str, int],
        orchestrator_id: str,
        orchestrator_boot: str,
        now: float,
        exact: bool = True,
    ) -> bool:
        """Begin attempt `number` on a worker; the job is `running` from here on.

        `exact`: it goes on as the attempts before it would have; where one does not, the job says so for good.
        False when the worker has no free slot, or the job is not this orchestrator's live job at attempt
        `number - 1` with that attempt closed.
        """
        slot = WorkerSlot(*worker)
        params: dict[str, Value] = {
            "id": job_id,
            "number": number,
            **slot._asdict(),
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "exact": exact,
            "now": now,
        }
        inserted, _ = await self.write((Query("insert_attempt", params), Query("start_attempt", params)))
        if inserted:
            return True
        rows = await self.read(self.store.read, "attempt", settled=True, id=job_id, number=number)
        mine = (slot.worker_id, slot.worker_boot, orchestrator_id, orchestrator_boot, "running")
        names = ("worker_id", "worker_boot", "orchestrator_id", "orchestrator_boot", "status")
        return bool(rows) and tuple(rows[0][name] for name in names) == mine

    async def end_attempt(
        self,
        job_id: str,
        number: int,
        *,
        status: AttemptEnd,
        error_code: str | None = None,
        completion_tokens: int = 0,
        now: float,
    ) -> bool:
        """Close a running attempt and free its slot, leaving the job as it is; False when it was closed already."""
        (closed,) = await self.write(
            (
                _close_attempt(
                    "close_attempt",
                    job_id,
                    number,
                    status=status,
                    error_code=error_code,
                    completion_tokens=completion_tokens,
                    now=now,
                ),
            )
        )
        return closed > 0

    async def claim_key(self, tenant_id: str, key: str, *, fingerprint: str, job_id: str, now: float) -> str:
        """Give a client's idempotency key to the job `job_id`; return the job that has it, which may be another one.

        Raises `JobConflict` when the key was given for a request with another fingerprint. A key is kept for a day.
        """
        params: dict[str, Value] = {
            "tenant_id": tenant_id,
            "key": key,
            "fingerprint": fingerprint,
            "job_id": job_id,
            "now": now,
        }
        (claimed,) = await self.write((Query("claim_key", params),))
        if claimed:
            return job_id
        rows = await self.read(self.store.read, "claimed_key", settled=True, tenant_id=tenant_id, key=key)
        if rows and rows[0]["fingerprint"] != fingerprint:
            raise JobConflict("this Idempotency-Key was used for another request", param="Idempotency-Key")
        return str(rows[0]["job_id"]) if rows else job_id

    async def requeue(
        self,
        job_id: str,
        number: int,
        *,
        status: AttemptEnd,
        error_code: str | None = None,
        completion_tokens: int = 0,
        now: float,
        holder: tuple[str, str] | None = None,
    ) -> bool:
        """Close attempt `number` and put its job back into the queue, all at once.

        `holder` (orchestrator and its boot): only while that one holds the job. True when the job is queued at this
        attempt now, and held so; False when it has ended, gone on, or gone to another one.
        """
        _, requeued = await self.write(
            (
                _close_attempt(
                    "close_attempt",
                    job_id,
                    number,
                    status=status,
                    error_code=error_code,
                    completion_tokens=completion_tokens,
                    now=now,
                ),
                Query("requeue_job", {"id": job_id, "number": number, **_holder_params(holder)}),
            )
        )
        if requeued:
            return True
        rows = await self.read(self.store.read, "job", settled=True, id=job_id)
        if not rows or (rows[0]["status"], rows[0]["attempt"]) != ("queued", number):
            return False
        return holder in (None, (rows[0]["orchestrator_id"], rows[0]["orchestrator_boot"]))

    async def release(
        self, job_id: str, number: int, *, holder: tuple[str, str], completion_tokens: int = 0, now: float
    ) -> bool:
        """Close attempt `number` and give the job away: it is queued, and any orchestrator may take it over.

        False when `holder` does not hold it at this attempt.
        """
        closed = _close_attempt(
            "close_attempt",
            job_id,
            number,
            status="lost",
            error_code=HANDED_OVER,
            completion_tokens=completion_tokens,
            now=now,
        )
        params = {"id": job_id, "number": number, **_holder_params(holder)}
        _, released = await self.write((closed, Query("release_job", params)))
        return released > 0

    async def take_over(
        self, job_id: str, *, holder: tuple[str, str], orchestrator_id: str, orchestrator_boot: str, now: float
    ) -> bool:
        """Take a live job from its holder (orchestrator and its boot): its attempt is lost, it is queued.

        Of several that try, one gets it; False for the others, and where the job has ended.
        """
        params: dict[str, Value] = {
            "id": job_id,
            "holder_id": holder[0],
            "holder_boot": holder[1],
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        _, taken = await self.write((Query("lose_attempt_of_holder", params), Query("take_over_job", params)))
        if taken:
            return True
        held = await self.read(self.store.held_job, job_id)
        return held is not None and (held.orchestrator_id, held.orchestrator_boot) == (
            orchestrator_id,
            orchestrator_boot,
        )

    async def finish(
        self,
        job_id: str,
        attempt: int,
        *,
        status: JobEndStatus,
        finish_reason: FinishReason | None,
        result: str | None = None,
        error: ErrorInfo | None = None,
        usage: Usage = Usage(),  # noqa: B008  # frozen
        now: float,
        attempt_tokens: int | None = None,
        holder: tuple[str, str] | None = None,
        refused: bool = False,
        logprobs: str | None = None,
    ) -> bool:
        """Write the job's one end, close its running attempt, settle its quota, drop the texts that `keep` does not keep.

        `attempt` is the newest one's number (0: none was begun). `attempt_tokens` are the tokens of that attempt
        alone, where it was not the only one. `logprobs` is kept with the result. `holder` (orchestrator and its boot): only while that one holds the job.
        With `refused` the job's request counts for nothing, and its idempotency key is free: its client was told that it was not taken. True when this
        end is the job's end; False when the job ended otherwise, is at another attempt, or is not there.
        """
        error_code = error.code if error else None
        tokens = usage.completion_tokens if attempt_tokens is None else attempt_tokens
        params: dict[str, Value] = {
            "id": job_id,
            "number": attempt,
            "status": status,
            "finish_reason": finish_reason,
            "result": result,
            "logprobs": logprobs,
            "error_code": error_code,
            "error_message": error.message if error else None,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            **_holder_params(holder),
            "used_tokens": usage.prompt_tokens + usage.completion_tokens,
            "given_back": int(refused),
            "now": now,
        }
        write: Write = (Query("end_job", params), Query("settle_job", params))
        if attempt:
            write += (
                _close_attempt(
                    "close_last_attempt",
                    job_id,
                    attempt,
                    status=status,
                    error_code=error_code,
                    completion_tokens=tokens,
                    now=now,
                ),
            )
        if refused:
            write += (Query("release_claim", params),)
        if (await self.write(write))[0]:
            return True
        rows = await self.read(self.store.read, "job", settled=True, id=job_id)
        return bool(rows) and (rows[0]["status"], rows[0]["attempt"], rows[0]["ended_at"]) == (status, attempt, now)

    async def adopt(self, *, orchestrator_id: str, orchestrator_boot: str, now: float) -> int:
        """Take over the live jobs of this orchestrator's earlier boots: their attempts are lost, they are queued.

        Returns how many there were; `Store.live_jobs` has them.
        """
        params: dict[str, Value] = {
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        _, adopted = await self.write(
            (Query("lose_attempts_of_older_boots", params), Query("adopt_jobs_of_older_boots", params))
        )
        return adopted

    async def save_keys_used(self, used: Mapping[str, float]) -> None:
        """Remember when keys were used last, by their ids, all in one statement."""
        if used:
            await self.write((Query("keys_used", {"used": _encode_json(used).decode()}),))

    # Who takes part.

    async def save_workers(self, states: Sequence[WorkerState], *, orchestrator_id: str, now: float) -> None:
        """Remember the states that this orchestrator heard, all in one statement."""
        if states:
            document = msgspec.json.encode(states).decode()
            params: dict[str, Value] = {"states": document, "orchestrator_id": orchestrator_id, "now": now}
            await self.write((Query("save_workers", params),))

    async def forget(self, job_id: str, *, told: Write = ()) -> None:
        """Drop what a job that has ended was asked and answered, and who asked; its row stays, for the counts."""
        await self.write((*told, Query("forget_job", {"id": job_id})))

    async def save_event(self, line: Mapping[str, Value]) -> None:
        """Put a line into the audit log (`audit.event_params`), unless it is there."""
        await self.write((Query("audit", line),))

    async def worker_gone(self, worker_id: str, boot_id: str, *, orchestrator_id: str, now: float) -> None:
        """Remember that a worker's boot has left, unless it was seen by another orchestrator since."""
        params: dict[str, Value] = {
            "id": worker_id,
            "boot_id": boot_id,
            "orchestrator_id": orchestrator_id,
            "now": now,
        }
        await self.write((Query("worker_gone", params),))

    async def save_node(self, node: NodeRecord, *, boot_id: str) -> None:
        """Remember an orchestrator or a gateway; an orchestrator's lease begins with it."""
        params: dict[str, Value] = {
            "id": node.id,
            "role": node.role,
            "boot_id": boot_id,
            "name": node.name,
            "region": node.region,
            "addresses": msgspec.json.encode(node.addresses).decode(),
            "version": node.version,
            "started_at": node.started_at,
            "seen_at": node.seen_at,
        }
        await self.write((Query("save_node", params),))

    async def node_gone(self, node_id: str, role: Role, boot_id: str, *, now: float) -> None:
        """Remember that a boot of an orchestrator or a gateway has left."""
        params: dict[str, Value] = {"id": node_id, "role": role, "boot_id": boot_id, "now": now}
        await self.write((Query("node_gone", params),))

    async def renew_lease(self, orchestrator_id: str, orchestrator_boot: str, *, now: float) -> bool:
        """Move the lease on all jobs that this boot holds; False when another boot has taken its place."""
        params: dict[str, Value] = {"id": orchestrator_id, "boot_id": orchestrator_boot, "now": now}
        (renewed,) = await self.write((Query("renew_lease", params),))
        return renewed > 0

    async def save_models(self, models: Sequence[ModelInfo], *, description: str = "", now: float) -> None:
        """Remember that models are served; an empty description leaves the one that is there.

        Of more than `MAX_MODELS_KEPT` those that were seen last are kept: what a worker calls its models is its own affair.
        """
        saved = [
            Query(
                "save_model",
                {
                    "name": model.name,
                    "version": model.version,
                    "description": description,
                    "toy": model.toy,
                    "context_tokens": model.context_tokens,
                    "now": now,
                },
            )
            for model in models
        ]
        await self.write((*saved, Query("forget_models", {"most": MAX_MODELS_KEPT})))


def _settle(waiting: _Waiting, result: WriteResult) -> None:
    waiting.result = result
    waiting.done.set()


def _job_params(job: Job) -> dict[str, Value]:
    return {
        "id": job.id,
        "tenant_id": job.tenant_id,
        "model": job.model,
        "version": job.version,
        "input": job.input,
        "outline": outline_of(job),
        "sampling": _encode_json(job.sampling).decode(),
        "wait": job.wait,
        "stream": job.stream,
        "priority": job.priority,
        "deadline_seconds": float(job.deadline_seconds),
        "region": job.region,
        "session_key": job.session_key,
        "keep": job.keep,
        "requests_per_minute": job.requests_per_minute,
        "created_at": float(job.created_at),
        "form": job.form,
        "user": job.user,
        "metadata": _encode_json(job.metadata).decode(),
        "key_id": job.key_id,
        "reserved_tokens": quotas.reserved_tokens(job),
    }


def _holder_params(holder: tuple[str, str] | None) -> dict[str, Value]:
    """Return who must hold a job for a write to count; None: whoever does."""
    orchestrator_id, orchestrator_boot = holder or (None, None)
    return {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}


def _allowance(job: Job) -> Allowance:
    return Allowance(job.tenant_id, job.key_id, job.model, job.requests_per_minute)


def _close_attempt(
    name: str,
    job_id: str,
    number: int,
    *,
    status: AttemptEnd,
    error_code: str | None,
    completion_tokens: int,
    now: float,
) -> Query:
    return Query(
        name,
        {
            "id": job_id,
            "number": number,
            "status": status,
            "error_code": error_code,
            "completion_tokens": completion_tokens,
            "now": now,
        },
    )
