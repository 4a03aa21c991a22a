"""A network that is played: every job has the events that the test wants."""

# ruff: noqa: ARG002 - the interface has these arguments
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from tether.batch_messages import BatchQuestion
from tether.desk import A
from tether.messages import Authenticated, Health, JobAccepted, JobEvent, KeyClaimed
from tether.records import Actor, Explanation, Job, JobRecord, JobStatus, ServedModel

SILENCE_SECONDS = 0.05


class PlayedNetwork:
    """Tells every job the same events; None is a silence, an exception is raised."""

    def __init__(self, *events: JobEvent | Exception | None) -> None:
        self.events = events
        self.num_closed = 0
        self.jobs_seen: list[Job] = []

    async def follow(self, job: Job, stays: bool = False) -> AsyncGenerator[list[JobEvent], None]:
        self.jobs_seen.append(job)
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    await asyncio.sleep(3 * SILENCE_SECONDS)
                else:
                    yield [event]
        finally:
            self.num_closed += 1

    def watch(self, job_id: str, tenant_id: str | None) -> AsyncGenerator[list[JobEvent], None]:
        raise NotImplementedError

    async def claim(self, tenant_id: str, key: str, fingerprint: str, job_id: str) -> KeyClaimed:
        raise NotImplementedError

    async def models(self) -> list[ServedModel]:
        return []

    async def submit(self, job: Job) -> JobAccepted:
        return JobAccepted(job.id, "queued")

    async def job(self, job_id: str, tenant_id: str | None) -> JobRecord:
        raise NotImplementedError

    async def jobs(
        self, tenant_id: str | None, status: JobStatus | None, model: str | None, before: str | None, limit: int
    ) -> list[JobRecord]:
        return []

    async def cancel(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        raise NotImplementedError

    async def forget(self, job_id: str, tenant_id: str | None, by: Actor | None = None) -> JobRecord:
        raise NotImplementedError

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        return Authenticated(0, required=False)

    async def ask(self, make_question: Callable[[int], BatchQuestion], reply_type: type[A]) -> A:
        raise NotImplementedError

    async def explain(self, job: Job, *, sees_all: bool) -> Explanation:
        raise NotImplementedError

    async def health(self) -> Health:
        raise NotImplementedError
