"""What the store holds, as records: rows in, msgspec records out."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from tether.database import Row, Value
from tether.errors import ErrorInfo, RateLimits, SchemaError
from tether.quotas import Limit
from tether.records import (
    AttemptRecord,
    JobRecord,
    ModelInfo,
    NodeRecord,
    Sampling,
    Scope,
    TokenLogprobs,
    Usage,
    WorkerRecord,
)

T = TypeVar("T")


class WorkerSlot(NamedTuple):
    """A place on a worker: reserved only while fewer than `slots` attempts run there."""

    worker_id: str
    worker_boot: str
    slots: int
    fingerprint: str = ""
    """Of the model there (`ModelInfo.fingerprint`)."""


class Admission(msgspec.Struct, frozen=True):
    """What became of a job that was brought to the store."""

    accepted: bool
    """The job is in the store; always true where an `Admission` is returned."""
    reserved: bool
    """Attempt 1 runs on the worker that was asked for, held by the orchestrator that asked."""
    duplicate: bool
    """The job was there before, by whoever's hand: the caller's own, too, where the first answer was lost."""
    held: bool = True
    """The orchestrator's boot that asked is the one that holds the job; always true where `duplicate` is not."""
    holder: tuple[str, str] = ("", "")
    """The orchestrator and its boot that hold a duplicate; a boot of "" has given the job away."""
    limits: RateLimits | None = None
    """What is left of the limits that hold for the job; None without any."""
    record: JobRecord | None = None
    """The job as it was found, for a duplicate."""


class ModelRecord(msgspec.Struct, frozen=True):
    """A model that was served at some time."""

    name: str
    version: str
    description: str
    toy: bool
    context_tokens: int
    first_seen_at: float
    seen_at: float


class TenantRecord(msgspec.Struct, frozen=True):
    """A tenant that somebody made known, with its limits."""

    id: str
    weight: float
    """Its share of the queue beside other tenants that wait."""
    created_at: float
    limits: tuple[Limit, ...] = ()
    """Those of its own; without one for requests a minute, the gateway's default holds."""

    def most(self, name: str, *, key_id: str = "", model: str = "") -> int | None:
        """Return a limit by its name; None where there is none."""
        for limit in self.limits:
            if (limit.name, limit.key_id, limit.model) == (name, key_id, model):
                return limit.most
        return None


class KeyRecord(msgspec.Struct, frozen=True):
    """An API key as the store has it: everything but the key."""

    id: str
    tenant_id: str
    prefix: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    replaced_by: str | None = None
    """The key that came in its place when it was rotated."""

    def is_good(self, now: float) -> bool:
        """Whether it opens the door."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class Allowance(NamedTuple):
    """Who wants to know what is left: a tenant, with one of its keys, on a model, and the gateway's default limit."""

    tenant_id: str
    key_id: str
    model: str
    requests_per_minute: int | None


class Lease(msgspec.Struct, frozen=True):
    """An orchestrator's claim on the jobs that its boot holds: alive as long as `renewals` moves."""

    orchestrator_id: str
    orchestrator_boot: str
    renewals: int


class HeldJob(msgspec.Struct, frozen=True):
    """A live job and the orchestrator's boot that holds it."""

    id: str
    attempt: int
    orchestrator_id: str
    orchestrator_boot: str


AttemptEnd = Literal["completed", "failed", "lost", "busy", "cancelled", "expired"]
JobEndStatus = Literal["completed", "failed", "cancelled", "expired"]


def to_job(row: Row) -> JobRecord:
    """Return a row of `jobs` with its newest attempt's fingerprint; like all of these, raises `SchemaError` for a strange one."""
    error = None
    if row["error_code"] is not None:
        error = ErrorInfo(str(row["error_code"]), str(row["error_message"] or ""))
    return convert(
        {
            **row,
            "error": error,
            "usage": Usage(integer(row["prompt_tokens"]), integer(row["completion_tokens"])),
            "sampling": decode(row["sampling"], Sampling),
            "metadata": decode(row["metadata"], dict[str, str]),
            "fingerprint": row.get("fingerprint") or "",
            "logprobs": decode(row["logprobs"] or "[]", tuple[tuple[TokenLogprobs, ...], ...]),
        },
        JobRecord,
    )


def to_key(row: Row) -> KeyRecord:
    """Return a row of `api_keys`."""
    return convert({**row, "scopes": decode(row["scopes"], tuple[Scope, ...])}, KeyRecord)


def to_attempt(row: Row) -> AttemptRecord:
    """Return a row of `attempts`."""
    return convert(row, AttemptRecord)


def to_worker(row: Row) -> WorkerRecord:
    """Return a row of `workers`; one that has paused is kept as draining there, with why."""
    is_paused = row["status"] == "draining" and row["paused"] and row["drained_at"] is None
    status = "paused" if is_paused else row["status"]
    return convert({**row, "status": status, "models": decode(row["models"], tuple[ModelInfo, ...])}, WorkerRecord)


def to_node(row: Row) -> NodeRecord:
    """Return a row of `nodes`."""
    return convert({**row, "addresses": decode(row["addresses"], tuple[str, ...])}, NodeRecord)


def integer(value: Value) -> int:
    """Return a count; nothing is 0, as in SQL's sums of no rows."""
    return int(value or 0)


def convert(value: object, to: type[T]) -> T:
    """Return a row as a record: JSON has one kind of number, so rqlite's 1 stands for 1.0, and 0 and 1 for a flag."""
    try:
        return msgspec.convert(value, to, strict=False)
    except msgspec.ValidationError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc


def decode(value: Value, to: Any) -> Any:
    """Return what a column of JSON holds."""
    try:
        return msgspec.json.decode(str(value), type=to)
    except msgspec.MsgspecError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc
