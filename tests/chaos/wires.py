"""Network namespaces for workers, each on a wire of its own that can be cut: what is sent over it then just does not arrive."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence


class Wires:
    """A bridge on this machine, and for each name a namespace behind a pair of veth devices."""

    def __init__(self, names: Sequence[str]) -> None:
        tag = os.getpid() % 100000
        net = f"10.213.{tag % 250 + 1}"
        self.host = f"{net}.1"
        """The address of this machine on the bridge."""
        self._bridge = f"tch{tag}"
        self._spaces = {name: f"tether-chaos-{tag}-{number}" for number, name in enumerate(names)}
        self._devices = {name: f"tch{tag}h{number}" for number, name in enumerate(names)}
        self._peers = {name: (f"tch{tag}n{number}", f"{net}.{number + 10}/24") for number, name in enumerate(names)}

    def prefix(self, name: str) -> tuple[str, ...]:
        """Return what a command begins with that is to run behind a wire."""
        return ("ip", "netns", "exec", self._spaces[name])

    def cut(self, name: str) -> None:
        """Nothing passes any more; neither side is told."""
        _ip("link", "set", self._devices[name], "down")

    def mend(self, name: str) -> None:
        """Everything passes again."""
        _ip("link", "set", self._devices[name], "up")

    def open(self) -> None:
        """Make all devices; raise `OSError` where the machine does not allow it."""
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.host}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, space in self._spaces.items():
            device, (peer, address) = self._devices[name], self._peers[name]
            _ip("netns", "add", space)
            _ip("link", "add", device, "type", "veth", "peer", "name", peer, "netns", space)
            _ip("link", "set", device, "master", self._bridge, "up")
            _ip("-n", space, "addr", "add", address, "dev", peer)
            _ip("-n", space, "link", "set", peer, "up")
            _ip("-n", space, "link", "set", "lo", "up")

    def close(self) -> None:
        """Remove what was made, as far as it was."""
        for name, space in self._spaces.items():
            for command in (("link", "del", self._devices[name]), ("netns", "del", space)):
                with contextlib.suppress(OSError):
                    _ip(*command)
        with contextlib.suppress(OSError):
            _ip("link", "del", self._bridge)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def wires(names: Sequence[str]) -> Iterator[Wires]:
    """Wires for these names; raises `OSError` where the machine does not allow network namespaces."""
    found = Wires(names)
    try:
        found.open()
        yield found
    finally:
        found.close()
