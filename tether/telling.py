"""What turns a job's events into what a client reads: each told thing once, whatever carries it there.

Server-sent events and a WebSocket's messages carry the same `Told`s, with the same ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from tether.answers import joined
from tether.messages import JobEnd, JobEvent, JobQueued
from tether.records import TokenLogprobs

COMMENT = b": still here\n"
"""Sent while nothing else is. Without an empty line behind it: some clients take that for an event without data, once an
event before it had an id."""


class Told(NamedTuple):
    """One thing that a stream says."""

    data: dict[str, Any]
    id: str | None = None
    """How far the client has read with it (cursor.py); None where a stream cannot go on from there."""
    name: str | None = None
    """What kind of event it is, where its client looks for that."""


class Telling(Protocol):
    """What turns a job's events into what one kind of client reads (infer_api.py, openai_api.py)."""

    end: JobEnd | None
    fields: dict[str, str]
    """What the network calls a job's parts, and what this client calls them."""
    waits_for_token: bool
    """Whether the status of a stream is not sent before there is a token, so that a failure can still be a status."""
    closing: bytes
    """What a stream of server-sent events ends with."""

    def add(self, event: JobEvent) -> None:
        """Take an event in."""
        ...

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        ...

    def events(self, event: JobEvent) -> Iterator[Told]:
        """Take an event in and yield what a stream says of it; to be read to its end."""
        ...

    def error(self, error: dict[str, Any]) -> Told:
        """Return the last event of a stream that breaks off."""
        ...


def queued(event: JobQueued) -> dict[str, Any]:
    """Return where a job stands: the member of our own of what the OpenAI dialect has no word for."""
    facts = {
        "place": event.place,
        "expected_seconds": event.expected_seconds,
        "deadline_seconds": round(event.deadline_seconds, 1),
    }
    return {"tether": {"queued": facts}}


def unseen(logprobs: Sequence[TokenLogprobs], num_chars: int, seen: int) -> tuple[tuple[TokenLogprobs, ...], int]:
    """Return those that a client with `seen` characters does not have, and where the last token ends.

    `num_chars` is where the first begins; how long each is, is said by its own text. A token without text is told with the
    next text (`with_text`), so one that stands where the client has come to was not.
    """
    found: list[TokenLogprobs] = []
    for each in logprobs:
        begin, num_chars = num_chars, num_chars + len(each.text)
        if num_chars > seen or begin == seen:
            found.append(each)
    return tuple(found), num_chars


def with_text(logprobs: Sequence[TokenLogprobs]) -> tuple[list[TokenLogprobs], list[TokenLogprobs]]:
    """Return what is told with the text up to here, and what waits for the next: tokens at the end without any."""
    end = max((place + 1 for place, each in enumerate(logprobs) if each.text), default=0)
    return list(logprobs[:end]), list(logprobs[end:])


def sse(told: Told) -> bytes:
    """Return a server-sent event (WHATWG HTML, 9.2): its data is JSON on one line."""
    name = b"" if told.name is None else f"event: {told.name}\n".encode()
    event_id = b"" if told.id is None else f"id: {told.id}\n".encode()
    return name + event_id + b"data: " + msgspec.json.encode(told.data) + b"\n\n"


def tell(telling: Telling, events: list[JobEvent]) -> bytes:
    """Take events in and return what a stream of server-sent events says of them; tokens that came together are one."""
    if len(events) == 1:
        return lines(telling, events[0])
    return b"".join(lines(telling, event) for event in joined(events))


def lines(telling: Telling, event: JobEvent) -> bytes:
    """Take an event in and return what a stream of server-sent events says of it: nothing, a comment, or some events."""
    found = b"".join(map(sse, telling.events(event)))
    if isinstance(event, JobQueued):
        wait = "" if event.expected_seconds is None else f", expected wait {event.expected_seconds:g} s"
        return f": queued, place {event.place}{wait}\n".encode() + found  # without an empty line, as `COMMENT` is
    if isinstance(event, JobEnd) and event.error is None:
        return found + telling.closing
    return found
