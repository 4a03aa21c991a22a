"""The OpenAI dialect: a request to a job, and a job's events to what its clients read, whole or as a stream.

What a stream says after some text of a choice is a function of that text, so any gateway can go on with it from a client's
last event (cursor.py): it replays the job's events and tells what comes after the cursor.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import uuid_utils

from tether.cursor import Cursor
from tether.decoding import check_sampling
from tether.errors import InvalidRequest, TetherError, from_info
from tether.messages import JobAccepted, JobEnd, JobEvent, JobQueued, JobStarted, JobTokens
from tether.openai_schemas import ChatRequest, CompletionRequest, JobRequest, Message
from tether.records import (
    Chat,
    ChatMessage,
    FinishReason,
    Job,
    Keep,
    ModelKey,
    Sampling,
    ServedModel,
    TokenLogprobs,
    Tool,
    ToolCall,
    Usage,
)
from tether.settings import GatewaySettings
from tether.telling import Told, queued, unseen, with_text
from tether.tool_calls import CallDelta, ToolCallParser

DEFAULT_TENANT = "default"
DEFAULT_TEMPERATURE = 1.0
DEFAULT_CHAT_TOKENS = 4096
"""A chat's answer is cut after so many tokens where its request names no limit."""
DEFAULT_COMPLETION_TOKENS = 16
"""The same for a completion: OpenAI's own default."""

CHAT_FIELDS = {
    "input": "messages",
    "version": "model",
    "json_schema": "response_format",
    "logprobs": "top_logprobs",
    "deadlineSeconds": "deadline_seconds",
}
COMPLETION_FIELDS = {"input": "prompt", "version": "model"}
"""What the network calls a job's parts, and what these routes call them."""


# --- to a job --------------------------------------------------------------------------------------------------------


def chat_job(body: ChatRequest, settings: GatewaySettings, tenant_id: str | None = None) -> Job:
    """Return the job that a chat request asks for; raise `InvalidRequest` for what does not go together."""
    choice = body.tool_choice.type if body.tool_choice is not None else "auto"
    tools = tuple(_tool(tool.function) for tool in body.tools or []) if choice != "none" else ()
    forced = choice in {"required", "function"}
    if body.tool_choice is not None and body.tool_choice.function is not None:
        wanted = [tool for tool in tools if tool.name == body.tool_choice.function.name]
    else:
        wanted = list(tools)
    messages = tuple(_message(message, place) for place, message in enumerate(body.messages))
    chat = Chat(messages, tools, parallel=body.parallel_tool_calls is not False, only_calls=forced)
    schema = call_schema(wanted) if forced else _schema_of(body)
    max_tokens = body.max_completion_tokens or body.max_tokens or DEFAULT_CHAT_TOKENS
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return new_job(
        body,
        settings,
        tenant_id,
        form="chat",
        stream=bool(body.stream),
        input=msgspec.json.encode(chat).decode(),
        sampling=_sampling(body, max_tokens, logprobs, schema, CHAT_FIELDS),
        user=body.user or body.safety_identifier,
        session_key=body.session_key or body.prompt_cache_key,
        keep=_keep(body, settings),
    )


def _keep(body: ChatRequest, settings: GatewaySettings) -> Keep:
    """Return what is kept of a chat's texts: OpenAI's word for it is `store`."""
    if body.store is None:
        return body.keep or settings.keep
    keep: Keep = "all" if body.store else "nothing"
    if body.keep not in {None, keep}:
        raise InvalidRequest(f"store: {str(body.store).lower()} contradicts keep: {body.keep!r}", param="store")
    return keep


def completion_job(body: CompletionRequest, settings: GatewaySettings, tenant_id: str | None = None) -> Job:
    """Return the job that a completion request asks for."""
    max_tokens = body.max_tokens or DEFAULT_COMPLETION_TOKENS
    return new_job(
        body,
        settings,
        tenant_id,
        form="prompt",
        stream=bool(body.stream),
        input=body.prompt[0],
        sampling=_sampling(body, max_tokens, body.logprobs, None, COMPLETION_FIELDS),
        user=body.user,
        session_key=body.session_key,
        keep=body.keep or settings.keep,
    )


def model_key(model: str) -> ModelKey:
    """Return a model's name and version (empty: the newest) from `name` or `name@version`; raise `InvalidRequest`."""
    name, _, version = model.partition("@")
    if not name or model.endswith("@"):
        raise InvalidRequest("model is a name, or a name@version", param="model")
    return name, version


def new_job(body: JobRequest, settings: GatewaySettings, tenant_id: str | None, **own: Any) -> Job:
    """Return a new job with what all routes take, and with what is a route's `own`."""
    deadline_seconds = body.deadline_seconds if body.deadline_seconds is not None else settings.deadline_seconds
    if deadline_seconds > settings.max_deadline_seconds:
        raise InvalidRequest(f"deadline_seconds is at most {settings.max_deadline_seconds:g}", param="deadline_seconds")
    name, version = model_key(body.model)
    return Job(
        id=str(uuid_utils.uuid7()),
        tenant_id=tenant_id or body.tenantId or DEFAULT_TENANT,
        model=name,
        version=version,
        priority=body.priority or 0,
        deadline_seconds=deadline_seconds,
        region=body.region,
        requests_per_minute=settings.requests_per_minute or None,
        created_at=time.time(),
        metadata=body.metadata or {},
        **own,
    )


def _sampling(
    body: ChatRequest | CompletionRequest,
    max_tokens: int,
    logprobs: int | None,
    json_schema: str | None,
    fields: dict[str, str],
) -> Sampling:
    """Return the request's sampling; what a field left out means is the record's to say, but for the temperature."""
    names = (
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "top_k",
        "min_p",
        "repetition_penalty",
        "min_tokens",
        "n",
    )
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        stop=tuple(body.stop or ()),
        seed=body.seed if body.seed is not None else secrets.randbits(53),
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        logprobs=logprobs,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        json_schema=json_schema,
        **given,
    )
    try:
        check_sampling(sampling)
    except TetherError as exc:
        exc.param = fields.get(exc.param, exc.param) if exc.param is not None else None
        raise
    return sampling


def _message(message: Message, place: int) -> ChatMessage:
    calls = []
    for number, call in enumerate(message.tool_calls or []):
        param = f"messages.{place}.tool_calls.{number}.function.arguments"
        try:
            arguments = msgspec.json.decode(call.function.arguments.encode() or b"{}")
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as exc:
            raise InvalidRequest(f"the arguments are not JSON: {exc}", param=param) from exc
        if not isinstance(arguments, dict):
            raise InvalidRequest("the arguments are not a JSON object", param=param)
        calls.append(ToolCall(call.id, call.function.name, call.function.arguments or "{}"))
    return ChatMessage(
        "system" if message.role == "developer" else message.role,
        message.text or message.refusal or "",
        message.name,
        tuple(calls),
        message.tool_call_id,
    )


def _tool(function: Any) -> Tool:
    parameters = function.parameters if function.parameters is not None else {"type": "object", "properties": {}}
    return Tool(function.name, function.description or "", msgspec.Raw(_encode(parameters, "tools")))


def _schema_of(body: ChatRequest) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return '{"type":"object"}'
    return _encode(wanted.json_schema.schema_, "response_format").decode()


def _encode(value: Any, param: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError, ValueError, OverflowError) as exc:
        raise InvalidRequest(f"{param} cannot be written as JSON: {exc}", param=param) from exc


def call_schema(tools: list[Tool]) -> str:
    """Return the schema of an answer that is one call of one of these tools."""
    calls = []
    for number, tool in enumerate(tools):
        place = f"#/anyOf/{number}/properties/arguments" if len(tools) > 1 else "#/properties/arguments"
        arguments = _with_references(msgspec.json.decode(tool.parameters), place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return msgspec.json.encode({"anyOf": calls} if len(calls) > 1 else calls[0]).decode()


def _with_references(schema: Any, place: str) -> Any:
    """Return a schema that has moved into another one at `place`, with its references to itself."""
    if isinstance(schema, list):
        return [_with_references(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _with_references(value, place)
        for key, value in schema.items()
    }


def fingerprint_of(path: str, body: Any) -> str:
    """Return what tells a request from another one with the same idempotency key."""
    text = msgspec.json.encode([path, body.model_dump(mode="json", exclude_none=True)])
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def seed_of(job_id: str) -> int:
    """Return the seed of a job that any gateway may submit, where its client names none."""
    return int.from_bytes(hashlib.blake2b(job_id.encode(), digest_size=6).digest(), "big")


# --- models ----------------------------------------------------------------------------------------------------------


def model_body(model: ServedModel) -> dict[str, Any]:
    """Return a model as `/v1/models` tells it: by its name alone where it is the newest of that name."""
    return {
        "id": model.name if model.is_newest else f"{model.name}@{model.version}",
        "object": "model",
        "created": int(model.first_seen_at),
        "owned_by": "tether",
        "version": model.version,
        "context_window": model.context_tokens,
        "workers": model.num_workers,
        "slots": model.num_slots,
        "toy": model.toy,
    }


# --- from a job's events ---------------------------------------------------------------------------------------------


class _Call:
    """A call as far as it was told."""

    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments: list[str] = []

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class _Choice:
    """One choice as it is told."""

    def __init__(self, parser: ToolCallParser | None) -> None:
        self.parser = parser
        self.num_chars = 0
        self.content: list[str] = []
        self.calls: list[_Call] = []
        self.logprobs: list[TokenLogprobs] = []
        self.waiting: list[TokenLogprobs] = []
        """Of tokens whose text is held back: they are told with the next text."""
        self.chars_of_tokens = 0
        self.offset = 0
        """Where in the answer the next token begins that is told with its log-probabilities."""
        self.finish_reason: str | None = None


class OpenAIAnswer:
    """Gathers a job's events into its answer, and turns each into the chunks that a stream has of it.

    `seen` is where the client's last stream ended: what it has is not told again.
    """

    waits_for_token = True
    closing = b"data: [DONE]\n\n"
    object_name = ""
    chunk_name = ""
    id_prefix = ""
    fields: dict[str, str] = {}  # noqa: RUF012 - constants of the subclasses

    def __init__(self, job: Job, *, include_usage: bool = False, seen: Cursor | None = None) -> None:
        self.job = job
        self.end: JobEnd | None = None
        num_choices = job.sampling.n
        self._include_usage = include_usage
        self._seen = seen or Cursor(num_choices)
        self._cursor = Cursor(num_choices)
        self._version = job.version
        self._fingerprint: str | None = None
        self._chunk_frame = self._frame()
        self._choices = [_Choice(self._make_parser(number)) for number in range(num_choices)]

    def _make_parser(self, choice: int) -> ToolCallParser | None:  # noqa: ARG002 - for subclasses
        return None

    def add(self, event: JobEvent) -> None:
        """Take an event in."""
        for _ in self._chunks(event):
            pass

    def events(self, event: JobEvent) -> Iterator[Told]:
        """Take an event in and yield the chunks that the stream has of it."""
        if isinstance(event, JobQueued):
            yield self._queued(event)
        yield from (Told(body, cursor) for cursor, body in self._chunks(event))
        wants_usage = self._include_usage and not self._seen.has_usage
        if wants_usage and isinstance(event, JobEnd) and event.error is None:
            self._cursor.has_usage = True
            yield Told({**self._chunk_frame, "choices": [], "usage": _usage(event.usage)}, str(self._cursor))

    def error(self, error: dict[str, Any]) -> Told:
        """Return the stream's last event, where the answer breaks off."""
        return Told({"error": error})

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        end = self.end or JobEnd(self.job.id, "failed", 0, "error", Usage())
        return {
            **self._frame(self.object_name),
            "choices": [self._whole(number, choice) for number, choice in enumerate(self._choices)],
            "usage": _usage(end.usage),
        }

    def _frame(self, object_name: str | None = None) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self.job.id}",
            "object": object_name or self.chunk_name,
            "created": int(self.job.created_at),
            "model": f"{self.job.model}@{self._version}" if self._version else self.job.model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunks(self, event: JobEvent) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the chunks that tell an event, each with the cursor behind it, without those that the client has."""
        match event:
            case JobAccepted(version=version):
                self._version = version or self._version
                self._chunk_frame = self._frame()
            case JobStarted(revision=revision, dtype=dtype) if revision or dtype:
                self._fingerprint = f"fp_{revision.removeprefix('sha256:')[:12]}_{dtype}"
                self._chunk_frame = self._frame()
            case JobTokens(choice=number) if number < len(self._choices):
                yield from self._tokens(number, event.text, event.logprobs)
            case JobEnd():
                self.end = event
                if event.error is None:
                    yield from self._ends(event)
            case _:
                return

    def _tokens(
        self, number: int, text: str, logprobs: tuple[TokenLogprobs, ...]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        choice = self._choices[number]
        if self._cursor.chars[number] < 0:
            self._cursor.chars[number] = 0
            if self._seen.chars[number] < 0 and (opening := self._opening()) is not None:
                yield self._chunk(number, opening)
        missing = self._seen.chars[number] - choice.num_chars
        if missing > 0:  # what the client has is taken in, and not told
            known = text[:missing]
            self._take(choice, known)
            self._cursor.chars[number] = choice.num_chars
            text = text[missing:]
            seen = self._seen.chars[number]
            logprobs, choice.chars_of_tokens = unseen(logprobs, choice.chars_of_tokens, seen)
            choice.offset = choice.chars_of_tokens - sum(len(each.text) for each in logprobs)
        choice.waiting += logprobs
        if not text:
            return
        deltas = list(self._deltas(*self._take(choice, text)))
        if deltas:  # text that is held back is not what the client has, also where another choice's chunk comes next
            self._cursor.chars[number] = choice.num_chars
        told, waiting = with_text(choice.waiting) if choice.waiting else ([], [])
        choice.logprobs += told
        for delta in deltas:
            yield self._chunk(number, delta, told)
            told = []
        choice.waiting = told + waiting  # of text that may be a call's beginning, or of none
        if told:
            del choice.logprobs[-len(told) :]

    def _take(self, choice: _Choice, text: str) -> tuple[str, list[CallDelta]]:
        choice.num_chars += len(text)
        content, calls = (text, []) if choice.parser is None else choice.parser.push(text)
        choice.content.append(content)
        for call in calls:
            if call.name:
                choice.calls.append(_Call(call.id, call.name))
            choice.calls[-1].arguments.append(call.arguments)
        return content, calls

    def _ends(self, end: JobEnd) -> Iterator[tuple[str, dict[str, Any]]]:
        reasons: list[FinishReason] = [*end.choices, *[end.finish_reason] * len(self._choices)]
        for number, choice in enumerate(self._choices):
            yield from self._tokens(number, "", ())
            rest = choice.parser.flush() if choice.parser is not None else ""
            choice.content.append(rest)
            choice.finish_reason = "tool_calls" if choice.calls and reasons[number] == "stop" else reasons[number]
            self._cursor.chars[number], self._cursor.ended[number] = choice.num_chars, True
            told, choice.waiting = choice.waiting, []
            choice.logprobs += told
            if not self._seen.ended[number]:
                yield self._chunk(number, self._closing(rest), told, choice.finish_reason)

    def _queued(self, event: JobQueued) -> Told:
        """Return a chunk that adds nothing to the answer, and says where the job stands.

        Any other event would be taken for a chunk as well, and one without choices breaks programs that look at the first.
        It leaves a client where it is, so its id is that of the last event that the client has.
        """
        delta = self._nothing()
        if self._cursor.chars[0] < 0 and self._seen.chars[0] < 0 and (opening := self._opening()) is not None:
            self._cursor.chars[0] = 0
            delta = opening
        _, body = self._chunk(0, delta)
        return Told({**body, **queued(event)}, str(self._cursor.furthest(self._seen)))

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        logprobs: list[TokenLogprobs] | None = None,
        finish_reason: str | None = None,
    ) -> tuple[str, dict[str, Any]]:
        shown = None
        if logprobs:
            shown = self._logprobs(logprobs, self._choices[number].offset)
            self._choices[number].offset += sum(len(each.text) for each in logprobs)
        choice = {"index": number, **delta, "logprobs": shown, "finish_reason": finish_reason}
        body = {**self._chunk_frame, "choices": [choice]}
        if self._include_usage:
            body["usage"] = None
        return str(self._cursor), body

    # What the two routes say differently.

    def _opening(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def _nothing(self) -> dict[str, Any]:
        raise NotImplementedError

    def _deltas(self, content: str, calls: list[CallDelta]) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    def _closing(self, rest: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, logprobs: list[TokenLogprobs], offset: int = 0) -> dict[str, Any]:
        raise NotImplementedError

    def _whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(OpenAIAnswer):
    """The answer of `POST /v1/chat/completions`."""

    object_name, chunk_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    fields = CHAT_FIELDS

    def _make_parser(self, choice: int) -> ToolCallParser | None:
        chat = msgspec.json.decode(self.job.input.encode(), type=Chat) if self.job.input else Chat(())
        if not chat.tools:
            return None
        names = [tool.name for tool in chat.tools]
        parallel = chat.parallel and not chat.only_calls
        return ToolCallParser(f"{self.job.id}/{choice}", names, parallel=parallel)

    def message(self) -> ChatMessage:
        """Return the first choice as a message of the conversation."""
        choice = self._choices[0]
        calls = tuple(ToolCall(call.id, call.name, "".join(call.arguments)) for call in choice.calls)
        return ChatMessage("assistant", "".join(choice.content), tool_calls=calls)

    def _opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _nothing(self) -> dict[str, Any]:
        return {"delta": {"content": ""}}

    def _deltas(self, content: str, calls: list[CallDelta]) -> Iterator[dict[str, Any]]:
        delta: dict[str, Any] = {"content": content} if content else {}
        if calls:
            delta["tool_calls"] = [_call_delta(call) for call in calls]
        if delta:
            yield {"delta": delta}

    def _closing(self, rest: str) -> dict[str, Any]:
        return {"delta": {"content": rest} if rest else {}}

    def _logprobs(self, logprobs: list[TokenLogprobs], offset: int = 0) -> dict[str, Any]:  # noqa: ARG002
        content = []
        for each in logprobs:
            text, *others = each.texts or ("",)
            top = [
                {"token": other, "logprob": logprob, "bytes": _bytes(other)}
                for other, (_, logprob) in zip(others, each.top, strict=False)
            ]
            content.append({"token": text, "logprob": each.logprob, "bytes": _bytes(text), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["content"] = content or None
            message["tool_calls"] = [call.body() for call in choice.calls]
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs) if self.job.sampling.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }


class CompletionAnswer(OpenAIAnswer):
    """The answer of `POST /v1/completions`."""

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"
    fields = COMPLETION_FIELDS

    def _opening(self) -> None:
        return None

    def _nothing(self) -> dict[str, Any]:
        return {"text": ""}

    def _deltas(self, content: str, calls: list[CallDelta]) -> Iterator[dict[str, Any]]:  # noqa: ARG002
        yield {"text": content}

    def _closing(self, rest: str) -> dict[str, Any]:
        return {"text": rest}

    def _logprobs(self, logprobs: list[TokenLogprobs], offset: int = 0) -> dict[str, Any]:
        tokens = [each.text for each in logprobs]
        offsets = itertools.accumulate(map(len, tokens[:-1]), initial=offset) if tokens else ()
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in logprobs],
            "top_logprobs": [
                {text: logprob for text, (_, logprob) in zip(each.texts[1:], each.top, strict=False)}
                for each in logprobs
            ],
            "text_offset": list(offsets),
        }

    def _whole(self, number: int, choice: _Choice) -> dict[str, Any]:
        return {
            "index": number,
            "text": "".join(choice.content),
            "logprobs": self._logprobs(choice.logprobs) if self.job.sampling.logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }


def failure_of(end: JobEnd, fields: dict[str, str]) -> TetherError | None:
    """Return why a job failed, with its parameter as the route calls it; None where it did not."""
    if end.error is None:
        return None
    error = from_info(end.error)
    error.param = fields.get(error.param, error.param) if error.param is not None else None
    return error


def _call_delta(call: CallDelta) -> dict[str, Any]:
    """Return a piece of a call: the first one has its id and its name."""
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }


def _bytes(text: str) -> list[int] | None:
    """Return a token's bytes; None for a piece of a character, which has no text of its own."""
    return None if "\ufffd" in text else list(text.encode())
