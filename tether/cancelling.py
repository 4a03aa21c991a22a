"""Cancels jobs, wherever they are: at this orchestrator, at another one, or on the way from one that is lost."""

from __future__ import annotations

import logging
import time

import trio

from tether.errors import DeadlineExceeded, JobCancelled, LinkError, TetherError
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.messages import Cancel, CancelJob, Jobs
from tether.orchestrator import Orchestrator
from tether.tasks import start_if_open

log = logging.getLogger(__name__)


class Cancelling:
    """Cancels jobs for clients that left, for operators, and for batches that end."""

    def __init__(self, links: Links, ledger: Ledger, orchestrator: Orchestrator) -> None:
        self._links = links
        self._ledger = ledger
        self._orchestrator = orchestrator
        self._nursery: trio.Nursery
        links.on(Cancel, self._on_cancel)

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
        if self._orchestrator.get(job_id) is None and await self._end_abandoned(job_id, reason):
            return True
        if (active := self._orchestrator.get(job_id)) is not None:  # perhaps since a moment ago
            self._orchestrator.cancel(active, reason)
            await active.done.wait()
            return active.end is not None
        held = await self._ledger.read(self._ledger.store.held_job, job_id)
        link = self._links.get(held.orchestrator_id) if held is not None else None
        if link is None or link.peer_id == self._links.peer_id:
            return False
        try:
            answer = await self._links.ask(link, lambda request_id: CancelJob(request_id, job_id), Jobs)
        except (LinkError, DeadlineExceeded) as exc:
            log.info("job %s is not cancelled at %s: %s", job_id, link.name, exc.message, extra={"job_id": job_id})
            return False
        return answer.error is None

    def _on_cancel(self, link: Link, cancel: Cancel) -> None:
        if not self._cancel_here(link, cancel):
            start_if_open(self._nursery, self._cancel_abandoned, link, cancel)

    def _cancel_here(self, link: Link, cancel: Cancel) -> bool:
        """Cancel a job that is live here, unless another gateway has it by now; False where it is not live here."""
        if (active := self._orchestrator.get(cancel.job_id)) is None:
            return False
        if active.gateway_id in {None, link.peer_id}:
            self._orchestrator.cancel(active, cancel.reason)
        return True

    async def _cancel_abandoned(self, link: Link, cancel: Cancel) -> None:
        try:
            if not await self._end_abandoned(cancel.job_id, cancel.reason):
                self._cancel_here(link, cancel)  # it may have been taken up meanwhile
        except TetherError as exc:
            log.warning("job %s is not cancelled: %s", cancel.job_id, exc.message, extra={"job_id": cancel.job_id})

    async def _end_abandoned(self, job_id: str, reason: str) -> bool:
        """End a job as cancelled whose orchestrator is not there; False where it is, or the job went on meanwhile.

        One that is only cut off from here finds out that the job has ended, and stops it; so does this one, for a job that
        it is about to take up.
        """
        held = await self._ledger.read(self._ledger.store.held_job, job_id)
        if held is None or self._orchestrator.get(job_id) is not None:
            return False
        if held.orchestrator_id != self._links.peer_id and self._links.get(held.orchestrator_id) is not None:
            return False
        return await self._ledger.finish(
            job_id,
            held.attempt,
            status="cancelled",
            finish_reason="cancelled",
            error=JobCancelled(f"the job was cancelled: {reason}, after its orchestrator was lost").to_info(),
            holder=(held.orchestrator_id, held.orchestrator_boot),
            now=time.time(),
        )
