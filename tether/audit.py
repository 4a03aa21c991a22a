"""The audit log's lines: who did what to what, and when. Each is written in the transaction of the act itself."""

from __future__ import annotations

import getpass
import platform
import uuid
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tether.database import Value

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
]


class AuditEvent(msgspec.Struct, frozen=True):
    """One act of an operator, or of a machine that an operator invited."""

    at: float
    """By the clock of the machine where it was done."""
    action: str
    """An `Action`; one of a newer Tether is shown as it is."""
    who: str
    """`user@host`; of a machine that joined, what it calls itself."""
    subject: str
    """The id of the tenant, key or worker, or the peer id of the invite's or the machine's key."""
    details: dict[str, Any]
    """What was asked for; never a secret."""


def operator() -> str:
    """Return who works here, `user@host`, as the operating system says; the user is `unknown` where it has no name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container may run as a number without a name
        user = "unknown"
    return f"{user}@{platform.node() or 'unknown'}"


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
