"""The commands that look: jobs, workers, models, the audit log, status. They read the store, and nothing else has to run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer

from tether.errors import JobNotFound, SetupError, UsageError
from tether.options import AsJson, DataDir, StoreUrl, not_empty
from tether.records import JobRecord, JobStatus, WorkerRecord
from tether.settings import NodeSettings

if TYPE_CHECKING:
    from tether.store import Store

_NODE = NodeSettings()
MIN_PART = 4
"""Characters of an id that name the thing: fewer would too often be of another one."""
WorkerId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help=f"A worker's id, the end of it (at least {MIN_PART} characters), or its name.",
        callback=not_empty,
    ),
]

jobs_app = typer.Typer(help="See what happened to every request.", no_args_is_help=True, rich_markup_mode="markdown")
workers_app = typer.Typer(help="See who lends a processor.", no_args_is_help=True, rich_markup_mode="markdown")
audit_app = typer.Typer(
    help="See who let whom in, and who changed what.", no_args_is_help=True, rich_markup_mode="markdown"
)
models_app = typer.Typer(
    help="See which models there are, and which are served.", no_args_is_help=True, rich_markup_mode="markdown"
)


@jobs_app.command("list")
def jobs_list(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="queued, running, completed, failed, cancelled or expired.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Only this model's.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10000, help="How many, newest first.")] = 20,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    Examples: `tether jobs list --status failed`, `tether jobs list --json -n 100`
    """
    from tether import console

    wanted = _status(status)
    with open_existing(store, data_dir) as opened:
        jobs = opened.jobs(tenant, wanted, model, None, limit)
    if as_json:
        console.print_json(jobs)
        return
    now = time.time()
    rows = [
        (job.id, job.status, job.tenant_id, f"{job.model} {job.version}", job.usage.completion_tokens, job.attempt,
         console.took(job.created_at, job.ended_at), console.ago(job.created_at, now), job.error.code if job.error else "")
        for job in jobs
    ]  # fmt: skip
    columns = ("ID", "STATUS", "TENANT", "MODEL", "TOKENS", "ATTEMPTS", "TOOK", "WHEN", "ERROR")
    any_filter = tenant is not None or wanted is not None or model is not None
    console.print_table(columns, rows, "no job matches" if any_filter else "no jobs yet")


@jobs_app.command("show")
def jobs_show(
    job_id: Annotated[
        str, typer.Argument(metavar="ID", help="A job's id, or the beginning of one.", callback=not_empty)
    ],
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Show one job: what was asked and answered, and each attempt."""
    from tether import console

    with open_existing(store, data_dir) as opened:
        job = _find_job(opened, job_id)
        attempts = opened.attempts(job.id)
    if as_json:
        console.print_json({"job": job, "attempts": attempts})
        return
    console.print_facts(
        [
            ("id", job.id),
            ("status", job.status),
            ("tenant", job.tenant_id),
            ("model", f"{job.model} {job.version}"),
            ("input", job.input if job.input is not None else "(not kept)"),
            ("result", job.result if job.result is not None else "(none kept)"),
            ("error", f"{job.error.code}: {job.error.message}" if job.error else None),
            ("finish reason", job.finish_reason),
            ("exact", "yes" if job.exact else "no: it went on with other weights, or in another number format"),
            ("tokens", f"{job.usage.prompt_tokens} of prompt, {job.usage.completion_tokens} of answer"),
            (
                "sampling",
                f"temperature {job.sampling.temperature:g}, top_p {job.sampling.top_p:g}, seed {job.sampling.seed}",
            ),
            ("created", console.ago(job.created_at)),
            ("took", console.took(job.created_at, job.ended_at)),
        ]
    )
    console.print_line()
    rows = [
        (a.number, a.status, a.worker_id, a.completion_tokens, console.took(a.started_at, a.ended_at), a.error_code)
        for a in attempts
    ]
    console.print_table(("ATTEMPT", "STATUS", "WORKER", "TOKENS", "TOOK", "ERROR"), rows, "no attempt was made")


def _find_job(store: Store, job_id: str) -> JobRecord:
    """Return the job with this id, or the only one whose id begins like this."""
    if (job := store.job(job_id)) is not None:
        return job
    # Ids sort by their text, so those that begin alike are neighbours.
    found = [near for near in store.jobs(before=f"{job_id}~", limit=2) if near.id.startswith(job_id)]
    if len(found) > 1:
        raise UsageError(f"several jobs begin with {job_id!r}, such as {found[0].id} and {found[1].id}")
    if found and (job := store.job(found[0].id)) is not None:
        return job
    raise JobNotFound(f"there is no job {job_id!r}; `tether jobs list` shows their ids")


@workers_app.command("list")
def workers_list(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """List the workers, those that are gone last."""
    from tether import console

    with open_existing(store, data_dir) as opened:
        workers = opened.workers()
    if as_json:
        console.print_json(workers)
        return
    now = time.time()
    rows = [
        (w.id[-8:], _doing(w, now), w.name, w.region, w.gpu_class,
         ", ".join(f"{m.name} {m.version}{' (toy)' if m.toy else ''}" for m in w.models),
         sum(m.slots for m in w.models), w.running, console.ago(w.seen_at, now))
        for w in workers
    ]  # fmt: skip
    columns = ("ID", "STATUS", "NAME", "REGION", "CLASS", "MODELS", "SLOTS", "RUNNING", "WHEN")
    console.print_table(columns, rows, "no workers yet; start one with `tether worker --model demo`")


@workers_app.command("drain")
def workers_drain(
    worker_id: WorkerId, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False
) -> None:
    """Let a worker take no more jobs until it is resumed, also when it is started again.

    What runs there has the orchestrator's `--grace` to end; then it goes on elsewhere, or waits until somebody takes it.

    Example: `tether workers drain laptop`
    """
    with open_existing(store, data_dir) as opened:
        worker = _find_worker(opened, worker_id)
        opened.drain_worker(worker.id, now=time.time())
    _tell_worker(
        worker,
        "drained",
        f"{worker.name} takes no more jobs; `tether workers resume {shlex.quote(worker_id)}` ends that",
        as_json,
    )


@workers_app.command("resume")
def workers_resume(
    worker_id: WorkerId, store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False
) -> None:
    """Let a drained worker take jobs again.

    Example: `tether workers resume laptop`
    """
    with open_existing(store, data_dir) as opened:
        worker = _find_worker(opened, worker_id)
        opened.resume_worker(worker.id, now=time.time())
    _tell_worker(worker, "resumed", f"{worker.name} takes jobs again", as_json)


def _tell_worker(worker: WorkerRecord, what: str, words: str, as_json: bool) -> None:
    from tether import console

    if as_json:
        console.print_json({"id": worker.id, "name": worker.name, "status": what})
    else:
        console.print_line(words)


def _find_worker(store: Store, word: str) -> WorkerRecord:
    """Return the worker with this id, the end of one as the list shows it, or this name."""
    workers = store.workers()
    found = [w for w in workers if w.id == word] or [
        w for w in workers if w.name == word or (len(word) >= MIN_PART and w.id.endswith(word))
    ]
    if len(found) > 1:
        raise UsageError(f"several workers are called {word!r}: {', '.join(w.id[-8:] for w in found)}")
    if not found:
        raise SetupError(f"there is no worker {word!r}; `tether workers list` shows them")
    return found[0]


@audit_app.command("list")
def audit_list(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10000, help="How many, newest first.")] = 50,
    since: Annotated[
        str | None, typer.Option("--since", help="How far back: 30m, 12h, 7d.", show_default="the beginning")
    ] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """List what operators did to tenants, keys, workers, invites and batches, what admin keys did to other tenants' things, and which machines joined, newest first.

    Example: `tether audit list --since 7d`
    """
    from tether import console

    now = time.time()
    begin = 0.0 if since is None else now - parse_seconds(since, "--since")
    with open_existing(store, data_dir) as opened:
        events = opened.audit_events(since=begin, limit=limit)
    if as_json:
        console.print_json(events)
        return
    rows = [
        (console.ago(event.at, now), event.who, event.action, event.subject, _details_words(event.details))
        for event in events
    ]
    console.print_table(("WHEN", "WHO", "ACTION", "SUBJECT", "DETAILS"), rows, "nothing was done yet")


def _details_words(details: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
        for name, value in details.items()
    )


@models_app.command("list")
def models_list(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """List the models of the catalogue and those that are served, and by how many workers."""
    from tether import catalog, console
    from tether.node import memory_words

    served: dict[tuple[str, str], int] = {}
    if store is not None or sqlite_file(data_dir).exists():
        now = time.time()
        with open_existing(store, data_dir) as opened:
            for found in opened.workers():
                if _liveness(found.status, found.seen_at, now) == "ready":
                    for model in found.models:
                        served[model.name, model.version] = served.get((model.name, model.version), 0) + 1
            others = [(m.name, m.version, m.toy, m.description) for m in opened.models()]
    else:
        others = []
    specs = list(catalog.catalogue())
    known = {spec.name for spec in specs}
    if as_json:
        rows = [
            {"name": s.name, "version": s.version, "source": s.source if s.kind == "hub" else s.kind, "revision": s.revision,
             "parameters": s.num_parameters, "bytes": s.num_bytes, "memory_bytes": s.memory_need_bytes,
             "context_tokens": s.context_tokens, "gated": s.gated, "licence": s.licence, "toy": s.toy,
             "description": s.description, "workers": served.get((s.name, s.version), 0)}
            for s in specs
        ]  # fmt: skip
        rows += [
            {
                "name": name,
                "version": version,
                "toy": toy,
                "description": text,
                "workers": served.get((name, version), 0),
            }
            for name, version, toy, text in others
            if name not in known
        ]
        console.print_json(rows)
        return
    table = [
        (s.name, s.version, "TOY" if s.toy else "", served.get((s.name, s.version), 0), memory_words(s), "gated" if s.gated else "",
         s.source if s.kind == "hub" else "ships with Tether", s.description)
        for s in specs
    ]  # fmt: skip
    table += [
        (name, version, "TOY" if toy else "", served.get((name, version), 0), "", "", "", text)
        for name, version, toy, text in others
        if name not in known
    ]
    columns = ("NAME", "VERSION", "TOY", "WORKERS", "MEMORY", "LICENCE", "SOURCE", "WHAT IT IS")
    console.print_table(columns, table, "no models")


def status(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """Say who is there and what they do."""
    from tether import console

    now = time.time()
    with open_existing(store, data_dir) as opened:
        nodes, workers, counts, url = opened.nodes(), opened.workers(), opened.counts(), opened.url
    if as_json:
        console.print_json({"store": url, "nodes": nodes, "workers": workers, "jobs": counts})
        return
    console.print_facts([("store", url), ("jobs", ", ".join(f"{count} {name}" for name, count in counts.items()))])
    console.print_line()
    rows = [
        (
            n.role,
            _liveness(n.status, n.seen_at, now),
            n.name,
            n.region,
            n.id[-8:],
            ", ".join(n.addresses),
            console.ago(n.seen_at, now),
        )
        for n in nodes
    ]
    rows += [
        ("worker", _doing(w, now), w.name, w.region, w.id[-8:],
         ", ".join(f"{m.name} {m.version}" for m in w.models), console.ago(w.seen_at, now))
        for w in workers
    ]  # fmt: skip
    columns = ("ROLE", "STATUS", "NAME", "REGION", "ID", "ADDRESSES OR MODELS", "WHEN")
    console.print_table(columns, rows, "nobody was here yet; start with `tether up`")


LOOK_SECONDS = 3.0
"""How long somebody who only looks waits for a store: long enough for a cluster to elect a leader."""
SILENT_SECONDS = 20.0
"""The store hears of everybody every few seconds; who was not seen for so long is not there, whatever it said last."""


def _liveness(said: str, seen_at: float, now: float) -> str:
    return "silent" if said != "gone" and now - seen_at > SILENT_SECONDS else said


def _doing(worker: WorkerRecord, now: float) -> str:
    """Return a worker's state for people, with the reason why it takes no jobs: `drained` is what an operator said."""
    said = _liveness(worker.status, worker.seen_at, now)
    if said in {"gone", "silent"}:
        return f"{said}, drained" if worker.drained_at is not None else said
    if worker.drained_at is not None:
        return "drained"
    return f"paused: {worker.paused}" if worker.paused else said


# --- opening the store -----------------------------------------------------------------------------------------------


@contextmanager
def open_existing(store: str | None, data_dir: Path, *, check: bool = True) -> Iterator[Store]:
    """Open a store that is there already, for as long as the block runs; nothing is made by looking."""
    from tether.store import open_store

    if store is None and not sqlite_file(data_dir).exists():
        if (data_dir / "network.json").exists():
            raise SetupError(
                f"the machine of {data_dir} has joined a network and has no store: look on the orchestrator's machine, "
                "or name its store with --store rqlite://…"
            )
        raise SetupError(
            f"there is no store in {data_dir} yet: start with `tether up`, or name one with --store or --data-dir"
        )
    opened = open_store(store or sqlite_url(data_dir), create=False, deadline_seconds=LOOK_SECONDS)
    try:
        if check:
            opened.check()
        yield opened
    finally:
        opened.close()


def parse_seconds(text: str, option: str) -> float:
    """Return the seconds that a number with a unit (s, m, h, d) stands for, 1s to 3660d; raise `UsageError`."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise UsageError(f"{option} is a number with a unit, such as 30m, 12h or 30d, not {text!r}") from None
    if not 1 <= seconds <= 3660 * 86400:
        raise UsageError(f"{option} is from 1s to 3660d")
    return seconds


def sqlite_file(data_dir: Path) -> Path:
    """Return a data directory's own store."""
    return data_dir / "tether.db"


def sqlite_url(data_dir: Path) -> str:
    """Return the URL of a data directory's own store."""
    return f"sqlite:///{sqlite_file(data_dir).absolute()}"


def _status(value: str | None) -> JobStatus | None:
    known = ("queued", "running", "completed", "failed", "cancelled", "expired")
    if value is not None and value not in known:
        raise UsageError(f"--status is one of {', '.join(known)}, not {value!r}")
    return cast("JobStatus | None", value)
