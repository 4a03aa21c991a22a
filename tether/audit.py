"""The audit log's lines: who did what to what is not their own, and when. Each is written in the transaction of the act itself.

What a tenant does with its own jobs, files and batches is in the access log, with its key; here it would bury the rest.
"""

from __future__ import annotations

import getpass
import platform
import uuid
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tether.database import Value
from tether.named_queries import Query, Write
from tether.records import Actor

Action = Literal[
    "tenant.created",
    "tenant.changed",
    "tenant.removed",
    "key.created",
    "key.rotated",
    "key.revoked",
    "worker.drained",
    "worker.resumed",
    "invite.created",
    "machine.joined",
    "batch.cancelled",
    "job.cancelled",
    "job.forgotten",
    "file.deleted",
]


class AuditEvent(msgspec.Struct, frozen=True):
    """One act of an operator, of a key on what is another tenant's, or of a machine that an operator invited."""

    at: float
    """By the clock of the machine where it was done."""
    action: str
    """An `Action`; one of a newer Tether is shown as it is."""
    who: str
    """`user@host`; of a key its id, of a machine that joined what it calls itself."""
    subject: str
    """The id of what it was done to; of an invite or a machine the peer id of its key."""
    details: dict[str, Any]
    """What was asked for; never a secret."""


def operator() -> str:
    """Return who works here, `user@host`, as the operating system says; the user is `unknown` where it has no name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may run as a number without a name
        user = "unknown"
    return f"{user}@{platform.node() or 'unknown'}"


_CONDITIONS: dict[Action, str] = {
    "batch.cancelled": "audit_live_batch",
    "job.cancelled": "audit_live_job",
    "job.forgotten": "audit_kept_job",
    "file.deleted": "audit_known_file",
}


def told_of(by: Actor | None, action: Action, subject: str, *, owner: str, now: float) -> Write:
    """Return what goes before an act on a tenant's job, file or batch: its line where `by` is of another tenant, else nothing.

    None of these can be done twice, so each has one line, however often it is asked for.
    """
    if by is None or by.tenant_id == owner:
        return ()
    details = {"tenant": owner}
    params = event_params(action, by.key_id, subject, now, details, event_id=f"{action} {subject}")
    return (Query(_CONDITIONS[action], params),)


def event_params(
    action: Action, who: str, subject: str, now: float, details: Mapping[str, object], *, event_id: str | None = None
) -> dict[str, Value]:
    """Return what the queries of `audit.sql` take; details that are None or empty are left out.

    `event_id`: of an act that several may tell of; it has one line, the first.
    """
    said = {name: value for name, value in details.items() if value not in (None, "", {}, ())}
    return {
        "event_id": event_id or str(uuid.uuid4()),
        "now": now,
        "action": action,
        "who": who,
        "subject": subject,
        "details": msgspec.json.encode(said, order="deterministic").decode(),
    }
