"""The link of a node to itself: its roles say the same to each other as over the network."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import trio

from tether.errors import LinkClosed, LinkFull, ProtocolViolation
from tether.link import Link, allowed_from, tag_of
from tether.messages import LinkMessage
from tether.records import Role

log = logging.getLogger(__name__)

Handler = Callable[[Link, Any], None]


class LocalLink(Link):
    """The link to oneself: a bounded queue that a task drains."""

    is_local = True

    def __init__(
        self, peer_id: str, *, roles: frozenset[Role], name: str, region: str, boot_id: str, bound: int
    ) -> None:
        super().__init__(peer_id, roles=roles, name=name, region=region, boot_id=boot_id)
        self.allowed: frozenset[type] = allowed_from(roles)
        self.is_running = False
        self.wake = trio.Event()
        self.waiting: deque[LinkMessage] = deque()
        self._bound = bound

    @property
    def is_open(self) -> bool:
        """Whether the node runs."""
        return self.is_running

    @property
    def num_buffered_bytes(self) -> int:
        """Nothing: no bytes are made of what is said here."""
        return 0

    def send(self, message: LinkMessage) -> None:
        """Put `message` into the queue; raises as `Link.send` says."""
        if not self.is_running:
            raise LinkClosed("this node is not running")
        if type(message) not in self.allowed:
            raise ProtocolViolation(
                f"a node that is {'+'.join(sorted(self.roles))} may not send {tag_of(type(message))}"
            )
        if len(self.waiting) >= self._bound:
            raise LinkFull(f"{len(self.waiting)} messages already wait in this node")
        self.waiting.append(message)
        self.wake.set()

    def close(self, reason: str = "") -> None:
        """Do nothing: a node cannot part with itself."""

    async def drain(self, handlers: Mapping[type, Handler]) -> None:
        """Hand each message to the handler of its type, in order, until cancelled."""
        while True:
            if not self.waiting:
                self.wake = trio.Event()
                await self.wake.wait()
            # Only what is there now: a handler that sends to its own node again must let others run in between.
            for _ in range(len(self.waiting)):
                message = self.waiting.popleft()
                handler = handlers.get(type(message))
                if handler is None:
                    log.error("no role of this node takes %s", tag_of(type(message)), extra={"action": "no_handler"})
                    continue
                try:
                    handler(self, message)
                except Exception:
                    log.exception("the handler of %s failed", tag_of(type(message)), extra={"action": "handler_failed"})
            await trio.lowlevel.checkpoint()
