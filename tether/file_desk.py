"""Files and batches of the OpenAI dialect, from HTTP requests to questions for an orchestrator, and back."""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import uuid_utils
from pydantic import ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tether.batch_lines import PART_BYTES, WINDOW_SECONDS
from tether.batch_messages import (
    Batches,
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
from tether.desk import Network, page_of
from tether.door import client_of
from tether.errors import BatchNotFound, BodyTooLarge, FileNotFound, InvalidRequest, PermissionDenied
from tether.openai_api import DEFAULT_TENANT
from tether.openai_schemas import MAX_NAME, Body, Name
from tether.records import BatchRecord, BatchStatus, Endpoint, FileRecord, Purpose
from tether.settings import GatewaySettings

MIN_EXPIRY_SECONDS, MAX_EXPIRY_SECONDS = 3600, 2_592_000
"""An hour and 30 days, as OpenAI has them."""
FILES_FOR_TENANT = 16
"""All files of a tenant may be so many times as large together as one."""
MAX_FILENAME = 255
_FORM_FIELDS = frozenset({"file", "purpose", "tenantId", "expires_after[anchor]", "expires_after[seconds]"})
_ENDED: dict[BatchStatus, str] = {status: f"{status}_at" for status in ("completed", "failed", "expired", "cancelled")}


# --- what the routes take --------------------------------------------------------------------------------------------


class FileQuery(Body):
    """What a file's and a batch's routes take in the query."""

    model_config = ConfigDict(extra="forbid", strict=False)  # a query is text

    tenant_id: Name | None = None
    """Only this tenant's: another one's is not found."""


class FileFilter(FileQuery):
    """What the listing of files takes in the query."""

    purpose: Purpose | None = None
    after: Name | None = None
    order: Literal["asc", "desc"] = "desc"
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000


class BatchFilter(FileQuery):
    """What the listing of batches takes in the query."""

    after: Name | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class Expiry(Body):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_SECONDS, le=MAX_EXPIRY_SECONDS)]


class BatchRequest(Body):
    """The body of `POST /v1/batches`."""

    input_file_id: Name
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: Expiry | None = None
    tenantId: Name | None = None  # noqa: N815 - as the other routes spell it
    """On whose behalf, where the gateway has no API keys."""


# --- the routes ------------------------------------------------------------------------------------------------------


class FileDesk:
    """Takes files and batches from HTTP requests, and tells of them."""

    def __init__(self, network: Network, settings: GatewaySettings) -> None:
        self._network = network
        self._settings = settings

    async def upload(self, request: Request) -> Response:
        """Keep a file that comes as a form, part by part; it exists when all of it is there."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise InvalidRequest("a file is uploaded as multipart/form-data, with the fields file and purpose")
        async with request.form(max_files=1, max_fields=8, max_part_size=1024) as form:
            upload, tenant_id, seconds = self._read_form(form, request)
            file_id = f"file-{uuid_utils.uuid7().hex}"
            num_bytes = num_parts = 0
            async for content in _text_of(upload):
                num_bytes += len(content.encode())
                if num_bytes > self._settings.max_file_bytes:
                    raise BodyTooLarge(f"a file has at most {self._settings.max_file_bytes} bytes", param="file")
                await self._put_part(file_id, num_parts, content)
                num_parts += 1
            if not num_bytes:
                raise InvalidRequest("the file is empty", param="file")
            now = time.time()
            file = FileRecord(
                file_id,
                tenant_id,
                _clean(upload.filename or ""),
                "batch",
                num_bytes,
                num_parts,
                now,
                None if seconds is None else now + seconds,
            )
        most_bytes = FILES_FOR_TENANT * self._settings.max_file_bytes
        await self._network.ask(lambda request_id: PutFile(request_id, file, most_bytes), Files)
        return JSONResponse(file_body(file))

    async def files(self, request: Request, query: FileFilter) -> Response:
        """Return a page of files."""
        tenant_id = client_of(request).tenant_to_see(query.tenant_id)
        limit = min(query.limit, 999)  # a page has to fit into one message

        async def ask(after: str | None, most: int) -> tuple[FileRecord, ...]:
            found = await self._network.ask(
                lambda request_id: ListFiles(request_id, tenant_id, query.purpose, after, query.order == "desc", most),
                Files,
            )
            return found.files

        return _page([file_body(file) for file in await page_of(ask, query.after, limit + 1)], limit)

    async def file(self, file_id: str, request: Request, query: FileQuery) -> Response:
        """Return what is known of a file."""
        return JSONResponse(file_body(await self._file(file_id, request, query)))

    async def content(self, file_id: str, request: Request, query: FileQuery) -> Response:
        """Return a file's content as it was uploaded, or made."""
        file = await self._file(file_id, request, query)

        async def parts() -> AsyncGenerator[bytes, None]:
            for number in range(file.num_parts):
                yield (await self._part(file, number)).encode()

        headers = {"Content-Length": str(file.num_bytes)}
        return StreamingResponse(parts(), media_type="application/octet-stream", headers=headers)

    async def delete(self, file_id: str, request: Request, query: FileQuery) -> Response:
        """Delete a file; a batch that has read it goes on."""
        tenant_id = _tenant_to_see(request, query, FileNotFound(f"there is no file {file_id[:MAX_NAME]!r}"))
        by = client_of(request).actor
        await self._network.ask(lambda request_id: DeleteFile(request_id, file_id[:MAX_NAME], tenant_id, by), Files)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def create_batch(self, body: BatchRequest, request: Request) -> Response:
        """Run the requests of a file when there is room."""
        client = client_of(request)
        expiry = body.output_expires_after
        batch = BatchRecord(
            id=f"batch_{uuid_utils.uuid7().hex}",
            tenant_id=client.tenant_for_job(body.tenantId) or DEFAULT_TENANT,
            key_id=client.key_id,
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            created_at=time.time(),
            expires_at=time.time() + WINDOW_SECONDS,
            metadata=body.metadata or {},
            keep=self._settings.keep,
            requests_per_minute=self._settings.requests_per_minute or None,
            output_seconds=None if expiry is None else float(expiry.seconds),
        )
        made = await self._network.ask(lambda request_id: CreateBatch(request_id, batch), Batches)
        return JSONResponse(batch_body(made.batches[0]))

    async def batches(self, request: Request, query: BatchFilter) -> Response:
        """Return a page of batches, newest first."""
        tenant_id = client_of(request).tenant_to_see(query.tenant_id)
        limit = min(query.limit, 49)  # a page has to fit into one message

        async def ask(after: str | None, most: int) -> tuple[BatchRecord, ...]:
            found = await self._network.ask(
                lambda request_id: ListBatches(request_id, tenant_id, None, after, most), Batches
            )
            return found.batches

        return _page([batch_body(batch) for batch in await page_of(ask, query.after, limit + 1)], limit)

    async def batch(self, batch_id: str, request: Request, query: FileQuery) -> Response:
        """Return a batch as it is now."""
        batch_id = batch_id[:MAX_NAME]
        tenant_id = _tenant_to_see(request, query, BatchNotFound(f"there is no batch {batch_id!r}"))
        found = await self._network.ask(lambda request_id: GetBatch(request_id, batch_id, tenant_id), Batches)
        return JSONResponse(batch_body(found.batches[0]))

    async def cancel_batch(self, batch_id: str, request: Request, query: FileQuery) -> Response:
        """Cancel a batch; what it has done so far is in its files."""
        batch_id = batch_id[:MAX_NAME]
        tenant_id = _tenant_to_see(request, query, BatchNotFound(f"there is no batch {batch_id!r}"))
        by = client_of(request).actor
        found = await self._network.ask(lambda request_id: CancelBatch(request_id, batch_id, tenant_id, by), Batches)
        return JSONResponse(batch_body(found.batches[0]))

    def _read_form(self, form: FormData, request: Request) -> tuple[UploadFile, str, int | None]:
        """Return the file of a form, whose it is, and after how many seconds it is deleted."""
        if unknown := form.keys() - _FORM_FIELDS:
            raise InvalidRequest(f"there is no field {min(unknown)!r}", param=min(unknown))
        upload, texts = form.get("file"), {key: value for key, value in form.multi_items() if isinstance(value, str)}
        if not isinstance(upload, UploadFile):
            raise InvalidRequest("the field 'file' is missing, or has no file", param="file")
        if texts.get("purpose") != "batch":
            raise InvalidRequest("purpose is batch: nothing else is done with files here", param="purpose")
        anchor, seconds = texts.get("expires_after[anchor]"), texts.get("expires_after[seconds]")
        if anchor not in {None, "created_at"} or (anchor is None) != (seconds is None):
            raise InvalidRequest("expires_after has the anchor created_at, and seconds", param="expires_after")
        if seconds is not None and not (
            seconds.isdecimal() and len(seconds) < 10 and MIN_EXPIRY_SECONDS <= int(seconds) <= MAX_EXPIRY_SECONDS
        ):
            message = f"seconds are from {MIN_EXPIRY_SECONDS} to {MAX_EXPIRY_SECONDS}"
            raise InvalidRequest(message, param="expires_after.seconds")
        named = texts.get("tenantId")
        if named is not None and not 1 <= len(named) <= MAX_NAME:
            raise InvalidRequest(f"tenantId has 1 to {MAX_NAME} characters", param="tenantId")
        tenant_id = client_of(request).tenant_for_job(named) or DEFAULT_TENANT
        return upload, tenant_id, None if seconds is None else int(seconds)

    async def _put_part(self, file_id: str, number: int, content: str) -> None:
        await self._network.ask(lambda request_id: PutFilePart(request_id, file_id, number, content), Files)

    async def _part(self, file: FileRecord, number: int) -> str:
        part = await self._network.ask(
            lambda request_id: GetFilePart(request_id, file.id, number, file.tenant_id), Files
        )
        return part.content or ""

    async def _file(self, file_id: str, request: Request, query: FileQuery) -> FileRecord:
        file_id = file_id[:MAX_NAME]
        tenant_id = _tenant_to_see(request, query, FileNotFound(f"there is no file {file_id!r}"))
        found = await self._network.ask(lambda request_id: GetFile(request_id, file_id, tenant_id), Files)
        return found.files[0]


def _tenant_to_see(request: Request, query: FileQuery, missing: FileNotFound | BatchNotFound) -> str | None:
    """Return whose things a request may see; None: all. What is another tenant's is `missing`."""
    try:
        return client_of(request).tenant_to_see(query.tenant_id)
    except PermissionDenied as exc:
        raise missing from exc


async def _text_of(upload: UploadFile) -> AsyncGenerator[str, None]:
    """Yield an upload's text in parts; raise `InvalidRequest` for what is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while data := await upload.read(PART_BYTES - 8):  # a part may get the rest of a character from the one before
            if text := decoder.decode(data):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as exc:
        raise InvalidRequest("the file is not UTF-8 text: a batch is a file of JSON lines", param="file") from exc


def _clean(filename: str) -> str:
    """Return a file's name for people: without folders and control characters."""
    name = re.sub(r"[\x00-\x1f\x7f-\x9f]", "", re.split(r"[/\\]", filename)[-1])
    return name.encode("utf-8", "replace").decode()[:MAX_FILENAME] or "upload.jsonl"


def _page(data: list[dict[str, Any]], limit: int) -> Response:
    shown = data[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return JSONResponse({"object": "list", "data": shown, **ends, "has_more": len(data) > limit})


def file_body(file: FileRecord) -> dict[str, Any]:
    """Return a file as it is told."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "expires_at": _seconds(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_body(batch: BatchRecord) -> dict[str, Any]:
    """Return a batch as it is told."""
    mistakes = [
        {"code": each.code, "line": each.line, "message": each.message, "param": each.param} for each in batch.errors
    ]
    ended = dict.fromkeys(_ENDED.values())
    if batch.status in _ENDED:
        ended[_ENDED[batch.status]] = _seconds(batch.ended_at)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": mistakes} if mistakes else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_at),
        "in_progress_at": _seconds(batch.in_progress_at),
        "expires_at": int(batch.expires_at),
        "finalizing_at": _seconds(batch.finalizing_at),
        "cancelling_at": _seconds(batch.cancelling_at),
        **ended,
        "request_counts": {"total": batch.num_lines, "completed": batch.num_completed, "failed": batch.num_failed},
        "metadata": batch.metadata or None,
    }


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
