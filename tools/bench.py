"""`make bench`: what Tether costs without a model, in figures that can be compared with the last run's.

    start-up      `tether --help` as a process, and which heavy modules `import tether.cli` loads
    links         round trips a second over one link between two processes, with 1, 16, 64 and 256 open
    runtime       tokens a second of the batch against a bare loop and transformers' own batching (tools/bench_runtime.py)
    path          gateway, orchestrator and worker as three processes on loopback, every job durable, a scripted engine
                  that answers one token at once; the load comes from wrk, at 1 and at 64 open requests, for each store;
                  `keys`: the same with an API key and limits of requests and tokens, a minute and a day

Results go to bench-results/latest.json; the run before is kept as previous.json, and the table shows the ratio to it.
Machines differ and are noisy: compare runs of one machine, and ratios within a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.processes import Machine, Process  # noqa: E402 - a script of the repository, beside the tests' tools
from tests.rqlited import running  # noqa: E402
from tools.bench_runtime import GOALS as RUNTIME_GOALS  # noqa: E402

RESULTS = ROOT / "bench-results"
HEAVY = ("torch", "transformers", "libp2p", "fastapi", "trio", "uvicorn")

# What each figure must reach: (name, bound, whether more is better). A bench reports; it never fails a build.
GOALS: dict[str, tuple[float, bool]] = {
    "help_ms": (250.0, False),
    "sqlite_c1_p50_ms": (10.0, False),
    "rqlite_c1_p50_ms": (15.0, False),
    "sqlite_c64_jobs_per_second": (300.0, True),
    "sqlite_keys_c1_p50_ms": (8.0, False),
    "sqlite_keys_c64_jobs_per_second": (450.0, True),
    "rqlite_c64_jobs_per_second": (300.0, True),
    **{name: (bound, True) for name, bound in RUNTIME_GOALS.items()},
}


def main() -> None:
    """Run the benchmarks that were asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="how long each load lasts")
    parser.add_argument("--only", choices=("start-up", "links", "sqlite", "rqlite", "runtime"), help="just this part")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    if options.only in {None, "start-up"}:
        figures |= start_up()
    if options.only in {None, "links"}:
        figures |= links()
    if options.only in {None, "sqlite"}:
        with tempfile.TemporaryDirectory() as folder:
            figures |= path("sqlite", Path(folder), [], options.seconds)
    if options.only in {None, "rqlite"}:
        with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "rqlited") as server:
            figures |= path("rqlite", Path(folder), ["--store", server.url], options.seconds)
    if options.only in {None, "runtime"}:
        figures |= runtime()
    report(figures)


def start_up() -> dict[str, float]:
    """Measure how long help takes, and check that nothing heavy is imported for it."""
    tether = [sys.executable, "-m", "tether", "--help"]
    times = []
    for _ in range(11):
        started = time.perf_counter()
        subprocess.run(tether, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - started) * 1e3)
    code = f"import sys, tether.cli; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"import tether.cli loads of {', '.join(HEAVY)}: {loaded}", flush=True)
    return {"help_ms": statistics.median(times)}


def links() -> dict[str, float]:
    """Measure round trips over a link (tools/bench_links.py says how)."""
    command = [sys.executable, str(ROOT / "tools/bench_links.py"), "--json"]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures: dict[str, float] = {}
    for row in rows:
        figures[f"links_c{row['open']}_round_trips_per_second"] = row["round_trips_per_second"]
        figures[f"links_c{row['open']}_p50_ms"] = row["p50_ms"]
    return figures


def runtime() -> dict[str, float]:
    """Measure the runtime by itself, in a process of its own: torch keeps what it was given of the machine."""
    command = [sys.executable, str(ROOT / "tools/bench_runtime.py"), "--json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output[output.index("{") :])
    return figures


def path(name: str, folder: Path, store: list[str], seconds: int) -> dict[str, float]:
    """Measure the path without a model on one store."""
    figures: dict[str, float] = {}
    with three_roles(folder, store) as (machine, roles):
        load(machine, 16, 2)  # warm-up: imports, caches, the first WAL pages
        key: str | None = None
        for connections, keyed in ((1, False), (64, False), (1, True), (64, True)):
            if keyed and key is None:
                key = make_key(machine, store)
                load(machine, 16, 6, key)  # the gateway learns that there are keys
            before = cpu_seconds(roles)
            found = load(machine, connections, seconds, key)
            used = {role: after - before[role] for role, after in cpu_seconds(roles).items()}
            prefix = f"{name}{'_keys' if keyed else ''}_c{connections}"
            figures[f"{prefix}_jobs_per_second"] = found["requests"] / found["seconds"]
            figures[f"{prefix}_p50_ms"] = found["p50_ms"]
            figures[f"{prefix}_p99_ms"] = found["p99_ms"]
            figures[f"{prefix}_failed"] = found["failed"]
            for role, cpu in used.items():
                figures[f"{prefix}_{role}_cpu_ms_per_job"] = cpu * 1e3 / found["requests"]
    return figures


@contextlib.contextmanager
def three_roles(folder: Path, store: list[str]) -> Iterator[tuple[Machine, dict[str, Process]]]:
    """Run a gateway, an orchestrator and a worker with the scripted engine."""
    # What the processes said is for tests that failed.
    with contextlib.redirect_stderr(io.StringIO()), Machine(folder / "machine") as machine:
        roles = {
            "gateway": machine.start("gateway"),
            "orchestrator": machine.start("orchestrator", *store),
            "worker": machine.start("worker", **machine.scripted(slots=256)),
        }
        machine.wait_ready(*roles.values())
        yield machine, roles


def make_key(machine: Machine, store: list[str]) -> str:
    """Make a tenant with limits that are far away, and return a key of it."""
    limits = [f"--{unit}-per-{window}={10**9}" for unit in ("requests", "tokens") for window in ("minute", "day")]
    machine.run("tenants", "create", "bench", *limits, *store)
    return machine.run("keys", "create", "--tenant", "bench", *store).stdout.strip()


def load(machine: Machine, connections: int, seconds: int, key: str | None = None) -> dict[str, float]:
    """Let wrk ask for so long, and return what it measured."""
    wrk = shutil.which("wrk")
    if wrk is None:
        sys.exit("error: the load comes from wrk; `make bench` installs it")
    command = [
        wrk,
        "-t1",
        f"-c{connections}",
        f"-d{seconds}",
        "-s",
        str(ROOT / "tools/bench_infer.lua"),
        f"{machine.url}/infer",
    ]
    environment = {**os.environ, **({"TETHER_BENCH_KEY": key} if key is not None else {})}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(output.split("RESULT ")[1])
    return found


def cpu_seconds(roles: dict[str, Process]) -> dict[str, float]:
    """Return the processor time that each role's process has used, without its children."""
    ticks = os.sysconf("SC_CLK_TCK")
    found = {}
    for role, process in roles.items():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        found[role] = (int(fields[11]) + int(fields[12])) / ticks
    return found


def report(figures: dict[str, float]) -> None:
    """Print the figures beside their goals and the last run's, and keep them."""
    RESULTS.mkdir(exist_ok=True)
    latest, previous = RESULTS / "latest.json", RESULTS / "previous.json"
    before: dict[str, float] = json.loads(latest.read_text())["figures"] if latest.exists() else {}
    if latest.exists():
        latest.replace(previous)
    document = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cores": os.cpu_count(), "figures": figures}
    latest.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{'figure':48} {'value':>10} {'goal':>10} {'to last':>9}")
    for name, value in figures.items():
        bound, more = GOALS.get(name, (None, False))
        goal = "" if bound is None else f"{'>=' if more else '<='} {bound:g}"
        ratio = f"x {value / before[name]:.2f}" if before.get(name) else ""
        met = "" if bound is None else ("  met" if (value >= bound if more else value <= bound) else "  MISSED")
        print(f"{name:48} {value:10.2f} {goal:>10} {ratio:>9}{met}")
    print(f"\nwritten to {latest.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
