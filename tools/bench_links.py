"""Round trips a second over one link between two processes, with messages as a running job sends them.

    python tools/bench_links.py [--json]

One process is a worker that answers each `infer.cancel` with `infer.tokens`; the other keeps 1, 16, 64 and 256 questions
open at a time. Both are on this machine, over loopback, with libp2p and credentials as in use.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parents[1]))

from tether.dialling import Dialler
from tether.identity import Identity
from tether.link import Link
from tether.links import Links
from tether.messages import InferCancel, InferTokens
from tether.network import Issuer, Network
from tether.node_key import NodeKey
from tether.transport import Libp2pTransport

ROUNDS = ((1, 500), (16, 8_000), (64, 20_000), (256, 40_000))
JOB_ID = "0198f7a2-6c3e-7b1d-9d53-3f1f6f0e2a11"


def _links(network: Network, key: NodeKey, role: str, listen: list[str]) -> Links:
    identity = Identity(network, key, ["orchestrator" if role == "orchestrator" else "worker"])
    transport = Libp2pTransport(key, listen=listen)
    return Links(transport, identity, name=role, region="here", boot_id=str(time.time_ns()))


async def worker(network_seed: str, address: str) -> None:
    """Answer until killed."""
    founder = NodeKey(bytes.fromhex(network_seed))
    links = _links(Network(founder.public_key, Issuer(founder, ())), NodeKey.generate(), "worker", [])

    def answer(link: Link, message: InferCancel) -> None:
        link.send(InferTokens(message.job_id, message.attempt, 17, (4711, 12), " and then"))

    links.on(InferCancel, answer)
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        await Dialler(links).run(lambda: [address])


class Asker:
    """Keeps a number of round trips open at a time."""

    def __init__(self, links: Links) -> None:
        self.up = trio.Event()
        self.link: Link | None = None
        self._sent: dict[int, float] = {}
        self._latencies: list[float] = []
        self._left = 0
        self._number = 0
        self._done = trio.Event()
        links.on_up(self._on_up)
        links.on(InferTokens, self._on_tokens)

    def _on_up(self, link: Link) -> None:
        self.link = link
        self.up.set()

    def _ask(self, link: Link) -> None:
        self._number += 1
        self._left -= 1
        self._sent[self._number] = time.perf_counter()
        link.send(InferCancel(JOB_ID, self._number))

    def _on_tokens(self, link: Link, message: InferTokens) -> None:
        self._latencies.append(time.perf_counter() - self._sent.pop(message.attempt))
        if self._left > 0:
            self._ask(link)
        elif not self._sent:
            self._done.set()

    async def measure(self, num_open: int, total: int) -> dict[str, float]:
        """Return round trips a second and latencies in milliseconds."""
        if self.link is None:
            raise RuntimeError("there is no link yet")
        self._latencies, self._left, self._done = [], total, trio.Event()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(num_open):
            self._ask(self.link)
        await self._done.wait()
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        ordered = sorted(self._latencies)
        return {
            "open": num_open,
            "round_trips_per_second": round(len(ordered) / seconds),
            "p50_ms": round(ordered[len(ordered) // 2] * 1e3, 2),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2),
            "cpu_us_per_round_trip": round(cpu / len(ordered) * 1e6),
        }


async def bench() -> list[dict[str, float]]:
    """Run all rounds against a worker in a process of its own."""
    network = Network.found()
    links = _links(network, NodeKey.generate(), "orchestrator", ["/ip4/127.0.0.1/tcp/0"])
    asker = Asker(links)
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        address = links.orchestrator_addresses[0]
        command = [sys.executable, __file__, "worker", network.issuer.key.seed.hex(), address]
        process = subprocess.Popen(command)  # noqa: ASYNC220 - once, before anything is measured
        try:
            with trio.fail_after(30):
                await asker.up.wait()
            await asker.measure(16, 500)
            return [await asker.measure(num_open, total) for num_open, total in ROUNDS]
        finally:
            process.kill()
            process.wait()
            nursery.cancel_scope.cancel()


def main() -> None:
    """Print a table, or JSON."""
    if sys.argv[1:2] == ["worker"]:
        trio.run(worker, sys.argv[2], sys.argv[3])
        return
    rows = trio.run(bench)
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print(f"{'open':>5} {'round trips/s':>14} {'p50 ms':>8} {'p99 ms':>8} {'CPU µs each':>12}")
    for row in rows:
        print(
            f"{row['open']:>5} {row['round_trips_per_second']:>14} {row['p50_ms']:>8} {row['p99_ms']:>8} "
            f"{row['cpu_us_per_round_trip']:>12}"
        )


if __name__ == "__main__":
    main()
