"""What a job's story writes down: again until the ledger has it, and only while the job is held here."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Literal, TypeVar

from tether.active import ActiveJob, Ending, Moved
from tether.attempts import Attempts
from tether.errors import InternalError, StoreUnavailable
from tether.ledger import Ledger
from tether.records import LIVE, JobRecord
from tether.stored import Admission

log = logging.getLogger(__name__)

R = TypeVar("R")

MAX_TOLD = 10_000
"""Ends that are remembered because the ledger may not have them: of jobs that were refused for want of its answer."""


class Books:
    """Writes for the jobs of one boot of an orchestrator, `me`: its peer id and its boot id."""

    def __init__(self, ledger: Ledger, me: tuple[str, str]) -> None:
        self._ledger = ledger
        self._me = me
        self._told: dict[str, tuple[Ending, bool]] = {}  # ends that the ledger may not have; whether it was a refusal

    # --- where a job comes from --------------------------------------------------------------------------------------

    async def resume(self, active: ActiveJob, admission: Admission) -> bool:
        """Go on with a job that the store has already; False, with its gateway told, where it is not to be run here.

        What earlier boots left was taken up at the start, so a live job of mine that is not live here is one whose
        admission was written and its answer lost, or whose story broke off. Another one's job is taken from it where
        the job's gateway has lost that one: its client waits.
        """
        record = admission.record
        if record is not None and record.status in LIVE and not admission.held:
            await self._take_from(active, admission.holder)
            # Read anew: its holder may have gone on to another attempt before it was taken.
            read = partial(self._ledger.read, self._ledger.store.job, active.job.id)
            record = await self.insist(active, read)
        if record is None or record.status not in LIVE:
            active.tell_record(record)
            return False
        if not admission.reserved:
            active.attempt, active.exact = record.attempt, record.exact
            if record.status == "running" and admission.held:
                await self.settle(
                    active, self._ledger.requeue, record.id, record.attempt, status="lost", holder=self._me
                )
        return True

    async def is_known(self, active: ActiveJob) -> bool:
        """Whether the store has a job already; waits for a store that is away."""
        return await self.insist(active, partial(self._ledger.read, self._ledger.store.job, active.job.id)) is not None

    async def _take_from(self, active: ActiveJob, holder: tuple[str, str]) -> None:
        """Take a job from the orchestrator that its gateway has lost; raise `Moved` where it is not to be had.

        Who asks for the same twice at once, through two gateways, may so come here for a job that has just begun elsewhere.
        """
        if holder[1] != "" and holder != active.lost:
            raise Moved(holder)
        if not await self.settle(
            active,
            self._ledger.take_over,
            active.job.id,
            holder=holder,
            orchestrator_id=self._me[0],
            orchestrator_boot=self._me[1],
        ):
            raise Moved  # somebody was faster, or it has ended: the gateway asks again
        log.info("job %s is taken over", active.job.id, extra={"job_id": active.job.id})

    async def recall(self, active: ActiveJob) -> None:
        """Learn from the ledger what others' attempts at the job came to."""
        read = partial(self._ledger.read, self._ledger.store.attempts, active.job.id)
        active.recall(Attempts.of(await self.insist(active, read)))

    # --- its attempts ------------------------------------------------------------------------------------------------

    async def catch_up(self, active: ActiveJob) -> None:
        """After a reservation that failed: give an attempt up that was written down before, its answer lost.

        Raises `Moved` where another one holds the job, and where it has ended: the next one that is asked tells how.
        """
        if await self._is_ahead(active):
            await self.settle(
                active, self._ledger.requeue, active.job.id, active.attempt, status="lost", holder=self._me
            )
        elif await self._ledger.read(self._ledger.store.held_job, active.job.id) is None:
            raise Moved

    async def _is_ahead(self, active: ActiveJob) -> bool:
        """Whether the ledger is at a later attempt than this orchestrator knew, which now knows it.

        Raises `Moved` where another orchestrator holds the job.
        """
        held = await self._ledger.read(self._ledger.store.held_job, active.job.id)
        if held is None:
            return False
        if (holder := (held.orchestrator_id, held.orchestrator_boot)) != self._me:
            raise Moved(holder)
        is_ahead = held.attempt > active.attempt
        active.attempt = max(active.attempt, held.attempt)
        return is_ahead

    async def requeue(
        self, active: ActiveJob, *, status: Literal["failed", "lost", "busy"], error_code: str | None = None
    ) -> None:
        """Write down that the attempt is over and the job waits again; raise `Moved` where it is another one's now."""
        requeued = await self.settle(
            active,
            self._ledger.requeue,
            active.job.id,
            active.attempt,
            status=status,
            error_code=error_code,
            completion_tokens=active.attempt_tokens,
            holder=self._me,
        )
        if not requeued:
            await self.insist(active, partial(self._is_ahead, active))
            raise InternalError(f"job {active.job.id} went on without this orchestrator")

    async def release(self, active: ActiveJob) -> None:
        """Write down that whoever comes first may have the job."""
        await self.settle(
            active,
            self._ledger.release,
            active.job.id,
            active.attempt,
            holder=self._me,
            completion_tokens=active.attempt_tokens,
        )

    # --- its end -----------------------------------------------------------------------------------------------------

    async def finish(self, active: ActiveJob, ending: Ending) -> None:
        """Write the job's end, and only then tell it; where the store has another one, that one is told.

        Raises `Moved` where another orchestrator holds the job now: its end is for that one to write.
        """
        while not await self._write_end(active, ending):
            if await self.insist(active, partial(self._is_ahead, active)):
                continue  # the answer to the last reservation was lost
            log.error("job %s has another end in the store", active.job.id, extra={"job_id": active.job.id})
            read = partial(self._ledger.read, self._ledger.store.job, active.job.id)
            active.tell_record(await self.insist(active, read))
            return
        active.tell_end(ending)

    async def _write_end(self, active: ActiveJob, ending: Ending) -> bool:
        result = active.answers.result(ending.finish_reason, ending.choices)
        return await self.settle(
            active,
            self._ledger.finish,
            active.job.id,
            active.attempt,
            status=ending.status,
            finish_reason=ending.finish_reason,
            result=result,
            logprobs=active.answers.logprobs(len(active.job.input) + len(result)),
            error=ending.error,
            usage=active.usage,
            attempt_tokens=active.attempt_tokens,
            holder=self._me,
        )

    async def void(self, active: ActiveJob, ending: Ending) -> None:
        """Take back an admission that was refused for want of an answer: written or not, it is not live after this."""
        for number in (0, 1):  # queued, or with its first attempt reserved
            await self.settle(
                active, self._ledger.finish, active.job.id, number, **_facts(ending), refused=True, holder=self._me
            )

    def remember(self, active: ActiveJob, ending: Ending) -> None:
        """Keep in mind an end that was told, and that the ledger may not have."""
        self._told[active.job.id] = ending, not active.accepted
        while len(self._told) > MAX_TOLD:
            del self._told[next(iter(self._told))]

    def forget(self, job_id: str) -> None:
        """Forget what was told of a job's end: the job is live again."""
        self._told.pop(job_id, None)

    async def finish_as_told(self, record: JobRecord) -> bool:
        """Write the end that a job's client was told and that the ledger does not have; False where none was told."""
        if record.id not in self._told:
            return False
        ending, refused = self._told[record.id]
        await self._ledger.finish(
            record.id, record.attempt, **_facts(ending), refused=refused, holder=self._me, now=time.time()
        )
        return True

    # --- until the store has it --------------------------------------------------------------------------------------

    async def settle(self, active: ActiveJob, operation: Callable[..., Awaitable[R]], *names: Any, **facts: Any) -> R:
        """Write until the store has it: what happened has happened, so it waits for a store that is away."""
        return await self.insist(active, partial(operation, *names, **facts, now=time.time()))

    async def insist(self, active: ActiveJob, call: Callable[[], Awaitable[R]]) -> R:
        """Ask the store until it answers."""
        pause = 0.1
        while True:
            try:
                return await call()
            except StoreUnavailable as exc:
                log.warning("job %s: %s; trying again", active.job.id, exc.message, extra={"job_id": active.job.id})
                await self._ledger.wait_back(pause)
                pause = min(2 * pause, 5.0)


def _facts(ending: Ending) -> dict[str, Any]:
    """Return what the ledger is told of an end."""
    return {"status": ending.status, "finish_reason": ending.finish_reason, "error": ending.error}
