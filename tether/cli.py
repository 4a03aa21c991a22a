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

from tether import __version__, cli_admin, cli_batches, cli_talk, cli_views
from tether.cli_views import open_existing, sqlite_file, sqlite_url
from tether.errors import OutputClosed, SetupError, TetherError, UsageError
from tether.options import (
    AccessLog,
    AllowedHosts,
    Announce,
    ApiKeyEnv,
    AsJson,
    BaseUrl,
    CorsOrigins,
    DataDir,
    Deadline,
    Device,
    Dtype,
    Engine,
    GpuClass,
    Grace,
    Host,
    KeepTexts,
    LendingHours,
    Listen,
    LogFormat,
    LostGateway,
    MaxAttempts,
    MaxBody,
    MaxFile,
    MaxLostWorkers,
    MaxQueued,
    MaxQueuedPerTenant,
    Models,
    ModelVersion,
    NodeName,
    Polite,
    Port,
    Region,
    RequestsPerMinute,
    RetentionDays,
    RootPath,
    RuntimeModule,
    Silence,
    Slots,
    StoreUrl,
    Threads,
    TrustedProxies,
    Verbose,
)
from tether.politeness import Hours, Politeness
from tether.records import Keep, Role
from tether.settings import (
    COMMON,
    GatewaySettings,
    NodeSettings,
    OrchestratorSettings,
    WorkerSettings,
    default_config_file,
    load_config,
)

if TYPE_CHECKING:
    pass

_INVITE_ROLES = ("worker",)
_MAX_INVITE_BYTES = 64 << 10
_ROLE_COMMANDS = frozenset({"up", "gateway", "orchestrator", "worker"})
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


app.add_typer(cli_views.jobs_app, name="jobs")
app.add_typer(cli_views.workers_app, name="workers")
app.add_typer(cli_views.models_app, name="models")
app.add_typer(cli_views.audit_app, name="audit")
app.add_typer(cli_batches.batches_app, name="batches")
app.add_typer(cli_batches.files_app, name="files")
app.command()(cli_views.status)
app.command()(cli_talk.explain)
app.command()(cli_talk.chat)
app.add_typer(cli_admin.tenants_app, name="tenants")
app.add_typer(cli_admin.keys_app, name="keys")
invite_app = _group("invite", "Let another machine in.")
store_app = _group("store", "Look after the store: its tables, a server of its own.")

# --- the roles -------------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:  # here, and not in the command's body: that one runs only where a command follows
        from tether import console

        console.print_line(f"tether {__version__}")
        raise typer.Exit


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
    version: Annotated[  # noqa: ARG001 - its callback has left by then
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if config is not None and not config.is_file():
        raise UsageError(f"there is no configuration file {config}")
    context.default_map = _defaults(config or default_config_file())


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
    max_file: MaxFile = _GATEWAY.max_file_bytes,
    deadline: Deadline = _GATEWAY.deadline_seconds,
    keep: KeepTexts = _GATEWAY.keep,
    allowed_host: AllowedHosts = None,
    root_path: RootPath = _GATEWAY.root_path,
    trusted_proxies: TrustedProxies = _GATEWAY.trusted_proxies,
    cors_origin: CorsOrigins = None,
    access_log: AccessLog = _GATEWAY.access_log,
    max_queued: MaxQueued = _ORCHESTRATOR.max_queued,
    max_queued_per_tenant: MaxQueuedPerTenant = _ORCHESTRATOR.max_queued_per_tenant,
    max_attempts: MaxAttempts = _ORCHESTRATOR.max_attempts,
    max_lost_workers: MaxLostWorkers = _ORCHESTRATOR.max_lost_workers,
    lost_gateway: LostGateway = None,
    retention_days: RetentionDays = _ORCHESTRATOR.retention_days,
    model_version: ModelVersion = None,
    dtype: Dtype = _WORKER.dtype,
    device: Device = _WORKER.device,
    threads: Threads = None,
    slots: Slots = None,
    engine: Engine = _WORKER.engine,
    base_url: BaseUrl = None,
    api_key_env: ApiKeyEnv = None,
    polite: Polite = _WORKER.politeness.polite,
    hours: LendingHours = None,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    runtime_module: RuntimeModule = _WORKER.runtime_module,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    r"""Start everything on this machine: gateway, orchestrator and worker in one process.

    Then, in another terminal:

    ```
    curl -X POST http://localhost:8080/infer -H 'Content-Type: application/json' -d \
    '{"tenantId":"demo-tenant","modelId":"demo","version":"1.0","input":"What is the capital of France?"}'
    ```
    """
    node = NodeSettings(
        data_dir=_absolute(data_dir), region=region, name=name, silence_seconds=silence, grace_seconds=grace
    )
    gateway_settings = GatewaySettings(
        host=host,
        port=port,
        max_body_bytes=max_body,
        max_file_bytes=max_file,
        requests_per_minute=requests_per_minute,
        deadline_seconds=deadline,
        keep=_keep(keep),
        root_path=root_path,
        trusted_proxies=trusted_proxies,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        access_log=access_log,
    )
    orchestrator_settings = OrchestratorSettings(
        store=store,
        listen=tuple(listen),
        announce=tuple(announce or ()),
        max_queued=max_queued,
        max_queued_per_tenant=max_queued_per_tenant,
        max_attempts=max_attempts,
        max_lost_workers=max_lost_workers,
        lost_gateway_seconds=lost_gateway,
        retention_days=retention_days,
    )
    worker_settings = WorkerSettings(
        models=tuple(model),
        model_version=model_version,
        dtype=dtype,
        device=device,
        threads=threads,
        slots=slots,
        engine=engine,
        base_url=base_url,
        api_key_env=api_key_env,
        runtime_module=runtime_module,
        politeness=Politeness(polite, Hours.parse(hours) if hours is not None else None),
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
    max_file: MaxFile = _GATEWAY.max_file_bytes,
    deadline: Deadline = _GATEWAY.deadline_seconds,
    keep: KeepTexts = _GATEWAY.keep,
    allowed_host: AllowedHosts = None,
    root_path: RootPath = _GATEWAY.root_path,
    trusted_proxies: TrustedProxies = _GATEWAY.trusted_proxies,
    cors_origin: CorsOrigins = None,
    access_log: AccessLog = _GATEWAY.access_log,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Serve the HTTP API, and hand its jobs to the orchestrators."""
    node = NodeSettings(
        data_dir=_absolute(data_dir), region=region, name=name, silence_seconds=silence, grace_seconds=grace
    )
    settings = GatewaySettings(
        host=host,
        port=port,
        store=store,
        max_body_bytes=max_body,
        max_file_bytes=max_file,
        requests_per_minute=requests_per_minute,
        deadline_seconds=deadline,
        keep=_keep(keep),
        root_path=root_path,
        trusted_proxies=trusted_proxies,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        access_log=access_log,
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
    max_queued_per_tenant: MaxQueuedPerTenant = _ORCHESTRATOR.max_queued_per_tenant,
    max_attempts: MaxAttempts = _ORCHESTRATOR.max_attempts,
    max_lost_workers: MaxLostWorkers = _ORCHESTRATOR.max_lost_workers,
    lost_gateway: LostGateway = None,
    retention_days: RetentionDays = _ORCHESTRATOR.retention_days,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Find each job a worker, and keep the ledger.

    Example: `tether orchestrator --store rqlite://a:4001,b:4001,c:4001 --lost-gateway 60`
    """
    node = NodeSettings(
        data_dir=_absolute(data_dir), region=region, name=name, silence_seconds=silence, grace_seconds=grace
    )
    settings = OrchestratorSettings(
        store=store,
        listen=tuple(listen),
        announce=tuple(announce or ()),
        max_queued=max_queued,
        max_queued_per_tenant=max_queued_per_tenant,
        max_attempts=max_attempts,
        max_lost_workers=max_lost_workers,
        lost_gateway_seconds=lost_gateway,
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
    slots: Slots = None,
    engine: Engine = _WORKER.engine,
    base_url: BaseUrl = None,
    api_key_env: ApiKeyEnv = None,
    gpu_class: GpuClass = _WORKER.gpu_class,
    polite: Polite = _WORKER.politeness.polite,
    hours: LendingHours = None,
    silence: Silence = _NODE.silence_seconds,
    grace: Grace = _NODE.grace_seconds,
    runtime_module: RuntimeModule = _WORKER.runtime_module,
    verbose: Verbose = 0,
    log_format: LogFormat = "auto",
) -> None:
    """Lend this machine's processor: load a model and answer for the network.

    Examples: `tether worker --model phi-2`, `tether worker --model phi-2 --polite --hours 20:00-08:00`
    """
    node = NodeSettings(
        data_dir=_absolute(data_dir), region=region, name=name, silence_seconds=silence, grace_seconds=grace
    )
    settings = WorkerSettings(
        models=tuple(model),
        model_version=model_version,
        dtype=dtype,
        device=device,
        threads=threads,
        slots=slots,
        engine=engine,
        base_url=base_url,
        api_key_env=api_key_env,
        gpu_class=gpu_class,
        politeness=Politeness(polite, Hours.parse(hours) if hours is not None else None),
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
    if worker_settings is not None and _runs_models(worker_settings):
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


def _runs_models(settings: WorkerSettings) -> bool:
    return settings.engine == _WORKER.engine and settings.runtime_module == _WORKER.runtime_module


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _need_torch() -> None:
    missing = [name for name in ("torch", "transformers") if not _is_installed(name)]
    if missing:
        raise SetupError(f"a worker needs {' and '.join(missing)}: pip install 'tether[worker]'")


# --- letting others in -----------------------------------------------------------------------------------------------


@invite_app.command("create")
def invite_create(
    role: Annotated[
        list[str], typer.Option("--role", help="worker, gateway, orchestrator or operator; repeat it.")
    ] = list(_INVITE_ROLES),  # noqa: B006 - typer copies it
    ttl: Annotated[
        str,
        typer.Option(
            "--ttl", help="How long it can be used: 30m, 1h, 2d; clocks may differ, so it is let in for 5 minutes more."
        ),
    ] = "1h",
    address: Annotated[
        list[str] | None,
        typer.Option("--address", help="Where the other machine dials.", show_default="the running orchestrator's"),
    ] = None,
    store: StoreUrl = None,
    data_dir: DataDir = _NODE.data_dir,
    as_json: AsJson = False,
) -> None:
    """Print an invite: who has it may join this network until it expires.

    Example: `tether invite create --role worker --ttl 1h`
    """
    from tether import console
    from tether.address_book import AddressBook
    from tether.invites import create_invite, invite_peer_id
    from tether.network import open_network

    roles = [_role(name) for name in role]
    ttl_seconds = _seconds(ttl)
    network = open_network(data_dir)
    addresses = tuple(address or AddressBook(data_dir).read() or network.addresses)
    if not addresses:
        raise SetupError(
            "no orchestrator of this data directory is running, so the invite would have no address: "
            "start one with `tether orchestrator`, or name an address with --address"
        )
    now = time.time()
    invite = create_invite(network, roles, ttl_seconds, addresses, now=now)
    if store is not None or sqlite_file(data_dir).exists():
        # Before anybody has it: what could not be told of is not handed out.
        with open_existing(store, data_dir) as opened:
            subject = invite_peer_id(invite)
            opened.record_event("invite.created", subject, now=now, roles=roles, ttl_seconds=ttl_seconds)
    else:
        console.print_note("no store is here, so the audit log does not tell of this invite; --store names one")
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
    invite: Annotated[
        str | None,
        typer.Argument(
            metavar="INVITE",
            envvar="TETHER_INVITE",
            help="What `tether invite create` printed; `-` reads it from stdin, where neither `ps` nor the shell's history "
            "has it.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataDir = _NODE.data_dir,
) -> None:
    """Join the network that an invite is for; then start the role that it names.

    Example: `tether join - < invite.txt && tether worker --model demo`
    """
    from tether import console
    from tether.invites import join

    if invite is None:
        raise UsageError("name an invite, or `-` to read it from stdin, or put it into TETHER_INVITE")
    if invite == "-":
        if sys.stdin.isatty():
            console.print_note("Paste the invite, then press Enter and Ctrl-D.")
        # Whatever else is piped in by mistake is not read to its end, and is told as what it is: no invite.
        invite = sys.stdin.buffer.read(_MAX_INVITE_BYTES).decode("ascii", "replace")
    network = join(data_dir, invite, time.time())
    roles, _ = network.may_issue(time.time())
    console.print_line(f"This machine has joined as {', '.join(sorted(roles))}. Its keys are in {data_dir}.")
    console.print_line(f"Next: tether {max(roles)}" + (" --model demo" if "worker" in roles else ""))


# --- the store -------------------------------------------------------------------------------------------------------


@store_app.command("migrate")
def store_migrate(store: StoreUrl = None, data_dir: DataDir = _NODE.data_dir) -> None:
    """Bring the store's tables up to date; orchestrators do the same when they start."""
    from tether import console
    from tether.data_dir import prepare_data_dir
    from tether.store import open_store

    if store is None:
        prepare_data_dir(data_dir)
    opened = open_store(store or sqlite_url(data_dir))
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

    with open_existing(store, data_dir, check=False) as opened:
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
    from tether.data_dir import prepare_data_dir
    from tether.store import serve_command

    prepare_data_dir(data_dir)
    command = serve_command(data_dir, host, port)
    os.execvp(command[0], command)  # noqa: S606 - it is what the user asked for, with our own arguments


# --- helpers ---------------------------------------------------------------------------------------------------------


def _absolute(data_dir: Path) -> Path:
    """Return the folder by its whole path: what is printed for another terminal must hold there. Empty stays empty."""
    return data_dir.absolute() if data_dir != Path() else data_dir


def _keep(value: str) -> Keep:
    if value not in {"all", "result", "nothing"}:
        raise UsageError(f"--keep is all, result or nothing, not {value!r}")
    return cast("Keep", value)


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


def _defaults(path: Path) -> dict[str, Any]:
    """Return the configuration file's values as defaults of every command's options, groups nested."""
    command: Any = typer.main.get_command(app)
    options = {name: _options(sub) for name, sub in command.commands.items() if name in _ROLE_COMMANDS}
    options[COMMON] = {"data_dir": False, "store": False, "region": False, "name": False}
    sections = load_config(path, options)
    for name, values in sections.items():
        for sub in command.commands.values() if name == COMMON else (command.commands[name],):
            _check_types(path, name, values, sub)

    def of(sub: Any, name: str) -> dict[str, Any]:
        if hasattr(sub, "commands"):
            return {inner: of(found, inner) for inner, found in sub.commands.items()}
        common = {key: value for key, value in sections.get(COMMON, {}).items() if key in _options(sub)}
        return {**common, **sections.get(name, {})}

    return {name: of(sub, name) for name, sub in command.commands.items()}


def _check_types(path: Path, section: str, values: dict[str, Any], command: Any) -> None:
    """Raise `UsageError` for a value that its option does not take: the parser would blame the environment for it."""
    context = typer.Context(command, info_name=command.name)
    for option in command.params:
        if option.name not in values:
            continue
        try:
            option.process_value(context, values[option.name])
        except typer.BadParameter as exc:
            raise UsageError(f"{path}: [{section}] {option.name} = {values[option.name]!r}: {exc.message}") from exc


def _options(command: Any) -> dict[str, bool]:
    """Return the names of a command's options, and whether each may be given several times."""
    return {
        option.name: option.multiple
        for option in command.params
        if hasattr(option, "multiple") and option.name != "help"
    }


def main() -> None:
    """Run the command line; the one place where an error becomes a line and an exit code."""
    try:
        app()
    except OutputClosed as exc:
        sys.exit(exc.exit_code)  # whoever read it has had enough; there is nobody to tell
    except TetherError as exc:
        code, message = exc.exit_code, exc.message
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        return
    from tether.console import print_error

    print_error(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
