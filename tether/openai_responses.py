"""OpenAI's Responses: a conversation in another form. A request becomes a chat, and a chat's answer a response's items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tether.cursor import Cursor
from tether.errors import InvalidRequest, TetherError
from tether.messages import JobEnd, JobEvent, JobQueued
from tether.openai_api import ChatAnswer, chat_job
from tether.openai_schemas import (
    Body,
    ChatRequest,
    FunctionName,
    FunctionTool,
    Name,
    as_choice,
    check_writable,
    refuse_unsupported,
)
from tether.records import Chat, Job, JobRecord, Keep
from tether.settings import GatewaySettings
from tether.telling import Told, queued

FIELDS = {
    "input": "input",
    "messages": "input",
    "version": "model",
    "json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
}
"""What the network, and the chat that a response becomes, call its parts, and what this route calls them."""

_UNSUPPORTED = (
    "context_management",
    "conversation",
    "max_tool_calls",
    "moderation",
    "prompt",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "stream_options",
)
_QUEUED_NUMBER = 2
"""Of all that is told of the queue: however often that is, what follows has the same numbers."""
_STATUSES = {"queued": "queued", "running": "in_progress", "cancelled": "cancelled"}


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


# --- a request -------------------------------------------------------------------------------------------------------


class InputPart(Body):
    """A part of an item; the models here read text only."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(Body):
    """A message, a call that the model asked for, or what came of one."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: (
        Annotated[list[InputPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputPart])] | None
    ) = None
    id: str | None = None
    status: str | None = None
    phase: None = None
    call_id: Name | None = None
    name: FunctionName | None = None
    arguments: str | None = None
    output: str | None = None


class TextFormat(Body):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """How the answer is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseTool(FunctionTool):
    """A function that the model may ask for."""

    type: Literal["function"]


class ResponseChoice(Body):
    """Whether and what the model has to call."""

    type: Literal["none", "auto", "required", "function"]
    name: FunctionName | None = None


class ResponseRequest(Body):
    """The body of `POST /v1/responses`."""

    model: Name
    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=4096),
        BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    background: bool | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: (
        Annotated[
            ResponseChoice,
            BeforeValidator(as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ResponseChoice),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None
    store: bool | None = None
    """False: keep neither the request nor the answer, so that it is not found again."""
    previous_response_id: Name | None = None
    """The response after which this one goes on: the conversation up to there need not be sent again."""
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    include: Annotated[list[str], Field(max_length=0)] | None = None
    top_logprobs: Literal[0] | None = None
    tenantId: Name | None = None  # noqa: N815 - as `POST /infer` spells it
    priority: int | None = None
    deadline_seconds: float | None = None
    region: Name | None = None
    keep: Keep | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        check_writable(value)
        return refuse_unsupported(value, _UNSUPPORTED)

    @model_validator(mode="after")
    def _check(self) -> ResponseRequest:
        if self.background and self.store is False:
            raise InvalidRequest("a response in the background has to be kept, or nobody could read it", param="store")
        return self


def response_job(body: ResponseRequest, settings: GatewaySettings, tenant_id: str | None = None) -> Job:
    """Return the job that a request asks for; raise `InvalidRequest`."""
    try:
        job = chat_job(ChatRequest.model_validate(_as_chat(body)), settings, tenant_id)
    except ValidationError as exc:
        first = exc.errors()[0]
        name, *place = map(str, first["loc"])
        raise InvalidRequest(first["msg"], param=".".join([FIELDS.get(name, name), *place])) from exc
    except TetherError as exc:
        known, dot, rest = (exc.param or "").partition(".")
        exc.param = f"{FIELDS.get(known, known)}{dot}{rest}" or None
        raise
    chat = msgspec.structs.replace(
        msgspec.json.decode(job.input.encode(), type=Chat),
        has_instructions=body.instructions is not None,
        previous_id=body.previous_response_id,
    )
    text = msgspec.json.encode(chat).decode()
    return msgspec.structs.replace(job, form="response", wait=not body.background, input=text)


def _as_chat(body: ResponseRequest) -> dict[str, Any]:
    """Return the chat request that says the same."""
    same = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "metadata", "user", "store", "tenantId")
    more = ("safety_identifier", "prompt_cache_key", "priority", "deadline_seconds", "region", "keep")
    chat: dict[str, Any] = {name: getattr(body, name) for name in same + more}
    chat["max_completion_tokens"] = body.max_output_tokens
    instructions = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    chat["messages"] = [*instructions, *(_as_message(item, place) for place, item in enumerate(body.input))]
    if body.tools is not None:
        tools = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in body.tools]
        chat["tools"] = [{"type": "function", "function": tool} for tool in tools]
    if body.tool_choice is not None:
        chat["tool_choice"] = {"type": body.tool_choice.type}
        if body.tool_choice.name is not None:
            chat["tool_choice"]["function"] = {"name": body.tool_choice.name}
    wanted = body.text.format if body.text is not None else None
    if wanted is not None:
        chat["response_format"] = {"type": wanted.type}
        if wanted.type == "json_schema":
            schema = {"name": wanted.name or "answer", "schema": wanted.schema_}
            chat["response_format"]["json_schema"] = schema
    return chat


def _as_message(item: InputItem, place: int) -> dict[str, Any]:
    match item:
        case InputItem(type="function_call", call_id=str(), name=str(), arguments=str()):
            function = {"name": item.name, "arguments": item.arguments}
            return {"role": "assistant", "tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
        case InputItem(type="function_call_output", call_id=str(), output=str()):
            return {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
        case InputItem(type="message", role=str(), content=list()):
            return {"role": item.role, "content": "".join(part.text for part in item.content or [])}
        case _:
            raise InvalidRequest(f"an item of the type {item.type} lacks something", param=f"input.{place}")


# --- an answer -------------------------------------------------------------------------------------------------------


class ResponseAnswer(ChatAnswer):
    """The answer of `POST /v1/responses`: the items of a chat's first choice.

    An event's `sequence_number` is its place in the answer: each event has a number of its own, and one that adds text has
    that of its last character. So it is the same however the text was cut into pieces on its way, and a stream goes on
    behind `seen` at any gateway, from tokens or from the ledger.
    """

    fields = FIELDS
    closing = b""

    def __init__(self, job: Job, *, seen: Cursor | None = None) -> None:
        super().__init__(job)
        self.status = "in_progress"
        self._items: list[dict[str, Any]] = []
        self._open: Literal["text", "call"] | None = None
        """What the newest item is, while it is being told."""
        self._seen_number = seen.chars[0] if seen is not None else -1
        self._next_number = 0

    @property
    def id(self) -> str:
        """The response's id."""
        return f"resp_{self.job.id}"

    def add(self, event: JobEvent) -> None:
        """Take an event in."""
        for _ in self._events(event):
            pass

    def events(self, event: JobEvent) -> Iterator[Told]:
        """Take an event in and yield what the stream says of it."""
        if not self._next_number:
            yield from self._unseen(self._event("response.created"))
            yield from self._unseen(self._event("response.in_progress"))
            self._next_number = _QUEUED_NUMBER + 1
        if isinstance(event, JobQueued):
            self.status = "queued"
            number = max(_QUEUED_NUMBER, self._seen_number)
            told = {"type": "response.queued", "sequence_number": number, "response": self.body(), **queued(event)}
            yield _told(told)
            self.status = "in_progress"
        for each in self._events(event):
            yield from self._unseen(each)

    def error(self, error: dict[str, Any]) -> Told:
        """Return the stream's last event, where the answer breaks off."""
        number = max(self._next_number, self._seen_number + 1)
        return _told({"sequence_number": number, "error": error, **error, "type": "error"})

    def _unseen(self, event: dict[str, Any]) -> Iterator[Told]:
        """Yield what the client does not have of an event."""
        num_unseen = event["sequence_number"] - self._seen_number
        if num_unseen <= 0:
            return
        yield _told({**event, "delta": event["delta"][-num_unseen:]} if "delta" in event else event)

    def body(self) -> dict[str, Any]:
        """Return the response as it is now."""
        job, sampling, usage = self.job, self.job.sampling, self.end.usage if self.end is not None else None
        chat = msgspec.json.decode(job.input.encode(), type=Chat) if job.input else Chat(())
        error = self.end.error if self.end is not None else None
        tools = [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description or None,
                "parameters": msgspec.json.decode(tool.parameters),
                "strict": False,
            }
            for tool in chat.tools
        ]
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(job.created_at),
            "status": self.status,
            "background": not job.wait,
            "error": {"code": "server_error", "message": error.message} if error is not None else None,
            "incomplete_details": {"reason": "max_output_tokens"} if self.status == "incomplete" else None,
            "instructions": chat.messages[0].content if chat.has_instructions else None,
            "max_output_tokens": sampling.max_tokens,
            "model": self._frame()["model"],
            "output": self._items,
            "parallel_tool_calls": chat.parallel,
            "previous_response_id": chat.previous_id,
            "store": job.keep == "all",
            "temperature": sampling.temperature,
            "tool_choice": "required" if chat.only_calls else "auto",
            "tools": tools,
            "top_p": sampling.top_p,
            "metadata": job.metadata,
            "user": job.user,
            "usage": None
            if usage is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _events(self, event: JobEvent) -> Iterator[dict[str, Any]]:
        for _, chunk in self._chunks(event):
            choice = chunk["choices"][0]
            if content := choice["delta"].get("content"):
                yield from self._text(content)
            for call in choice["delta"].get("tool_calls", []):
                yield from self._call(call)
            if choice["finish_reason"] is not None:
                yield from self._close("incomplete" if choice["finish_reason"] == "length" else "completed")
        if isinstance(event, JobEnd):
            if event.error is None:
                self.status = "incomplete" if event.finish_reason == "length" else "completed"
                yield self._event(f"response.{self.status}")
            else:
                self.status = "cancelled" if event.status == "cancelled" else "failed"

    def _text(self, content: str) -> Iterator[dict[str, Any]]:
        if self._open != "text":
            yield from self._close()
            self._open = "text"
            item = {"id": self._item_id("msg"), "type": "message", "role": "assistant", "content": []}
            yield self._event("response.output_item.added", item={**item, "status": "in_progress"})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._items.append({**item, "status": "in_progress", "content": [part]})
            yield self._event("response.content_part.added", content_index=0, part=dict(part))
        self._items[-1]["content"][0]["text"] += content
        yield self._event("response.output_text.delta", content_index=0, delta=content, logprobs=[])

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is."""
        if self._open is None:
            return
        item = self._items[-1]
        item["status"] = status
        if self._open == "text":
            part = item["content"][0]
            yield self._event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **named)
        self._open = None
        yield self._event("response.output_item.done", item=item)

    def _call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Tell a piece of a call; its first one has the name."""
        function = call["function"]
        if "id" in call:
            yield from self._close()
            self._open = "call"
            item = {
                "id": self._item_id("fc"),
                "type": "function_call",
                "call_id": call["id"],
                "name": function["name"],
                "arguments": "",
                "status": "in_progress",
            }
            yield self._event("response.output_item.added", item=dict(item))
            self._items.append(item)
        if function["arguments"]:
            self._items[-1]["arguments"] += function["arguments"]
            yield self._event("response.function_call_arguments.delta", delta=function["arguments"])

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self.job.id}_{len(self._items)}"

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return an event; one that is of an item is of the newest, or of the one that is about to come."""
        self._next_number += len(fields.get("delta", "1"))
        event: dict[str, Any] = {"type": kind, "sequence_number": self._next_number - 1}
        if not fields:
            return {**event, "response": self.body()}
        if kind == "response.output_item.added":
            return {**event, "output_index": len(self._items), **fields}
        index = len(self._items) - 1
        if "item" not in fields:
            event["item_id"] = self._items[index]["id"]
        return {**event, "output_index": index, **fields}


def response_of(job: Job, record: JobRecord, story: Iterable[JobEvent]) -> dict[str, Any]:
    """Return a response from the ledger, with what happened to it where it has ended."""
    answer = ResponseAnswer(job)
    for event in story:
        answer.add(event)
    if answer.end is not None:
        if answer.end.error is not None and record.status == "completed":
            answer.status = "completed"
    else:
        answer.status = _STATUSES[record.status]
    return answer.body()


def job_id_of(response_id: str) -> str:
    """Return the id of the job that a response is."""
    return response_id.removeprefix("resp_")


def _told(event: dict[str, Any]) -> Told:
    return Told(event, str(event["sequence_number"]), event["type"])
