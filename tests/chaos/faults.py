"""The seeded plan: which fault comes when and hits whom. Pure: the same seed makes the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple

from tests.chaos.checker import Tolerance
from tests.chaos.history import History, Kind

Fault = Literal[
    "worker-killed",
    "worker-killed-demo",
    "worker-frozen",
    "worker-cut",
    "orchestrator-killed",
    "gateway-killed",
    "leader-killed",
    "restart-orders",
    "rolling-restart",
    "power-cut",
    "overload",
]
FAULTS: Mapping[Fault, str] = {
    "worker-killed": "kill -9 of a worker, at a random token of each stream",
    "worker-killed-demo": "the same with the demo model, half of the answers greedy, half at temperature 0.8 with a seed",
    "worker-frozen": "SIGSTOP of a worker at a random token; SIGCONT when its jobs are elsewhere",
    "worker-cut": "the wire to a worker is cut at a random token, and mended when its jobs are elsewhere",
    "orchestrator-killed": "kill -9 of an orchestrator, which is started again",
    "gateway-killed": "kill -9 of a gateway, which is started again; clients go on at the other one",
    "leader-killed": "kill -9 of the rqlited that leads, which is started again",
    "restart-orders": "every order in which stopped roles can be started again",
    "rolling-restart": "SIGTERM and a new start of one process after another, until each had its turn",
    "power-cut": "kill -9 of all processes at once, stores included; then all are started again",
    "overload": "ten times as many jobs as there is room for, for a minute",
}

KINDS: Mapping[Kind, float] = {"stream": 0.6, "chat": 0.15, "plain": 0.15, "background": 0.1}
"""What clients ask for, by share."""
STREAMS: Mapping[Kind, float] = {"stream": 0.9, "plain": 0.05, "background": 0.05}
"""The same where each stream is to be hit: only these say which worker they run on."""

_AWAY = frozenset({"no_orchestrator", "no_worker", "store_unavailable", "draining"})
"""With these a request may be turned away while something is down; the client comes back when `Retry-After` says so."""
TOLERANCES: Mapping[Fault, Tolerance] = {
    "worker-killed": Tolerance(),
    "worker-killed-demo": Tolerance(),
    "worker-frozen": Tolerance(),
    "worker-cut": Tolerance(),
    "orchestrator-killed": Tolerance(refusals=_AWAY),
    "gateway-killed": Tolerance(),
    "leader-killed": Tolerance(refusals=_AWAY),
    "restart-orders": Tolerance(refusals=_AWAY | {"model_not_found"}),
    "rolling-restart": Tolerance(refusals=frozenset({"draining"})),
    "power-cut": Tolerance(refusals=_AWAY | {"model_not_found"}, ends=frozenset({"deadline_exceeded", "no_worker"})),
    "overload": Tolerance(refusals=frozenset({"queue_full", "tenant_queue_full"})),
}

MOST_ATTEMPTS = 2
"""A job at its third attempt has lost two workers: a third one would make it poison, as it should."""


class Strike(NamedTuple):
    """One fault: when it comes, and whom it hits."""

    after_pieces: int
    """How many pieces all clients are told before it."""
    who: float
    """From 0 to 1: which of those that may be hit."""
    away_seconds: float
    """How long who is hit stays away."""

    def choose(self, names: Sequence[str]) -> str:
        """Return who of these is hit."""
        return names[int(self.who * len(names))]


def strikes(random: Random, count: int, pieces: int) -> list[Strike]:
    """Return so many faults, with `pieces` told between two of them on average."""
    return [
        Strike(random.randint(pieces // 2, pieces * 3 // 2), random.random(), random.uniform(0.2, 1.5))
        for _ in range(count)
    ]


class Aim:
    """Picks the streams that are to lose their worker: each once, at a random place of its answer."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._places: dict[int, int] = {}

    def place(self, history: History) -> int:
        """Return after how many characters a stream is to lose its worker: not before the first, and before the last."""
        if history.number not in self._places:
            random = Random(f"{self._seed}-{history.number}")
            self._places[history.number] = random.randint(1, max(1, len(history.expected) * 9 // 10))
        return self._places[history.number]

    def due(self, histories: Sequence[History]) -> list[str]:
        """Return the workers of streams that have come to their place and have lost none yet, each once."""
        names = [
            history.started.worker
            for history in histories
            if history.kind == "stream"
            and not history.is_over
            and history.started is not None
            and history.started.attempt == 1
            and history.num_chars >= self.place(history)
        ]
        return list(dict.fromkeys(names))


def is_hit(history: History) -> bool:
    """Whether a stream went on at another worker, as far as it was told."""
    return history.kind == "stream" and history.started is not None and history.started.attempt > 1
