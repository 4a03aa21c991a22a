"""A chat with a model over a gateway: one answer at a time, gone on with where it was cut, ended when nobody wants it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from tether.client import EventStream, GatewayClient
from tether.errors import (
    ErrorInfo,
    LinkClosed,
    ModelNotFound,
    NoGateway,
    NoWorker,
    ProtocolViolation,
    TetherError,
    Unavailable,
    from_info,
)

Message = dict[str, str]
"""A role and a content, as the OpenAI dialect has them."""

RESUME_SECONDS = 20.0
"""How long an answer that was cut waits for a gateway that goes on with it."""
PAUSE_SECONDS = 0.5


class Queued(NamedTuple):
    """The answer waits for a slot."""

    place: int
    expected_seconds: float | None


class Away(NamedTuple):
    """The gateway is away, and is waited for."""

    why: str


class ChatOptions(NamedTuple):
    """How answers are to be; None is what the gateway has for it."""

    max_tokens: int | None = None
    temperature: float | None = None


class ChatAnswer:
    """One answer: iterate over it for its pieces of text, and `Queued` while it waits.

    A stream that is cut goes on with its next character, at whatever gateway answers at the address; the request has an
    idempotency key, so that it is one job however often it is sent.
    """

    def __init__(self, client: GatewayClient, model: str, messages: list[Message], options: ChatOptions) -> None:
        self._client = client
        self._model = model
        given = {name: value for name, value in options._asdict().items() if value is not None}
        self._body = {"model": model, "messages": messages, "stream": True, **given}
        self._key = str(uuid.uuid4())
        self._job_id: str | None = None
        self._last_id: str | None = None
        self._is_waiting = False
        self._was_sent = False
        self._done = False
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    def __iter__(self) -> Iterator[str | Queued | Away]:
        """Yield the pieces, and once for each time that the gateway is away, `Away`; raise `TetherError` with why there is no (further) answer."""
        patience = time.monotonic() + RESUME_SECONDS
        is_away = False
        while not self._done:
            try:
                for piece in self._pieces():
                    patience = time.monotonic() + RESUME_SECONDS
                    is_away = False
                    yield piece
            except (LinkClosed, NoGateway, Unavailable) as exc:
                may_go_on = self._was_sent if isinstance(exc, LinkClosed) else self._job_id is not None
                if not may_go_on or isinstance(exc, NoWorker) or time.monotonic() > patience:
                    raise
                if not is_away:
                    is_away = True
                    yield Away(exc.message)
                time.sleep(PAUSE_SECONDS)

    def cancel(self) -> None:
        """End the job, which shows as cancelled then; one that has ended is left as it is."""
        if self._done or not self._was_sent:
            return
        self._done = True
        if self._job_id is None:  # the answer's head has not come: the same request again is told whose it is
            self._open().close()
        self._client.delete(f"/v1/jobs/{self._job_id}")

    def _open(self) -> EventStream:
        if self._job_id is not None:
            after = {"Last-Event-ID": self._last_id} if self._last_id is not None else None
            return self._client.stream("GET", f"/v1/jobs/{self._job_id}/stream", headers=after)
        key = {"Idempotency-Key": self._key}
        self._was_sent = True
        try:
            stream = self._client.stream("POST", "/v1/chat/completions", self._body, key)
        except LinkClosed:
            raise  # it may have been taken all the same
        except TetherError:
            self._was_sent = False
            raise
        self._job_id = stream.headers.get("x-tether-job-id")
        return stream

    def _pieces(self) -> Iterator[str | Queued]:
        """Yield what one stream has; raise `LinkClosed` where it was cut."""
        stream = self._open()
        try:
            for event in stream:
                if event is None:
                    self._check_served()
                elif event.data == "[DONE]":
                    self._done = True
                    return
                else:
                    yield from self._taken(_parsed(event.data))
                    self._last_id = event.id or self._last_id
        finally:
            stream.close()
        raise LinkClosed(f"the answer from {self._client.url} was cut")

    def _taken(self, chunk: dict[str, Any]) -> Iterator[str | Queued]:
        if "error" in chunk:
            self._done = True
            raise _error_of(chunk["error"])
        if (queued := chunk.get("tether", {}).get("queued")) is not None:
            self._is_waiting = True
            yield Queued(queued["place"], queued["expected_seconds"])
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                self._is_waiting = False
                self._text.append(text)
                yield text

    def _check_served(self) -> None:
        """End an answer that waits though nobody serves its model any more."""
        if not self._is_waiting:
            return
        if (refusal := refusal_of(self._client, self._model)) is not None:
            self.cancel()
            raise NoWorker(f"the answer ends here: {refusal.message}")


def served(client: GatewayClient) -> list[str]:
    """Return the names of the models that can be served now, those for trying out last."""
    found = client.get("/v1/models")
    try:
        models = sorted((model["toy"], model["id"]) for model in found["data"])
    except (KeyError, TypeError) as exc:
        raise ProtocolViolation(f"{client.url} lists no models as a gateway does") from exc
    return [name for _, name in models]


def refusal_of(client: GatewayClient, model: str) -> ModelNotFound | NoWorker | None:
    """Return why nobody serves a model now or soon; None where somebody does, though an answer may have to wait."""
    try:
        client.get(f"/v1/models/{quote(model)}")
    except ModelNotFound:
        found = client.get("/v1/explain", model=model)
    else:
        return None
    try:
        error = _error_of(found["error"]) if found["error"] is not None else None
    except (KeyError, TypeError) as exc:
        raise ProtocolViolation(f"{client.url} explains nothing as a gateway does") from exc
    return error if isinstance(error, ModelNotFound | NoWorker) else None


def pick(client: GatewayClient, model: str | None) -> str:
    """Return the model to talk to: the one that is named, if it is served, or the only one that is.

    Where no model is served `/readyz` says why: workers may be there, and paused.

    Raises `ModelNotFound`, `NoWorker`, or `TetherError` with the names where there are several.
    """
    if model is not None:
        refusal = refusal_of(client, model)
        if isinstance(refusal, ModelNotFound):
            client.get("/readyz")
        if refusal is not None:
            raise refusal
        return model
    models = served(client)
    if not models:
        client.get("/readyz")
        raise NoWorker("no model is served now; start a worker, such as `tether worker --model demo`")
    if len(models) > 1:
        raise TetherError(
            f"several models are served: {', '.join(models)}; name one, such as `tether chat {models[0]}`"
        )
    return models[0]


def _error_of(told: dict[str, Any]) -> TetherError:
    return from_info(ErrorInfo(told["code"], told["message"], told.get("param")))


def _parsed(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as exc:
        raise ProtocolViolation("the stream has an event that is no JSON") from exc
    if not isinstance(chunk, dict) or not ("error" in chunk or "choices" in chunk):
        raise ProtocolViolation("the stream has an event that is no chunk of a chat")
    return chunk
