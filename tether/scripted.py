"""A runtime child without a model: `python -m tether.scripted` speaks the runtime's protocol and answers by script.

For tests of what lies around the model, and for benchmarks of the path without one; a worker runs it with
`--runtime-module tether.scripted`. The prompt is the script, words of the form `name=value`:

    tokens=N      how many tokens the answer has (1)
    every=S       seconds before each token (0: all at once)
    crash_at=N    the process dies before token N
    error=CODE    the answer ends with this error before its first token; with retry=1 another worker may try
    skip_at=N     token N is left out, which is a worker's mistake
    deaf=1        a cancel changes nothing
    clock=1       each token's text is the time when it is told, by the machine's monotonic clock, for benchmarks
    say=TEXT      the answer is this text, percent-encoded, in tokens of four characters

A conversation's script is its last message; the tools that it has may be called with `say=`. Every
choice has the same answer; log-probabilities are -1. Of inputs to be embedded `every` and `error` count, and the
vector is (its number, its length, 0.6, 0.8).

Token N of every answer has the id N and the text "N ", so a resumed answer can be told from a repeated one. How many jobs
run at once, and how long loading takes, is said by options or by the environment (`SLOTS`, `LOAD_SECONDS`).
"""

from __future__ import annotations

import argparse
import base64
import gc
import math
import os
import struct
import sys
import time
import urllib.parse

import msgspec
import trio

from tether.errors import ErrorInfo
from tether.records import Chat, FinishReason, ModelInfo, TokenLogprobs, Usage
from tether.runtime_messages import (
    BadLine,
    Cancel,
    Embed,
    End,
    Event,
    Generate,
    Loading,
    Ready,
    Refused,
    Started,
    Tokens,
    decode_request,
    encode,
)

STEP_SECONDS = 0.01
"""What is due within so long is told together, as a model tells the tokens of a step."""
SLOTS = "TETHER_SCRIPTED_SLOTS"
LOAD_SECONDS = "TETHER_SCRIPTED_LOAD_SECONDS"


class Steps:
    """Wakes all who wait for the same step at once: one timer, however many wait."""

    def __init__(self) -> None:
        self._waiting: dict[int, trio.Event] = {}
        self._someone = trio.Event()

    async def run(self) -> None:
        """Make one step after another while somebody waits, until cancelled."""
        while True:
            if not self._waiting:
                self._someone = trio.Event()
                await self._someone.wait()
            await trio.sleep(STEP_SECONDS)
            now = trio.current_time()
            for step in [step for step in self._waiting if step * STEP_SECONDS <= now]:
                self._waiting.pop(step).set()

    async def wait_until(self, due: float) -> None:
        """Return at a step that is not before `due`, a time of trio's clock; at once where that is over."""
        if due <= trio.current_time():
            await trio.lowlevel.checkpoint()
            return
        event = self._waiting.setdefault(math.ceil(due / STEP_SECONDS), trio.Event())
        self._someone.set()
        await event.wait()


class ScriptedRuntime:
    """Answers requests by their scripts; `tell` takes what it says."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._steps = Steps()
        self._untold: list[Event] = []
        self._live: dict[str, trio.CancelScope] = {}
        nursery.start_soon(self._steps.run)

    def handle(self, line: bytes) -> None:
        """Take one line of stdin."""
        match decode_request(line):
            case Generate() as request if request.id in self._live:
                self.tell(Refused(request.id, ErrorInfo("invalid_request", "this id is live")))
            case Generate() as request:
                script = _script(_prompt(request))
                plain = not request.emitted and request.sampling.n == 1 and request.sampling.logprobs is None
                if plain and script.keys() <= {"tokens"} and float(script.get("tokens", 1)) <= 1:
                    self._answer_at_once(request)
                else:
                    scope = self._live[request.id] = trio.CancelScope()
                    self._nursery.start_soon(self._answer, request, script, scope)
            case Embed() as request:
                scope = self._live[request.id] = trio.CancelScope()
                self._nursery.start_soon(self._embed, request, scope)
            case Cancel(cancel=key):
                if key in self._live and not self._live[key].shield:
                    self._live[key].cancel()
            case BadLine() as bad:
                self.tell(Refused(bad.id, bad.error))

    def tell(self, *events: Event) -> None:
        """Tell events soon, together with all others of the step."""
        if not self._untold:
            self._nursery.start_soon(self._tell_soon)
        self._untold += events

    async def _tell_soon(self) -> None:
        # Whoever runs in the same turn of trio's loop says something, too.
        await trio.lowlevel.checkpoint()
        self.flush()

    def flush(self) -> None:
        """Write all that is to be told in one go."""
        untold, self._untold = self._untold, []
        line = memoryview(b"".join(map(encode, untold)))
        while line:
            line = line[os.write(sys.stdout.fileno(), line) :]

    def _answer_at_once(self, request: Generate) -> None:
        told = Tokens(request.id, 0, (0,), "0 ")
        self.tell(Started(request.id, 1), told, End(request.id, "stop", Usage(1, 1)))

    async def _answer(self, request: Generate, script: dict[str, str], scope: trio.CancelScope) -> None:
        self.tell(Started(request.id, 1))
        num_tokens = 0
        num_choices = request.sampling.n
        emitted = [len(ids) for ids in request.emitted] or [0] * num_choices
        texts = _texts(script)
        count = min(len(texts), request.sampling.max_tokens)
        if "error" in script:
            error = ErrorInfo(script["error"], "as the script says")
            end = End(request.id, "error", Usage(1, 0), error, retry=script.get("retry") == "1")
        else:
            scope.shield = script.get("deaf") == "1"
            with scope:
                due = trio.current_time()
                for position in range(min(emitted), count):
                    due = max(due + float(script.get("every", "0")), trio.current_time())
                    await self._steps.wait_until(due)
                    if script.get("crash_at") == str(position):
                        self.flush()
                        os._exit(3)
                    text = f"{time.monotonic():.6f} " if script.get("clock") == "1" else texts[position]
                    for choice in range(num_choices):
                        if script.get("skip_at") != str(position) and position >= emitted[choice]:
                            self.tell(_tokens(request, position, text, choice))
                            num_tokens += 1
            reason: FinishReason = "stop" if count == len(texts) else "length"
            if scope.cancelled_caught:
                reason = "cancelled"
            choices = (reason,) * num_choices if num_choices > 1 else ()
            end = End(request.id, reason, Usage(1, num_tokens), choices=choices)
        del self._live[request.id]
        self.tell(end)

    async def _embed(self, request: Embed, scope: trio.CancelScope) -> None:
        self.tell(Started(request.id, len(request.inputs)))
        end = End(request.id, "stop", Usage(len(request.inputs), len(request.inputs) - request.num_told))
        with scope:
            for number, each in enumerate(request.inputs[request.num_told :], request.num_told):
                script = _script(each) if isinstance(each, str) else {}
                await self._steps.wait_until(trio.current_time() + float(script.get("every", "0")))
                if "error" in script:
                    end = End(request.id, "error", Usage(1, 0), ErrorInfo(script["error"], "as the script says"))
                    break
                vector = struct.pack("<4f", number, len(each), 0.6, 0.8)
                self.tell(Tokens(request.id, number, (-1,), base64.b64encode(vector).decode() + "\n"))
        if scope.cancelled_caught:
            end = End(request.id, "cancelled", Usage(1, 0))
        del self._live[request.id]
        self.tell(end)


def _prompt(request: Generate) -> str:
    if not request.chat:
        return request.input
    return msgspec.json.decode(request.input.encode(), type=Chat).messages[-1].content


def _texts(script: dict[str, str]) -> list[str]:
    """Return the texts of all tokens."""
    if "say" in script:
        text = urllib.parse.unquote(script["say"])
        return [text[start : start + 4] for start in range(0, len(text), 4)]
    return [f"{position} " for position in range(int(script.get("tokens", "1")))]


def _tokens(request: Generate, position: int, text: str, choice: int) -> Tokens:
    num_top = request.sampling.logprobs
    if num_top is None:
        return Tokens(request.id, position, (position,), text, choice)
    top = tuple((position + place, -1.0 - place) for place in range(num_top))
    logprobs = TokenLogprobs(-1.0, top, (text, *(text if place == 0 else f"~{place}" for place in range(num_top))))
    return Tokens(request.id, position, (position,), text, choice, (logprobs,))


def _script(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


async def _serve(model: ModelInfo, load_seconds: float) -> None:
    async with trio.open_nursery() as nursery:
        runtime = ScriptedRuntime(nursery)
        runtime.tell(Loading("weights", 0.5))
        await trio.sleep(load_seconds)
        gc.freeze()  # as the runtime does: no token waits for a look through what was imported
        runtime.tell(Loading("weights", 1.0), Ready(model))
        buffer = b""
        stdin = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
        while chunk := await stdin.receive_some():
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                runtime.handle(line)
        nursery.cancel_scope.cancel()  # the worker is gone


def main() -> None:
    """Run the scripted runtime on stdin and stdout."""
    parser = argparse.ArgumentParser(prog="python -m tether.scripted")
    parser.add_argument("--model", required=True)
    parser.add_argument("--slots", type=int, default=int(os.environ.get(SLOTS, "64")))
    parser.add_argument("--load-seconds", type=float, default=float(os.environ.get(LOAD_SECONDS, "0")))
    options, _ = parser.parse_known_args()  # a real runtime's other options mean nothing here
    model = ModelInfo(options.model, "1.0", revision="script", context_tokens=4096, slots=options.slots, embeds=True)
    trio.run(_serve, model, options.load_seconds)


if __name__ == "__main__":
    main()
