"""What the lines of a batch are: read from its input file, checked, made jobs, and told as lines of its output. Pure.

A line's job has an id that follows from the batch and the line, so whoever runs the batch after somebody else finds the job
that is there already instead of running the line again.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from tether.errors import InternalError, InvalidRequest, RequestError, TetherError, UnsupportedParameter
from tether.job_routes import JOB_ROUTES, parse_body
from tether.messages import JobEvent
from tether.openai_api import failure_of, seed_of
from tether.openai_items import PARAM, previous_of
from tether.queueing import BACKGROUND_PRIORITY
from tether.quotas import Limit
from tether.records import BatchLine, BatchMistake, BatchRecord, Endpoint, Job
from tether.settings import GatewaySettings
from tether.telling import Telling

log = logging.getLogger(__name__)

WINDOW_SECONDS: Final = 86_400.0
"""How long a batch has, from its making to its end."""
MAX_LINES: Final = 50_000
MAX_LINE_CHARS: Final = 256 * 1024
"""A line becomes a job, which has to fit into one message."""
MAX_CUSTOM_ID: Final = 512
MAX_MISTAKES: Final = 20
"""After so many nobody reads further."""
PART_BYTES: Final = 128 * 1024
"""Of a file's content in one part: in one message it may take six times as much."""
HEADROOM: Final = 4
"""A batch leaves one part in so many of each limit to its tenant's other requests."""

_FIELDS: Final = ("custom_id", "method", "url", "body")


# --- reading ---------------------------------------------------------------------------------------------------------


class LineReader:
    """Lines from the parts of a file, as they come."""

    def __init__(self) -> None:
        self._rest: list[str] = []
        self._num_chars = 0

    def feed(self, part: str) -> Iterator[str]:
        """Yield the lines that a part completes; of one that is far too long only the beginning."""
        *whole, rest = part.split("\n")
        for line in whole:
            self._keep(line)
            yield self._take()
        self._keep(rest)

    def flush(self) -> Iterator[str]:
        """Yield the last line, where it does not end as lines do."""
        if self._rest:
            yield self._take()

    def _keep(self, piece: str) -> None:
        if piece and self._num_chars <= MAX_LINE_CHARS:
            self._rest.append(piece)
            self._num_chars += len(piece)

    def _take(self) -> str:
        line, self._rest, self._num_chars = "".join(self._rest), [], 0
        return line


class LineChecker:
    """Checks the lines of an input file one by one, and against one another; empty ones are passed over."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._custom_ids: set[str] = set()
        self._number = 0
        self.num_lines = 0
        """Requests that were good."""
        self.model = ""
        """The one model that they are for."""
        self.mistakes: list[BatchMistake] = []

    @property
    def is_hopeless(self) -> bool:
        """Whether there is no need to read on."""
        return len(self.mistakes) >= MAX_MISTAKES or self.num_lines > MAX_LINES

    def check(self, text: str) -> BatchLine | None:
        """Return the request in the next line; None for a line that has none, or a mistake."""
        self._number += 1
        text = text.removeprefix("\ufeff") if self._number == 1 else text
        if not text.strip():
            return None
        try:
            line = self._parse(text)
        except _Wrong as wrong:
            self.mistakes.append(BatchMistake(wrong.code, wrong.message, self._number, wrong.param))
            return None
        except Exception:
            log.exception("line %d of a batch cannot be checked", self._number)  # as in `job_or_refusal`
            error = InternalError()
            self.mistakes.append(BatchMistake(error.code, error.message, self._number))
            return None
        self.num_lines += 1
        if self.num_lines > MAX_LINES:
            self.mistakes.append(BatchMistake("too_many_tasks", f"a batch has at most {MAX_LINES} requests"))
            return None
        return line

    def finish(self) -> None:
        """Check what can be told only at the end."""
        if not self.num_lines and not self.mistakes:
            self.mistakes.append(BatchMistake("empty_file", "the input file has no requests", param="input_file_id"))

    def _parse(self, text: str) -> BatchLine:
        if len(text) > MAX_LINE_CHARS:
            raise _Wrong("invalid_request", f"the line is longer than {MAX_LINE_CHARS} characters")
        try:
            fields = msgspec.json.decode(text.encode(), type=dict[str, msgspec.Raw])
            custom_id, method, url = (_text(fields, name) for name in _FIELDS[:3])
            request = bytes(_required(fields, "body"))
            body = msgspec.json.decode(request)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as exc:
            raise _Wrong("invalid_json_line", f"the line is not a JSON object: {exc}") from exc
        if unknown := fields.keys() - set(_FIELDS):
            raise _Wrong("unknown_parameter", f"a line has no field {min(unknown)!r}", min(unknown))
        if not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
            raise _Wrong("invalid_request", f"custom_id has 1 to {MAX_CUSTOM_ID} characters", "custom_id")
        if method != "POST":
            raise _Wrong("invalid_method", f"the method is POST, not {method[:20]!r}", "method")
        if url != self._endpoint:
            raise _Wrong("url_mismatch", f"the batch is for {self._endpoint}, not {url[:100]!r}", "url")
        if not isinstance(body, dict):
            raise _Wrong("invalid_request", "the body is a JSON object", "body")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise _Wrong("missing_required_parameter", "the body names no model", "body.model")
        self.model = self.model or model
        if model != self.model:
            message = f"all requests of a batch are for one model, {self.model!r} here, and not {model[:100]!r}"
            raise _Wrong("mismatched_model", message, "body.model")
        if custom_id in self._custom_ids:
            raise _Wrong("duplicate_custom_id", f"another line has the custom_id {custom_id[:100]!r}", "custom_id")
        self._custom_ids.add(custom_id)
        return BatchLine(self._number, custom_id, request.decode())


class _Wrong(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _required(fields: dict[str, msgspec.Raw], name: str) -> msgspec.Raw:
    if name not in fields:
        raise _Wrong("missing_required_parameter", f"the line has no {name}", name)
    return fields[name]


def _text(fields: dict[str, msgspec.Raw], name: str) -> str:
    value = msgspec.json.decode(_required(fields, name))
    if not isinstance(value, str):
        raise _Wrong("invalid_request", f"{name} is a string", name)
    return value


# --- to a job --------------------------------------------------------------------------------------------------------


def job_id_of(batch: BatchRecord, line: BatchLine, number: int = 0) -> str:
    """Return the id of a line's job: a UUIDv7 of the batch's time, whose rest follows from the batch and the line.

    `number`: of its further jobs, where those before it were refused and their ids used up all the same.
    """
    rest = hashlib.blake2b(f"{batch.id}/{line.number}/{number}".encode(), digest_size=10).digest()
    value = int.from_bytes(int(batch.created_at * 1000).to_bytes(6, "big") + rest, "big")
    value = value & ~(0xF << 76) | 7 << 76  # the version
    value = value & ~(0x3 << 62) | 2 << 62  # the variant
    return str(uuid.UUID(int=value))


class LineJob(NamedTuple):
    """A line as a job."""

    job: Job
    answer: Telling
    """Tells its answer as its route would."""
    drops_answer: bool
    """Nobody asked for the answer to be kept beyond the batch's own file; the ledger has it until the line has it."""


def to_job(batch: BatchRecord, line: BatchLine, now: float, number: int = 0) -> LineJob:
    """Return the job that a line asks for, by its number (`job_id_of`); raise a `RequestError` for a request that its route would refuse too."""
    settings = GatewaySettings(
        requests_per_minute=batch.requests_per_minute or 0,
        keep=batch.keep,
        deadline_seconds=max(1.0, min(WINDOW_SECONDS, batch.expires_at - now)),
        max_deadline_seconds=WINDOW_SECONDS,
    )
    body = parse_body(batch.endpoint, msgspec.json.decode(line.request))
    if getattr(body, "stream", None):
        raise UnsupportedParameter("a batch's answers are not streamed; leave stream out", param="stream")
    if getattr(body, "previous_response_id", None) is not None:
        raise UnsupportedParameter(
            "a batch's responses stand alone; send the items themselves", param="previous_response_id"
        )
    if getattr(body, "tenantId", None) not in (None, batch.tenant_id):
        raise InvalidRequest("the requests of a batch are its own tenant's; leave tenantId out", param="tenantId")
    route = JOB_ROUTES[batch.endpoint]
    job = route.make_job(body, settings, batch.tenant_id)
    if previous_of(job) is not None:
        raise UnsupportedParameter("a batch's requests are each their own; send the items themselves", param=PARAM)
    drops_answer = job.keep == "nothing"
    seed = job.sampling.seed if getattr(body, "seed", None) is not None else seed_of(job_id_of(batch, line))
    job = msgspec.structs.replace(
        job,
        id=job_id_of(batch, line, number),
        sampling=msgspec.structs.replace(job.sampling, seed=seed),
        wait=False,
        stream=False,
        priority=BACKGROUND_PRIORITY + job.priority,
        key_id=batch.key_id,
        keep="result" if drops_answer else job.keep,
        created_at=now,
    )
    return LineJob(job, route.telling(body)(job), drops_answer)


def job_or_refusal(batch: BatchRecord, line: BatchLine, now: float, number: int = 0) -> LineJob | Outcome:
    """Return a line's job as `to_job` does, or the outcome of a line of which none can be made."""
    try:
        return to_job(batch, line, now, number)
    except RequestError as exc:
        return refused(batch, line, exc)
    except Exception:
        # It would be the same at each attempt, and no line may keep its batch from its end.
        log.exception("batch %s: line %d cannot be made a job", batch.id, line.number)
        return refused(batch, line, InternalError())


def pause_seconds(limits: Iterable[Limit], tokens: int, now: float) -> float:
    """Return how long a batch waits before its next job, so that its tenant's other requests find room; 0: not at all.

    Of each limit one part in `HEADROOM` is left to them.
    """
    pause = 0.0
    for limit in limits:
        need = limit.need(tokens)
        if limit.unit == "job_tokens" or need > limit.most:
            continue  # no wait would help: the refusal says so
        room = max(need, limit.most - limit.most // HEADROOM)
        if limit.spent + need > room:
            pause = max(pause, limit.reset_seconds(now) or 1.0)
    return pause


# --- to the output ---------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of a line: whether it belongs into the output file, and its text there or in the error file."""

    completed: bool
    text: str


def outcome_of(batch: BatchRecord, line: BatchLine, line_job: LineJob, events: Iterable[JobEvent]) -> Outcome:
    """Return the outcome of a line by all events of its job, the last of which is its end."""
    job, answer = line_job.job, line_job.answer
    try:
        for event in events:
            answer.add(event)
        error = failure_of(answer.end, answer.fields) if answer.end is not None else None
        if error is not None:
            return refused(batch, line, error)
        return Outcome(True, _line(batch, line, 200, job.id, answer.body()))
    except TetherError as exc:
        return refused(batch, line, exc)
    except Exception:
        # It would be the same at each attempt, and no line may keep its batch from its end.
        log.exception("batch %s: the answer of line %d cannot be told", batch.id, line.number)
        return refused(batch, line, InternalError())


def refused(batch: BatchRecord, line: BatchLine, error: TetherError) -> Outcome:
    """Return the outcome of a line whose job failed, or never was one."""
    body = {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    return Outcome(False, _line(batch, line, error.status, job_id_of(batch, line), body))


def _line(batch: BatchRecord, line: BatchLine, status: int, job_id: str, body: dict[str, Any]) -> str:
    found = {
        "id": f"{batch.id.replace('batch_', 'batch_req_')}_{line.number}",
        "custom_id": line.custom_id,
        "response": {"status_code": status, "request_id": job_id, "body": body},
        "error": None,
    }
    return msgspec.json.encode(found).decode()


class Parts:
    """Cuts a text that comes piece by piece into the parts of a file: the same text always into the same parts."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._num_waiting = 0
        self.num_bytes = 0
        """Of everything so far, in UTF-8."""
        self.num_parts = 0

    def feed(self, text: str) -> Iterator[tuple[int, str]]:
        """Yield the parts that a further piece completes, each with its number."""
        size = len(text.encode())
        self._waiting.append(text)
        self._num_waiting += size
        self.num_bytes += size
        if self._num_waiting > PART_BYTES:
            *whole, rest = split("".join(self._waiting))
            self._waiting, self._num_waiting = [rest], len(rest.encode())
            yield from map(self._numbered, whole)

    def flush(self) -> Iterator[tuple[int, str]]:
        """Yield the last part."""
        if self._num_waiting:
            yield self._numbered("".join(self._waiting))
            self._waiting, self._num_waiting = [], 0

    def _numbered(self, part: str) -> tuple[int, str]:
        self.num_parts += 1
        return self.num_parts - 1, part


def split(text: str) -> list[str]:
    """Return a text in pieces of at most `PART_BYTES`, none cut within a character; an empty text is one empty piece."""
    data = text.encode()
    pieces: list[str] = []
    while len(data) > PART_BYTES:
        end = PART_BYTES
        while data[end] & 0xC0 == 0x80:  # in mid-character
            end -= 1
        pieces.append(data[:end].decode())
        data = data[end:]
    return [*pieces, data.decode()]
