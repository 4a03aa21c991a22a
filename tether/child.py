"""One runtime child: a process that holds a model, started, fed, listened to, and started again when it dies.

The child is a process of its own so that a crash in native code, or memory that runs out, takes the model down and not
the worker, and so that the worker itself never loads torch. It speaks JSON lines (runtime_messages.py).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import trio

from tether.errors import ProtocolViolation, RuntimeDied, TetherError, from_info
from tether.records import ModelInfo
from tether.runtime_messages import (
    MAX_LINE_BYTES,
    Event,
    Fatal,
    Loading,
    Ready,
    Request,
    decode_event,
    encode,
)

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LAST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A child that lived so long begins with the first pause again."""
RUNTIME_VARIABLES = "TETHER_SCRIPTED_"
"""What the names of variables for runtimes themselves begin with."""
STOP_SECONDS = 2.0
"""How long a child may take to exit after its stdin is closed, before it is killed."""


class RuntimeChild:
    """Keeps one runtime process alive; `on_event` hears what it says, `on_ready` and `on_lost` when it comes and goes.

    All callbacks run in the child's reading task and must not block. `on_lost` is called once for each time that the
    process ended after it was ready; what ran on it then is lost.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        *,
        on_event: Callable[[Event], None],
        on_ready: Callable[[ModelInfo], None],
        on_lost: Callable[[], None],
        on_loading: Callable[[Loading], None] = lambda _: None,
        variables: Iterable[str] = (),
    ) -> None:
        """`variables` are those of Tether's own environment variables that the child needs; it gets no others of them."""
        self.name = name
        self.arguments = arguments
        self.model: ModelInfo | None = None
        """What the child serves; None while it is not ready."""
        self.num_starts = 0
        self._was_ready = False
        self._on_event = on_event
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_loading = on_loading
        self._variables = frozenset(variables)
        self._process: trio.Process | None = None
        self._outbox = bytearray()
        self._wake = trio.Event()

    @property
    def pid(self) -> int | None:
        """The process id, or None while there is no process."""
        return self._process.pid if self._process is not None else None

    def send(self, request: Request) -> None:
        """Hand a request to the child; raises `RuntimeDied` when there is none to take it."""
        if self.model is None:
            raise RuntimeDied(f"the runtime of {self.name} is not ready")
        self._outbox += encode(request)
        self._wake.set()

    def kill(self) -> None:
        """End the process at once; it is started again."""
        if self._process is not None:
            self._process.kill()

    async def run(self, task_status: trio.TaskStatus[ModelInfo] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the child running until cancelled; report its model as started when it is ready for the first time.

        Raises the child's own error when its first start fails (a model that cannot be loaded stays that way). Later it
        is started again, after a pause that grows while it keeps dying.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            started_at = trio.current_time()
            try:
                await self._run_once(task_status if self.num_starts == 0 else trio.TASK_STATUS_IGNORED)
            except TetherError as exc:
                if self.num_starts == 1 and not self._was_ready:
                    raise
                if trio.current_time() - started_at > HEALTHY_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                log.warning("runtime of %s: %s; starting it again in %.1f s", self.name, exc.message, pause)
            await trio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    async def _run_once(self, task_status: trio.TaskStatus[ModelInfo]) -> None:
        self.num_starts += 1
        self._was_ready = False
        self._outbox.clear()
        try:
            process = self._process = await trio.lowlevel.open_process(
                [sys.executable, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # A Ctrl-C on the terminal reaches the whole foreground group; the worker decides when its child stops.
                start_new_session=True,
                env={**_inherited(self._variables), "PYTHONUNBUFFERED": "1"},
            )
        except OSError as exc:
            raise RuntimeDied(f"it cannot be started: {exc.strerror or exc}") from exc
        failure: TetherError | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, process)
                try:
                    await self._read(process, task_status)
                except TetherError as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
        finally:
            was_ready, self.model, self._process = self.model is not None, None, None
            if was_ready:
                self._on_lost()
            with trio.CancelScope(shield=True):
                await self._stop(process)
        raise failure or RuntimeDied(f"it ended with {_exit_words(process.returncode)}")

    async def _write(self, process: trio.Process) -> None:
        stdin: Any = process.stdin
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            waiting, self._outbox = bytes(self._outbox), bytearray()
            try:
                await stdin.send_all(waiting)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # the reader sees the end of stdout and tells the rest

    async def _read(self, process: trio.Process, task_status: trio.TaskStatus[ModelInfo]) -> None:
        stdout: Any = process.stdout
        buffer = bytearray()
        while chunk := await stdout.receive_some(1 << 16):
            buffer += chunk
            if b"\n" not in chunk:
                if len(buffer) > MAX_LINE_BYTES:
                    raise RuntimeDied("it wrote a line without an end")
                continue
            *lines, rest = bytes(buffer).split(b"\n")
            buffer = bytearray(rest)
            for line in lines:
                try:
                    event = decode_event(line)
                except ProtocolViolation as exc:
                    raise RuntimeDied(f"it broke the protocol: {exc.message}") from exc
                self._handle(event, task_status)

    def _handle(self, event: Event, task_status: trio.TaskStatus[ModelInfo]) -> None:
        match event:
            case Loading():
                self._on_loading(event)
            case Ready(model):
                self.model = model
                self._was_ready = True
                self._on_ready(model)
                task_status.started(model)
            case Fatal(error):
                raise from_info(error)
            case _:
                self._on_event(event)

    async def _stop(self, process: trio.Process) -> None:
        """Close its stdin, which asks it to exit, and kill it when it does not."""
        stdin: Any = process.stdin
        stdout: Any = process.stdout
        await stdin.aclose()
        with trio.move_on_after(STOP_SECONDS):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        await stdout.aclose()


def _inherited(variables: Collection[str]) -> dict[str, str]:
    """Return this process's environment for a child that runs other people's libraries, on files from anywhere.

    Tether's own variables are the worker's settings, and there are secrets among them: the store's password, an API key.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TETHER_") or name.startswith(RUNTIME_VARIABLES) or name in variables
    }


def _exit_words(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"signal {-returncode}" + (" (killed, perhaps for memory)" if returncode == -9 else "")
    return f"exit code {returncode}"
