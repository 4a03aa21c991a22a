"""Real processes of Tether for the tests: started with their output in a file, waited for by what they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import psutil

from tests.ports import free_port

T = TypeVar("T")

START_SECONDS = 60.0
"""A worker imports torch, on a machine that is busy with other tests."""
STOP_SECONDS = 30.0
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def eventually(probe: Callable[[], T | None], *, seconds: float = START_SECONDS, what: str = "") -> T:
    """Return the first true value of `probe`, which is asked again and again for at most so long."""
    deadline = time.monotonic() + seconds
    while True:
        if found := probe():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what or probe}")
        time.sleep(0.03)


def own_environment(home: Path) -> dict[str, str]:
    """Return the environment of a machine's processes: no setting of Tether's comes from outside."""
    return {**{key: value for key, value in os.environ.items() if not key.startswith("TETHER_")}, "HOME": str(home)}


class Process:
    """A `tether` process."""

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        log: Path,
        *,
        python: str = sys.executable,
        folder: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix` is a command that becomes the one after it, such as `ip netns exec NAME`."""
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*prefix, python, "-m", "tether", *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        """Everything that it has said so far."""
        return self.log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def children(self) -> list[psutil.Process]:
        """Its child processes: a worker's runtimes."""
        found: list[psutil.Process] = psutil.Process(self.pid).children(recursive=True)
        return found

    def wait_for(self, text: str, seconds: float = START_SECONDS) -> None:
        """Wait until it has said `text`."""

        def said() -> bool:
            if text in self.output:
                return True
            assert self.is_alive, f"it ended without saying {text!r}:\n{self.output}"
            return False

        eventually(said, seconds=seconds, what=f"{text!r} in:\n{self.output}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait(seconds)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop, and return its exit code."""
        if self.is_alive:
            self.send(number)
        return self.wait()

    def kill(self) -> None:
        """End it, and every child it has, at once."""
        if self.is_alive:
            children = self.children
            self._process.kill()
            for child in children:
                if child.is_running():
                    child.kill()
        self._process.wait()


class Machine:
    """A machine with a data directory and ports of its own, and the commands that people type there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.data_dir = folder / "data"
        self.port = free_port()
        self.listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
        self.http = httpx.Client(base_url=self.url, verify=False, timeout=START_SECONDS)
        self._processes: list[Process] = []
        self.environment = {
            **own_environment(folder),
            "TETHER_DATA_DIR": str(self.data_dir),
            "TETHER_GATEWAY_PORT": str(self.port),
            "TETHER_ORCHESTRATOR_LISTEN": self.listen,
            "TETHER_GATEWAY_REQUESTS_PER_MINUTE": "0",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        for process in self._processes:
            process.kill()
            sys.stderr.write(f"--- {process.log.name}\n{process.output}\n")  # shown where the test failed

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: str, **environment: str) -> Process:
        """Start `tether` with these arguments and go on."""
        log = self.folder / f"{len(self._processes)}-{arguments[0]}.log"
        process = Process(list(arguments), {**self.environment, **environment}, log)
        self._processes.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `tether` with these arguments to its end."""
        return subprocess.run(
            [sys.executable, "-m", "tether", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            env={**self.environment, **environment},
            check=False,
        )

    def read(self, *arguments: str) -> Any:
        """Return what a command that reads says as JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def scripted(self, slots: int = 4) -> dict[str, str]:
        """Return the environment that gives a worker the scripted runtime."""
        return {"TETHER_WORKER_RUNTIME_MODULE": "tether.scripted", "TETHER_SCRIPTED_SLOTS": str(slots)}

    def wait_ready(self, *processes: Process) -> None:
        """Wait until jobs can be served."""

        def ready() -> bool:
            for process in processes:
                assert process.is_alive, process.output
            try:
                return self.http.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, what="ready")

    def infer(self, text: str = QUESTION, **fields: Any) -> httpx.Response:
        """Ask for an answer, as any client would."""
        body = {"tenantId": "demo-tenant", "modelId": "demo", "version": "1.0", "input": text, **fields}
        return self.http.post("/infer", json=body)
