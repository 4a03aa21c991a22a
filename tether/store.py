"""The store: named queries, rows <-> records, group commit. What must not be forgotten goes through here.

`Store` blocks; the command line calls it as it is, and a role calls its reads through `Ledger.read`. `Ledger` is for
orchestrators on trio: writes that arrive together go into one transaction, and each caller gets its own result.

Every write may be applied twice, because an answer can be lost after the commit: so each is guarded, and where a guard
let nothing through the ledger reads back whether the same write did it before.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar, get_args

import msgspec
import trio

from tether import audit, keys, quotas, schema
from tether.audit import Action, AuditEvent
from tether.database import Applied, Database, Row, Statement, StatementError, Value, connect
from tether.errors import (
    ErrorInfo,
    InternalError,
    JobConflict,
    RateLimits,
    SchemaError,
    SetupError,
    StoreUnavailable,
    TetherError,
    from_info,
)
from tether.quotas import Limit
from tether.records import (
    AttemptRecord,
    Caller,
    FinishReason,
    Job,
    JobRecord,
    JobStatus,
    ModelInfo,
    NodeRecord,
    Role,
    Sampling,
    Scope,
    TokenLogprobs,
    Usage,
    WorkerRecord,
    WorkerState,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

PEPPER_NAME: Final = "key_pepper"
DEADLINE_SECONDS: Final = 10.0
"""How long a call tries before it says that the store is away: longer than an election, or one frozen host."""
HANDED_OVER: Final = "handed_over"
"""The error code of an attempt that ended because its orchestrator gave the job away; no worker's fault."""
_LAST_ID: Final = "\U0010ffff"  # sorts after every id
_PURGE_ROWS: Final = 500
_DAY_SECONDS: Final = 86_400


class Query(NamedTuple):
    """A named query and its parameters."""

    name: str
    params: Mapping[str, Value]


Write = tuple[Query, ...]
"""Statements of one caller that belong together: all of them are applied, or none."""

WriteResult = tuple[Applied, ...] | TetherError
"""What became of each statement of a `Write`, or why none of them was applied."""


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


# --- blocking --------------------------------------------------------------------------------------------------------


def open_store(url: str, *, create: bool = True, deadline_seconds: float = DEADLINE_SECONDS) -> Store:
    """Return the store that `url` names; it blocks, and its tables are not looked at yet (`check`, `migrate`).

    `url` is `sqlite:///path` or `rqlite://[user:password@]host:port[,host:port...]` (`rqlites://` for HTTPS).
    `create`: a missing SQLite file is made. `deadline_seconds`: how long a call tries before `StoreUnavailable`.
    Raises `UsageError`, `DataDirError` or `StoreUnavailable`.
    """
    return Store(connect(url, create=create, deadline_seconds=deadline_seconds), url)


class Store:
    """Everything that the store can be asked and told, one call at a time. Safe to use from several threads.

    Each call raises `StoreUnavailable` when the store cannot answer within the deadline, and `SchemaError` when its
    tables are not this Tether's.
    """

    def __init__(self, database: Database, url: str = "") -> None:
        self.url = _without_password(url)
        self.who = audit.operator()
        """Who the audit log says did what is done through this store."""
        self._database = database
        self._queries = load_queries()
        self._known_pepper = ""

    # The core: named queries in, rows and counts out.

    def read(self, name: str, /, *, settled: bool = False, **params: Value) -> list[Row]:
        """Return the rows of a named query. `settled`: ask the whole cluster, where an old answer would do harm."""
        return self._database.query(self._statement(name, params), settled=settled)

    def write(self, write: Write) -> tuple[int, ...]:
        """Apply one write and return the rows that each of its statements affected, or raise why it was refused."""
        (result,) = self.write_batch([write])
        if isinstance(result, TetherError):
            raise result
        return _counts(result)

    def write_batch(self, writes: Sequence[Write]) -> list[WriteResult]:
        """Apply the writes in order, in one transaction, and return each one's result.

        A write whose statement is refused is left out, and the others are applied without it. Raises
        `StoreUnavailable` for all of them together; they may then be applied or not, and can be sent again.
        """
        results: dict[int, WriteResult] = {}
        statements: dict[int, list[Statement]] = {}
        for number, write in enumerate(writes):
            try:
                statements[number] = [self._statement(name, params) for name, params in write]
            except InternalError as exc:
                results[number] = exc
        while statements:
            owners = [number for number, group in statements.items() for _ in group]
            try:
                applied = iter(self._database.execute([one for group in statements.values() for one in group]))
            except StatementError as exc:
                # Nothing was applied; the others go again, without the one at fault.
                results[owners[exc.index]] = exc
                del statements[owners[exc.index]]
                continue
            for number, group in statements.items():
                results[number] = tuple(islice(applied, len(group)))
            break
        return [results[number] for number in range(len(writes))]

    def _statement(self, name: str, params: Mapping[str, Value]) -> Statement:
        """Return a named query with the parameters that it names, and no others: a prompt travels once."""
        try:
            sql, names = self._queries[name]
            return Statement(sql, {each: params[each] for each in names})
        except KeyError as exc:
            raise InternalError(f"the query {name} does not exist or lacks the parameter {exc}") from exc

    # The schema and the connection.

    def check(self) -> None:
        """Raise `SchemaError` unless the store's tables are exactly this Tether's: behind, newer or edited."""
        schema.check(self._database, schema.load_migrations())

    def migrate(self) -> tuple[schema.Migration, ...]:
        """Apply the migrations that are pending and return them; safe while other processes do the same."""
        return schema.migrate(self._database, schema.load_migrations(), now=time.time())

    def schema_status(self) -> schema.SchemaStatus:
        """Return which migrations the store has and lacks; raises `SchemaError` as `check` does, not for "behind"."""
        return schema.read_status(self._database, schema.load_migrations())

    def ping(self) -> None:
        """Raise `StoreUnavailable` unless the store answers now."""
        self.read("ping")

    def close(self) -> None:
        """Close all connections; later calls raise `StoreUnavailable`."""
        self._database.close()

    # Jobs.

    def job(self, job_id: str, tenant_id: str | None = None) -> JobRecord | None:
        """Return a job, or None; with `tenant_id`, another tenant's job is None too."""
        rows = self.read("job", id=job_id)
        if not rows or tenant_id not in (None, rows[0]["tenant_id"]):
            return None
        return _to_job(rows[0])

    def jobs(
        self,
        tenant_id: str | None = None,
        status: JobStatus | None = None,
        model: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first, older than the id `before`; `input` and `result` are left out."""
        read = partial(self.read, before=before or _LAST_ID, limit=limit)
        if tenant_id is not None:
            rows = read("jobs_of_tenant", tenant_id=tenant_id, status=status, model=model)
        elif model is not None:
            rows = read("jobs_of_model", model=model, status=status)
        elif status is not None:
            rows = read("jobs_with_status", status=status)
        else:
            rows = read("jobs")
        return [_to_job(row) for row in rows]

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """Return a job's attempts, first to newest."""
        return [_to_attempt(row) for row in self.read("attempts", id=job_id)]

    def live_jobs(self, orchestrator_id: str) -> list[JobRecord]:
        """Return the queued and running jobs that an orchestrator holds, oldest first, with their texts."""
        return [_to_job(row) for row in self.read("live_jobs", settled=True, orchestrator_id=orchestrator_id)]

    def held_job(self, job_id: str) -> HeldJob | None:
        """Return who holds a live job; None where there is no such job, or it has ended."""
        rows = self.read("held_job", settled=True, id=job_id)
        return _convert(rows[0], HeldJob) if rows else None

    def holders(self) -> set[tuple[str, str]]:
        """Return the orchestrators and their boots that hold live jobs; a boot of "" has given its jobs away."""
        return {(str(row["orchestrator_id"]), str(row["orchestrator_boot"])) for row in self.read("holders")}

    def held_jobs(self, orchestrator_id: str, orchestrator_boot: str, limit: int = 200) -> list[HeldJob]:
        """Return live jobs that an orchestrator's boot holds, oldest first."""
        params: dict[str, Value] = {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}
        return [_convert(row, HeldJob) for row in self.read("held_jobs", settled=True, limit=limit, **params)]

    def held_job_ids(self, orchestrator_id: str, orchestrator_boot: str) -> set[str]:
        """Return the ids of all live jobs that an orchestrator's boot holds."""
        params: dict[str, Value] = {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}
        return {str(row["id"]) for row in self.read("held_job_ids", settled=True, **params)}

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs there are in each status, 0 included."""
        num_jobs = {str(row["status"]): _integer(row["num_jobs"]) for row in self.read("job_counts")}
        return {status: num_jobs.get(status, 0) for status in get_args(JobStatus)}

    def purge(self, *, now: float, texts_before: float, rows_before: float) -> int:
        """Drop the texts of jobs that ended before `texts_before`, and all of those that ended before `rows_before`.

        Returns how many jobs were touched. Works in short transactions, so that other writes go on in between.
        """
        num_purged = 0
        limit: dict[str, Value] = {"limit": _PURGE_ROWS}
        while True:
            (count,) = self.write(
                (Query("purge_texts", {"now": now, "before": max(texts_before, rows_before), **limit}),)
            )
            num_purged += count
            if count < _PURGE_ROWS:
                break
        while True:
            params = {"before": rows_before, **limit}
            _, count = self.write((Query("purge_attempts", params), Query("purge_jobs", params)))
            num_purged += count
            if count < _PURGE_ROWS:
                break
        # Nothing looks back further than a day at what was used.
        self.write((Query("purge_claimed_keys", {"before": now - _DAY_SECONDS}),))
        self.write((Query("purge_quota_counters", {"before": max(rows_before, now - _DAY_SECONDS)}),))
        return num_purged

    # Who takes part.

    def workers(self) -> list[WorkerRecord]:
        """Return all workers that were ever seen; those that are gone come last."""
        return [_to_worker(row) for row in self.read("workers")]

    def drained_workers(self) -> dict[str, float]:
        """Return since when workers take no jobs because an operator said so, by their ids."""
        return {str(row["id"]): float(row["drained_at"] or 0) for row in self.read("drained_workers")}

    def drain_worker(self, worker_id: str, *, now: float) -> bool:
        """Let a worker take no more jobs until it is resumed, whoever starts it again; False where there is none."""
        told = self._told("worker.drained", worker_id, now, query="audit_undrained_worker")
        return self.write((told, Query("drain_worker", {"id": worker_id, "now": now})))[1] > 0

    def resume_worker(self, worker_id: str, *, now: float) -> bool:
        """Let a worker take jobs again; False where there is none."""
        told = self._told("worker.resumed", worker_id, now, query="audit_drained_worker")
        return self.write((told, Query("resume_worker", {"id": worker_id})))[1] > 0

    def nodes(self) -> list[NodeRecord]:
        """Return all orchestrators and gateways that were ever seen; those that are gone come last."""
        return [_to_node(row) for row in self.read("nodes")]

    def leases(self) -> list[Lease]:
        """Return the orchestrators' leases."""
        return [
            Lease(str(row["id"]), str(row["boot_id"]), _integer(row["lease_renewals"]))
            for row in self.read("nodes", settled=True)
            if row["role"] == "orchestrator"
        ]

    def models(self) -> list[ModelRecord]:
        """Return all models that were ever served."""
        return [_convert(row, ModelRecord) for row in self.read("models")]

    # Tenants, their limits and their keys.

    def tenant(self, tenant_id: str) -> TenantRecord | None:
        """Return a tenant that was made known, or None."""
        rows = self.read("tenant", settled=True, id=tenant_id)
        if not rows:
            return None
        limits = [_convert(row, Limit) for row in self.read("limits_of_tenant", settled=True, id=tenant_id)]
        return _convert({**rows[0], "limits": limits}, TenantRecord)

    def tenants(self) -> list[TenantRecord]:
        """Return all tenants that were made known."""
        limits: dict[str, list[Limit]] = {}
        for row in self.read("limits"):
            limits.setdefault(str(row["tenant_id"]), []).append(_convert(row, Limit))
        return [
            _convert({**row, "limits": limits.get(str(row["id"]), [])}, TenantRecord) for row in self.read("tenants")
        ]

    def weights(self) -> dict[str, float]:
        """Return each tenant's share of the queue; one that is not there has 1."""
        return {str(row["id"]): float(row["weight"] or 0) for row in self.read("tenants")}

    def create_tenant(
        self, tenant_id: str, *, weight: float = 1.0, limits: Mapping[str, int | None] | None = None, now: float
    ) -> None:
        """Make a tenant known; raise `SetupError` where it is already."""
        taken = f"there is a tenant {tenant_id!r} already; `tether tenants set` changes it"
        told = self._told(
            "tenant.created", tenant_id, now, {"weight": weight, "limits": limits}, query="audit_new_tenant"
        )
        if self.tenant(tenant_id) is not None:  # asked first, so that a refused call leaves that one's limits alone
            raise SetupError(taken)
        _, created, *_ = self.write(
            (
                told,
                Query("insert_tenant", {"id": tenant_id, "weight": float(weight), "now": now}),
                *_limit_queries(tenant_id, "", "", limits or {}),
            )
        )
        tenant = self.tenant(tenant_id)
        if not created and (tenant is None or tenant.created_at != now):
            raise SetupError(taken)

    def set_tenant(
        self,
        tenant_id: str,
        *,
        weight: float | None = None,
        key_id: str = "",
        model: str = "",
        now: float | None = None,
        **limits: int | None,
    ) -> None:
        """Change a tenant, or make it known: its weight (None: as it is), and limits by their names in `quotas.LIMITS`.

        None removes a limit. With `key_id` or `model` the limits are those of the key, of the model, or of both together.
        """
        now = time.time() if now is None else now
        params: dict[str, Value] = {
            "id": tenant_id,
            "weight": None if weight is None else float(weight),
            "now": now,
        }
        told = [self._told("tenant.created", tenant_id, now, query="audit_new_tenant")]
        if weight is not None or limits:
            details = {"weight": weight, "limits": limits, "key": key_id, "model": model}
            told.append(self._told("tenant.changed", tenant_id, now, details))
        self.write((*told, Query("set_tenant", params), *_limit_queries(tenant_id, key_id, model, limits)))

    def remove_tenant(self, tenant_id: str, *, now: float) -> bool:
        """Forget a tenant and its limits, and revoke its keys; its jobs stay. False where there was none."""
        params: dict[str, Value] = {"id": tenant_id, "now": now}
        _, _, removed, _, revoked = self.write(
            (
                self._told("tenant.removed", tenant_id, now, query="audit_known_tenant"),
                self._told("key.revoked", tenant_id, now, {"tenant": tenant_id}, query="audit_unrevoked_keys"),
                Query("remove_tenant", params),
                Query("remove_limits", params),
                Query("revoke_keys_of_tenant", params),
            )
        )
        return removed + revoked > 0

    def create_key(
        self,
        tenant_id: str,
        *,
        scopes: frozenset[Scope] = frozenset({"models"}),
        name: str = "",
        expires_at: float | None = None,
        now: float,
    ) -> tuple[str, KeyRecord]:
        """Make a new API key and return it with its record; the key itself is never seen again."""
        return self._create_key(tenant_id, scopes, name, expires_at, now)

    def rotate_key(self, key_id: str, *, grace_seconds: float = 0.0, now: float) -> tuple[str, KeyRecord]:
        """Make a key in the place of one that has `grace_seconds` left then; return it with its record.

        It has the old one's tenant, name, scopes, limits and expiry. Raises `SetupError` where the old one is not good.
        """
        old = self.key(key_id)
        if old is None or not old.is_good(now):
            raise SetupError(f"there is no key {key_id!r} that is good; `tether keys list` has them")
        params: dict[str, Value] = {"id": old.id, "now": now, "expires_at": now + grace_seconds}
        end = Query("expire_key", params) if grace_seconds > 0 else Query("revoke_key", params)
        scopes = frozenset(old.scopes)
        details = {"grace_seconds": grace_seconds or None}
        return self._create_key(old.tenant_id, scopes, old.name, old.expires_at, now, (end,), old.id, **details)

    def _create_key(
        self,
        tenant_id: str,
        scopes: frozenset[Scope],
        name: str,
        expires_at: float | None,
        now: float,
        also: Write = (),
        replaced_id: str = "",
        **details: object,
    ) -> tuple[str, KeyRecord]:
        key, key_id = keys.new_key(), keys.new_key_id()
        ordered = tuple(scope for scope in keys.SCOPES if scope in scopes)
        params: dict[str, Value] = {
            "id": key_id,
            "tenant_id": tenant_id,
            "replaced_id": replaced_id,
            "hash": keys.stored_hash(keys.digest(key), self._pepper(create=True)),
            "prefix": keys.shown_prefix(key),
            "name": name,
            "scopes": _encode_json(ordered).decode(),
            "now": now,
            "expires_at": expires_at,
        }
        copy = (Query("copy_limits", params),) if replaced_id else ()
        told = self._told(
            "key.rotated" if replaced_id else "key.created",
            replaced_id or key_id,
            now,
            {
                "new_key": key_id if replaced_id else None,
                "tenant": tenant_id,
                "name": name,
                "scopes": ordered,
                "expires_at": expires_at,
                **details,
            },
        )
        self.write((told, Query("insert_key", params), *copy, *also))
        return key, KeyRecord(key_id, tenant_id, str(params["prefix"]), name, ordered, now, expires_at, None, None)

    def key(self, key_id: str) -> KeyRecord | None:
        """Return a key's record, or None."""
        rows = self.read("key", settled=True, id=key_id)
        return _to_key(rows[0]) if rows else None

    def keys(self, tenant_id: str | None = None) -> list[KeyRecord]:
        """Return all keys, or a tenant's: revoked and expired ones too."""
        return [_to_key(row) for row in self.read("keys", tenant_id=tenant_id)]

    def revoke_key(self, key_id: str, *, now: float) -> bool:
        """Take a key back at once and for good; False where there is none, or it was taken back before."""
        told = self._told("key.revoked", key_id, now, query="audit_unrevoked_key")
        return self.write((told, Query("revoke_key", {"id": key_id, "now": now})))[1] > 0

    def has_keys(self) -> bool:
        """Whether there ever was a key: then callers need one."""
        return bool(self.read("any_key", settled=True))

    def caller(self, key_digest: str, *, now: float) -> Caller | None:
        """Return whom a key stands for, by its digest (`keys.digest`); None for one that is not good."""
        pepper = self._pepper(create=False)
        rows = self.read("key_with_hash", settled=True, hash=keys.stored_hash(key_digest, pepper)) if pepper else []
        if not rows or not (found := _to_key(rows[0])).is_good(now):
            return None
        valid_seconds = None if found.expires_at is None else found.expires_at - now
        return Caller(found.id, found.tenant_id, frozenset(found.scopes), valid_seconds)

    def _pepper(self, *, create: bool) -> str:
        """Return the network's pepper; empty where there is none yet and none is to be made."""
        if self._known_pepper:
            return self._known_pepper
        if create:
            params: dict[str, Value] = {"name": PEPPER_NAME, "value": keys.new_pepper(), "now": time.time()}
            self.write((Query("insert_secret", params),))
        rows = self.read("secret", settled=True, name=PEPPER_NAME)
        self._known_pepper = str(rows[0]["value"]) if rows else ""
        return self._known_pepper

    def allowances(self, asked: Sequence[Allowance], *, now: float) -> list[tuple[Limit, ...]]:
        """Return for each of `asked` every limit that holds for it, with what of it is spent."""
        rows = self.read("allowances", asked=_encode_json(asked).decode(), now=now)
        found: list[list[Limit]] = [[] for _ in asked]
        for row in rows:
            found[_integer(row["number"])].append(_convert(row, Limit))
        return [tuple(limits) for limits in found]

    # The audit log.

    def audit_events(self, *, since: float = 0.0, limit: int = 50) -> list[AuditEvent]:
        """Return what operators did from `since` on, the newest first."""
        rows = self.read("audit_events", since=since, limit=limit)
        return [_convert({**row, "details": _decode(row["details"], dict[str, Any])}, AuditEvent) for row in rows]

    def record_event(self, action: Action, subject: str, *, now: float, **details: object) -> None:
        """Put a line into the audit log for an act that is no write of the store's."""
        self.write((self._told(action, subject, now, details),))

    def _told(
        self,
        action: Action,
        subject: str,
        now: float,
        details: Mapping[str, object] | None = None,
        *,
        query: str = "audit",
    ) -> Query:
        """Return the line of an act, to be put before the act's own statements; `query` has the act's condition."""
        return Query(query, audit.event_params(action, self.who, subject, now, details or {}))


# --- for trio --------------------------------------------------------------------------------------------------------


class _Waiting:
    """A caller whose write waits for its transaction."""

    __slots__ = ("abandoned", "done", "num_chars", "result", "write")

    def __init__(self, write: Write) -> None:
        self.write = write
        # Of the longest query: its others name the same text, or none.
        self.num_chars = max(
            (sum(len(value) for value in params.values() if isinstance(value, str)) for _, params in write),
            default=0,
        )
        self.done = trio.Event()
        self.result: WriteResult | None = None
        self.abandoned = False


class _Asking:
    """Those whose limits the next read answers."""

    def __init__(self) -> None:
        self.limits: dict[Allowance, tuple[Limit, ...]] = {}
        self.done = trio.Event()


class Ledger:
    """Group commit: writes that arrive together go into one transaction, in the order in which they arrived.

    `run` must be running (`await nursery.start(ledger.run)`). Every method raises `StoreUnavailable` when the store
    cannot be reached within its deadline, when more than `max_waiting` writes wait, or when `run` has ended; the write
    may then be applied or not, and can be sent again. A caller that is cancelled before its write was begun withdraws
    it; afterwards the write goes on without it.
    """

    def __init__(
        self, store: Store, *, max_batch: int = 200, max_waiting: int = 4096, max_batch_chars: int = 4 << 20
    ) -> None:
        self.store = store
        self._max_batch = max_batch
        self._max_batch_chars = max_batch_chars  # so that a batch of long prompts is not slower than its time limit
        self._max_waiting = max_waiting
        self._waiting: deque[_Waiting] = deque()
        self._arrived = trio.Event()
        self._asking = _Asking()
        self._ask_lock = trio.Lock()
        self._running = False
        self._busy_since: float | None = None
        # One batch at a time; reads have threads of their own, so that neither waits for the other.
        self._write_limiter = trio.CapacityLimiter(1)
        self._read_limiter = trio.CapacityLimiter(3)

    @property
    def busy_seconds(self) -> float:
        """How long the transaction that is under way has been; 0 while none is."""
        return 0.0 if self._busy_since is None else trio.current_time() - self._busy_since

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit what waits, until cancelled; then let the batch that was begun finish, and refuse the rest."""
        self._running = True
        task_status.started()
        try:
            while True:
                while not self._waiting:
                    self._arrived = trio.Event()
                    await self._arrived.wait()
                await trio.lowlevel.checkpoint_if_cancelled()
                batch = self._take_batch()
                if batch:
                    await self._commit(batch)
        finally:
            self._running = False
            while self._waiting:
                _settle(self._waiting.popleft(), StoreUnavailable("this node is stopping and writes no more"))

    async def write(self, write: Write) -> tuple[int, ...]:
        """Apply a write, in turn, and return the rows that each of its statements affected."""
        return _counts(await self._apply(write))

    async def _apply(self, write: Write) -> tuple[Applied, ...]:
        if not self._running:
            raise StoreUnavailable("this node is stopping and writes no more")
        if len(self._waiting) >= self._max_waiting:
            raise StoreUnavailable(f"{self._max_waiting} writes wait for the store already")
        waiting = _Waiting(write)
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            await waiting.done.wait()
        finally:
            waiting.abandoned = True  # matters only to a write that nobody has begun yet
        if isinstance(waiting.result, TetherError):
            raise from_info(waiting.result.to_info()) from waiting.result
        assert waiting.result is not None  # noqa: S101  # `done` is set after it
        return waiting.result

    async def read(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run one of the store's blocking reads in a thread: `await ledger.read(ledger.store.job, job_id)`."""
        return await trio.to_thread.run_sync(
            partial(call, *args, **kwargs), limiter=self._read_limiter, abandon_on_cancel=True
        )

    def _take_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        num_chars = 0
        while self._waiting and len(batch) < self._max_batch and num_chars < self._max_batch_chars:
            waiting = self._waiting.popleft()
            if not waiting.abandoned:
                batch.append(waiting)
                num_chars += waiting.num_chars
        return batch

    async def _commit(self, batch: list[_Waiting]) -> None:
        self._busy_since = trio.current_time()
        try:
            # What was handed to the store is answered, whoever is cancelled meanwhile.
            with trio.CancelScope(shield=True):
                results = await trio.to_thread.run_sync(
                    self.store.write_batch, [waiting.write for waiting in batch], limiter=self._write_limiter
                )
        except TetherError as exc:
            results = [exc] * len(batch)
        except BaseException:
            for waiting in batch:
                _settle(waiting, StoreUnavailable("the write failed; the log says why"))
            raise
        finally:
            self._busy_since = None
        for waiting, result in zip(batch, results, strict=True):
            _settle(waiting, result)

    # Jobs.

    async def admit(
        self,
        job: Job,
        *,
        orchestrator_id: str,
        orchestrator_boot: str,
        now: float,
        worker: WorkerSlot | tuple[str, str, int] | None = None,
    ) -> Admission:
        """Count the job against every limit that holds for it, insert it and reserve a slot for attempt 1, all at once.

        Without `worker`, or when it has no free slot, the job is queued. A job that is there already is neither
        counted nor changed. Raises `RateLimited` (with the seconds to the window's end) when a limit is reached,
        `JobTooLarge` when no wait would help, and `JobConflict` when the id belongs to another tenant's job.
        """
        slot = WorkerSlot(*worker) if worker is not None else WorkerSlot("", "", 0)
        params: dict[str, Value] = {
            **_job_params(job),
            **slot._asdict(),
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        write: Write = (Query("insert_job", params), Query("count_job", params))
        if worker is not None:
            write += (Query("insert_first_attempt", params),)
        inserted, counted, *attempts = await self._apply(write)
        if inserted.num_rows:
            limits = quotas.rate_limits([_convert(row, Limit) for row in counted.rows], now)
            if counted.num_rows and not counted.rows:  # rqlite sees no RETURNING behind a SELECT from a function
                limits = await self.rate_limits(job, now=now)
            reserved = any(attempt.num_rows for attempt in attempts)
            return Admission(accepted=True, reserved=reserved, duplicate=False, limits=limits)
        return await self._settle_admission(job, slot, (orchestrator_id, orchestrator_boot), now)

    async def _settle_admission(self, job: Job, slot: WorkerSlot, holder: tuple[str, str], now: float) -> Admission:
        rows = await self.read(self.store.read, "admitted", settled=True, id=job.id)
        if not rows:
            (limits,) = await self.read(self.store.allowances, [_allowance(job)], now=now)
            raise quotas.refusal(limits, quotas.reserved_tokens(job), now)
        row = rows[0]
        if row["tenant_id"] != job.tenant_id:
            raise JobConflict(f"there is another job with the id {job.id}")
        found = (str(row["orchestrator_id"]), str(row["orchestrator_boot"]))
        held = found == holder
        first = (row["attempt"], row["worker_id"], row["worker_boot"], row["attempt_status"])
        reserved = held and first == (1, slot.worker_id, slot.worker_boot, "running")
        left = await self.rate_limits(job, now=now)
        return Admission(
            accepted=True,
            reserved=reserved,
            duplicate=True,
            held=held,
            holder=found,
            limits=left,
            record=_to_job(row),
        )

    async def rate_limits(self, job: Job, *, now: float) -> RateLimits | None:
        """Return what is left of the limits that hold for a job; None without any, or while the store is away."""
        return quotas.rate_limits(await self.limits(job, now=now), now)

    async def limits(self, job: Job, *, now: float) -> tuple[Limit, ...]:
        """Return every limit that holds for a job, with what of it is spent; none while the store is away.

        Those who ask while the store is being read are answered together by the next read.
        """
        asking, mine = self._asking, _allowance(job)
        is_first = not asking.limits
        asking.limits[mine] = ()
        if is_first:
            with trio.CancelScope(shield=True):  # the others wait for this one's read
                async with self._ask_lock:
                    self._asking = _Asking()
                    try:
                        asked = list(asking.limits)
                        limits = await self.read(self.store.allowances, asked, now=now)
                        asking.limits = dict(zip(asked, limits, strict=True))
                    except TetherError as exc:
                        log.debug("limits not read: %s", exc.message)
                    finally:
                        asking.done.set()
        await asking.done.wait()
        return asking.limits[mine]

    async def reserve(
        self,
        job_id: str,
        number: int,
        *,
        worker: WorkerSlot | tuple[str, str, int],
        orchestrator_id: str,
        orchestrator_boot: str,
        now: float,
        exact: bool = True,
    ) -> bool:
        """Begin attempt `number` on a worker; the job is `running` from here on.

        `exact`: it goes on as the attempts before it would have; where one does not, the job says so for good.
        False when the worker has no free slot, or the job is not this orchestrator's live job at attempt
        `number - 1` with that attempt closed.
        """
        slot = WorkerSlot(*worker)
        params: dict[str, Value] = {
            "id": job_id,
            "number": number,
            **slot._asdict(),
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "exact": exact,
            "now": now,
        }
        inserted, _ = await self.write((Query("insert_attempt", params), Query("start_attempt", params)))
        if inserted:
            return True
        rows = await self.read(self.store.read, "attempt", settled=True, id=job_id, number=number)
        mine = (slot.worker_id, slot.worker_boot, orchestrator_id, orchestrator_boot, "running")
        names = ("worker_id", "worker_boot", "orchestrator_id", "orchestrator_boot", "status")
        return bool(rows) and tuple(rows[0][name] for name in names) == mine

    async def end_attempt(
        self,
        job_id: str,
        number: int,
        *,
        status: AttemptEnd,
        error_code: str | None = None,
        completion_tokens: int = 0,
        now: float,
    ) -> bool:
        """Close a running attempt and free its slot, leaving the job as it is; False when it was closed already."""
        (closed,) = await self.write(
            (
                _close_attempt(
                    "close_attempt",
                    job_id,
                    number,
                    status=status,
                    error_code=error_code,
                    completion_tokens=completion_tokens,
                    now=now,
                ),
            )
        )
        return closed > 0

    async def claim_key(self, tenant_id: str, key: str, *, fingerprint: str, job_id: str, now: float) -> str:
        """Give a client's idempotency key to the job `job_id`; return the job that has it, which may be another one.

        Raises `JobConflict` when the key was given for a request with another fingerprint. A key is kept for a day.
        """
        params: dict[str, Value] = {
            "tenant_id": tenant_id,
            "key": key,
            "fingerprint": fingerprint,
            "job_id": job_id,
            "now": now,
        }
        (claimed,) = await self.write((Query("claim_key", params),))
        if claimed:
            return job_id
        rows = await self.read(self.store.read, "claimed_key", settled=True, tenant_id=tenant_id, key=key)
        if rows and rows[0]["fingerprint"] != fingerprint:
            raise JobConflict("this Idempotency-Key was used for another request", param="Idempotency-Key")
        return str(rows[0]["job_id"]) if rows else job_id

    async def requeue(
        self,
        job_id: str,
        number: int,
        *,
        status: AttemptEnd,
        error_code: str | None = None,
        completion_tokens: int = 0,
        now: float,
        holder: tuple[str, str] | None = None,
    ) -> bool:
        """Close attempt `number` and put its job back into the queue, all at once.

        `holder` (orchestrator and its boot): only while that one holds the job. True when the job is queued at this
        attempt now, and held so; False when it has ended, gone on, or gone to another one.
        """
        _, requeued = await self.write(
            (
                _close_attempt(
                    "close_attempt",
                    job_id,
                    number,
                    status=status,
                    error_code=error_code,
                    completion_tokens=completion_tokens,
                    now=now,
                ),
                Query("requeue_job", {"id": job_id, "number": number, **_holder_params(holder)}),
            )
        )
        if requeued:
            return True
        rows = await self.read(self.store.read, "job", settled=True, id=job_id)
        if not rows or (rows[0]["status"], rows[0]["attempt"]) != ("queued", number):
            return False
        return holder in (None, (rows[0]["orchestrator_id"], rows[0]["orchestrator_boot"]))

    async def release(
        self, job_id: str, number: int, *, holder: tuple[str, str], completion_tokens: int = 0, now: float
    ) -> bool:
        """Close attempt `number` and give the job away: it is queued, and any orchestrator may take it over.

        False when `holder` does not hold it at this attempt.
        """
        closed = _close_attempt(
            "close_attempt",
            job_id,
            number,
            status="lost",
            error_code=HANDED_OVER,
            completion_tokens=completion_tokens,
            now=now,
        )
        params = {"id": job_id, "number": number, **_holder_params(holder)}
        _, released = await self.write((closed, Query("release_job", params)))
        return released > 0

    async def take_over(
        self, job_id: str, *, holder: tuple[str, str], orchestrator_id: str, orchestrator_boot: str, now: float
    ) -> bool:
        """Take a live job from its holder (orchestrator and its boot): its attempt is lost, it is queued.

        Of several that try, one gets it; False for the others, and where the job has ended.
        """
        params: dict[str, Value] = {
            "id": job_id,
            "holder_id": holder[0],
            "holder_boot": holder[1],
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        _, taken = await self.write((Query("lose_attempt_of_holder", params), Query("take_over_job", params)))
        if taken:
            return True
        held = await self.read(self.store.held_job, job_id)
        return held is not None and (held.orchestrator_id, held.orchestrator_boot) == (
            orchestrator_id,
            orchestrator_boot,
        )

    async def finish(
        self,
        job_id: str,
        attempt: int,
        *,
        status: JobEndStatus,
        finish_reason: FinishReason | None,
        result: str | None = None,
        error: ErrorInfo | None = None,
        usage: Usage = Usage(),  # noqa: B008  # frozen
        now: float,
        attempt_tokens: int | None = None,
        holder: tuple[str, str] | None = None,
        refused: bool = False,
        logprobs: str | None = None,
    ) -> bool:
        """Write the job's one end, close its running attempt, settle its quota, drop the texts that `keep` does not keep.

        `attempt` is the newest one's number (0: none was begun). `attempt_tokens` are the tokens of that attempt
        alone, where it was not the only one. `logprobs` is kept with the result. `holder` (orchestrator and its boot): only while that one holds the job.
        With `refused` the job's request counts for nothing: its client was told that it was not taken. True when this
        end is the job's end; False when the job ended otherwise, is at another attempt, or is not there.
        """
        error_code = error.code if error else None
        tokens = usage.completion_tokens if attempt_tokens is None else attempt_tokens
        params: dict[str, Value] = {
            "id": job_id,
            "number": attempt,
            "status": status,
            "finish_reason": finish_reason,
            "result": result,
            "logprobs": logprobs,
            "error_code": error_code,
            "error_message": error.message if error else None,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            **_holder_params(holder),
            "used_tokens": usage.prompt_tokens + usage.completion_tokens,
            "given_back": int(refused),
            "now": now,
        }
        write: Write = (Query("end_job", params), Query("settle_job", params))
        if attempt:
            write += (
                _close_attempt(
                    "close_last_attempt",
                    job_id,
                    attempt,
                    status=status,
                    error_code=error_code,
                    completion_tokens=tokens,
                    now=now,
                ),
            )
        if (await self.write(write))[0]:
            return True
        rows = await self.read(self.store.read, "job", settled=True, id=job_id)
        return bool(rows) and (rows[0]["status"], rows[0]["attempt"], rows[0]["ended_at"]) == (status, attempt, now)

    async def adopt(self, *, orchestrator_id: str, orchestrator_boot: str, now: float) -> int:
        """Take over the live jobs of this orchestrator's earlier boots: their attempts are lost, they are queued.

        Returns how many there were; `Store.live_jobs` has them.
        """
        params: dict[str, Value] = {
            "orchestrator_id": orchestrator_id,
            "orchestrator_boot": orchestrator_boot,
            "now": now,
        }
        _, adopted = await self.write(
            (Query("lose_attempts_of_older_boots", params), Query("adopt_jobs_of_older_boots", params))
        )
        return adopted

    async def save_keys_used(self, used: Mapping[str, float]) -> None:
        """Remember when keys were used last, by their ids, all in one statement."""
        if used:
            await self.write((Query("keys_used", {"used": _encode_json(used).decode()}),))

    # Who takes part.

    async def save_workers(self, states: Sequence[WorkerState], *, orchestrator_id: str, now: float) -> None:
        """Remember the states that this orchestrator heard, all in one statement."""
        if states:
            document = msgspec.json.encode(states).decode()
            params: dict[str, Value] = {"states": document, "orchestrator_id": orchestrator_id, "now": now}
            await self.write((Query("save_workers", params),))

    async def worker_gone(self, worker_id: str, boot_id: str, *, orchestrator_id: str, now: float) -> None:
        """Remember that a worker's boot has left, unless it was seen by another orchestrator since."""
        params: dict[str, Value] = {
            "id": worker_id,
            "boot_id": boot_id,
            "orchestrator_id": orchestrator_id,
            "now": now,
        }
        await self.write((Query("worker_gone", params),))

    async def save_node(self, node: NodeRecord, *, boot_id: str) -> None:
        """Remember an orchestrator or a gateway; an orchestrator's lease begins with it."""
        params: dict[str, Value] = {
            "id": node.id,
            "role": node.role,
            "boot_id": boot_id,
            "name": node.name,
            "region": node.region,
            "addresses": msgspec.json.encode(node.addresses).decode(),
            "version": node.version,
            "started_at": node.started_at,
            "seen_at": node.seen_at,
        }
        await self.write((Query("save_node", params),))

    async def node_gone(self, node_id: str, role: Role, boot_id: str, *, now: float) -> None:
        """Remember that a boot of an orchestrator or a gateway has left."""
        params: dict[str, Value] = {"id": node_id, "role": role, "boot_id": boot_id, "now": now}
        await self.write((Query("node_gone", params),))

    async def renew_lease(self, orchestrator_id: str, orchestrator_boot: str, *, now: float) -> bool:
        """Move the lease on all jobs that this boot holds; False when another boot has taken its place."""
        params: dict[str, Value] = {"id": orchestrator_id, "boot_id": orchestrator_boot, "now": now}
        (renewed,) = await self.write((Query("renew_lease", params),))
        return renewed > 0

    async def save_model(self, model: ModelInfo, *, description: str = "", now: float) -> None:
        """Remember that a model is served; an empty description leaves the one that is there."""
        params: dict[str, Value] = {
            "name": model.name,
            "version": model.version,
            "description": description,
            "toy": model.toy,
            "context_tokens": model.context_tokens,
            "now": now,
        }
        await self.write((Query("save_model", params),))


def _counts(applied: tuple[Applied, ...]) -> tuple[int, ...]:
    return tuple(each.num_rows for each in applied)


def _settle(waiting: _Waiting, result: WriteResult) -> None:
    waiting.result = result
    waiting.done.set()


# --- named queries ---------------------------------------------------------------------------------------------------

_QUERY_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT_LINE = re.compile(r"^\s*--.*$", re.MULTILINE)
_PARAMETER = re.compile(r":([a-z]\w*)")


class NamedQuery(NamedTuple):
    """A statement from a `.sql` file and the parameters that it names."""

    sql: str
    names: tuple[str, ...]


def load_queries(folder: Path | None = None) -> dict[str, NamedQuery]:
    """Return the named queries of the package's `.sql` files, without their comments; raise `SchemaError` for a double.

    A query begins with a line `-- name: some_name` and has one statement.
    """
    queries: dict[str, NamedQuery] = {}
    for path in sorted((folder or Path(__file__).parent / "queries").glob("*.sql")):
        _, *pieces = _QUERY_NAME.split(path.read_text("utf-8"))
        for name, body in zip(pieces[::2], pieces[1::2], strict=True):
            if name in queries:
                raise SchemaError(f"there are two queries named {name}")
            # Every statement of a batch carries its text over the wire: no indentation, no final semicolon.
            lines = [line.strip() for line in _COMMENT_LINE.sub("", body).splitlines()]
            sql = " ".join(line for line in lines if line).rstrip(";")
            queries[name] = NamedQuery(sql, tuple(dict.fromkeys(_PARAMETER.findall(sql))))
    return queries


# --- records and rows ------------------------------------------------------------------------------------------------

_encode_json = msgspec.json.Encoder().encode


def _job_params(job: Job) -> dict[str, Value]:
    return {
        "id": job.id,
        "tenant_id": job.tenant_id,
        "model": job.model,
        "version": job.version,
        "input": job.input,
        "sampling": _encode_json(job.sampling).decode(),
        "wait": job.wait,
        "stream": job.stream,
        "priority": job.priority,
        "deadline_seconds": float(job.deadline_seconds),
        "region": job.region,
        "session_key": job.session_key,
        "keep": job.keep,
        "requests_per_minute": job.requests_per_minute,
        "created_at": float(job.created_at),
        "form": job.form,
        "user": job.user,
        "metadata": _encode_json(job.metadata).decode(),
        "key_id": job.key_id,
        "reserved_tokens": quotas.reserved_tokens(job),
    }


def _holder_params(holder: tuple[str, str] | None) -> dict[str, Value]:
    """Return who must hold a job for a write to count; None: whoever does."""
    orchestrator_id, orchestrator_boot = holder or (None, None)
    return {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}


def _allowance(job: Job) -> Allowance:
    return Allowance(job.tenant_id, job.key_id, job.model, job.requests_per_minute)


def _limit_queries(tenant_id: str, key_id: str, model: str, limits: Mapping[str, int | None]) -> Write:
    found: list[Query] = []
    for name, most in limits.items():
        unit, window_seconds = quotas.LIMITS[name]
        params: dict[str, Value] = {
            "id": tenant_id,
            "key_id": key_id,
            "model": model,
            "unit": unit,
            "window_seconds": window_seconds,
            "most": most,
        }
        found.append(Query("remove_limit" if most is None else "set_limit", params))
    return tuple(found)


def _close_attempt(
    name: str,
    job_id: str,
    number: int,
    *,
    status: AttemptEnd,
    error_code: str | None,
    completion_tokens: int,
    now: float,
) -> Query:
    return Query(
        name,
        {
            "id": job_id,
            "number": number,
            "status": status,
            "error_code": error_code,
            "completion_tokens": completion_tokens,
            "now": now,
        },
    )


def _to_job(row: Row) -> JobRecord:
    error = None
    if row["error_code"] is not None:
        error = ErrorInfo(str(row["error_code"]), str(row["error_message"] or ""))
    return _convert(
        {
            **row,
            "error": error,
            "usage": Usage(_integer(row["prompt_tokens"]), _integer(row["completion_tokens"])),
            "sampling": _decode(row["sampling"], Sampling),
            "metadata": _decode(row["metadata"], dict[str, str]),
            "fingerprint": row.get("fingerprint") or "",
            "logprobs": _decode(row["logprobs"] or "[]", tuple[tuple[TokenLogprobs, ...], ...]),
        },
        JobRecord,
    )


def _to_key(row: Row) -> KeyRecord:
    return _convert({**row, "scopes": _decode(row["scopes"], tuple[Scope, ...])}, KeyRecord)


def _to_attempt(row: Row) -> AttemptRecord:
    return _convert(row, AttemptRecord)


def _to_worker(row: Row) -> WorkerRecord:
    return _convert({**row, "models": _decode(row["models"], tuple[ModelInfo, ...])}, WorkerRecord)


def _to_node(row: Row) -> NodeRecord:
    return _convert({**row, "addresses": _decode(row["addresses"], tuple[str, ...])}, NodeRecord)


def _integer(value: Value) -> int:
    return int(value or 0)


def _convert(value: object, to: type[T]) -> T:
    """Return a row as a record: JSON has one kind of number, so rqlite's 1 stands for 1.0, and 0 and 1 for a flag."""
    try:
        return msgspec.convert(value, to, strict=False)
    except msgspec.ValidationError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc


def _decode(value: Value, to: Any) -> Any:
    try:
        return msgspec.json.decode(str(value), type=to)
    except msgspec.MsgspecError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc


def _without_password(url: str) -> str:
    return re.sub(r"(?<=://)([^:@/]*):[^@]*@", r"\1:***@", url)


# --- rqlited ---------------------------------------------------------------------------------------------------------


def serve_command(data_dir: Path, host: str = "127.0.0.1", port: int = 4001) -> list[str]:
    """Return the command that runs an rqlited found on PATH, its Raft port beside its HTTP port.

    Raises `SetupError` when there is none.
    """
    rqlited = shutil.which("rqlited")
    if rqlited is None:
        raise SetupError("there is no rqlited on PATH; get it from https://rqlite.io/docs/install-rqlite/")
    return [
        rqlited,
        "-http-addr",
        f"{host}:{port}",
        "-raft-addr",
        f"{host}:{port + 1}",
        str(data_dir / "rqlite"),
    ]
