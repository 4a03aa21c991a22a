"""Back-pressure with real processes: who waits is told for how long, and a flood is refused for itself alone."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI, RateLimitError

from tests.processes import Machine, eventually

MAX_QUEUED = 6
LONG = "tokens=2000 every=0.05"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with one slot, a short queue, and a model that says what the test wants."""
    with Machine(tmp_path_factory.mktemp("pressure")) as machine:
        up = machine.start("up", "--max-queued", str(MAX_QUEUED), **machine.scripted(slots=1))
        machine.wait_ready(up)
        yield machine
        assert up.is_alive
        assert "Traceback" not in up.output


@pytest.fixture
def crowd(served: Machine) -> Iterator[Callable[..., httpx.Response]]:
    """Submits jobs that nobody waits for, and cancels what is left of them."""
    job_ids: list[str] = []

    def submit(tenant: str, text: str = LONG, **fields: Any) -> httpx.Response:
        answer = served.infer(text, tenantId=tenant, wait=False, **fields)
        if answer.status_code == 202:
            job_ids.append(answer.json()["jobId"])
        return answer

    yield submit
    for job_id in reversed(job_ids):
        served.http.delete(f"/v1/jobs/{job_id}")


def running(machine: Machine, answer: httpx.Response) -> None:
    """Wait until a job runs."""
    job_id = answer.json()["jobId"]
    eventually(lambda: machine.http.get(f"/v1/jobs/{job_id}").json()["status"] == "running", what="a running job")


def test_a_flood_gets_429_for_itself_while_others_still_get_in_until_there_is_no_place(
    served: Machine, crowd: Callable[..., httpx.Response]
) -> None:
    assert served.infer("tokens=4 every=0.1").status_code == 200  # from now on it is known how long jobs take
    running(served, crowd("flood"))
    flood = [crowd("flood") for _ in range(8)]
    assert [answer.status_code for answer in flood] == [202] * 3 + [429] * 5
    assert [answer.json()["place"] for answer in flood[:3]] == [1, 2, 3]
    error = flood[-1].json()["error"]
    assert (error["code"], error["type"]) == ("tenant_queue_full", "rate_limit_error")
    assert "3 jobs of this tenant wait already" in error["message"]
    assert int(flood[-1].headers["retry-after"]) >= 1
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
        pytest.raises(RateLimitError) as caught,
    ):
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], extra_body={"tenantId": "flood"}
        )
    assert caught.value.code == "tenant_queue_full"
    others = [crowd(tenant) for tenant in ("one", "one", "one", "two", "three")]
    assert [answer.status_code for answer in others] == [202, 202, 429, 202, 503]
    assert others[0].json()["place"] == 2, "tenants take turns"
    refused = others[-1].json()["error"]
    assert refused["code"] == "queue_full"
    assert "no such model 0, draining 0, full 1, too little memory 0" in refused["message"]
    assert refused["reasons"]["full"] == 1
    assert sum(refused["reasons"].values()) == 1
    assert int(others[-1].headers["retry-after"]) >= 1


def test_who_waits_is_told_the_place_and_the_expected_wait_wherever_it_looks(
    served: Machine, crowd: Callable[..., httpx.Response]
) -> None:
    for _ in range(3):
        assert served.infer("tokens=4 every=0.1").status_code == 200
    first = crowd("a")
    assert "x-tether-queue-place" not in first.headers
    running(served, first)
    crowd("a")
    answer = crowd("b")
    body = answer.json()
    assert (body["status"], body["place"]) == ("queued", 2)
    assert 0.4 < body["expectedSeconds"] < 20
    assert answer.headers["x-tether-queue-place"] == "2"
    assert float(answer.headers["x-tether-expected-wait-seconds"]) == body["expectedSeconds"]
    waiting = served.http.get(f"/v1/jobs/{body['jobId']}").json()["waiting"]
    assert waiting["place"] == 2
    assert waiting["expected_seconds"] >= body["expectedSeconds"] - 0.1, "what runs long makes the wait longer"
    assert served.http.get(f"/v1/jobs/{first.json()['jobId']}").json()["waiting"] is None


def test_a_stream_tells_how_the_job_moves_on(served: Machine, crowd: Callable[..., httpx.Response]) -> None:
    assert served.infer("tokens=4 every=0.1").status_code == 200
    ahead = [crowd("a"), crowd("a", "tokens=1")]
    running(served, ahead[0])
    body = {"tenantId": "b", "modelId": "demo", "version": "1.0", "input": "tokens=2", "stream": True, "priority": -5}
    events: list[dict[str, Any]] = []
    with served.http.stream("POST", "/infer", json=body) as answer:
        assert answer.headers["x-tether-queue-place"] == "2"
        for line in answer.iter_lines():
            if not line.startswith("data: "):
                continue
            events.append(json.loads(line[6:]))
            if len(events) == 1:
                served.http.delete(f"/v1/jobs/{ahead[1].json()['jobId']}")
            if events[-1].get("place") == 1:
                served.http.delete(f"/v1/jobs/{ahead[0].json()['jobId']}")
    assert [event["place"] for event in events if event["type"] == "queued"][:2] == [2, 1]
    assert all(event["expectedSeconds"] > 0 for event in events if event["type"] == "queued")
    assert [event["type"] for event in events][-2:] == ["tokens", "end"]


@pytest.mark.parametrize("helper", [False, True])
def test_the_openai_package_reads_on_through_the_wait(
    served: Machine, crowd: Callable[..., httpx.Response], *, helper: bool
) -> None:
    assert served.infer("tokens=4 every=0.1").status_code == 200
    first = crowd("a")
    running(served, first)
    messages: Any = [{"role": "user", "content": "tokens=2"}]
    tenant = {"tenantId": "b"}
    queued: list[Any] = []
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        if helper:
            with client.chat.completions.stream(model="demo", messages=messages, extra_body=tenant) as stream:
                for event in stream:
                    if event.type == "chunk" and (event.chunk.model_extra or {}).get("tether"):
                        queued.append(event.chunk.model_extra["tether"]["queued"])  # type: ignore[index]
                        served.http.delete(f"/v1/jobs/{first.json()['jobId']}")
                text = stream.get_final_completion().choices[0].message.content
        else:
            text = ""
            for chunk in client.chat.completions.create(
                model="demo", messages=messages, stream=True, extra_body=tenant
            ):
                if (chunk.model_extra or {}).get("tether"):
                    queued.append(chunk.model_extra["tether"]["queued"])  # type: ignore[index]
                    served.http.delete(f"/v1/jobs/{first.json()['jobId']}")
                text += chunk.choices[0].delta.content or ""
    assert text == "0 1 "
    assert queued[0]["place"] == 1
    assert queued[0]["expected_seconds"] > 0


def test_a_response_that_waits_says_so(served: Machine, crowd: Callable[..., httpx.Response]) -> None:
    first = crowd("a")
    running(served, first)
    types: list[str] = []
    with OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.responses.create(model="demo", input="tokens=2", stream=True, extra_body={"tenantId": "b"})
        for event in stream:
            types.append(event.type)
            if event.type == "response.queued":
                assert event.response.status == "queued"
                served.http.delete(f"/v1/jobs/{first.json()['jobId']}")
    assert types[0] == "response.created"
    assert "response.queued" in types
    assert types[-1] == "response.completed"


def test_a_stream_s_comments_have_place_and_wait_too(served: Machine, crowd: Callable[..., httpx.Response]) -> None:
    assert served.infer("tokens=4 every=0.1").status_code == 200
    running(served, crowd("a"))
    body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": True, "tenantId": "b"}
    with served.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith(":"))
    assert re.fullmatch(r": queued, place 1, expected wait [0-9.]+ s", line)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_deadline_holds_before_the_first_token(
    served: Machine, crowd: Callable[..., httpx.Response], *, queued: bool, stream: bool
) -> None:
    if queued:
        running(served, crowd("a"))
    began = time.monotonic()
    answer = served.infer("every=600", tenantId="b", stream=stream, deadlineSeconds=1.0)
    assert 0.9 < time.monotonic() - began < 6
    if stream:
        error = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    else:
        assert answer.status_code == 504
        error = answer.json()["error"]
    assert error["code"] == "deadline_exceeded"
