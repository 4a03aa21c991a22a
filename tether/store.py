"""The store: everything that it can be asked, and told, one blocking call at a time.

The command line calls it as it is, and a role calls its reads through `Ledger.read`. Tenants are in `tenant_store.py`,
files and batches in `batch_store.py`.

Every write may be applied twice, because an answer can be lost after the commit: so each is guarded, and where a guard
let nothing through it is read back whether the same write did it before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from tether import audit, schema
from tether.audit import Action, AuditEvent
from tether.database import Database, Row, Statement, StatementError, Value, connect, without_password
from tether.errors import InternalError, SetupError, TetherError
from tether.named_queries import Query, Write, WriteResult, counts, load_queries
from tether.quotas import Limit
from tether.records import AttemptRecord, JobRecord, JobStatus, NodeRecord, WorkerRecord
from tether.stored import (
    Allowance,
    HeldJob,
    Lease,
    ModelRecord,
    convert,
    decode,
    integer,
    to_attempt,
    to_job,
    to_node,
    to_worker,
)

DEADLINE_SECONDS: Final = 10.0
"""How long a call tries before it says that the store is away: longer than an election, or one frozen host."""
_LAST_ID: Final = "\U0010ffff"  # sorts after every id
_PURGE_ROWS: Final = 500
_DAY_SECONDS: Final = 86_400


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
        self.url = without_password(url)
        self.who = audit.operator()
        """Who the audit log says did what is done through this store."""
        self._database = database
        self._queries = load_queries()

    # The core: named queries in, rows and counts out.

    def read(self, name: str, /, *, settled: bool = False, **params: Value) -> list[Row]:
        """Return the rows of a named query. `settled`: ask the whole cluster, where an old answer would do harm."""
        return self._database.query(self._statement(name, params), settled=settled)

    def write(self, write: Write) -> tuple[int, ...]:
        """Apply one write and return the rows that each of its statements affected, or raise why it was refused."""
        (result,) = self.write_batch([write])
        if isinstance(result, TetherError):
            raise result
        return counts(result)

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
        return to_job(rows[0])

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
        return [to_job(row) for row in rows]

    def attempts(self, job_id: str) -> list[AttemptRecord]:
        """Return a job's attempts, first to newest."""
        return [to_attempt(row) for row in self.read("attempts", id=job_id)]

    def live_jobs(self, orchestrator_id: str) -> list[JobRecord]:
        """Return the queued and running jobs that an orchestrator holds, oldest first, with their texts."""
        return [to_job(row) for row in self.read("live_jobs", settled=True, orchestrator_id=orchestrator_id)]

    def held_job(self, job_id: str) -> HeldJob | None:
        """Return who holds a live job; None where there is no such job, or it has ended."""
        rows = self.read("held_job", settled=True, id=job_id)
        return convert(rows[0], HeldJob) if rows else None

    def holders(self) -> set[tuple[str, str]]:
        """Return the orchestrators and their boots that hold live jobs; a boot of "" has given its jobs away."""
        return {(str(row["orchestrator_id"]), str(row["orchestrator_boot"])) for row in self.read("holders")}

    def held_jobs(self, orchestrator_id: str, orchestrator_boot: str, limit: int = 200) -> list[HeldJob]:
        """Return live jobs that an orchestrator's boot holds, oldest first."""
        params: dict[str, Value] = {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}
        return [convert(row, HeldJob) for row in self.read("held_jobs", settled=True, limit=limit, **params)]

    def held_job_ids(self, orchestrator_id: str, orchestrator_boot: str) -> set[str]:
        """Return the ids of all live jobs that an orchestrator's boot holds."""
        params: dict[str, Value] = {"orchestrator_id": orchestrator_id, "orchestrator_boot": orchestrator_boot}
        return {str(row["id"]) for row in self.read("held_job_ids", settled=True, **params)}

    def counts(self) -> dict[JobStatus, int]:
        """Return how many jobs there are in each status, 0 included."""
        num_jobs = {str(row["status"]): integer(row["num_jobs"]) for row in self.read("job_counts")}
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
        return [to_worker(row) for row in self.read("workers")]

    def drained_workers(self) -> dict[str, float]:
        """Return since when workers take no jobs because an operator said so, by their ids."""
        return {str(row["id"]): float(row["drained_at"] or 0) for row in self.read("drained_workers")}

    def drain_worker(self, worker_id: str, *, now: float) -> bool:
        """Let a worker take no more jobs until it is resumed, whoever starts it again; False where there is none."""
        told = self.told("worker.drained", worker_id, now, query="audit_undrained_worker")
        return self.write((told, Query("drain_worker", {"id": worker_id, "now": now})))[1] > 0

    def resume_worker(self, worker_id: str, *, now: float) -> bool:
        """Let a worker take jobs again; False where there is none."""
        told = self.told("worker.resumed", worker_id, now, query="audit_drained_worker")
        return self.write((told, Query("resume_worker", {"id": worker_id})))[1] > 0

    def nodes(self) -> list[NodeRecord]:
        """Return all orchestrators and gateways that were ever seen; those that are gone come last."""
        return [to_node(row) for row in self.read("nodes")]

    def leases(self) -> list[Lease]:
        """Return the orchestrators' leases."""
        return [
            Lease(str(row["id"]), str(row["boot_id"]), integer(row["lease_renewals"]))
            for row in self.read("nodes", settled=True)
            if row["role"] == "orchestrator"
        ]

    def models(self) -> list[ModelRecord]:
        """Return all models that were ever served."""
        return [convert(row, ModelRecord) for row in self.read("models")]

    # What of the limits is left.

    def allowances(self, asked: Sequence[Allowance], *, now: float) -> list[tuple[Limit, ...]]:
        """Return for each of `asked` every limit that holds for it, with what of it is spent."""
        rows = self.read("allowances", asked=msgspec.json.encode(asked).decode(), now=now)
        found: list[list[Limit]] = [[] for _ in asked]
        for row in rows:
            found[integer(row["number"])].append(convert(row, Limit))
        return [tuple(limits) for limits in found]

    # The audit log.

    def audit_events(self, *, since: float = 0.0, limit: int = 50) -> list[AuditEvent]:
        """Return what operators did from `since` on, the newest first."""
        rows = self.read("audit_events", since=since, limit=limit)
        return [convert({**row, "details": decode(row["details"], dict[str, Any])}, AuditEvent) for row in rows]

    def record_event(self, action: Action, subject: str, *, now: float, **details: object) -> None:
        """Put a line into the audit log for an act that is no write of the store's."""
        self.write((self.told(action, subject, now, details),))

    def told(
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

    def was_told(self, line: Query) -> bool:
        """Whether the act of a line from `told` was done: by this very write, though its answer may have been lost."""
        return bool(self.read("audit_event", settled=True, event_id=line.params["event_id"]))


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
