"""Takes jobs from HTTP requests and answers them: once or again, whole or as a stream, or with the job's id."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tether.active import job_of
from tether.cursor import Cursor
from tether.door import client_of
from tether.errors import InvalidRequest, TetherError
from tether.infer_api import Answer
from tether.messages import Authenticated, Health, JobEvent, KeyClaimed
from tether.openai_api import ChatAnswer, CompletionAnswer, OpenAIAnswer, fingerprint_of, seed_of
from tether.openai_responses import ResponseAnswer
from tether.records import Job, JobRecord, JobStatus, ServedModel
from tether.replies import Batches, OpenRequests, answer_stream, answer_whole, failure, job_headers
from tether.settings import GatewaySettings


class Network(Protocol):
    """What the HTTP side needs of the network behind it."""

    def follow(self, job: Job, stays: bool = False) -> AsyncGenerator[list[JobEvent], None]:
        """Submit a job and yield its events, all that wait at a time; the last is its `JobEnd`.

        Closed early, it cancels the job, unless that `stays`.
        """
        ...

    def watch(self, job_id: str, tenant_id: str | None) -> AsyncGenerator[list[JobEvent], None]:
        """Yield a job's events from its beginning, wherever it was submitted."""
        ...

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:
        """Give a client's idempotency key to a job; return whose it is."""
        ...

    async def models(self) -> list[ServedModel]:
        """Return the models that can be served now."""
        ...

    async def submit(self, job: Job) -> JobStatus:
        """Submit a job that nobody waits for; return its status when it is in the ledger."""
        ...

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """Return a job's record."""
        ...

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        """Return a page of jobs, newest first."""
        ...

    async def cancel(self, job_id: str, tenant_id: str | None) -> JobRecord:
        """End a job; return its record after its end."""
        ...

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Return whom an API key stands for; None asks only whether keys are needed."""
        ...

    async def health(self) -> Health:
        """Return whether jobs can be served."""
        ...


class Desk:
    """Takes jobs from HTTP requests and answers these."""

    def __init__(self, network: Network, settings: GatewaySettings) -> None:
        self._network = network
        self._settings = settings
        self._open_requests = OpenRequests(settings.max_open_requests)

    async def serve(
        self, job: Job, body: BaseModel, request: Request, make_answer: Callable[..., OpenAIAnswer | Answer]
    ) -> Response:
        """Run a job and answer with its result, with events, or with its id."""
        job = msgspec.structs.replace(job, key_id=client_of(request).key_id)
        key = request.headers.get("idempotency-key")
        last_event_id = request.headers.get("last-event-id")
        if key is not None:
            return await self._serve_once(key, job, body, request, make_answer)
        if last_event_id is not None:
            raise InvalidRequest(
                "a stream goes on with GET /v1/jobs/{id}/stream, or with the same request and its Idempotency-Key",
                param="Last-Event-ID",
            )
        if not job.wait:
            return await self._submit(job, make_answer(job))
        return await self._answer(self._network.follow(job), job, make_answer(job), request)

    async def _serve_once(
        self, key: str, job: Job, body: BaseModel, request: Request, make_answer: Callable[..., OpenAIAnswer | Answer]
    ) -> Response:
        """Run a job unless the same request was sent before: then answer with that one's job, however far it is.

        The job outlives the request, since its client comes back for it.
        """
        if re.fullmatch(r"[\x21-\x7e]{1,255}", key) is None:
            raise InvalidRequest("Idempotency-Key has 1 to 255 visible ASCII characters", param="Idempotency-Key")
        fingerprint = fingerprint_of(request.url.path, body)
        claimed = await self._network.claim(job.tenant_id, key, fingerprint, job.id)
        if claimed.job is None:
            seed = job.sampling.seed if getattr(body, "seed", None) is not None else seed_of(claimed.job_id)
            sampling = msgspec.structs.replace(job.sampling, seed=seed)
            job = msgspec.structs.replace(job, id=claimed.job_id, sampling=sampling)
            batches = self._network.follow(job, True)
        else:
            job = job_of(claimed.job)
            batches = self._network.watch(job.id, job.tenant_id)
        headers = {"idempotent-replayed": "true"} if claimed.job is not None else {}
        last_event_id = request.headers.get("last-event-id")
        seen = None if last_event_id is None else Cursor.parse(last_event_id, job.sampling.n, "Last-Event-ID")
        if seen is not None and job.form == "response":
            raise InvalidRequest("a response's stream is told from its beginning", param="Last-Event-ID")
        if not job.wait:
            await batches.aclose()
            if claimed.job is None:
                return await self._submit(job, make_answer(job))
            return self._accepted(job, claimed.job.status, headers)
        answer = make_answer(job) if seen is None else make_answer(job, seen=seen)
        return await self._answer(batches, job, answer, request, headers)

    async def stream(
        self, job_id: str, tenant_id: str | None, request: Request, after: str | None, include_usage: bool
    ) -> Response:
        """Tell a job's events, in the form of the route that it came by."""
        job = job_of(await self._network.job(job_id, tenant_id))
        last_event_id = request.headers.get("last-event-id")
        name, place = ("after", after) if last_event_id is None else ("Last-Event-ID", last_event_id)
        seen = None if place is None else Cursor.parse(place, job.sampling.n, name)
        answer: OpenAIAnswer | Answer
        if job.form == "text":
            answer = Answer(job, seen=seen)
        elif job.form == "response":
            if seen is not None:
                raise InvalidRequest("a response's stream is told from its beginning", param=name)
            answer = ResponseAnswer(job)
        else:
            kind = ChatAnswer if job.form == "chat" else CompletionAnswer
            answer = kind(job, include_usage=include_usage, seen=seen)
        batches = self._open_requests.read(self._network.watch(job_id, tenant_id))
        return await answer_stream(batches, job, answer, self._settings)

    async def _answer(
        self,
        batches: Batches,
        job: Job,
        answer: OpenAIAnswer | Answer,
        request: Request,
        headers: dict[str, str] | None = None,
    ) -> Response:
        batches = self._open_requests.read(batches)
        if job.stream:
            return await answer_stream(batches, job, answer, self._settings, headers)
        return await answer_whole(batches, job, answer, request, headers)

    async def _submit(self, job: Job, answer: OpenAIAnswer | Answer) -> Response:
        try:
            status = await self._network.submit(job)
        except TetherError as exc:
            return failure(job, None, exc.to_info(), answer.fields)
        return self._accepted(job, status, {})

    def _accepted(self, job: Job, status: JobStatus, headers: dict[str, str]) -> Response:
        if job.form == "response":
            body = {**ResponseAnswer(job).body(), "status": "queued" if status == "queued" else "in_progress"}
            return JSONResponse(body, headers={**job_headers(job), **headers})
        location = {"Location": f"{self._settings.root_path}/v1/jobs/{job.id}"}
        return JSONResponse({"jobId": job.id, "status": status}, 202, {**location, **job_headers(job), **headers})
