"""The store's nodes, orchestrators and gateways that die under load, one network of real processes on three rqlited.

Clients of three kinds ask one thing after another meanwhile; afterwards what they were told is held against the store:
each accepted job has ended once and whole, and the counters of the tenant's limits are what its jobs used.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import httpx
import pytest

from tests.ports import free_port
from tests.processes import Machine, Process, eventually
from tests.rqlited import Cluster, running_cluster
from tether.database import Statement
from tether.store import open_store
from tether.tenant_store import TenantStore

pytestmark = pytest.mark.rqlite

QUICK, QUICK_WHOLE = "tokens=10 every=0.03", "".join(f"{number} " for number in range(10))
REFUSED_WITHIN_SECONDS = 30.0
"""A write may wait for the one before it, and each has the store's deadline; with room for a busy machine."""
NAMES = ("first", "second")


class Told(NamedTuple):
    """What a client was told of one job."""

    kind: str
    status: int
    """Of HTTP; 0 where the connection was cut."""
    job_id: str = ""
    text: str = ""
    code: str = ""
    retry_after: str = ""
    seconds: float = 0.0


class Load:
    """Clients that ask one thing after another: streams, whole answers, and jobs that nobody waits for."""

    def __init__(self, urls: list[str], tenant: str, num_clients: int = 6) -> None:
        self.told: list[Told] = []
        self._tenant = tenant
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(urls[number % len(urls)], number), daemon=True)
            for number in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=90) as http:
            while not self._stop.is_set():
                kind = ("stream", "plain", "left")[number % 3]
                begun = time.monotonic()
                try:
                    told = ask(http, self._tenant, kind)
                except httpx.TransportError:
                    told = Told(kind, 0)
                    self._stop.wait(0.1)
                self.told.append(told._replace(seconds=time.monotonic() - begun))
                if kind == "left" or told.status != 200:
                    self._stop.wait(0.2)

    @property
    def answered(self) -> list[Told]:
        return [told for told in self.told if told.status in {200, 202}]

    @property
    def refused(self) -> list[Told]:
        return [told for told in self.told if told.status not in {200, 202}]

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more jobs were answered, by each kind of client."""
        before = len(self.told)

        def enough() -> bool:
            kinds = [told.kind for told in self.told[before:] if told.status in {200, 202}]
            return all(kinds.count(kind) >= number for kind in ("stream", "plain", "left"))

        eventually(enough, what=f"{number} more answers of each kind")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a client hangs"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def ask(http: httpx.Client, tenant: str, kind: str, text: str = QUICK, **fields: object) -> Told:
    """Ask for an answer and return what was told; raise where the connection is cut."""
    body = {"tenantId": tenant, "modelId": "demo", "version": "1.0", "input": text, **fields}
    if kind == "left":
        body["wait"] = False
    if kind != "stream":
        return told_of(kind, http.post("/infer", json=body))
    body["stream"] = True
    with http.stream("POST", "/infer", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return told_of(kind, answer)
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    end = events[-1]
    if end["type"] != "end":
        return Told(kind, 500, end.get("jobId", ""), code=end.get("error", {}).get("code", str(end)))
    pieces = "".join(event["text"] for event in events if event["type"] == "tokens")
    return Told(kind, 200, end["jobId"], pieces)


def told_of(kind: str, answer: httpx.Response) -> Told:
    body = answer.json()
    retry_after = answer.headers.get("retry-after", "")
    if "error" in body:
        return Told(kind, answer.status_code, "", "", body["error"]["code"], retry_after)
    return Told(kind, answer.status_code, body["jobId"], body.get("result") or "")


class Network:
    """Two gateways, two orchestrators and two workers with the scripted runtime."""

    def __init__(self, machine: Machine, store_url: str) -> None:
        self.machine = machine
        self.store_url = store_url
        self.ports = {name: free_port() for name in NAMES}
        self.listen = {name: f"/ip4/127.0.0.1/tcp/{free_port()}" for name in NAMES}
        self.processes: dict[str, Process] = {}
        self.store = open_store(store_url)
        self.https = {name: httpx.Client(base_url=self.url(name), timeout=90) for name in NAMES}

    def close(self) -> None:
        self.store.close()
        for http in self.https.values():
            http.close()

    def url(self, gateway: str) -> str:
        return f"http://127.0.0.1:{self.ports[gateway]}"

    @property
    def urls(self) -> list[str]:
        return [self.url(name) for name in NAMES]

    def start(self) -> None:
        """Start what is not running, all at once, and wait until everybody is linked to everybody."""
        for name in NAMES:
            self._start(
                f"orchestrator {name}", "orchestrator", "--listen", self.listen[name], "--store", self.store_url
            )
            self._start(f"gateway {name}", "gateway", "--port", str(self.ports[name]))
            self._start(f"worker {name}", "worker", **self.machine.scripted())
        for name in NAMES:
            eventually(lambda: self.is_ready(name), what=f"{name} gateway ready")  # noqa: B023
            eventually(lambda: self.num_workers_linked(name) == 2, what=f"links of {name} orchestrator")  # noqa: B023

    def _start(self, name: str, role: str, *arguments: str, **environment: str) -> None:
        if name not in self.processes or not self.processes[name].is_alive:
            process = self.machine.start(role, "-v", "--name", name, *arguments, **environment)
            self.processes[name] = process

    def is_ready(self, gateway: str) -> bool:
        for process in self.processes.values():
            assert process.is_alive, process.output
        try:
            ready = self.https[gateway].get("/readyz")
        except httpx.TransportError:
            return False
        orchestrators = self.processes[f"gateway {gateway}"].output
        return (
            ready.status_code == 200
            and ready.json()["ready_workers"] == 2
            and all(f"link up: orchestrator {name} " in orchestrators for name in NAMES)
        )

    def num_workers_linked(self, orchestrator: str) -> int:
        output = self.processes[f"orchestrator {orchestrator}"].output
        return sum(f"link up: worker {name} " in output for name in NAMES)

    def holder(self, job_id: str) -> str:
        """Return the name of the process that holds a job."""
        (row,) = self.query("SELECT orchestrator_id FROM jobs WHERE id = :id", id=job_id)
        (node,) = self.query(
            "SELECT name FROM nodes WHERE id = :id AND role = 'orchestrator'", id=row["orchestrator_id"]
        )
        return str(node["name"])

    def query(self, sql: str, **params: str) -> list[dict[str, Any]]:
        return [dict(row) for row in self.store._database.query(Statement(sql, params), settled=True)]

    def limit(self, tenant: str) -> None:
        """Give a tenant limits that it will not reach, so that it is counted."""
        TenantStore(self.store).set_tenant(
            tenant, requests_per_day=100_000, tokens_per_day=10_000_000, jobs_at_once=10_000
        )

    def status_of(self, job_id: str) -> str:
        (row,) = self.query("SELECT status FROM jobs WHERE id = :id", id=job_id)
        return str(row["status"])

    def check(self, tenant: str, accepted: set[str], *, ended: frozenset[str] = frozenset({"completed"})) -> None:
        """Hold the store against what was accepted, once everything has ended."""
        live = "SELECT count(*) AS n FROM jobs WHERE tenant_id = :tenant AND status IN ('queued', 'running')"
        eventually(lambda: self.query(live, tenant=tenant)[0]["n"] == 0, what="the ends of all jobs")
        jobs = {row["id"]: row for row in self.query("SELECT * FROM jobs WHERE tenant_id = :tenant", tenant=tenant)}
        assert accepted <= jobs.keys()
        others = {
            job_id: (row["status"], row["error_code"]) for job_id, row in jobs.items() if row["status"] not in ended
        }
        assert not others.keys() & accepted, {job_id: others[job_id] for job_id in others.keys() & accepted}
        # An admission whose answer was lost was refused, and taken back when the store could be reached again.
        assert {code for _, code in others.values()} <= {"store_unavailable"}, others
        running = "SELECT count(*) AS n FROM attempts WHERE status = 'running'"
        assert self.query(running)[0]["n"] == 0, "a slot is still reserved"
        counters = {
            row["unit"]: (row["used"], row["reserved"])
            for row in self.query(
                "SELECT unit, sum(used) AS used, sum(reserved) AS reserved FROM quota_counters "
                "WHERE tenant_id = :tenant AND window_seconds = 86400 GROUP BY unit",
                tenant=tenant,
            )
        }
        kept = [row for row in jobs.values() if row["id"] not in others]
        used = sum(row["prompt_tokens"] + row["completion_tokens"] for row in jobs.values())
        assert counters == {"requests": (len(kept), 0), "tokens": (used, 0)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("rqlited")) as found:
        yield found


@pytest.fixture(scope="module")
def started(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    with machine, contextlib.closing(Network(machine, cluster.url)) as network:
        yield network


@pytest.fixture
def network(started: Network, cluster: Cluster) -> Iterator[Network]:
    """The network with all of its processes, whatever the test before it did."""
    started.start()
    yield started
    for number, node in enumerate(cluster.nodes):
        node.thaw()
        if not node.is_running:
            cluster.start(number)


def lose(cluster: Cluster, harm: str) -> int:
    """Do harm to a node of the cluster; return its number."""
    which, what = harm.split(" ")
    number = cluster.leader if which == "leader" else cluster.followers[0]
    (cluster.kill if what == "killed" else cluster.freeze)(number)
    return number


@pytest.mark.parametrize("harm", ["follower killed", "leader killed", "leader frozen"])
def test_a_store_that_loses_one_node_of_three_refuses_nobody_and_loses_nothing(
    network: Network, cluster: Cluster, harm: str
) -> None:
    tenant = harm.replace(" ", "-")
    network.limit(tenant)
    with Load(network.urls, tenant) as load:
        load.wait_for_more(2)
        number = lose(cluster, harm)
        load.wait_for_more(2)
        if harm == "leader frozen":
            cluster.thaw(number)
        else:
            cluster.start(number)
        load.wait_for_more(2)
    assert not load.refused
    assert {told.text for told in load.answered if told.kind != "left"} == {QUICK_WHOLE}
    network.check(tenant, {told.job_id for told in load.answered})
    print(f"\n{harm}: {len(load.told)} jobs, longest {max(told.seconds for told in load.told):.1f} s")  # noqa: T201
