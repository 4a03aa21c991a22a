"""A question typed into curl comes back answered by a real model, however the roles are started."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import ANSWER, QUESTION, Machine, eventually
from tests.rqlited import Rqlited


def curl(machine: Machine, body: str) -> str:
    """Type the README's command."""
    command = ["curl", "-sS", "-X", "POST", f"{machine.url}/infer", "-H", "Content-Type: application/json", "-d", body]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def ask(machine: Machine) -> dict[str, object]:
    body = {"tenantId": "demo-tenant", "modelId": "demo", "version": "1.0", "input": QUESTION}
    answer: dict[str, object] = json.loads(curl(machine, json.dumps(body)))
    assert answer["result"] == ANSWER, answer
    return answer


def test_up_answers_a_question_and_the_commands_show_what_happened(machine: Machine) -> None:
    up = machine.start("up")
    up.wait_for("Ready.")
    assert "demo is a toy" in up.output
    runtimes = up.children
    assert runtimes

    answer = ask(machine)

    [job] = machine.read("jobs", "list")
    assert (job["id"], job["status"], job["tenant_id"]) == (answer["jobId"], "completed", "demo-tenant")
    shown = machine.read("jobs", "show", job["id"])
    assert (shown["job"]["input"], shown["job"]["result"]) == (QUESTION, ANSWER)
    assert [attempt["status"] for attempt in shown["attempts"]] == ["completed"]
    assert machine.read("jobs", "show", job["id"][:12])["job"]["id"] == job["id"]
    [worker] = machine.read("workers", "list")
    assert (worker["status"], worker["models"][0]["name"], worker["models"][0]["toy"]) == ("ready", "demo", True)
    demo = next(model for model in machine.read("models", "list") if model["name"] == "demo")
    assert (demo["workers"], demo["toy"]) == (1, True)
    status = machine.read("status")
    assert {node["role"] for node in status["nodes"]} == {"gateway", "orchestrator"}
    assert status["jobs"]["completed"] == 1
    for command in (["jobs", "list"], ["jobs", "show", job["id"]], ["workers", "list"], ["models", "list"], ["status"]):
        table = machine.run(*command)
        assert (table.returncode, table.stderr) == (0, "")
        assert "demo" in table.stdout

    started = time.monotonic()
    assert up.stop(signal.SIGINT) == 130
    assert time.monotonic() - started < 10
    eventually(lambda: not any(map(psutil.Process.is_running, runtimes)), seconds=10, what="the runtime child ends too")


@pytest.mark.parametrize("order", [("gateway", "orchestrator", "worker"), ("worker", "gateway", "orchestrator")])
def test_three_roles_in_three_terminals_need_no_flag_and_no_order(machine: Machine, order: tuple[str, ...]) -> None:
    roles = {role: machine.start(role, *(["--model", "demo"] if role == "worker" else [])) for role in order}
    machine.wait_ready(*roles.values())
    answer = ask(machine)
    job = machine.http.get(f"/v1/jobs/{answer['jobId']}").json()
    assert (job["status"], job["result"]) == ("completed", ANSWER)
    for role in ("worker", "orchestrator", "gateway"):
        assert roles[role].stop() == 0, roles[role].output


def test_the_same_network_runs_on_a_real_rqlited(machine: Machine, rqlited: Rqlited) -> None:
    store = ("--store", rqlited.url)
    roles = [machine.start("gateway", *store), machine.start("orchestrator", *store), machine.start("worker")]
    machine.wait_ready(*roles)
    answer = ask(machine)
    assert machine.http.get(f"/v1/jobs/{answer['jobId']}").json()["result"] == ANSWER
    assert machine.read("jobs", "show", str(answer["jobId"]), *store)["job"]["result"] == ANSWER
    assert not (machine.data_dir / "tether.db").exists()


def test_a_machine_that_was_invited_lends_its_worker(machine: Machine, tmp_path: Path) -> None:
    roles = [machine.start("gateway"), machine.start("orchestrator")]
    roles[1].wait_for("Ready.")
    invite = machine.run("invite", "create", "--role", "worker", "--ttl", "1h")
    assert invite.returncode == 0
    assert "works only here" in invite.stderr

    with Machine(tmp_path / "other") as other:
        joined = other.run("join", invite.stdout.strip())
        assert joined.returncode == 0, joined.stderr
        assert "tether worker" in joined.stdout
        assert not (other.data_dir / "network.key").exists()
        roles.append(other.start("worker", "--name", "laptop"))
        machine.wait_ready(*roles)
        ask(machine)
        assert [worker["name"] for worker in machine.read("workers", "list")] == ["laptop"]

        refused = other.run("gateway")
        assert refused.returncode == 1
        assert "--role gateway" in refused.stderr


def test_a_stranger_is_told_that_it_is_no_member_and_disturbs_nobody(machine: Machine, tmp_path: Path) -> None:
    up = machine.start("up", **machine.scripted())
    up.wait_for(f"orchestrator  {machine.listen}")
    [address] = {word for word in up.output.split() if word.startswith(machine.listen)}
    with Machine(tmp_path / "founder") as founder, Machine(tmp_path / "stranger") as stranger:
        invite = founder.run("invite", "create", "--address", address)
        assert stranger.run("join", invite.stdout.strip()).returncode == 0
        worker = stranger.start("worker", **stranger.scripted())
        worker.wait_for("does not let this node in")
        assert worker.is_alive
        assert machine.infer("tokens=3").json()["result"] == "0 1 2 "
        assert len(machine.read("workers", "list")) == 1
        assert worker.stop(signal.SIGINT) == 130


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A gateway, an orchestrator and a worker with the scripted runtime, for tests that leave them as they were."""
    with Machine(tmp_path_factory.mktemp("three")) as machine:
        machine.wait_ready(
            *[machine.start(role, **machine.scripted()) for role in ("gateway", "orchestrator", "worker")]
        )
        yield machine


def test_readyz_says_what_is_missing(machine: Machine) -> None:
    gateway = machine.start("gateway")
    gateway.wait_for("Ready.")

    def missing() -> tuple[int, str]:
        answer = machine.http.get("/readyz")
        assert answer.status_code == 200 or answer.headers["retry-after"]
        return answer.status_code, answer.json().get("error", {}).get("code", "")

    assert machine.http.get("/healthz").json()["status"] == "ok"
    assert missing() == (503, "no_orchestrator")
    assert machine.infer().status_code == 503
    orchestrator = machine.start("orchestrator")
    eventually(lambda: missing() == (503, "no_worker"))
    worker = machine.start("worker", **machine.scripted())
    eventually(lambda: missing() == (200, ""))
    worker.kill()
    eventually(lambda: missing() == (503, "no_worker"), seconds=10)
    assert machine.infer().json()["error"]["code"] == "no_worker"
    orchestrator.kill()
    eventually(lambda: missing() == (503, "no_orchestrator"), seconds=10)


def test_a_stream_tells_each_token_when_it_exists(three: Machine) -> None:
    body = {"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=5 every=0.2", "stream": True}
    events, times = [], []
    with three.http.stream("POST", "/infer", json=body, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                times.append(time.monotonic())
    assert [event["type"] for event in events] == ["started", *["tokens"] * 5, "end"]
    assert "".join(event["text"] for event in events[1:-1]) == events[-1]["result"] == "0 1 2 3 4 "
    assert [event["position"] for event in events[1:-1]] == [0, 1, 2, 3, 4]
    assert times[-2] - times[1] > 0.5  # they came one by one, not all at the end


def test_a_job_that_nobody_waits_for_is_accepted_and_its_result_fetched(three: Machine) -> None:
    accepted = three.infer("tokens=3 every=0.1", wait=False)
    assert accepted.status_code == 202
    job_url = accepted.headers["location"]
    done = eventually(lambda: (job := three.http.get(job_url).json())["status"] == "completed" and job)
    assert (done["id"], done["result"]) == (accepted.json()["jobId"], "0 1 2 ")


def test_delete_cancels_a_job_and_a_second_time_says_that_it_has_ended(three: Machine) -> None:
    accepted = three.infer("tokens=1000 every=0.05", wait=False)
    job_url = accepted.headers["location"]
    eventually(lambda: three.http.get(job_url).json()["status"] == "running")
    cancelled = three.http.delete(job_url)
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    again = three.http.delete(job_url)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_conflict")
    assert three.http.delete("/v1/jobs/none").status_code == 404


def test_a_client_that_leaves_cancels_its_job(three: Machine) -> None:

    def running(tenant: str) -> bool:
        jobs = three.http.get("/v1/jobs", params={"tenant_id": tenant}).json()["data"]
        return bool(jobs and jobs[0]["status"] == "running")

    for stream in (True, False):
        body = {"tenantId": f"leaves-{stream}", "modelId": "demo", "version": "1.0", "input": "tokens=1000 every=0.05"}
        command = ["curl", "-sN", f"{three.url}/infer", "--json", json.dumps({**body, "stream": stream})]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
            eventually(lambda: running(f"leaves-{stream}"))  # noqa: B023 - asked before the next round
            client.kill()

        def ended(tenant: str = f"leaves-{stream}") -> bool:
            [job] = three.http.get("/v1/jobs", params={"tenant_id": tenant}).json()["data"]
            return bool(job["status"] == "cancelled" and job["completion_tokens"] < 100)

        eventually(ended, seconds=10)


def test_jobs_are_listed_in_pages_newest_first(three: Machine) -> None:
    ids = [three.infer("tokens=1", tenantId="pages").json()["jobId"] for _ in range(5)]
    page: dict[str, str | int] = {"tenant_id": "pages", "limit": 3}
    first = three.http.get("/v1/jobs", params=page).json()
    second = three.http.get("/v1/jobs", params={**page, "before": first["data"][-1]["id"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert three.http.get("/v1/jobs", params={"tenant_id": "nobody"}).json()["data"] == []
