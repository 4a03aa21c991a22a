"""The live view of the workers: who has a link here, what each said last, which slots are given away.

An orchestrator's own counts are exact for its own jobs; what a worker runs for others it says itself, and the store's
reservation decides between orchestrators that both see the same free slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import msgspec
import trio

from tether import messages, scheduler
from tether.active import ActiveJob
from tether.errors import ProtocolViolation
from tether.link import Link
from tether.messages import Presence, Signed
from tether.node_key import verify
from tether.records import Job, ModelKey, WorkerState
from tether.scheduler import Decision, WorkerView

FAILURES_KEPT = 20
MAX_REMEMBERED = 1000
"""How many workers without a link are remembered for their failures, and how many models for having been served."""
FIRST_BUSY_SECONDS = 0.2
LAST_BUSY_SECONDS = 5.0
"""A worker that says busy is left alone for the one, and while it keeps saying so for longer, up to the other."""


class Entry:
    """A worker with a link."""

    def __init__(self, link: Link, state: WorkerState, signed: Signed) -> None:
        self.link = link
        self.signed = signed
        """Its newest state as it signed it, to be told to others."""
        self.view = WorkerView(state, assigned={})
        self.failures: deque[float] = deque(maxlen=FAILURES_KEPT)
        self.busy_until = float("-inf")
        self.busy_seconds = FIRST_BUSY_SECONDS

    @property
    def state(self) -> WorkerState:
        """What the worker said last."""
        return self.view.state

    @property
    def boot(self) -> tuple[str, str]:
        """The worker and which start of it."""
        return self.state.worker_id, self.state.boot_id

    @property
    def num_slots(self) -> int:
        """How many jobs it runs at once, all models together."""
        return sum(model.slots for model in self.state.models)


class Roster:
    """The workers that have a link to this orchestrator, `my_id`."""

    def __init__(self, my_id: str) -> None:
        self._my_id = my_id
        self._entries: dict[str, Entry] = {}
        self._serving: dict[ModelKey, dict[str, Entry]] = {}
        self._failures: dict[str, deque[float]] = {}
        self._drained: frozenset[str] = frozenset()
        self._marked: set[Entry] = set()  # those whose views change with time: few, of many
        self._num_slots = 0
        self._known_models: dict[str, None] = {}
        self._on_news: list[Callable[[], None]] = []

    def on_news(self, callback: Callable[[], None]) -> None:
        """Call `callback` when a worker tells something that others should soon know."""
        self._on_news.append(callback)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, worker_id: str | None) -> Entry | None:
        """Return the worker, or None when it has no link here."""
        return self._entries.get(worker_id) if worker_id is not None else None

    @property
    def states(self) -> list[WorkerState]:
        """What each worker said last; one that an operator drained is draining, whatever it says."""
        return [
            msgspec.structs.replace(entry.state, draining=True) if entry.view.drained else entry.state
            for entry in self._entries.values()
        ]

    @property
    def num_slots(self) -> int:
        """All slots of all workers."""
        return self._num_slots

    @property
    def known_models(self) -> Collection[str]:
        """The models that were served lately, now or not."""
        return self._known_models.keys()

    def remember_models(self, names: Iterable[str]) -> None:
        """Know these models as served; of more than `MAX_REMEMBERED` those that were said last."""
        for name in names:
            self._known_models.pop(name, None)
            self._known_models[name] = None
        while len(self._known_models) > MAX_REMEMBERED:
            del self._known_models[next(iter(self._known_models))]

    def num_slots_of(self, model: ModelKey) -> int:
        """Return the slots of a model that this orchestrator has for its jobs: those that take jobs, without others' jobs."""
        return sum(
            max(0, served.slots - entry.view.num_elsewhere)
            for entry in self._serving.get(model, {}).values()
            if entry.view.takes_jobs
            for served in entry.state.models
            if (served.name, served.version) == model
        )

    def hear(self, link: Link, presence: Presence) -> WorkerState | None:
        """Take a worker's state in; return the one before, or None where this is its first on this link.

        Raises `ProtocolViolation` when it is not the worker's own. A state that is older than the known one changes
        nothing.
        """
        state = messages.decode_state(presence.state.payload)
        if verify(presence.state) != link.peer_id or state.worker_id != link.peer_id:
            raise ProtocolViolation("a worker's state must be signed by the worker itself")
        entry = self._entries.get(link.peer_id)
        if entry is None:
            entry = self._entries[link.peer_id] = Entry(link, state, presence.state)
            entry.failures = self._failures.pop(link.peer_id, entry.failures)
            entry.view.drained = link.peer_id in self._drained
            if entry.failures:
                self._marked.add(entry)
            self._num_slots += entry.num_slots
            before = None
        else:
            before = entry.state
            if state.boot_id == before.boot_id and state.sequence <= before.sequence:
                return before
        self._index(entry, state)
        self._num_slots -= entry.num_slots
        entry.view.state = state
        self._num_slots += entry.num_slots
        entry.view.num_elsewhere = sum(count for holder, count in state.held.items() if holder != self._my_id)
        entry.signed = presence.state
        self.remember_models(model.name for model in state.models)
        has_news = tells_news(before, state)
        if has_news or (before is not None and state.running < before.running):
            entry.busy_until = float("-inf")
        if has_news:
            for callback in self._on_news:
                callback()
        return before

    def set_drained(self, worker_ids: Collection[str]) -> None:
        """Say which workers an operator keeps jobs from, here or not."""
        if self._drained == set(worker_ids):
            return
        self._drained = frozenset(worker_ids)
        for entry in self._entries.values():
            entry.view.drained = entry.link.peer_id in self._drained
        for callback in self._on_news:
            callback()

    def remove(self, link: Link) -> Entry | None:
        """Forget the worker whose link is down, but for its failures; None where this link brought none."""
        entry = self._entries.get(link.peer_id)
        if entry is None or entry.link is not link:
            return None
        del self._entries[link.peer_id]
        self._index(entry, None)
        self._num_slots -= entry.num_slots
        self._marked.discard(entry)
        if entry.failures:
            self._remember(link.peer_id, entry.failures)
        return entry

    def best(self, active: ActiveJob) -> str | None:
        """Decide who is to run the job now; None when nobody can."""
        serving = self._serving.get(active.model_key)
        if not serving:
            return None
        return scheduler.best(active.job, self._views(serving), tried=active.tried, like=active.like)

    def choose(self, job: Job, tried: frozenset[tuple[str, str]] = frozenset()) -> Decision:
        """Decide who could run the job now, with every worker's reason; `tried` are the boots that failed at it."""
        return scheduler.choose(job, self.views(), tried=tried)

    def views(self) -> list[WorkerView]:
        """Return every worker as the scheduler sees it now."""
        return self._views(self._entries)

    def assign(self, active: ActiveJob, worker_id: str) -> Entry:
        """Give one of the worker's slots to the job."""
        entry = active.slot = self._entries[worker_id]
        entry.view.assigned[active.model_key] = entry.view.assigned.get(active.model_key, 0) + 1
        return entry

    def release(self, active: ActiveJob) -> bool:
        """Take the job's slot back; return whether it had one."""
        entry, active.slot = active.slot, None
        if entry is not None:
            entry.view.assigned[active.model_key] -= 1
        return entry is not None

    def mark_busy(self, entry: Entry) -> float | None:
        """Ask this worker nothing for a while, which grows while it is busy again and again.

        Returns the seconds, or None where it is left alone already. A state that says of more room ends the while.
        """
        now = trio.current_time()
        if now < entry.busy_until:
            return None
        seconds = entry.busy_seconds
        entry.busy_until = now + seconds
        self._mark(entry)
        entry.busy_seconds = min(2 * seconds, LAST_BUSY_SECONDS)
        return seconds

    def mark_taken(self, entry: Entry) -> None:
        """The worker has taken a job: the next time that it is busy is the first."""
        entry.busy_seconds = FIRST_BUSY_SECONDS

    def mark_failed(self, entry: Entry) -> None:
        """Count a failure against this worker, whether its link is up or not; it fades."""
        worker_id = entry.link.peer_id
        current = self._entries.get(worker_id)
        if current is not None:
            current.failures.append(trio.current_time())
            self._mark(current)
        else:
            entry.failures.append(trio.current_time())
            self._remember(worker_id, entry.failures)

    def _remember(self, worker_id: str, failures: deque[float]) -> None:
        self._failures.pop(worker_id, None)
        self._failures[worker_id] = failures
        while len(self._failures) > MAX_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def _index(self, entry: Entry, state: WorkerState | None) -> None:
        """Keep who serves which model, for a state that replaces the entry's, or for an entry that goes."""
        worker_id = entry.link.peer_id
        before = {(model.name, model.version) for model in entry.state.models}
        after = {(model.name, model.version) for model in state.models} if state is not None else set()
        for key in before - after:
            self._serving.get(key, {}).pop(worker_id, None)
            if not self._serving.get(key):
                self._serving.pop(key, None)
        for key in after:
            self._serving.setdefault(key, {})[worker_id] = entry

    def _mark(self, entry: Entry) -> None:
        if self._entries.get(entry.link.peer_id) is entry:
            self._marked.add(entry)

    def _views(self, entries: dict[str, Entry]) -> list[WorkerView]:
        now = trio.current_time() if self._marked else 0.0
        for entry in list(self._marked):
            view = entry.view
            view.recent_failures = scheduler.fade(now - at for at in entry.failures)
            view.busy = now < entry.busy_until
            if not view.busy and not view.recent_failures:
                self._marked.discard(entry)
        return [entry.view for entry in entries.values()]


def tells_news(before: WorkerState | None, state: WorkerState) -> bool:
    """Whether the store should hear of this state at once: more than the count of running jobs and speeds changed."""
    if before is None:
        return True

    def lasting(of: WorkerState) -> WorkerState:
        models = tuple(
            msgspec.structs.replace(
                model, tokens_per_second=0.0, time_to_first_token_seconds=0.0, free_kv_tokens=None, num_waiting=0
            )
            for model in of.models
        )
        return msgspec.structs.replace(of, sequence=0, sent_at=0.0, running=0, held={}, models=models)

    return lasting(before) != lasting(state)
