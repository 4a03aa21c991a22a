"""Every error that Tether tells somebody, once: what it is called, its HTTP status, its exit code.

TetherError
├── RequestError                    the caller's mistake; never retried, never counted against a worker
│   ├── InvalidRequest          400 invalid_request
│   ├── UnsupportedParameter    400 unsupported_parameter
│   ├── ContextLengthExceeded   400 context_length_exceeded
│   ├── JobTooLarge             400 job_too_large
│   ├── InvalidKey              401 invalid_api_key
│   ├── PermissionDenied        403 permission_denied
│   ├── RouteNotFound           404 route_not_found
│   ├── ModelNotFound           404 model_not_found
│   ├── JobNotFound             404 job_not_found
│   ├── ResponseNotFound        404 response_not_found
│   ├── FileNotFound            404 file_not_found
│   ├── BatchNotFound           404 batch_not_found
│   ├── MethodNotAllowed        405 method_not_allowed
│   ├── RequestTimeout          408 request_timeout
│   ├── UpgradeRequired         426 upgrade_required
│   ├── JobConflict             409 job_conflict
│   ├── BatchConflict           409 batch_conflict
│   ├── BodyTooLarge            413 body_too_large
│   └── HeadTooLarge            431 head_too_large
├── RateLimited                 429 rate_limit_exceeded
│   ├── InsufficientQuota       429 insufficient_quota
│   └── TenantQueueFull         429 tenant_queue_full
├── Unavailable                     try again later; carries Retry-After
│   ├── NoOrchestrator          503 no_orchestrator
│   ├── NoWorker                503 no_worker
│   ├── QueueFull               503 queue_full
│   ├── Draining                503 draining
│   └── StoreUnavailable        503 store_unavailable
├── JobError                        an accepted job that did not complete
│   ├── JobCancelled            409 job_cancelled
│   ├── WorkerFailed            502 worker_failed
│   ├── WorkerLost              502 worker_lost
│   ├── Poison                  502 poison
│   ├── OutputInvalid           502 output_invalid
│   └── DeadlineExceeded        504 deadline_exceeded
├── InternalError               500 internal_error
├── LinkError                       between two peers
│   ├── LinkClosed                  link_closed
│   ├── LinkFull                    link_full
│   ├── ProtocolViolation           protocol_violation (a malformed or oversized frame, a message out of turn)
│   └── NotAMember                  not_a_member
└── SetupError                      what stops a role from starting, or a command from running
    ├── UsageError                  usage (exit code 2)
    ├── DataDirError                data_dir
    ├── KeyFileError                key_file
    ├── PortTaken                   port_taken
    ├── InviteError                 invite
    ├── SchemaError                 schema
    ├── ModelUnavailable            model_unavailable
    ├── RuntimeDied                 runtime_died
    ├── NoGateway                   no_gateway
    └── OutputFailed                output_failed
        └── OutputClosed            output_closed (exit code 141, as of a program that SIGPIPE ends)

A class's docstring is its default message. An error crosses a wire as an `ErrorInfo` and comes back as the same class.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from tether.bounds import MAX_MESSAGE_CHARS, Count, LargeCount, LongSeconds, Message, Name, Revision, Seconds

MAX_REASONS = 64


class RateLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is left of the tightest limits of whoever asks; None where there is no limit of that unit."""

    limit_requests: LargeCount | None = None
    remaining_requests: LargeCount = 0
    reset_requests_seconds: Seconds = 0.0
    limit_tokens: LargeCount | None = None
    remaining_tokens: LargeCount = 0
    reset_tokens_seconds: Seconds = 0.0


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: on a link, in a job's record, in an HTTP body."""

    code: Name
    message: Message
    param: Revision | None = None
    retry_after_seconds: LongSeconds | None = None
    limits: RateLimits | None = None
    reasons: Annotated[dict[Name, Count], Meta(max_length=MAX_REASONS)] = {}


class TetherError(Exception):
    """Something went wrong in Tether."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    exit_code: ClassVar[int] = 1
    default_retry_after_seconds: ClassVar[float | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        limits: RateLimits | None = None,
        reasons: dict[str, int] | None = None,
    ) -> None:
        self.message = message or " ".join((type(self).__doc__ or "").split())
        self.param = param
        self.limits = limits
        """What is left to whoever asked, where that is known."""
        self.reasons = reasons or {}
        """How many workers cannot take the job, by why (`reasons.Reason`)."""
        self.retry_after_seconds = (
            retry_after_seconds if retry_after_seconds is not None else self.default_retry_after_seconds
        )
        super().__init__(self.message)

    def to_info(self) -> ErrorInfo:
        """Return this error as it travels."""
        message = self.message[:MAX_MESSAGE_CHARS]
        return ErrorInfo(self.code, message, self.param, self.retry_after_seconds, self.limits, self.reasons)


class RequestError(TetherError):
    """The request is not valid."""

    code, status, type = "invalid_request", 400, "invalid_request_error"


class InvalidRequest(RequestError):
    """The request is not valid."""


class UnsupportedParameter(RequestError):
    """This parameter is not supported."""

    code = "unsupported_parameter"


class ContextLengthExceeded(RequestError):
    """The prompt is longer than the model's context."""

    code = "context_length_exceeded"


class JobTooLarge(RequestError):
    """The job may use more tokens than a job may."""

    code = "job_too_large"


class InvalidKey(RequestError):
    """This gateway needs an API key, as the header `Authorization: Bearer sk-…` has it."""

    code, status, type = "invalid_api_key", 401, "authentication_error"


class PermissionDenied(RequestError):
    """This API key may not do that."""

    code, status, type = "permission_denied", 403, "permission_error"


class RouteNotFound(RequestError):
    """There is no such route."""

    code, status = "route_not_found", 404


class ModelNotFound(RequestError):
    """No worker has served this model."""

    code, status = "model_not_found", 404


class JobNotFound(RequestError):
    """There is no such job."""

    code, status = "job_not_found", 404


class ResponseNotFound(RequestError):
    """There is no such response."""

    code, status = "response_not_found", 404


class FileNotFound(RequestError):
    """There is no such file."""

    code, status = "file_not_found", 404


class BatchNotFound(RequestError):
    """There is no such batch."""

    code, status = "batch_not_found", 404


class MethodNotAllowed(RequestError):
    """This route does not take this method."""

    code, status = "method_not_allowed", 405


class RequestTimeout(RequestError):
    """The request did not come in time."""

    code, status = "request_timeout", 408


class UpgradeRequired(RequestError):
    """This route is a WebSocket: it takes a handshake (RFC 6455), and no ordinary request."""

    code, status = "upgrade_required", 426


class JobConflict(RequestError):
    """The job is not in a state that allows this."""

    code, status = "job_conflict", 409


class BatchConflict(RequestError):
    """The batch is not in a state that allows this."""

    code, status = "batch_conflict", 409


class BodyTooLarge(RequestError):
    """The request body is larger than this gateway accepts."""

    code, status = "body_too_large", 413


class HeadTooLarge(RequestError):
    """The request's line and headers are larger than this gateway accepts."""

    code, status = "head_too_large", 431


class RateLimited(TetherError):
    """The tenant has used up its requests for this minute."""

    code, status, type = "rate_limit_exceeded", 429, "rate_limit_error"
    default_retry_after_seconds = 60.0


class InsufficientQuota(RateLimited):
    """The tenant has used up what it may use today."""

    code = "insufficient_quota"


class TenantQueueFull(RateLimited):
    """The tenant has its share of the queue waiting already."""

    code = "tenant_queue_full"
    default_retry_after_seconds = 2.0


class Unavailable(TetherError):
    """The network cannot take this job now; try again."""

    code, status, type = "unavailable", 503, "service_unavailable_error"
    default_retry_after_seconds = 2.0


class NoOrchestrator(Unavailable):
    """The gateway has no link to an orchestrator; start one with `tether orchestrator`."""

    code = "no_orchestrator"


class NoWorker(Unavailable):
    """No worker can take this job now."""

    code = "no_worker"


class QueueFull(Unavailable):
    """The queue is full."""

    code = "queue_full"


class Draining(Unavailable):
    """This node is stopping and takes no new jobs."""

    code = "draining"


class StoreUnavailable(Unavailable):
    """The store cannot be reached."""

    code = "store_unavailable"


class JobError(TetherError):
    """The job did not complete."""

    code, status, type = "job_failed", 502, "job_error"


class JobCancelled(JobError):
    """The job was cancelled."""

    code, status = "job_cancelled", 409


class WorkerFailed(JobError):
    """Every worker that tried this job failed."""

    code = "worker_failed"


class WorkerLost(JobError):
    """The worker went down while it ran the job."""

    code = "worker_lost"


class Poison(JobError):
    """Several workers went down while they ran this job, so it is not tried again."""

    code = "poison"


class OutputInvalid(JobError):
    """The model produced no usable output."""

    code = "output_invalid"


class DeadlineExceeded(JobError):
    """The job's deadline passed before it was done."""

    code, status, type = "deadline_exceeded", 504, "timeout_error"


class InternalError(TetherError):
    """Tether made a mistake; the log says which."""


class LinkError(TetherError):
    """The link to a peer failed."""

    code = "link_error"


class LinkClosed(LinkError):
    """The link to the peer is closed."""

    code = "link_closed"


class LinkFull(LinkError):
    """The peer does not read as fast as this node sends."""

    code = "link_full"


class ProtocolViolation(LinkError):
    """The peer broke the link's protocol."""

    code = "protocol_violation"


class NotAMember(LinkError):
    """The peer is not a member of this network."""

    code = "not_a_member"


class SetupError(TetherError):
    """This command cannot run as things are."""

    code = "setup"


class UsageError(SetupError):
    """The command was used wrongly."""

    code, exit_code = "usage", 2


class DataDirError(SetupError):
    """The data directory cannot be used."""

    code = "data_dir"


class KeyFileError(SetupError):
    """A key file cannot be used."""

    code = "key_file"


class PortTaken(SetupError):
    """The port is taken."""

    code = "port_taken"


class InviteError(SetupError):
    """The invite cannot be used."""

    code = "invite"


class SchemaError(SetupError):
    """The store's tables and this version of Tether do not match."""

    code = "schema"


class ModelUnavailable(SetupError):
    """The model cannot be served by this machine."""

    code = "model_unavailable"


class RuntimeDied(SetupError):
    """The runtime child ended."""

    code = "runtime_died"


class NoGateway(SetupError):
    """No gateway answers; start one with `tether up`, or name one with --url."""

    code = "no_gateway"


class OutputFailed(SetupError):
    """The output cannot be written."""

    code = "output_failed"


class OutputClosed(OutputFailed):
    """Whoever read the output has closed it."""

    code, exit_code = "output_closed", 141


def _subclasses(cls: type[TetherError]) -> list[type[TetherError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))]


# The first class of a code wins, so a parent stands before a child that inherits its code.
_BY_CODE: dict[str, type[TetherError]] = {}
for _cls in _subclasses(TetherError):
    _BY_CODE.setdefault(_cls.code, _cls)


def from_info(info: ErrorInfo) -> TetherError:
    """Return the error that `info` describes; an unknown code (a newer peer's) becomes an `InternalError`."""
    cls = _BY_CODE.get(info.code, InternalError)
    if cls is TetherError:
        cls = InternalError
    return cls(
        info.message,
        param=info.param,
        retry_after_seconds=info.retry_after_seconds,
        limits=info.limits,
        reasons=info.reasons,
    )
