"""Clients of many streams at once, in a process of their own: how long each token was on its way.

    python tools/bench_streams.py URL STREAMS SECONDS [--chat] [--opening 5] [--key KEY]

The scripted runtime writes the time into each token, by the clock that all processes of a machine share; the difference to
its arrival is what the path added. Streams are opened one after another over `--opening` seconds, and each lasts so long
that all are open together for SECONDS. One line of JSON is written: percentiles of that time, and of all tokens, those
while streams open and end included.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import statistics
import time
from urllib.parse import urlsplit

import uvloop

TOKENS_PER_SECOND = 20
TIME = re.compile(rb"([0-9]+\.[0-9]{6}) ")


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

    def tokens(self) -> list[tuple[float, float]]:
        """Return when each token was told, and how many seconds later it arrived."""
        found: list[tuple[float, float]] = []
        rest = b""
        for now, data in self.pieces:
            *lines, rest = (rest + data).split(b"\n")
            told = [float(each) for line in lines if not _is_end(line) for each in TIME.findall(line)]
            found += [(each, now - each) for each in told]
        return found

    @property
    def num_writes(self) -> int:
        """In how many pieces it came."""
        return len(self.pieces)


def _is_end(line: bytes) -> bool:
    """Whether a line repeats the whole answer."""
    return b'"type":"end"' in line


def request(url: str, num_tokens: int, options: argparse.Namespace) -> bytes:
    """Return a request for a stream of so many tokens, as bytes."""
    parts = urlsplit(url)
    script = f"tokens={num_tokens} every={1 / TOKENS_PER_SECOND} clock=1"
    if options.chat:
        path = "/v1/chat/completions"
        asked = {"model": "demo", "messages": [{"role": "user", "content": script}], "stream": True}
        asked["max_tokens"] = num_tokens
    else:
        path = "/infer"
        asked = {"tenantId": "bench", "modelId": "demo", "version": "1.0", "input": script}
        asked |= {"maxTokens": num_tokens, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += f"Content-Length: {len(body)}\r\n" + (f"Authorization: Bearer {options.key}\r\n" if options.key else "")
    return head.encode() + b"\r\n" + body


async def follow(url: str, asked: bytes, start: asyncio.Event) -> Reader:
    """Read one stream to its end."""
    await start.wait()
    parts = urlsplit(url)
    transport, reader = await asyncio.get_running_loop().create_connection(
        Reader, parts.hostname or "", parts.port or 80
    )
    transport.write(asked)
    await reader.ended.wait()
    return reader


async def main(options: argparse.Namespace) -> None:
    """Open all streams, follow them to their ends, and say what was seen."""
    num_streams = options.streams
    num_tokens = int((options.seconds + options.opening) * TOKENS_PER_SECOND)
    asked = request(options.url, num_tokens, options)
    starts = [asyncio.Event() for _ in range(num_streams)]
    tasks = [asyncio.create_task(follow(options.url, asked, start)) for start in starts]
    began, spent = time.monotonic(), time.process_time()
    for place, start in enumerate(starts):
        await asyncio.sleep(max(0.0, began + options.opening * place / num_streams - time.monotonic()))
        start.set()
    readers = await asyncio.gather(*tasks)
    share = (time.process_time() - spent) / (time.monotonic() - began)
    tokens = [reader.tokens() for reader in readers]
    # From the last stream's first token to the first stream's last one.
    all_open = max(each[0][0] for each in tokens if each), min(each[-1][0] for each in tokens if each)
    while_open = [delay for each in tokens for at, delay in each if all_open[0] <= at <= all_open[1]]
    delays = [delay for each in tokens for _, delay in each]
    while_open = while_open or delays  # where the last one came so late that the first had ended
    cuts, whole = statistics.quantiles(while_open, n=100), statistics.quantiles(delays, n=100)
    found = {
        "p50_ms": cuts[49] * 1e3,
        "p99_ms": cuts[98] * 1e3,
        "max_ms": max(while_open) * 1e3,
        "with_opening_p99_ms": whole[98] * 1e3,
        "seconds_all_open": max(0.0, all_open[1] - all_open[0]),
        "tokens": len(delays),
        "missing": num_streams * num_tokens - len(delays),
        "tokens_per_write": len(delays) / sum(reader.num_writes for reader in readers),
        "client_cpu_percent": share * 100,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("streams", type=int)
    parser.add_argument("seconds", type=float, help="how long all streams are open together")
    parser.add_argument("--chat", action="store_true", help="as OpenAI's clients ask, at /v1/chat/completions")
    parser.add_argument("--opening", type=float, default=5.0, help="seconds over which the streams are opened")
    parser.add_argument("--key", help="an API key")
    given = parser.parse_args()
    gc.disable()  # what is kept here are pieces of bytes, millions of them
    uvloop.run(main(given))
