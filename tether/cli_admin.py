"""The commands that let people in: tenants with their limits, and their API keys. They write to the store."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tether.cli_views import open_existing, parse_seconds, sqlite_url
from tether.errors import SetupError, UsageError
from tether.options import AsJson, DataDir, StoreUrl, not_empty
from tether.settings import NodeSettings

if TYPE_CHECKING:
    from tether.stored import KeyRecord, TenantRecord
    from tether.tenant_store import TenantStore

_NODE = NodeSettings()
_MAX_NAME = 200
_MAX_LIMIT = 2**53  # exact in every JSON reader

tenants_app = typer.Typer(
    help="Say who may use the network, and how much.", no_args_is_help=True, rich_markup_mode="markdown"
)
keys_app = typer.Typer(help="Give out and take back API keys.", no_args_is_help=True, rich_markup_mode="markdown")

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's name.")]
KnownTenant = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's name.", callback=not_empty)]
Weight = Annotated[
    float | None, typer.Option("--weight", help="Its share of the queue beside other tenants.", show_default="1")
]
_LIMIT_HELP = "A number, or `none`."
RequestsPerMinute = Annotated[str | None, typer.Option("--requests-per-minute", help=_LIMIT_HELP)]
TokensPerMinute = Annotated[str | None, typer.Option("--tokens-per-minute", help=_LIMIT_HELP)]
RequestsPerDay = Annotated[str | None, typer.Option("--requests-per-day", help=_LIMIT_HELP)]
TokensPerDay = Annotated[str | None, typer.Option("--tokens-per-day", help=_LIMIT_HELP)]
JobsAtOnce = Annotated[str | None, typer.Option("--jobs-at-once", help="Live jobs: a number, or `none`.")]
JobTokens = Annotated[
    str | None, typer.Option("--job-tokens", help="Tokens of one job's prompt and answer: a number, or `none`.")
]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="What `tether keys list` calls the key.", callback=not_empty)]


# --- tenants ---------------------------------------------------------------------------------------------------------


@tenants_app.command("create")
def tenants_create(
    tenant: TenantName,
    weight: Weight = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    jobs_at_once: JobsAtOnce = None,
    job_tokens: JobTokens = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
) -> None:
    """Make a tenant known, with limits of its own.

    Example: `tether tenants create acme --tokens-per-day 1000000 --weight 2`
    """
    from tether import console

    limits = _limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_day=tokens_per_day,
        jobs_at_once=jobs_at_once,
        job_tokens=job_tokens,
    )
    weight = _weight(weight)
    with _open_or_make(store, data_dir) as opened:
        opened.create_tenant(_name(tenant), weight=1.0 if weight is None else weight, limits=limits, now=time.time())
    console.print_line(f"Tenant {tenant} is known. Next: tether keys create --tenant {shlex.quote(tenant)}")


@tenants_app.command("list")
def tenants_list(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """List tenants, with their limits."""
    from tether import console

    with _open(store, data_dir) as opened:
        tenants = opened.tenants()
        num_keys = _num_good_keys(opened)
    if as_json:
        console.print_json(tenants)
        return
    rows = [
        (tenant.id, f"{tenant.weight:g}", num_keys.get(tenant.id, 0), _limits_words(tenant), console.ago(tenant.created_at))
        for tenant in tenants
    ]  # fmt: skip
    console.print_table(
        ("TENANT", "WEIGHT", "KEYS", "LIMITS", "WHEN"), rows, "no tenants yet; `tether tenants create` makes one"
    )


@tenants_app.command("set")
def tenants_set(
    tenant: KnownTenant,
    weight: Weight = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    jobs_at_once: JobsAtOnce = None,
    job_tokens: JobTokens = None,
    key: Annotated[str | None, typer.Option("--key", help="Only for this key of the tenant.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only for this model.")] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
) -> None:
    """Change a tenant's share and limits, or those of one of its keys, on all models or on one.

    Example: `tether tenants set acme --model phi-2 --jobs-at-once 4`
    """
    from tether import console

    limits = _limits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_day=tokens_per_day,
        jobs_at_once=jobs_at_once,
        job_tokens=job_tokens,
    )
    weight = _weight(weight)
    if weight is None and not limits:
        raise UsageError("nothing to set: name a limit, such as --tokens-per-day 100000, or --weight")
    if weight is not None and (key or model):
        raise UsageError("--weight is the tenant's as a whole: leave out --key and --model")
    with _open(store, data_dir) as opened:
        _existing_tenant(opened, tenant)
        if key is not None:
            found = opened.key(key)
            if found is None or found.tenant_id != tenant:
                raise SetupError(
                    f"the tenant {tenant} has no key {key!r}; `tether keys list --tenant {shlex.quote(tenant)}` has them"
                )
        opened.set_tenant(tenant, weight=weight, key_id=key or "", model=model or "", **limits)
        changed = _existing_tenant(opened, tenant)
    console.print_line(
        f"Tenant {tenant}: weight {changed.weight:g}; {_limits_words(changed) or 'no limits of its own'}"
    )


@tenants_app.command("remove")
def tenants_remove(tenant: KnownTenant, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir) -> None:
    """Forget a tenant and its limits, revoke its keys and end its batches. Its jobs stay in the ledger."""
    from tether import console

    with _open(store, data_dir) as opened:
        if not opened.remove_tenant(tenant, now=time.time()):
            raise SetupError(f"there is no tenant {tenant!r}; `tether tenants list` has them")
    console.print_line(
        f"Tenant {tenant} is removed and its keys are revoked; requests and batches that run with them end in seconds."
    )


# --- keys ------------------------------------------------------------------------------------------------------------


@keys_app.command("create")
def keys_create(
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is; made known if it is not yet.")],
    name: Annotated[str, typer.Option("--name", help="What people call it.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help="models (run jobs), read-only (look at the tenant's jobs), admin (every tenant's); repeat it.",
            show_default="models",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", help="How long it is good: 12h, 30d.", show_default="until it is revoked")
    ] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it: it is shown this once, and only a hash of it is kept.

    Example: `tether keys create --tenant acme --name ci --expires 30d`
    """
    from tether import keys

    scopes = keys.parse_scopes(scope or ["models"])
    name = _label(name)
    now = time.time()
    expires_at = None if expires is None else now + parse_seconds(expires, "--expires")
    with _open_or_make(store, data_dir) as opened:
        opened.set_tenant(_name(tenant), now=now)
        key, record = opened.create_key(tenant, scopes=scopes, name=name, expires_at=expires_at, now=now)
    _print_key(key, record, as_json=as_json)


@keys_app.command("list")
def keys_list(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """List API keys, revoked and expired ones too; never the keys themselves."""
    from tether import console

    with _open(store, data_dir) as opened:
        found = opened.keys(tenant)
    if as_json:
        console.print_json(found)
        return
    now = time.time()
    rows = [
        (key.id, _key_status(key, now), key.tenant_id, f"{key.prefix}…", key.name, ", ".join(key.scopes),
         console.until(key.expires_at, now), "never" if key.last_used_at is None else console.ago(key.last_used_at, now), console.ago(key.created_at, now))
        for key in found
    ]  # fmt: skip
    columns = ("ID", "STATUS", "TENANT", "KEY", "NAME", "SCOPES", "EXPIRES", "LAST USED", "WHEN")
    none_yet = "no keys yet; `tether keys create --tenant NAME` makes one"
    console.print_table(columns, rows, none_yet if tenant is None else "no key matches")


@keys_app.command("revoke")
def keys_revoke(key_id: KeyId, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir) -> None:
    """Take a key back for good; requests that run with it end in seconds."""
    from tether import console

    with _open(store, data_dir) as opened:
        if not opened.revoke_key(key_id, now=time.time()) and opened.key(key_id) is None:
            raise SetupError(f"there is no key {key_id!r}; `tether keys list` has them")
    console.print_line(f"Key {key_id} is revoked.")


@keys_app.command("rotate")
def keys_rotate(
    key_id: KeyId,
    grace: Annotated[
        str | None, typer.Option("--grace", help="How long the old one stays good: 1h, 2d.", show_default="not at all")
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires",
            help="How long the new one is good, from now: 12h, 30d.",
            show_default="as long as the old one was when it was made",
        ),
    ] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Make a key in the place of another one, with its tenant, name, scopes and limits, and print it this once.

    The new key has a whole life of its own: one that was made with `--expires 30d` gets 30 days from now. A key is rotated
    once: while its grace runs, the new one is the one to rotate. Example: `tether keys rotate key-0123456789ab --grace 1h`
    """
    grace_seconds = 0.0 if grace is None else parse_seconds(grace, "--grace")
    lifetime_seconds = None if expires is None else parse_seconds(expires, "--expires")
    with _open(store, data_dir) as opened:
        key, record = opened.rotate_key(
            key_id, grace_seconds=grace_seconds, lifetime_seconds=lifetime_seconds, now=time.time()
        )
    _print_key(key, record, as_json=as_json)


# --- helpers ---------------------------------------------------------------------------------------------------------


@contextmanager
def _open(store: str | None, data_dir: Path) -> Iterator[TenantStore]:
    from tether.tenant_store import TenantStore

    with open_existing(store, data_dir) as opened:
        yield TenantStore(opened)


@contextmanager
def _open_or_make(store: str | None, data_dir: Path) -> Iterator[TenantStore]:
    """Open a store, and make it where there is none: the first key may come before the first start."""
    from tether.data_dir import prepare_data_dir
    from tether.store import open_store
    from tether.tenant_store import TenantStore

    if store is None:
        prepare_data_dir(data_dir)
    opened = open_store(store or sqlite_url(data_dir))
    try:
        opened.migrate()
        yield TenantStore(opened)
    finally:
        opened.close()


def _print_key(key: str, record: KeyRecord, *, as_json: bool) -> None:
    """Print the key alone on stdout, so that it can be piped, and the rest on stderr."""
    from tether import console

    if as_json:
        console.print_json({"key": key, "record": record})
        return
    console.print_line(key)
    console.print_warning(f"this is {record.id}, shown this once; keep it where secrets are kept")


def _key_status(key: KeyRecord, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.is_good(now):
        return "expired"
    return "good" if key.replaced_by is None else "in grace"


def _num_good_keys(opened: TenantStore) -> dict[str, int]:
    now, found = time.time(), dict[str, int]()
    for key in opened.keys(None):
        found[key.tenant_id] = found.get(key.tenant_id, 0) + key.is_good(now)
    return found


def _limits_words(tenant: TenantRecord) -> str:
    words = []
    for limit in tenant.limits:
        of = " ".join(part for part in (limit.key_id, limit.model and f"on {limit.model}") if part)
        words.append(f"{limit.name} {limit.most}" + (f" ({of})" if of else ""))
    return ", ".join(words)


def _existing_tenant(opened: TenantStore, tenant_id: str) -> TenantRecord:
    tenant = opened.tenant(tenant_id)
    if tenant is None:
        raise SetupError(
            f"there is no tenant {tenant_id!r}; `tether tenants create {shlex.quote(tenant_id)}` makes it known"
        )
    return tenant


def _limits(**texts: str | None) -> dict[str, int | None]:
    """Return the limits that were named: a number, or None for `none`, which takes a limit away."""
    found: dict[str, int | None] = {}
    for name, text in texts.items():
        if text is None:
            continue
        if text.strip().lower() == "none":
            found[name] = None
        elif text.isascii() and text.isdecimal() and int(text) <= _MAX_LIMIT:
            found[name] = int(text)
        else:
            raise UsageError(
                f"--{name.replace('_', '-')} is a whole number from 0 to {_MAX_LIMIT}, or none, not {text!r}"
            )
    return found


def _weight(weight: float | None) -> float | None:
    if weight is not None and not 0.001 <= weight <= 1000:
        raise UsageError("--weight is from 0.001 to 1000")
    return weight


def _name(text: str) -> str:
    if not text or len(text) > _MAX_NAME or not text.isprintable() or text != text.strip():
        raise UsageError(f"a tenant's name has 1 to {_MAX_NAME} printable characters, not {text[:40]!r}")
    return text


def _label(text: str) -> str:
    if len(text) > _MAX_NAME or not text.isprintable():
        raise UsageError(f"--name has at most {_MAX_NAME} printable characters")
    return text
