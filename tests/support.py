"""The roles' real parts over a network in memory and a real SQLite store, and a worker that a test plays by hand."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import msgspec
import trio

from tether.batch_inquiries import BatchInquiries
from tether.batch_store import Holder
from tether.batches import Batches
from tether.cancelling import Cancelling
from tether.child import RuntimeChild
from tether.database import Applied, SqliteDatabase, Statement
from tether.dialling import Dialler
from tether.errors import ErrorInfo, LinkError, StoreUnavailable, TetherError
from tether.housekeeping import Housekeeping
from tether.identity import Identity
from tether.inquiries import Inquiries
from tether.leases import Leases
from tether.ledger import Ledger
from tether.link import Link, LinkSettings
from tether.links import Links
from tether.messages import (
    Cancel,
    GetHealth,
    GetJob,
    InferBusy,
    InferCancel,
    InferEnd,
    InferStart,
    InferTokens,
    JobAccepted,
    JobEnd,
    JobEvent,
    JobQueued,
    JobStarted,
    JobTokens,
    LinkMessage,
    Presence,
    Submit,
    Unwatch,
    Watch,
    decode_state,
    encode,
)
from tether.network import Network
from tether.node_key import NodeKey, sign
from tether.orchestrator import Orchestrator
from tether.records import AttemptRecord, FinishReason, Job, JobRecord, ModelInfo, Role, Sampling, Usage, WorkerState
from tether.roster import Roster
from tether.settings import NodeSettings, OrchestratorSettings, WorkerSettings
from tether.store import Store
from tether.submissions import Submissions
from tether.tenancy import Tenancy
from tether.testing import InMemoryNetwork
from tether.worker import Offer, Worker

E = TypeVar("E")

LINKS = LinkSettings(silence_seconds=1.0, min_redial_seconds=0.01, max_redial_seconds=0.05)

ROOM = 1_000_000
"""Events that a client takes who reads all."""

_numbers = itertools.count(1)


def make_job(text: str = "tokens=1", **changes: object) -> Job:
    """A job with an id of its own; ids sort by age."""
    number = next(_numbers)
    plain = Job(
        id=f"job-{number:06}",
        tenant_id="tenant",
        model="demo",
        version="1.0",
        input=text,
        sampling=Sampling(seed=1),
        deadline_seconds=20.0,
        stream=True,
        created_at=1_800_000_000.0,
    )
    return msgspec.structs.replace(plain, **changes)


def make_state(worker_id: str = "worker", **changes: object) -> WorkerState:
    """What a worker with one model says."""
    plain = WorkerState(
        worker_id=worker_id,
        boot_id="boot",
        sequence=1,
        sent_at=1_800_000_000.0,
        name=worker_id[:10],
        region="here",
        gpu_class="cpu",
        models=(ModelInfo("demo", "1.0", slots=1),),
    )
    return msgspec.structs.replace(plain, **changes)


class FlakyDatabase(SqliteDatabase):
    """A SQLite file that can go away, and that can be slow."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_away = False
        self.lose_answer_to: str | None = None
        """The next transaction with this in a statement is committed, nobody hears of it, and the store is away."""
        self.num_refused = 0
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._held: list[str] = []

    def hold(self) -> None:
        """Let transactions wait until `go_on`."""
        self._may_go_on.clear()

    def go_on(self) -> None:
        """Take `hold` back."""
        self._held.clear()
        self._may_go_on.set()

    def holds(self, text: str) -> bool:
        """Whether a transaction with this in a statement waits."""
        return any(text in sql for sql in self._held)

    def peek(self, job_id: str) -> object:
        """Return a job's status, though the store is away."""
        (row,) = super().query(Statement("SELECT status FROM jobs WHERE id = :id", {"id": job_id}))
        return row["status"]

    def query(self, statement: Statement, *, settled: bool = False) -> list[dict[str, int | float | str | None]]:
        self._check()
        return super().query(statement, settled=settled)

    def execute(self, statements: Sequence[Statement]) -> list[Applied]:
        if not self._may_go_on.is_set():
            self._held += [each.sql for each in statements]
            self._may_go_on.wait(timeout=10)
        self._check()
        applied = super().execute(statements)
        if self.lose_answer_to is not None and any(self.lose_answer_to in each.sql for each in statements):
            self.lose_answer_to = None
            self.is_away = True
            self._check()
        return applied

    def _check(self) -> None:
        if self.is_away:
            self.num_refused += 1
            raise StoreUnavailable("the store is away")


class Peer:
    """A node: its key, its transport and its links."""

    def __init__(self, world: World, *roles: Role, name: str, key: NodeKey | None = None) -> None:
        self.world = world
        self.key = key or NodeKey.generate()
        self.boot_id = f"{name}-{next(_numbers)}"
        self.transport = world.memory.transport(self.key, is_listening="orchestrator" in roles)
        self.links = Links(
            self.transport,
            Identity(world.network, self.key, roles),
            name=name,
            region="here",
            boot_id=self.boot_id,
            settings=world.link_settings,
        )
        self.node = NodeSettings(data_dir=world.folder, region="here", name=name)
        self.scope = trio.CancelScope()
        self._changed = trio.Event()
        self.links.on_up(lambda _link: self.change())
        self.links.on_down(lambda _link, _reason: self.change())

    @property
    def id(self) -> str:
        return self.links.peer_id

    def change(self) -> None:
        """Wake `until`."""
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def until(self, condition: Callable[[], E | None]) -> E:
        """Wait for what a message or a link brings about."""
        while not (found := condition()):
            await self._changed.wait()
        return found

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until `crash`."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                await self.start(nursery)
                task_status.started()

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.links.run)
        nursery.start_soon(Dialler(self.links).run, self.world.addresses)

    @property
    def leftovers(self) -> list[object]:
        """What must be empty when nothing is live."""
        return []

    async def settled(self) -> None:
        """Wait until nothing is live here any more, unless it has crashed."""
        await until(lambda: self.scope.cancel_called or not self.leftovers)

    def crash(self) -> None:
        """End it at once, as kill -9 would."""
        self.scope.cancel()


class OrchestratorNode(Peer):
    def __init__(
        self, world: World, settings: OrchestratorSettings, *, name: str = "orchestrator", key: NodeKey | None = None
    ) -> None:
        super().__init__(world, "orchestrator", name=name, key=key)
        self.ledger = Ledger(world.store)
        self.roster = Roster(self.id)
        self.orchestrator = Orchestrator(self.links, self.ledger, self.roster, boot_id=self.boot_id, settings=settings)
        if not world.settles:
            self.orchestrator._settles_at = float("-inf")
        self.housekeeping = Housekeeping(
            self.links,
            self.ledger,
            self.roster,
            boot_id=self.boot_id,
            addresses=lambda: self.transport.addresses,
            node=self.node,
            settings=settings,
        )
        self.leases = Leases(
            self.links, self.ledger, self.orchestrator, self.roster, boot_id=self.boot_id, grace_seconds=0.5
        )
        self.cancelling = Cancelling(self.links, self.ledger, self.orchestrator)
        self.inquiries = Inquiries(
            self.links, self.ledger, self.orchestrator, self.cancelling, self.roster, self.housekeeping
        )
        self.tenancy = Tenancy(self.links, self.ledger, self.orchestrator)
        holder = Holder(self.id, self.boot_id)
        self.batches = Batches(self.ledger, self.orchestrator, self.cancelling, self.roster, self.leases, holder=holder)
        self.batch_inquiries = BatchInquiries(self.links, self.ledger, self.batches, holder=holder)

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.ledger.run)
        await nursery.start(self.orchestrator.run)
        await nursery.start(self.cancelling.run)
        await nursery.start(self.inquiries.run)
        await nursery.start(self.tenancy.run)
        await super().start(nursery)
        nursery.start_soon(self.housekeeping.run)
        nursery.start_soon(self.leases.run)
        await nursery.start(self.batch_inquiries.run)
        await nursery.start(self.batches.run)

    def knows(self, worker: Peer, num_slots: int = 0) -> bool:
        """Whether a worker with so many slots is in the roster."""
        entry = self.roster.get(worker.id)
        return entry is not None and entry.boot[1] == worker.boot_id and entry.num_slots >= num_slots

    @property
    def leftovers(self) -> list[object]:
        assigned = [entry.view.assigned for entry in self.roster if any(entry.view.assigned.values())]
        return [*self.orchestrator._jobs, *self.orchestrator._queue._by_id, *assigned]


class Client:
    """Somebody who waits for a job at a gateway; all events that came, and what ended it."""

    def __init__(self, gateway: GatewayNode, job: Job, *, room: int = ROOM, stays: bool = False) -> None:
        self.room = room
        self.on_room: Callable[[], None] = lambda: None
        self.stays = stays
        self.gateway = gateway
        self.job = job
        self.events: list[JobEvent] = []
        self.error: TetherError | None = None
        self.done = trio.Event()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        try:
            with self._scope:
                await self.gateway.submissions.follow(self, self.job, self.stays)
        except TetherError as exc:
            self.error = exc
        finally:
            self.done.set()
            self.gateway.change()

    def put(self, items: Sequence[JobEvent]) -> None:
        """Take events in, as any outlet does."""
        self.room -= len(items)
        self.events += items
        self.gateway.change()

    def read_on(self) -> None:
        """Read again, after `room` was nothing."""
        self.room = ROOM
        self.on_room()

    def leave(self) -> None:
        self._scope.cancel()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.of(JobTokens))

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.of(JobTokens) for token in event.token_ids]

    async def until(self, kind: type[E], count: int = 1) -> E:
        """Wait for the event of a kind that comes `count`th."""
        found = await self.gateway.until(lambda: self.of(kind)[count - 1 : count])
        return found[0]

    async def until_tokens(self, *token_ids: int) -> None:
        """Wait until the client has these tokens."""
        await self.gateway.until(lambda: self.token_ids == list(token_ids) or None)

    async def end(self) -> JobEnd:
        """Wait for the job's one end."""
        await self.done.wait()
        if self.error is not None:
            raise self.error
        ends = self.of(JobEnd)
        assert len(ends) == 1, self.events
        assert self.events[-1] is ends[0], self.events
        return ends[0]


class GatewayNode(Peer):
    def __init__(self, world: World, *, name: str = "gateway") -> None:
        super().__init__(world, "gateway", name=name)
        self.submissions = Submissions(self.links)
        self.nursery = world.nursery
        self.nursery.start_soon(self.submissions.run)

    @property
    def leftovers(self) -> list[object]:
        return [*self.submissions._following]

    def client(self, job: Job, *, room: int = ROOM, stays: bool = False) -> Client:
        """Let somebody submit a job and wait."""
        client = Client(self, job, room=room, stays=stays)
        self.nursery.start_soon(client.run)
        return client


class HandOrchestrator(Peer):
    """An orchestrator that a test plays: it keeps what it hears."""

    def __init__(self, world: World, *, name: str = "orchestrator") -> None:
        super().__init__(world, "orchestrator", name=name)
        self.heard: list[tuple[Link, msgspec.Struct]] = []
        for kind in (Presence, InferBusy, InferTokens, InferEnd, Submit, Cancel, GetJob, GetHealth, Watch, Unwatch):
            self.links.on(kind, self._hear)

    def _hear(self, link: Link, message: msgspec.Struct) -> None:
        self.heard.append((link, message))
        self.change()

    def of(self, kind: type[E]) -> list[E]:
        return [message for _, message in self.heard if isinstance(message, kind)]

    async def next(self, kind: type[E], count: int = 1) -> E:
        """Wait for the message of a kind that comes `count`th."""
        found = await self.until(lambda: self.of(kind)[count - 1 : count])
        return found[0]

    @property
    def states(self) -> list[WorkerState]:
        return [decode_state(presence.state.payload) for presence in self.of(Presence)]

    def send(self, peer: Peer, message: LinkMessage) -> None:
        link = self.links.get(peer.id)
        assert link is not None
        link.send(message)


class HandWorker(Peer):
    """A worker that does what the test says."""

    def __init__(
        self,
        world: World,
        *,
        slots: int = 1,
        name: str = "worker",
        key: NodeKey | None = None,
        models: tuple[ModelInfo, ...] | None = None,
    ) -> None:
        super().__init__(world, "worker", name=name, key=key)
        self.models = models or (ModelInfo("demo", "1.0", slots=slots),)
        self.starts: list[InferStart] = []
        self.cancels: list[InferCancel] = []
        self.senders: dict[tuple[str, int], Link] = {}
        self.sequence = 0
        self.answers_cancels = True
        self.links.on(InferStart, self._on_start)
        self.links.on(InferCancel, self._on_cancel)
        self.links.on_up(self.tell)

    def _on_start(self, link: Link, start: InferStart) -> None:
        self.starts.append(start)
        self.senders[start.job.id, start.attempt] = link
        self.change()

    def _on_cancel(self, link: Link, cancel: InferCancel) -> None:
        self.cancels.append(cancel)
        if self.answers_cancels:
            link.send(InferEnd(cancel.job_id, cancel.attempt, "cancelled", Usage(3, 7)))
        self.change()

    def tell(self, link: Link | None = None, **changes: object) -> None:
        """Tell one orchestrator, or all, the state."""
        self.sequence += 1
        state = make_state(
            self.id, boot_id=self.boot_id, sequence=self.sequence, name=self.node.name, models=self.models
        )
        presence = Presence(sign(self.key, encode(msgspec.structs.replace(state, **changes))))
        for each in [link] if link is not None else self.links.with_role("orchestrator"):
            each.send(presence)

    async def start_of(self, job: Job, attempt: int = 1) -> InferStart:
        """Wait until this attempt is sent here."""
        return await self.until(
            lambda: next((s for s in self.starts if (s.job.id, s.attempt) == (job.id, attempt)), None)
        )

    async def cancel_of(self, job: Job, attempt: int = 1) -> InferCancel:
        """Wait until this attempt is cancelled here."""
        return await self.until(
            lambda: next((c for c in self.cancels if (c.job_id, c.attempt) == (job.id, attempt)), None)
        )

    def link_of(self, job: Job, attempt: int) -> Link:
        return self.senders[job.id, attempt]

    def tokens(self, job: Job, attempt: int, *positions: int) -> None:
        """Tell tokens; token N has the id N and the text "N "."""
        text = "".join(f"{position} " for position in positions)
        self.link_of(job, attempt).send(InferTokens(job.id, attempt, positions[0], positions, text))

    def end(
        self,
        job: Job,
        attempt: int = 1,
        *,
        reason: FinishReason = "stop",
        usage: Usage = Usage(3, 1),  # noqa: B008 - frozen
        error: ErrorInfo | None = None,
        retry: bool = False,
    ) -> None:
        self.link_of(job, attempt).send(InferEnd(job.id, attempt, reason, usage, error, retry))

    def busy(self, job: Job, attempt: int = 1) -> None:
        self.link_of(job, attempt).send(InferBusy(job.id, attempt, ErrorInfo("queue_full", "full")))


class LivelyWorker(HandWorker):
    """A worker that answers `tokens=N` by itself, in portions of any size; token N has the id N and the text "N "."""

    def __init__(self, world: World, random: Random, *, slots: int, name: str, key: NodeKey | None = None) -> None:
        super().__init__(world, slots=slots, name=name, key=key)
        self._random = random
        self._nursery: trio.Nursery
        self._live: dict[tuple[str, int], trio.CancelScope] = {}
        self.answers_cancels = False

    async def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        await super().start(nursery)

    def _on_start(self, link: Link, start: InferStart) -> None:
        super()._on_start(link, start)
        if len(self._live) >= self.models[0].slots:
            self.busy(start.job, start.attempt)
            return
        self._nursery.start_soon(self._answer, link, start)

    def _on_cancel(self, link: Link, cancel: InferCancel) -> None:
        super()._on_cancel(link, cancel)
        if (scope := self._live.get((cancel.job_id, cancel.attempt))) is not None:
            scope.cancel()

    async def _answer(self, link: Link, start: InferStart) -> None:
        job_id, attempt = start.job.id, start.attempt
        position, end = len(start.emitted[0]) if start.emitted else 0, int(start.job.input.removeprefix("tokens="))
        num_tokens = 0
        with trio.CancelScope() as scope:
            self._live[job_id, attempt] = scope
            while position < end and link.is_open:
                await trio.sleep(self._random.uniform(0, 0.01))
                size = self._random.randint(1, min(4, end - position))
                ids = tuple(range(position, position + size))
                self._tell(link, InferTokens(job_id, attempt, position, ids, "".join(f"{n} " for n in ids)))
                position, num_tokens = position + size, num_tokens + size
        del self._live[job_id, attempt]
        reason: FinishReason = "cancelled" if scope.cancelled_caught else "stop"
        self._tell(link, InferEnd(job_id, attempt, reason, Usage(1, num_tokens)))

    @staticmethod
    def _tell(link: Link, message: LinkMessage) -> None:
        with suppress(LinkError):
            link.send(message)


class ScriptedWorker(Peer):
    """A real worker over real children that answer by script."""

    def __init__(self, world: World, *, slots: int = 4, name: str = "worker", presence_seconds: float = 5.0) -> None:
        super().__init__(world, "worker", name=name)
        self.worker = Worker(
            self.links,
            [Offer("demo", "1.0", ("-m", "tether.scripted", "--model", "demo", "--slots", str(slots)))],
            node=self.node,
            settings=WorkerSettings(presence_seconds=presence_seconds),
            boot_id=self.boot_id,
            sign=lambda payload: sign(self.key, payload),
        )

    async def start(self, nursery: trio.Nursery) -> None:
        await super().start(nursery)
        await nursery.start(self.worker.run)

    @property
    def leftovers(self) -> list[object]:
        return [*self.worker._running]

    @property
    def child(self) -> RuntimeChild:
        return self.worker.children[0]


class World:
    """A network in memory with a store; nodes are started one by one, and all end with it."""

    def __init__(self, folder: Path, nursery: trio.Nursery, *, link_settings: LinkSettings = LINKS) -> None:
        self.folder = folder
        self.nursery = nursery
        self.link_settings = link_settings
        self.memory = InMemoryNetwork()
        self.network = Network.found()
        self.database = FlakyDatabase(folder / "tether.db")
        self.store = Store(self.database)
        self.store.migrate()
        self.peers: list[Peer] = []
        self.settles = False
        """Whether an orchestrator that starts waits for workers before it refuses jobs."""

    def addresses(self) -> list[str]:
        return [address for peer in self.peers for address in peer.transport.addresses]

    async def start(self, *peers: Peer) -> None:
        for peer in peers:
            self.peers.append(peer)
            await self.nursery.start(peer.run)

    async def orchestrator(
        self,
        *,
        settings: OrchestratorSettings | None = None,
        name: str = "orchestrator",
        key: NodeKey | None = None,
    ) -> OrchestratorNode:
        node = OrchestratorNode(self, settings or OrchestratorSettings(), name=name, key=key)
        await self.start(node)
        return node

    async def one_of_each(
        self, *, slots: int = 1, name: str = "worker", models: tuple[ModelInfo, ...] | None = None
    ) -> tuple[OrchestratorNode, HandWorker, GatewayNode]:
        """Start an orchestrator, a worker that it knows, and a gateway."""
        orchestrator = await self.orchestrator()
        worker = await self.hand_worker(orchestrator, slots=slots, name=name, models=models)
        return orchestrator, worker, await self.gateway()

    async def gateway(self, name: str = "gateway") -> GatewayNode:
        node = GatewayNode(self, name=name)
        await self.start(node)
        await node.until(lambda: node.links.with_role("orchestrator"))
        return node

    async def hand_worker(
        self,
        *known_by: OrchestratorNode,
        slots: int = 1,
        name: str = "worker",
        key: NodeKey | None = None,
        models: tuple[ModelInfo, ...] | None = None,
    ) -> HandWorker:
        worker = HandWorker(self, slots=slots, name=name, key=key, models=models)
        await self.start(worker)
        await self.known(worker, *known_by)
        return worker

    async def scripted_worker(
        self, *known_by: OrchestratorNode, slots: int = 4, name: str = "worker"
    ) -> ScriptedWorker:
        worker = ScriptedWorker(self, slots=slots, name=name)
        await self.start(worker)
        await self.known(worker, *known_by, num_slots=slots)
        return worker

    async def known(self, worker: Peer, *orchestrators: OrchestratorNode, num_slots: int = 0) -> None:
        """Wait until orchestrators know what a worker has."""
        for node in orchestrators:
            await until(partial(node.knows, worker, num_slots))

    def record(self, job: Job) -> JobRecord | None:
        return self.store.job(job.id)

    def ended(self, job: Job) -> JobRecord:
        """Return the record of a job that has an end."""
        record = self.store.job(job.id)
        assert record is not None
        assert record.ended_at is not None, record
        return record

    def attempts(self, job: Job) -> list[AttemptRecord]:
        return self.store.attempts(job.id)


@asynccontextmanager
async def open_world(folder: Path, *, link_settings: LinkSettings = LINKS) -> AsyncIterator[World]:
    """A world that ends with the block; then nothing may be left over at any orchestrator or gateway that lives."""
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        world = World(folder, nursery, link_settings=link_settings)
        stack.callback(world.store.close)
        yield world
        for peer in world.peers:
            await peer.settled()
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event of its own; the test's bound says when that is too long."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.002)


def types(client: Client) -> list[str]:
    """The kinds of events that came, each run of one kind once."""
    names = {JobAccepted: "accepted", JobQueued: "queued", JobStarted: "started", JobTokens: "tokens", JobEnd: "end"}
    return [name for name, _ in itertools.groupby(names[type(event)] for event in client.events)]
