"""The jobs that wait for a slot: whose turn is next, which place each has, who may still come. Pure.

A line for each model, in which the tenants take turns by their weights; and one room for all lines, in which a tenant may
have only its share of the places.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec

from tether.errors import QueueFull, TenantQueueFull
from tether.records import Job, ModelKey
from tether.room import Room

BACKGROUND_PRIORITY = -1000
"""A job of about this priority, far below what a client can ask for, stands behind everybody else's."""
_LOWEST_PRIORITY = -100

_LineKey = tuple[ModelKey, bool]
"""A model, and whether the line is of its jobs in the background."""


def is_background(job: Job) -> bool:
    """Whether a job runs only while nobody else's waits."""
    return job.priority < _LOWEST_PRIORITY


class QueueEntry(msgspec.Struct, frozen=True, order=True):
    """A waiting job's place among its tenant's: higher priority first, then first come."""

    negative_priority: int
    arrival: int
    job_id: str


class _Share:
    """A tenant's jobs in a line, and how much of the line's slots it has had."""

    __slots__ = ("entries", "since", "start", "step")

    def __init__(self, start: float, since: int, step: float) -> None:
        self.start = start
        """The virtual time at which its next job is due."""
        self.since = since
        """When it began to wait, to tell equals apart."""
        self.step = step
        """How much later each further job of it is due: one by its weight."""
        self.entries: list[QueueEntry] = []

    def due(self, index: int) -> tuple[float, int]:
        """Return when its job number `index` (0 is the next) is due, as something to order by."""
        return self.start + index * self.step, self.since

    def num_before(self, due: tuple[float, int]) -> int:
        """Return how many of its jobs are due before `due`."""
        low, high = 0, len(self.entries)
        while low < high:
            middle = (low + high) // 2
            if self.due(middle) < due:
                low = middle + 1
            else:
                high = middle
        return low


class _Line:
    """The jobs that wait for one model: tenants take turns by their weights, start-time fair queueing (Goyal, 1996)."""

    def __init__(self) -> None:
        self.shares: dict[str, _Share] = {}
        self._had: dict[str, float] = {}  # where tenants stood that have no job waiting, and were ahead of the others
        self._num_come = 0

    def add(self, tenant_id: str, entry: QueueEntry, weight: float) -> None:
        """Let a job wait. A tenant that comes anew gets no credit for the time in which it did not wait."""
        if (share := self.shares.get(tenant_id)) is None:
            share = self._new_share(tenant_id, weight)
            self._num_come += 1
            self._had.pop(tenant_id, None)
            now = min((each.start for each in self.shares.values()), default=0.0)
            self._had = {tenant: start for tenant, start in self._had.items() if start > now}
            self.shares[tenant_id] = share
        share.step = 1 / weight
        bisect.insort(share.entries, entry)

    def prospect(self, tenant_id: str, entry: QueueEntry, weight: float) -> int:
        """Return the place that a job would have if it were added now."""
        own = self.shares.get(tenant_id) or self._new_share(tenant_id, weight)
        index = bisect.bisect_left(own.entries, entry)
        due = _Share(own.start, own.since, 1 / weight).due(index)
        return 1 + index + sum(each.num_before(due) for each in self.shares.values() if each is not own)

    def _new_share(self, tenant_id: str, weight: float) -> _Share:
        """Return a share for a tenant that has no job waiting."""
        now = min((each.start for each in self.shares.values()), default=0.0)
        return _Share(max(now, self._had.get(tenant_id, now)), self._num_come + 1, 1 / weight)

    def remove(self, tenant_id: str, entry: QueueEntry) -> None:
        """Take a job out."""
        share = self.shares[tenant_id]
        del share.entries[bisect.bisect_left(share.entries, entry)]
        if not share.entries:
            del self.shares[tenant_id]
            self._had[tenant_id] = share.start

    def charge(self, tenant_id: str) -> None:
        """Count a slot that a tenant got."""
        share = self.shares[tenant_id]
        share.start += share.step

    def place(self, tenant_id: str, entry: QueueEntry) -> int:
        """Return a job's place, 1 being next."""
        own = self.shares[tenant_id]
        index = bisect.bisect_left(own.entries, entry)
        due = own.due(index)
        return 1 + index + sum(each.num_before(due) for each in self.shares.values() if each is not own)

    @property
    def num_jobs(self) -> int:
        """How many jobs wait."""
        return sum(len(share.entries) for share in self.shares.values())

    def order(self) -> Iterator[str]:
        """Yield the ids, next one first, as they stand now."""
        heads = [
            (share.start, share.since, 0, share.start, share.step, list(share.entries))
            for share in self.shares.values()
        ]
        heapq.heapify(heads)
        while heads:
            _, since, index, start, step, entries = heads[0]
            yield entries[index].job_id
            index += 1
            if index == len(entries):
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (start + index * step, since, index, start, step, entries))


class JobQueue:
    """The jobs that wait for a slot, in a line for each model, in the order in which they will be served; bounded.

    In a line the tenants take turns, one with twice the weight twice as often, however many jobs each has; a tenant's own
    jobs stand by priority and then by arrival. Behind each line stands another one, of the jobs in the background. All lines together have `max_queued` places, which `Room` shares among the
    tenants, with `max_per_tenant` as a further bound for each.
    """

    def __init__(self, max_queued: int, max_per_tenant: int | None = None) -> None:
        self._room = Room(max_queued, max_per_tenant)
        self.weights: Mapping[str, float] = {}
        """Each tenant's share; one that is not there has 1."""
        self._lines: dict[_LineKey, _Line] = {}
        self._by_id: dict[str, tuple[_LineKey, str, QueueEntry]] = {}
        self._expected: dict[str, str] = {}
        self._charged: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._by_id

    @property
    def models(self) -> list[ModelKey]:
        """The models that jobs wait for."""
        return list(dict.fromkeys(model for model, _ in self._lines))

    def line(self, model: ModelKey) -> Iterator[str]:
        """Yield the ids of the jobs that wait for a model, next one first; the line may change meanwhile."""
        return itertools.chain.from_iterable(line.order() for line in self._lines_of(model))

    def waiting(self, model: ModelKey) -> dict[str, int]:
        """Return how many jobs wait for a model, by tenant."""
        found: Counter[str] = Counter()
        for line in self._lines_of(model):
            found.update({tenant: len(share.entries) for tenant, share in line.shares.items()})
        return dict(found)

    def next_of(self, model: ModelKey, tenant_id: str) -> str | None:
        """Return the job of a tenant that is next among its own; None where it has none in the line."""
        shares = (line.shares.get(tenant_id) for line in self._lines_of(model))
        return next((share.entries[0].job_id for share in shares if share is not None), None)

    def _lines_of(self, model: ModelKey) -> list[_Line]:
        """Return a model's lines, the one in the background last."""
        return [line for back in (False, True) if (line := self._lines.get((model, back))) is not None]

    def check_room(self, job: Job) -> None:
        """Raise `QueueFull` when nobody's job may wait beside those that do, `TenantQueueFull` when its tenant's may not."""
        tenant_id = job.tenant_id
        match self._room.why_not(tenant_id, self.weights.get(tenant_id, 1.0)):
            case "full":
                raise QueueFull(f"{len(self._room)} jobs wait already, which is all that may; try again soon")
            case "share":
                raise TenantQueueFull(
                    f"{self._room.taken_by(tenant_id)} jobs of this tenant wait already, which is its share of the queue; "
                    "let some of them end first"
                )
            case None:
                return

    def expect(self, job: Job) -> None:
        """Keep a place for a job that is about to wait, until `push` or `remove`."""
        self._take_out(job.id)
        self._expected[job.id] = job.tenant_id
        self._room.take(job.tenant_id)

    def expects(self, job_id: str) -> bool:
        """Whether a place is kept for a job."""
        return job_id in self._expected

    def push(self, job: Job, arrival: int) -> int:
        """Let the job wait; return its place, 1 being next. A job that was accepted before is never turned away.

        `arrival` is its number in the order of coming: a job that comes back stands where it stood among its tenant's.
        """
        self._take_out(job.id)
        key, entry = self._entry(job, arrival)
        self._lines.setdefault(key, _Line()).add(job.tenant_id, entry, self.weights.get(job.tenant_id, 1.0))
        self._by_id[job.id] = key, job.tenant_id, entry
        self._room.take(job.tenant_id)
        return self.place(job.id)

    def prospect(self, job: Job, arrival: int) -> int:
        """Return the place that `push` would give the job, which does not wait."""
        key, entry = self._entry(job, arrival)
        line = self._lines.get(key) or _Line()
        return line.prospect(job.tenant_id, entry, self.weights.get(job.tenant_id, 1.0)) + self._num_ahead(key)

    def _num_ahead(self, key: _LineKey) -> int:
        """Return how many jobs of other lines go before a line."""
        model, background = key
        ahead = self._lines.get((model, False)) if background else None
        return ahead.num_jobs if ahead is not None else 0

    def _entry(self, job: Job, arrival: int) -> tuple[_LineKey, QueueEntry]:
        return ((job.model, job.version), is_background(job)), QueueEntry(-job.priority, arrival, job.id)

    def place(self, job_id: str) -> int:
        """Return the job's place among those that wait for the same model, 1 being next."""
        key, tenant_id, entry = self._by_id[job_id]
        return self._lines[key].place(tenant_id, entry) + self._num_ahead(key)

    def take(self, job_id: str) -> None:
        """Take the job out because it gets a slot, which counts for its tenant; once, however often it comes back."""
        if job_id not in self._charged:
            key, tenant_id, _ = self._by_id[job_id]
            self._lines[key].charge(tenant_id)
            self._charged.add(job_id)
        self._take_out(job_id)

    def remove(self, job_id: str) -> None:
        """Take the job out for good; a job that does not wait is left alone."""
        self._charged.discard(job_id)
        self._take_out(job_id)

    def _take_out(self, job_id: str) -> None:
        if (tenant_id := self._expected.pop(job_id, None)) is not None:
            self._room.leave(tenant_id)
        if (found := self._by_id.pop(job_id, None)) is None:
            return
        key, tenant_id, entry = found
        self._room.leave(tenant_id)
        line = self._lines[key]
        line.remove(tenant_id, entry)
        if not line.shares:
            del self._lines[key]
