"""The things that Tether talks about, as small frozen records: a job, its usage, a worker's state.

Every module shares these; a record is made where data enters (an HTTP body, a frame, a row) and nobody passes a raw
dict further in. Times are Unix seconds of the machine that made the record and are only ever shown, never compared with
another machine's clock; durations end in `_seconds`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from tether.bounds import (
    MAX_HOLDERS,
    MAX_MODELS,
    MAX_TOP,
    Change,
    Count,
    FreeTokens,
    Integer,
    LargeCount,
    LongSeconds,
    Name,
    NumChoices,
    Priority,
    Rate,
    Revision,
    Seconds,
    Slots,
    Time,
    TokenId,
    TokenText,
)
from tether.errors import ErrorInfo

JobStatus = Literal["queued", "running", "completed", "failed", "cancelled", "expired"]
"""`queued` and `running` are live; the other four are ends, written once."""

FinishReason = Literal["stop", "length", "cancelled", "error"]
Form = Literal["text", "prompt", "chat", "response", "embedding"]
"""What a job's input is: a user's message, a prompt as it stands, a `Chat` as JSON (twice), or an `EmbeddingInput` as JSON; and
how its answer is told."""
Keep = Literal["all", "result", "nothing"]
"""What the store keeps of a job's text after its end: prompt and answer, only the answer, or neither."""

Role = Literal["gateway", "orchestrator", "worker", "operator"]

Scope = Literal["models", "admin", "read-only"]
"""What an API key may do: `models` runs jobs and looks after its tenant's, `read-only` only looks at them, `admin` does
both for every tenant."""

ModelKey = tuple[str, str]
"""A model's name and version."""

LIVE: frozenset[JobStatus] = frozenset({"queued", "running"})


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is chosen and when an answer ends. The defaults are greedy decoding.

    The parameters act in this order: guide (schema or regular expression), logit bias, penalties, temperature, top-k, top-p,
    min-p. `tether.decoding.check_sampling` has their ranges.
    """

    max_tokens: Count = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: Integer = 0
    """With a token's absolute position, the only source of randomness: a resumed job draws the same numbers."""
    top_k: Integer = 0
    """Only the k likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest one; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes the tokens of prompt and answer less likely; 1: off."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as the answer has it."""
    logit_bias: dict[Integer, float] = {}
    """Added to the logits of these token ids. JSON has the ids as strings: `msgspec.convert` needs `str_keys=True`."""
    logprobs: Integer | None = None
    """Tell each token's log-probability, and those of this many of the likeliest; None: tell none."""
    min_tokens: Integer = 0
    """Until the answer has this many, neither an end-of-sequence id nor one of `stop_token_ids` is chosen."""
    ignore_eos: bool = False
    """The model's end-of-sequence ids do not end the answer."""
    stop_token_ids: tuple[Integer, ...] = ()
    """Each of these ids ends the answer, as an end-of-sequence id does: counted, without text."""
    n: NumChoices = 1
    """How many answers to the one prompt; each draws its own random numbers."""
    json_schema: str | None = None
    """The answer is JSON that this JSON Schema, written as JSON, admits."""
    regex: str | None = None
    """The whole answer matches this regular expression."""

    @property
    def is_guided(self) -> bool:
        """Whether a schema or a regular expression says what may come next."""
        return self.json_schema is not None or self.regex is not None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """How likely the model itself held a chosen token to be, and the likeliest ones in its place.

    Natural logarithms of the model's own distribution, before bias, penalties, temperature and guide.
    """

    logprob: float
    top: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=MAX_TOP)] = ()
    """Token ids with their log-probabilities, the likeliest first."""
    texts: Annotated[tuple[TokenText, ...], Meta(max_length=MAX_TOP + 1)] = ()
    """The text of the chosen token, then those of `top`, for a client that has no tokenizer."""

    @property
    def text(self) -> str:
        """The chosen token's text; empty where none is told."""
        return self.texts[0] if self.texts else ""


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a function that the model asked for; `arguments` is a JSON object, as text."""

    id: str
    name: str
    arguments: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may ask for; `parameters` is a JSON Schema, as JSON."""

    name: str
    description: str = ""
    parameters: msgspec.Raw = msgspec.Raw(b"{}")


class Chat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A conversation that the model's chat template renders: the input of a job of the form `chat`."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    parallel: bool = True
    """Whether one answer may have several calls."""
    only_calls: bool = False
    """The answer is one call and nothing else: the guide sees to it."""
    has_instructions: bool = False
    """The first message is the instructions of this one response; one that goes on after it has its own."""
    previous_id: str | None = None
    """The response after which this one goes on, whose conversation the messages begin with."""


class EmbeddingInput(msgspec.Struct, frozen=True, omit_defaults=True):
    """What vectors are asked for: the input of a job of the form `embedding`.

    Its answer is a line for each input, in their order: float32, little-endian, in base64. Each counts as one token.
    """

    inputs: tuple[str | tuple[Integer, ...], ...]
    """Texts, or token ids."""
    dimensions: Integer | None = None
    """That a vector is to have; None: as many as the model's have."""


class Job(msgspec.Struct, frozen=True):
    """A request that a gateway has checked: everything that any node needs to run it, again if need be."""

    id: str
    """A UUIDv7, so that ids sort by time."""
    tenant_id: str
    model: str
    version: str
    """Empty: the newest one that is served; the orchestrator puts it in when it takes the job."""
    input: str
    sampling: Sampling = Sampling()
    wait: bool = True
    """A client waits; False: the job was answered with 202, and runs whether anybody looks or not."""
    stream: bool = False
    priority: Priority = 0
    """Higher goes first in the queue."""
    deadline_seconds: Seconds = 300.0
    """From acceptance to end, by the clock of the orchestrator that holds the job."""
    region: str | None = None
    """Where the client would like it to run; a preference, not a fence."""
    session_key: str | None = None
    """Jobs of one session prefer one worker, which still has their prefix in its cache."""
    keep: Keep = "all"
    requests_per_minute: LargeCount | None = None
    """The gateway's default limit for a tenant that has none of its own in the store; None: no limit."""
    created_at: Time = 0.0
    key_id: str = ""
    """The API key that it came with; empty where there are no keys."""
    form: Form = "text"
    user: str | None = None
    """Who asked, in the client's own words; only shown."""
    metadata: dict[str, str] = {}
    """The client's own notes; only shown."""


class Caller(msgspec.Struct, frozen=True):
    """Whom an API key stands for."""

    key_id: str
    tenant_id: str
    scopes: frozenset[Scope]
    valid_seconds: LongSeconds | None = None
    """How long the key is still good for, when this was said; None: until it is revoked."""


class Actor(msgspec.Struct, frozen=True):
    """An API key that may act on what is not its tenant's: who did it, for the audit log."""

    key_id: Name
    tenant_id: Name


class Usage(msgspec.Struct, frozen=True):
    """Tokens spent on a job, by every attempt together where there were several."""

    prompt_tokens: LargeCount = 0
    completion_tokens: LargeCount = 0


class Waiting(msgspec.Struct, frozen=True):
    """Where a job stands in the queue of the orchestrator that holds it."""

    place: Count
    """1 is next."""
    expected_seconds: LongSeconds | None = None
    """When it is likely to get a slot; None while nobody can say."""


class WorkerChance(msgspec.Struct, frozen=True):
    """What one worker would do with a job: a score made of parts, or the reason why it cannot."""

    worker_id: str
    name: str
    region: str
    slots: Slots
    """For this model; 0 where it does not serve it, or loads it still."""
    free_slots: Change
    score: float | None = None
    parts: dict[str, float] = {}
    reason: str | None = None
    detail: str = ""
    """What the reason leaves open, for people: why it has paused, who drains it."""


class LimitLeft(msgspec.Struct, frozen=True):
    """A limit that holds for a job, and what is left of it."""

    name: str
    of: Literal["tenant", "key"]
    model: str
    """Empty where it is for all models."""
    most: LargeCount
    left: Change
    reset_seconds: Seconds
    """How long its present window lasts; 0 where it has none."""


class Explanation(msgspec.Struct, frozen=True):
    """What would happen to a job that came now, and why."""

    orchestrator_id: str
    orchestrator_name: str
    """Who says so: the one to which the job would go."""
    model: str
    version: str
    tokens: LargeCount
    outcome: Literal["runs", "waits", "refused"]
    error: ErrorInfo | None
    """Why it would be refused."""
    workers: tuple[WorkerChance, ...]
    """Those that can take it, best first: it runs on the first of them. Then the others."""
    waiting: Waiting | None
    """Where it would stand."""
    num_own_waiting: Count
    """Its tenant's jobs that wait for the model."""
    num_waiting: Count | None
    """All tenants' jobs that do; None for who may not know of other tenants."""
    limits: tuple[LimitLeft, ...]


class JobRecord(msgspec.Struct, frozen=True, omit_defaults=False):
    """A job as the store has it: what `tether jobs show` and `GET /v1/jobs/{id}` say."""

    id: str
    tenant_id: str
    model: str
    version: str
    status: JobStatus
    attempt: Count
    """The number of the newest attempt; 0 before the first."""
    input: str | None
    result: str | None
    """The answer; of several choices, their `ChoiceResult`s as a JSON array."""
    finish_reason: FinishReason | None
    error: ErrorInfo | None
    usage: Usage
    sampling: Sampling
    wait: bool
    stream: bool
    priority: Priority
    deadline_seconds: Seconds
    region: str | None
    session_key: str | None
    keep: Keep
    orchestrator_id: str | None
    worker_id: str | None
    """The worker of the newest attempt."""
    created_at: float
    started_at: float | None
    ended_at: float | None
    form: Form = "text"
    user: str | None = None
    metadata: dict[str, str] = {}
    waiting: Waiting | None = None
    """Not in the store: said by the orchestrator in whose queue it stands."""
    fingerprint: str = ""
    """Of the model that ran the newest attempt (`ModelInfo.fingerprint`)."""
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    """Those of each choice's tokens, where they were asked for and are kept."""
    exact: bool = True
    """False: a part of the answer came from a worker with other weights, another number format or another tokenizer than
    the part before it, so that the whole is not what one worker would have said."""
    outline: str | None = None
    """Of a conversation whose input is not kept: the `Chat` by which its answer is told (`outline.py`)."""


class ChoiceResult(msgspec.Struct, frozen=True):
    """One of several answers to one prompt."""

    text: str
    finish_reason: FinishReason


class ServedModel(msgspec.Struct, frozen=True):
    """A model that can be served now, by how many workers and in how many slots."""

    name: str
    version: str
    context_tokens: Count
    toy: bool
    num_workers: Count
    num_slots: LargeCount
    is_newest: bool
    """No served version of this name is newer: what the name alone means."""
    first_seen_at: float = 0.0


class AttemptRecord(msgspec.Struct, frozen=True):
    """One try of a job on one worker."""

    job_id: str
    number: int
    worker_id: str
    status: Literal["running", "completed", "failed", "lost", "busy", "cancelled", "expired"]
    error_code: str | None
    completion_tokens: int
    started_at: float
    ended_at: float | None
    worker_boot: str = ""
    fingerprint: str = ""
    """Of the model that ran (`ModelInfo.fingerprint`)."""


class ModelInfo(msgspec.Struct, frozen=True):
    """A model as one worker serves it: what must be equal for another worker to continue an answer exactly."""

    name: Name
    version: Name
    revision: Revision = ""
    """Hash of the weights or the hub's commit."""
    dtype: Name = "float32"
    context_tokens: Count = 0
    tokenizer_hash: Name = ""
    slots: Slots = 1
    """How many jobs this worker runs at once on this model."""
    toy: bool = False
    """Only for trying the network out."""
    embeds: bool = False
    """It gives embeddings, too."""
    tokens_per_second: Rate = 0.0
    """Measured by the runtime on its latest jobs; 0 before the first."""
    time_to_first_token_seconds: Seconds = 0.0
    """From a job's arrival at the runtime to its first token, on its latest jobs; 0 before the first."""
    free_kv_tokens: FreeTokens | None = None
    """Tokens that its cache could still take when its latest job ended; None before that."""
    num_waiting: Count = 0
    """Jobs that waited in the runtime, without a place in its batch, when its latest job ended."""

    @property
    def fingerprint(self) -> str:
        """Weights, number format and tokenizer: a worker with the same goes on with an answer exactly."""
        return f"{self.revision}/{self.dtype}/{self.tokenizer_hash}"


class WorkerState(msgspec.Struct, frozen=True):
    """All that a worker says of itself: whole, every few seconds and at each change."""

    worker_id: Name
    """The worker's peer id; only that peer's signature makes the state count."""
    boot_id: Name
    sequence: Integer
    """Grows with every state of one boot; an older one is dropped."""
    sent_at: Time
    name: Name
    region: Name
    gpu_class: Name
    models: Annotated[tuple[ModelInfo, ...], Meta(max_length=MAX_MODELS)]
    running: Count = 0
    held: Annotated[dict[Name, Count], Meta(max_length=MAX_HOLDERS)] = {}
    """The running jobs by the orchestrator that sent them, so that each can tell the others' from its own."""
    draining: bool = False
    loading: bool = False
    version: Name = ""
    """Tether's own version there."""
    paused: Name = ""
    """Why it takes no jobs for now, for people; empty: it takes jobs."""

    @property
    def takes_jobs(self) -> bool:
        """Whether it would take a job if it had room."""
        return not (self.draining or self.paused)


class WorkerRecord(msgspec.Struct, frozen=True):
    """A worker as the store remembers it: what `tether workers list` shows."""

    id: str
    name: str
    region: str
    gpu_class: str
    status: Literal["ready", "loading", "draining", "paused", "gone"]
    models: tuple[ModelInfo, ...]
    running: int
    orchestrator_id: str
    joined_at: float
    seen_at: float
    paused: str = ""
    """Why it takes no jobs for now, as it said itself."""
    drained_at: float | None = None
    """Since when an operator keeps jobs from it."""


class NodeRecord(msgspec.Struct, frozen=True):
    """An orchestrator or gateway as the store remembers it: what `tether status` shows."""

    id: str
    role: Role
    name: str
    region: str
    addresses: tuple[str, ...]
    version: str
    started_at: float
    seen_at: float
    status: Literal["up", "gone"] = "up"
    """What was known at `seen_at`."""


# --- files and batches -----------------------------------------------------------------------------------------------

Purpose = Literal["batch", "batch_output"]
"""What a file is: the requests of a batch, or what became of them."""

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
"""Where a batch's requests would go one by one."""

BatchStatus = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
LIVE_BATCH: frozenset[BatchStatus] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})


class FileRecord(msgspec.Struct, frozen=True):
    """A file of a tenant's; its content is in parts."""

    id: str
    tenant_id: str
    filename: str
    purpose: Purpose
    num_bytes: LargeCount
    num_parts: Count
    created_at: Time
    expires_at: Time | None = None
    """When it is deleted, if nobody does before."""


class BatchMistake(msgspec.Struct, frozen=True):
    """Why a batch failed: what is wrong with its input file, or who may not run it any more."""

    code: str
    message: str
    line: Count | None = None
    """From 1."""
    param: str | None = None


class BatchRecord(msgspec.Struct, frozen=True):
    """A batch as the store has it: the requests of a file, run when there is room."""

    id: str
    tenant_id: str
    key_id: str
    """The API key that it came with, whose limits its jobs count against; empty where there are no keys."""
    endpoint: Endpoint
    input_file_id: str
    created_at: Time
    expires_at: Time
    """What has not been run by then never is."""
    status: BatchStatus = "validating"
    model: str | None = None
    """As the lines name it; None until they are checked."""
    errors: tuple[BatchMistake, ...] = ()
    metadata: dict[str, str] = {}
    keep: Keep = "all"
    """What the ledger keeps of each line's job. The batch's own files are there until they are deleted or expire."""
    requests_per_minute: LargeCount | None = None
    """The gateway's default limit for a tenant that has none of its own; None: no limit."""
    output_seconds: Seconds | None = None
    """How long its output files are kept; None: as long as any file."""
    num_lines: Count = 0
    num_completed: Count = 0
    num_failed: Count = 0
    """Lines that are in the error file, or will be."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    orchestrator_id: str = ""
    """Who runs it; empty: nobody at present."""
    orchestrator_boot: str = ""
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None
    """When it was completed, failed, expired or cancelled."""


class BatchLine(msgspec.Struct, frozen=True):
    """A request of a batch that is live."""

    number: int
    """Of its line in the input file, from 1."""
    custom_id: str
    """The client's own name for it."""
    request: str
    """The request's body, as JSON."""
