"""Every message on a link and every topic, once: who may send it, what it says.

Links carry what must arrive (`LinkMessage`, a closed union, one JSON object a frame, told apart by `type`). Topics carry
news that may be lost, because the next one repeats it. A job's messages carry `(job_id, attempt)`, so that a late frame
of an older attempt is dropped, and tokens carry the position of the first one, so that none counts twice.

`SENDERS` says which roles may send which message: the link's authenticated peer counts, never an id inside a payload.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tether.batch_messages import BATCH_QUESTIONS, BATCH_REPLIES, BatchQuestion, BatchReply
from tether.bounds import MAX_CHOICES, MAX_STATES, Count, Integer, LongSeconds, Message, Name, Seconds, Time, TokenId
from tether.errors import MAX_REASONS, ErrorInfo, ProtocolViolation, RateLimits
from tether.records import (
    Actor,
    Caller,
    Explanation,
    FinishReason,
    Job,
    JobRecord,
    JobStatus,
    Role,
    ServedModel,
    TokenLogprobs,
    Usage,
    Waiting,
    WorkerState,
)

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 20


class Signed(msgspec.Struct, frozen=True):
    """Bytes with an Ed25519 signature; `signer` is the 32-byte public key."""

    signer: bytes
    payload: bytes
    signature: bytes


# --- the link itself -------------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first frame from the side that dialled: who I am and what lets me in."""

    protocol: Count
    boot_id: Name
    roles: tuple[Role, ...]
    name: Name
    region: Name
    chain: tuple[Signed, ...]
    """Credentials, from one that the network's key signed down to this peer's own (see credentials.py)."""
    addresses: tuple[str, ...] = ()
    """Where others can dial this peer; empty for a worker behind a router."""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The answer to a `Hello` that is accepted; the dialled side shows its own credentials too."""

    protocol: Count
    boot_id: Name
    roles: tuple[Role, ...]
    name: Name
    region: Name
    chain: tuple[Signed, ...]
    orchestrators: tuple[str, ...] = ()
    """Addresses of the orchestrators that the answering side knows, itself included."""
    renewed: tuple[Signed, ...] = ()
    """A newer credential for the caller's machine, where the one shown ends soon."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The answer to a `Hello` that is not accepted; the link closes after it."""

    error: ErrorInfo


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Sent when nothing else was for a while: silence is death."""


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye"):
    """The sender leaves on purpose; nobody needs to wait for a timeout."""

    reason: Message = ""


# --- worker -> orchestrator ------------------------------------------------------------------------------------------


class Presence(msgspec.Struct, frozen=True, tag="presence"):
    """A worker's whole state, signed by it: the payload is a `WorkerState` as JSON."""

    state: Signed


class InferBusy(msgspec.Struct, frozen=True, tag="infer.busy"):
    """The worker has no room for this attempt; nothing ran."""

    job_id: str
    attempt: Count
    error: ErrorInfo


class InferTokens(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag="infer.tokens"):
    """New tokens: their ids, the text that they add, and the position of the first one in the answer."""

    job_id: str
    attempt: Count
    position: Count
    token_ids: tuple[TokenId, ...]
    text: str
    choice: Count = 0
    """Which of the job's answers these belong to."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """For each id, where the sampling asks for them."""


class InferEnd(msgspec.Struct, frozen=True, tag="infer.end"):
    """The attempt's end. With an error, `retry` says whether another worker might do better."""

    job_id: str
    attempt: Count
    finish_reason: FinishReason
    usage: Usage
    error: ErrorInfo | None = None
    retry: bool = False
    choices: Annotated[tuple[FinishReason, ...], Meta(max_length=MAX_CHOICES)] = ()
    """How each answer ended, where there are several; `finish_reason` is the first one's."""


# --- orchestrator -> worker ------------------------------------------------------------------------------------------


class InferStart(msgspec.Struct, frozen=True, tag="infer.start"):
    """Run this attempt, going on after the tokens that the client already has."""

    job: Job
    attempt: Count
    emitted: tuple[tuple[TokenId, ...], ...] = ()
    """For each choice, the ids that the client already has."""
    emitted_text: str = ""
    """The text of the first choice's, for a worker whose engine knows no token ids."""


class InferCancel(msgspec.Struct, frozen=True, tag="infer.cancel"):
    """Stop this attempt; the worker answers with an `InferEnd`."""

    job_id: str
    attempt: Count


# --- gateway -> orchestrator -----------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, omit_defaults=True, tag="submit"):
    """Run this job. The same id again, with the tokens so far, goes on with the same job."""

    job: Job
    emitted: tuple[tuple[TokenId, ...], ...] = ()
    """For each choice, the ids that the client already has."""
    texts: tuple[str, ...] = ()
    """For each choice, the text of the emitted tokens."""
    lost_id: str = ""
    """The orchestrator that had the job and is lost to this gateway: the receiver may take the job from it."""
    lost_boot: str = ""
    seconds_left: Seconds | None = None
    """Of the job's deadline, where it was submitted before; None: all of it."""
    accepted: bool = False
    """The client was told that the job is accepted."""


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Tell me this job from here on too; `seen` are the tokens and characters of each choice that I have.

    Answered with the job's events, or with `NotLive`.
    """

    job_id: str
    seen: tuple[tuple[Count, Count], ...] = ()


class Unwatch(msgspec.Struct, frozen=True, tag="unwatch"):
    """Nobody here watches this job any more; it goes on."""

    job_id: str


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Stop this job; its end follows as for any other."""

    job_id: str
    reason: str = "client gone"


class GetJob(msgspec.Struct, frozen=True, tag="job.get"):
    """Ask for a job's record; `tenant_id` hides the others' jobs."""

    request_id: Integer
    job_id: str
    tenant_id: str | None = None


class ListJobs(msgspec.Struct, frozen=True, tag="job.list"):
    """Ask for a page of jobs, newest first."""

    request_id: Integer
    tenant_id: str | None = None
    status: JobStatus | None = None
    model: str | None = None
    before: str | None = None
    """Only jobs older than this id: the last one of the page before."""
    limit: Integer = 50


class CancelJob(msgspec.Struct, frozen=True, tag="job.cancel"):
    """Ask for a job's end, wherever it was submitted; answered with its record after the end is written."""

    request_id: Integer
    job_id: str
    tenant_id: str | None = None
    by: Actor | None = None
    reason: str = "on request"


class ForgetJob(msgspec.Struct, frozen=True, tag="job.forget"):
    """Drop what is kept of a job that has ended; answered with its record as it is then."""

    request_id: Integer
    job_id: str
    tenant_id: str | None = None
    by: Actor | None = None


class ClaimKey(msgspec.Struct, frozen=True, tag="key.claim"):
    """Give a client's idempotency key to the job `job_id`, unless another one has it."""

    request_id: Integer
    tenant_id: str
    key: str
    fingerprint: str
    """Of the request: with another one the key may not be used again."""
    job_id: str


class GetModels(msgspec.Struct, frozen=True, tag="models.get"):
    """Ask which models can be served now."""

    request_id: Integer


class Explain(msgspec.Struct, frozen=True, tag="explain"):
    """Ask what would happen to a job that came now; it does not come."""

    request_id: Integer
    job: Job
    sees_all: bool = False
    """Whether who asks may know of other tenants' jobs."""


class GetHealth(msgspec.Struct, frozen=True, tag="health.get"):
    """Ask whether jobs can be served now."""

    request_id: Integer


class Authenticate(msgspec.Struct, frozen=True, tag="key.check"):
    """Ask whom an API key stands for, by its digest (`keys.digest`); None asks only whether keys are needed."""

    request_id: Integer
    key_digest: str | None = None


# --- orchestrator -> gateway -----------------------------------------------------------------------------------------


class JobAccepted(msgspec.Struct, frozen=True, tag="job.accepted"):
    """The job is in the ledger: from here on it ends in exactly one `JobEnd`."""

    job_id: str
    status: JobStatus
    version: str = ""
    """Of the model, where the client left the choice of one to the network."""
    limits: RateLimits | None = None
    """What is left to whoever asked."""
    waiting: Waiting | None = None
    """Where it stands in the queue, if it has to wait."""


class NotLive(msgspec.Struct, frozen=True, tag="job.notlive"):
    """The answer to a `Watch` of a job that is not live here: the ledger may have its end."""

    job_id: str


class JobMoved(msgspec.Struct, frozen=True, tag="job.moved"):
    """The job is not this orchestrator's (any more): bring it to the one that is named, else to any other one."""

    job_id: str
    orchestrator_id: str = ""
    """Who holds it; empty: nobody."""
    boot_id: str = ""


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """This orchestrator takes no new jobs and gives away those that wait; its running ones have a while to end."""


class JobQueued(msgspec.Struct, frozen=True, tag="job.queued"):
    """No slot is free; `place` 1 is next. Told again as the job moves on."""

    job_id: str
    place: Count
    deadline_seconds: Seconds
    """How much of its time the job has left."""
    expected_seconds: LongSeconds | None = None
    """When it is likely to get a slot; None while nobody can say."""


class JobStarted(msgspec.Struct, frozen=True, tag="job.started"):
    """An attempt began on a worker."""

    job_id: str
    attempt: Count
    worker_id: str
    worker_name: str
    revision: str = ""
    dtype: str = ""
    """Which weights run, and in which form."""


class JobTokens(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, tag="job.tokens"):
    """New tokens of the answer, in order, none twice."""

    job_id: str
    attempt: Count
    position: Count
    token_ids: tuple[TokenId, ...]
    text: str
    choice: Count = 0
    """Which of the job's answers these belong to."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """For each id, where the sampling asks for them."""


class JobEnd(msgspec.Struct, frozen=True, tag="job.end"):
    """The job's one end, already in the ledger; or its refusal, when it was never accepted (`attempt` 0)."""

    job_id: str
    status: JobStatus
    attempt: Count
    finish_reason: FinishReason
    usage: Usage
    error: ErrorInfo | None = None
    text: str | None = None
    """The whole answer, where the receiver may not have all of its tokens; as `JobRecord.result` has it."""
    choices: Annotated[tuple[FinishReason, ...], Meta(max_length=MAX_CHOICES)] = ()
    """How each answer ended, where there are several."""
    exact: bool = True
    """As `JobRecord.exact` has it."""
    told: Annotated[tuple[tuple[Count, Count], ...], Meta(max_length=MAX_CHOICES)] = ()
    """How many tokens and characters of each choice were told before it, where the whole answer is not here."""


class Jobs(msgspec.Struct, frozen=True, tag="jobs"):
    """The answer to `GetJob`, `ListJobs`, `CancelJob` and `ForgetJob`."""

    request_id: Integer
    jobs: tuple[JobRecord, ...] = ()
    error: ErrorInfo | None = None


class Authenticated(msgspec.Struct, frozen=True, tag="key.checked"):
    """The answer to `Authenticate`."""

    request_id: Integer
    required: bool = True
    """Whether there are keys in this network, so that a request needs one."""
    caller: Caller | None = None
    """Whom the key stands for; None for a key that is not good."""
    error: ErrorInfo | None = None
    """Why nobody can say."""
    limits: RateLimits | None = None
    """What is left to the key, on models that have no limits of their own."""


class KeyClaimed(msgspec.Struct, frozen=True, tag="key.claimed"):
    """The answer to `ClaimKey`: the job that has the key, and what is known of it."""

    request_id: Integer
    job_id: str = ""
    job: JobRecord | None = None
    """None: it is not in the ledger (yet)."""
    error: ErrorInfo | None = None


class Models(msgspec.Struct, frozen=True, tag="models"):
    """The answer to `GetModels`, in the order of their names, the newest version of each first."""

    request_id: Integer
    models: tuple[ServedModel, ...]


class Explained(msgspec.Struct, frozen=True, tag="explained"):
    """The answer to `Explain`."""

    request_id: Integer
    explanation: Explanation | None = None
    error: ErrorInfo | None = None
    """Why nobody can say."""


class Health(msgspec.Struct, frozen=True, tag="health"):
    """The answer to `GetHealth`."""

    request_id: Integer
    store: ErrorInfo | None
    """Why the store cannot be used, or None."""
    num_workers: Count
    num_ready_workers: Count
    num_queued: Count
    num_running: Count
    reasons: Annotated[dict[Name, Count], Meta(max_length=MAX_REASONS)] = {}
    """How many of the other workers take no job, by why (`reasons.Reason`)."""
    why: Message = ""
    """The same for people; empty where all are ready."""


JobEvent = JobAccepted | JobQueued | JobStarted | JobTokens | JobEnd

Reply = Jobs | Models | KeyClaimed | Health | Authenticated | BatchReply | Explained
"""What `Links.ask` waits for."""

LinkMessage = (
    Hello
    | Welcome
    | Refused
    | Ping
    | Goodbye
    | Presence
    | InferBusy
    | InferTokens
    | InferEnd
    | InferStart
    | InferCancel
    | Submit
    | Cancel
    | GetJob
    | ListJobs
    | CancelJob
    | ForgetJob
    | GetHealth
    | Explain
    | Explained
    | Authenticate
    | GetModels
    | ClaimKey
    | KeyClaimed
    | Watch
    | Unwatch
    | NotLive
    | JobMoved
    | Leaving
    | JobAccepted
    | JobQueued
    | JobStarted
    | JobTokens
    | JobEnd
    | Jobs
    | Models
    | Health
    | Authenticated
    | BatchQuestion
    | BatchReply
)

ANY: frozenset[Role] = frozenset({"gateway", "orchestrator", "worker", "operator"})
_WORKER: frozenset[Role] = frozenset({"worker"})
_ORCHESTRATOR: frozenset[Role] = frozenset({"orchestrator"})
_GATEWAY: frozenset[Role] = frozenset({"gateway", "operator"})

SENDERS: dict[type, frozenset[Role]] = {
    Hello: ANY,
    Welcome: ANY,
    Refused: ANY,
    Ping: ANY,
    Goodbye: ANY,
    Presence: _WORKER,
    InferBusy: _WORKER,
    InferTokens: _WORKER,
    InferEnd: _WORKER,
    InferStart: _ORCHESTRATOR,
    InferCancel: _ORCHESTRATOR,
    Submit: _GATEWAY,
    Cancel: _GATEWAY,
    GetJob: _GATEWAY,
    ListJobs: _GATEWAY,
    CancelJob: _GATEWAY | _ORCHESTRATOR,  # one that does not hold the job asks the one that does
    ForgetJob: _GATEWAY,
    GetHealth: _GATEWAY,
    Explain: _GATEWAY,
    Explained: _ORCHESTRATOR,
    Authenticate: _GATEWAY,
    GetModels: _GATEWAY,
    ClaimKey: _GATEWAY,
    KeyClaimed: _ORCHESTRATOR,
    Watch: _GATEWAY,
    Unwatch: _GATEWAY,
    NotLive: _ORCHESTRATOR,
    JobMoved: _ORCHESTRATOR,
    Leaving: _ORCHESTRATOR,
    JobAccepted: _ORCHESTRATOR,
    JobQueued: _ORCHESTRATOR,
    JobStarted: _ORCHESTRATOR,
    JobTokens: _ORCHESTRATOR,
    JobEnd: _ORCHESTRATOR,
    Jobs: _ORCHESTRATOR,
    Models: _ORCHESTRATOR,
    Health: _ORCHESTRATOR,
    Authenticated: _ORCHESTRATOR,
    **dict.fromkeys(BATCH_QUESTIONS, _GATEWAY),
    **dict.fromkeys(BATCH_REPLIES, _ORCHESTRATOR),
}

# --- topics ----------------------------------------------------------------------------------------------------------


class PresenceNews(msgspec.Struct, frozen=True, tag="presence.news"):
    """On `presence_topic`: the signed states that one orchestrator heard, whole, once a second."""

    states: Annotated[tuple[Signed, ...], Meta(max_length=MAX_STATES)]


class ModelNews(msgspec.Struct, frozen=True, tag="model.news"):
    """On `model_topic`: who serves this model at present."""

    model: str
    version: str
    worker_ids: tuple[str, ...]


class ControlNews(msgspec.Struct, frozen=True, tag="control.news"):
    """On `control_topic`: an orchestrator, where it can be dialled, and its load."""

    orchestrator_id: str
    boot_id: Name
    sequence: Integer
    addresses: tuple[str, ...]
    num_queued: Count
    num_running: Count
    draining: bool
    sent_at: Time
    """Which of two boots is the later one; Unix seconds by the orchestrator's clock."""


News = PresenceNews | ModelNews | ControlNews


def presence_topic(region: str) -> str:
    """Return the topic on which orchestrators repeat the workers' states of a region."""
    return f"tether/presence/{region}"


def model_topic(model: str, version: str, region: str) -> str:
    """Return the topic on which changes of who serves a model are told."""
    return f"tether/models/{model}/{version}/{region}"


def control_topic(region: str) -> str:
    """Return the topic on which orchestrators tell of themselves."""
    return f"tether/control/{region}"


# --- bytes -----------------------------------------------------------------------------------------------------------

_MAX_TOLD_CHARS = 200

_encoder = msgspec.json.Encoder()
_link_decoder: msgspec.json.Decoder[LinkMessage] = msgspec.json.Decoder(LinkMessage)
_news_decoder: msgspec.json.Decoder[News] = msgspec.json.Decoder(News)
_state_decoder = msgspec.json.Decoder(WorkerState)


def encode(message: LinkMessage | News | WorkerState) -> bytes:
    """Return a message as JSON."""
    return _encoder.encode(message)


def decode_link(frame: bytes) -> LinkMessage:
    """Return the message in a link's frame; raise `ProtocolViolation` for anything else."""
    try:
        return _link_decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(_malformed("frame", exc)) from exc


def decode_news(payload: bytes) -> News:
    """Return the news in a topic's message; raise `ProtocolViolation` for anything else."""
    try:
        return _news_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(_malformed("news", exc)) from exc


def decode_state(payload: bytes) -> WorkerState:
    """Return the state in a `Signed` payload; raise `ProtocolViolation` for anything else."""
    try:
        return _state_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolViolation(_malformed("worker state", exc)) from exc


def _malformed(what: str, error: Exception) -> str:
    """Return what is wrong with bytes of a peer, which may be a stranger: not much of what it says is repeated."""
    text = str(error)
    return f"malformed {what}: {text if len(text) <= _MAX_TOLD_CHARS else text[:_MAX_TOLD_CHARS] + '…'}"
