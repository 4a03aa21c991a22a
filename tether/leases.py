"""Leases: this orchestrator's is renewed, the others' are watched, and the jobs of one that is lost are taken over.

A lease is a count in the store that its orchestrator moves. Another one judges it against its own clock, so that no two
clocks are compared, and takes each job with one compare-and-set, so that of several one gets it. An orchestrator that was
cut off for so long finds out here, or at its next write, that its jobs are others' now, and lets go of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import trio

from tether.errors import StoreUnavailable, TetherError
from tether.ledger import Ledger
from tether.links import Links
from tether.orchestrator import Orchestrator
from tether.records import LIVE
from tether.roster import Roster
from tether.stored import HeldJob, Lease

log = logging.getLogger(__name__)

ROUND_SECONDS = 2.0
LEASE_SECONDS = 10.0
"""An orchestrator whose lease has not moved for so long, by this process's own clock, is taken for dead: longer than an
election of the store's leader. A client that waits is not kept so long; its gateway brings its job elsewhere at once."""


class LeaseWatch:
    """Sees which orchestrators' leases stand still, as long as it looks every few seconds."""

    def __init__(self) -> None:
        self._began_at = self._looked_at = 0.0
        self._moved: dict[str, tuple[Lease, float]] = {}

    def look(self, leases: Iterable[Lease], now: float) -> None:
        """Take in the leases as they are in the store at a time of this process's own clock."""
        if now - self._looked_at > LEASE_SECONDS / 2:
            self.forget()  # this process was stopped, or the store was away: who moved meanwhile cannot be said
        if not self._moved:
            self._began_at = now
        self._looked_at = now
        for lease in leases:
            if self._moved.get(lease.orchestrator_id, (None, 0.0))[0] != lease:
                self._moved[lease.orchestrator_id] = (lease, now)

    def forget(self) -> None:
        """Begin anew: while the store is away nobody's lease moves."""
        self._moved.clear()

    def is_still(self, orchestrator_id: str) -> bool:
        """Whether an orchestrator's lease, or its absence, was seen for `LEASE_SECONDS` without a change."""
        _, since = self._moved.get(orchestrator_id, (None, self._began_at))
        return bool(self._moved) and self._looked_at - since >= LEASE_SECONDS


class Leases:
    """Keeps this orchestrator's lease alive, and takes over what those that are lost have left."""

    def __init__(
        self,
        links: Links,
        ledger: Ledger,
        orchestrator: Orchestrator,
        roster: Roster,
        *,
        boot_id: str,
        grace_seconds: float,
    ) -> None:
        """`grace_seconds`: how long the jobs of a worker that an operator drained may go on there."""
        self._me, self._boot_id = self._holder = links.peer_id, boot_id
        self._ledger = ledger
        self._orchestrator = orchestrator
        self._roster = roster
        self._grace_seconds = grace_seconds
        self._watch = LeaseWatch()
        self._drained: dict[str, float] = {}  # workers, and until when their jobs may go on
        self._unknown: set[str] = set()  # jobs that the ledger gave to this boot at the last look, and nobody here knew
        self._scope = trio.CancelScope()

    def is_dead(self, orchestrator_id: str) -> bool:
        """Whether another orchestrator is taken for dead: its lease has stood still for `LEASE_SECONDS`."""
        return orchestrator_id != self._me and self._watch.is_still(orchestrator_id)

    async def run(self) -> None:
        """Renew and watch until cancelled, or until `stop`."""
        with self._scope:
            while True:
                try:
                    await self._round()
                except StoreUnavailable as exc:
                    self._watch.forget()
                    log.debug("the lease is not renewed: %s", exc.message)
                except TetherError as exc:
                    log.warning("the leases were not looked at: %s", exc.message)
                await trio.sleep(ROUND_SECONDS)

    def stop(self) -> None:
        """Take over nothing more."""
        self._scope.cancel()

    async def _round(self) -> None:
        store = self._ledger.store
        await self._ledger.renew_lease(self._me, self._boot_id, now=time.time())
        leases = await self._ledger.read(store.leases)
        self._watch.look(leases, trio.current_time())
        self._drain_workers(set(await self._ledger.read(store.drained_workers)))
        await self._compare()
        boots = {lease.orchestrator_id: lease.orchestrator_boot for lease in leases}
        for orchestrator_id, boot in await self._ledger.read(store.holders):
            if self._is_orphan(orchestrator_id, boot, boots):
                await self._take_over(orchestrator_id, boot)

    def _is_orphan(self, orchestrator_id: str, boot: str, boots: dict[str, str]) -> bool:
        """Whether nobody looks after what this boot holds: given away, left in good order, or dead."""
        if orchestrator_id == self._me:
            # What an earlier boot had was taken up at the start; a write of it may have come to the store after that.
            return boot != self._boot_id
        return boot == "" or self.is_dead(orchestrator_id) or boots.get(orchestrator_id) == ""

    async def _take_over(self, orchestrator_id: str, boot: str) -> None:
        """Take jobs of a boot, some at a time, so that this orchestrator's own lease is renewed between."""
        held = await self._ledger.read(self._ledger.store.held_jobs, orchestrator_id, boot)
        async with trio.open_nursery() as nursery:  # so that they are one transaction
            for job in held:
                nursery.start_soon(self._take_one, job)

    async def _take_one(self, job: HeldJob) -> None:
        """Go on with a job that its orchestrator has lost, or gave away, unless somebody else is faster."""
        if self._orchestrator.is_draining or self._orchestrator.get(job.id) is not None:
            return
        me, boot = self._holder
        try:
            if await self._ledger.take_over(
                job.id,
                holder=(job.orchestrator_id, job.orchestrator_boot),
                orchestrator_id=me,
                orchestrator_boot=boot,
                now=time.time(),
            ):
                await self._take_up(job.id, "it is taken over from an orchestrator that is lost")
        except TetherError as exc:
            log.warning("job %s is not taken over yet: %s", job.id, exc.message, extra={"job_id": job.id})

    async def _take_up(self, job_id: str, why: str) -> None:
        """Go on with a job that the ledger has as held here, unless it has ended or came to be known meanwhile."""
        record = await self._ledger.read(self._ledger.store.job, job_id)
        if record is not None and record.status in LIVE and self._orchestrator.get(job_id) is None:
            log.info("job %s goes on here: %s", job_id, why, extra={"job_id": job_id})
            self._orchestrator.take_up(record, time.time())

    async def _compare(self) -> None:
        """Compare what this boot holds with the ledger: stop what others have taken, take up what nobody here knows.

        A write whose answer was lost may come to the store after it was given up, from a host that was frozen meanwhile. A
        job that is ended between the ledger's answer and the look at it is not held at the next round any more.
        """
        believed = self._orchestrator.live_ids
        held = await self._ledger.read(self._ledger.store.held_job_ids, self._me, self._boot_id)
        for job_id in believed - held:
            self._orchestrator.give_up(job_id)
        unknown = {job_id for job_id in held if self._orchestrator.get(job_id) is None}
        for job_id in unknown & self._unknown:
            await self._reclaim(job_id)
        self._unknown = unknown

    async def _reclaim(self, job_id: str) -> None:
        """Settle a job that this boot holds by the ledger and does not know.

        It ends as its client was told, or goes on: what was written by a request that was given up, and what a story left
        behind that broke off.
        """
        record = await self._ledger.read(self._ledger.store.job, job_id)
        if record is None or record.status not in LIVE or self._orchestrator.get(job_id) is not None:
            return
        if await self._orchestrator.finish_as_told(record):
            return
        if record.status == "queued" or await self._ledger.requeue(
            job_id, record.attempt, status="lost", holder=self._holder, now=time.time()
        ):
            await self._take_up(job_id, "the ledger has it as held here")

    def _drain_workers(self, drained: set[str]) -> None:
        """Keep jobs from the workers that an operator drained; what runs there has a while to end."""
        self._roster.set_drained(drained)
        now = trio.current_time()
        self._drained = {each: self._drained.get(each, now + self._grace_seconds) for each in drained}
        for worker_id, until in self._drained.items():
            if now >= until:
                self._orchestrator.displace(worker_id)
