"""Starts a role from the command line and says what happens: progress, where it listens, what to type next."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from tether import __version__, console
from tether.catalog import ModelSpec
from tether.errors import TetherError
from tether.node import Node, Notices, Plan, run_peer, sole_error, sqlite_url
from tether.runtime_messages import Loading
from tether.settings import GatewaySettings, default_data_dir

_QUESTION = "What is the capital of France?"
_KEY_HEADER = "-H 'Authorization: Bearer sk-…'"


def run(plan: Plan, specs: list[ModelSpec], gateway_settings: GatewaySettings | None) -> int:
    """Run a node until a signal ends it; return the exit code, or raise the one error that ended it."""
    progress = console.LoadingProgress()
    told: set[str] = set()
    here = _Here(plan, specs, gateway_settings)

    def loading(model: str, event: Loading) -> None:
        progress.show(model, event.stage, event.fraction)

    def ready() -> None:
        progress.stop()
        here.tell_ready()

    def refused(address: str, error: Exception) -> None:
        message = f"{address} does not let this node in: {error}"
        if message not in told:  # it is asked again and again, and people read it once
            told.add(message)
            console.print_warning(message)

    try:
        with progress:
            node = Node(plan, specs, notices=Notices(loading, ready, refused))
            here.tell_start(node)
            if gateway_settings is None:
                return run_peer(node, on_started=here.tell_peer)
            from tether.http import run_gateway  # noqa: PLC0415 - fastapi, which other roles do not need

            return run_gateway(node, gateway_settings, on_started=here.tell_gateway)
    except BaseException as exc:
        error = sole_error(exc)
        if isinstance(error, TetherError) and error is not exc:
            raise error from exc
        raise


class _Here:
    """What this node tells the person who started it."""

    def __init__(self, plan: Plan, specs: list[ModelSpec], gateway_settings: GatewaySettings | None) -> None:
        self._plan = plan
        self._gateway_settings = gateway_settings
        self._specs = specs
        self._url = ""
        self._needs_key = False

    def tell_start(self, node: Node) -> None:
        console.print_line(f"Tether {__version__}, {node.roles}; data in {self._plan.node.data_dir}")
        for spec in self._specs:
            if spec.toy:
                console.print_line(f"{spec.name} is a toy for trying the network out: {spec.description}")

    def tell_peer(self, node: Node) -> None:
        self._tell_addresses(node)
        self._tell_missing(node)
        if self._plan.worker is None:
            console.print_line("Ready.")
        self._flush()

    def tell_gateway(self, node: Node, url: str, needs_key: bool) -> None:
        self._url, self._needs_key = _from_here(url), needs_key
        console.print_line(f"gateway       {url}  (its API: {self._url}/docs)")
        self._tell_addresses(node)
        if self._plan.worker is None:
            self._tell_missing(node)
            self._tell_what_next()
        self._flush()

    def tell_ready(self) -> None:
        models = ", ".join(f"{spec.name} {spec.version}" for spec in self._specs)
        console.print_line(f"worker        {models}")
        if self._url:
            self._tell_what_next()
        else:
            console.print_line("Ready.")
        self._flush()

    def _tell_missing(self, node: Node) -> None:
        """Say what this node cannot do without, where it knows of none."""
        if self._plan.orchestrator is None and not node.knows_orchestrators:
            console.print_line(
                "No orchestrator is known yet; this node looks for one. Start it with: tether orchestrator"
            )

    def _tell_addresses(self, node: Node) -> None:
        for address in node.transport.addresses if self._plan.orchestrator is not None else ():
            console.print_line(f"orchestrator  {address}")
        if self._plan.orchestrator is not None:
            console.print_line(f"store         {node.store.url}")

    def _tell_what_next(self) -> None:
        spec = self._specs[0] if self._specs else None
        name, version = (spec.name, spec.version) if spec is not None else ("demo", "1.0")
        console.print_line("Ready. In another terminal:")
        console.print_line()
        body = {"modelId": name, "version": version, "input": _QUESTION}
        if not self._needs_key:  # a key says whose job it is
            body = {"tenantId": "demo-tenant", **body}
        console.print_line(f"  curl -X POST {self._url}/infer -H 'Content-Type: application/json' \\")
        if self._needs_key:
            console.print_line(f"    {_KEY_HEADER} \\")
        console.print_line(f"    -d {shlex.quote(json.dumps(body, separators=(',', ':')))}")
        console.print_line(f"  {self._how_to_look()}")
        console.print_line()

    def _how_to_look(self) -> str:
        """Return a command that lists the jobs: by the store where there is one here, else over the gateway."""
        store = self._gateway_settings.store if self._gateway_settings is not None else None
        if self._plan.orchestrator is not None:
            return f"{_command()} jobs list{_look_options(self._plan)}"
        if store is not None:
            return f"{_command()} jobs list --store {shlex.quote(store)}"
        return f"curl {self._url}/v1/jobs" + (f" {_KEY_HEADER}" if self._needs_key else "")

    def _flush(self) -> None:
        sys.stdout.flush()


def _from_here(url: str) -> str:
    """Return an address under which this machine reaches a gateway: `0.0.0.0` is none that can be asked."""
    for listened in ("0.0.0.0", "[::]", "127.0.0.1"):  # noqa: S104 - what it listens on, as it is printed
        url = url.replace(f"//{listened}:", "//localhost:")
    return url


def _command() -> str:
    """Return how this very program can be called again."""
    path = Path(sys.argv[0])
    return "tether" if path.name == "__main__.py" else shlex.quote(sys.argv[0])


def _look_options(plan: Plan) -> str:
    """Return the options that `tether jobs list` needs to find the same store."""
    if plan.orchestrator is not None and plan.orchestrator.store not in {None, sqlite_url(plan.node.data_dir)}:
        return f" --store {shlex.quote(str(plan.orchestrator.store))}"
    if plan.node.data_dir != default_data_dir():
        return f" --data-dir {shlex.quote(str(plan.node.data_dir))}"
    return ""
