"""OpenAI's embeddings: a request to a job, whose answer has a line for each input, and that answer as vectors."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BeforeValidator, Field

from tether.cursor import Cursor
from tether.errors import InternalError, InvalidRequest
from tether.messages import JobAccepted, JobEnd, JobEvent, JobTokens
from tether.openai_api import new_job
from tether.openai_schemas import JobRequest
from tether.records import EmbeddingInput, Job, Sampling
from tether.settings import GatewaySettings
from tether.telling import Told

MAX_INPUTS = 2048
"""Of one request, as OpenAI has it."""
FIELDS = {"input": "input", "version": "model"}

Encoding = Literal["float", "base64"]


def _as_inputs(value: Any) -> Any:
    """Return the inputs, each a text or a list of token ids; raise `InvalidRequest` for anything else."""
    if _is_input(value):
        return [value]
    if isinstance(value, list) and len(value) > MAX_INPUTS:
        raise InvalidRequest(f"a request has at most {MAX_INPUTS} inputs", param="input")
    if not isinstance(value, list) or not value or not all(map(_is_input, value)):
        raise InvalidRequest(
            "input is a text, a list of token ids, or a list of those, none of them empty", param="input"
        )
    return value


def _is_input(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(type(each) is int and 0 <= each < 2**31 for each in value)
    return isinstance(value, str) and bool(value)


class EmbeddingRequest(JobRequest):
    """The body of `POST /v1/embeddings`."""

    unsupported: ClassVar[tuple[str, ...]] = ("stream",)

    input: Annotated[
        list[str | list[int]],
        BeforeValidator(_as_inputs, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    encoding_format: Encoding | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**31)] | None = None
    """Only the number that the model's vectors have."""


def embedding_job(body: EmbeddingRequest, settings: GatewaySettings, tenant_id: str | None = None) -> Job:
    """Return the job that a request asks for. Vectors are long, so they are kept in the ledger only where `keep` says so."""
    inputs = tuple(each if isinstance(each, str) else tuple(each) for each in body.input)
    return new_job(
        body,
        settings,
        tenant_id,
        form="embedding",
        input=msgspec.json.encode(EmbeddingInput(inputs, body.dimensions)).decode(),
        sampling=Sampling(max_tokens=len(inputs)),
        user=body.user,
        session_key=body.session_key,
        keep=body.keep or "nothing",
    )


class EmbeddingAnswer:
    """The answer of `POST /v1/embeddings`. It is told whole, also as a stream."""

    waits_for_token = True
    closing = b"data: [DONE]\n\n"
    fields = FIELDS

    def __init__(self, job: Job, *, seen: Cursor | None = None, encoding: Encoding = "float") -> None:
        if seen is not None:
            raise InvalidRequest("embeddings are told whole, from their beginning", param="after")
        self._job = job
        self._encoding = encoding
        self._version = job.version
        self._texts: list[str] = []
        self.end: JobEnd | None = None

    def add(self, event: JobEvent) -> None:
        """Take an event in."""
        match event:
            case JobAccepted(version=version):
                self._version = version or self._version
            case JobTokens(text=text):
                self._texts.append(text)
            case JobEnd():
                self.end = event
            case _:
                return

    def body(self) -> dict[str, Any]:
        """Return the whole answer; raise `InternalError` where vectors are missing."""
        vectors = "".join(self._texts).split()
        wanted = msgspec.json.decode(self._job.input.encode(), type=EmbeddingInput) if self._job.input else None
        if wanted is not None and len(vectors) != len(wanted.inputs):
            raise InternalError(f"job {self._job.id} has {len(vectors)} vectors for {len(wanted.inputs)} inputs")
        num_tokens = self.end.usage.prompt_tokens if self.end is not None else 0
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
                for index, vector in enumerate(vectors)
            ],
            "model": f"{self._job.model}@{self._version}" if self._version else self._job.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    def events(self, event: JobEvent) -> Iterator[Told]:
        """Take an event in; tell all of it at the end."""
        self.add(event)
        if isinstance(event, JobEnd) and event.error is None:
            yield Told(self.body())

    def error(self, error: dict[str, Any]) -> Told:
        """Return the stream's last event, where the answer breaks off."""
        return Told({"error": error})

    def _encoded(self, vector: str) -> str | list[float]:
        if self._encoding == "base64":
            return vector
        data = base64.b64decode(vector)
        return list(struct.unpack(f"<{len(data) // 4}f", data))
