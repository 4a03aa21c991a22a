"""Faults of workers: killed, frozen, cut off, each when a stream on it has come to its place."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple

import trio

from tests.chaos.faults import MOST_ATTEMPTS, Aim, Fault, is_hit
from tests.chaos.scene import Scene
from tests.chaos.swarm import Member, Swarm, until

FOUND_SECONDS = 30.0
"""Within so long the jobs of a silent worker are elsewhere; the pause that clients see is measured, not bounded here."""


class Harm(NamedTuple):
    """What is done to a worker, and how it comes back."""

    do: Callable[[Swarm, Member], None]
    undo: Callable[[Swarm, Member], Awaitable[None]]
    most_at_once: int
    """A silent worker takes jobs until it is noticed: two at once can cost a job both, and the next one makes it poison."""


async def harm_workers(scene: Scene) -> None:
    """Harm workers until so many streams have lost theirs, each at a random place of its answer."""
    aim, harm, down = Aim(scene.seed), HARMS[scene.fault], set[str]()

    async def recover(member: Member) -> None:
        await until(partial(_has_left, scene, member.name), f"the jobs of {member.name} are elsewhere", FOUND_SECONDS)
        await harm.undo(scene.swarm, member)
        down.discard(member.name)

    async with trio.open_nursery() as nursery:
        while sum(map(is_hit, scene.load.histories)) < scene.size.streams:
            for name in aim.due(scene.load.histories):
                if name not in down and len(down) < harm.most_at_once and await _may_lose(scene, name):
                    down.add(name)
                    scene.note(name)
                    harm.do(scene.swarm, scene.swarm.members[name])
                    nursery.start_soon(recover, scene.swarm.members[name])
            await trio.sleep(0.005)


async def _may_lose(scene: Scene, worker: str) -> bool:
    """Whether no job there has lost so many workers that this one would make it poison."""
    rows = await scene.read(
        "SELECT coalesce(max(j.attempt), 0) AS most FROM jobs AS j"
        " JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt AND a.status = 'running'"
        f" JOIN workers AS w ON w.id = a.worker_id AND w.name = '{worker}' WHERE j.status = 'running'"
    )
    return int(rows[0]["most"]) <= MOST_ATTEMPTS


def _has_left(scene: Scene, worker: str) -> bool:
    """Whether each stream that ran there at the fault has gone on elsewhere."""
    at = max(each.at for each in scene.injections if each.target == worker)
    return not any(
        history.kind == "stream"
        and history.started is not None
        and history.started.worker == worker
        and history.started.at <= at
        for history in scene.load.open
    )


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


HARMS: Mapping[Fault, Harm] = {
    "worker-killed": Harm(_kill, _start, 2),
    "worker-killed-demo": Harm(_kill, _start, 1),
    "worker-frozen": Harm(_freeze, _thaw, 1),
    "worker-cut": Harm(_cut, _mend, 1),
}
