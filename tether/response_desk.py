"""Responses that were made before: found, told again from any event on, cancelled, deleted."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tether.active import job_of
from tether.desk import Desk, Network, TenantFilter, checked_id
from tether.door import client_of
from tether.errors import InvalidRequest, JobConflict
from tether.openai_items import check_kept, input_items
from tether.openai_responses import job_id_of, response_of
from tether.records import LIVE, JobRecord
from tether.retelling import story_of


class ItemFilter(TenantFilter):
    """What the listing of a response's items takes in the query."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class ResponseFilter(TenantFilter):
    """What a response's route takes in the query."""

    stream: bool = False
    starting_after: Annotated[
        int | None, Field(ge=0, lt=10**9, description="the `sequence_number` of the last event that you have")
    ] = None


class DeletedResponse(BaseModel):
    """A response of which nothing is kept any more."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ResponseDesk:
    """Answers HTTP requests about responses."""

    def __init__(self, network: Network, desk: Desk) -> None:
        self._network = network
        self._desk = desk

    async def get(self, response_id: str, request: Request, query: ResponseFilter) -> Response:
        """Return a response as far as it is, or stream it from its beginning or from behind an event."""
        after = query.starting_after
        if after is not None and not query.stream:
            raise InvalidRequest(
                "'starting_after' is a place in a stream: it needs stream=true", param="starting_after"
            )
        record, tenant_id = await self._find(response_id, request, query)
        check_kept(record)
        if not query.stream:
            return _answer(record)
        place = None if after is None else str(after)
        return await self._desk.stream(record.id, tenant_id, request, place, after_param="starting_after")

    async def items(self, response_id: str, request: Request, query: ItemFilter) -> dict[str, Any]:
        """Return a page of what the model read."""
        record, _ = await self._find(response_id, request, query)
        return input_items(record, after=query.after, limit=query.limit, order=query.order)

    async def cancel(self, response_id: str, request: Request, query: TenantFilter) -> Response:
        """Cancel a response that has not ended."""
        record, tenant_id = await self._find(response_id, request, query)
        return _answer(await self._network.cancel(record.id, tenant_id, client_of(request).actor))

    async def delete(self, response_id: str, request: Request, query: TenantFilter) -> DeletedResponse:
        """Delete what is kept of a response, which is cancelled where it has not ended."""
        record, tenant_id = await self._find(response_id, request, query)
        check_kept(record)
        if record.status in LIVE:
            with contextlib.suppress(JobConflict):  # it has ended by itself
                await self._network.cancel(record.id, tenant_id, client_of(request).actor)
        await self._network.forget(record.id, tenant_id, client_of(request).actor)
        return DeletedResponse(id=response_id)

    async def _find(self, response_id: str, request: Request, query: TenantFilter) -> tuple[JobRecord, str | None]:
        """Return a response's job, and whose jobs its client may see."""
        job_id = checked_id(job_id_of(response_id))
        tenant_id = client_of(request).tenant_to_see(query.tenant_id, job_id=job_id)
        return await self._network.job(job_id, tenant_id), tenant_id


def _answer(record: JobRecord) -> Response:
    check_kept(record)
    return JSONResponse(response_of(job_of(record), record, story_of(record) if record.status not in LIVE else []))
