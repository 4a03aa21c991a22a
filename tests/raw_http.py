"""HTTP by hand, over a plain socket: what no client library would send, and when exactly each piece of an answer came."""

from __future__ import annotations

import json
import socket
import time
from types import TracebackType
from typing import Any, NamedTuple, Self


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error in the one form that all have."""
        assert self.headers["content-type"] == "application/json", self
        assert self.headers["x-request-id"]
        found = json.loads(self.body)
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        error: dict[str, Any] = found["error"]
        assert error["message"]
        return error


class RawClient:
    """A connection; `seconds` bound each wait."""

    def __init__(self, port: int, *, seconds: float = 20.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, text: str | bytes) -> None:
        self.socket.sendall(text if isinstance(text, bytes) else text.encode())

    def dribble(self, text: bytes, pause_seconds: float) -> bool:
        """Send byte by byte until all is sent or something comes back; return whether something does."""
        self.socket.settimeout(pause_seconds)
        try:
            for number in range(len(text)):
                try:
                    self.socket.sendall(text[number : number + 1])
                    self._buffer += self.socket.recv(65536)
                except TimeoutError:
                    continue
                except ConnectionError:
                    pass
                return True
            return False
        finally:
            self.socket.settimeout(20)

    def answer(self) -> Answer:
        """Read one whole answer; informational ones (100) are answers too."""
        head = self._until(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self._until(b"\r\n"), 16):
                body += self._exactly(size + 2)[:-2]
            self._exactly(2)
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        return Answer(int(status_line.split()[1]), headers, body)

    def ends(self) -> bool:
        """Whether the other side closes, without another byte."""
        try:
            return self._buffer == b"" and self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._receive()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _receive(self) -> None:
        piece = self.socket.recv(65536)
        assert piece, f"the connection ended after {self._buffer[-200:]!r}"
        self._buffer += piece


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a well-formed request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def elapsed(began: float) -> float:
    return time.monotonic() - began
