"""What the chaos suite does to a swarm: a load, faults by plan, and what the checker makes of it."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any, NamedTuple

import trio

from tests.chaos.checker import Finding, check
from tests.chaos.faults import KINDS, MOST_ATTEMPTS, STREAMS, TOLERANCES, Aim, Fault, is_hit, strikes
from tests.chaos.history import STREAMED, History, Kind
from tests.chaos.load import Load, Prompt, Want, mix, scripted
from tests.chaos.swarm import TENANTS, Member, Role, Swarm, until

FOUND_SECONDS = 30.0
"""Within so long the jobs of a silent worker are elsewhere; the pause that clients see is measured, not bounded here."""
MOST_SECONDS = 300.0
"""Of a fault, besides ten for each stream that is to lose its worker: then the suite itself hangs."""
PAUSE_WINDOW_SECONDS = 0.5
"""What was on its way when a fault was made still arrives for so long."""


class Injection(NamedTuple):
    """A fault that was made."""

    at: float
    target: str


class Outcome(NamedTuple):
    """What a fault did."""

    fault: Fault
    engine: str
    injections: Sequence[Injection]
    histories: Sequence[History]
    findings: Sequence[Finding]
    seconds: float

    @property
    def num_hit(self) -> int:
        """Streams that were open while a fault was made, and felt it if it was their worker's."""
        return len(self.pauses)

    @property
    def pauses(self) -> list[float]:
        """The longest silence of each stream that a fault hit, shortest first."""
        found = []
        for history in self.histories:
            pauses = [pause for each in self.injections if (pause := self._pause(history, each)) is not None]
            if pauses:
                found.append(max(pauses))
        return sorted(found)

    def _pause(self, history: History, injection: Injection) -> float | None:
        if history.kind not in STREAMED:
            return None
        if self.fault.startswith("worker-") and history.worker_at(injection.at) != injection.target:
            return None
        return history.pause_after(injection.at, PAUSE_WINDOW_SECONDS)

    def count(self, *wrongs: str) -> int:
        """Return how many findings are of these kinds."""
        return sum(finding.wrong in wrongs for finding in self.findings)


class Size(NamedTuple):
    """How much of everything."""

    streams: int = 100
    """Streams that are to lose their worker, for each fault of a worker."""
    strikes: int = 10
    """How often a gateway, an orchestrator, or the store's leader is killed."""
    at_once: int = 8
    """Clients at work at the same time."""
    pieces_between: int = 150
    """Pieces told to all clients between two strikes, on average."""
    tokens: int = 60
    """Of an answer, on average; each takes 0.04 s."""


class Arena:
    """A swarm at work, and the place where faults are made."""

    def __init__(
        self, swarm: Swarm, seed: int, size: Size, prompts: Sequence[Prompt], tell: Callable[[str], None]
    ) -> None:
        """`tell` is told how far it is, in a line."""
        self.swarm = swarm
        self.seed = seed
        self.size = size
        self.prompts = prompts
        self._tell = tell
        self._num_runs = 0

    async def run(self, fault: Fault) -> Outcome:
        """Bring load, make the fault as often as the plan says, wait for all ends and check everything."""
        self._num_runs += 1
        before = {str(row["id"]) for row in await self._read("SELECT id FROM jobs")}
        kinds = STREAMS if fault in _BY_WORKER else KINDS
        load = self._load(Random(f"{self.seed}-{fault}-load"), kinds, f"{self.seed}-{self._num_runs}-{fault}")
        injections: list[Injection] = []
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            nursery.start_soon(self._follow, fault, load, injections)
            if fault in _BY_WORKER:
                await self._harm_workers(load, injections, _BY_WORKER[fault])
            else:
                await self._strike(fault, Random(f"{self.seed}-{fault}"), load, injections)
            load.close()
            await until(lambda: not load.open, "all clients have their ends", seconds=300.0)
            nursery.cancel_scope.cancel()
        ledger = await trio.to_thread.run_sync(self.swarm.ledger)
        findings = check(load.histories, ledger, TOLERANCES[fault], others=before)
        seconds = trio.current_time() - begin
        return Outcome(fault, self.swarm.plan.engine, injections, load.histories, findings, seconds)

    def _load(self, random: Random, kinds: Mapping[Kind, float], run_id: str) -> Load:
        gateways = {name: self.swarm.url(name) for name in self.swarm.ports}

        def draw() -> Want:
            return mix(random, self.prompts, TENANTS, kinds)

        return Load(gateways, self.swarm.keys, run_id, draw, self.size.at_once)

    async def _read(self, sql: str) -> list[dict[str, Any]]:
        return await trio.to_thread.run_sync(self.swarm.read, sql)

    async def _follow(self, fault: Fault, load: Load, injections: Sequence[Injection]) -> None:
        while True:
            hit = sum(map(is_hit, load.histories))
            done = len(load.histories) - len(load.open)
            moved = f", {hit} streams moved" if fault in _BY_WORKER else ""
            self._tell(f"{fault}: {len(injections)} times, {done} jobs done, {len(load.open)} open{moved}")
            await trio.sleep(0.5)

    # --- workers --------------------------------------------------------------------------------------------------

    async def _harm_workers(self, load: Load, injections: list[Injection], harm: _Harm) -> None:
        """Harm workers until so many streams have lost theirs, each at a random place of its answer."""
        aim, down = Aim(self.seed), set[str]()

        async def recover(member: Member) -> None:
            await until(
                lambda: not self._runs_on(load, member.name, injections), "its jobs are elsewhere", FOUND_SECONDS
            )
            await harm.undo(self.swarm, member)
            down.discard(member.name)

        async with trio.open_nursery() as nursery:
            while sum(map(is_hit, load.histories)) < self.size.streams:
                for name in aim.due(load.histories):
                    if name not in down and len(down) < harm.most_at_once and await self._may_lose(name):
                        down.add(name)
                        injections.append(Injection(trio.current_time(), name))
                        harm.do(self.swarm, self.swarm.members[name])
                        nursery.start_soon(recover, self.swarm.members[name])
                await trio.sleep(0.01)

    async def _may_lose(self, worker: str) -> bool:
        """Whether no job there has lost so many workers that this one would make it poison."""
        rows = await self._read(
            "SELECT coalesce(max(j.attempt), 0) AS most FROM jobs AS j"
            " JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt AND a.status = 'running'"
            f" JOIN workers AS w ON w.id = a.worker_id AND w.name = '{worker}' WHERE j.status = 'running'"
        )
        return int(rows[0]["most"]) <= MOST_ATTEMPTS

    @staticmethod
    def _runs_on(load: Load, worker: str, injections: Sequence[Injection]) -> bool:
        """Whether a stream that began there before the fault has not gone on elsewhere yet."""
        at = max(each.at for each in injections if each.target == worker)
        return any(
            history.kind == "stream"
            and history.started is not None
            and history.started.worker == worker
            and history.started.at <= at
            for history in load.open
        )

    # --- the others -----------------------------------------------------------------------------------------------

    async def _strike(self, fault: Fault, random: Random, load: Load, injections: list[Injection]) -> None:
        """Make the fault again and again, each time when so many pieces have been told since the last."""
        for strike in strikes(random, self.size.strikes, self.size.pieces_between):
            due = load.num_told + strike.after_pieces
            await until(partial(self._has_told, load, due), "pieces are told")
            if fault == "leader-killed":
                number = await trio.to_thread.run_sync(self.swarm.stores.wait_leader)
                injections.append(Injection(trio.current_time(), f"store-{number}"))
                self.swarm.stores.kill(number)
                await trio.sleep(strike.away_seconds)
                await trio.to_thread.run_sync(self.swarm.stores.start, number)
                continue
            member = self.swarm.members[strike.choose([each.name for each in self.swarm.of(_ROLES[fault])])]
            injections.append(Injection(trio.current_time(), member.name))
            member.kill()
            await trio.sleep(strike.away_seconds)
            await self.swarm.start(member)

    @staticmethod
    def _has_told(load: Load, due: int) -> bool:
        return load.num_told >= due


def _kill(_swarm: Swarm, member: Member) -> None:
    member.kill()


def _freeze(_swarm: Swarm, member: Member) -> None:
    member.send(signal.SIGSTOP)


def _cut(swarm: Swarm, member: Member) -> None:
    if swarm.wires is None:
        raise RuntimeError("this swarm has no wires to cut")
    swarm.wires.cut(member.name)


async def _start(swarm: Swarm, member: Member) -> None:
    await swarm.start(member)


async def _thaw(swarm: Swarm, member: Member) -> None:
    await swarm.back(member, partial(member.send, signal.SIGCONT))


async def _mend(swarm: Swarm, member: Member) -> None:
    if swarm.wires is not None:
        await swarm.back(member, partial(swarm.wires.mend, member.name))


class _Harm(NamedTuple):
    """What is done to a worker, and how it comes back."""

    do: Callable[[Swarm, Member], None]
    undo: Callable[[Swarm, Member], Awaitable[None]]
    most_at_once: int
    """A silent worker takes jobs until it is noticed: two at once can cost a job both, and the next one makes it poison."""


_BY_WORKER: Mapping[Fault, _Harm] = {
    "worker-killed": _Harm(_kill, _start, 2),
    "worker-frozen": _Harm(_freeze, _thaw, 1),
    "worker-cut": _Harm(_cut, _mend, 1),
}
_ROLES: Mapping[Fault, Role] = {"orchestrator-killed": "orchestrator", "gateway-killed": "gateway"}


async def torment(
    found: Swarm, faults: Sequence[Fault], seed: int, size: Size, tell: Callable[[str], None]
) -> list[Outcome]:
    """Start a swarm and make faults, one kind after another."""
    tell("starting")
    await found.start(*found.members.values())
    random = Random(seed)
    prompts = [scripted(random, size.tokens, 0.04) for _ in range(20)]
    arena = Arena(found, seed, size, prompts, tell)
    outcomes = []
    for fault in faults:
        with trio.fail_after(MOST_SECONDS + 10.0 * size.streams):
            outcomes.append(await arena.run(fault))
    return outcomes
