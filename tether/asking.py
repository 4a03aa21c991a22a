"""Questions over links: each has one reply, from the link that it was sent on, or none in time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import trio

from tether.errors import DeadlineExceeded, LinkClosed
from tether.link import Link
from tether.messages import LinkMessage, Reply

log = logging.getLogger(__name__)

R = TypeVar("R")


class _Question:
    """A request that waits for its reply."""

    def __init__(self, link: Link, reply_type: type) -> None:
        self.link = link
        self.reply_type = reply_type
        self.done = trio.Event()
        self.reply: Any = None
        self.reason = ""


class Questions:
    """The questions of one node that wait for their replies."""

    def __init__(self) -> None:
        self._waiting: dict[int, _Question] = {}
        self._request_ids = itertools.count(1)

    async def ask(
        self, link: Link, make_message: Callable[[int], LinkMessage], reply_type: type[R], *, timeout_seconds: float
    ) -> R:
        """Send `make_message(request_id)` and return the reply with that `request_id`; raises as `Links.ask` does."""
        request_id = next(self._request_ids)
        question = _Question(link, reply_type)
        self._waiting[request_id] = question
        try:
            link.send(make_message(request_id))
            with trio.fail_after(timeout_seconds):
                await question.done.wait()
        except trio.TooSlowError as exc:
            raise DeadlineExceeded(f"{link.name} did not answer within {timeout_seconds:g} s") from exc
        finally:
            del self._waiting[request_id]
        if question.reply is None:
            raise LinkClosed(f"the link to {link.name} closed before it answered: {question.reason}")
        return cast(R, question.reply)

    def take(self, link: Link, reply: Reply) -> None:
        """Hand a reply to whoever waits for it; one that nobody waits for is dropped."""
        question = self._waiting.get(reply.request_id)
        if question is None or question.link is not link or not isinstance(reply, question.reply_type):
            log.debug("nobody waits for a reply", extra={"action": "late_reply", "peer_id": link.peer_id})
            return
        question.reply = reply
        question.done.set()

    def fail(self, link: Link, reason: str) -> None:
        """Tell all that wait for a reply on this link that none will come."""
        for question in self._waiting.values():
            if question.link is link and question.reply is None:
                question.reason = reason
                question.done.set()
