"""Clients of many streams at once, in a process of their own: how long each token was on its way.

    python tools/bench_streams.py URL STREAMS SECONDS [KEY]

The scripted runtime writes the time into each token, by the clock that all processes of a machine share; the difference to
its arrival is what the path added. One line of JSON is written.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from urllib.parse import urlsplit

import uvloop

TOKENS_PER_SECOND = 20
TOKEN = re.compile(rb'"type":"tokens","text":"([0-9.]+) "')


class Reader(asyncio.Protocol):
    """Keeps what arrives and when: what it says is looked at when all is over, since the machine is the network's."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        """Keep a piece."""
        self.pieces.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - what is missing is counted
        """Nothing comes any more."""
        self.ended.set()

    def delays(self) -> list[float]:
        """Return how many seconds each token took."""
        seconds: list[float] = []
        rest = b""
        for now, data in self.pieces:
            *lines, rest = (rest + data).split(b"\n")
            seconds += [now - float(piece) for line in lines for piece in TOKEN.findall(line)]
        return seconds


async def follow(url: str, num_tokens: int, key: str | None, start: asyncio.Event) -> Reader:
    """Read one stream to its end."""
    await start.wait()
    parts = urlsplit(url)
    transport, reader = await asyncio.get_running_loop().create_connection(
        Reader, parts.hostname or "", parts.port or 80
    )
    script = f"tokens={num_tokens} every={1 / TOKENS_PER_SECOND} clock=1"
    asked = {"tenantId": "bench", "modelId": "demo", "version": "1.0", "input": script}
    body = json.dumps({**asked, "maxTokens": num_tokens, "stream": True}).encode()
    head = f"POST /infer HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    transport.write(head.encode() + b"\r\n" + body)
    await reader.ended.wait()
    return reader


async def main(url: str, num_streams: int, seconds: int, key: str | None) -> None:
    """Open all streams over a second, follow them to their ends, and say what was seen."""
    num_tokens = seconds * TOKENS_PER_SECOND
    starts = [asyncio.Event() for _ in range(num_streams)]
    tasks = [asyncio.create_task(follow(url, num_tokens, key, start)) for start in starts]
    for start in starts:
        start.set()
        await asyncio.sleep(1 / num_streams)
    readers = await asyncio.gather(*tasks)
    delays = [delay for reader in readers for delay in reader.delays()]
    cuts = statistics.quantiles(delays, n=100)
    found = {
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
        "tokens": len(delays),
        "missing": num_streams * num_tokens - len(delays),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None))
