"""Where a fault is made: a swarm, a load that works meanwhile, and the list of what was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, NamedTuple

import trio

from tests.chaos.checker import Finding
from tests.chaos.faults import Fault
from tests.chaos.load import Load
from tests.chaos.outcome import Injection
from tests.chaos.swarm import Swarm, until


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
    orders: int = 24
    """In which all roles are started again; there are no more."""
    overload_seconds: float = 60.0


@dataclass
class Scene:
    """One fault under one load."""

    fault: Fault
    swarm: Swarm
    seed: int
    size: Size
    load: Load
    injections: list[Injection] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """What the fault's own measurements found wrong."""
    facts: dict[str, str] = field(default_factory=dict)
    own_jobs: set[str] = field(default_factory=set)
    """Jobs that the fault made itself; the load's clients know nothing of them."""

    @property
    def random(self) -> Random:
        """The plan's numbers, from their beginning."""
        return Random(f"{self.seed}-{self.fault}")

    def note(self, target: str) -> None:
        """A fault is made now."""
        self.injections.append(Injection(trio.current_time(), target))

    async def read(self, sql: str) -> list[dict[str, Any]]:
        """Return what the store says."""
        return await trio.to_thread.run_sync(self.swarm.read, sql)

    async def pieces(self, count: int) -> None:
        """Return when clients have been told so many more pieces."""
        await until(partial(self._has_told, self.load.num_told + count), "pieces are told")

    def _has_told(self, due: int) -> bool:
        return self.load.num_told >= due
