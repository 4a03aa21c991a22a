"""An orchestrator's answers to gateways that bring files, make batches, or ask for them."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import trio

from tether.answering import Answering, fitting
from tether.audit import told_of
from tether.batch_lines import WINDOW_SECONDS
from tether.batch_messages import (
    Batches as BatchesReply,
)
from tether.batch_messages import (
    CancelBatch,
    CreateBatch,
    DeleteFile,
    Files,
    GetBatch,
    GetFile,
    GetFilePart,
    ListBatches,
    ListFiles,
    PutFile,
    PutFilePart,
)
from tether.batch_store import BatchLedger, Holder
from tether.batches import Batches
from tether.errors import BatchConflict, BatchNotFound, FileNotFound
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.records import BatchRecord, FileRecord

Q = TypeVar("Q", PutFilePart, PutFile, GetFile, ListFiles, GetFilePart, DeleteFile)
B = TypeVar("B", CreateBatch, GetBatch, ListBatches, CancelBatch)

MAX_FILES = 1000
MAX_BATCHES = 50
"""Of one page."""


class BatchInquiries:
    """Answers what arrives on `links`."""

    def __init__(self, links: Links, ledger: Ledger, batches: Batches, *, holder: Holder) -> None:
        self._batches = BatchLedger(ledger)
        self._runner = batches
        self._holder = holder
        self._answering = Answering()
        self._on_files(links, PutFilePart, self._put_part)
        self._on_files(links, PutFile, self._put_file)
        self._on_files(links, GetFile, self._get_file)
        self._on_files(links, ListFiles, self._list_files)
        self._on_files(links, GetFilePart, self._get_part)
        self._on_files(links, DeleteFile, self._delete_file)
        self._on_batches(links, CreateBatch, self._create)
        self._on_batches(links, GetBatch, self._get)
        self._on_batches(links, ListBatches, self._list)
        self._on_batches(links, CancelBatch, self._cancel)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled."""
        await self._answering.run(task_status)

    def _on_files(self, links: Links, kind: type[Q], answer: Callable[[Q], Awaitable[Files]]) -> None:
        def on_question(link: Link, question: Q) -> None:
            self._answering.soon(link, lambda: answer(question), lambda error: Files(question.request_id, error=error))

        links.on(kind, on_question)

    def _on_batches(
        self, links: Links, kind: type[B], answer: Callable[[B], Awaitable[tuple[BatchRecord, ...]]]
    ) -> None:
        def on_question(link: Link, question: B) -> None:
            async def reply() -> BatchesReply:
                return BatchesReply(question.request_id, await answer(question))

            self._answering.soon(link, reply, lambda error: BatchesReply(question.request_id, error=error))

        links.on(kind, on_question)

    # --- files -------------------------------------------------------------------------------------------------------

    async def _put_part(self, put: PutFilePart) -> Files:
        await self._batches.save_part(put.file_id, put.number, put.content, now=time.time())
        return Files(put.request_id)

    async def _put_file(self, put: PutFile) -> Files:
        await self._batches.save_file(put.file, most_bytes=put.most_bytes)
        return Files(put.request_id, (put.file,))

    async def _get_file(self, get: GetFile) -> Files:
        return Files(get.request_id, (await self._file(get.file_id, get.tenant_id),))

    async def _list_files(self, query: ListFiles) -> Files:
        files = await self._batches.read(
            self._batches.store.files,
            query.tenant_id,
            query.purpose,
            after=query.after,
            newest_first=query.newest_first,
            limit=max(1, min(query.limit, MAX_FILES)),
        )
        return Files(query.request_id, fitting(files))

    async def _get_part(self, get: GetFilePart) -> Files:
        await self._file(get.file_id, get.tenant_id)
        content = await self._batches.read(self._batches.store.file_part, get.file_id, get.number)
        if content is None:
            raise FileNotFound(f"the file {get.file_id!r} was deleted")
        return Files(get.request_id, content=content)

    async def _delete_file(self, delete: DeleteFile) -> Files:
        file = await self._file(delete.file_id, delete.tenant_id)
        told = told_of(delete.by, "file.deleted", file.id, owner=file.tenant_id, now=time.time())
        await self._batches.delete_file(file.id, file.tenant_id, told=told)
        return Files(delete.request_id, (file,))

    async def _file(self, file_id: str, tenant_id: str | None) -> FileRecord:
        file = await self._batches.read(self._batches.store.file, file_id, tenant_id)
        if file is None or (file.expires_at is not None and file.expires_at < time.time()):
            raise FileNotFound(f"there is no file {file_id!r}")
        return file

    # --- batches -----------------------------------------------------------------------------------------------------

    async def _create(self, create: CreateBatch) -> tuple[BatchRecord, ...]:
        """Write a new batch down as this orchestrator's, with its own clock's time."""
        now = time.time()
        batch = msgspec.structs.replace(
            create.batch,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            orchestrator_id=self._holder.orchestrator_id,
            orchestrator_boot=self._holder.orchestrator_boot,
        )
        await self._batches.create(batch)
        self._runner.look()
        return (batch,)

    async def _get(self, get: GetBatch) -> tuple[BatchRecord, ...]:
        return (await self._batch(get.batch_id, get.tenant_id),)

    async def _list(self, query: ListBatches) -> tuple[BatchRecord, ...]:
        limit = max(1, min(query.limit, MAX_BATCHES))
        store = self._batches.store
        found = await self._batches.read(store.batches, query.tenant_id, query.status, after=query.after, limit=limit)
        return fitting(found)

    async def _cancel(self, cancel: CancelBatch) -> tuple[BatchRecord, ...]:
        batch = await self._batch(cancel.batch_id, cancel.tenant_id)
        now = time.time()
        told = told_of(cancel.by, "batch.cancelled", batch.id, owner=batch.tenant_id, now=now)
        if not await self._batches.cancel(batch.id, now=now, told=told):
            batch = await self._batch(cancel.batch_id, cancel.tenant_id)
            if batch.status not in {"cancelling", "cancelled"}:
                raise BatchConflict(f"the batch {batch.id} cannot be cancelled any more: it is {batch.status}")
        self._runner.look()
        return (await self._batch(cancel.batch_id, cancel.tenant_id),)

    async def _batch(self, batch_id: str, tenant_id: str | None) -> BatchRecord:
        batch = await self._batches.read(self._batches.store.batch, batch_id, tenant_id)
        if batch is None:
            raise BatchNotFound(f"there is no batch {batch_id!r}")
        return batch
