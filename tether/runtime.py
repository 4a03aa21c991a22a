"""The runtime child: a process that holds one model and answers on pipes, in JSON lines.

    echo '{"input": "What is the capital of France?"}' | python -m tether.runtime --model demo

prints `{"result": "The capital of France is Paris."}`, one line for each line read. With `--stream` it speaks
`runtime_messages`, which is what a worker uses: one thread reads stdin, one plain loop takes what has come and makes the
next token of every job that runs. The loop outlives any single request; it ends with stdin.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Protocol, runtime_checkable

from tether import catalog
from tether.errors import (
    InternalError,
    InvalidRequest,
    ModelUnavailable,
    TetherError,
    UnsupportedParameter,
)
from tether.records import FinishReason, ModelInfo
from tether.runtime_messages import (
    MAX_LINE_BYTES,
    BadLine,
    Cancel,
    Embed,
    End,
    Event,
    Failure,
    Fatal,
    Generate,
    Loading,
    Ready,
    Refused,
    Request,
    Result,
    Stage,
    decode_ask,
    decode_request,
    describe,
    encode,
    encode_events,
)

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What answers the requests: a model here (`tether.engine`), or another server.

    Only the loop calls it, from one thread. Each request that `add` takes gets, from the steps that follow, its events in
    the order of `runtime_messages`: `Started`, `Tokens`, and one `End`.
    """

    info: ModelInfo

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute and nothing to tell; the loop then waits for a line."""

    def knows(self, request_id: str) -> bool:
        """Whether a request with this id is live."""

    def add(self, request: Generate) -> None:
        """Take a request, whose id is not live; quick. What it raises is the request's end."""

    def cancel(self, request_id: str) -> bool:
        """End a live request; its `End` comes from the next step. False: it is not live."""

    def step(self) -> list[Event]:
        """Go on with all requests by one step, and return what is to be told; new lines are read between steps.

        What fails is told, not raised. May wait for events for some tens of milliseconds, never longer.
        """

    def answer(self, request: Generate) -> tuple[str, FinishReason]:
        """Return the whole text of a request, and how it ended, while nothing else runs; raises what it ended with."""


@runtime_checkable
class Embeds(Protocol):
    """An engine that gives embeddings, too."""

    def embed(self, request: Embed) -> None:
        """Take a request, whose id is not live; quick. What it raises is the request's end."""


class Pipe:
    """The way out: whole lines to a file descriptor that no library knows of."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, *messages: Event | Result | Failure) -> None:
        """Write messages in one go. Blocks while the reader does not read; ends the process when the reader is gone."""
        self._write(b"".join(map(encode, messages)))

    def tell(self, events: Sequence[Event]) -> None:
        """Write a step's events in one go, as `send` does."""
        self._write(encode_events(events))

    def _write(self, lines: bytes) -> None:
        line = memoryview(lines)
        # Progress of a download comes from several threads.
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except BrokenPipeError:
                # Nobody can be told anything any more, and whoever started this process has gone.
                os._exit(0)


def read_lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield each line, without its end; None for one above `MAX_LINE_BYTES`, which is skipped, never held."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield None
        elif line.strip():
            yield line


_OVERLONG = InvalidRequest(f"a line must not be longer than {MAX_LINE_BYTES} bytes")


class Loop:
    """Requests in, events out: all lines that have come, then a step of everything that runs, then one write."""

    def __init__(self, engine: Engine, pipe: Pipe, inbox: queue.SimpleQueue[Request | BadLine]) -> None:
        self._engine = engine
        self._pipe = pipe
        self._inbox = inbox

    def run_forever(self) -> None:
        """Serve; the thread that reads stdin ends the process."""
        while True:
            self.take_requests()
            self.step()

    def take_requests(self) -> None:
        """Take all that has come; with nothing to do, wait for the next."""
        idle = self._engine.is_idle
        try:
            while True:
                self._take(self._inbox.get(block=idle))
                idle = False
        except queue.Empty:
            return

    def step(self) -> None:
        """Go on with all that runs, and tell what came of it."""
        if events := self._engine.step():
            self._pipe.tell(events)

    def _take(self, request: Request | BadLine) -> None:
        match request:
            case Cancel(cancel=request_id):
                if not self._engine.cancel(request_id):
                    log.debug("nothing to cancel: %s is not live", request_id)
            case Generate() | Embed():
                self._add(request)
            case BadLine(id=None, error=error):
                self._pipe.send(Refused(None, error))
            case BadLine(id=str(request_id), error=error):
                self._pipe.send(
                    Refused(request_id, error)
                    if self._engine.knows(request_id)
                    else End(request_id, "error", error=error, retry=False)
                )

    def _add(self, request: Generate | Embed) -> None:
        if self._engine.knows(request.id):
            self._pipe.send(Refused(request.id, InvalidRequest(f"the id {request.id} is live", param="id").to_info()))
            return
        try:
            if isinstance(request, Generate):
                self._engine.add(request)
            elif isinstance(self._engine, Embeds):
                self._engine.embed(request)
            else:
                raise UnsupportedParameter("this model gives no embeddings", param="model")
        except Exception as exc:  # noqa: BLE001 - whatever a tokenizer makes of it, it is this request's end alone
            error, retry = describe(exc)
            self._pipe.send(End(request.id, "error", error=error, retry=retry))


def answer(engine: Engine, line: bytes | None) -> Result | Failure:
    """Return the whole answer to a line typed by hand, or why there is none."""
    try:
        if line is None:
            raise _OVERLONG
        ask = decode_ask(line)
        text, _ = engine.answer(Generate("", ask.input, ask.sampling, raw=ask.raw))
    except Exception as exc:  # noqa: BLE001 - the next line may do better
        return Failure(describe(exc)[0].message)
    return Result(text)


def take_standard_streams() -> tuple[BinaryIO, Pipe]:
    """Keep stdin and stdout for this module alone: whatever a library prints goes to stderr, and none reads our input."""
    sys.stdout.flush()
    requests = os.fdopen(os.dup(0), "rb", buffering=1 << 16)
    pipe = Pipe(os.dup(1))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, pipe


def load_engine(args: argparse.Namespace, on_progress: Callable[[Stage, float], None]) -> Engine:
    """Return the engine for the command's model; raise `ModelUnavailable` before anything heavy where that can be told."""
    spec = catalog.resolve(args.model).served_as(args.served_name, args.served_version).with_dtype(args.dtype)
    spec = catalog.check(spec)
    on_progress("import", 0.0)
    # Importing makes hundreds of thousands of objects that live as long as the process: looking for garbage among them costs a second of
    # four while they are made, and time at every collection afterwards.
    gc.disable()
    try:
        # Seconds, after the cheap refusals and the first sign of life.
        from tether.embedding import EmbeddingEngine  # noqa: PLC0415
        from tether.engine import Engine as ModelEngine  # noqa: PLC0415

        on_progress("import", 1.0)
        engine = ModelEngine.load(
            spec, device=args.device, threads=args.threads, slots=args.slots, on_progress=on_progress
        )
        return EmbeddingEngine(engine)
    finally:
        gc.freeze()
        gc.enable()


Load = Callable[[argparse.Namespace, Callable[[Stage, float], None]], Engine]
"""From a command's options to what answers its requests."""


def serve_stream(args: argparse.Namespace, requests: BinaryIO, pipe: Pipe, load: Load = load_engine) -> int:
    """Serve a worker; return the exit code when the model cannot be served. Does not return otherwise."""
    # Ctrl-C reaches the whole process group, and a service manager's SIGTERM all processes; the worker decides, and tells
    # this process by closing stdin.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: queue.SimpleQueue[Request | BadLine] = queue.SimpleQueue()

    def read() -> None:
        for line in read_lines(requests):
            inbox.put(BadLine(None, _OVERLONG.to_info()) if line is None else decode_request(line))
        # The worker is gone: nobody wants the rest, not even of a model that is still loading.
        os._exit(0)

    threading.Thread(target=read, name="requests", daemon=True).start()
    try:
        engine = load(args, lambda stage, fraction: pipe.send(Loading(stage, round(fraction, 3))))
    except TetherError as exc:
        pipe.send(Fatal(exc.to_info()))
        return 1
    except Exception as exc:
        log.exception("loading failed")
        pipe.send(Fatal(InternalError(f"loading `{args.model}` failed: {type(exc).__name__}: {exc}").to_info()))
        return 1
    pipe.send(Ready(engine.info))
    Loop(engine, pipe, inbox).run_forever()
    return 0


def serve_by_hand(args: argparse.Namespace, requests: BinaryIO, pipe: Pipe, load: Load = load_engine) -> int:
    """Answer each line of stdin with one line of stdout; return the exit code at its end."""
    try:
        engine = load(args, lambda _stage, _fraction: None)
    except ModelUnavailable as exc:
        print(f"tether.runtime: {exc.message}", file=sys.stderr)  # noqa: T201 - a person reads it
        return exc.exit_code
    for line in read_lines(requests):
        pipe.send(answer(engine, line))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m tether.runtime", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a catalogue's name, a Hugging Face id, or a local folder")
    parser.add_argument("--as", dest="served_name", metavar="NAME", help="serve it under this name")
    parser.add_argument("--as-version", dest="served_version", metavar="VERSION", help="serve it as this version")
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16, int8 or int4 (default: by size)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads for each kernel (default: all cores; a tiny model's batch is divided over them instead)",
    )
    parser.add_argument("--slots", type=int, help="jobs at once (default: by the model's size and the free memory)")
    parser.add_argument("--stream", action="store_true", help="speak the worker's protocol")
    parser.add_argument("--log-level", default="WARNING", help="of what goes to stderr")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if args.slots is not None and args.slots < 1:
        parser.error("--slots must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the child and return its exit code."""
    args = parse(argv)
    requests, pipe = take_standard_streams()
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # Their progress bars would fill the worker's log.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return (serve_stream if args.stream else serve_by_hand)(args, requests, pipe)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
