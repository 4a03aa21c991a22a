"""The waiting of an orchestrator's jobs: who may, at which place, for how long, and what is told of it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from tether.active import ActiveJob
from tether.errors import QueueFull, TenantQueueFull
from tether.messages import JobQueued
from tether.pace import Pace
from tether.queueing import JobQueue
from tether.records import Job, ModelKey, Waiting
from tether.roster import Roster
from tether.scheduler import Decision

ROUND_SECONDS = 2.0
"""How often those who wait are told how they moved on."""


class WaitingRoom:
    """The jobs that wait for a slot of the workers in `roster`, and how fast slots come free."""

    def __init__(self, queue: JobQueue, roster: Roster, get: Callable[[str], ActiveJob | None]) -> None:
        """`get` returns a live job by its id."""
        self.queue = queue
        self._roster = roster
        self._get = get
        self._paces: dict[ModelKey, Pace] = {}
        self._told: dict[str, Waiting] = {}

    async def run(self) -> None:
        """Tell those who wait, again and again, until cancelled."""
        while True:
            await trio.sleep(ROUND_SECONDS)
            self.tell_round()

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Say each tenant's share of the slots and of the places; one that is not there has 1."""
        self.queue.weights = weights

    # --- who may wait ------------------------------------------------------------------------------------------------

    def check_room(self, job: Job, decision: Decision) -> None:
        """Raise `QueueFull` or `TenantQueueFull` where the job, for which no slot is free, may not wait either.

        Each says when a place is likely to come free: for the tenant when its next job gets a slot, else when any job does.
        """
        model = (job.model, job.version)
        try:
            self.queue.check_room(job)
        except TenantQueueFull as exc:
            own = self.queue.next_of(model, job.tenant_id)
            seconds = self.expected_seconds(model, self.queue.place(own) if own is not None else 1)
            raise TenantQueueFull(exc.message, retry_after_seconds=seconds) from None
        except QueueFull as exc:
            message = f"{exc.message} (workers: {decision.why()})"
            seconds = self.expected_seconds(model, 1)
            raise QueueFull(message, retry_after_seconds=seconds, reasons=decision.counts()) from None

    def expect(self, job: Job, decision: Decision) -> None:
        """Keep a place for a job that is about to wait; raise as `check_room` where there is none."""
        if not self.queue.expects(job.id):
            self.check_room(job, decision)
            self.queue.expect(job)

    # --- where a job stands ------------------------------------------------------------------------------------------

    def waiting(self, job_id: str) -> Waiting | None:
        """Return where a job stands; None for one that does not wait."""
        active = self._get(job_id)
        if active is None or job_id not in self.queue:
            return None
        return self._waiting(active.model_key, self.queue.place(job_id))

    def prospect(self, job: Job, arrival: int) -> Waiting:
        """Return where a job would stand if it came now."""
        return self._waiting((job.model, job.version), self.queue.prospect(job, arrival))

    def _waiting(self, model: ModelKey, place: int) -> Waiting:
        seconds = self.expected_seconds(model, place)
        return Waiting(place, None if seconds is None else round(seconds, 1))

    def expected_seconds(self, model: ModelKey, place: int) -> float | None:
        """Return in how many seconds the job at a place is likely to get a slot; None while nobody can say."""
        pace = self._paces.get(model)
        if pace is None:
            return None
        return pace.expected_wait(place, self._roster.num_slots_of(model), trio.current_time())

    # --- what is told ------------------------------------------------------------------------------------------------

    def tell(self, active: ActiveJob) -> None:
        """Tell a job's gateways where it stands, if it waits."""
        if (waiting := self.waiting(active.job.id)) is not None:
            self._tell(active, waiting)

    def tell_round(self) -> None:
        """Tell whoever is told at once, and stands elsewhere or waits longer than was told."""
        for model in self.queue.models:
            for place, job_id in enumerate(list(self.queue.line(model)), 1):
                active = self._get(job_id)
                if active is None or not active.is_told_at_once:
                    continue
                waiting = self._waiting(model, place)
                if _differs(self._told.get(job_id), waiting):
                    self._tell(active, waiting)

    def _tell(self, active: ActiveJob, waiting: Waiting) -> None:
        self._told[active.job.id] = waiting
        seconds_left = max(0.0, active.deadline - trio.current_time())
        active.tell(JobQueued(active.job.id, waiting.place, seconds_left, waiting.expected_seconds))

    # --- how fast slots come free ------------------------------------------------------------------------------------

    def begin(self, active: ActiveJob) -> None:
        """An attempt at a job has a slot from now on."""
        self._told.pop(active.job.id, None)
        self._paces.setdefault(active.model_key, Pace()).begin(active.job.id, trio.current_time())

    def end(self, active: ActiveJob, *, counts: bool) -> None:
        """Its slot is free again; `counts` where anything ran in it."""
        self._paces[active.model_key].end(active.job.id, trio.current_time(), counts=counts)

    def forget(self, job_id: str) -> None:
        """A job has ended."""
        self._told.pop(job_id, None)
        self.queue.remove(job_id)


def _differs(told: Waiting | None, waiting: Waiting) -> bool:
    """Whether somebody should hear: another place, or a wait that became known or grew or shrank by a fifth."""
    if told is None or told.place != waiting.place:
        return True
    before, now = told.expected_seconds, waiting.expected_seconds
    if before is None or now is None:
        return before is not now
    return abs(now - before) > max(1.0, before / 5)
