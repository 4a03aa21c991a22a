"""Faults of all other parts, and of all of them together: kills, restarts in every order, rolling restarts, a power cut."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Mapping

import trio

from tests.chaos.faults import Fault, strikes
from tests.chaos.scene import Scene
from tests.chaos.swarm import Member, Role, Swarm, until

MOST_POWER_CUTS = 3
ROLES: Mapping[Fault, Role] = {"orchestrator-killed": "orchestrator", "gateway-killed": "gateway"}
ORDER_PAUSE_SECONDS = 0.5
"""Between the starts of two roles: so long the later one is missed."""


async def kill_members(scene: Scene) -> None:
    """Kill a gateway or an orchestrator again and again, each time after so many pieces, and start it again."""
    names = [member.name for member in scene.swarm.of(ROLES[scene.fault])]
    for strike in strikes(scene.random, scene.size.strikes, scene.size.pieces_between):
        await scene.pieces(strike.after_pieces)
        member = scene.swarm.members[strike.choose(names)]
        scene.note(member.name)
        member.kill()
        await trio.sleep(strike.away_seconds)
        await scene.swarm.start(member)


async def kill_leaders(scene: Scene) -> None:
    """Kill the rqlited that leads, again and again, and start it again."""
    stores = scene.swarm.stores
    for strike in strikes(scene.random, scene.size.strikes, scene.size.pieces_between):
        await scene.pieces(strike.after_pieces)
        number = await trio.to_thread.run_sync(stores.wait_leader)
        scene.note(f"store-{number}")
        stores.kill(number)
        await trio.sleep(strike.away_seconds)
        await trio.to_thread.run_sync(stores.start, number)


async def restart_rolling(scene: Scene) -> None:
    """Stop each process in good order and start it again, one after another, in a random order."""
    swarm = scene.swarm
    names = [*swarm.members, *range(len(swarm.stores.nodes))]
    scene.random.shuffle(names)
    for name in names:
        await scene.pieces(scene.size.pieces_between // 2)
        scene.note(str(name))
        if isinstance(name, int):
            await trio.to_thread.run_sync(swarm.stores.stop, name)
            await trio.to_thread.run_sync(swarm.stores.start, name)
            await trio.to_thread.run_sync(swarm.stores.wait_leader)
        else:
            await swarm.stop(swarm.members[name])
            await swarm.start(swarm.members[name])


async def cut_power(scene: Scene) -> None:
    """Kill everything at once, and start everything again."""
    swarm = scene.swarm
    for strike in strikes(scene.random, min(scene.size.strikes, MOST_POWER_CUTS), scene.size.pieces_between):
        await scene.pieces(strike.after_pieces)
        scene.note("everything")
        _kill_all(swarm)
        await trio.sleep(strike.away_seconds)
        await trio.to_thread.run_sync(swarm.stores.start)
        await swarm.start(*swarm.members.values())


async def restart_in_orders(scene: Scene) -> None:
    """Stop everything, by kill -9 or in good order, and start the roles again one after another, in each order."""
    swarm, random = scene.swarm, scene.random
    orders = list(itertools.permutations(("store", "gateway", "orchestrator", "worker")))
    random.shuffle(orders)
    for order in orders[: max(1, scene.size.orders)]:
        await scene.pieces(scene.size.pieces_between)
        scene.note(" ".join(order))
        if random.random() < 0.5:
            _kill_all(swarm)
        else:
            for member in swarm.members.values():
                member.send(signal.SIGTERM)
            for member in swarm.members.values():
                await until(lambda member=member: not member.is_alive, f"{member.name} has stopped")  # type: ignore[misc]
            await trio.to_thread.run_sync(swarm.stores.stop, *range(len(swarm.stores.nodes)))
        for role in order:
            if role == "store":
                await trio.to_thread.run_sync(swarm.stores.start)
            else:
                for member in swarm.members.values():
                    if member.role == role:
                        swarm.launch(member)
            await trio.sleep(ORDER_PAUSE_SECONDS)
        await swarm.until_linked(*swarm.members.values())


def _kill_all(swarm: Swarm) -> None:
    members: list[Member] = list(swarm.members.values())
    for member in members:
        member.send(signal.SIGKILL)
    swarm.stores.kill(*range(len(swarm.stores.nodes)))
    for member in members:
        member.kill()
