"""Tenants in the store, with their limits and keys: what an operator says of them, each with its line in the audit log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import msgspec

from tether import keys, quotas
from tether.database import Value
from tether.errors import SetupError
from tether.named_queries import Query, Write
from tether.quotas import Limit
from tether.records import BatchMistake, Caller, Scope
from tether.store import Store
from tether.stored import KeyRecord, TenantRecord, convert, to_key

PEPPER_NAME: Final = "key_pepper"
_TENANT_REMOVED: Final = BatchMistake("tenant_removed", "the tenant of this batch was removed")


class TenantStore:
    """What the store can be asked and told of tenants; each call blocks, and raises what `Store`'s calls do."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known_pepper = ""

    def tenant(self, tenant_id: str) -> TenantRecord | None:
        """Return a tenant that was made known, or None."""
        rows = self.store.read("tenant", settled=True, id=tenant_id)
        if not rows:
            return None
        limits = [convert(row, Limit) for row in self.store.read("limits_of_tenant", settled=True, id=tenant_id)]
        return convert({**rows[0], "limits": limits}, TenantRecord)

    def tenants(self) -> list[TenantRecord]:
        """Return all tenants that were made known."""
        limits: dict[str, list[Limit]] = {}
        for row in self.store.read("limits"):
            limits.setdefault(str(row["tenant_id"]), []).append(convert(row, Limit))
        return [
            convert({**row, "limits": limits.get(str(row["id"]), [])}, TenantRecord)
            for row in self.store.read("tenants")
        ]

    def weights(self) -> dict[str, float]:
        """Return each tenant's share of the queue; one that is not there has 1."""
        return {str(row["id"]): float(row["weight"] or 0) for row in self.store.read("tenants")}

    def create_tenant(
        self, tenant_id: str, *, weight: float = 1.0, limits: Mapping[str, int | None] | None = None, now: float
    ) -> None:
        """Make a tenant known; raise `SetupError` where it is already."""
        taken = f"there is a tenant {tenant_id!r} already; `tether tenants set` changes it"
        told = self.store.told(
            "tenant.created", tenant_id, now, {"weight": weight, "limits": limits}, query="audit_new_tenant"
        )
        if self.tenant(tenant_id) is not None:  # asked first, so that a refused call leaves that one's limits alone
            raise SetupError(taken)
        _, created, *_ = self.store.write(
            (
                told,
                Query("insert_tenant", {"id": tenant_id, "weight": float(weight), "now": now}),
                *_limit_queries(tenant_id, "", "", limits or {}),
            )
        )
        tenant = self.tenant(tenant_id)
        if not created and (tenant is None or tenant.created_at != now):
            raise SetupError(taken)

    def set_tenant(
        self,
        tenant_id: str,
        *,
        weight: float | None = None,
        key_id: str = "",
        model: str = "",
        now: float | None = None,
        **limits: int | None,
    ) -> None:
        """Change a tenant, or make it known: its weight (None: as it is), and limits by their names in `quotas.LIMITS`.

        None removes a limit. With `key_id` or `model` the limits are those of the key, of the model, or of both together.
        """
        now = time.time() if now is None else now
        params: dict[str, Value] = {
            "id": tenant_id,
            "weight": None if weight is None else float(weight),
            "now": now,
        }
        told = [self.store.told("tenant.created", tenant_id, now, query="audit_new_tenant")]
        if weight is not None or limits:
            details = {"weight": weight, "limits": limits, "key": key_id, "model": model}
            told.append(self.store.told("tenant.changed", tenant_id, now, details))
        self.store.write((*told, Query("set_tenant", params), *_limit_queries(tenant_id, key_id, model, limits)))

    def remove_tenant(self, tenant_id: str, *, now: float) -> bool:
        """Forget a tenant and its limits, revoke its keys, and end its batches; its jobs stay. False where there was none."""
        errors = msgspec.json.encode([_TENANT_REMOVED]).decode()
        params: dict[str, Value] = {"id": tenant_id, "now": now, "errors": errors}
        told = (
            self.store.told("tenant.removed", tenant_id, now, query="audit_known_tenant"),
            self.store.told("key.revoked", tenant_id, now, {"tenant": tenant_id}, query="audit_unrevoked_keys"),
        )
        *_, removed, _, revoked = self.store.write(
            (
                *told,
                Query("revoke_batches_of_tenant", params),
                Query("remove_tenant", params),
                Query("remove_limits", params),
                Query("revoke_keys_of_tenant", params),
            )
        )
        return removed + revoked > 0 or any(self.store.was_told(line) for line in told)

    def create_key(
        self,
        tenant_id: str,
        *,
        scopes: frozenset[Scope] = frozenset({"models"}),
        name: str = "",
        expires_at: float | None = None,
        now: float,
    ) -> tuple[str, KeyRecord]:
        """Make a new API key and return it with its record; the key itself is never seen again."""
        return self._create_key(tenant_id, scopes, name, expires_at, now)

    def rotate_key(
        self, key_id: str, *, grace_seconds: float = 0.0, lifetime_seconds: float | None = None, now: float
    ) -> tuple[str, KeyRecord]:
        """Make a key in the place of one that has `grace_seconds` left then; return it with its record.

        It has the old one's tenant, name, scopes and limits, and is good for `lifetime_seconds` from now; None: for as
        long as the old one was when it was made. Raises `SetupError` where the old one is not good, or was rotated before.
        """
        old = self.key(key_id)
        if old is None:
            raise SetupError(f"there is no key {key_id!r}; `tether keys list` has them")
        if old.replaced_by is not None:
            raise SetupError(f"the key {key_id} was rotated before: {old.replaced_by} is in its place, rotate that one")
        if not old.is_good(now):
            why = "has expired" if old.revoked_at is None else "was revoked"
            raise SetupError(f"the key {key_id} {why}, so it is not rotated; `tether keys create` makes another one")
        if lifetime_seconds is None and old.expires_at is not None:
            lifetime_seconds = old.expires_at - old.created_at
        expires_at = None if lifetime_seconds is None else now + lifetime_seconds
        params: dict[str, Value] = {"id": old.id, "now": now, "expires_at": now + grace_seconds}
        end = Query("expire_key", params) if grace_seconds > 0 else Query("revoke_key", params)
        scopes = frozenset(old.scopes)
        details = {"grace_seconds": grace_seconds or None}
        return self._create_key(old.tenant_id, scopes, old.name, expires_at, now, (end,), old.id, **details)

    def _create_key(
        self,
        tenant_id: str,
        scopes: frozenset[Scope],
        name: str,
        expires_at: float | None,
        now: float,
        also: Write = (),
        replaced_id: str = "",
        **details: object,
    ) -> tuple[str, KeyRecord]:
        key, key_id = keys.new_key(), keys.new_key_id()
        ordered = tuple(scope for scope in keys.SCOPES if scope in scopes)
        params: dict[str, Value] = {
            "id": key_id,
            "tenant_id": tenant_id,
            "replaced_id": replaced_id,
            "hash": keys.stored_hash(keys.digest(key), self._pepper(create=True)),
            "prefix": keys.shown_prefix(key),
            "name": name,
            "scopes": msgspec.json.encode(ordered).decode(),
            "now": now,
            "expires_at": expires_at,
        }
        copy = (Query("copy_limits", params), Query("replace_key", params)) if replaced_id else ()
        told = self.store.told(
            "key.rotated" if replaced_id else "key.created",
            replaced_id or key_id,
            now,
            {
                "new_key": key_id if replaced_id else None,
                "tenant": tenant_id,
                "name": name,
                "scopes": ordered,
                "expires_at": expires_at,
                **details,
            },
        )
        self.store.write((told, Query("insert_key", params), *copy, *also))
        return key, KeyRecord(key_id, tenant_id, str(params["prefix"]), name, ordered, now, expires_at, None, None)

    def key(self, key_id: str) -> KeyRecord | None:
        """Return a key's record, or None."""
        rows = self.store.read("key", settled=True, id=key_id)
        return to_key(rows[0]) if rows else None

    def keys(self, tenant_id: str | None = None) -> list[KeyRecord]:
        """Return all keys, or a tenant's: revoked and expired ones too."""
        return [to_key(row) for row in self.store.read("keys", tenant_id=tenant_id)]

    def revoke_key(self, key_id: str, *, now: float) -> bool:
        """Take a key back at once and for good; False where there is none, or it was taken back before."""
        told = self.store.told("key.revoked", key_id, now, query="audit_unrevoked_key")
        return self.store.write((told, Query("revoke_key", {"id": key_id, "now": now})))[1] > 0

    def has_keys(self) -> bool:
        """Whether there ever was a key: then callers need one."""
        return bool(self.store.read("any_key", settled=True))

    def caller(self, key_digest: str, *, now: float) -> Caller | None:
        """Return whom a key stands for, by its digest (`keys.digest`); None for one that is not good."""
        pepper = self._pepper(create=False)
        rows = (
            self.store.read("key_with_hash", settled=True, hash=keys.stored_hash(key_digest, pepper)) if pepper else []
        )
        if not rows or not (found := to_key(rows[0])).is_good(now):
            return None
        valid_seconds = None if found.expires_at is None else found.expires_at - now
        return Caller(found.id, found.tenant_id, frozenset(found.scopes), valid_seconds)

    def _pepper(self, *, create: bool) -> str:
        """Return the network's pepper; empty where there is none yet and none is to be made."""
        if self._known_pepper:
            return self._known_pepper
        if create:
            params: dict[str, Value] = {"name": PEPPER_NAME, "value": keys.new_pepper(), "now": time.time()}
            self.store.write((Query("insert_secret", params),))
        rows = self.store.read("secret", settled=True, name=PEPPER_NAME)
        self._known_pepper = str(rows[0]["value"]) if rows else ""
        return self._known_pepper


def _limit_queries(tenant_id: str, key_id: str, model: str, limits: Mapping[str, int | None]) -> Write:
    found: list[Query] = []
    for name, most in limits.items():
        unit, window_seconds = quotas.LIMITS[name]
        params: dict[str, Value] = {
            "id": tenant_id,
            "key_id": key_id,
            "model": model,
            "unit": unit,
            "window_seconds": window_seconds,
            "most": most,
        }
        found.append(Query("remove_limit" if most is None else "set_limit", params))
    return tuple(found)
