"""The `tether` command: options become settings, and one call does the rest. Nothing heavy is imported at start.

Each option is declared once, as an annotated type; its environment variable is named beside it. The configuration file
gives defaults by command (`[gateway] port = 8080`). One exit door: `main` turns every error into one red line.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tether import __version__
from tether.errors import JobNotFound, SetupError, TetherError, UsageError
from tether.records import JobStatus, Keep, Role
from tether.settings import (
    GatewaySettings,
    NodeSettings,
    OrchestratorSettings,
    WorkerSettings,
    default_config_file,
    load_config,
)

if TYPE_CHECKING:
    from tether.store import Store

_NODE, _GATEWAY, _ORCHESTRATOR, _WORKER = NodeSettings(), GatewaySettings(), OrchestratorSettings(), WorkerSettings()

_HELP = """
Ordinary machines that serve language models together, peer to peer.

`tether up` starts everything on this machine. In several terminals, or on several machines, `tether orchestrator`,
`tether gateway` and `tether worker --model demo` do the same, each its part.
"""

app = typer.Typer(
    name="tether",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _group(name: str, help_text: str) -> typer.Typer:
    group = typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode="markdown")
    app.add_typer(group, name=name)
    return group


jobs_app = _group("jobs", "See what happened to every request.")
workers_app = _group("workers", "See who lends a processor.")
models_app = _group("models", "See which models there are, and which are served.")
invite_app = _group("invite", "Let another machine in.")
store_app = _group("store", "Look after the store: its tables, a server of its own.")

# --- options, each once ----------------------------------------------------------------------------------------------

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        envvar="TETHER_DATA_DIR",
        help="Keys, network and SQLite store.",
        show_default="the platform's folder",
    ),
]
Region = Annotated[
    str, typer.Option("--region", envvar="TETHER_REGION", help="Where this node is; jobs may prefer a region.")
]
NodeName = Annotated[
    str, typer.Option("--name", envvar="TETHER_NAME", help="What people call this node.", show_default="host name")
]
Silence = Annotated[
    float, typer.Option("--silence", envvar="TETHER_SILENCE", help="Seconds after which a silent peer is dead.")
]
Grace = Annotated[
    float, typer.Option("--grace", envvar="TETHER_GRACE", help="Seconds that running jobs have when this node stops.")
]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="TETHER_STORE",
        help="sqlite:///path or rqlite://host:4001[,host2:4001].",
        show_default="tether.db in the data directory",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Log more; twice: libraries too.", show_default=False)
]
LogFormat = Annotated[str, typer.Option("--log-format", envvar="TETHER_LOG_FORMAT", help="auto, plain or json.")]

Host = Annotated[str, typer.Option("--host", envvar="TETHER_GATEWAY_HOST", help="Address of the HTTP API.")]
Port = Annotated[
    int, typer.Option("--port", envvar="TETHER_GATEWAY_PORT", help="Port of the HTTP API; 0: any free one.")
]
MaxBody = Annotated[
    int, typer.Option("--max-body", envvar="TETHER_GATEWAY_MAX_BODY", help="Largest request body, in bytes.")
]
RequestsPerMinute = Annotated[
    int,
    typer.Option(
        "--requests-per-minute", envvar="TETHER_GATEWAY_REQUESTS_PER_MINUTE", help="For each tenant; 0: no limit."
    ),
]
Deadline = Annotated[
    float, typer.Option("--deadline", envvar="TETHER_GATEWAY_DEADLINE", help="Seconds for a request that names none.")
]
KeepTexts = Annotated[
    str, typer.Option("--keep", envvar="TETHER_GATEWAY_KEEP", help="Texts kept after a job: all, result or nothing.")
]
RootPath = Annotated[
    str,
    typer.Option("--root-path", envvar="TETHER_GATEWAY_ROOT_PATH", help="Path under which a reverse proxy serves it."),
]
TrustedProxies = Annotated[
    str,
    typer.Option(
        "--trusted-proxies", envvar="TETHER_GATEWAY_TRUSTED_PROXIES", help="Addresses whose X-Forwarded-* counts."
    ),
]

Listen = Annotated[
    list[str],
    typer.Option(
        "--listen", envvar="TETHER_ORCHESTRATOR_LISTEN", help="Where peers dial in; /ip4/0.0.0.0/tcp/4100 for all."
    ),
]
Announce = Annotated[
    list[str] | None,
    typer.Option(
        "--announce", envvar="TETHER_ORCHESTRATOR_ANNOUNCE", help="Addresses to tell others, where they differ."
    ),
]
MaxQueued = Annotated[
    int, typer.Option("--max-queued", envvar="TETHER_ORCHESTRATOR_MAX_QUEUED", help="Jobs that may wait for a slot.")
]
MaxAttempts = Annotated[
    int,
    typer.Option("--max-attempts", envvar="TETHER_ORCHESTRATOR_MAX_ATTEMPTS", help="Workers that may fail at a job."),
]
RetentionDays = Annotated[
    float,
    typer.Option("--retention-days", envvar="TETHER_ORCHESTRATOR_RETENTION_DAYS", help="Days that texts are kept."),
]

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        "-m",
        envvar="TETHER_WORKER_MODEL",
        help="A catalogue name, a Hugging Face id or a folder; repeat it.",
    ),
]
ModelVersion = Annotated[
    str | None,
    typer.Option(
        "--model-version",
        envvar="TETHER_WORKER_MODEL_VERSION",
        help="Version to serve as.",
        show_default="the catalogue's",
    ),
]
Dtype = Annotated[
    str, typer.Option("--dtype", envvar="TETHER_WORKER_DTYPE", help="auto, float32, bfloat16 or float16.")
]
Device = Annotated[str, typer.Option("--device", envvar="TETHER_WORKER_DEVICE", help="auto, cpu, cuda or mps.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", envvar="TETHER_WORKER_THREADS", help="Processor threads.", show_default="by size"),
]
GpuClass = Annotated[
    str, typer.Option("--gpu-class", envvar="TETHER_WORKER_GPU_CLASS", help="Class of this machine, as others see it.")
]
RuntimeModule = Annotated[str, typer.Option("--runtime-module", envvar="TETHER_WORKER_RUNTIME_MODULE", hidden=True)]

# --- the roles -------------------------------------------------------------------------------------------------------


@app.callback()
def _root(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            envvar="TETHER_CONFIG",
            help="Configuration file.",
            show_default="config.toml in the platform's folder",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    if version:
        sys.stdout.write(f"tether {__version__}\n")
        raise typer.Exit
    if config is not None and not config.is_file():
        raise UsageError(f"there is no configuration file {config}")
    context.default_map = load_config(config or default_config_file(), _options_by_command())


@app.command()
def up(
    data_dir: DataDir = _NODE.data_dir,
    port: Port = _GATEWAY.port,
    host: Host = _GATEWAY.host,
    model: Models = list(_WORKER.models),  # noqa: B006 - typer copies it
    store: StoreUrl = None,
    listen: Listen = list(_ORCHESTRATOR.listen),  # noqa: B006
    announce: Announce = None,
    region: Region = _NODE.region,
    name: NodeName = _NODE.name,
    requests_per_minute: RequestsPerMinute = _GATEWAY.requests_per_minute,
    max_body: MaxBody = _GATEWAY.max_body_bytes,
    deadline: Deadline = _GATEWAY.deadline_seconds,
    keep: KeepTexts = _GATEWAY.keep,
    max_queued: MaxQueued = _ORCHESTRATOR.max_queued,
    max_attempts: MaxAttempts = _ORCHESTRATOR.max_attempts,
    retention_days: RetentionDays = _ORCHESTRATOR.retention_days,
    model_version: ModelVersion = None,
    dtype: Dtype = _WORKER.dtype,
    device: Device = _WORKER.device,
    threads: Threads = None,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    runtime_module: RuntimeModule = _WORKER.runtime_module,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Start everything on this machine: gateway, orchestrator and worker in one process.

    Then, in another terminal:

        curl -X POST http://localhost:8080/infer -H 'Content-Type: application/json' \\
          -d '{"tenantId":"demo-tenant","modelId":"demo","version":"1.0","input":"What is the capital of France?"}'
    """
    node = NodeSettings(data_dir=data_dir, region=region, name=name, silence_seconds=silence, grace_seconds=grace)
    gateway_settings = GatewaySettings(
        host=host,
        port=port,
        max_body_bytes=max_body,
        requests_per_minute=requests_per_minute,
        deadline_seconds=deadline,
        keep=_keep(keep),
    )
    orchestrator_settings = OrchestratorSettings(
        store=store,
        listen=tuple(listen),
        announce=tuple(announce or ()),
        max_queued=max_queued,
        max_attempts=max_attempts,
        retention_days=retention_days,
    )
    worker_settings = WorkerSettings(
        models=tuple(model),
        model_version=model_version,
        dtype=dtype,
        device=device,
        threads=threads,
        runtime_module=runtime_module,
    )
    _start(node, verbose, log_format, gateway_settings, orchestrator_settings, worker_settings)


@app.command()
def gateway(
    data_dir: DataDir = _NODE.data_dir,
    port: Port = _GATEWAY.port,
    host: Host = _GATEWAY.host,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            envvar="TETHER_STORE",
            help="Read jobs here, also while no orchestrator answers.",
            show_default="an orchestrator is asked",
        ),
    ] = None,
    region: Region = _NODE.region,
    name: NodeName = _NODE.name,
    requests_per_minute: RequestsPerMinute = _GATEWAY.requests_per_minute,
    max_body: MaxBody = _GATEWAY.max_body_bytes,
    deadline: Deadline = _GATEWAY.deadline_seconds,
    keep: KeepTexts = _GATEWAY.keep,
    root_path: RootPath = _GATEWAY.root_path,
    trusted_proxies: TrustedProxies = _GATEWAY.trusted_proxies,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Serve the HTTP API, and hand its jobs to the orchestrators."""
    node = NodeSettings(data_dir=data_dir, region=region, name=name, silence_seconds=silence, grace_seconds=grace)
    settings = GatewaySettings(
        host=host,
        port=port,
        store=store,
        max_body_bytes=max_body,
        requests_per_minute=requests_per_minute,
        deadline_seconds=deadline,
        keep=_keep(keep),
        root_path=root_path,
        trusted_proxies=trusted_proxies,
    )
    _start(node, verbose, log_format, settings, None, None)


@app.command()
def orchestrator(
    data_dir: DataDir = _NODE.data_dir,
    store: StoreUrl = None,
    listen: Listen = list(_ORCHESTRATOR.listen),  # noqa: B006 - typer copies it
    announce: Announce = None,
    region: Region = _NODE.region,
    name: NodeName = _NODE.name,
    max_queued: MaxQueued = _ORCHESTRATOR.max_queued,
    max_attempts: MaxAttempts = _ORCHESTRATOR.max_attempts,
    retention_days: RetentionDays = _ORCHESTRATOR.retention_days,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Find each job a worker, and keep the ledger."""
    node = NodeSettings(data_dir=data_dir, region=region, name=name, silence_seconds=silence, grace_seconds=grace)
    settings = OrchestratorSettings(
        store=store,
        listen=tuple(listen),
        announce=tuple(announce or ()),
        max_queued=max_queued,
        max_attempts=max_attempts,
        retention_days=retention_days,
    )
    _start(node, verbose, log_format, None, settings, None)


@app.command()
def worker(
    model: Models = list(_WORKER.models),  # noqa: B006 - typer copies it
    data_dir: DataDir = _NODE.data_dir,
    region: Region = _NODE.region,
    name: NodeName = _NODE.name,
    model_version: ModelVersion = None,
    dtype: Dtype = _WORKER.dtype,
    device: Device = _WORKER.device,
    threads: Threads = None,
    gpu_class: GpuClass = _WORKER.gpu_class,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    runtime_module: RuntimeModule = _WORKER.runtime_module,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Lend this machine's processor: load a model and answer for the network.

    Example: `tether worker --model phi-2`
    """
    node = NodeSettings(data_dir=data_dir, region=region, name=name, silence_seconds=silence, grace_seconds=grace)
    settings = WorkerSettings(
        models=tuple(model),
        model_version=model_version,
        dtype=dtype,
        device=device,
        threads=threads,
        gpu_class=gpu_class,
        runtime_module=runtime_module,
    )
    _start(node, verbose, log_format, None, None, settings)


def _start(
    node_settings: NodeSettings,
    verbose: int,
    log_format: str,
    gateway_settings: GatewaySettings | None,
    orchestrator_settings: OrchestratorSettings | None,
    worker_settings: WorkerSettings | None,
) -> None:
    """Run a node with these roles until a signal ends it."""
    from tether import console

    if log_format not in console.LOG_FORMATS:
        raise UsageError(f"--log-format is one of {', '.join(console.LOG_FORMATS)}")
    console.configure_logging(verbose=verbose, log_format=log_format)
    if worker_settings is not None and worker_settings.runtime_module == _WORKER.runtime_module:
        _need_torch()
    from tether import node, start

    specs = node.check_models(worker_settings) if worker_settings is not None else []
    plan = node.Plan(
        node=node_settings,
        orchestrator=orchestrator_settings,
        worker=worker_settings,
        gateway=gateway_settings is not None,
    )
    raise typer.Exit(start.run(plan, specs, gateway_settings))


def _need_torch() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"a worker needs {' and '.join(missing)}: pip install 'tether[worker]'")


# --- looking ---------------------------------------------------------------------------------------------------------


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

    with _open(store, data_dir) as opened:
        jobs = opened.jobs(tenant, _status(status), model, None, limit)
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
    console.print_table(columns, rows, "no jobs yet")


@jobs_app.command("show")
def jobs_show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="A job's id, or the beginning of one.")],
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Show one job: what was asked and answered, and each attempt."""
    from tether import console

    with _open(store, data_dir) as opened:
        job = opened.job(job_id)
        if job is None:
            raise JobNotFound(f"there is no job {job_id!r}; `tether jobs list` shows their ids")
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


@workers_app.command("list")
def workers_list(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """List the workers, those that are gone last."""
    from tether import console

    with _open(store, data_dir) as opened:
        workers = opened.workers()
    if as_json:
        console.print_json(workers)
        return
    now = time.time()
    rows = [
        (w.id[-8:], _liveness(w.status, w.seen_at, now), w.name, w.region, w.gpu_class,
         ", ".join(f"{m.name} {m.version}{' (toy)' if m.toy else ''}" for m in w.models),
         sum(m.slots for m in w.models), w.running, console.ago(w.seen_at, now))
        for w in workers
    ]  # fmt: skip
    columns = ("ID", "STATUS", "NAME", "REGION", "CLASS", "MODELS", "SLOTS", "RUNNING", "WHEN")
    console.print_table(columns, rows, "no workers yet; start one with `tether worker --model demo`")


@models_app.command("list")
def models_list(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """List the models of the catalogue and those that are served, and by how many workers."""
    from tether import catalog, console
    from tether.node import memory_words

    served: dict[tuple[str, str], int] = {}
    if store is not None or _sqlite_file(data_dir).exists():
        now = time.time()
        with _open(store, data_dir) as opened:
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


@app.command()
def status(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """Say who is there and what they do."""
    from tether import console

    now = time.time()
    with _open(store, data_dir) as opened:
        nodes, workers, counts, url = opened.nodes(), opened.workers(), opened.counts(), opened.url
    if as_json:
        console.print_json({"store": url, "nodes": nodes, "workers": workers, "jobs": counts})
        return
    console.print_facts([("store", url), ("jobs", ", ".join(f"{count} {name}" for name, count in counts.items()))])
    console.print_line()
    rows = [
        (
            n.role,
            _liveness("up", n.seen_at, now),
            n.name,
            n.region,
            n.id[-8:],
            ", ".join(n.addresses),
            console.ago(n.seen_at, now),
        )
        for n in nodes
    ]
    rows += [
        ("worker", _liveness(w.status, w.seen_at, now), w.name, w.region, w.id[-8:],
         ", ".join(f"{m.name} {m.version}" for m in w.models), console.ago(w.seen_at, now))
        for w in workers
    ]  # fmt: skip
    columns = ("ROLE", "STATUS", "NAME", "REGION", "ID", "ADDRESSES OR MODELS", "WHEN")
    console.print_table(columns, rows, "nobody was here yet; start with `tether up`")


SILENT_SECONDS = 20.0
"""The store hears of everybody every few seconds; who was not seen for so long is not there, whatever it said last."""


def _liveness(said: str, seen_at: float, now: float) -> str:
    return "silent" if said != "gone" and now - seen_at > SILENT_SECONDS else said


# --- letting others in -----------------------------------------------------------------------------------------------


@invite_app.command("create")
def invite_create(
    role: Annotated[list[str], typer.Option("--role", help="worker, gateway, orchestrator or operator; repeat it.")] = [
        "worker"
    ],
    ttl: Annotated[str, typer.Option("--ttl", help="How long it can be used: 30m, 1h, 2d.")] = "1h",
    address: Annotated[
        list[str] | None,
        typer.Option("--address", help="Where the other machine dials.", show_default="the running orchestrator's"),
    ] = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Print an invite: who has it may join this network until it expires.

    Example: `tether invite create --role worker --ttl 1h`
    """
    from tether import console, identity

    roles = [_role(name) for name in role]
    network = identity.open_network(data_dir)
    addresses = tuple(address or identity.AddressBook(data_dir).read() or network.addresses)
    if not addresses:
        raise SetupError(
            "no orchestrator of this data directory is running, so the invite would have no address: "
            "start one with `tether orchestrator`, or name an address with --address"
        )
    ttl_seconds = _seconds(ttl)
    invite = identity.create_invite(network, roles, ttl_seconds, addresses)
    if all("/127.0.0.1/" in found or "/::1/" in found for found in addresses):
        console.print_warning(
            "the orchestrator listens on this machine only, so the invite works only here; "
            "for other machines start it with --listen /ip4/0.0.0.0/tcp/4100 and --announce /ip4/ADDRESS/tcp/4100"
        )
    if as_json:
        console.print_json(
            {"invite": invite, "roles": roles, "expires_at": time.time() + ttl_seconds, "addresses": addresses}
        )
    else:
        console.print_line(invite)


@app.command("join")
def join_network(
    invite: Annotated[str, typer.Argument(metavar="INVITE", help="What `tether invite create` printed.")],
    data_dir: DataDir = _NODE.data_dir,
) -> None:
    """Join the network that an invite is for; then start the role that it names.

    Example: `tether join tether-invite-1:… && tether worker --model demo`
    """
    from tether import console, identity

    network = identity.join(data_dir, invite, time.time())
    roles, _ = network.may_issue(time.time())
    console.print_line(f"This machine has joined as {', '.join(sorted(roles))}. Its keys are in {data_dir}.")
    console.print_line(f"Next: tether {sorted(roles)[-1]}" + (" --model demo" if "worker" in roles else ""))


# --- the store -------------------------------------------------------------------------------------------------------


@store_app.command("migrate")
def store_migrate(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir) -> None:
    """Bring the store's tables up to date; orchestrators do the same when they start."""
    from tether import console
    from tether.identity import prepare_data_dir
    from tether.store import open_store

    if store is None:
        prepare_data_dir(data_dir)
    opened = open_store(store or _sqlite_url(data_dir))
    try:
        applied = opened.migrate()
    finally:
        opened.close()
    for migration in applied:
        console.print_line(f"applied {migration.version:04d} {migration.name}")
    if not applied:
        console.print_line("up to date")


@store_app.command("status")
def store_status(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir, as_json: AsJson = False) -> None:
    """Say where the store is, whether it answers, and whether its tables fit this version."""
    from tether import console

    with _open(store, data_dir, check=False) as opened:
        opened.ping()
        found = opened.schema_status()
        url = opened.url
    if as_json:
        console.print_json(
            {"store": url, "applied": [m.name for m in found.applied], "pending": [m.name for m in found.pending]}
        )
        return
    pending = ", ".join(m.name for m in found.pending)
    console.print_facts(
        [
            ("store", url),
            ("answers", "yes"),
            ("tables", f"behind: {pending}; run `tether store migrate`" if pending else "up to date"),
        ]
    )


@store_app.command("serve")
def store_serve(
    host: Annotated[str, typer.Option("--host", help="Address of its HTTP API.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port of its HTTP API; its Raft port is the next one.")] = 4001,
    data_dir: DataDir = _NODE.data_dir,
) -> None:
    """Run an rqlited that is on PATH, as a store for several machines.

    Then, elsewhere: `tether orchestrator --store rqlite://127.0.0.1:4001`
    """
    from tether.identity import prepare_data_dir
    from tether.store import serve_command

    prepare_data_dir(data_dir)
    command = serve_command(data_dir, host, port)
    os.execvp(command[0], command)  # noqa: S606 - it is what the user asked for, with our own arguments


# --- helpers ---------------------------------------------------------------------------------------------------------


class _Opened:
    def __init__(self, opened: Store) -> None:
        self._store = opened

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


def _open(store: str | None, data_dir: Path, *, check: bool = True) -> _Opened:
    """Open a store that is there already; nothing is made by looking."""
    from tether.store import open_store

    if store is None and not _sqlite_file(data_dir).exists():
        raise SetupError(
            f"there is no store in {data_dir} yet: start with `tether up`, or name one with --store or --data-dir"
        )
    opened = open_store(store or _sqlite_url(data_dir), create=False)
    try:
        if check:
            opened.check()
    except BaseException:
        opened.close()
        raise
    return _Opened(opened)


def _sqlite_file(data_dir: Path) -> Path:
    return data_dir / "tether.db"


def _sqlite_url(data_dir: Path) -> str:
    return f"sqlite:///{_sqlite_file(data_dir).absolute()}"


def _keep(value: str) -> Keep:
    if value not in {"all", "result", "nothing"}:
        raise UsageError(f"--keep is all, result or nothing, not {value!r}")
    return cast("Keep", value)


def _status(value: str | None) -> JobStatus | None:
    known = ("queued", "running", "completed", "failed", "cancelled", "expired")
    if value is not None and value not in known:
        raise UsageError(f"--status is one of {', '.join(known)}, not {value!r}")
    return cast("JobStatus | None", value)


def _role(value: str) -> Role:
    known = ("worker", "gateway", "orchestrator", "operator")
    if value not in known:
        raise UsageError(f"--role is one of {', '.join(known)}, not {value!r}")
    return cast("Role", value)


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise UsageError(f"--ttl is a number with a unit, such as 30m, 1h or 2d, not {text!r}") from None
    if not 1 <= seconds <= 366 * 86400:
        raise UsageError("--ttl is from 1s to 366d")
    return seconds


def _options_by_command() -> dict[str, set[str]]:
    """Return the options of each role's command, which are the sections and keys of the configuration file."""
    found: dict[str, set[str]] = {}
    command: Any = typer.main.get_command(app)
    for name, sub in command.commands.items():
        if name in {"up", "gateway", "orchestrator", "worker"}:
            found[name] = {parameter.name for parameter in sub.params if parameter.name != "help"}
    return found


def main() -> None:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    try:
        app()
    except TetherError as exc:
        code, message = exc.exit_code, exc.message
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left; there is nobody to tell
        sys.exit(1)
    else:
        return
    from tether.console import print_error

    print_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
