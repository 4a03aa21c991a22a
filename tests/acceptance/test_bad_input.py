"""Each bad input gets a clear error at the right surface, and nothing else is disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_port
from tests.processes import Machine

GOOD = {"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=1"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """One network for all requests: each must leave it as it was."""
    with Machine(tmp_path_factory.mktemp("served")) as machine:
        up = machine.start("up", **machine.scripted())
        up.wait_for("Ready.")
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output
        assert machine.infer("tokens=1").status_code == 200


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error in the one form that all have."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    assert found["message"]
    return found


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tenantId": None}, "tenantId", "missing"),
        ({"tenantId": ""}, "tenantId", "at least 1"),
        ({"modelId": 7}, "modelId", "string"),
        ({"version": 1.0}, "version", "string"),
        ({"input": ["a"]}, "input", "string"),
        ({"input": ""}, "input", "at least 1"),
        ({"maxTokens": 0}, "maxTokens", "greater"),
        ({"maxTokens": "8"}, "maxTokens", "integer"),
        ({"maxTokens": True}, "maxTokens", "integer"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"temperature": 1e9}, "temperature", "less"),
        ({"topP": 0}, "topP", "greater"),
        ({"stop": "x"}, "stop", "list"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"seed": -1}, "seed", "greater"),
        ({"seed": 2**63}, "seed", "less"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream": True, "wait": False}, "wait", "stream"),
        ({"deadlineSeconds": 0}, "deadlineSeconds", "greater"),
        ({"deadlineSeconds": 1e6}, "deadlineSeconds", "at most"),
        ({"keep": "some"}, "keep", "all"),
        ({"tenantId": "\x1b[31mred"}, "tenantId", "pattern"),
        ({"inptu": "x"}, "inptu", "did you mean 'input'"),
        ({"prompt": "x"}, "prompt", "no field"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_should_be(
    served: Machine, change: dict[str, Any], param: str, says: str
) -> None:
    answer = served.http.post("/infer", json={**GOOD, **change})
    error = error_of(answer)
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_request")
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(served: Machine, field: str) -> None:
    answer = served.http.post("/infer", json={key: value for key, value in GOOD.items() if key != field})
    assert (answer.status_code, error_of(answer)["param"]) == (400, field)
    assert "missing" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"tenantId": "\\ud800"}', b"[" * 50_000, b"{}" * 3]
)
def test_a_body_that_is_not_a_json_object_is_refused(served: Machine, body: bytes) -> None:
    answer = served.http.post("/infer", content=body, headers={"content-type": "application/json"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"tenantId":"\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed":' + b"9" * 5000 + b"}", "too large"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(served: Machine, body: bytes, says: str) -> None:
    answer = served.http.post("/infer", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert says in error_of(answer)["message"]


def test_a_request_for_another_name_is_refused_so_that_no_web_page_can_read_jobs(served: Machine) -> None:
    answer = served.http.get("/v1/jobs", headers={"host": f"evil.example:{served.port}"})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "host")
    assert "--allowed-host" in error_of(answer)["message"]
    for name in ("localhost", f"LOCALHOST:{served.port}", "[::1]:1"):
        assert served.http.get("/healthz", headers={"host": name}).status_code == 200


def test_a_head_without_an_end_is_refused_before_it_fills_the_memory(served: Machine) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n")
        received = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                client.sendall(b"a: " + b"b" * 10_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(65536):
                received += piece
    assert not received or b"431" in received  # the reset that follows may overtake the answer
    assert served.http.get("/healthz").status_code == 200


def test_the_page_of_the_api_needs_nothing_from_elsewhere(served: Machine) -> None:
    page = served.http.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "POST /infer" in page.text
    assert "http" not in page.text.replace("HTTP", "").replace("http://json-schema", "")


def test_what_a_client_sends_cannot_steer_the_operators_terminal(served: Machine) -> None:
    answer = served.infer("tokens=1 \x1b]0;pwned\x07")
    shown = served.run("jobs", "show", answer.json()["jobId"])
    assert "\x1b" not in shown.stdout
    assert "\\x1b]0;pwned\\x07" in shown.stdout


def test_a_lone_surrogate_is_refused_and_awkward_text_goes_through(served: Machine) -> None:
    lone = json.dumps({**GOOD, "input": "\ud800"}).encode()
    assert served.http.post("/infer", content=lone, headers={"content-type": "application/json"}).status_code == 400
    awkward = "tokens=1 \0 '; DROP TABLE jobs; -- 🦊 \u202e \x7f"
    answer = served.infer(awkward)
    assert answer.status_code == 200
    assert served.http.get(f"/v1/jobs/{answer.json()['jobId']}").json()["input"] == awkward


def test_a_body_without_the_json_header_says_which_header(served: Machine) -> None:
    answer = served.http.post("/infer", content=json.dumps(GOOD), headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in error_of(answer)["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(
    served: Machine, declared: bool
) -> None:
    body = json.dumps({**GOOD, "input": "x" * 300_000}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    content: Any = body if declared else pieces()
    with httpx.Client(base_url=served.url) as client:
        answer = client.post("/infer", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    assert "262144" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("change", "status", "code", "param", "says"),
    [
        ({"modelId": "dmeo"}, 404, "model_not_found", "modelId", "did you mean 'demo'"),
        ({"modelId": "gpt-17"}, 404, "model_not_found", "modelId", "served now: demo"),
        ({"version": "2.0"}, 404, "model_not_found", "version", "served in version 1.0"),
    ],
)
def test_an_unknown_model_names_what_there_is_and_leaves_no_job(
    served: Machine, change: dict[str, Any], status: int, code: str, param: str, says: str
) -> None:
    for way in ({}, {"stream": True}, {"wait": False}):
        answer = served.http.post("/infer", json={**GOOD, "tenantId": "lost", **change, **way})
        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param), way
        assert says in error["message"]
    assert served.http.get("/v1/jobs", params={"tenant_id": "lost"}).json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("GET", "/infer", 405, "method_not_allowed"),
        ("POST", "/v1/jobs", 405, "method_not_allowed"),
        ("PATCH", "/v1/jobs/x", 405, "method_not_allowed"),
        ("GET", "/v1/jobs/x", 404, "job_not_found"),
        ("DELETE", "/v1/jobs/x", 404, "job_not_found"),
        ("GET", "/v1/jobs?limit=0", 400, "invalid_request"),
        ("GET", "/v1/jobs?limit=many", 400, "invalid_request"),
        ("GET", "/v1/jobs?status=lost", 400, "invalid_request"),
        ("GET", "/v1/jobs?tenantId=t", 400, "invalid_request"),
        ("GET", "/v1/jobs/x?tenant=t", 400, "invalid_request"),
        ("GET", f"/v1/jobs/{'a' * 50_000}", 404, "job_not_found"),
    ],
)
def test_unknown_routes_methods_and_ids_have_the_error_form(
    served: Machine, method: str, path: str, status: int, code: str
) -> None:
    answer = served.http.request(method, path)
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)


def test_a_tenant_over_its_limit_is_told_when_to_come_back_and_others_go_on(served: Machine) -> None:
    with Machine(served.folder / "limited") as machine:
        up = machine.start("up", "--requests-per-minute", "3", **machine.scripted())
        up.wait_for("Ready.")
        # A window is a minute of the clock, which may end between two requests: then the count begins again.
        answers = [machine.infer("tokens=1") for _ in range(8)]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        for answer in refused:
            assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert machine.infer("tokens=1", tenantId="somebody-else").status_code == 200
        assert len(machine.read("jobs", "list")) == len(answers) - len(refused) + 1


def test_the_openapi_document_describes_every_route_and_no_422(served: Machine) -> None:
    document = served.http.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/infer", "/v1/jobs", "/v1/jobs/{job_id}", "/healthz", "/readyz"}
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "503" in operation["responses"]


# --- starting --------------------------------------------------------------------------------------------------------


def refused_start(machine: Machine, *arguments: str, code: int = 1, **environment: str) -> str:
    """Start something that cannot run; return the one line that says why."""
    done = machine.run(*arguments, **{**machine.scripted(), **environment})
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_a_taken_port_says_which_and_how_to_choose_another(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", machine.port)):
        assert f"port {machine.port}" in (line := refused_start(machine, "gateway"))
        assert "--port" in line
    port = int(machine.listen.rsplit("/", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        assert str(port) in (line := refused_start(machine, "orchestrator"))
        assert "--listen" in line


def test_a_data_directory_that_cannot_be_used_says_so(machine: Machine) -> None:
    in_the_way = machine.folder / "file"
    in_the_way.write_text("not a folder")
    for command in ("orchestrator", "gateway", "worker", "up"):
        assert str(in_the_way) in refused_start(machine, command, "--data-dir", str(in_the_way / "data"))


def test_a_broken_key_file_says_which_and_what_to_do(machine: Machine) -> None:
    keys = machine.data_dir / "keys"
    keys.mkdir(parents=True, mode=0o700)
    (keys / "orchestrator.key").write_bytes(b"short")
    (keys / "orchestrator.key").chmod(0o600)
    assert "orchestrator.key" in refused_start(machine, "orchestrator")


def test_a_store_of_a_newer_tether_is_left_alone(machine: Machine) -> None:
    assert machine.run("store", "migrate").returncode == 0
    database = machine.data_dir / "tether.db"
    with sqlite3.connect(database) as connection:
        [table] = connection.execute(
            "SELECT name FROM sqlite_master WHERE name LIKE '%migration%' AND type = 'table'"
        ).fetchone()
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        values = {"version": 9999, "name": "future", "sha256": "0" * 64, "applied_at": 0.0}
        connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
            [values[column] for column in columns],
        )
    connection.close()
    assert "newer" in refused_start(machine, "orchestrator")
    assert "newer" in refused_start(machine, "jobs", "list")


def test_a_store_that_is_no_database_or_cannot_be_reached_says_so(machine: Machine) -> None:
    machine.data_dir.mkdir(parents=True)
    (machine.data_dir / "tether.db").write_bytes(b"no database" * 1000)
    assert "tether.db" in refused_start(machine, "orchestrator")
    assert "127.0.0.1" in refused_start(machine, "jobs", "list", "--store", f"rqlite://127.0.0.1:{free_port()}")
    assert "postgres" in refused_start(machine, "jobs", "list", "--store", "postgres://x", code=2)


def test_looking_before_anything_was_started_says_what_to_start(machine: Machine) -> None:
    for command in (("jobs", "list"), ("workers", "list"), ("status",), ("store", "status")):
        assert "tether up" in refused_start(machine, *command)
    assert not machine.data_dir.exists()
    assert machine.run("models", "list").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "--port", "99999"), "--port"),
        (("up", "--silence", "0"), "--silence"),
        (("up", "--data-dir", ""), "--data-dir"),
        (("up", "--name", ""), "--name"),
        (("up", "--keep", "some"), "--keep"),
        (("up", "--host", "0.0.0.0"), "tether keys create"),
        (("gateway", "--max-body", "10"), "--max-body"),
        (("orchestrator", "--listen", "localhost:4100"), "/ip4/"),
        (("worker", "--model", "demo", "--model", "demo"), "twice"),
        (("jobs", "list", "--status", "lost"), "--status"),
        (("invite", "create", "--role", "king"), "--role"),
        (("invite", "create", "--ttl", "soon"), "--ttl"),
    ],
)
def test_a_wrong_option_is_misuse_and_named(machine: Machine, arguments: tuple[str, ...], says: str) -> None:
    assert says in refused_start(machine, *arguments, code=2)


def test_a_wrong_key_in_the_configuration_file_is_named_with_the_nearest(machine: Machine) -> None:
    config = machine.folder / "config.toml"
    config.write_text("[gateway]\nprot = 1\n")
    assert "did you mean 'port'" in refused_start(machine, "--config", str(config), "gateway", code=2)
    config.write_text("[gatway]\nport = 1\n")
    assert "did you mean 'gateway'" in refused_start(machine, "--config", str(config), "gateway", code=2)
    config.write_text("not toml")
    assert str(config) in refused_start(machine, "--config", str(config), "gateway", code=2)


def test_the_common_section_counts_for_every_command_that_has_the_key(machine: Machine) -> None:
    other = machine.folder / "elsewhere"
    config = machine.folder / "config.toml"
    config.write_text(f'[common]\ndata_dir = "{other}"\n')
    del machine.environment["TETHER_DATA_DIR"]
    machine.environment["TETHER_CONFIG"] = str(config)
    assert machine.run("store", "migrate").returncode == 0
    assert (other / "tether.db").exists()
    assert machine.run("jobs", "list").returncode == 0


def test_a_machine_that_joined_is_told_where_to_look(machine: Machine, tmp_path: Path) -> None:
    address = "/ip4/127.0.0.1/tcp/4100/p2p/12D3KooWBRQAgq1nhm4r6D4rCyjMnmp8dXkAw1PtyNQwNLUWZnRq"
    invite = machine.run("invite", "create", "--address", address).stdout.strip()
    with Machine(tmp_path / "other") as other:
        assert other.run("join", invite).returncode == 0
        assert "orchestrator's machine" in refused_start(other, "jobs", "list")


def test_flags_win_over_the_environment_and_that_over_the_file(machine: Machine) -> None:
    config = machine.folder / "config.toml"
    taken = free_port()
    with socket.create_server(("127.0.0.1", taken)):
        config.write_text(f"[gateway]\nport = {taken}\n")
        del machine.environment["TETHER_GATEWAY_PORT"]
        assert f"port {taken}" in refused_start(machine, "--config", str(config), "gateway")
        machine.environment["TETHER_GATEWAY_PORT"] = str(machine.port)
        machine.environment["TETHER_CONFIG"] = str(config)
        gateway = machine.start("gateway")
        gateway.wait_for(f":{machine.port}")
        assert f"port {taken}" in refused_start(machine, "gateway", "--port", str(taken))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("dmeo", "demo"),
        ("phi-2", "HF_HUB_OFFLINE"),
        ("./no-such-folder", "no folder"),
        ("meta-llama/no-such-model", "HF_HUB_OFFLINE"),
    ],
)
def test_a_worker_refuses_a_model_that_it_cannot_serve_before_it_joins(machine: Machine, model: str, says: str) -> None:
    done = machine.run("worker", "--model", model)
    assert done.returncode == 1, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (machine.data_dir / "network.key").exists()


def test_a_model_folder_without_its_parts_says_what_is_missing(machine: Machine) -> None:
    folder = machine.folder / "half-a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    done = machine.run("worker", "--model", str(folder))
    assert done.returncode == 1
    assert "tokenizer" in done.stderr or "weights" in done.stderr


@pytest.mark.parametrize("invite", ["", "nonsense", "tether-invite-1:", "tether-invite-1:abcdef"])
def test_an_invite_that_is_cut_off_or_no_invite_is_refused(machine: Machine, invite: str) -> None:
    assert "invite" in refused_start(machine, "join", invite)
    assert not (machine.data_dir / "network.json").exists()


def test_a_data_directory_that_is_read_only_stops_a_role_with_one_line(machine: Machine, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        folder = "/proc/tether"  # nobody can make folders there, root included
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        folder = str(locked / "data")
    assert folder in refused_start(machine, "orchestrator", "--data-dir", folder)
