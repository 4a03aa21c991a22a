"""The commands about batches and files: they read the store, and ask through it, so that no gateway is needed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tether.cli_views import open_existing
from tether.errors import BatchConflict, BatchNotFound, UsageError
from tether.options import AsJson, DataDir, StoreUrl, not_empty
from tether.records import BatchRecord, BatchStatus
from tether.settings import NodeSettings

if TYPE_CHECKING:
    from tether.batch_store import BatchStore

_NODE = NodeSettings()

BatchId = Annotated[
    str, typer.Argument(metavar="ID", help="A batch's id, or the beginning of one.", callback=not_empty)
]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, max=10000, help="How many, newest first.")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")]

batches_app = typer.Typer(
    help="See what runs in the background, and end it.", no_args_is_help=True, rich_markup_mode="markdown"
)
files_app = typer.Typer(
    help="See which files are kept: what batches read and wrote.", no_args_is_help=True, rich_markup_mode="markdown"
)


@batches_app.command("list")
def batches_list(
    tenant: Tenant = None,
    status: Annotated[
        str | None, typer.Option("--status", help="Such as in_progress, completed, failed or cancelled.")
    ] = None,
    limit: Limit = 20,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """List batches, newest first.

    Examples: `tether batches list --status in_progress`, `tether batches list --tenant acme --json`
    """
    from tether import console
    from tether.batch_store import BatchStore

    wanted = _status(status)
    with open_existing(store, data_dir) as opened:
        batches = BatchStore(opened).batches(tenant, wanted, limit=limit)
    if as_json:
        console.print_json(batches)
        return
    now = time.time()
    rows = [
        (batch.id, batch.status, batch.tenant_id, batch.model, batch.endpoint, _progress(batch), batch.num_failed or "",
         console.ago(batch.created_at, now))
        for batch in batches
    ]  # fmt: skip
    columns = ("ID", "STATUS", "TENANT", "MODEL", "ENDPOINT", "DONE", "FAILED", "WHEN")
    any_filter = tenant is not None or wanted is not None
    console.print_table(columns, rows, "no batch matches" if any_filter else "no batches yet")


@batches_app.command("show")
def batches_show(
    batch_id: BatchId, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False
) -> None:
    """Show one batch: how far it is, its files, and why it failed.

    Example: `tether batches show batch_0199`
    """
    from tether import console
    from tether.batch_store import BatchStore

    with open_existing(store, data_dir) as opened:
        batch = _find(BatchStore(opened), batch_id)
    if as_json:
        console.print_json(batch)
        return
    console.print_facts(
        [
            ("id", batch.id),
            ("status", batch.status),
            ("tenant", batch.tenant_id),
            ("key", batch.key_id),
            ("model", batch.model),
            ("endpoint", batch.endpoint),
            ("done", _progress(batch)),
            ("failed", batch.num_failed),
            ("input file", batch.input_file_id),
            ("output file", batch.output_file_id),
            ("error file", batch.error_file_id),
            *[("error", f"{f'line {each.line}: ' if each.line else ''}{each.message}") for each in batch.errors],
            ("orchestrator", batch.orchestrator_id[-8:]),
            ("created", console.ago(batch.created_at)),
            ("took", console.took(batch.created_at, batch.ended_at)),
        ]
    )


@batches_app.command("cancel")
def batches_cancel(
    batch_id: BatchId, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False
) -> None:
    """End a batch: what runs is stopped within seconds, and what is done by then is in its files.

    Example: `tether batches cancel batch_0199`
    """
    from tether import console
    from tether.batch_store import BatchStore

    with open_existing(store, data_dir) as opened:
        batches = BatchStore(opened)
        batch = _find(batches, batch_id)
        batches.cancel(batch.id, tenant_id=batch.tenant_id, now=time.time())
        batch = _find(batches, batch.id)
    if batch.status not in {"cancelling", "cancelled"}:
        raise BatchConflict(f"the batch {batch.id} cannot be cancelled any more: it is {batch.status}")
    if as_json:
        console.print_json(batch)
    else:
        console.print_line(f"Batch {batch.id} is {batch.status}.")


@files_app.command("list")
def files_list(
    tenant: Tenant = None,
    limit: Limit = 20,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """List the files that clients uploaded for batches, and those that batches made, newest first.

    Example: `tether files list --tenant acme`
    """
    from tether import console
    from tether.batch_store import BatchStore

    with open_existing(store, data_dir) as opened:
        files = BatchStore(opened).files(tenant, limit=limit)
    if as_json:
        console.print_json(files)
        return
    now = time.time()
    rows = [
        (file.id, file.purpose, file.tenant_id, file.filename, file.num_bytes, console.ago(file.created_at, now))
        for file in files
    ]
    console.print_table(
        ("ID", "PURPOSE", "TENANT", "NAME", "BYTES", "WHEN"),
        rows,
        "no files yet" if tenant is None else "no file matches",
    )


def _progress(batch: BatchRecord) -> str:
    return f"{batch.num_completed}/{batch.num_lines}"


def _find(batches: BatchStore, batch_id: str) -> BatchRecord:
    """Return the batch with this id, or the only one whose id begins like this."""
    if (batch := batches.batch(batch_id)) is not None:
        return batch
    # Ids sort by their text, so those that begin alike are neighbours.
    found = [near for near in batches.batches(after=f"{batch_id}~", limit=2) if near.id.startswith(batch_id)]
    if len(found) > 1:
        raise UsageError(f"several batches begin with {batch_id!r}, such as {found[0].id} and {found[1].id}")
    if not found:
        raise BatchNotFound(f"there is no batch {batch_id!r}; `tether batches list` shows their ids")
    return found[0]


def _status(value: str | None) -> BatchStatus | None:
    known: tuple[BatchStatus, ...] = get_args(BatchStatus)
    for each in known:
        if each == value:
            return each
    if value is None:
        return None
    raise UsageError(f"--status is one of {', '.join(known)}, not {value!r}")
