"""Every line between a worker and its runtime child, once; without torch, so that both ends import it.

The child reads requests from stdin and writes events to stdout, one JSON object a line. A request is told apart by its
fields (`{"id", "input", …}`, `{"id", "inputs", …}` or `{"cancel"}`), an event by `event`:

    worker -> child     Generate, Embed, Cancel
    child -> worker     Loading*  (Ready | Fatal)  then, for each Generate or Embed, Started? Tokens* End, mixed with other ids

Each `Generate` or `Embed` with an id of its own ends in exactly one `End`. A line that is no request, or that repeats a live id, is
answered with `Refused` and changes nothing. By hand, without `--stream`, a line is an `Ask` and its answer a `Result` or a
`Failure`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tether.errors import (
    ErrorInfo,
    InvalidRequest,
    JobError,
    ProtocolViolation,
    TetherError,
    Unavailable,
    WorkerFailed,
)
from tether.records import FinishReason, ModelInfo, Sampling, TokenLogprobs, Usage

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 8 << 20
"""A longer line is a mistake of the sender: it is refused, and the loop goes on."""

Stage = Literal["import", "download", "weights", "warm-up"]


# --- worker -> child -------------------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Answer `input`, going on after the token ids that were already told."""

    id: str
    input: str
    sampling: Sampling = Sampling()
    emitted: tuple[tuple[int, ...], ...] = ()
    """For each choice, the ids that were told; those of a choice beyond its end are none."""
    raw: bool = False
    """The input is the prompt as it stands, without the model's chat template."""
    chat: bool = False
    """The input is a `Chat` as JSON, which the model's chat template renders."""
    emitted_text: str = ""
    """The text of the first choice's emitted ids, for an engine that knows no ids and goes on by text."""


class Embed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Return a vector for each of `inputs`, going on after those that were already told."""

    id: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    """That a vector is to have; None: as many as the model's have."""
    num_told: int = 0


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stop this sequence; its `End` follows. An id that is not live is ignored."""

    cancel: str


Request = Generate | Embed | Cancel


class BadLine(msgspec.Struct, frozen=True):
    """What `decode_request` makes of a line that is no request: the id, where it has one, and what is wrong."""

    id: str | None
    error: ErrorInfo


# --- child -> worker -------------------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag_field="event", tag="loading"):
    """How far loading is: `fraction` of this stage, 0 to 1."""

    stage: Stage
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag_field="event", tag="ready"):
    """The model is loaded and takes requests."""

    model: ModelInfo


class Fatal(msgspec.Struct, frozen=True, tag_field="event", tag="fatal"):
    """The child cannot serve and exits with code 1; nothing follows."""

    error: ErrorInfo


class Started(msgspec.Struct, frozen=True, tag_field="event", tag="started"):
    """The sequence runs; its prompt, without emitted tokens, has this many tokens."""

    id: str
    prompt_tokens: int


class Tokens(msgspec.Struct, frozen=True, tag_field="event", tag="tokens"):
    """New tokens: the position of the first one in the answer, their ids, and the text that they add.

    `text` is whole characters; it lags behind the ids while a character is incomplete or a stop string may begin.
    """

    id: str
    position: int
    token_ids: tuple[int, ...]
    text: str
    choice: int = 0
    """Which of the request's `n` answers these belong to."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """For each id, where the sampling asks for them."""


class Stats(msgspec.Struct, frozen=True):
    """Figures of the child as it is now, for presence: what a scheduler can count on."""

    tokens_per_second: float = 0.0
    """Of all sequences together, while there was work."""
    time_to_first_token_seconds: float = 0.0
    """From a request's line to its first token; a moving average."""
    free_kv_tokens: int = 0
    """Tokens that the cache can still take beside those that run."""
    reused_tokens: int = 0
    """Prompt tokens that were still in the cache and were not read again, since the start."""
    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences without a slot."""


class End(msgspec.Struct, frozen=True, tag_field="event", tag="end"):
    """The request's one end. With an error, `retry` says whether another worker might do better."""

    id: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    """`completion_tokens` counts what this child generated for all choices, not the tokens emitted before."""
    error: ErrorInfo | None = None
    retry: bool = False
    tokens_per_second: float = 0.0
    """The child's speed on its latest sequences, each for itself, for presence; 0 while unknown."""
    choices: tuple[FinishReason, ...] = ()
    """How each choice ended, where there are several; `finish_reason` is the first one's."""
    stats: Stats | None = None


class Refused(msgspec.Struct, frozen=True, tag_field="event", tag="refused"):
    """A line that had no effect: no request, or the id of a sequence that is live (and goes on)."""

    id: str | None
    error: ErrorInfo


Event = Loading | Ready | Fatal | Started | Tokens | End | Refused


# --- by hand ---------------------------------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line typed by hand: the input, and sampling fields beside it."""

    input: str
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    raw: bool = False

    @property
    def sampling(self) -> Sampling:
        """The sampling fields as the record that the engine takes."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.stop, self.seed)


class Result(msgspec.Struct, frozen=True):
    """The whole answer to an `Ask`."""

    result: str


class Failure(msgspec.Struct, frozen=True):
    """Why an `Ask` has no answer."""

    error: str


# --- failures -------------------------------------------------------------------------------------------------------


def is_out_of_memory(exc: Exception) -> bool:
    """Whether there was no memory: torch has a RuntimeError of its own for each device."""
    return isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and "memory" in str(exc))


def describe(exc: Exception) -> tuple[ErrorInfo, bool]:
    """Return a request's failure as it is told, and whether another worker might do better."""
    if isinstance(exc, TetherError):
        return exc.to_info(), isinstance(exc, JobError | Unavailable)
    if is_out_of_memory(exc):
        log.warning("out of memory: %s", exc)
        return WorkerFailed("the worker ran out of memory").to_info(), True
    log.error("the model failed", exc_info=exc)
    return WorkerFailed(f"the model failed: {type(exc).__name__}").to_info(), True


# --- bytes -----------------------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()
_event_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def encode(message: Request | Event | Result | Failure) -> bytes:
    """Return a message as one line of JSON, newline included."""
    line = _encoder.encode(message)
    if isinstance(message, Result | Failure):
        # People and scripts compare these with the pilot's lines, which json.dumps spaced.
        line = msgspec.json.format(line, indent=0)
    return line + b"\n"


def encode_events(events: Sequence[Event]) -> bytes:
    """Return events as lines of JSON, as `encode` has each, in one go: a step tells as many as jobs run."""
    return _encoder.encode_lines(events)


def _decode_object(line: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"this line is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise InvalidRequest("this line is not a JSON object")
    return found


def decode_request(line: bytes) -> Request | BadLine:
    """Return the request in a line, or what is wrong with it."""
    try:
        found = _decode_object(line)
    except InvalidRequest as exc:
        return BadLine(None, exc.to_info())
    request_id = found.get("id")
    try:
        if "cancel" in found:
            return msgspec.convert(found, Cancel)
        if "inputs" in found:
            return msgspec.convert(found, Embed)
        return msgspec.convert(found, Generate, str_keys=True)
    except (msgspec.ValidationError, RecursionError) as exc:
        return BadLine(request_id if isinstance(request_id, str) else None, InvalidRequest(str(exc)).to_info())


def decode_ask(line: bytes) -> Ask:
    """Return the request in a line typed by hand; raise `InvalidRequest` for anything else."""
    found = _decode_object(line)
    try:
        return msgspec.convert(found, Ask)
    except (msgspec.ValidationError, RecursionError) as exc:
        raise InvalidRequest(str(exc)) from exc


def decode_event(line: bytes) -> Event:
    """Return the event in a line of the child's stdout; raise `ProtocolViolation` for anything else."""
    try:
        return _event_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(f"malformed line from the runtime: {exc}") from exc
