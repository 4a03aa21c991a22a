"""A client of the gateway's WebSocket for the tests: the `websockets` package, and what is said there as dictionaries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

HEAR_SECONDS = 20.0


class Talk:
    """One open socket."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def say(self, **message: Any) -> None:
        self.connection.send(json.dumps(message))

    def chat(self, name: str, script: str, *, stream: bool = True, **more: Any) -> None:
        """Start a chat with a scripted worker."""
        fields = more.pop("fields", {})
        body = {"model": "demo", "messages": [{"role": "user", "content": script}], "stream": stream, **fields}
        self.say(type="create", id=name, url="/v1/chat/completions", body=body, **more)

    def hear(self, seconds: float = HEAR_SECONDS) -> dict[str, Any]:
        """Return the next message."""
        message: dict[str, Any] = json.loads(self.connection.recv(timeout=seconds))
        return message

    def until(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        """Return the messages up to the first of a kind (with this id, if it matters)."""
        heard = [self.hear()]
        while heard[-1]["type"] != kind or name not in (None, heard[-1]["id"]):
            heard.append(self.hear())
        return heard

    def run(self, name: str) -> list[dict[str, Any]]:
        """Return the messages of a job, to its end."""
        heard = [self.hear()]
        while heard[-1]["type"] not in {"done", "error"} or heard[-1]["id"] != name:
            heard.append(self.hear())
        return [message for message in heard if message["id"] == name]

    def closing(self) -> tuple[int | None, list[dict[str, Any]]]:
        """Return the code with which the other side closes, and what it says before that."""
        heard: list[dict[str, Any]] = []
        try:
            while True:
                heard.append(self.hear())
        except ConnectionClosed as exc:
            return exc.rcvd.code if exc.rcvd is not None else None, heard


@contextmanager
def talk(url: str, **options: Any) -> Iterator[Talk]:
    """Open a socket at a gateway's URL."""
    options = {"max_size": None, "ping_interval": None, "proxy": None, "compression": None, **options}
    with connect(f"ws{url.removeprefix('http')}/v1/stream", **options) as connection:
        yield Talk(connection)


def text_of(messages: list[dict[str, Any]], choice: int = 0) -> str:
    """Return the content that chunks of a chat have told."""
    chunks = [message["data"] for message in messages if message["type"] == "event"]
    told = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice]
    return "".join(each["delta"].get("content") or "" for each in told)
