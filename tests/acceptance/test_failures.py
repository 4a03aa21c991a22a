"""What dies in the middle of an answer, and what the client sees: the whole answer, each token once."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.processes import Machine, Process, eventually
from tests.rqlited import running

SCRIPT = "tokens=40 every=0.05"
WHOLE = "".join(f"{number} " for number in range(40))


class Client(threading.Thread):
    """A client that streams an answer, so that the test can do harm meanwhile."""

    def __init__(self, machine: Machine, text: str, **fields: Any) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self._url = f"{machine.url}/infer"
        self._body = {
            "tenantId": "t", "modelId": "demo", "version": "1.0", "input": text, "stream": True, **fields
        }  # fmt: skip
        self.start()

    def run(self) -> None:
        with httpx.Client(timeout=60) as http, http.stream("POST", self._url, json=self._body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line.removeprefix("data: ")))

    @property
    def tokens(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("type") == "tokens"]

    def wait_for_tokens(self, number: int) -> None:
        eventually(lambda: len(self.tokens) >= number, what=f"{number} tokens")

    def finish(self) -> dict[str, Any]:
        """Wait for the end, and return it."""
        self.join(60)
        assert not self.is_alive(), self.events[-3:]
        return self.events[-1]

    def expect_whole(self, whole: str = WHOLE) -> dict[str, Any]:
        """Check that each token came once, in order, and all of them."""
        end = self.finish()
        assert end["type"] == "end", end
        assert end["result"] == "".join(event["text"] for event in self.tokens) == whole
        ids = [token for event in self.tokens for token in event["tokenIds"]]
        positions = [event["position"] for event in self.tokens]
        assert positions == sorted(set(positions))
        assert len(ids) >= len(self.tokens)
        return end


@pytest.fixture
def network(machine: Machine) -> dict[str, Process]:
    """A gateway, an orchestrator, and two workers with the scripted runtime."""
    roles = {role: machine.start(role) for role in ("gateway", "orchestrator")}
    for name in ("one", "two"):
        roles[name] = machine.start("worker", "--name", name, **machine.scripted())
    eventually(lambda: machine.http.get("/readyz").json().get("ready_workers") == 2 if up(machine) else False)
    return roles


def up(machine: Machine) -> bool:
    try:
        return machine.http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def worker_of(network: dict[str, Process], client: Client) -> Process:
    """Return the worker that the client's job runs on."""
    started = [event for event in client.events if event.get("type") == "started"]
    return network[started[-1]["worker"]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_frozen_in_mid_answer_costs_a_pause(
    machine: Machine, network: dict[str, Process], number: signal.Signals
) -> None:
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    worker_of(network, client).send(number)
    end = client.expect_whole()
    assert end["attempts"] == 2
    job = machine.read("jobs", "show", end["jobId"])
    assert [attempt["status"] for attempt in job["attempts"]] == ["lost", "completed"]


def test_a_frozen_worker_that_comes_back_does_no_harm(machine: Machine, network: dict[str, Process]) -> None:
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    worker = worker_of(network, client)
    worker.send(signal.SIGSTOP)
    client.expect_whole()
    worker.send(signal.SIGCONT)
    eventually(lambda: machine.http.get("/readyz").json()["ready_workers"] == 2)
    assert machine.infer("tokens=3").json()["result"] == "0 1 2 "


def test_a_runtime_child_that_is_killed_is_started_again_and_its_job_goes_on(machine: Machine) -> None:
    up = machine.start("up", **machine.scripted())
    up.wait_for("Ready.")
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    [child] = up.children
    child.kill()
    assert client.expect_whole()["attempts"] == 2
    assert [process.pid for process in up.children] != [child.pid]


def test_a_worker_that_stops_on_purpose_finishes_its_jobs_first(machine: Machine, network: dict[str, Process]) -> None:
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    worker = worker_of(network, client)
    assert worker.stop(signal.SIGINT) == 130
    assert client.expect_whole()["attempts"] == 1


def test_what_still_runs_after_the_grace_time_ends_with_an_error_of_its_own_form(machine: Machine) -> None:
    up = machine.start("up", "--grace", "1", **machine.scripted())
    up.wait_for("Ready.")
    client = Client(machine, "tokens=1000 every=0.05")
    client.wait_for_tokens(3)
    plain: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: plain.append(machine.infer("tokens=1000 every=0.05")))
    waiting.start()
    eventually(lambda: machine.http.get("/readyz").json()["running"] == 2)
    assert up.stop() == 0
    waiting.join(10)
    assert (plain[0].status_code, plain[0].json()["error"]["code"]) == (503, "draining")
    assert plain[0].headers["retry-after"]
    assert client.finish()["error"]["code"] == "draining"
    assert "Traceback" not in up.output


def test_an_orchestrator_that_is_killed_and_started_again_takes_its_jobs_up(
    machine: Machine, network: dict[str, Process]
) -> None:
    accepted = machine.infer(SCRIPT, wait=False).json()
    client = Client(machine, SCRIPT)
    client.wait_for_tokens(5)
    network["orchestrator"].kill()
    machine.start("orchestrator")
    client.expect_whole()
    eventually(lambda: machine.http.get(f"/v1/jobs/{accepted['jobId']}").json().get("result") == WHOLE)


def test_a_gateway_that_is_killed_leaves_results_that_can_be_fetched(
    machine: Machine, network: dict[str, Process]
) -> None:
    accepted = machine.infer(SCRIPT, wait=False).json()
    network["gateway"].kill()
    machine.start("gateway")
    eventually(lambda: up(machine))
    eventually(lambda: machine.http.get(f"/v1/jobs/{accepted['jobId']}").json().get("result") == WHOLE)


def test_a_store_that_is_away_refuses_new_jobs_and_writes_the_ends_when_it_is_back(
    machine: Machine, tmp_path: Path
) -> None:
    with running(tmp_path / "rqlited") as server:
        up = machine.start("up", "--store", server.url, **machine.scripted())
        up.wait_for("Ready.")
        client = Client(machine, SCRIPT)
        client.wait_for_tokens(5)
        server.freeze()
        client.wait_for_tokens(40)  # what runs goes on
        refused = machine.infer("tokens=1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.is_alive()  # its end is not in the ledger yet, so it is not told
        ready = machine.http.get("/readyz")
        assert (ready.status_code, ready.json()["error"]["code"]) == (503, "store_unavailable")
        server.thaw()
        client.expect_whole()
        eventually(lambda: machine.infer("tokens=1").status_code == 200)


def test_the_demo_model_goes_on_exactly_where_a_killed_runtime_stopped(machine: Machine) -> None:
    up = machine.start("up")
    up.wait_for("Ready.")
    question = "Tell me about Tether."
    for sampling in ({}, {"temperature": 0.8, "seed": 7}):
        whole = machine.infer(question, **sampling).json()["result"]
        client = Client(machine, question, **sampling)
        client.wait_for_tokens(10)
        [child] = up.children
        psutil.Process(child.pid).kill()
        assert client.expect_whole(whole)["attempts"] == 2
