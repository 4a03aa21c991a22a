"""Several jobs on one WebSocket, with a real client of another make against real processes."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from tests.ports import free_port
from tests.processes import Machine, eventually
from tests.sockets import Talk, talk, text_of


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose model says what the test wants, and that must be as it was after all tests."""
    with Machine(tmp_path_factory.mktemp("sockets")) as machine:
        up = machine.start("up", **machine.scripted(slots=8))
        machine.wait_ready(up)
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output
        assert machine.infer("tokens=1").status_code == 200


@pytest.fixture
def open_socket(scripted: Machine) -> Iterator[Talk]:
    with talk(scripted.url) as found:
        yield found


def status_of(machine: Machine, job_id: str) -> str:
    status: str = machine.http.get(f"/v1/jobs/{job_id}").json()["status"]
    return status


def numbers(count: int) -> str:
    return "".join(f"{number} " for number in range(count))


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_streamed_chat_is_told_as_its_route_tells_it_with_the_ids_of_its_events(
    scripted: Machine, open_socket: Talk
) -> None:
    open_socket.chat("a", "tokens=3", fields={"stream_options": {"include_usage": True}})
    accepted, *events, done = open_socket.run("a")
    assert accepted["type"] == "accepted"
    assert accepted["headers"]["x-tether-job-id"] == accepted["job_id"]
    assert done == {"type": "done", "id": "a", "job_id": accepted["job_id"], "attempts": 1}
    assert text_of(events) == numbers(3)
    stream = scripted.http.get(f"/v1/jobs/{accepted['job_id']}/stream", params={"include_usage": "true"}).text
    told = [line.removeprefix("id: ") for line in stream.splitlines() if line.startswith("id: ")]
    assert [event["event_id"] for event in events][-2:] == told[-2:]
    assert [event["event_id"] for event in events] == ["0", "2", "4", "6", "6e", "6eu"]
    assert events[-1]["data"]["usage"]["completion_tokens"] == 3


def test_every_route_that_runs_jobs_is_there_streamed_or_whole(open_socket: Talk) -> None:
    infer = {"tenantId": "t", "modelId": "demo", "version": "1.0", "input": "tokens=2"}
    open_socket.say(type="create", id="whole", url="/infer", body=infer)
    (whole,) = [message["data"] for message in open_socket.run("whole") if message["type"] == "event"]
    assert (whole["result"], whole["usage"]["completionTokens"]) == (numbers(2), 2)
    open_socket.say(type="create", id="stream", url="/infer", body={**infer, "stream": True})
    told = [message["data"] for message in open_socket.run("stream") if message["type"] == "event"]
    assert "".join(each.get("text", "") for each in told) == numbers(2)
    open_socket.say(type="create", id="later", url="/infer", body={**infer, "wait": False})
    (later,) = [message["data"] for message in open_socket.run("later") if message["type"] == "event"]
    assert set(later) == {"jobId", "status"}
    open_socket.chat("chat", "tokens=2", stream=False)
    (answer,) = [message["data"] for message in open_socket.run("chat") if message["type"] == "event"]
    assert answer["choices"][0]["message"]["content"] == numbers(2)
    body: dict[str, Any] = {"model": "demo", "prompt": "tokens=2"}
    open_socket.say(type="create", id="completion", url="/v1/completions", body=body)
    (answer,) = [message["data"] for message in open_socket.run("completion") if message["type"] == "event"]
    assert answer["choices"][0]["text"] == numbers(2)
    body = {"model": "demo", "input": "tokens=2", "stream": True}
    open_socket.say(type="create", id="response", url="/v1/responses", body=body)
    told = [message["data"] for message in open_socket.run("response") if message["type"] == "event"]
    assert (told[0]["type"], told[-1]["type"]) == ("response.created", "response.completed")


def test_two_jobs_are_told_between_each_other_and_one_is_cancelled_without_the_other(
    scripted: Machine, open_socket: Talk
) -> None:
    open_socket.chat("a", "tokens=1000 every=0.02")
    open_socket.chat("b", "tokens=30 every=0.02")
    heard = [open_socket.hear()]
    while sum(message["type"] == "event" and message["id"] == "b" for message in heard) < 10:
        heard.append(open_socket.hear())
    open_socket.say(type="cancel", id="a")
    while {(message["type"], message["id"]) for message in heard if message["type"] in {"done", "error"}} != {
        ("error", "a"),
        ("done", "b"),
    }:
        heard.append(open_socket.hear())
    assert text_of([message for message in heard if message["id"] == "b"]) == numbers(30)
    (error,) = [message for message in heard if message["type"] == "error"]
    assert (error["error"]["code"], error["status"]) == ("job_cancelled", 409)
    assert status_of(scripted, error["job_id"]) == "cancelled"
    names = [message["id"] for message in heard if message["type"] == "event"]
    assert sum(one != other for one, other in itertools.pairwise(names)) > 4, "they took turns"
    open_socket.chat("a", "tokens=1")  # an id whose job has ended is free again
    assert open_socket.run("a")[-1]["type"] == "done"


def test_jobs_of_a_socket_that_closes_are_cancelled_unless_they_are_to_stay(scripted: Machine) -> None:
    with talk(scripted.url) as left:
        left.chat("lost", "tokens=1000 every=0.05")
        lost = left.until("event", "lost")[0]["job_id"]
        left.chat("kept", "tokens=20 every=0.05", idempotency_key="kept")
        kept = next(message for message in left.until("event", "kept") if message["id"] == "kept")["job_id"]
        body = {"model": "demo", "input": "tokens=20 every=0.05", "background": True, "stream": True}
        left.say(type="create", id="background", url="/v1/responses", body=body)
        in_background = next(each for each in left.until("event", "background") if each["id"] == "background")["job_id"]
        left.say(type="resume", id="again", job_id=kept)
        left.until("event", "again")
    eventually(lambda: status_of(scripted, lost) == "cancelled", what="the end of the job that nobody comes back for")
    for other in (kept, in_background):
        eventually(lambda other=other: status_of(scripted, other) == "completed", what="the end of the others")  # type: ignore[misc]
    with talk(scripted.url) as back:
        back.chat("kept", "tokens=20 every=0.05", idempotency_key="kept")
        accepted, *events, _ = back.run("kept")
        assert accepted["headers"]["idempotent-replayed"] == "true"
        assert accepted["job_id"] == kept
        assert text_of(events) == numbers(20)
        back.chat("other", "tokens=21", idempotency_key="kept")
        assert back.run("other")[-1]["error"]["param"] == "idempotency_key"


def test_a_job_goes_on_at_another_gateway_from_each_of_its_events_while_it_runs_and_after_its_end(
    scripted: Machine,
) -> None:
    port = free_port()
    other = scripted.start("gateway", "--port", str(port))
    other.wait_for(f":{port}")
    url = f"http://127.0.0.1:{port}"
    eventually(lambda: httpx.get(f"{url}/v1/models").status_code == 200, what="the other gateway")
    whole = numbers(12)
    with talk(scripted.url) as first, talk(url) as second:
        first.chat("a", "tokens=12 every=0.1", fields={"n": 2})
        heard = first.until("event", "a")
        job_id = heard[0]["job_id"]
        live = 0
        while heard[-1]["type"] != "done":
            if heard[-1]["type"] == "event":
                live += 1
                second.say(type="resume", id=f"live-{live}", job_id=job_id, after=heard[-1]["event_id"])
            heard.append(first.hear())
        events = [message for message in heard if message["type"] == "event"]
        rests: dict[str, list[dict[str, Any]]] = {}
        while sum(rest[-1]["type"] in {"done", "error"} for rest in rests.values()) < live:
            message = second.hear()
            rests.setdefault(message["id"], []).append(message)
        for place in range(1, len(events) + 1):
            second.say(type="resume", id=f"over-{place}", job_id=job_id, after=events[place - 1]["event_id"])
            rests[f"over-{place}"] = second.run(f"over-{place}")
        for place in range(1, live + 1):
            for when in ("live", "over"):
                rest = rests[f"{when}-{place}"]
                assert rest[-1]["type"] == "done", rest
                for choice in (0, 1):
                    assert text_of([*events[:place], *rest], choice) == whole
    other.stop()


def test_a_response_goes_on_behind_an_event_and_a_wrong_place_is_refused(open_socket: Talk) -> None:
    body = {"model": "demo", "input": "tokens=3", "stream": True}
    open_socket.say(type="create", id="a", url="/v1/responses", body=body)
    told = open_socket.run("a")
    job_id, events = told[0]["job_id"], [each for each in told if each["type"] == "event"]
    first = next(each for each in events if "delta" in each["data"])
    open_socket.say(type="resume", id="b", job_id=job_id, after=first["event_id"])
    rest = [each["data"] for each in open_socket.run("b") if each["type"] == "event"]
    assert first["data"]["delta"] + "".join(each.get("delta", "") for each in rest) == "0 1 2 "
    assert rest[-1]["type"] == "response.completed"
    for after in ("1e", "x", ""):
        open_socket.say(type="resume", id="b", job_id=job_id, after=after)
        last = open_socket.run("b")[-1]
        assert (last["status"], last["error"]["param"]) == (400, "after")
    open_socket.say(type="resume", id="b", job_id="nothing")
    assert open_socket.run("b")[-1]["error"]["code"] == "job_not_found"
    open_socket.say(type="resume", id="b", job_id=job_id, tenant_id="other")
    assert open_socket.run("b")[-1]["status"] == 404


# --- bad messages ----------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "type": "create",
    "id": "x",
    "url": "/v1/chat/completions",
    "body": {"model": "demo", "messages": [{"role": "user", "content": "tokens=1"}]},
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name not in names}


@pytest.mark.parametrize(
    ("message", "param", "name"),
    [
        ([], None, None),
        ("create", None, None),
        (None, None, None),
        ({}, "type", None),
        ({"type": "creat"}, "type", None),
        ({"type": ["create"]}, "type", None),
        ({**GOOD, "type": 7}, "type", None),
        (without("id"), "id", None),
        ({**GOOD, "id": 7}, "id", None),
        ({**GOOD, "id": ""}, "id", None),
        ({**GOOD, "id": "x" * 129}, "id", None),
        ({**GOOD, "id": "x\n"}, "id", None),
        (without("url"), "url", "x"),
        ({**GOOD, "url": "/v1/models"}, "url", "x"),
        (without("body"), "body", "x"),
        ({**GOOD, "body": "x"}, "body", "x"),
        ({**GOOD, "body": {}}, "model", "x"),
        ({**GOOD, "body": {**GOOD["body"], "temperature": "hot"}}, "temperature", "x"),
        ({**GOOD, "body": {**GOOD["body"], "audio": {}}}, "audio", "x"),
        ({**GOOD, "idempotency_key": "a b"}, "idempotency_key", "x"),
        ({**GOOD, "idempotency_key": 7}, "idempotency_key", "x"),
        ({**GOOD, "after": "0"}, "after", "x"),
        ({**GOOD, "extra": 1}, "extra", "x"),
        ({"type": "resume", "id": "x"}, "job_id", "x"),
        ({"type": "resume", "id": "x", "job_id": 7}, "job_id", "x"),
        ({"type": "cancel", "id": "nobody"}, "id", None),
        ({"type": "cancel"}, "id", None),
        ({"type": "ping", "id": "x"}, "id", None),
    ],
)
def test_a_wrong_message_is_an_error_of_the_usual_form_and_the_socket_goes_on(
    open_socket: Talk, message: Any, param: str | None, name: str | None
) -> None:
    open_socket.connection.send(json.dumps(message))
    error = open_socket.hear()
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert (error["type"], error["id"], error["error"]["param"]) == ("error", name, param), error
    assert 400 <= error["status"] < 500
    open_socket.say(type="ping")
    assert open_socket.hear() == {"type": "pong"}


def test_an_error_of_the_route_is_that_of_http(scripted: Machine, open_socket: Talk) -> None:
    wrong: list[dict[str, Any]] = [{"model": "dmeo"}, {"max_tokens": 0}, {"deadline_seconds": 1e6}, {"mesages": []}]
    for fields in wrong:
        body = {**GOOD["body"], **fields}
        answer = scripted.http.post("/v1/chat/completions", json=body)
        open_socket.say(**{**GOOD, "body": body})
        told = open_socket.run("x")[-1]
        assert (told["status"], told["error"]) == (answer.status_code, answer.json()["error"])


def test_an_id_in_use_is_refused_and_its_job_goes_on(open_socket: Talk) -> None:
    open_socket.chat("a", "tokens=20 every=0.02")
    open_socket.until("event", "a")
    open_socket.chat("a", "tokens=1")
    open_socket.say(type="resume", id="a", job_id="x")
    open_socket.say(type="create", id="a")
    heard = open_socket.until("done", "a")
    errors = [message for message in heard if message["type"] == "error"]
    assert [(error["id"], error["status"]) for error in errors] == [(None, 400)] * 3
    assert [error["error"]["param"] for error in errors] == ["id", "id", "url"]


UNREADABLE: list[tuple[Any, int]] = [
    ("{", 1007),
    ("", 1007),
    ("[" * 100_000, 1007),
    ('{"a":' * 9_000, 1007),
    ('{"type": "\\ud800"}', 1007),
    ('{"seed": ' + "9" * 5000 + "}", 1007),
    (b"{}", 1003),
    (b"", 1003),
    ('"' + "x" * (2 << 20) + '"', 1009),
]


@pytest.mark.parametrize(("frame", "code"), UNREADABLE)
def test_what_is_no_message_is_refused_and_only_when_nothing_else_comes_the_socket_is_closed(
    open_socket: Talk, frame: Any, code: int
) -> None:
    for _ in range(7):
        open_socket.connection.send(frame)
        error = open_socket.hear()
        assert (error["type"], error["id"]) == ("error", None)
        assert error["status"] in {400, 413}
    open_socket.say(type="ping")
    assert open_socket.hear() == {"type": "pong"}
    for _ in range(8):
        open_socket.connection.send(frame)
    closed, heard = open_socket.closing()
    assert (closed, len(heard)) == (code, 7)


def test_a_message_larger_than_any_ends_the_socket(open_socket: Talk) -> None:
    open_socket.connection.send("x" * (5 << 20))
    assert open_socket.closing()[0] == 1009


def test_one_job_too_many_on_a_socket_is_refused_until_one_ends(open_socket: Talk) -> None:
    for number in range(65):
        open_socket.chat(f"{number}", "tokens=1000 every=0.05")
    error = open_socket.until("error")[-1]
    assert (error["id"], error["status"], error["headers"]["Retry-After"]) == ("64", 429, "1")
    open_socket.say(type="cancel", id="3")
    open_socket.until("error", "3")
    open_socket.chat("64", "tokens=1")
    open_socket.until("accepted", "64")


# --- who gets in -----------------------------------------------------------------------------------------------------


def test_pages_of_other_origins_may_open_no_socket(scripted: Machine) -> None:
    for origin in (scripted.url, f"http://127.0.0.1:{scripted.port}"):
        with talk(scripted.url, origin=origin) as found:
            found.say(type="ping")
            assert found.hear() == {"type": "pong"}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "file://"):
        with pytest.raises(InvalidStatus) as caught, talk(scripted.url, origin=origin):
            pass
        assert caught.value.response.status_code == 403
        assert json.loads(caught.value.response.body)["error"]["param"] == "origin"


def test_a_handshake_that_is_wrong_is_answered_in_the_form_of_all_errors(scripted: Machine) -> None:
    answer = scripted.http.get("/v1/stream")
    assert (answer.status_code, answer.json()["error"]["code"]) == (426, "upgrade_required")
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "7", "Sec-WebSocket-Key": "x"}
    answer = scripted.http.get("/v1/stream", headers=upgrade)
    assert (answer.status_code, answer.headers["sec-websocket-version"]) == (426, "13")
    with pytest.raises(InvalidStatus) as caught:
        connect(f"ws://127.0.0.1:{scripted.port}/v1/streams", proxy=None)
    assert caught.value.response.status_code == 404
    assert json.loads(caught.value.response.body)["error"]["code"] == "route_not_found"
    with pytest.raises(InvalidStatus) as caught:
        connect(f"ws://127.0.0.1:{scripted.port}/v1/stream", additional_headers={"Host": "evil.example"}, proxy=None)
    assert caught.value.response.status_code == 400


def test_a_key_is_asked_for_at_the_handshake_and_its_end_ends_the_socket_within_five_seconds(tmp_path: Path) -> None:
    with Machine(tmp_path / "keys") as machine:
        key, look = (
            machine.run("keys", "create", "--tenant", "one", "--scope", scope, "--name", scope).stdout.strip()
            for scope in ("models", "read-only")
        )
        machine.wait_ready(machine.start("up", **machine.scripted()))
        wrong: list[tuple[dict[str, Any], int]] = [
            ({}, 401),
            ({"additional_headers": {"Authorization": "Bearer sk-wrong"}}, 401),
            ({"subprotocols": [Subprotocol("tether"), Subprotocol("openai-insecure-api-key.sk-wrong")]}, 401),
            ({"additional_headers": {"Authorization": f"Bearer {look}"}}, 403),
        ]
        for options, status in wrong:
            with pytest.raises(InvalidStatus) as caught, talk(machine.url, **options):
                pass
            assert caught.value.response.status_code == status
            assert set(json.loads(caught.value.response.body)["error"]) == {"message", "type", "param", "code"}
        as_browsers = [Subprotocol("tether"), Subprotocol(f"openai-insecure-api-key.{key}")]
        with talk(machine.url, subprotocols=as_browsers) as found:
            assert found.connection.subprotocol == "tether"
        with talk(machine.url, additional_headers={"Authorization": f"Bearer {key}"}) as found:
            found.chat("a", "tokens=1000 every=0.05")
            found.chat("b", "tokens=1000 every=0.05")
            heard = found.until("event", "b")
            job_id = next(message["job_id"] for message in heard if message["id"] == "a")
            found.chat("c", "tokens=1", fields={"tenantId": "two"})
            assert found.until("error", "c")[-1]["error"]["code"] == "permission_denied"
            [record] = [each for each in machine.read("keys", "list") if each["name"] == "models"]
            assert machine.run("keys", "revoke", record["id"]).returncode == 0
            revoked_at = time.monotonic()
            code, heard = found.closing()
            assert time.monotonic() - revoked_at < 5.5
            assert code == 1008
            ends = {message["id"]: message["error"]["code"] for message in heard if message["type"] == "error"}
            assert ends == {"a": "invalid_api_key", "b": "invalid_api_key"}
        eventually(
            lambda: {job["status"] for job in machine.read("jobs", "list", "--tenant", "one")} == {"cancelled"},
            what="the jobs' end",
        )
        assert job_id


# --- the gateway stops -----------------------------------------------------------------------------------------------


def test_a_gateway_that_stops_takes_no_new_jobs_ends_those_that_run_and_says_goodbye(machine: Machine) -> None:
    up = machine.start("up", **machine.scripted())
    machine.wait_ready(up)
    with talk(machine.url) as busy, talk(machine.url) as idle:
        busy.chat("a", "tokens=40 every=0.05")
        busy.until("event", "a")
        stopped = threading.Thread(target=up.stop, daemon=True)
        stopped.start()
        assert idle.closing() == (1001, [])
        busy.chat("b", "tokens=1")
        heard = busy.until("done", "a")
        assert text_of([message for message in heard if message["id"] == "a"]) == numbers(40)
        (error,) = [message for message in heard if message["type"] == "error"]
        assert (error["id"], error["error"]["code"], error["status"]) == ("b", "draining", 503)
        assert busy.closing() == (1001, [])
        stopped.join(30)
    assert up.wait() == 0
    assert "Traceback" not in up.output


def test_jobs_that_outlast_the_grace_time_end_with_an_error_and_a_goodbye(machine: Machine) -> None:
    up = machine.start("up", "--grace", "1", **machine.scripted())
    machine.wait_ready(up)
    with talk(machine.url) as found:
        found.chat("a", "tokens=1000 every=0.05")
        found.until("event", "a")
        stopped = threading.Thread(target=up.stop, daemon=True)
        stopped.start()
        code, heard = found.closing()
        assert code == 1001
        assert (heard[-1]["type"], heard[-1]["error"]["code"]) == ("error", "draining")
        stopped.join(30)
    assert "Traceback" not in up.output
