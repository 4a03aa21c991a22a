"""What the routes of the OpenAI dialect take: the bodies and the checks that need nothing but them.

A parameter that Tether has no way to honour is refused by its name, and never ignored; `null` is the same as leaving a
parameter out. Beside OpenAI's own there are those of vLLM (`top_k`, `min_p`, …) and Tether's (`priority`, `region`, …).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tether.errors import InvalidRequest, UnsupportedParameter
from tether.records import Keep

MAX_NAME = 200
MAX_NESTING = 128
"""Of objects and lists in one parameter."""
"""Characters of a tenant's, a model's, a user's name."""

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def as_choice(value: Any) -> Any:
    """Return a tool choice's long form."""
    return {"type": value} if isinstance(value, str) else value


def check_writable(value: Any) -> None:
    """Raise `InvalidRequest` for a body that JSON cannot hold: nothing that has been taken may fail further in."""
    try:
        msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, RecursionError, msgspec.MsgspecError) as exc:
        raise InvalidRequest(f"the body cannot be written as JSON: {exc}") from exc
    for param, each in value.items() if isinstance(value, dict) else ():
        check_nesting(each, param)


def check_nesting(value: Any, param: str) -> None:
    """Raise `InvalidRequest` for a value that is nested more than `MAX_NESTING` deep: what comes later recurses into it."""
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise InvalidRequest(f"{param} is nested more than {MAX_NESTING} deep", param=param)


def refuse_unsupported(value: Any, names: tuple[str, ...]) -> Any:
    """Return a body without these parameters, which may only be null; raise `UnsupportedParameter`."""
    if not isinstance(value, dict):
        return value
    for name in names:
        if value.get(name) is not None:
            raise UnsupportedParameter(f"{name} is not supported here; leave it out", param=name)
    return {key: each for key, each in value.items() if key not in names}


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_NAME)]],
    Field(max_length=16),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class Body(BaseModel):
    """A body, or a part of one, of which every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream has beside its chunks."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JobRequest(Body):
    """What every route takes whose requests become jobs."""

    unsupported: ClassVar[tuple[str, ...]] = ()

    model: Name
    """`name` means its newest version that is served, `name@version` a given one."""
    user: Name | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None

    tenantId: Name | None = None  # noqa: N815 - as `POST /infer` spells it
    """On whose behalf, where the gateway has no API keys."""
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    deadline_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    region: Name | None = None
    session_key: Name | None = None
    keep: Keep | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        check_writable(value)
        return refuse_unsupported(value, cls.unsupported)


class _Request(JobRequest):
    """What chats and completions take."""

    max_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=131_072)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        return self


# --- chat ------------------------------------------------------------------------------------------------------------


class TextPart(Body):
    """A part of a message; this network's models read text only."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call that the model asked for; `arguments` is a JSON object, as text."""

    name: FunctionName
    arguments: str


class CalledTool(Body):
    """A call in a message of the assistant."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[list[TextPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])] | None
    ) = None
    name: Name | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """The content's text."""
        return "".join(part.text for part in self.content or [])


class FunctionTool(Body):
    """A function that the model may ask for; `parameters` is a JSON Schema."""

    name: FunctionName
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionTool


class ChosenFunction(Body):
    """The function that has to be called."""

    name: FunctionName


class ToolChoice(Body):
    """Whether and what the model has to call."""

    type: Literal["none", "auto", "required", "function"]
    function: ChosenFunction | None = None


class JsonSchema(Body):
    """The schema of a structured answer; it is always followed strictly."""

    name: FunctionName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Request):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[tuple[str, ...]] = (
        "audio",
        "function_call",
        "functions",
        "moderation",
        "prediction",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "verbosity",
        "web_search_options",
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=131_072)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ChatTool], Field(max_length=128)] | None = None
    tool_choice: (
        Annotated[
            ToolChoice,
            BeforeValidator(as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    """True: keep prompt and answer in the ledger; False: keep neither."""
    prompt_cache_key: Name | None = None
    """Jobs with the same key prefer one worker, which still has their prefix in its cache."""
    safety_identifier: Name | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        most = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(most) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        for place, message in enumerate(self.messages):
            _check_message(message, f"messages.{place}")
        _check_tools(self)
        if self.response_format is not None and self.response_format.type == "json_schema":
            wanted = self.response_format.json_schema
            if wanted is None or wanted.schema_ is None:
                raise InvalidRequest("response_format needs a schema", param="response_format.json_schema.schema")
        elif self.response_format is not None and self.response_format.json_schema is not None:
            raise InvalidRequest("json_schema goes with the type json_schema only", param="response_format.json_schema")
        return self


def _check_message(message: Message, place: str) -> None:
    """Check that a message has what its role has, and nothing else."""
    if message.role == "tool" and message.tool_call_id is None:
        raise InvalidRequest("a tool's message names the call that it answers", param=f"{place}.tool_call_id")
    if message.role != "tool" and message.tool_call_id is not None:
        raise InvalidRequest("only a tool's message answers a call", param=f"{place}.tool_call_id")
    if message.role != "assistant" and message.tool_calls:
        raise InvalidRequest("only the assistant calls tools", param=f"{place}.tool_calls")
    if message.content is None and not message.tool_calls and message.refusal is None:
        raise InvalidRequest("the message has no content", param=f"{place}.content")


def _check_tools(request: ChatRequest) -> None:
    names = [tool.function.name for tool in request.tools or []]
    if len(set(names)) < len(names):
        raise InvalidRequest("two tools have the same name", param="tools")
    choice = request.tool_choice
    if choice is None:
        return
    if (choice.type == "function") != (choice.function is not None):
        raise InvalidRequest("tool_choice names a function exactly when its type is function", param="tool_choice")
    if choice.type in {"auto", "none"}:
        return
    if not names:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if choice.function is not None and choice.function.name not in names:
        raise InvalidRequest(f"there is no tool {choice.function.name!r}", param="tool_choice")
    if request.response_format is not None and request.response_format.type != "text":
        raise InvalidRequest("the answer cannot be a call and JSON of another form", param="response_format")


# --- completions -----------------------------------------------------------------------------------------------------


class CompletionRequest(_Request):
    """The body of `POST /v1/completions`: one prompt, as it stands."""

    unsupported: ClassVar[tuple[str, ...]] = ("suffix",)

    prompt: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(min_length=1, max_length=1),
        BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UnsupportedParameter("best_of is not supported, unless it is n", param="best_of")
        return self
