"""Generation stops soon after nobody wants it any more: however that is said, streamed or not, and before the first token."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.processes import Machine, eventually

EVERY = 0.05
MOST_TOKENS = 8
"""That may be generated after the client has gone."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine")) as machine:
        machine.wait_ready(machine.start("up", **machine.scripted(slots=16)))
        yield machine


class Asking:
    """A client that asks for a long answer, and can hang up."""

    def __init__(self, machine: Machine, **fields: Any) -> None:
        body = json.dumps({"tenantId": "t", "modelId": "demo", "version": "1.0", **fields}).encode()
        head = (
            f"POST /infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        self.socket = socket.create_connection(("127.0.0.1", machine.port), timeout=30)
        self.socket.sendall(head.encode() + b"\r\n\r\n" + body)

    def hang_up(self) -> None:
        self.socket.close()


def gone(machine: Machine, asking: Asking, job_id: str) -> None:
    """The client closes its connection."""
    del machine, job_id
    asking.hang_up()


def deleted(machine: Machine, asking: Asking, job_id: str) -> None:
    """Somebody asks for the job's end."""
    del asking
    assert machine.http.delete(f"/v1/jobs/{job_id}").status_code == 200


def live(machine: Machine, key: str) -> dict[str, Any] | None:
    """Return the job with this script, where it is running."""
    jobs = machine.http.get("/v1/jobs", params={"status": "running"}).json()["data"]
    return next((job for job in jobs if machine.http.get(f"/v1/jobs/{job['id']}").json()["input"] == key), None)


@pytest.mark.parametrize("end", [gone, deleted])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("seconds", [0.0, 0.5], ids=["before_the_first_token", "in_mid_answer"])
def test_generation_stops_within_eight_tokens(
    served: Machine, end: Callable[[Machine, Asking, str], None], stream: bool, seconds: float
) -> None:
    first = 1.0 if seconds == 0.0 else 0.0  # where the first token is late
    script = f"tokens=2000 every={first or EVERY} name={end.__name__}-{stream}-{seconds}"
    asking = Asking(served, input=script, stream=stream)
    job = eventually(lambda: live(served, script), what="the job runs")
    eventually(lambda: time.time() - job["started_at"] >= seconds, what="some of the answer")
    began, job_id = job["started_at"], job["id"]
    ended_at = time.time()
    end(served, asking, job_id)
    record = eventually(
        lambda: found if (found := served.http.get(f"/v1/jobs/{job_id}").json())["ended_at"] else None, seconds=10
    )
    assert record["status"] == "cancelled"
    most = MOST_TOKENS if first else int((ended_at - began) / EVERY) + 1 + MOST_TOKENS
    assert record["completion_tokens"] <= most
    attempts = served.read("jobs", "show", job_id)["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["cancelled"]
    assert attempts[0]["completion_tokens"] == record["completion_tokens"]
    if not first:
        assert record["completion_tokens"] > 0, "what was spent is in the job"
    eventually(lambda: served.http.get("/readyz").json()["running"] == 0, seconds=5)
    asking.hang_up()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_deadline_stops_generation(served: Machine, stream: bool) -> None:
    answer = served.infer(f"tokens=2000 every={EVERY}", stream=stream, deadlineSeconds=1)
    assert "deadline_exceeded" in answer.text
    record = served.read("jobs", "list", "-n", "1")[0]
    assert record["status"] == "expired"
    assert 0 < record["usage"]["completion_tokens"] <= 1 / EVERY + MOST_TOKENS
