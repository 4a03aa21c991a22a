"""Orchestrators that back each other up, and workers that leave in good order, as real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.acceptance.test_failures import SCRIPT, WHOLE, Client, up, worker_of
from tests.ports import free_port
from tests.processes import Machine, Process, eventually


@pytest.fixture(params=["killed", "frozen"])
def harm(request: pytest.FixtureRequest) -> signal.Signals:
    return {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}[request.param]


class Network:
    """A gateway, two orchestrators and two workers with the scripted runtime."""

    def __init__(self, machine: Machine, *arguments: str) -> None:
        self.machine = machine
        self.gateway = machine.start("gateway")
        self.orchestrators: list[Process] = []
        for name in ("first", "second"):
            listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
            process = machine.start("orchestrator", "--name", name, "--listen", listen, *arguments)
            process.wait_for("Ready.")
            self.orchestrators.append(process)
        self.workers = {
            name: machine.start("worker", "--name", name, *arguments, **machine.scripted()) for name in ("one", "two")
        }
        eventually(lambda: up(machine))
        eventually(lambda: self.num_linked("first") == self.num_linked("second") == 3, what="links of everybody")

    def num_linked(self, name: str) -> int:
        """How many peers of other roles have a link to an orchestrator."""
        process = self.orchestrators[0 if name == "first" else 1]
        return sum(process.output.count(f"link up: {peer} ") for peer in ("one", "two")) + self.has_gateway(process)

    @staticmethod
    def has_gateway(process: Process) -> bool:
        return "(gateway)" in process.output

    def holder(self, job_id: str) -> Process:
        """Return the orchestrator that holds a job."""
        nodes = {node["id"]: node["name"] for node in self.machine.read("status")["nodes"]}
        job = self.machine.read("jobs", "show", job_id)["job"]
        return self.orchestrators[0 if nodes[job["orchestrator_id"]] == "first" else 1]


@pytest.fixture
def start(machine: Machine) -> Callable[..., Network]:
    return lambda *arguments: Network(machine, "-v", *arguments)


class TimedClient(Client):
    """A client that knows how long the longest pause between two tokens was."""

    def __init__(self, machine: Machine, text: str, **fields: object) -> None:
        self.longest = 0.0
        super().__init__(machine, text, **fields)

    def watch(self) -> None:
        count, at = len(self.tokens), time.monotonic()
        while self.is_alive():
            if (now := len(self.tokens)) != count:
                count, at = now, time.monotonic()
            self.longest = max(self.longest, time.monotonic() - at)
            time.sleep(0.01)


def job_id_of(client: Client) -> str:
    eventually(lambda: any("jobId" in event for event in client.events))
    return str(next(event["jobId"] for event in client.events if "jobId" in event))


def test_an_orchestrator_that_is_killed_or_frozen_costs_its_clients_a_pause_and_others_finish_its_jobs(
    machine: Machine, start: Callable[..., Network], harm: signal.Signals
) -> None:
    network = start()
    clients = [TimedClient(machine, SCRIPT) for _ in range(2)]
    alone = [machine.infer(SCRIPT, wait=False).json()["jobId"] for _ in range(2)]
    for client in clients:
        client.wait_for_tokens(5)
    lost = network.holder(job_id_of(clients[0]))
    lost.send(harm)
    clients[0].watch()
    for client in clients:
        client.expect_whole()
    # Each token takes 0.05 s; the bounds leave room for a machine that is busy with other tests.
    assert clients[0].longest < (2.5 if harm is signal.SIGKILL else 5.5)
    for job_id in alone:
        eventually(lambda: machine.http.get(f"/v1/jobs/{job_id}").json().get("result") == WHOLE)  # noqa: B023
    if harm is signal.SIGSTOP:
        lost.send(signal.SIGCONT)
        again = Client(machine, SCRIPT)
        again.expect_whole()
    counts = machine.read("status")["jobs"]
    assert (counts["queued"], counts["running"], counts["failed"]) == (0, 0, 0)
    print(f"\npause: {clients[0].longest:.2f} s ({harm.name})")  # noqa: T201


def test_an_orchestrator_that_stops_hands_its_jobs_over_without_a_failed_request(
    machine: Machine, start: Callable[..., Network]
) -> None:
    network = start("--grace", "0.5")
    client = TimedClient(machine, SCRIPT)
    alone = machine.infer(SCRIPT, wait=False).json()["jobId"]
    client.wait_for_tokens(5)
    assert network.holder(job_id_of(client)).stop() == 0
    client.expect_whole()
    assert machine.infer("tokens=3").json()["result"] == "0 1 2 "
    eventually(lambda: machine.http.get(f"/v1/jobs/{alone}").json().get("result") == WHOLE)


def test_a_worker_that_stops_hands_over_what_it_cannot_finish_in_time(
    machine: Machine, start: Callable[..., Network]
) -> None:
    network = start("--grace", "0.5")
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    assert worker_of(network.workers, client).stop(signal.SIGINT) == 130
    end = client.expect_whole()
    assert (end["attempts"], end["exact"]) == (2, True)
    attempts = machine.read("jobs", "show", end["jobId"])["attempts"]
    assert [attempt["error_code"] for attempt in attempts] == ["handed_over", None]


def test_a_drained_worker_takes_no_jobs_until_it_is_resumed(machine: Machine, start: Callable[..., Network]) -> None:
    start("--grace", "1")
    client = Client(machine, "tokens=160 every=0.05")
    client.wait_for_tokens(5)
    name = next(event["worker"] for event in client.events if event.get("type") == "started")
    other = "two" if name == "one" else "one"
    assert machine.run("workers", "drain", name).returncode == 0
    whole = "".join(f"{number} " for number in range(160))
    assert client.expect_whole(whole)["attempts"] == 2, "it goes on elsewhere after the grace time"
    listed = machine.run("workers", "list").stdout
    assert "drained" in listed
    assert {Client(machine, "tokens=2").finish()["type"] for _ in range(4)} == {"end"}
    jobs = machine.read("jobs", "list", "-n", "4")
    ids = {worker["name"]: worker["id"] for worker in machine.read("workers", "list")}
    assert {job["worker_id"] for job in jobs} == {ids[other]}
    assert machine.run("workers", "resume", name).returncode == 0
    assert "drained" not in machine.run("workers", "list").stdout
    failed = machine.run("workers", "drain", "nobody")
    assert (failed.returncode, "there is no worker 'nobody'" in failed.stderr) == (1, True)


def test_a_worker_outside_its_hours_is_paused_and_everybody_says_so_and_why(machine: Machine) -> None:
    now = time.localtime()
    hours = f"{(now.tm_hour + 3) % 24:02}:00-{(now.tm_hour + 4) % 24:02}:00"
    machine.start("orchestrator")
    machine.start("gateway")
    worker = machine.start("worker", "--hours", hours, **machine.scripted())
    worker.wait_for("Ready.")
    why = f"paused: outside {hours}"
    eventually(lambda: why in machine.run("workers", "list").stdout)
    assert why in machine.run("status").stdout
    assert [each["status"] for each in machine.read("workers", "list")] == ["paused"]
    eventually(lambda: up(machine))
    refused = eventually(lambda: answer if (answer := machine.infer("tokens=1")).status_code == 503 else None)
    counted = f"paused 1 (outside {hours})"
    for answer in (refused, machine.http.get("/readyz")):
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
        error = answer.json()["error"]
        assert (error["code"], error["reasons"]["paused"]) == ("no_worker", 1)
        assert counted in error["message"]
    explained = machine.run("explain", "--model", "demo", "--url", machine.url).stdout
    assert why in explained
    assert counted in explained
    for chat in (("chat", "demo"), ("chat",)):
        done = machine.run(*chat, "--url", machine.url)
        assert (done.returncode, counted in done.stderr) == (1, True), done.stderr


def test_a_job_that_takes_as_many_runtime_children_down_as_it_may_is_poison(machine: Machine) -> None:
    process = machine.start("up", "--max-attempts", "9", "--max-lost-workers", "2", **machine.scripted())
    process.wait_for("Ready.")
    answer = machine.infer("tokens=40 every=0.01 crash_at=5")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "poison")
    assert "2 workers went down" in answer.json()["error"]["message"]
    attempts = machine.read("jobs", "list")[0]["attempt"]
    assert attempts == 2
    assert machine.infer("tokens=3").json()["result"] == "0 1 2 "
