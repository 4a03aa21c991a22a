"""Free ports of loopback, for the servers of tests."""

from __future__ import annotations

import secrets
import socket
from typing import Final

PORTS: Final = range(20_000, 32_000)
"""Below those that systems give to clients: else a connection may take a port before the server that was told it does."""


def free_port() -> int:
    """Return a port of loopback that was free a moment ago, any of many, since other tests run at the same time."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
