"""The store's nodes, orchestrators and gateways that die under load, one network of real processes on three rqlited.

Clients of three kinds ask one thing after another meanwhile; afterwards what they were told is held against the store:
each accepted job has ended once and whole, and the counters of the tenant's limits are what its jobs used.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.clients import COMPLETED, QUICK_WHOLE, Load, Told, ask, check_ledger, limit, query, words
from tests.ports import free_port
from tests.processes import Machine, Process, eventually
from tests.rqlited import Cluster, running_cluster
from tether.store import open_store

pytestmark = pytest.mark.rqlite

REFUSED_WITHIN_SECONDS = 30.0
"""A write may wait for the one before it, and each has the store's deadline; with room for a busy machine."""
LOST_GATEWAY_SECONDS = 6.0
NAMES = ("first", "second")


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
            options = ["--listen", self.listen[name], "--store", self.store_url]
            options += ["--lost-gateway", str(LOST_GATEWAY_SECONDS)]
            self._start(f"orchestrator {name}", "orchestrator", *options)
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
        return query(self.store, sql, **params)

    def limit(self, tenant: str) -> None:
        limit(self.store, tenant)

    def status_of(self, job_id: str) -> str:
        (row,) = self.query("SELECT status FROM jobs WHERE id = :id", id=job_id)
        return str(row["status"])

    def check(self, tenant: str, accepted: set[str], *, ended: frozenset[str] = COMPLETED) -> None:
        """See `check_ledger`."""
        check_ledger(self.store, tenant, accepted, ended=ended)


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
def clients() -> Iterator[ThreadPoolExecutor]:
    """Threads for clients that wait."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        yield pool


@pytest.fixture
def network(started: Network, cluster: Cluster, clients: ThreadPoolExecutor) -> Iterator[Network]:
    """The network with all of its processes, whatever the test before it did; its end comes before that of its clients."""
    del clients
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
def test_a_store_that_loses_one_node_of_three_goes_on_and_loses_nothing(
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
    if harm == "leader frozen":  # two hosts that do not answer may use up the time that a write has
        assert {each.code for each in load.refused} <= {"store_unavailable"}
    else:
        assert not load.refused
    assert {told.text for told in load.answered if told.kind != "left"} == {QUICK_WHOLE}
    network.check(tenant, {told.job_id for told in load.answered})
    print(f"\n{harm}: {len(load.told)} jobs, longest {max(told.seconds for told in load.told):.1f} s")  # noqa: T201


def told(futures: list[Future[Told]]) -> list[Told]:
    return [future.result(timeout=90) for future in futures]


def test_without_its_majority_what_is_new_is_refused_and_what_runs_ends_when_it_is_back(
    network: Network, cluster: Cluster, clients: ThreadPoolExecutor
) -> None:
    network.limit("majority")
    first, second = network.https.values()
    script = "tokens=60 every=0.05"
    running = [clients.submit(ask, http, "majority", "stream", script) for http in (first, second)]
    left = ask(first, "majority", "left", script)
    running_jobs = "SELECT count(*) AS n FROM jobs WHERE tenant_id = 'majority' AND status = 'running'"
    eventually(lambda: network.query(running_jobs)[0]["n"] == 3, what="the jobs run")
    lost = cluster.followers
    cluster.kill(*lost)
    begun = time.monotonic()
    refused = told(
        [
            clients.submit(ask, http, "majority", kind)
            for http in (first, second)
            for kind in ("plain", "stream", "left")
        ]
    )
    assert {each.code for each in refused} == {"store_unavailable"}
    at_once = [each for each in refused if each.kind != "stream"]  # one that was kept alive meanwhile ends in an error
    assert all(each.status == 503 and int(each.retry_after) >= 1 for each in at_once)
    assert time.monotonic() - begun < REFUSED_WITHIN_SECONDS
    ready = first.get("/readyz")
    assert (ready.status_code, ready.json()["error"]["code"]) == (503, "store_unavailable")
    assert not any(future.done() for future in running), "an end is told that is not in the ledger"
    cluster.start(*lost)
    assert {each.text for each in told(running)} == {words(60)}
    eventually(lambda: ask(second, "majority", "plain").text == QUICK_WHOLE, what="jobs are taken again")
    eventually(lambda: network.status_of(left.job_id) == "completed")
    network.check("majority", {left.job_id, *(each.job_id for each in told(running))})


def test_an_orchestrator_that_is_killed_has_each_of_its_jobs_finished_once_by_the_other_one(
    network: Network, clients: ThreadPoolExecutor
) -> None:
    network.limit("takeover")
    script = "tokens=40 every=0.05"
    https = list(network.https.values())
    left = [ask(http, "takeover", "left", script).job_id for http in https * 2]
    futures = [
        clients.submit(ask, http, "takeover", kind, script) for http in https for kind in ("stream", "plain") * 2
    ]
    left += [ask(http, "takeover", "left", script).job_id for http in https * 4]
    with_all_kinds = """
        SELECT n.name FROM jobs AS j JOIN nodes AS n ON n.id = j.orchestrator_id
        WHERE j.tenant_id = 'takeover' AND j.status IN ('queued', 'running') GROUP BY n.name
        HAVING sum(NOT j.wait AND j.status = 'queued') AND sum(NOT j.wait AND j.status = 'running') AND sum(j.wait)
    """
    victim = eventually(lambda: network.query(with_all_kinds), what="an orchestrator with jobs of each kind")[0]["name"]
    network.processes[victim].kill()
    found = told(futures)
    assert {each.text for each in found} == {words(40)}
    network.check("takeover", {*left, *(each.job_id for each in found)})
    results = [network.query("SELECT result FROM jobs WHERE id = :id", id=job_id)[0]["result"] for job_id in left]
    assert set(results) == {words(40)}


def test_a_gateway_that_is_killed_leaves_what_others_can_fetch_and_nobody_works_for_clients_that_are_gone(
    network: Network, clients: ThreadPoolExecutor
) -> None:
    network.limit("gateways")
    script = "tokens=120 every=0.05"
    first, second = network.https.values()
    left = ask(first, "gateways", "left", script).job_id
    scripts = {"stream": script, "plain": "tokens=800 every=0.05"}
    cut = [clients.submit(ask, first, "gateways", kind, text) for kind, text in scripts.items()]
    waiting = "SELECT id, stream FROM jobs WHERE tenant_id = 'gateways' AND wait = 1 AND status = 'running'"
    eventually(lambda: len(network.query(waiting)) == 2, what="both jobs run")
    ids = {bool(row["stream"]): str(row["id"]) for row in network.query(waiting)}
    network.processes["gateway first"].kill()
    for future in cut:
        with pytest.raises(httpx.TransportError):
            future.result(timeout=90)
    with second.stream("GET", f"/v1/jobs/{ids[True]}/stream") as answer:
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    assert "".join(event["text"] for event in events if event["type"] == "tokens") == words(120)
    eventually(lambda: second.get(f"/v1/jobs/{left}").json().get("result") == words(120), what="the result")
    eventually(lambda: network.status_of(ids[False]) == "cancelled", what="nobody works for it")
    cancelled = second.get(f"/v1/jobs/{ids[False]}").json()
    assert "its gateway was lost" in cancelled["error"]["message"]
    network.check("gateways", {left, *ids.values()}, ended=frozenset({"completed", "cancelled"}))


def test_after_a_power_cut_under_load_what_was_accepted_is_done_or_ended_and_nothing_stays_reserved(
    network: Network, cluster: Cluster
) -> None:
    network.limit("power")
    with Load(network.urls, "power") as load:
        load.wait_for_more(3)
        for process in network.processes.values():
            process.kill()
        cluster.kill(*range(len(cluster.nodes)))
    cluster.start()
    network.start()
    with Load(network.urls, "power") as after:
        after.wait_for_more(1)
    assert not after.refused
    accepted = {each.job_id for each in (*load.answered, *after.answered)}
    network.check("power", accepted, ended=frozenset({"completed", "cancelled"}))
    completed = {
        row["id"] for row in network.query("SELECT id FROM jobs WHERE tenant_id = 'power' AND status = 'completed'")
    }
    assert accepted <= completed, "only those were cancelled whose clients were cut off"
