"""`tether audit list` with real processes: what operators did is there, by whom, and no secret with it."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from tests.processes import Machine, eventually
from tether.store import open_store


def run(machine: Machine, *arguments: str) -> str:
    done = machine.run(*arguments, LOGNAME="ann")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_an_operator_does_is_listed_newest_first_without_secrets(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        machine.wait_ready(machine.start("up", "--name", "laptop", **machine.scripted()))
        run(machine, "tenants", "create", "acme", "--weight", "2", "--jobs-at-once", "4")
        first = run(machine, "keys", "create", "--tenant", "acme", "--name", "ci")
        [key] = machine.read("keys", "list")
        second = run(machine, "keys", "rotate", key["id"])
        [new_id] = [each["id"] for each in machine.read("keys", "list") if each["id"] != key["id"]]
        run(machine, "keys", "revoke", new_id)
        run(machine, "keys", "revoke", new_id)
        eventually(lambda: machine.read("workers", "list"), what="a worker in the store")
        run(machine, "workers", "drain", "laptop")
        run(machine, "workers", "resume", "laptop")
        invite = run(machine, "invite", "create", "--role", "worker", "--ttl", "30m")
        run(machine, "tenants", "set", "acme", "--model", "phi-2", "--jobs-at-once", "none")
        run(machine, "tenants", "remove", "acme")

        events = machine.read("audit", "list")
        assert [(event["action"], event["details"]) for event in reversed(events)] == [
            ("tenant.created", {"limits": {"jobs_at_once": 4}, "weight": 2.0}),
            ("key.created", {"name": "ci", "scopes": ["models"], "tenant": "acme"}),
            ("key.rotated", {"name": "ci", "new_key": new_id, "scopes": ["models"], "tenant": "acme"}),
            ("key.revoked", {}),
            ("worker.drained", {}),
            ("worker.resumed", {}),
            ("invite.created", {"roles": ["worker"], "ttl_seconds": 1800.0}),
            ("tenant.changed", {"limits": {"jobs_at_once": None}, "model": "phi-2"}),
            ("tenant.removed", {}),
        ]
        assert {event["who"] for event in events} == {f"ann@{platform.node()}"}
        assert [event["subject"] for event in events[-4:]] == [new_id, key["id"], key["id"], "acme"]
        assert machine.read("audit", "list", "--limit", "2") == events[:2]
        assert machine.read("audit", "list", "--since", "1h") == events
        table = run(machine, "audit", "list")
        for word in ("WHO", "SUBJECT", "tenant.changed", 'limits {"jobs_at_once":null}, model phi-2', new_id):
            assert word in table
        for secret in (first, second, invite):
            assert secret[-20:] not in table + str(events)


def test_a_machine_that_joins_is_told_of_once_with_its_invite(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine, Machine(tmp_path / "other") as other:
        machine.wait_ready(machine.start("up", **machine.scripted()))
        invite = run(machine, "invite", "create", "--role", "worker", "--role", "gateway")
        assert [event["action"] for event in machine.read("audit", "list")] == ["invite.created"]
        run(other, "join", invite)
        other.start("worker", "--name", "attic", **other.scripted()).wait_for("Ready.")
        eventually(lambda: len(machine.read("workers", "list")) == 2, what="the worker that joined")
        joined, created = eventually(
            lambda: len(found := machine.read("audit", "list")) == 2 and found, what="the line"
        )
        assert (joined["action"], joined["who"]) == ("machine.joined", "attic")
        assert joined["details"] == {"invite": created["subject"], "roles": ["worker"]}
        assert joined["subject"] not in {created["subject"], ""}
        other.start("gateway").wait_for("Ready.")
        eventually(
            lambda: len([node for node in machine.read("status")["nodes"] if node["role"] == "gateway"]) == 2,
            what="the gateway that joined",
        )
        assert machine.read("audit", "list") == [joined, created]
        assert invite[-20:] not in str(joined)


def test_what_is_done_to_another_tenants_things_is_told_and_what_a_tenant_does_with_its_own_is_not(
    tmp_path: Path,
) -> None:
    with Machine(tmp_path / "machine") as machine:
        own = {"Authorization": f"Bearer {run(machine, 'keys', 'create', '--tenant', 'acme')}"}
        admin = {"Authorization": f"Bearer {run(machine, 'keys', 'create', '--tenant', 'ops', '--scope', 'admin')}"}
        [admin_id] = [each["id"] for each in machine.read("keys", "list") if each["tenant_id"] == "ops"]
        machine.wait_ready(machine.start("up", **machine.scripted(slots=1)))
        before = machine.read("audit", "list")

        def make_file() -> str:
            body = {"model": "demo", "prompt": "tokens=2000 every=0.05", "max_tokens": 2000}
            content = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body})
            files = {"file": ("a.jsonl", content, "application/jsonl")}
            made = machine.http.post("/v1/files", data={"purpose": "batch"}, files=files, headers=own)
            assert made.status_code == 200, made.text
            return str(made.json()["id"])

        def make_batch() -> str:
            batch = {"endpoint": "/v1/completions", "input_file_id": make_file(), "completion_window": "24h"}
            made = machine.http.post("/v1/batches", json=batch, headers=own)
            assert made.status_code == 200, made.text
            return str(made.json()["id"])

        def make_response() -> str:
            body = {"model": "demo", "input": "tokens=2000 every=0.05", "background": True}
            made = machine.http.post("/v1/responses", json=body, headers=own)
            assert made.status_code == 200, made.text
            return str(made.json()["id"])

        subjects = []
        for headers in (own, admin):
            batch_id, file_id, response_id, other_id = make_batch(), make_file(), make_response(), make_response()
            for done in (
                machine.http.post(f"/v1/batches/{batch_id}/cancel", headers=headers),
                machine.http.delete(f"/v1/files/{file_id}", headers=headers),
                machine.http.post(f"/v1/responses/{response_id}/cancel", headers=headers),
                machine.http.delete(f"/v1/responses/{other_id}", headers=headers),
            ):
                assert done.status_code == 200, done.text
            subjects = [batch_id, file_id, response_id, other_id, other_id]
        last = make_batch()
        run(machine, "batches", "cancel", last)

        lines = machine.read("audit", "list")[: -len(before)][::-1]
        assert [(line["action"], line["who"], line["details"]) for line in lines] == [
            ("batch.cancelled", admin_id, {"tenant": "acme"}),
            ("file.deleted", admin_id, {"tenant": "acme"}),
            ("job.cancelled", admin_id, {"tenant": "acme"}),
            ("job.cancelled", admin_id, {"tenant": "acme"}),
            ("job.forgotten", admin_id, {"tenant": "acme"}),
            ("batch.cancelled", f"ann@{platform.node()}", {"tenant": "acme"}),
        ]
        told = [line["subject"] for line in lines]
        assert (told[:2], told[3] == told[4], told[5]) == (subjects[:2], True, last)


def test_a_time_that_is_none_is_misuse_and_an_empty_log_says_so(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        machine.data_dir.mkdir(mode=0o700)
        store = open_store(f"sqlite://{machine.data_dir}/tether.db")
        store.migrate()
        store.close()
        wrong = machine.run("audit", "list", "--since", "yesterday")
        assert (wrong.returncode, "--since" in wrong.stderr) == (2, True)
        empty = machine.run("audit", "list")
        assert (empty.returncode, empty.stdout, empty.stderr.strip()) == (0, "", "nothing was done yet")


def test_an_invite_that_the_store_cannot_be_told_of_is_not_handed_out(tmp_path: Path) -> None:
    with Machine(tmp_path / "machine") as machine:
        machine.start("orchestrator").wait_for("Ready.")
        refused = machine.run("invite", "create", "--store", f"sqlite:///{tmp_path}/none.db")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert machine.read("audit", "list") == []
