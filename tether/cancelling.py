"""Cancels jobs, wherever they are: at this orchestrator, at another one, or on the way from one that is lost."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import trio

from tether.active import ActiveJob
from tether.errors import DeadlineExceeded, JobCancelled, LinkError, TetherError
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.messages import Cancel, CancelJob, Jobs
from tether.orchestrator import Orchestrator
from tether.tasks import start_if_open

log = logging.getLogger(__name__)

WAIT_SECONDS = 15.0
"""How long it is remembered that a client left whose gateway had lost its job's orchestrator, should that be lost here too."""
MAX_WAITING = 1000
"""Jobs of which that is remembered; further ones run to their ends."""


class _Waiting(NamedTuple):
    """A job that could not be cancelled because somebody else holds it."""

    holder_id: str
    gateway: Link
    cancel: Cancel
    until: float
    """How long that counts, by this process's clock."""


class Cancelling:
    """Cancels jobs for clients that left, for operators, and for batches that end."""

    def __init__(self, links: Links, ledger: Ledger, orchestrator: Orchestrator) -> None:
        self._links = links
        self._ledger = ledger
        self._orchestrator = orchestrator
        self._nursery: trio.Nursery
        self._waiting: list[_Waiting] = []
        links.on(Cancel, self._on_cancel)
        links.on_down(self._on_down)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Cancel what gateways ask for, until cancelled itself."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def end(self, job_id: str, reason: str) -> bool:
        """End a live job as cancelled, wherever it is; return once that is written.

        False where it could not be, or the job ended or went on elsewhere meanwhile: who must know looks again. Raises what
        the ledger raises.
        """
        if await self._end_here(job_id, reason) or await self._end_abandoned(job_id, reason):
            return True
        if await self._end_here(job_id, reason):  # it was taken up a moment ago
            return True
        held = await self._ledger.read(self._ledger.store.held_job, job_id)
        link = self._links.get(held.orchestrator_id) if held is not None else None
        if link is None or link.peer_id == self._links.peer_id:
            return False
        try:
            answer = await self._links.ask(link, lambda number: CancelJob(number, job_id, reason=reason), Jobs)
        except (LinkError, DeadlineExceeded) as exc:
            log.info("job %s is not cancelled at %s: %s", job_id, link.name, exc.message, extra={"job_id": job_id})
            return False
        return answer.error is None

    async def _end_here(self, job_id: str, reason: str) -> bool:
        """End a job that is live here; False where it is not, or went on elsewhere before it heard of that."""
        if (active := self._orchestrator.get(job_id)) is None:
            return False
        self._orchestrator.cancel(active, reason)
        await active.done.wait()
        return active.end is not None

    def _on_cancel(self, link: Link, cancel: Cancel) -> None:
        active = self._orchestrator.get(cancel.job_id)
        if active is None:
            start_if_open(self._nursery, self._cancel_abandoned, link, cancel)
        elif active.gateway_id in {None, link.peer_id}:  # else another gateway has it by now
            self._orchestrator.cancel(active, cancel.reason)
            start_if_open(self._nursery, self._see_it_end, active, cancel)

    async def _see_it_end(self, active: ActiveJob, cancel: Cancel) -> None:
        """Cancel a job wherever it goes that was on its way from here when its client left."""
        await active.done.wait()
        if active.end is not None:
            return
        try:
            await self.end(cancel.job_id, cancel.reason)
        except TetherError as exc:
            log.warning("job %s is not cancelled: %s", cancel.job_id, exc.message, extra={"job_id": cancel.job_id})

    async def _cancel_abandoned(self, link: Link, cancel: Cancel) -> None:
        job_id = cancel.job_id
        try:
            if await self._end_abandoned(job_id, cancel.reason):
                return
            held = await self._ledger.read(self._ledger.store.held_job, job_id)
        except TetherError as exc:
            log.warning("job %s is not cancelled: %s", job_id, exc.message, extra={"job_id": job_id})
            return
        if self._orchestrator.get(job_id) is not None:  # it was taken up meanwhile
            self._on_cancel(link, cancel)
        elif held is not None:
            self._wait_for_loss(_Waiting(held.orchestrator_id, link, cancel, trio.current_time() + WAIT_SECONDS))

    def _wait_for_loss(self, waiting: _Waiting) -> None:
        """Remember a job whose gateway has lost its holder, which may be about to be lost from here too."""
        now = trio.current_time()
        self._waiting = [each for each in self._waiting if each.until > now]
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(waiting)

    def _on_down(self, link: Link, _reason: str) -> None:
        now = trio.current_time()
        for each in [each for each in self._waiting if each.holder_id == link.peer_id]:
            self._waiting.remove(each)
            if each.until > now:
                start_if_open(self._nursery, self._cancel_abandoned, each.gateway, each.cancel)

    async def _end_abandoned(self, job_id: str, reason: str) -> bool:
        """End a job as cancelled that its orchestrator gave away, or that is not there; False for one that is, or went on.

        One that is only cut off from here finds out that the job has ended, and stops it; so does this one, for a job that
        it is about to take up.
        """
        held = await self._ledger.read(self._ledger.store.held_job, job_id)
        if held is None or self._orchestrator.get(job_id) is not None:
            return False
        is_given_away = held.orchestrator_boot == ""
        is_elsewhere = held.orchestrator_id != self._links.peer_id and self._links.get(held.orchestrator_id) is not None
        if is_elsewhere and not is_given_away:
            return False
        return await self._ledger.finish(
            job_id,
            held.attempt,
            status="cancelled",
            finish_reason="cancelled",
            error=JobCancelled(f"the job was cancelled: {reason}, when no orchestrator had it").to_info(),
            holder=(held.orchestrator_id, held.orchestrator_boot),
            now=time.time(),
        )
