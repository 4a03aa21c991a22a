"""Answers questions that come over links, each in a task of its own, so many at once; whatever goes wrong is an answer too."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
import trio

from tether.errors import ErrorInfo, InternalError, LinkError, ProtocolViolation, QueueFull, TetherError
from tether.link import Link
from tether.messages import MAX_FRAME_BYTES, Reply
from tether.tasks import start_if_open

log = logging.getLogger(__name__)

MAX_OPEN = 256
"""Questions that may be answered at the same time; a further one is refused."""
_ENVELOPE_BYTES = 1024
"""Of a message, around its records."""

R = TypeVar("R", bound=msgspec.Struct)


def fitting(records: Sequence[R]) -> tuple[R, ...]:
    """Return as many of the first records as one message holds, and at least one where there is any."""
    room = MAX_FRAME_BYTES - _ENVELOPE_BYTES
    for number, record in enumerate(records):
        room -= len(msgspec.json.encode(record)) + 1
        if room < 0:
            return tuple(records[: max(1, number)])
    return tuple(records)


class Answering:
    """The questions that are open."""

    def __init__(self) -> None:
        self.num_open = 0
        self._nursery: trio.Nursery

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def soon(self, link: Link, answer: Callable[[], Awaitable[Reply]], refuse: Callable[[ErrorInfo], Reply]) -> None:
        """Send what `answer` finds, or what `refuse` makes of its error."""
        if self.num_open >= MAX_OPEN:
            self.send(link, refuse(QueueFull("too many questions are open already").to_info()))
            return
        self.num_open += 1
        start_if_open(self._nursery, self._answer, link, answer, refuse)

    async def _answer(
        self, link: Link, answer: Callable[[], Awaitable[Reply]], refuse: Callable[[ErrorInfo], Reply]
    ) -> None:
        try:
            reply = await answer()
        except TetherError as exc:
            reply = refuse(exc.to_info())
        except Exception:
            log.exception("a question was not answered")
            reply = refuse(InternalError().to_info())
        finally:
            self.num_open -= 1
        try:
            link.send(reply)
        except ProtocolViolation:
            self.send(link, refuse(InternalError("the answer is longer than a message may be").to_info()))
        except LinkError as exc:
            log.debug("no answer to %s: %s", link.name, exc.message)

    def send(self, link: Link, reply: Reply) -> None:
        """Send an answer that is there already; a link that takes none is left to itself."""
        try:
            link.send(reply)
        except LinkError as exc:
            log.debug("no answer to %s: %s", link.name, exc.message)
