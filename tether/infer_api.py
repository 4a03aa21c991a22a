"""Tether's own first API, `POST /infer`: its schemas, to a job and from a job's events."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import uuid_utils
from pydantic import BaseModel, ConfigDict, Field

from tether.cursor import Cursor
from tether.decoding import check_sampling
from tether.errors import InvalidRequest
from tether.messages import JobEnd, JobEvent, JobQueued, JobStarted, JobTokens
from tether.openai_schemas import check_nesting
from tether.records import Job, JobStatus, Keep, Sampling, TokenLogprobs, Usage
from tether.settings import GatewaySettings
from tether.telling import Told, unseen, with_text

MAX_NAME = 200
"""Characters of a tenant's, a model's, a version's name."""

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[^\x00-\x1f\x7f-\x9f]+$")]
"""Without control characters: names end up in tables on terminals."""


TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
"""A token's id as the name of a JSON member."""


class InferRequest(BaseModel):
    """The body of `POST /infer`. Fields that it does not have are refused, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenantId: Name | None = None  # noqa: N815 - the API's own spelling
    """Needed only where the gateway has no keys: a key says whose it is."""
    modelId: Name  # noqa: N815
    version: Name
    input: Annotated[str, Field(min_length=1)]
    stream: bool = False
    """Answer with server-sent events, each token when it exists."""
    wait: bool = True
    """False: answer 202 with the job's id at once."""
    maxTokens: Annotated[int, Field(ge=1, le=131072)] = 256  # noqa: N815
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    topP: Annotated[float, Field(gt=0, le=1)] = 1.0  # noqa: N815
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=16)] = []
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    topK: Annotated[int, Field(ge=0, le=2**31)] = 0  # noqa: N815
    """Only the k likeliest tokens; 0: all."""
    minP: Annotated[float, Field(ge=0, le=1)] = 0.0  # noqa: N815
    """Only tokens at least this many times as likely as the likeliest one."""
    repetitionPenalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0  # noqa: N815
    presencePenalty: Annotated[float, Field(ge=-2, le=2)] = 0.0  # noqa: N815
    frequencyPenalty: Annotated[float, Field(ge=-2, le=2)] = 0.0  # noqa: N815
    logitBias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] = {}  # noqa: N815
    """What to add to the logits of these token ids."""
    minTokens: Annotated[int, Field(ge=0, le=131072)] = 0  # noqa: N815
    ignoreEos: bool = False  # noqa: N815
    """The model's own end does not end the answer."""
    stopTokenIds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] = []  # noqa: N815
    jsonSchema: dict[str, Any] | bool | None = None  # noqa: N815
    """The answer is JSON that this JSON Schema admits."""
    regex: Annotated[str, Field(min_length=1, max_length=8192)] | None = None
    """The whole answer matches this regular expression."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Tell each token's log-probability, and those of this many of the likeliest in its place."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    deadlineSeconds: Annotated[float, Field(gt=0)] | None = None  # noqa: N815
    region: Name | None = None
    sessionKey: Name | None = None  # noqa: N815
    keep: Keep | None = None


class InferUsage(BaseModel):
    """Tokens spent."""

    promptTokens: int  # noqa: N815
    completionTokens: int  # noqa: N815


class InferLogprob(BaseModel):
    """A token, and how likely the model held it to be: the natural logarithm of the probability."""

    token: str
    logprob: float
    top: list[dict[str, Any]]
    """The likeliest ones in its place: `token`, `tokenId` and `logprob` of each."""


class InferAnswer(BaseModel):
    """The answer of `POST /infer`."""

    jobId: str  # noqa: N815
    result: str
    modelId: str  # noqa: N815
    version: str
    finishReason: str  # noqa: N815
    usage: InferUsage
    attempts: int
    logprobs: list[InferLogprob] | None = None
    """Where the request has `logprobs`."""
    exact: bool = True
    """False: a part of the answer came from a worker with other weights, or another number format, than the rest."""


class InferAccepted(BaseModel):
    """The answer of `POST /infer` with `"wait": false`."""

    jobId: str  # noqa: N815
    status: JobStatus
    place: int | None = None
    """In the queue, where it has to wait; 1 is next."""
    expectedSeconds: float | None = None  # noqa: N815
    """When it is likely to get a slot; left out or null where nobody can say."""


def to_job(body: InferRequest, settings: GatewaySettings, tenant_id: str | None = None) -> Job:
    """Return the job that a request asks for; raise `InvalidRequest` for fields that do not go together.

    `tenant_id` is whose it is, where a key says it.
    """
    tenant_id = tenant_id or body.tenantId
    if tenant_id is None:
        raise InvalidRequest("the field 'tenantId' is missing", param="tenantId")
    if body.stream and not body.wait:
        raise InvalidRequest("'stream' needs a client that waits: leave out 'wait': false", param="wait")
    deadline_seconds = body.deadlineSeconds if body.deadlineSeconds is not None else settings.deadline_seconds
    if deadline_seconds > settings.max_deadline_seconds:
        raise InvalidRequest(f"deadlineSeconds is at most {settings.max_deadline_seconds:g}", param="deadlineSeconds")
    sampling = _to_sampling(body)
    try:
        check_sampling(sampling)
    except InvalidRequest as exc:
        raise InvalidRequest(_in_our_words(exc.message), param=FIELDS.get(exc.param or "", exc.param)) from exc
    return Job(
        id=str(uuid_utils.uuid7()),
        tenant_id=tenant_id,
        model=body.modelId,
        version=body.version,
        input=body.input,
        sampling=sampling,
        wait=body.wait,
        stream=body.stream,
        priority=body.priority,
        deadline_seconds=deadline_seconds,
        region=body.region,
        session_key=body.sessionKey,
        keep=body.keep or settings.keep,
        requests_per_minute=settings.requests_per_minute or None,
        created_at=time.time(),
    )


def _to_sampling(body: InferRequest) -> Sampling:
    schema = None
    if body.jsonSchema is not None:
        check_nesting(body.jsonSchema, "jsonSchema")
        try:
            schema = json.dumps(body.jsonSchema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest(f"jsonSchema is not JSON: {exc}", param="jsonSchema") from exc
    return Sampling(
        max_tokens=body.maxTokens,
        temperature=body.temperature,
        top_p=body.topP,
        stop=tuple(body.stop),
        seed=body.seed if body.seed is not None else secrets.randbits(53),  # exact in every JSON reader
        top_k=body.topK,
        min_p=body.minP,
        repetition_penalty=body.repetitionPenalty,
        presence_penalty=body.presencePenalty,
        frequency_penalty=body.frequencyPenalty,
        logit_bias={int(token_id): bias for token_id, bias in body.logitBias.items()},
        min_tokens=body.minTokens,
        ignore_eos=body.ignoreEos,
        stop_token_ids=tuple(body.stopTokenIds),
        json_schema=schema,
        regex=body.regex,
        logprobs=body.logprobs,
    )


FIELDS = {
    "model": "modelId",
    "version": "version",
    "input": "input",
    "max_tokens": "maxTokens",
    "top_p": "topP",
    "top_k": "topK",
    "min_p": "minP",
    "repetition_penalty": "repetitionPenalty",
    "presence_penalty": "presencePenalty",
    "frequency_penalty": "frequencyPenalty",
    "logit_bias": "logitBias",
    "min_tokens": "minTokens",
    "ignore_eos": "ignoreEos",
    "stop_token_ids": "stopTokenIds",
    "json_schema": "jsonSchema",
}
"""What the network calls a job's parts, and what this API calls them."""


def _in_our_words(message: str) -> str:
    """Return a message of the network's with this API's names of the fields."""
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda found: FIELDS.get(found[0], found[0]), message)


def _shown(logprobs: Iterable[TokenLogprobs]) -> list[dict[str, Any]]:
    shown = []
    for each in logprobs:
        text, *others = each.texts or ("",)
        top = [
            {"token": other, "tokenId": token_id, "logprob": logprob}
            for other, (token_id, logprob) in zip(others, each.top, strict=False)
        ]
        shown.append({"token": text, "logprob": each.logprob, "top": top})
    return shown


class Answer:
    """Gathers a job's events into its answer, and turns each into what a stream says of it.

    `seen` is where the client's last stream ended: text that it has is not told again.
    """

    waits_for_token = False
    closing = b""
    fields = FIELDS

    def __init__(self, job: Job, seen: Cursor | None = None) -> None:
        self._job = job
        self._seen = seen or Cursor()
        self._texts: list[str] = []
        self._num_chars = 0
        self._logprobs: list[TokenLogprobs] = []
        self._waiting: list[TokenLogprobs] = []
        """Of tokens without text: they are told with the next text, or at the end."""
        self.end: JobEnd | None = None

    def add(self, event: JobEvent) -> None:
        """Take an event in."""
        match event:
            case JobTokens(text=text, logprobs=logprobs):
                self._texts.append(text)
                self._num_chars += len(text)
                self._logprobs += logprobs
            case JobEnd():
                self.end = event
            case _:
                return

    def body(self) -> dict[str, Any]:
        """Return the whole answer, in the form of `InferAnswer`."""
        end = self.end or JobEnd(self._job.id, "failed", 0, "error", Usage())
        return {
            "jobId": self._job.id,
            "result": "".join(self._texts),
            "modelId": self._job.model,
            "version": self._job.version,
            "finishReason": end.finish_reason,
            "usage": {"promptTokens": end.usage.prompt_tokens, "completionTokens": end.usage.completion_tokens},
            "attempts": end.attempt,
            "exact": end.exact,
            **({} if self._job.sampling.logprobs is None else {"logprobs": _shown(self._logprobs)}),
        }

    def events(self, event: JobEvent) -> Iterator[Told]:
        """Take an event in and yield what a stream says of it.

        A token's event has the number of characters up to its end as its id.
        """
        before, seen = self._num_chars, self._seen.chars[0]
        missing = max(0, seen - before)
        self.add(event)
        job_id = self._job.id
        match event:
            case JobQueued(place=place, deadline_seconds=seconds, expected_seconds=expected):
                facts = {"place": place, "expectedSeconds": expected, "deadlineSeconds": round(seconds, 1)}
                yield Told({"type": "queued", "jobId": job_id, **facts})
            case JobStarted(attempt=attempt, worker_name=worker):
                yield Told({"type": "started", "jobId": job_id, "attempt": attempt, "worker": worker})
            case JobTokens(position=position, token_ids=ids, text=text, logprobs=logprobs):
                self._waiting += unseen(logprobs, before, seen)[0] if missing else logprobs
                if not text[missing:]:
                    return
                told: dict[str, Any] = {"text": text[missing:], "position": position}
                told["tokenIds"] = () if missing else ids
                if self._waiting:
                    now, self._waiting = with_text(self._waiting)
                    told["logprobs"] = _shown(now)
                yield Told({"type": "tokens", **told}, str(self._num_chars))
            case JobEnd(error=None):
                yield Told({"type": "end", **self.body()})
            case _:
                return

    def error(self, error: dict[str, Any]) -> Told:
        """Return the stream's last event, where the answer breaks off."""
        return Told({"jobId": self._job.id, "error": error})
