"""Ten times as many jobs as there is room for: memory stays bounded, refusals say when to come back, and then all is as before."""

from __future__ import annotations

import statistics
from collections import Counter

import httpx
import trio

from tests.chaos.checker import Finding
from tests.chaos.scene import Scene
from tests.chaos.swarm import FLOOD, until

TIMES = 10
TOKENS, EVERY_SECONDS = 40, 0.05
"""Of each job of the flood."""
NUM_PROBES = 7
BACK_SECONDS = 1.0
"""After so long answers come as fast as before."""
MOST_SLOWER, MOST_SLOWER_SECONDS = 2.0, 0.2
"""A first token may take so many times, or so much longer, as before: the machine has other work."""
MOST_GROWTH, MOST_GROWTH_BYTES = 0.1, 24 << 20
"""How much more memory a process may have in the last third than it had at most in the second."""


class _Flood:
    """What those who ask for too much are told."""

    def __init__(self) -> None:
        self.codes: Counter[str] = Counter()
        self.findings: list[Finding] = []

    async def ask(self, http: httpx.AsyncClient, url: str) -> None:
        """Ask for a job, and take what comes, until cancelled."""
        body = {"modelId": "demo", "version": "1.0", "input": f"tokens={TOKENS} every={EVERY_SECONDS}", "stream": True}
        try:
            async with http.stream("POST", f"{url}/infer", json=body) as answer:
                if answer.status_code == 200:
                    async for line in answer.aiter_lines():
                        if line.startswith("data:") and '"error"' in line:
                            self.findings.append(Finding("lost", "the flood", line))
                    self.codes["answered"] += 1
                    return
                await answer.aread()
                code = answer.json()["error"]["code"]
                self.codes[code] += 1
                if code not in {"queue_full", "tenant_queue_full"} or "retry-after" not in answer.headers:
                    self.findings.append(Finding("refused", "the flood", f"{answer.status_code} {answer.text}"))
        except httpx.TransportError as exc:
            self.findings.append(Finding("refused", "the flood", f"{type(exc).__name__}: {exc}"))


async def overload(scene: Scene) -> None:
    """Ask for ten times what there is room for, then leave, and measure what that did."""
    plan, swarm, flood = scene.swarm.plan, scene.swarm, _Flood()
    headers = {"Authorization": f"Bearer {swarm.keys[FLOOD]}"}
    per_second = TIMES * plan.workers * plan.slots / (TOKENS * EVERY_SECONDS)
    urls = [swarm.url(name) for name in swarm.ports]
    memory: list[dict[str, int]] = []

    async def watch() -> None:
        while True:
            memory.append(await trio.to_thread.run_sync(swarm.memory))
            await trio.sleep(1.0)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=60.0) as http:
        before = await _first_token_seconds(http, urls[0])
        scene.note("everybody")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            begin = trio.current_time()
            for number in range(int(per_second * scene.size.overload_seconds)):
                await trio.sleep_until(begin + number / per_second)
                nursery.start_soon(flood.ask, http, urls[number % len(urls)])
            nursery.cancel_scope.cancel()  # whoever still waits leaves: their jobs are cancelled
        await trio.sleep(BACK_SECONDS)
        after = await _first_token_seconds(http, urls[0])
    scene.findings += flood.findings
    if after > max(before * MOST_SLOWER, before + MOST_SLOWER_SECONDS):
        scene.findings.append(Finding("slow", "a first token", f"takes {after:.3f} s, and took {before:.3f} s before"))
    scene.facts["first token before and after"] = f"{before:.3f} s and {after:.3f} s"
    scene.facts["asked"] = f"{per_second:g} a second; " + ", ".join(
        f"{count} {code}" for code, count in flood.codes.most_common()
    )
    _judge_memory(scene, memory)

    def is_over() -> bool:
        return not swarm.read(f"SELECT id FROM jobs WHERE tenant_id = '{FLOOD}' AND status IN ('queued', 'running')")

    await until(is_over, "the jobs of those who left have ended", seconds=30.0)
    scene.own_jobs |= {str(row["id"]) for row in await scene.read(f"SELECT id FROM jobs WHERE tenant_id = '{FLOOD}'")}


async def _first_token_seconds(http: httpx.AsyncClient, url: str) -> float:
    """Return how long a first token takes: the median of some."""
    body = {"modelId": "demo", "version": "1.0", "input": "tokens=1", "stream": True}
    taken = []
    for _ in range(NUM_PROBES):
        begin = trio.current_time()
        async with http.stream("POST", f"{url}/infer", json=body) as answer:
            taken += [trio.current_time() - begin async for line in answer.aiter_lines() if '"tokens"' in line]
    return statistics.median(taken) if len(taken) == NUM_PROBES else float("inf")


def _judge_memory(scene: Scene, samples: list[dict[str, int]]) -> None:
    third = max(1, len(samples) // 3)
    grown = {}
    for name in samples[0]:
        sizes = [sample.get(name, 0) for sample in samples]
        middle, last = max(sizes[third : 2 * third] or sizes), max(sizes[2 * third :] or sizes)
        grown[name] = (last - sizes[0]) >> 20
        if last > middle * (1 + MOST_GROWTH) + MOST_GROWTH_BYTES:
            what = f"had at most {middle >> 20} MiB in the second third, and {last >> 20} in the last"
            scene.findings.append(Finding("memory", name, what))
    scene.facts["memory grew by MiB"] = ", ".join(f"{name} {size}" for name, size in grown.items())
