"""Runs batches at an orchestrator: the lines of a file become jobs in the background, and their answers a file.

Each batch is held by one orchestrator's boot, as jobs are, and taken over by compare-and-set from one that is dead, has
left, or was started again. All that a runner knows is in the store, so that it may break off anywhere and begin again,
here or elsewhere: a line's job has one id, and a line has one outcome.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable

import trio

from tether import batch_lines
from tether.active import ActiveJob
from tether.batch_lines import LineChecker, LineReader, Outcome, Parts
from tether.batch_store import BatchLedger, Holder, LiveBatch
from tether.cancelling import Cancelling
from tether.errors import (
    InvalidKey,
    ModelNotFound,
    RateLimited,
    StoreUnavailable,
    TetherError,
    Unavailable,
    from_info,
)
from tether.leases import Leases
from tether.ledger import Ledger
from tether.messages import JobEnd, JobEvent
from tether.orchestrator import Orchestrator
from tether.quotas import reserved_tokens
from tether.records import LIVE, LIVE_BATCH, BatchLine, BatchMistake, BatchRecord, BatchStatus, FileRecord, Job
from tether.retelling import ending_of, story_of
from tether.roster import Roster
from tether.stored import Allowance

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
"""How often an orchestrator looks for batches to run and to end."""
PAUSE_SECONDS = 2.0
"""How long a line waits for what may pass soon, at most, before it looks again."""
MAX_IN_FLIGHT = 64
"""Lines of one batch that are under way at once, at most."""
_LINES_AT_ONCE = 200
_CHARS_AT_ONCE = 512 * 1024
"""What one statement writes of a batch's lines."""

_ENDS: dict[BatchStatus, tuple[str, str]] = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was run"),
    "expired": ("batch_expired", "this request was not run before the batch's completion window ended"),
}
KEY_ENDED = BatchMistake(InvalidKey.code, "the API key with which this batch was made was revoked or has expired")


class Batches:
    """The batches that this orchestrator runs."""

    def __init__(
        self,
        ledger: Ledger,
        orchestrator: Orchestrator,
        cancelling: Cancelling,
        roster: Roster,
        leases: Leases,
        *,
        holder: Holder,
    ) -> None:
        self._ledger = ledger
        self._batches = BatchLedger(ledger)
        self._orchestrator = orchestrator
        self._cancelling = cancelling
        self._roster = roster
        self._leases = leases
        self._holder = holder
        self._running: dict[str, trio.CancelScope] = {}
        """By batch: what ends its validation or its work early."""
        self._in_flight: Counter[str] = Counter()
        """By model: lines that are under way."""
        self._freed = trio.Event()
        self._changed = trio.Event()
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run batches until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                self._changed = trio.Event()
                try:
                    await self._round()
                except StoreUnavailable as exc:
                    log.debug("batches not looked at: %s", exc.message)
                with trio.move_on_after(ROUND_SECONDS):
                    await self._changed.wait()

    def look(self) -> None:
        """Look at the store soon: there is a new batch, or one to be cancelled."""
        self._changed.set()

    async def leave(self) -> None:
        """Run no more batches here, and leave them to others."""
        self._nursery.cancel_scope.cancel()
        try:
            await self._batches.release(self._holder)
        except TetherError as exc:
            log.warning("batches wait until this node is taken for dead: %s", exc.message)

    async def _round(self) -> None:
        """Take batches over that nobody runs, start those that are new here, and stop those that are to end or were lost."""
        now, held = time.time(), set[str]()
        for batch in await self._batches.read(self._batches.store.live_batches, now=now):
            if batch.holder != self._holder and not (
                self._is_abandoned(batch) and await self._batches.claim(batch, self._holder)
            ):
                continue
            held.add(batch.id)
            is_to_stop = batch.status == "cancelling"
            if batch.key_has_ended and batch.status in {"validating", "in_progress"}:
                await self._batches.revoke(batch.id, self._holder, KEY_ENDED, now=now)
                is_to_stop = True
            if batch.id not in self._running:
                self._running[batch.id] = trio.CancelScope()
                self._nursery.start_soon(self._hold, batch.id)
            elif is_to_stop:
                self._running[batch.id].cancel()
        for batch_id in self._running.keys() - held:
            self._running[batch_id].cancel()  # its lines are another one's to run now, or nobody's

    def _is_abandoned(self, batch: LiveBatch) -> bool:
        """Whether whoever held a batch does so no more: it left, it was this orchestrator's earlier boot, or it is dead."""
        if self._orchestrator.is_draining:
            return False
        owner = batch.orchestrator_id
        return owner in {"", self._holder.orchestrator_id} or self._leases.is_dead(owner)

    # --- the life of a batch -----------------------------------------------------------------------------------------

    async def _hold(self, batch_id: str) -> None:
        """Bring a batch to its end, from wherever it is, for as long as it is held here."""
        try:
            while (batch := await self._mine(batch_id)) is not None:
                try:
                    await self._advance(batch)
                except* StoreUnavailable as group:
                    log.warning("batch %s waits for the store: %s", batch_id, group.exceptions[0])
                    await trio.sleep(PAUSE_SECONDS)
        except Exception:
            # A mistake in here must not take the orchestrator down; a later round begins again where the store is.
            log.exception("batch %s: internal error", batch_id)
            await trio.sleep(PAUSE_SECONDS)
        finally:
            del self._running[batch_id]

    async def _mine(self, batch_id: str) -> BatchRecord | None:
        """Return a batch that is held here and has no end yet."""
        while True:
            try:
                batch = await self._batches.read(self._batches.store.batch, batch_id)
            except StoreUnavailable:
                await trio.sleep(PAUSE_SECONDS)
                continue
            held = batch is not None and (batch.orchestrator_id, batch.orchestrator_boot) == self._holder
            return batch if held and batch is not None and batch.status in LIVE_BATCH else None

    async def _advance(self, batch: BatchRecord) -> None:
        """Do what a batch's status asks for; the status that is written then says what is next."""
        seconds_left = batch.expires_at - time.time()
        scope = self._running[batch.id] = trio.CancelScope()
        match batch.status:
            case "validating":
                with scope:
                    await self._validate(batch)
            case "in_progress" if seconds_left > 0:
                with scope, trio.move_on_after(seconds_left):
                    await self._work(batch)
            case "in_progress":
                await self._stop(batch, "expired")
            case "cancelling" if batch.finalizing_at is None:
                await self._stop(batch, "failed" if batch.errors else "cancelled")
            case _:
                await self._make_files(batch)

    async def _validate(self, batch: BatchRecord) -> None:
        """Read the input file and keep its requests, or say what is wrong with it."""
        checker, waiting = LineChecker(batch.endpoint), list[BatchLine]()
        num_chars = 0
        async for text in self._input(batch, checker):
            if (line := checker.check(text)) is None:
                continue
            waiting.append(line)
            num_chars += len(line.request)
            if len(waiting) >= _LINES_AT_ONCE or num_chars >= _CHARS_AT_ONCE:
                await self._batches.save_lines(batch.id, waiting, self._holder)
                waiting, num_chars = [], 0
        checker.finish()
        if checker.mistakes:
            await self._batches.fail(batch.id, self._holder, checker.mistakes, now=time.time())
            return
        if waiting:
            await self._batches.save_lines(batch.id, waiting, self._holder)
        await self._batches.begin(
            batch.id, self._holder, num_lines=checker.num_lines, model=checker.model, now=time.time()
        )

    async def _input(self, batch: BatchRecord, checker: LineChecker) -> AsyncIterator[str]:
        """Yield the lines of the input file, as long as it is worth while."""
        file = await self._batches.read(self._batches.store.file, batch.input_file_id, batch.tenant_id)
        reader = LineReader()
        for number in range(file.num_parts if file is not None else 0):
            part = await self._batches.read(self._batches.store.file_part, batch.input_file_id, number)
            for text in reader.feed(part or ""):
                yield text
            if checker.is_hopeless:
                return
        for text in reader.flush():
            yield text

    async def _work(self, batch: BatchRecord) -> None:
        """Run every line that has no outcome yet, so many at once as there is room for."""
        model = batch.model or ""
        async with trio.open_nursery() as nursery:
            after = 0
            while lines := await self._waiting_lines(batch, after):
                for line in lines:
                    await self._wait_for_room(model)
                    self._in_flight[model] += 1
                    nursery.start_soon(self._run_line, batch, line, model)
                after = lines[-1].number
        await self._batches.finalize(batch.id, self._holder, code="", message="", now=time.time())

    async def _run_line(self, batch: BatchRecord, line: BatchLine, model: str) -> None:
        try:
            outcome, drop_answer_of = await self._outcome(batch, line)
            await self._end_line(batch, line, outcome, drop_answer_of)
        finally:
            self._in_flight[model] -= 1
            self._freed.set()
            self._freed = trio.Event()

    async def _outcome(self, batch: BatchRecord, line: BatchLine) -> tuple[Outcome, str | None]:
        """Run a line's job to its end, however often it has to be brought until it is taken.

        Returns the outcome, and the job's id where its answer need not be kept any longer.
        """
        number = 0
        while True:
            line_job = batch_lines.job_or_refusal(batch, line, time.time(), number)
            if isinstance(line_job, Outcome):
                return line_job, None
            await self._wait_for_quota(line_job.job)
            active = self._orchestrator.submit(line_job.job)
            await active.done.wait()
            end = active.end
            if end is None:
                await trio.sleep(PAUSE_SECONDS)  # another orchestrator has the job; its end will be found in the ledger
                continue
            error = from_info(end.error) if end.error is not None else None
            if active.accepted or error is None or not _may_pass(error, batch):
                outcome = batch_lines.outcome_of(batch, line, line_job, _events(active, end))
                return outcome, line_job.job.id if line_job.drops_answer else None
            number = await self._next_number(batch, line, number)
            await trio.sleep(min(PAUSE_SECONDS, error.retry_after_seconds or PAUSE_SECONDS))

    async def _next_number(self, batch: BatchRecord, line: BatchLine, number: int) -> int:
        """Return the number of the first of a line's jobs that was not refused.

        A refusal leaves no trace, so the same job can come again; but for one that was written for want of an answer of the
        store. Its id is used up, though it never ran.
        """
        while True:
            job_id = batch_lines.job_id_of(batch, line, number)
            record = await self._batches.read(self._ledger.store.job, job_id)
            if record is None or record.error is None or not isinstance(from_info(record.error), Unavailable):
                return number
            number += 1

    async def _stop(self, batch: BatchRecord, status: BatchStatus) -> None:
        """End what is under way of a batch, keep what is done, and give the rest their error."""
        if batch.in_progress_at is None:
            await self._batches.end(batch.id, self._holder, status=status, output=None, errors=None, now=time.time())
            return
        # Lines are begun in order and so many at once: what may be live is among the first that wait.
        lines = await self._waiting_lines(batch, 0)
        async with trio.open_nursery() as nursery:
            for line in lines[:MAX_IN_FLIGHT]:
                nursery.start_soon(self._stop_line, batch, line)
        code, message = (batch.errors[0].code, batch.errors[0].message) if batch.errors else _ENDS[status]
        await self._batches.finalize(batch.id, self._holder, code=code, message=message, now=time.time())

    async def _stop_line(self, batch: BatchRecord, line: BatchLine) -> None:
        """End a line's job, if it has one; where that was done before it could be stopped, its answer counts."""
        number = await self._next_number(batch, line, 0)
        job_id = batch_lines.job_id_of(batch, line, number)
        active = None
        while True:
            active = self._orchestrator.get(job_id) or active
            await self._cancelling.end(job_id, "its batch has ended")
            record = await self._batches.read(self._ledger.store.job, job_id)
            if record is None or record.status not in LIVE:
                break
            await trio.sleep(PAUSE_SECONDS)  # it moves from one that is lost, or its holder does not answer
        if record is None or record.status != "completed":
            return
        line_job = batch_lines.job_or_refusal(batch, line, time.time(), number)
        if isinstance(line_job, Outcome):
            await self._end_line(batch, line, line_job, None)
            return
        events = _events(active, active.end) if active is not None and active.end is not None else story_of(record)
        outcome = batch_lines.outcome_of(batch, line, line_job, events)
        await self._end_line(batch, line, outcome, job_id if line_job.drops_answer else None)

    async def _make_files(self, batch: BatchRecord) -> None:
        """Make the batch's files from its lines' outcomes, and end it."""
        output = await self._make_file(batch, completed=True)
        errors = await self._make_file(batch, completed=False)
        status: BatchStatus = "completed"
        if batch.errors:
            status = "failed"
        elif batch.cancelling_at is not None:
            status = "cancelled"
        elif (batch.finalizing_at or 0.0) >= batch.expires_at:
            status = "expired"
        await self._batches.end(batch.id, self._holder, status=status, output=output, errors=errors, now=time.time())
        log.info("batch %s is %s", batch.id, status)

    async def _make_file(self, batch: BatchRecord, *, completed: bool) -> FileRecord | None:
        """Write the parts of the output or the error file, the same whoever does it; None for one without lines."""
        kind = "output" if completed else "error"
        file_id = f"{batch.id.replace('batch_', 'file-')}-{kind}"
        parts, after = Parts(), 0
        while lines := await self._batches.read(
            self._batches.store.outcomes, batch.id, completed=completed, after=after, limit=_LINES_AT_ONCE
        ):
            for _, text in lines:
                for number, part in parts.feed(f"{text}\n"):
                    await self._batches.save_part(file_id, number, part, now=time.time())
            after = lines[-1][0]
        for number, part in parts.flush():
            await self._batches.save_part(file_id, number, part, now=time.time())
        if not parts.num_parts:
            return None
        name = f"{batch.id}_{kind}.jsonl"
        return FileRecord(
            file_id, batch.tenant_id, name, "batch_output", parts.num_bytes, parts.num_parts, created_at=time.time()
        )

    # --- parts of it -------------------------------------------------------------------------------------------------

    async def _waiting_lines(self, batch: BatchRecord, after: int) -> list[BatchLine]:
        return await self._batches.read(self._batches.store.waiting_lines, batch.id, after=after, limit=_LINES_AT_ONCE)

    async def _end_line(
        self, batch: BatchRecord, line: BatchLine, outcome: Outcome, drop_answer_of: str | None
    ) -> None:
        await self._batches.end_line(
            batch.id,
            line,
            self._holder,
            completed=outcome.completed,
            outcome=outcome.text,
            drop_answer_of=drop_answer_of,
        )

    async def _wait_for_room(self, model: str) -> None:
        """Wait until one more line of a model may be under way here."""
        while self._orchestrator.is_draining or self._in_flight[model] >= self._most_in_flight(model):
            with trio.move_on_after(ROUND_SECONDS):  # slots come and go, too
                await self._freed.wait()

    def _most_in_flight(self, model: str) -> int:
        """Return how many lines may be under way: one slot is left to those who wait for their answers."""
        name, _, version = model.partition("@")
        slots = (
            each.slots
            for state in self._roster.states
            if state.takes_jobs
            for each in state.models
            if each.name == name and (not version or each.version == version)
        )
        return max(1, min(MAX_IN_FLIGHT, sum(slots) - 1))

    async def _wait_for_quota(self, job: Job) -> None:
        """Wait until the job leaves its tenant's other requests room within every limit."""
        asked = [Allowance(job.tenant_id, job.key_id, job.model, job.requests_per_minute)]
        while True:
            now = time.time()
            (limits,) = await self._batches.read(self._ledger.store.allowances, asked, now=now)
            seconds = batch_lines.pause_seconds(limits, reserved_tokens(job), now)
            if not seconds:
                return
            await trio.sleep(min(seconds, PAUSE_SECONDS))


def _may_pass(error: TetherError, batch: BatchRecord) -> bool:
    """Whether a refusal says only that it is not the time; a model that was served before will be again."""
    return isinstance(error, RateLimited | Unavailable) or (
        isinstance(error, ModelNotFound) and batch.num_completed > 0
    )


def _events(active: ActiveJob, end: JobEnd) -> Iterable[JobEvent]:
    """Return what a gateway would have been told of a job that has ended here."""
    beginning: list[JobEvent] = [active.acceptance]
    if active.start is not None:
        beginning.append(active.start)
    return [*beginning, *active.beyond(()), *ending_of(end, active.answers)]
