"""Messages between gateways and orchestrators about files and batches: part of the closed union in `messages`."""

from __future__ import annotations

import msgspec

from tether.bounds import Count, Integer, LargeCount
from tether.errors import ErrorInfo
from tether.records import Actor, BatchRecord, BatchStatus, FileRecord, Purpose

# --- gateway -> orchestrator -----------------------------------------------------------------------------------------


class PutFilePart(msgspec.Struct, frozen=True, tag="file.part.put"):
    """Keep this part of a file that is being uploaded; the same part may come again, and to another orchestrator."""

    request_id: Integer
    file_id: str
    number: Count
    """From 0."""
    content: str


class PutFile(msgspec.Struct, frozen=True, tag="file.put"):
    """All parts of this file are there: it exists from here on."""

    request_id: Integer
    file: FileRecord
    most_bytes: LargeCount
    """That all files of its tenant may have together."""


class GetFile(msgspec.Struct, frozen=True, tag="file.get"):
    """Ask for a file; `tenant_id` hides the others' files."""

    request_id: Integer
    file_id: str
    tenant_id: str | None = None


class ListFiles(msgspec.Struct, frozen=True, tag="file.list"):
    """Ask for a page of files."""

    request_id: Integer
    tenant_id: str | None = None
    purpose: Purpose | None = None
    after: str | None = None
    """Only those that come after this id: the last one of the page before."""
    newest_first: bool = True
    limit: Integer = 100


class GetFilePart(msgspec.Struct, frozen=True, tag="file.part.get"):
    """Ask for a part of a file's content."""

    request_id: Integer
    file_id: str
    number: Count
    tenant_id: str | None = None


class DeleteFile(msgspec.Struct, frozen=True, tag="file.delete"):
    """Delete a file; answered with it as it was."""

    request_id: Integer
    file_id: str
    tenant_id: str | None = None
    by: Actor | None = None


class CreateBatch(msgspec.Struct, frozen=True, tag="batch.create"):
    """Run this batch."""

    request_id: Integer
    batch: BatchRecord


class GetBatch(msgspec.Struct, frozen=True, tag="batch.get"):
    """Ask for a batch; `tenant_id` hides the others' batches."""

    request_id: Integer
    batch_id: str
    tenant_id: str | None = None


class ListBatches(msgspec.Struct, frozen=True, tag="batch.list"):
    """Ask for a page of batches, newest first."""

    request_id: Integer
    tenant_id: str | None = None
    status: BatchStatus | None = None
    after: str | None = None
    """Only those that are older than this id: the last one of the page before."""
    limit: Integer = 20


class CancelBatch(msgspec.Struct, frozen=True, tag="batch.cancel"):
    """Ask for a batch's end; answered with it as it is then, before what runs has ended."""

    request_id: Integer
    batch_id: str
    tenant_id: str | None = None
    by: Actor | None = None


# --- orchestrator -> gateway -----------------------------------------------------------------------------------------


class Files(msgspec.Struct, frozen=True, tag="files"):
    """The answer to what is asked of files and their parts."""

    request_id: Integer
    files: tuple[FileRecord, ...] = ()
    content: str | None = None
    """The part that was asked for."""
    error: ErrorInfo | None = None


class Batches(msgspec.Struct, frozen=True, tag="batches"):
    """The answer to what is asked of batches."""

    request_id: Integer
    batches: tuple[BatchRecord, ...] = ()
    error: ErrorInfo | None = None


BatchQuestion = (
    PutFilePart
    | PutFile
    | GetFile
    | ListFiles
    | GetFilePart
    | DeleteFile
    | CreateBatch
    | GetBatch
    | ListBatches
    | CancelBatch
)
BatchReply = Files | Batches
BATCH_QUESTIONS: tuple[type, ...] = BatchQuestion.__args__
BATCH_REPLIES: tuple[type, ...] = BatchReply.__args__
