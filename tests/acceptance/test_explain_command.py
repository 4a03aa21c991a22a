"""`tether explain` and `GET /v1/explain` with real processes: what is said is what happens then."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.ports import free_port
from tests.processes import Machine, eventually


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with one slot and no keys."""
    with Machine(tmp_path_factory.mktemp("explain")) as machine:
        up = machine.start("up", "--name", "here", **machine.scripted(slots=1))
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


def explain(machine: Machine, *arguments: str, key: str | None = None, url: str | None = None) -> Any:
    environment = {"TETHER_API_KEY": key} if key is not None else {}
    done = machine.run("explain", "--json", "--url", url or machine.url, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_job_that_would_run_waits_and_is_refused_is_explained(served: Machine) -> None:
    found = explain(served, "--model", "demo", "--tokens", "100")
    assert (found["outcome"], found["version"], found["tokens"]) == ("runs", "1.0", 100)
    assert found["orchestrator_name"] == "here"
    (worker,) = found["workers"]
    assert (worker["free_slots"], worker["slots"], worker["reason"]) == (1, 1, None)
    assert worker["score"] == pytest.approx(sum(worker["parts"].values()))
    job_id = served.infer("tokens=2000 every=0.05", wait=False).json()["jobId"]
    eventually(lambda: served.http.get(f"/v1/jobs/{job_id}").json()["status"] == "running", what="a running job")
    found = explain(served, "-m", "demo@1.0")
    assert (found["outcome"], found["waiting"]["place"], found["workers"][0]["reason"]) == ("waits", 1, "full")
    served.http.delete(f"/v1/jobs/{job_id}")
    found = explain(served, "-m", "dem")
    assert (found["outcome"], found["error"]["code"]) == ("refused", "model_not_found")
    assert "did you mean 'demo'" in found["error"]["message"]
    assert served.read("jobs", "list", "--model", "dem") == [], "nothing was made by asking"


def test_the_table_has_the_parts_of_the_score_and_no_colours_where_none_are_wanted(served: Machine) -> None:
    done = served.run("explain", "--model", "demo")
    assert done.returncode == 0, done.stderr
    assert "runs at once on here" in done.stdout
    for column in ("SCORE", "AFFINITY", "FREE SLOTS", "FIRST TOKEN", "FAILURES", "WHY NOT"):
        assert column in done.stdout
    assert "orchestrator here" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--model", "demo@"), 1, "name@version"),
        (("--model", "demo", "--url", "ftp://x"), 2, "http://localhost:8080"),
        (("--model", "demo", "--url", "http://x:port"), 2, "is no URL"),
        (("--model", "demo", "--url", f"http://127.0.0.1:{free_port()}"), 1, "tether up"),
        (("--model", "demo", "--tenant", "a\nb"), 1, "tenant_id"),
        (("--model", "demo", "--key", "sk-é"), 2, "API key"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    served: Machine, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = served.run("explain", *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("query", ["", "model=", "model=demo&tokens=0", "model=demo&tokens=x", "model=demo&color=red"])
def test_a_question_that_is_not_right_is_a_400(served: Machine, query: str) -> None:
    answer = served.http.get(f"/v1/explain?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]


def test_a_read_only_key_may_ask_and_nobody_learns_of_other_tenants_jobs(machine: Machine) -> None:
    def make_key(tenant: str, *options: str) -> str:
        done = machine.run("keys", "create", "--tenant", tenant, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    machine.run("tenants", "create", "one", "--requests-per-day", "5", "--tokens-per-day", "1000")
    one, look, admin = make_key("one"), make_key("one", "--scope", "read-only"), make_key("ops", "--scope", "admin")
    other = make_key("two")
    machine.wait_ready(machine.start("up", **machine.scripted(slots=1)))
    for text in ("tokens=2000 every=0.05", "x", "x"):
        body = {"modelId": "demo", "version": "1.0", "input": text, "wait": False}
        bearer = {"Authorization": f"Bearer {other}"}
        assert machine.http.post("/infer", json=body, headers=bearer).status_code == 202
    eventually(lambda: explain(machine, "-m", "demo", key=admin)["num_waiting"] == 2, what="two jobs that wait")
    for key in (one, look):
        found = explain(machine, "-m", "demo", key=key)
        assert (found["num_waiting"], found["num_own_waiting"], found["waiting"]["place"]) == (None, 0, 2)
        limits = {limit["name"]: (limit["left"], limit["most"]) for limit in found["limits"]}
        assert limits == {"requests_per_day": (5, 5), "tokens_per_day": (1000, 1000)}
        assert "two" not in json.dumps(found)
    found = explain(machine, "-m", "demo", "--tokens", "1001", key=one)
    assert (found["outcome"], found["error"]["code"]) == ("refused", "job_too_large")
    done = machine.run("explain", "-m", "demo", "--tenant", "two", TETHER_API_KEY=one)
    assert (done.returncode, "another tenant" in done.stderr) == (1, True)
    assert explain(machine, "-m", "demo", "--tenant", "two", key=admin)["num_own_waiting"] == 2
    done = machine.run("explain", "-m", "demo")
    assert (done.returncode, "API key" in done.stderr) == (1, True)


def test_with_several_orchestrators_the_one_that_answers_says_so(machine: Machine) -> None:
    second = f"/ip4/127.0.0.1/tcp/{free_port()}"
    roles = [
        machine.start("orchestrator", "--name", "first"),
        machine.start("orchestrator", "--name", "second", "--listen", second),
    ]
    for role in roles:
        role.wait_for("Ready.")
    machine.start("worker", **machine.scripted())
    machine.wait_ready(machine.start("gateway"))
    for role in roles:
        eventually(lambda o=role: o.output.count("link up") >= 2, what="links")  # type: ignore[misc]

    def names() -> bool:
        answers = [httpx.get(f"{machine.url}/v1/explain?model=demo").json() for _ in range(4)]
        return {answer["orchestrator_name"] for answer in answers if answer["outcome"] == "runs"} == {"first", "second"}

    eventually(names, what="an answer of each")
