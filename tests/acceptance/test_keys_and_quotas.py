"""Keys, tenants and quotas with real processes: who gets in, who sees what, and how much, exactly."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_port
from tests.processes import Machine, eventually
from tests.rqlited import running
from tether.errors import UsageError
from tether.http import check_public
from tether.settings import GatewaySettings
from tether.store import open_store
from tether.stored import Allowance


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine whose network had a key before its first start."""
    with Machine(tmp_path_factory.mktemp("keys") / "machine") as machine:
        make_key(machine, "first")
        machine.wait_ready(machine.start("up", **machine.scripted()))
        yield machine


def make_key(machine: Machine, tenant: str, *options: str) -> str:
    done = machine.run("keys", "create", "--tenant", tenant, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ask(machine: Machine, key: str, text: str = "x", **fields: Any) -> httpx.Response:
    body = {"modelId": "demo", "version": "1.0", "input": text, **fields}
    return machine.http.post("/infer", json=body, headers=bearer(key))


def test_with_keys_nobody_gets_in_without_one(served: Machine) -> None:
    wrong: list[dict[str, str]] = [{}, bearer("sk-wrong"), bearer("sk-" + "a" * 43), {"Authorization": "Basic eA=="}]
    for headers in wrong:
        for method, path in [("POST", "/infer"), ("GET", "/v1/jobs"), ("DELETE", "/v1/jobs/x"), ("GET", "/nowhere")]:
            answer = served.http.request(method, path, headers=headers, content=b"{")
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert served.http.get(path).status_code == 200


def test_a_key_s_jobs_are_its_tenant_s_and_another_s_are_not_there(served: Machine) -> None:
    one, two = make_key(served, "one"), make_key(served, "two")
    look, admin = make_key(served, "two", "--scope", "read-only"), make_key(served, "ops", "--scope", "admin")
    job_id = ask(served, one).json()["jobId"]
    assert ask(served, one, tenantId="one").status_code == 200
    refused = ask(served, one, tenantId="two")
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "tenantId")
    for key in (two, look):
        for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}?tenant_id=one", f"/v1/jobs/{job_id}/stream"):
            assert served.http.get(path, headers=bearer(key)).status_code == 404
        assert served.http.get("/v1/jobs", headers=bearer(key)).json()["data"] == []
        assert served.http.get("/v1/jobs?tenant_id=one", headers=bearer(key)).status_code == 403
    assert served.http.delete(f"/v1/jobs/{job_id}", headers=bearer(two)).status_code == 404
    assert served.http.get(f"/v1/jobs/{job_id}", headers=bearer(one)).json()["tenant_id"] == "one"
    assert served.http.get(f"/v1/jobs/{job_id}", headers=bearer(admin)).json()["tenant_id"] == "one"
    assert {job["tenant_id"] for job in served.http.get("/v1/jobs", headers=bearer(admin)).json()["data"]} >= {"one"}
    assert ask(served, admin, tenantId="two").status_code == 200
    refused = ask(served, look)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")


def test_answers_say_what_is_left_and_a_refusal_when_to_come_back(served: Machine) -> None:
    assert (
        served.run("tenants", "create", "small", "--requests-per-day", "2", "--tokens-per-minute", "1000").returncode
        == 0
    )
    key = make_key(served, "small")
    first = ask(served, key, maxTokens=9)
    assert (first.headers["x-ratelimit-limit-requests"], first.headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    for path in ("/v1/models", "/v1/jobs", f"/v1/jobs/{first.json()['jobId']}", "/v1/jobs/none"):
        other = served.http.get(path, headers=bearer(key))
        assert other.headers["x-ratelimit-limit-requests"] == "2"
        assert other.headers["x-ratelimit-remaining-requests"] in {"1", "2"}, "as it was a few seconds ago at most"
    with served.http.stream(
        "POST", "/infer", json={"modelId": "demo", "version": "1.0", "input": "x", "stream": True}, headers=bearer(key)
    ) as answer:
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        answer.read()
    refused = ask(served, key)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert 0 < int(refused.headers["retry-after"]) <= 86400
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    served.run("tenants", "set", "small", "--requests-per-day", "9")
    later = ask(served, key, wait=False)
    assert (later.status_code, later.headers["x-ratelimit-remaining-requests"]) == (202, "6")
    served.run("tenants", "set", "small", "--requests-per-day", "none", "--job-tokens", "10")
    large = ask(served, key, maxTokens=10)
    assert (large.status_code, large.json()["error"]["code"]) == (400, "job_too_large")


@pytest.mark.parametrize("stream", [True, False])
def test_a_revoked_key_ends_what_runs_with_it_within_five_seconds(served: Machine, *, stream: bool) -> None:
    key = make_key(served, "gone", "--name", f"{stream}")
    [record] = [each for each in served.read("keys", "list", "--tenant", "gone") if each["name"] == f"{stream}"]
    found: dict[str, Any] = {}
    started = threading.Event()

    def run() -> None:
        body = {"modelId": "demo", "version": "1.0", "input": "tokens=1000 every=0.05", "stream": stream}
        with (
            httpx.Client(timeout=60) as http,
            http.stream("POST", f"{served.url}/infer", json=body, headers=bearer(key)) as answer,
        ):
            for line in answer.iter_lines():
                started.set()
                found["last"] = line or found.get("last")
            found["status"] = answer.status_code
            found["at"] = time.monotonic()

    client = threading.Thread(target=run, daemon=True)
    client.start()

    def live() -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = served.read("jobs", "list", "--tenant", "gone")
        return [job for job in jobs if job["status"] == "running"]

    eventually(live, what="a running job")
    if stream:
        assert started.wait(20)
    assert served.run("keys", "revoke", record["id"]).returncode == 0
    revoked_at = time.monotonic()
    client.join(30)
    assert found["at"] - revoked_at < 5.5
    error = json.loads(found["last"].removeprefix("data: "))["error"]
    assert error["code"] == "invalid_api_key"
    assert found["status"] == (200 if stream else 401)
    eventually(lambda: not live(), what="the job's end")
    job = served.read("jobs", "list", "--tenant", "gone")[0]
    assert job["status"] == "cancelled"
    assert "its API key was revoked" in served.read("jobs", "show", job["id"])["job"]["error"]["message"]
    assert ask(served, key).status_code == 401


def test_a_revoked_key_ends_its_batches_within_five_seconds(served: Machine) -> None:
    key = make_key(served, "batched")
    [record] = [each for each in served.read("keys", "list", "--tenant", "batched") if each["revoked_at"] is None]
    body = {"model": "demo", "messages": [{"role": "user", "content": "tokens=1000 every=0.05"}]}
    url = "/v1/chat/completions"
    lines = [json.dumps({"custom_id": f"{n}", "method": "POST", "url": url, "body": body}) for n in range(20)]
    with httpx.Client(base_url=served.url, headers=bearer(key), timeout=60) as http:
        upload = {"file": ("a.jsonl", "\n".join(lines).encode())}
        file_id = http.post("/v1/files", files=upload, data={"purpose": "batch"}).json()["id"]
        wanted = {"input_file_id": file_id, "endpoint": url, "completion_window": "24h"}
        batch_id = http.post("/v1/batches", json=wanted).json()["id"]

    def with_status(*statuses: str) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = served.read("jobs", "list", "--tenant", "batched")
        return [job for job in jobs if job["status"] in statuses]

    eventually(lambda: with_status("running"), what="a line that runs")
    assert served.run("keys", "revoke", record["id"]).returncode == 0
    revoked_at = time.time()
    sibling = make_key(served, "batched")
    with httpx.Client(base_url=served.url, headers=bearer(sibling), timeout=60) as http:
        ended = eventually(
            lambda: found if (found := http.get(f"/v1/batches/{batch_id}").json())["status"] == "failed" else None,
            what="the batch's end",
        )
        errors = http.get(f"/v1/files/{ended['error_file_id']}/content").text.splitlines()
    assert ended["failed_at"] - revoked_at < 5.5
    assert ended["errors"]["data"][0]["code"] == "invalid_api_key"
    assert {json.loads(line)["error"]["code"] for line in errors} == {"invalid_api_key"}
    assert len(errors) == ended["request_counts"]["failed"] == 20
    assert not with_status("queued", "running", "completed")


@pytest.fixture(params=["sqlite", "rqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/shared.db"
        return
    with running(tmp_path / "rqlited") as server:
        yield server.url


def test_gateways_and_clients_that_race_for_a_quota_get_exactly_it(machine: Machine, store_url: str) -> None:
    environment = {"TETHER_STORE": store_url}
    assert machine.run("tenants", "create", "counted", "--requests-per-day", "31", **environment).returncode == 0
    assert machine.run("tenants", "create", "metered", "--tokens-per-day", "46", **environment).returncode == 0
    keys = {
        tenant: machine.run("keys", "create", "--tenant", tenant, **environment).stdout.strip()
        for tenant in ("counted", "metered")
    }
    second_listen, second_port = f"/ip4/127.0.0.1/tcp/{free_port()}", free_port()
    roles = [
        machine.start("orchestrator", **environment),
        machine.start("orchestrator", "--listen", second_listen, **environment),
    ]
    for role in roles:
        role.wait_for("Ready.")
    roles += [
        machine.start("worker", **machine.scripted()),
        machine.start("gateway"),
        machine.start("gateway", "--port", str(second_port)),
    ]
    urls = [machine.url, f"http://127.0.0.1:{second_port}"]
    for orchestrator in roles[:2]:  # each has to know the worker and both gateways, or it refuses or gets no job
        eventually(lambda o=orchestrator: o.output.count("link up") >= 3, what="links")  # type: ignore[misc]
    for url in urls:  # a gateway asks its orchestrators in turn
        eventually(lambda url=url: all(is_ready(url) for _ in range(6)), what=f"{url} ready")  # type: ignore[misc]

    def client(number: int) -> Counter[tuple[str, int]]:
        """Ask in turn for both tenants, each time one token for a prompt of one."""
        outcomes: Counter[tuple[str, int]] = Counter()
        with httpx.Client(timeout=60) as http:
            for turn in range(40):
                tenant = ("counted", "metered")[turn % 2]
                body = {"modelId": "demo", "version": "1.0", "input": "x", "maxTokens": 1}
                url = urls[(number + turn // 2) % 2]
                answer = http.post(f"{url}/infer", json=body, headers=bearer(keys[tenant]))
                outcomes[tenant, answer.status_code] += 1
        return outcomes

    with ThreadPoolExecutor(4) as pool:
        outcomes = sum(pool.map(client, range(4)), Counter[tuple[str, int]]())
    assert outcomes == {("counted", 200): 31, ("counted", 429): 49, ("metered", 200): 23, ("metered", 429): 57}
    with closing(open_store(store_url, create=False)) as store:
        asked = [Allowance(tenant, "", "demo", None) for tenant in ("counted", "metered")]
        (requests,), (tokens,) = store.allowances(asked, now=time.time())
        assert (requests.spent, tokens.spent) == (31, 46)
        jobs = store.jobs("metered", limit=100)
        assert sum(job.usage.prompt_tokens + job.usage.completion_tokens for job in jobs) == 46
        assert len({job.orchestrator_id for job in store.jobs(limit=200)}) == 2, "both orchestrators took jobs"


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_key_is_printed_once_and_alone_and_never_listed(machine: Machine) -> None:
    key = make_key(machine, "acme", "--name", "ci", "--scope", "models", "--scope", "read-only", "--expires", "30d")
    assert key.startswith("sk-")
    assert len(key.split()) == 1
    [record] = machine.read("keys", "list")
    assert (record["name"], record["scopes"], record["tenant_id"]) == ("ci", ["models", "read-only"], "acme")
    assert record["expires_at"] - record["created_at"] == pytest.approx(30 * 86400)
    assert key not in machine.run("keys", "list").stdout
    assert key.encode() not in (machine.data_dir / "tether.db").read_bytes()
    rotated = machine.run("keys", "rotate", record["id"], "--grace", "1h", "--json")
    successor = json.loads(rotated.stdout)
    assert successor["key"] != key
    assert successor["record"]["name"] == "ci"
    old, new = machine.read("keys", "list")
    assert old["expires_at"] < record["expires_at"]
    assert new["expires_at"] - new["created_at"] == pytest.approx(30 * 86400)
    assert (old["replaced_by"], new["replaced_by"]) == (new["id"], None)
    assert machine.run("keys", "revoke", new["id"]).returncode == 0
    assert "revoked" in machine.run("keys", "list").stdout


def test_tenants_have_limits_that_can_be_seen_set_and_taken_away(machine: Machine) -> None:
    for arguments in (
        ("create", "acme", "--weight", "2.5", "--requests-per-minute", "60", "--tokens-per-day", "1000"),
        ("set", "acme", "--tokens-per-day", "none", "--jobs-at-once", "4"),
        ("set", "acme", "--model", "phi-2", "--job-tokens", "512"),
    ):
        done = machine.run("tenants", *arguments)
        assert done.returncode == 0, done.stderr
    [tenant] = machine.read("tenants", "list")
    limits = {(limit["unit"], limit["window_seconds"], limit["model"]): limit["most"] for limit in tenant["limits"]}
    assert limits == {("requests", 60, ""): 60, ("jobs", 0, ""): 4, ("job_tokens", 0, "phi-2"): 512}
    assert tenant["weight"] == 2.5
    listed = machine.run("tenants", "list").stdout
    assert "job_tokens 512 (on phi-2)" in listed
    make_key(machine, "acme")
    assert machine.run("tenants", "remove", "acme").returncode == 0
    assert machine.read("tenants", "list") == []
    assert machine.read("keys", "list")[0]["revoked_at"] is not None


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tenants", "create", ""), 2, "tenant's name"),
        (("tenants", "create", "a\nb"), 2, "tenant's name"),
        (("tenants", "create", "x" * 201), 2, "tenant's name"),
        (("tenants", "create", "known"), 1, "already"),
        (("tenants", "create", "new", "--requests-per-minute", "-1"), 2, "--requests-per-minute"),
        (("tenants", "create", "new", "--tokens-per-day", "1e9"), 2, "--tokens-per-day"),
        (("tenants", "create", "new", "--weight", "0"), 2, "--weight"),
        (("tenants", "create", "new", "--weight", "nan"), 2, "--weight"),
        (("tenants", "set", "known"), 2, "nothing to set"),
        (("tenants", "set", "nobody", "--weight", "2"), 1, "no tenant 'nobody'"),
        (("tenants", "set", "known", "--key", "key-x", "--jobs-at-once", "1"), 1, "no key 'key-x'"),
        (("tenants", "set", "known", "--model", "demo", "--weight", "2"), 2, "--weight"),
        (("tenants", "remove", "nobody"), 1, "no tenant"),
        (("keys", "create", "--tenant", "a", "--scope", "king"), 2, "--scope"),
        (("keys", "create", "--tenant", "a", "--expires", "soon"), 2, "--expires"),
        (("keys", "create", "--tenant", "a", "--name", "\x1b[31m"), 2, "--name"),
        (("keys", "create", "--tenant", " a"), 2, "tenant's name"),
        (("keys", "revoke", "key-x"), 1, "no key"),
        (("keys", "rotate", "key-x"), 1, "no key"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(
    known: Machine, arguments: tuple[str, ...], code: int, says: str
) -> None:
    done = known.run(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [tenant["id"] for tenant in known.read("tenants", "list")] == ["known"]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with one tenant and nothing that runs."""
    with Machine(tmp_path_factory.mktemp("known") / "machine") as machine:
        assert machine.run("tenants", "create", "known").returncode == 0
        yield machine


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gateway.example"])
def test_an_address_that_others_can_reach_needs_a_key(host: str) -> None:
    settings = GatewaySettings(host=host)
    with pytest.raises(UsageError, match="tether keys create"):
        check_public(settings, has_keys=False)
    check_public(settings, has_keys=True)
    for loopback in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        check_public(GatewaySettings(host=loopback), has_keys=False)
