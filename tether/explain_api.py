"""`GET /v1/explain`: what it takes in the query, and what it answers."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec
import uuid_utils
from pydantic import BaseModel, ConfigDict, Field

from tether.auth import Client
from tether.errors import from_info
from tether.infer_api import Name
from tether.openai_api import DEFAULT_TENANT, model_key
from tether.records import Explanation, Job, Sampling
from tether.replies import ErrorDetail, RefusalDetail, WaitingBody, error_detail
from tether.settings import GatewaySettings


class ExplainFilter(BaseModel):
    """What the route takes in the query."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=400, description="a name, or name@version")]
    tenant_id: Annotated[Name | None, Field(description="for whom; a key says it itself")] = None
    tokens: Annotated[int, Field(ge=1, le=131072, description="that the job may use, prompt and answer")] = 256
    region: Name | None = None
    session_key: Name | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0


class WorkerBody(BaseModel):
    """What one worker would do with the job: a score and its parts, or the reason why it cannot take it."""

    worker_id: str
    name: str
    region: str
    slots: int
    free_slots: int
    score: float | None
    parts: dict[str, float]
    reason: str | None
    detail: str
    """What the reason leaves open, for people: why a worker has paused, who drains it; else empty."""


class LimitBody(BaseModel):
    """A limit that holds for the job, and what is left of it."""

    name: str
    of: Literal["tenant", "key"]
    model: str
    most: int
    left: int
    reset_seconds: float


class ExplanationBody(BaseModel):
    """What would happen to a job that came now, and why."""

    object: Literal["explanation"] = "explanation"
    orchestrator_id: str
    orchestrator_name: str
    model: str
    version: str
    tokens: int
    outcome: Literal["runs", "waits", "refused"]
    error: RefusalDetail | ErrorDetail | None
    workers: list[WorkerBody]
    """Those that can take it, best first, then the others."""
    waiting: WaitingBody | None
    """Where it would stand in the queue."""
    num_own_waiting: int
    num_waiting: int | None
    """All tenants' jobs that wait for the model; null for a key that may not know of other tenants."""
    limits: list[LimitBody]

    @classmethod
    def of(cls, explanation: Explanation) -> ExplanationBody:
        """Return an explanation as it is answered."""
        told = msgspec.to_builtins(explanation)
        told["error"] = error_detail(from_info(explanation.error)) if explanation.error is not None else None
        return cls(**told)


def to_job(query: ExplainFilter, settings: GatewaySettings, client: Client) -> Job:
    """Return the job that a client asks about; raise `InvalidRequest` or `PermissionDenied`."""
    name, version = model_key(query.model)
    return Job(
        id=str(uuid_utils.uuid7()),
        tenant_id=client.tenant_to_see(query.tenant_id) or client.tenant_id or DEFAULT_TENANT,
        model=name,
        version=version,
        input="",
        sampling=Sampling(max_tokens=query.tokens),
        priority=query.priority,
        region=query.region,
        session_key=query.session_key,
        requests_per_minute=settings.requests_per_minute or None,
        created_at=time.time(),
        key_id=client.key_id,
    )
