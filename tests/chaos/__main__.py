"""`make chaos`: real processes, faults by a seeded plan, a checker, a table. `python -m tests.chaos --help` has the options.

Exit 0: nothing was lost, doubled, wrong or hung; 1: something was; 130: Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio
from rich.console import Console

from tests.chaos import report
from tests.chaos.arena import torment
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.outcome import Outcome
from tests.chaos.scene import Size
from tests.chaos.swarm import Plan, swarm
from tests.chaos.wires import Wires, wires

PLANS: Mapping[Fault, Plan] = {
    "worker-killed-demo": Plan(engine="demo"),
    "restart-orders": Plan(gateways=1, orchestrators=1, workers=1, stores=1, slots=16),
}
"""Where a fault needs other processes than most."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"which (all): {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=int, help="repeat a run's plan (another one each time)")
    parser.add_argument("--streams", type=int, default=100, help="streams that lose their worker, for each such fault")
    parser.add_argument(
        "--strikes", type=int, default=10, help="kills of a gateway, an orchestrator, the store's leader"
    )
    parser.add_argument("--orders", type=int, default=24, help="orders in which all roles are started again")
    parser.add_argument("--overload", type=float, default=60.0, metavar="SECONDS", help="how long the overload lasts")
    parser.add_argument("--at-once", type=int, default=8, help="clients at the same time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and stores there")
    options = parser.parse_args(arguments)
    if unknown := set(options.faults) - FAULTS.keys():
        parser.error(f"there is no fault {min(unknown)!r}; there are {', '.join(FAULTS)}")
    if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"{options.keep} has something in it already")
    return options


def main() -> int:
    """Run what the command line says; return the exit code."""
    options = parse()
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    progress.print(f"seed {seed}: `make chaos SEED={seed}` repeats this plan", markup=False)
    faults: list[Fault] = options.faults or list(FAULTS)
    size = Size(
        streams=options.streams,
        strikes=options.strikes,
        at_once=options.at_once,
        orders=options.orders,
        overload_seconds=options.overload,
    )
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tether-chaos-"))
    outcomes: list[Outcome] = []
    stopped = False
    # As Ctrl-C, which trio ends its tasks with; an exception out of a handler of our own would come anywhere.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with contextlib.ExitStack() as stack:
            status = stack.enter_context(progress.status("starting"))
            tell = status.update if progress.is_terminal else _teller(progress)
            for number, (plan, group) in enumerate(_by_plan(faults)):
                with contextlib.ExitStack() as own:
                    found_wires = _wires(own, group, plan, progress)
                    found = own.enter_context(swarm(folder / str(number), plan, found_wires))
                    trio.run(torment, found, group, seed, size, tell, outcomes)
    except* KeyboardInterrupt:  # trio brings it in a group
        stopped = True
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if stopped:
        progress.print("stopped; every process has been ended")
    if options.json:
        print(json.dumps({"seed": seed, "outcomes": [report.summary(each) for each in outcomes]}))  # noqa: T201
    elif outcomes:
        report.show(console, outcomes, seed)
    if stopped:
        return 130
    return 1 if any(outcome.findings for outcome in outcomes) else 0


def _by_plan(faults: Sequence[Fault]) -> list[tuple[Plan, list[Fault]]]:
    """Return the faults with the processes that they need; those that need the same follow each other in one swarm."""
    plans = [PLANS.get(fault, Plan()) for fault in faults]
    return [
        (plan, [fault for fault, own in zip(faults, plans, strict=True) if own == plan])
        for plan in dict.fromkeys(plans)
    ]


def _teller(console: Console) -> Callable[[str], None]:
    """Where there is no terminal, a line goes out only now and then."""
    last = [-10.0]

    def tell(line: str) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            console.print(line, markup=False)

    return tell


def _wires(stack: contextlib.ExitStack, faults: list[Fault], plan: Plan, console: Console) -> Wires | None:
    """Lay wires where they are needed and can be; otherwise leave out what needs them, and say so."""
    if "worker-cut" not in faults:
        return None
    try:
        return stack.enter_context(wires([f"worker-{number}" for number in range(1, plan.workers + 1)]))
    except OSError as exc:
        faults.remove("worker-cut")
        console.print(f"worker-cut is left out, it needs root and network namespaces: {exc}", markup=False)
        return None


if __name__ == "__main__":
    sys.exit(main())
