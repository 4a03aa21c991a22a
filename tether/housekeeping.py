"""What an orchestrator does beside its jobs: it remembers who takes part, watches the store, and drops old texts.

None of it is on a job's way. A write that the store cannot take now is tried again at the next round, because each round
writes whole states.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import trio

from tether import __version__
from tether.audit import event_params
from tether.batch_store import BatchStore
from tether.credentials import Membership
from tether.database import Value
from tether.errors import ErrorInfo, StoreUnavailable, TetherError
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.node_key import peer_id_of
from tether.records import ModelInfo, NodeRecord, Role, WorkerState
from tether.roster import Roster, tells_news
from tether.settings import NodeSettings, OrchestratorSettings

log = logging.getLogger(__name__)

ROUND_SECONDS = 1.0
FULL_ROUND_SECONDS = 5.0
"""How often all workers and nodes are written, so that the store's `seen_at` is true to so many seconds."""
OVERDUE_SECONDS = 2.0
"""A transaction that takes longer says that the store is away, long before its deadline does."""
PURGE_SECONDS = 3600.0
UPLOAD_SECONDS = 3600.0
"""How long an upload may take; a batch's own files are made within less."""
ROWS_FOR_TEXTS = 12.0
"""Rows are kept so many times as long as texts."""


class Housekeeping:
    """Keeps the store's picture of the network true to a second or so."""

    def __init__(
        self,
        links: Links,
        ledger: Ledger,
        roster: Roster,
        *,
        boot_id: str,
        addresses: Callable[[], tuple[str, ...]],
        node: NodeSettings,
        settings: OrchestratorSettings,
    ) -> None:
        self._links = links
        self._ledger = ledger
        self._roster = roster
        self._boot_id = boot_id
        self._addresses = addresses
        self._node = node
        self._settings = settings
        self._started_at = time.time()
        self._saved: dict[str, WorkerState] = {}
        self._gateways: dict[str, tuple[NodeRecord, str]] = {}  # each with its boot
        self._up_since: dict[str, float] = {}  # by peer: when its link came up
        self._joined: dict[str, dict[str, Value]] = {}  # lines of the audit log that are not written yet, by their ids
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._changed = trio.Event()
        self._failure: ErrorInfo | None = None
        roster.on_news(self._look)
        links.on_up(self._on_up)
        links.on_down(self._on_down)

    @property
    def store_error(self) -> ErrorInfo | None:
        """Why the store could not be used when anybody tried last, or that it takes too long now; None where it can."""
        failure = self._failure or self._ledger.failure
        if failure is None and (seconds := self._ledger.busy_seconds) > OVERDUE_SECONDS:
            return StoreUnavailable(f"the store has not answered for {seconds:.0f} s").to_info()
        return failure

    async def run(self) -> None:
        """Keep house until cancelled, or until `leave`."""
        try:
            with self._scope:
                await self._keep()
        finally:
            self._stopped.set()

    async def leave(self) -> None:
        """Stop, and remember as gone this orchestrator and whom it knows; another one that knows them says otherwise."""
        self._scope.cancel()
        await self._stopped.wait()  # so that no write of its comes after these
        me, now = self._links.peer_id, time.time()
        states = (*self._saved.values(), *self._roster.states)
        workers = {(state.worker_id, state.boot_id) for state in states}
        gateways = {(node.id, boot_id) for node, boot_id in self._gateways.values()}
        gateways |= {(link.peer_id, link.boot_id) for link in self._links.with_role("gateway")}
        try:
            async with trio.open_nursery() as nursery:  # so that all of it is one transaction
                for worker_id, boot_id in workers:
                    gone = partial(self._ledger.worker_gone, orchestrator_id=me, now=now)
                    nursery.start_soon(gone, worker_id, boot_id)
                for gateway_id, boot_id in gateways:
                    nursery.start_soon(partial(self._ledger.node_gone, now=now), gateway_id, "gateway", boot_id)
                nursery.start_soon(partial(self._ledger.node_gone, now=now), me, "orchestrator", self._boot_id)
        except* TetherError as group:
            log.warning("the store does not know that this node has left: %s", group.exceptions[0])

    async def _keep(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._purge)
            full_at = float("-inf")
            while True:
                self._changed = trio.Event()  # before the look, so that no change falls between it and the wait
                full = trio.current_time() >= full_at
                if full:
                    full_at = trio.current_time() + FULL_ROUND_SECONDS
                try:
                    await self._save(full=full)
                except TetherError as exc:
                    self._failure = exc.to_info()
                    full_at = float("-inf")
                    log.debug("nothing saved: %s", exc.message)
                else:
                    self._failure = None
                # A round may have taken longer than the time between two.
                with trio.move_on_at(full_at if self._failure is None else trio.current_time() + ROUND_SECONDS):
                    await self._changed.wait()
                    await trio.sleep(ROUND_SECONDS / 5)  # several that join at once are one write

    async def _save(self, *, full: bool) -> None:
        """Write what changed since the last round, or everything."""
        me, now = self._links.peer_id, time.time()
        for gone in [state for state in self._saved.values() if self._roster.get(state.worker_id) is None]:
            await self._ledger.worker_gone(gone.worker_id, gone.boot_id, orchestrator_id=me, now=now)
            del self._saved[gone.worker_id]
        states = [s for s in self._roster.states if full or tells_news(self._saved.get(s.worker_id), s)]
        if states:
            await self._ledger.save_workers(states, orchestrator_id=me, now=now)
        served = {
            (model.name, model.version): model
            for state in states
            for model in state.models
            if model.slots and (full or not _serves(self._saved.get(state.worker_id), model))
        }
        if served:
            await self._ledger.save_models(tuple(served.values()), now=now)
        self._saved.update((state.worker_id, state) for state in states)
        await self._save_gateways(now, full=full)
        for event_id, line in list(self._joined.items()):
            await self._ledger.save_event(line)
            del self._joined[event_id]
        if full:
            await self._ledger.save_node(self._node_record(now), boot_id=self._boot_id)

    async def _save_gateways(self, now: float, *, full: bool) -> None:
        """Write who came and who has left, or everybody."""
        links = {link.peer_id: link for link in self._links.with_role("gateway")}
        for node, boot_id in list(self._gateways.values()):
            if node.id not in links or links[node.id].boot_id != boot_id:
                await self._ledger.node_gone(node.id, node.role, boot_id, now=now)
                del self._gateways[node.id]
        for link in links.values():
            known, _ = self._gateways.get(link.peer_id, (None, ""))
            if known is None or full:
                since = self._up_since.get(link.peer_id, now)
                node = _gateway_record(link, since, now)
                await self._ledger.save_node(node, boot_id=link.boot_id)
                self._gateways[link.peer_id] = (node, link.boot_id)

    async def _purge(self) -> None:
        """Drop texts after the retention time, and rows long after it."""
        while True:
            now, retention_seconds = time.time(), self._settings.retention_days * 86400
            try:
                purged = await self._ledger.read(
                    self._ledger.store.purge,
                    now=now,
                    texts_before=now - retention_seconds,
                    rows_before=now - ROWS_FOR_TEXTS * retention_seconds,
                )
                await self._ledger.read(
                    BatchStore(self._ledger.store).purge,
                    now=now,
                    files_before=now - retention_seconds,
                    parts_before=now - UPLOAD_SECONDS,
                    batches_before=now - ROWS_FOR_TEXTS * retention_seconds,
                )
            except TetherError as exc:
                log.warning("old jobs were not purged: %s", exc.message)
            else:
                if purged:
                    log.info("%d old jobs were purged", purged)
            await trio.sleep(PURGE_SECONDS)

    def _node_record(self, now: float) -> NodeRecord:
        return NodeRecord(
            id=self._links.peer_id,
            role="orchestrator",
            name=self._node.name,
            region=self._node.region,
            addresses=self._addresses(),
            version=__version__,
            started_at=self._started_at,
            seen_at=now,
        )

    def _on_up(self, link: Link) -> None:
        self._up_since[link.peer_id] = time.time()
        if link.membership is not None and link.membership.invite is not None:
            self._tell_joined(link, link.membership, link.membership.invite)
        self._look()

    def _tell_joined(self, link: Link, membership: Membership, invite: bytes) -> None:
        """Let the audit log have a line for a machine that joined, once, whichever orchestrators its processes link to.

        A machine shows its invite until its membership is renewed, which is at its first link as a rule.
        """
        machine_id, invite_id = peer_id_of(membership.machine), peer_id_of(invite)
        details = {"invite": invite_id, "roles": sorted(membership.roles)}
        event_id = f"joined {machine_id} {invite_id}"
        self._joined[event_id] = event_params(
            "machine.joined", link.name, machine_id, time.time(), details, event_id=event_id
        )

    def _on_down(self, link: Link, _reason: str) -> None:
        self._up_since.pop(link.peer_id, None)
        self._look()

    def _look(self) -> None:
        """Look at the roster soon."""
        self._changed.set()


def _serves(state: WorkerState | None, model: ModelInfo) -> bool:
    key = (model.name, model.version)
    return state is not None and any((known.name, known.version) == key for known in state.models if known.slots)


def _gateway_record(link: Link, up_since: float, now: float) -> NodeRecord:
    role: Role = "gateway"
    return NodeRecord(link.peer_id, role, link.name, link.region, link.addresses, "", up_since, now)
