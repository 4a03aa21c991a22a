"""The composition root: builds every part of a node, starts them in the order in which they need each other, stops them.

A node is one process with one key, one transport and one set of links; its roles share them, and what they say to each
other goes over the link to oneself. Nothing here decides anything.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import trio

from tether import catalog, open_files
from tether.address_book import AddressBook
from tether.batch_inquiries import BatchInquiries
from tether.batch_store import Holder
from tether.batches import Batches
from tether.cancelling import Cancelling
from tether.catalog import ModelSpec
from tether.data_dir import prepare_data_dir
from tether.deserted import Deserted
from tether.dialling import Dialler
from tether.errors import TetherError
from tether.housekeeping import Housekeeping
from tether.identity import Identity
from tether.inquiries import Inquiries
from tether.leases import Leases
from tether.ledger import Ledger
from tether.link import LinkSettings
from tether.links import Links
from tether.machine import Machine
from tether.messages import ControlNews, Signed
from tether.network import open_network
from tether.news import Broadcaster, Listener
from tether.node_key import NodeKey, claim_slot, sign
from tether.orchestrator import Orchestrator
from tether.records import Role, WorkerState
from tether.roster import Roster
from tether.runtime_messages import Loading
from tether.settings import NodeSettings, OrchestratorSettings, WorkerSettings
from tether.store import open_store
from tether.submissions import Submissions
from tether.tenancy import Tenancy
from tether.transport import Libp2pTransport
from tether.worker import Offer, Worker

log = logging.getLogger(__name__)

MAX_GATEWAY_PEERS = 64
COLLECTOR_THRESHOLDS = (50_000, 10, 20)
"""New objects before the youngest ones are searched for garbage, and how many such searches come before one of older ones."""
LEAVE_SECONDS = 2.0
"""How long an orchestrator that stops waits for the store to take note of it."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is to be: a section of settings for each role that it has."""

    node: NodeSettings
    orchestrator: OrchestratorSettings | None = None
    worker: WorkerSettings | None = None
    gateway: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        """The node's roles."""
        found: list[Role] = []
        if self.gateway:
            found.append("gateway")
        if self.orchestrator is not None:
            found.append("orchestrator")
        if self.worker is not None:
            found.append("worker")
        return tuple(found)

    @property
    def key_name(self) -> str:
        """The name of the node's key file: the role's, or `up` for several."""
        return self.roles[0] if len(self.roles) == 1 else "up"


class Notices(msgspec.Struct, frozen=True):
    """Whom a node tells how its start goes; called on trio, must not block."""

    loading: Callable[[str, Loading], None] = lambda _model, _loading: None
    ready: Callable[[], None] = lambda: None
    """Every model is loaded."""
    refused: Callable[[str, Exception], None] = lambda _address, _error: None
    """An orchestrator does not let this node in."""


def sqlite_url(data_dir: Path) -> str:
    """Return the store that a data directory has when none is named."""
    return f"sqlite:///{data_dir / 'tether.db'}"


def check_models(settings: WorkerSettings) -> list[ModelSpec]:
    """Return what the worker is asked to serve; raise `ModelUnavailable` for what this machine cannot. May ask the hub."""
    specs: list[ModelSpec] = []
    free_bytes = catalog.free_memory_bytes()
    for name in settings.models:
        if settings.engine == "openai":
            # What the name stands for is for the other server to say; the runtime child asks it.
            specs.append(ModelSpec(name, settings.model_version or catalog.DEFAULT_VERSION, "hub", name))
            continue
        spec = catalog.resolve(name).with_dtype(settings.dtype)
        if settings.runtime_module == WorkerSettings().runtime_module:
            spec = catalog.check(spec, free_bytes=free_bytes)
            free_bytes -= spec.memory_need_bytes or 0
        specs.append(spec.served_as(version=settings.model_version))
    return specs


class Node:
    """A node that is built and not started; `run` gives it life."""

    def __init__(self, plan: Plan, specs: list[ModelSpec], *, notices: Notices | None = None) -> None:
        """Build what needs no event loop; raises `SetupError`s for a data directory, a key or a store that is no good."""
        self.plan = plan
        self._specs = specs
        self._notices = notices or Notices()
        self._stack = ExitStack()
        self._boot_id = secrets.token_hex(8)
        data_dir = plan.node.data_dir
        prepare_data_dir(data_dir)
        network = open_network(data_dir)
        claimed = self._stack.enter_context(claim_slot(data_dir, plan.key_name))
        self.key: NodeKey = claimed.key
        self.identity = Identity(network, self.key, plan.roles)
        self.identity.chain(time.time())  # says now if this machine may not have these roles
        self.address_book = AddressBook(data_dir)
        if plan.orchestrator is not None:
            self.store = open_store(plan.orchestrator.store or sqlite_url(data_dir))
            self._stack.callback(self.store.close)
            self.store.migrate()

    @property
    def roles(self) -> str:
        """The roles, for people."""
        return ", ".join(self.plan.roles)

    @property
    def knows_orchestrators(self) -> bool:
        """Whether there is any address to dial."""
        return bool(self.address_book.read() or self.identity.network.addresses)

    async def run(self, stop: trio.Event, *, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until `stop` is set; started when the node listens and its links are being made.

        Then intake stops first, running work has `grace_seconds` to end, and links close with a goodbye.
        """
        with self._stack:
            self._build()
            async with trio.open_nursery() as nursery:
                await self._start(nursery)
                task_status.started(self)
                await stop.wait()
                with trio.move_on_after(self.plan.node.grace_seconds):
                    await self._drain()
                await self._hand_over()
                if self.plan.orchestrator is not None:
                    with trio.move_on_after(LEAVE_SECONDS):
                        await self.batches.leave()
                        await self.housekeeping.leave()
                await self.links.close("stopping")
                nursery.cancel_scope.cancel()

    def _build(self) -> None:
        plan, node = self.plan, self.plan.node
        max_files = open_files.raise_limit()
        log.debug("this process may have %d files open", max_files)
        has_topics = plan.gateway or plan.orchestrator is not None
        self.transport = Libp2pTransport(
            self.key,
            listen=plan.orchestrator.listen if plan.orchestrator is not None else (),
            announce=plan.orchestrator.announce if plan.orchestrator is not None else (),
            max_peers=plan.orchestrator.max_peers if plan.orchestrator is not None else MAX_GATEWAY_PEERS,
            # The rest is for the store, runtime children and HTTP clients, whatever comes over the network.
            max_connections=max_files // 2,
            with_topics=has_topics,
        )
        self.links = Links(
            self.transport,
            self.identity,
            name=node.name,
            region=node.region,
            boot_id=self._boot_id,
            settings=LinkSettings(silence_seconds=node.silence_seconds, max_buffer_bytes=node.link_buffer_bytes),
        )
        self.dialler = Dialler(self.links, on_refused=self._notices.refused)
        self.listener = (
            Listener(self.transport, node.region, is_orchestrator=self.links.has_orchestrator) if has_topics else None
        )
        if plan.gateway:
            self.submissions = Submissions(self.links, load=self.listener.load if self.listener else lambda _: 0)
        if plan.worker is not None:
            self.worker = Worker(
                self.links,
                [_offer(spec, plan.worker) for spec in self._specs],
                node=node,
                settings=plan.worker,
                boot_id=self._boot_id,
                sign=lambda payload: sign(self.key, payload),
                on_loading=self._notices.loading,
                look=Machine().look if plan.worker.politeness.is_asked_for else None,
            )
        if plan.orchestrator is not None:
            self.ledger = Ledger(self.store)
            self.roster = Roster(self.key.peer_id)
            self.orchestrator = Orchestrator(
                self.links, self.ledger, self.roster, boot_id=self._boot_id, settings=plan.orchestrator
            )
            self.housekeeping = Housekeeping(
                self.links,
                self.ledger,
                self.roster,
                boot_id=self._boot_id,
                addresses=lambda: self.transport.addresses,
                node=node,
                settings=plan.orchestrator,
            )
            self.leases = Leases(
                self.links,
                self.ledger,
                self.orchestrator,
                self.roster,
                boot_id=self._boot_id,
                grace_seconds=node.grace_seconds,
            )
            self.cancelling = Cancelling(self.links, self.ledger, self.orchestrator)
            self.inquiries = Inquiries(
                self.links, self.ledger, self.orchestrator, self.cancelling, self.roster, self.housekeeping
            )
            self.tenancy = Tenancy(self.links, self.ledger, self.orchestrator)
            holder = Holder(self.key.peer_id, self._boot_id)
            self.batches = Batches(
                self.ledger, self.orchestrator, self.cancelling, self.roster, self.leases, holder=holder
            )
            self.batch_inquiries = BatchInquiries(self.links, self.ledger, self.batches, holder=holder)

    async def _start(self, nursery: trio.Nursery) -> None:
        """Start the parts: whoever handles messages before the links that bring them."""
        plan = self.plan
        if plan.orchestrator is not None:
            await nursery.start(self.ledger.run)
            await nursery.start(self.orchestrator.run)
            await nursery.start(self.cancelling.run)
            await nursery.start(self.inquiries.run)
            await nursery.start(self.tenancy.run)
            await nursery.start(self.batch_inquiries.run)
        await nursery.start(self.links.run)
        if plan.orchestrator is not None:
            self._stack.enter_context(self.address_book.listed(self.key.peer_id, self.transport.addresses))
            nursery.start_soon(self.housekeeping.run)
            nursery.start_soon(self.leases.run)
            if (seconds := plan.orchestrator.lost_gateway_seconds) is not None:
                nursery.start_soon(Deserted(self.orchestrator, most_seconds=seconds).run)
            await nursery.start(self.batches.run)
            broadcaster = Broadcaster(
                self.transport, plan.node.region, control=self._control_news, states=lambda: list(self._signed_states())
            )
            nursery.start_soon(broadcaster.run)
        if self.listener is not None:
            nursery.start_soon(self.listener.run)
        if plan.gateway:
            nursery.start_soon(self.submissions.run)
        nursery.start_soon(self.dialler.run, self._addresses)
        if plan.worker is not None:
            nursery.start_soon(self._start_worker, nursery)

    async def _start_worker(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.worker.run)
        self._notices.ready()

    async def _drain(self) -> None:
        """Wait until what runs has ended; nothing new is taken from here on."""
        async with trio.open_nursery() as nursery:
            if self.plan.orchestrator is not None:
                nursery.start_soon(self.orchestrator.drain)
            if self.plan.worker is not None:
                nursery.start_soon(self.worker.drain)

    async def _hand_over(self) -> None:
        """Give away what still runs: nobody waits for a timeout to find out that this node has left."""
        if self.plan.worker is not None:
            self.worker.hand_over()
        if self.plan.orchestrator is not None:
            self.leases.stop()
            with trio.move_on_after(LEAVE_SECONDS):
                await self.orchestrator.hand_over()

    def _addresses(self) -> Iterator[str]:
        """Yield where orchestrators may be; called in a thread."""
        yield from self.address_book.read()
        yield from self.identity.network.addresses
        if self.listener is not None:
            yield from self.listener.addresses

    def _control_news(self, sequence: int) -> ControlNews:
        return ControlNews(
            self.key.peer_id,
            self._boot_id,
            sequence,
            self.transport.addresses,
            self.orchestrator.num_queued,
            self.orchestrator.num_running,
            self.orchestrator.is_draining,
            sent_at=time.time(),
        )

    def _signed_states(self) -> Iterator[tuple[WorkerState, Signed]]:
        for entry in self.roster:
            yield entry.state, entry.signed


def _offer(spec: ModelSpec, settings: WorkerSettings) -> Offer:
    if settings.engine == "openai":
        remote = ["-m", "tether.openai_engine", "--model", spec.name, "--stream", "--base-url", settings.base_url or ""]
        key = settings.api_key_env
        if key is not None:
            remote += ["--api-key-env", key]
        variables = () if key is None else (key,)
        return Offer(spec.name, spec.version, (*remote, *_slots(settings)), spec.toy, variables)
    source = spec.source if spec.kind == "folder" else spec.name
    arguments = ["-m", settings.runtime_module, "--model", source, "--stream", "--dtype", settings.dtype]
    arguments += ["--device", settings.device]
    if settings.threads is not None:
        arguments += ["--threads", str(settings.threads)]
    return Offer(spec.name, spec.version, (*arguments, *_slots(settings)), spec.toy)


def _slots(settings: WorkerSettings) -> list[str]:
    return [] if settings.slots is None else ["--slots", str(settings.slots)]


def run_peer(node: Node, *, on_started: Callable[[Node], None] = lambda _: None) -> int:
    """Run a node without HTTP until a signal ends it; return the exit code.

    The first Ctrl-C or SIGTERM stops it gracefully, a second one at once.
    """

    async def main() -> int:
        stop = trio.Event()
        received: list[int] = []

        async def watch(signals: AsyncIterator[int]) -> None:
            async for number in signals:
                received.append(number)
                if stop.is_set():
                    force_exit(number)
                log.info(
                    "stopping; running jobs have %g s (Ctrl-C again to stop at once)", node.plan.node.grace_seconds
                )
                stop.set()

        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, signals)
                async with trio.open_nursery() as inner:
                    started = await inner.start(node.run, stop)
                    calm_collector()
                    on_started(started)
                nursery.cancel_scope.cancel()
        return exit_code(received[0] if received else None)

    return trio.run(main)


def calm_collector() -> None:
    """Have the search for garbage stop a role that runs less often, and for less time.

    What is there now stays, and is left out of it. The rest is looked through after so many new objects as many streams
    make in seconds: a whole search among 500 streams takes 0.1 to 0.2 s, in which no token moves, and by Python's own
    numbers it came every three seconds. Little that nobody refers to waits for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def force_exit(signal_number: int) -> None:
    """End the process now; runtime children see their stdin close and end too."""
    os._exit(128 + signal_number)


def exit_code(signal_number: int | None) -> int:
    """Return a graceful stop's exit code: 130 for Ctrl-C, 0 for SIGTERM, which service managers send."""
    return 130 if signal_number == signal.SIGINT else 0


def sole_error(error: BaseException) -> BaseException:
    """Return the one error inside groups of one (trio wraps each nursery's), a Tether error before any other."""
    while isinstance(error, BaseExceptionGroup):
        members = error.exceptions
        error = next((member for member in members if isinstance(member, TetherError)), members[0])
    return error


def memory_words(spec: ModelSpec) -> str:
    """Return a model's memory need for people."""
    need = spec.memory_need_bytes
    return "?" if need is None else f"{math.ceil(need / 1e8) / 10:g} GB"
