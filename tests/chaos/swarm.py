"""The processes of the chaos suite: a cluster of rqlited, gateways, orchestrators, workers; each can be harmed and comes back."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import trio

from tests.chaos.checker import Ledger
from tests.chaos.wires import Wires
from tests.ports import free_port
from tests.processes import Process, own_environment
from tests.rqlited import Cluster, running_cluster
from tether.database import Statement, connect
from tether.store import open_store
from tether.tenant_store import TenantStore

Role = Literal["gateway", "orchestrator", "worker"]
Engine = Literal["scripted", "demo"]
"""What workers run: the scripted runtime, or the demo model."""

READY_SECONDS = 90.0
"""A role starts in two seconds on a quiet machine, and this one is busy."""
LOOK_SECONDS = 0.03
TENANTS = ("north", "south")
FLOOD = "flood"
"""The tenant who asks for more than there is."""


class Plan(NamedTuple):
    """Which processes there are."""

    gateways: int = 2
    orchestrators: int = 2
    workers: int = 4
    slots: int = 4
    stores: int = 3
    engine: Engine = "scripted"
    max_queued: int = 40


class Member:
    """One role's process, and its next one after each restart."""

    def __init__(self, role: Role, name: str, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.role = role
        self.name = name
        self.arguments = [role, "--name", name, "-v", *arguments]
        self.prefix = list(prefix)
        self.process: Process | None = None
        self.num_starts = 0

    @property
    def is_alive(self) -> bool:
        """Whether its process lives."""
        return self.process is not None and self.process.is_alive

    @property
    def output(self) -> str:
        """What its newest process has said."""
        return "" if self.process is None else self.process.output

    def send(self, number: signal.Signals) -> None:
        """Send its process a signal."""
        if self.process is not None and self.process.is_alive:
            self.process.send(number)

    def kill(self) -> None:
        """Kill -9, and nobody else: a runtime child finds out by itself that its worker has gone."""
        if self.process is not None and self.process.is_alive:
            self.process.send(signal.SIGKILL)
            self.process.wait()


class Swarm:
    """All processes of a network on this machine."""

    def __init__(self, folder: Path, plan: Plan, stores: Cluster, wires: Wires | None) -> None:
        self.folder = folder
        self.plan = plan
        self.stores = stores
        self.wires = wires
        self.keys: dict[str, str] = {}
        self.ports = {f"gateway-{number}": free_port() for number in range(1, plan.gateways + 1)}
        host = "127.0.0.1" if wires is None else wires.host
        self.members: dict[str, Member] = {}
        for name, port in self.ports.items():
            options = ("--port", str(port), "--requests-per-minute", "1000000", "--no-access-log", "--grace", "10")
            self._add("gateway", name, options)
        for number in range(1, plan.orchestrators + 1):
            listen = f"/ip4/{host}/tcp/{free_port()}"
            told = (
                "--listen",
                listen,
                "--store",
                self.stores.url,
                "--grace",
                "1",
                "--max-queued",
                str(plan.max_queued),
            )
            self._add("orchestrator", f"orchestrator-{number}", told)
        for number in range(1, plan.workers + 1):
            name = f"worker-{number}"
            prefix = () if wires is None else wires.prefix(name)
            self._add("worker", name, ("--model", "demo", "--grace", "1"), prefix)
        self._environment = {
            **own_environment(folder),
            "TETHER_DATA_DIR": str(folder / "data"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        }
        if plan.engine == "scripted":
            self._environment |= {
                "TETHER_WORKER_RUNTIME_MODULE": "tether.scripted",
                "TETHER_SCRIPTED_SLOTS": str(plan.slots),
            }
        else:
            self._environment["TETHER_WORKER_SLOTS"] = str(plan.slots)

    def _add(self, role: Role, name: str, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.members[name] = Member(role, name, arguments, prefix)

    def of(self, role: Role) -> list[Member]:
        """Return the members of a role."""
        return [member for member in self.members.values() if member.role == role]

    def url(self, gateway: str) -> str:
        """Return where a gateway listens."""
        return f"http://127.0.0.1:{self.ports[gateway]}"

    def make_keys(self) -> None:
        """Let two tenants in, with limits so high that each is counted and none is reached."""
        limits = {"requests_per_day": 10**7, "tokens_per_day": 10**9, "tokens_per_minute": 10**8}
        store = open_store(self.stores.url)
        try:
            store.migrate()
            tenants = TenantStore(store)
            for number, name in enumerate((*TENANTS, FLOOD)):
                tenants.create_tenant(name, weight=number + 1.0, limits=limits, now=time.time())
                self.keys[name], _ = tenants.create_key(name, now=time.time())
        finally:
            store.close()

    # --- starting and ending -------------------------------------------------------------------------------------

    def launch(self, member: Member) -> None:
        """Start a member's process and go on."""
        member.num_starts += 1
        log = self.folder / f"{member.name}-{member.num_starts}.log"
        member.process = Process(member.arguments, self._environment, log, prefix=member.prefix)

    async def start(self, *members: Member) -> None:
        """Start members, and return when they have a link to everybody whom they need one to."""
        for member in members:
            self.launch(member)
        await self.until_linked(*members)

    async def until_linked(self, *members: Member) -> None:
        """Wait until members are ready, and each orchestrator that lives has a link to each of them that it should."""
        for member in members:
            await until(partial(self._is_ready, member), f"{member.name} is ready")
        for orchestrator, peer in itertools.product(self.of("orchestrator"), self.members.values()):
            concerned = orchestrator in members or peer in members
            if concerned and peer.role != "orchestrator" and orchestrator.is_alive and peer.is_alive:
                await until(partial(self.is_linked, orchestrator, peer), f"{orchestrator.name} has {peer.name}")

    async def back(self, member: Member, undo: Callable[[], None]) -> None:
        """Undo what keeps a member's process from talking, and return when everybody has a link to it again."""
        for orchestrator in self.of("orchestrator"):
            await until(partial(self._misses, orchestrator, member), f"{orchestrator.name} misses {member.name}")
        undo()
        await self.until_linked(member)

    def _is_ready(self, member: Member) -> bool:
        if not member.is_alive:
            raise RuntimeError(f"{member.name} ended:\n{member.output[-3000:]}")
        return "Ready." in member.output

    @staticmethod
    def is_linked(orchestrator: Member, peer: Member) -> bool:
        """Whether an orchestrator's newest process has a link to a peer, by what it says of its links."""
        said = orchestrator.output
        return said.rfind(f"link up: {peer.name} (") > said.rfind(f"link down: {peer.name}:")

    def _misses(self, orchestrator: Member, peer: Member) -> bool:
        return not self.is_linked(orchestrator, peer)

    async def stop(self, member: Member) -> None:
        """Ask a member to stop, and wait for it."""
        member.send(signal.SIGTERM)
        await until(lambda: not member.is_alive, f"{member.name} has stopped")
        if member.process is not None and (code := member.process.wait()) != 0:
            raise RuntimeError(f"{member.name} stopped with exit code {code}:\n{member.output[-3000:]}")

    def close(self) -> None:
        """End every process."""
        for member in self.members.values():
            if member.process is not None:
                member.send(signal.SIGCONT)
                member.process.kill()

    # --- looking --------------------------------------------------------------------------------------------------

    def read(self, sql: str) -> list[dict[str, Any]]:
        """Return the rows of a query, as the whole cluster agrees on them."""
        database = connect(self.stores.url, deadline_seconds=60.0)
        try:
            return [dict(row) for row in database.query(Statement(sql, {}), settled=True)]
        finally:
            database.close()

    def ledger(self) -> Ledger:
        """Return what the store says of all jobs."""
        return Ledger(
            jobs=self.read("SELECT * FROM jobs"),
            attempts=self.read("SELECT * FROM attempts"),
            counters=self.read("SELECT * FROM quota_counters"),
        )

    def memory(self) -> dict[str, int]:
        """Return how many bytes each role's process has, children included."""
        found: dict[str, int] = {}
        for member in self.members.values():
            if member.process is not None and member.is_alive:
                process = psutil.Process(member.process.pid)
                found[member.name] = sum(
                    each.memory_info().rss for each in [process, *process.children(recursive=True)]
                )
        return found


async def until(probe: Callable[[], object], what: str, seconds: float = READY_SECONDS) -> None:
    """Return when `probe` is true; raise `TimeoutError` when it is not for so long."""
    with trio.move_on_after(seconds):
        while not probe():  # noqa: ASYNC110 - processes tell nobody here; they are looked at
            await trio.sleep(LOOK_SECONDS)
        return
    raise TimeoutError(f"not within {seconds:g} s: {what}")


@contextmanager
def swarm(folder: Path, plan: Plan, wires: Wires | None = None) -> Iterator[Swarm]:
    """A swarm whose stores run and whose tenants have keys; its roles are not started."""
    with ExitStack() as stack:
        stores = stack.enter_context(running_cluster(folder / "stores", plan.stores))
        found = Swarm(folder, plan, stores, wires)
        stack.callback(found.close)
        found.make_keys()
        yield found
