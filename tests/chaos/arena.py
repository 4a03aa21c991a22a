"""Brings load to a swarm, makes a fault by its plan, waits for everybody's end, and lets the checker look."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random

import trio

from tests.chaos.checker import check
from tests.chaos.faults import KINDS, STREAMS, TOLERANCES, Fault, is_hit
from tests.chaos.load import Load, Prompt, Want, ask_once, demo, mix, scripted
from tests.chaos.outcome import Outcome
from tests.chaos.overload import overload
from tests.chaos.scene import Scene, Size
from tests.chaos.swarm import TENANTS, Swarm, until
from tests.chaos.upheavals import cut_power, kill_leaders, kill_members, restart_in_orders, restart_rolling
from tests.chaos.workers import HARMS, harm_workers

MOST_SECONDS = 600.0
"""Of a fault, besides ten for each stream that is to lose its worker: then the suite itself hangs."""

MAKERS: Mapping[Fault, Callable[[Scene], Awaitable[None]]] = {
    **dict.fromkeys(HARMS, harm_workers),
    "orchestrator-killed": kill_members,
    "gateway-killed": kill_members,
    "leader-killed": kill_leaders,
    "restart-orders": restart_in_orders,
    "rolling-restart": restart_rolling,
    "power-cut": cut_power,
    "overload": overload,
}


async def torment(
    swarm: Swarm, faults: Sequence[Fault], seed: int, size: Size, tell: Callable[[str], None], outcomes: list[Outcome]
) -> None:
    """Start a swarm and make faults, one kind after another, each with its outcome added to `outcomes` when it is over.

    `tell` is told how far it is, in a line.
    """
    tell("starting")
    await swarm.start(*swarm.members.values())
    prompts = await _prompts(swarm, Random(seed), size)
    for fault in faults:
        with trio.fail_after(MOST_SECONDS + 10.0 * size.streams):
            outcomes.append(await _run(swarm, fault, seed, size, prompts, tell))


async def _prompts(swarm: Swarm, random: Random, size: Size) -> list[Prompt]:
    """Return questions with their answers: by script, or as the model gives them while nothing disturbs it."""
    if swarm.plan.engine == "scripted":
        return [scripted(random, size.tokens, 0.04) for _ in range(20)]
    gateway = swarm.url(next(iter(swarm.ports)))
    return [await ask_once(gateway, swarm.keys[TENANTS[0]], prompt) for prompt in demo(random)]


async def _run(
    swarm: Swarm, fault: Fault, seed: int, size: Size, prompts: Sequence[Prompt], tell: Callable[[str], None]
) -> Outcome:
    """Bring load, make the fault as often as the plan says, wait for all ends and check everything."""
    ledger = await trio.to_thread.run_sync(swarm.ledger)
    others = {str(row["id"]) for row in ledger.jobs}
    random = Random(f"{seed}-{fault}-load")
    kinds = STREAMS if fault in HARMS else KINDS

    def draw() -> Want:
        return mix(random, prompts, TENANTS, kinds)

    gateways = {name: swarm.url(name) for name in swarm.ports}
    load = Load(gateways, swarm.keys, f"{seed}-{fault}-{len(others)}", draw, size.at_once)
    scene = Scene(fault, swarm, seed, size, load)
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_follow, scene, tell)
        nursery.start_soon(load.run)
        await MAKERS[fault](scene)
        load.close()
        await until(lambda: not load.open, "all clients have their ends", seconds=300.0)
        nursery.cancel_scope.cancel()
    ledger = await trio.to_thread.run_sync(swarm.ledger)
    findings = [*scene.findings, *check(load.histories, ledger, TOLERANCES[fault], others=others | scene.own_jobs)]
    seconds = trio.current_time() - begin
    return Outcome(fault, swarm.plan.engine, scene.injections, load.histories, findings, seconds, scene.facts)


async def _follow(scene: Scene, tell: Callable[[str], None]) -> None:
    """Say how far it is, until cancelled."""
    load = scene.load
    while True:
        done = len(load.histories) - len(load.open)
        moved = f", {sum(map(is_hit, load.histories))} streams moved" if scene.fault in HARMS else ""
        tell(f"{scene.fault}: {len(scene.injections)} times, {done} jobs done, {len(load.open)} open{moved}")
        await trio.sleep(0.5)
