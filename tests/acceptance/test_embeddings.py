"""Embeddings with the real `openai` client, against real processes."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.processes import QUESTION, Machine, eventually


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with the demo model."""
    with Machine(tmp_path_factory.mktemp("demo")) as machine:
        up = machine.start("up")
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


def client_of(machine: Machine) -> OpenAI:
    return OpenAI(base_url=f"{machine.url}/v1", api_key="sk-any", max_retries=0)


def length(vector: list[float]) -> float:
    return math.sqrt(sum(each * each for each in vector))


def test_each_input_has_a_vector_of_length_one_in_every_form(demo: Machine) -> None:
    with client_of(demo) as client:
        texts = [QUESTION, "What is the capital of Italy?", "x"]
        found = client.embeddings.create(model="demo", input=texts)  # the client asks for base64 by itself
        assert (found.object, found.model, [each.index for each in found.data]) == ("list", "demo@1.0", [0, 1, 2])
        assert found.usage.prompt_tokens == found.usage.total_tokens > 3
        for each in found.data:
            assert each.object == "embedding"
            assert length(each.embedding) == pytest.approx(1, abs=1e-5)
        plain = client.embeddings.create(model="demo@1.0", input=texts, encoding_format="float")
        assert [each.embedding for each in plain.data] == [
            pytest.approx(each.embedding, abs=1e-6) for each in found.data
        ]
        alone = client.embeddings.create(model="demo", input=QUESTION, dimensions=len(plain.data[0].embedding))
        assert alone.data[0].embedding == found.data[0].embedding
        first, second, third = (each.embedding for each in found.data)
        near, far = (sum(a * b for a, b in zip(first, other, strict=True)) for other in (second, third))
        assert near > far, "two questions are nearer to each other than to a letter"
        for ids in ([3, 4, 5], [[3, 4, 5], [6]]):
            by_ids = client.embeddings.create(model="demo", input=ids)
            assert len(by_ids.data) == (1 if ids == [3, 4, 5] else 2)
            assert by_ids.usage.prompt_tokens == (3 if ids == [3, 4, 5] else 4)


def test_an_embedding_is_a_job_as_any_other(demo: Machine) -> None:
    answer = demo.http.post("/v1/embeddings", json={"model": "demo", "input": ["a", "b"], "keep": "all"})
    job = demo.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}").json()
    assert (job["status"], job["completion_tokens"], len(job["result"].split())) == ("completed", 2, 2)
    assert json.loads(job["input"]) == {"inputs": ["a", "b"]}
    stream = demo.http.get(f"/v1/jobs/{job['id']}/stream").text.split("\n\n")
    assert json.loads(stream[0].removeprefix("data: "))["data"] == answer.json()["data"]
    answer = demo.http.post("/v1/embeddings", json={"model": "demo", "input": "a"})
    job = demo.http.get(f"/v1/jobs/{answer.headers['x-tether-job-id']}").json()
    assert (job["status"], job["result"], job["input"]) == ("completed", None, None)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": ""}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": [[]]}, "invalid_request", "input"),
        ({"input": [1.5]}, "invalid_request", "input"),
        ({"input": [True]}, "invalid_request", "input"),
        ({"input": [-1]}, "invalid_request", "input"),
        ({"input": {"a": 1}}, "invalid_request", "input"),
        ({"input": ["x"] * 2049}, "invalid_request", "input"),
        ({"input": [2_000_000]}, "invalid_request", "input"),
        ({"input": "word " * 3000}, "context_length_exceeded", "input"),
        ({}, "invalid_request", "input"),
        ({"input": "x", "dimensions": 3}, "unsupported_parameter", "dimensions"),
        ({"input": "x", "dimensions": 0}, "invalid_request", "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "invalid_request", "encoding_format"),
        ({"input": "x", "stream": True}, "unsupported_parameter", "stream"),
        ({"input": "x", "max_tokens": 3}, "invalid_request", "max_tokens"),
    ],
)
def test_what_is_not_good_is_refused(demo: Machine, body: dict[str, Any], code: str, param: str) -> None:
    answer = demo.http.post("/v1/embeddings", json={"model": "demo", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, code), error
    assert error["param"] == param


def test_an_unknown_model_is_not_found(demo: Machine) -> None:
    with client_of(demo) as client, pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="unknown", input="x")


def test_a_batch_of_embeddings(demo: Machine) -> None:
    with client_of(demo) as client:
        body = {"model": "demo", "input": QUESTION}
        lines = [
            json.dumps({"custom_id": f"{number}", "method": "POST", "url": "/v1/embeddings", "body": body})
            for number in range(3)
        ]
        file = client.files.create(file=("a.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
        eventually(lambda: client.batches.retrieve(batch.id).status == "completed", what="the batch")
        output_id = client.batches.retrieve(batch.id).output_file_id
        assert output_id is not None
        alone = client.embeddings.create(model="demo", input=QUESTION, encoding_format="float").data[0].embedding
        for text in client.files.content(output_id).text.splitlines():
            found = json.loads(text)["response"]["body"]
            assert found["data"][0]["embedding"] == alone
            assert found["usage"]["prompt_tokens"] > 1


def test_vectors_go_on_where_a_lost_worker_stopped(machine: Machine) -> None:
    gateway, orchestrator = machine.start("gateway"), machine.start("orchestrator")
    workers = [machine.start("worker", "--name", name, **machine.scripted(slots=1)) for name in ("one", "two")]
    machine.wait_ready(gateway, orchestrator, *workers)
    eventually(lambda: machine.http.get("/readyz").json().get("ready_workers") == 2, what="both workers")
    ids = {worker["id"]: worker["name"] for worker in machine.read("workers", "list")}
    with client_of(machine) as client:
        answers: list[Any] = []

        def ask() -> None:
            answers.append(client.embeddings.create(model="demo", input=["every=0.1"] * 40, encoding_format="float"))

        asking = threading.Thread(target=ask)
        asking.start()
        (job,) = eventually(lambda: machine.http.get("/v1/jobs?status=running").json()["data"], what="a running job")
        busy = dict(zip(("one", "two"), workers, strict=True))[ids[job["worker_id"]]]
        busy.send(signal.SIGKILL)
        asking.join(60)
        (answer,) = answers
        assert [each.embedding[:2] for each in answer.data] == [[float(number), 9.0] for number in range(40)]
    assert machine.http.get(f"/v1/jobs/{job['id']}").json()["attempts"] == 2


def test_a_model_that_gives_none_is_refused_at_once(demo: Machine, machine: Machine) -> None:
    up = machine.start("up", "--engine", "openai", "--base-url", f"{demo.url}/v1", "--model", "demo")
    machine.wait_ready(up)
    answer = machine.http.post("/v1/embeddings", json={"model": "demo", "input": "x"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "model")
    assert "embeddings" in error["message"]
