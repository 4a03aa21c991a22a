"""Files and batches in the store: named queries and records, for orchestrators and for the command line.

As everywhere in the store each write may be applied twice, and where a guard let nothing through it is read back whether
the same write did it before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from tether.database import Row, Value
from tether.errors import BodyTooLarge, FileNotFound, InvalidRequest, RateLimited, SchemaError
from tether.ledger import Ledger
from tether.named_queries import Query, Write
from tether.records import BatchLine, BatchMistake, BatchRecord, BatchStatus, FileRecord, Purpose
from tether.store import Store

T = TypeVar("T")

MAX_LIVE_BATCHES: Final = 100
"""Batches of one tenant that may be live."""
_FIRST_ID, _LAST_ID = "", "\U0010ffff"  # sort before and after every id
_PURGE_PARTS: Final = 500


class Holder(NamedTuple):
    """An orchestrator, and the boot of it, that runs batches."""

    orchestrator_id: str
    orchestrator_boot: str


class LiveBatch(msgspec.Struct, frozen=True):
    """A batch that has no end yet, and who runs it."""

    id: str
    status: BatchStatus
    orchestrator_id: str
    orchestrator_boot: str
    key_has_ended: bool
    """Whether the API key that it came with was revoked or has expired."""

    @property
    def holder(self) -> Holder:
        """Who runs it."""
        return Holder(self.orchestrator_id, self.orchestrator_boot)


class BatchStore:
    """What the store can be asked of files and batches; each call blocks, and raises what `Store`'s calls do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def file(self, file_id: str, tenant_id: str | None = None) -> FileRecord | None:
        """Return a file, or None; with `tenant_id`, another tenant's is None too, as one is that has expired."""
        rows = self._store.read("file", settled=True, id=file_id)
        if not rows or tenant_id not in (None, rows[0]["tenant_id"]):
            return None
        return _convert(rows[0], FileRecord)

    def files(
        self,
        tenant_id: str | None = None,
        purpose: Purpose | None = None,
        *,
        after: str | None = None,
        newest_first: bool = True,
        limit: int = 100,
    ) -> list[FileRecord]:
        """Return a page of files that come after the id `after`."""
        name = "files_newest_first" if newest_first else "files_oldest_first"
        start = after or (_LAST_ID if newest_first else _FIRST_ID)
        rows = self._store.read(name, tenant_id=tenant_id, purpose=purpose, after=start, limit=limit)
        return [_convert(row, FileRecord) for row in rows]

    def file_part(self, file_id: str, number: int) -> str | None:
        """Return a part of a file's content, from 0; None where there is none."""
        rows = self._store.read("file_part", settled=True, file_id=file_id, number=number)
        return str(rows[0]["content"]) if rows else None

    def batch(self, batch_id: str, tenant_id: str | None = None) -> BatchRecord | None:
        """Return a batch, or None; with `tenant_id`, another tenant's is None too."""
        rows = self._store.read("batch", settled=True, id=batch_id)
        if not rows or tenant_id not in (None, rows[0]["tenant_id"]):
            return None
        return _to_batch(rows[0])

    def batches(
        self,
        tenant_id: str | None = None,
        status: BatchStatus | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
    ) -> list[BatchRecord]:
        """Return a page of batches, newest first, that are older than the id `after`."""
        rows = self._store.read("batches", tenant_id=tenant_id, status=status, after=after or _LAST_ID, limit=limit)
        return [_to_batch(row) for row in rows]

    def live_batches(self, *, now: float) -> list[LiveBatch]:
        """Return all batches without an end, oldest first."""
        return [_convert(row, LiveBatch) for row in self._store.read("live_batches", settled=True, now=now)]

    def waiting_lines(self, batch_id: str, *, after: int = 0, limit: int) -> list[BatchLine]:
        """Return lines that have no outcome yet, in the order of the file."""
        rows = self._store.read("waiting_lines", settled=True, id=batch_id, after=after, limit=limit)
        return [_convert(row, BatchLine) for row in rows]

    def outcomes(self, batch_id: str, *, completed: bool, after: int, limit: int) -> list[tuple[int, str]]:
        """Return lines of the output file, or of the error file, with their numbers, in the order of the input file."""
        status = "completed" if completed else "failed"
        rows = self._store.read("ended_lines", settled=True, id=batch_id, status=status, after=after, limit=limit)
        return [(int(row["number"] or 0), str(row["outcome"])) for row in rows]

    def cancel(self, batch_id: str, *, tenant_id: str, now: float) -> bool:
        """Ask for a batch's end as an operator; whoever runs it sees to it. False where it is not under way, or is being ended."""
        told = self._store.told("batch.cancelled", batch_id, now, {"tenant": tenant_id}, query="audit_live_batch")
        return self._store.write((told, Query("cancel_batch", {"id": batch_id, "now": now})))[1] > 0

    def purge(self, *, now: float, files_before: float, parts_before: float, batches_before: float) -> int:
        """Delete files that have expired or were made before a time, parts of no file, and old batches.

        Returns how many files and batches went. Works in short transactions, so that other writes go on in between.
        """
        num_files, num_batches = self._store.write(
            (
                Query("purge_files", {"now": now, "before": files_before}),
                Query("purge_batches", {"before": batches_before}),
            )
        )
        while True:
            (count,) = self._store.write((Query("purge_file_parts", {"before": parts_before, "limit": _PURGE_PARTS}),))
            if count < _PURGE_PARTS:
                return num_files + num_batches


class BatchLedger:
    """What orchestrators write of files and batches, each write in turn with all others (`Ledger`).

    Every method raises `StoreUnavailable` as `Ledger`'s do. What is written for a `holder` is written only while that one
    holds the batch: then a method returns True, also where the same write was applied before.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.store = BatchStore(ledger.store)

    async def read(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Run one of `store`'s blocking reads in a thread."""
        return await self._ledger.read(call, *args, **kwargs)

    # Files.

    async def save_part(self, file_id: str, number: int, content: str, *, now: float) -> None:
        """Keep a part of a file that is being made; of a number the first content counts."""
        params: dict[str, Value] = {"file_id": file_id, "number": number, "content": content, "now": now}
        await self._ledger.write((Query("insert_file_part", params),))

    async def save_file(self, file: FileRecord, *, most_bytes: int) -> None:
        """Complete a file whose parts are all there.

        Raises `BodyTooLarge` where its tenant would have more than `most_bytes`, and `InvalidRequest` for missing parts.
        """
        (inserted,) = await self._ledger.write((Query("insert_file", {**_fields(file), "most_bytes": most_bytes}),))
        if inserted or await self.read(self.store.file, file.id, file.tenant_id) is not None:
            return
        if file.num_parts and await self.read(self.store.file_part, file.id, file.num_parts - 1) is None:
            raise InvalidRequest("the upload broke off; send the file again", param="file")
        raise BodyTooLarge(
            f"all files of a tenant may have {most_bytes} bytes together; delete some that are not needed", param="file"
        )

    async def delete_file(self, file_id: str, tenant_id: str, *, told: Write = ()) -> bool:
        """Delete a file; False where the tenant has no such file."""
        params: dict[str, Value] = {"id": file_id, "tenant_id": tenant_id}
        write = (*told, Query("delete_file", params), Query("delete_file_parts", params))
        *_, deleted, _ = await self._ledger.write(write)
        return deleted > 0

    # A batch's life.

    async def create(self, batch: BatchRecord) -> None:
        """Write a new batch down, held as it says.

        Raises `FileNotFound`, `InvalidRequest` for a file that is no batch's input, and `RateLimited` for a tenant with
        too many live batches.
        """
        params = {**_fields(batch), "metadata": _json(batch.metadata), "most": MAX_LIVE_BATCHES}
        (inserted,) = await self._ledger.write((Query("insert_batch", params),))
        if inserted or await self.read(self.store.batch, batch.id, batch.tenant_id) is not None:
            return
        file = await self.read(self.store.file, batch.input_file_id, batch.tenant_id)
        if file is None:
            raise FileNotFound(f"there is no file {batch.input_file_id!r}", param="input_file_id")
        if file.purpose != "batch":
            raise InvalidRequest(
                f"the file {file.id} has the purpose {file.purpose!r}, and a batch takes one uploaded for 'batch'",
                param="input_file_id",
            )
        raise RateLimited(
            f"{MAX_LIVE_BATCHES} batches of this tenant are live, which is all that may; wait for one to end"
        )

    async def claim(self, batch: LiveBatch, holder: Holder) -> bool:
        """Take a batch over from whoever held it; False where somebody else was faster."""
        params = {**holder._asdict(), "id": batch.id, "old_id": batch.holder[0], "old_boot": batch.holder[1]}
        if (await self._ledger.write((Query("claim_batch", params),)))[0]:
            return True
        found = await self.read(self.store.batch, batch.id)
        return found is not None and (found.orchestrator_id, found.orchestrator_boot) == holder

    async def release(self, holder: Holder) -> None:
        """Leave all of a holder's batches to whoever takes them."""
        await self._ledger.write((Query("release_batches", holder._asdict()),))

    async def cancel(self, batch_id: str, *, now: float, told: Write = ()) -> bool:
        """Ask for a batch's end; whoever runs it sees to it. False where it is not under way, or is being ended."""
        return (await self._ledger.write((*told, Query("cancel_batch", {"id": batch_id, "now": now}))))[-1] > 0

    async def revoke(self, batch_id: str, holder: Holder, reason: BatchMistake, *, now: float) -> None:
        """Ask for a batch's end because nobody may run it any more: it will have failed for this reason."""
        params = {**holder._asdict(), "id": batch_id, "errors": _json([reason]), "now": now}
        await self._ledger.write((Query("revoke_batch", params),))

    async def save_lines(self, batch_id: str, lines: Sequence[BatchLine], holder: Holder) -> None:
        """Keep lines of a batch that is being validated, all in one statement; those that are there already stay."""
        document = _json([(line.number, line.custom_id, line.request) for line in lines])
        params = {**holder._asdict(), "id": batch_id, "lines": document}
        await self._ledger.write((Query("insert_batch_lines", params),))

    async def begin(self, batch_id: str, holder: Holder, *, num_lines: int, model: str, now: float) -> None:
        """Say that a batch's lines are good, and run from here on."""
        params = {**holder._asdict(), "id": batch_id, "num_lines": num_lines, "model": model, "now": now}
        await self._ledger.write((Query("begin_batch", params),))

    async def fail(self, batch_id: str, holder: Holder, mistakes: Sequence[BatchMistake], *, now: float) -> None:
        """End a batch whose input file is not good."""
        params = {**holder._asdict(), "id": batch_id, "errors": _json(mistakes), "now": now}
        await self._ledger.write((Query("fail_batch", params), Query("delete_batch_lines", params)))

    async def end_line(
        self,
        batch_id: str,
        line: BatchLine,
        holder: Holder,
        *,
        completed: bool,
        outcome: str,
        drop_answer_of: str | None,
    ) -> None:
        """Write a line's outcome, the first one for good. `drop_answer_of`: a job whose answer nobody needs after it."""
        params: dict[str, Value] = {
            **holder._asdict(),
            "id": batch_id,
            "number": line.number,
            "status": "completed" if completed else "failed",
            "outcome": outcome,
            "job_id": drop_answer_of,
        }
        write: tuple[Query, ...] = (Query("end_line", params), Query("count_line", params))
        if drop_answer_of is not None:
            write += (Query("drop_answer", params),)
        await self._ledger.write(write)

    async def finalize(self, batch_id: str, holder: Holder, *, code: str, message: str, now: float) -> None:
        """Give all lines without an outcome this error, and begin to make the files."""
        params = {**holder._asdict(), "id": batch_id, "code": code, "message": message, "now": now}
        await self._ledger.write((Query("end_waiting_lines", params), Query("finalize_batch", params)))

    async def end(
        self,
        batch_id: str,
        holder: Holder,
        *,
        status: BatchStatus,
        output: FileRecord | None,
        errors: FileRecord | None,
        now: float,
    ) -> None:
        """Write a batch's end with its files, whose parts are there, and forget its lines."""
        params: dict[str, Value] = {
            **holder._asdict(),
            "id": batch_id,
            "status": status,
            "output_file_id": output.id if output is not None else None,
            "error_file_id": errors.id if errors is not None else None,
            "now": now,
        }
        files = [file for file in (output, errors) if file is not None]
        write = [
            Query("insert_batch_file", {**params, **_fields(file), "id": batch_id, "file_id": file.id})
            for file in files
        ]
        await self._ledger.write((*write, Query("end_batch", params), Query("delete_batch_lines", params)))


def _fields(record: FileRecord | BatchRecord) -> dict[str, Value]:
    """Return a record's plain fields, as a query's parameters."""
    fields = msgspec.structs.asdict(record)
    return {name: value for name, value in fields.items() if value is None or isinstance(value, str | int | float)}


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _to_batch(row: Row) -> BatchRecord:
    try:
        decoded = {name: msgspec.json.decode(str(row[name])) for name in ("errors", "metadata")}
    except msgspec.DecodeError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc
    return _convert({**row, **decoded}, BatchRecord)


def _convert(value: object, to: type[T]) -> T:
    try:
        return msgspec.convert(value, to, strict=False)
    except msgspec.ValidationError as exc:
        raise SchemaError(f"the store has a row that this Tether cannot read ({exc}): upgrade Tether") from exc
