"""A client of a gateway's HTTP API, for the commands that speak to one. It blocks, and raises what `errors.py` has."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from tether.errors import (
    ErrorInfo,
    InvalidKey,
    LinkClosed,
    NoGateway,
    ProtocolViolation,
    TetherError,
    UsageError,
    from_info,
)

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 45.0
"""A gateway says something every 15 s on a stream that is open, so who says nothing for so long is gone."""


class ServerEvent(NamedTuple):
    """One server-sent event."""

    data: str
    id: str | None = None
    """How far the client has read with it; None where it does not say."""


class EventStream:
    """A stream of server-sent events that is open until it is closed; iterate over it once."""

    def __init__(self, url: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self.headers = response.headers
        self._url = url
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[ServerEvent | None]:
        """Yield the events, and None for a sign of life without one; raise `LinkClosed` where the stream is cut.

        One that just ends is not told from one that was cut: what its last event is depends on the route.
        """
        try:
            yield from _events(self._response)
        except (OSError, http.client.HTTPException) as exc:
            raise LinkClosed(f"the connection to {self._url} was cut") from exc

    def close(self) -> None:
        """Close the connection; may be repeated."""
        self._response.close()
        self._connection.close()


class GatewayClient:
    """Asks the gateway at `url`, with an API key where there is one. A connection for each request."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raise `UsageError` for what is no URL of a gateway."""
        parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
        try:
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise UsageError(f"--url {url!r} is no URL: {exc}") from exc
        if not host or parts.scheme not in {"http", "https"}:
            raise UsageError(f"--url is the address of a gateway, such as http://localhost:8080, not {url!r}")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self._is_secure = parts.scheme == "https"
        self._host, self._port = host, port
        self._prefix = urlsplit(self.url).path
        if key is not None and (not key.isascii() or not key.isprintable()):
            raise UsageError("the API key has characters that no key has")
        self._key = key

    def get(self, path: str, **query: object) -> Any:
        """Return what a route answers; a parameter that is None is left out."""
        asked = urlencode({name: str(value) for name, value in query.items() if value is not None}, quote_via=quote)
        return self._whole("GET", f"{path}?{asked}" if asked else path)

    def delete(self, path: str) -> Any:
        """Return what a route answers to a DELETE."""
        return self._whole("DELETE", path)

    def stream(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> EventStream:
        """Return a stream that has begun; raise why it is refused, and `LinkClosed` where nobody can tell if it was."""
        return EventStream(self.url, *self._send(method, path, body, headers))

    def _whole(self, method: str, path: str) -> Any:
        connection, response = self._send(method, path)
        try:
            return json.loads(response.read())
        except (OSError, http.client.HTTPException) as exc:
            raise LinkClosed(f"the connection to {self.url} was cut") from exc
        except ValueError as exc:
            raise ProtocolViolation(f"{self.url} answered with something that is no JSON: is it a gateway?") from exc
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Return an open connection and the answer on it, which is a success."""
        sent = {"Accept": "application/json, text/event-stream", **(headers or {})}
        if self._key is not None:
            sent["Authorization"] = f"Bearer {self._key}"
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            connection.connect()
        except OSError as exc:
            raise NoGateway(
                f"no gateway answers at {self.url} ({_words(exc)}): start one with `tether up`, or name one with --url"
            ) from exc
        try:
            if connection.sock is not None:
                connection.sock.settimeout(SILENCE_SECONDS)
            connection.request(method, self._prefix + path, content, sent)
            response = connection.getresponse()
            if response.status < 300:
                return connection, response
            error = self._explained(_error(response, self.url))
        except (OSError, http.client.HTTPException) as exc:
            connection.close()
            raise LinkClosed(f"the connection to {self.url} was cut") from exc
        except BaseException:
            connection.close()
            raise
        connection.close()
        raise error

    def _explained(self, error: TetherError) -> TetherError:
        if isinstance(error, InvalidKey) and self._key is None:
            return InvalidKey(f"{self.url} needs an API key: name one with --key, or put it into TETHER_API_KEY")
        return error

    def _connection(self) -> http.client.HTTPConnection:
        if self._is_secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_SECONDS, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS)


def _error(response: http.client.HTTPResponse, url: str) -> TetherError:
    """Return the error that an answer has."""
    try:
        error = json.loads(response.read())["error"]
        retry_after = response.headers.get("Retry-After", "")
        seconds = float(retry_after) if retry_after.isdecimal() else None
        info = ErrorInfo(error["code"], error["message"], error.get("param"), seconds)
    except (ValueError, KeyError, TypeError):
        return ProtocolViolation(f"{url} answered {response.status} {response.reason}: is it a gateway?")
    return from_info(info)


def _events(response: http.client.HTTPResponse) -> Iterator[ServerEvent | None]:
    """Read server-sent events (WHATWG HTML, 9.2) to the end of a response; a comment is None."""
    data: list[str] = []
    event_id: str | None = None
    while line := response.readline():
        name, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
        value = value.removeprefix(" ")
        if line.startswith(b":"):
            yield None
        elif name == "data":
            data.append(value)
        elif name == "id":
            event_id = value
        elif line in {b"\n", b"\r\n"} and data:
            yield ServerEvent("\n".join(data), event_id)
            data, event_id = [], None


def _words(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
