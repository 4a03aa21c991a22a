"""`make bench`: what Tether costs without a model, in figures that can be compared with the last run's.

    start-up      `tether --help` as a process, and which heavy modules `import tether.cli` loads
    links         round trips a second over one link between two processes, with 1, 16, 64 and 256 open
    runtime       tokens a second of the batch against a bare loop and transformers' own batching (tools/bench_runtime.py)
    path          gateway, orchestrator and worker as three processes on loopback, every job durable, a scripted engine
                  that answers one token at once; the load comes from wrk, at 1 and at 64 open requests, for each store;
                  `keys`: the same with an API key and limits of requests and tokens, a minute and a day, in turns with it
    streams       500 open streams of 20 tokens a second, of `/infer` and of OpenAI's chat: how long a token is on its way
                  (tools/bench_streams.py), and each process's share of a core and memory

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

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.processes import Machine, Process  # noqa: E402 - a script of the repository, beside the tests' tools
from tests.rqlited import running  # noqa: E402
from tools.bench_runtime import GOALS as RUNTIME_GOALS  # noqa: E402

RESULTS = ROOT / "bench-results"
TURNS = 3
"""How often what is compared within a run takes turns: machines are slower at some moments than at others."""
NUM_STREAMS = 500
HEAVY = ("torch", "transformers", "libp2p", "fastapi", "trio", "uvicorn")

# What each figure must reach: (name, bound, whether more is better). A bench reports; it never fails a build.
GOALS: dict[str, tuple[float, bool]] = {
    "help_ms": (250.0, False),
    "sqlite_c1_p50_ms": (10.0, False),
    "rqlite_c1_p50_ms": (15.0, False),
    "sqlite_c64_jobs_per_second": (300.0, True),
    "sqlite_keys_c1_p50_ms": (8.0, False),
    "sqlite_keys_c64_jobs_per_second": (450.0, True),
    "rqlite_c64_jobs_per_second": (450.0, True),
    "rqlite_keys_c64_jobs_per_second": (450.0, True),
    "sqlite_keys_to_without_c64": (0.85, True),
    "rqlite_keys_to_without_c64": (0.85, True),
    "streams_infer_p99_ms": (100.0, False),
    "streams_infer_missing": (0.0, False),
    "streams_chat_p99_ms": (100.0, False),
    "streams_chat_missing": (0.0, False),
    **{name: (bound, True) for name, bound in RUNTIME_GOALS.items()},
}


def main() -> None:
    """Run the benchmarks that were asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="how long each load lasts")
    parser.add_argument(
        "--only", choices=("start-up", "links", "sqlite", "rqlite", "streams", "runtime"), help="just this part"
    )
    options = parser.parse_args()
    figures: dict[str, float] = {}
    if options.only in {None, "start-up"}:
        figures |= start_up()
    if options.only in {None, "links"}:
        figures |= links()
    if options.only in {None, "sqlite"}:
        with tempfile.TemporaryDirectory() as folder:
            figures |= path("sqlite", Path(folder), ([], []), options.seconds)
    if options.only in {None, "rqlite"}:
        with (
            tempfile.TemporaryDirectory() as folder,
            running(Path(folder) / "one") as one,
            running(Path(folder) / "other") as other,
        ):
            stores = ["--store", one.url], ["--store", other.url]
            figures |= path("rqlite", Path(folder), stores, options.seconds)
    if options.only in {None, "streams"}:
        with tempfile.TemporaryDirectory() as folder:
            figures |= streams(Path(folder), options.seconds)
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


def path(name: str, folder: Path, stores: tuple[list[str], list[str]], seconds: int) -> dict[str, float]:
    """Measure the path without a model on one kind of store: without keys and with them, in turns."""
    figures: dict[str, float] = {}
    # From the first key on nobody gets in without one, so what has keys is a network of its own.
    with three_roles(folder / "plain", stores[0]) as plain, three_roles(folder / "keyed", stores[1]) as keyed:
        load(plain[0], 16, 2)  # warm-up: imports, caches, the first WAL pages
        key = make_key(keyed[0], stores[1])
        load(keyed[0], 16, 6, key)  # the gateway learns that there are keys
        for connections in (1, 64):
            turns: dict[str, list[dict[str, float]]] = {"": [], "_keys": []}
            for _ in range(TURNS):
                turns[""].append(measure(*plain, connections, max(1, seconds // TURNS), None))
                turns["_keys"].append(measure(*keyed, connections, max(1, seconds // TURNS), key))
            for suffix, found in turns.items():
                for figure in found[0]:
                    figures[f"{name}{suffix}_c{connections}_{figure}"] = statistics.mean(each[figure] for each in found)
            speed = f"c{connections}_jobs_per_second"
            figures[f"{name}_keys_to_without_c{connections}"] = (
                figures[f"{name}_keys_{speed}"] / figures[f"{name}_{speed}"]
            )
    return figures


def measure(
    machine: Machine, roles: dict[str, Process], connections: int, seconds: int, key: str | None
) -> dict[str, float]:
    """Return what wrk sees under one load, and the processor time that each role spends on a job."""
    before = cpu_seconds(roles)
    found = load(machine, connections, seconds, key)
    after = cpu_seconds(roles)
    return {
        "jobs_per_second": found["requests"] / found["seconds"],
        **{figure: found[figure] for figure in ("p50_ms", "p99_ms", "failed")},
        **{f"{role}_cpu_ms_per_job": (after[role] - before[role]) * 1e3 / found["requests"] for role in roles},
    }


def streams(folder: Path, seconds: int) -> dict[str, float]:
    """Measure how long tokens are on their way while many streams are open, and what that takes of the machine."""
    figures: dict[str, float] = {}
    for dialect, chosen in (("infer", []), ("chat", ["--chat"])):
        with three_roles(folder / dialect, [], slots=NUM_STREAMS + 12) as (machine, roles):
            load(machine, 16, 2)
            begin, before, began = memory_mib(roles), cpu_seconds(roles, with_children=True), time.monotonic()
            command = [
                sys.executable,
                str(ROOT / "tools/bench_streams.py"),
                machine.url,
                str(NUM_STREAMS),
                str(seconds),
            ]
            output = subprocess.run([*command, *chosen], check=True, stdout=subprocess.PIPE, text=True).stdout
            after, end, lasted = cpu_seconds(roles, with_children=True), memory_mib(roles), time.monotonic() - began
        figures |= {f"streams_{dialect}_{figure}": value for figure, value in json.loads(output).items()}
        for role in roles:
            name = f"streams_{dialect}_{role}"
            figures[f"{name}_cpu_percent"] = (after[role] - before[role]) / lasted * 100
            figures[f"{name}_mib_at_start"], figures[f"{name}_mib_at_end"] = begin[role], end[role]
    return figures


@contextlib.contextmanager
def three_roles(folder: Path, store: list[str], slots: int = 256) -> Iterator[tuple[Machine, dict[str, Process]]]:
    """Run a gateway, an orchestrator and a worker with the scripted engine."""
    # What the processes said is for tests that failed.
    with contextlib.redirect_stderr(io.StringIO()), Machine(folder / "machine") as machine:
        roles = {
            "gateway": machine.start("gateway"),
            "orchestrator": machine.start("orchestrator", *store),
            "worker": machine.start("worker", **machine.scripted(slots=slots)),
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


def cpu_seconds(roles: dict[str, Process], *, with_children: bool = False) -> dict[str, float]:
    """Return the processor time that each role's process has used, with or without its children."""
    found = {}
    for role, process in roles.items():
        processes = [psutil.Process(process.pid), *(process.children if with_children else [])]
        found[role] = sum(sum(each.cpu_times()[:2]) for each in processes)
    return found


def memory_mib(roles: dict[str, Process]) -> dict[str, float]:
    """Return the resident memory of each role's process and of its children."""
    return {
        role: sum(each.memory_info().rss for each in (psutil.Process(process.pid), *process.children)) / 2**20
        for role, process in roles.items()
    }


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
