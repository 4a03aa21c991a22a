"""Files and batches with the real `openai` client, against real processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from tests.processes import ANSWER, QUESTION, Machine, eventually

ASK = [{"role": "user", "content": QUESTION}]
CHAT: Any = "/v1/chat/completions"
ENDED = {"completed", "failed", "expired", "cancelled"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with the demo model."""
    with Machine(tmp_path_factory.mktemp("demo")) as machine:
        up = machine.start("up")
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose model says what the test wants."""
    with Machine(tmp_path_factory.mktemp("scripted")) as machine:
        up = machine.start("up", **machine.scripted(slots=4), TETHER_GATEWAY_MAX_FILE="300000")
        machine.wait_ready(up)
        yield machine
        assert "Traceback" not in up.output


def client_of(machine: Machine, key: str = "sk-any") -> OpenAI:
    return OpenAI(base_url=f"{machine.url}/v1", api_key=key, max_retries=0)


def line(custom_id: str, url: str = CHAT, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "demo", **body}})


def chat(custom_id: str, text: str, **body: Any) -> str:
    return line(custom_id, messages=[{"role": "user", "content": text}], **body)


def begin(client: OpenAI, lines: Iterable[str], endpoint: Any = CHAT, **fields: Any) -> Batch:
    content = "\n".join(lines).encode()
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


def finish(client: OpenAI, batch: Batch) -> Batch:
    """Wait for a batch's end."""

    def ended() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ENDED else None

    return eventually(ended, what=batch.id)


def results(client: OpenAI, file_id: str | None) -> dict[str, Any]:
    """The lines of an output or error file by their custom ids."""
    if file_id is None:
        return {}
    found = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    assert len({each["custom_id"] for each in found}) == len({each["id"] for each in found}) == len(found)
    return {each["custom_id"]: each for each in found}


def test_a_batch_is_answered_as_its_requests_would_be_one_by_one(demo: Machine) -> None:
    with client_of(demo) as client:
        lines = [chat(f"question-{n}", QUESTION, temperature=0) for n in range(5)]
        begun = begin(client, [*lines, "", chat("wrong", QUESTION, temperature=9)], metadata={"for": "us"})
        assert (begun.status, begun.completion_window, begun.metadata) == ("validating", "24h", {"for": "us"})
        done = finish(client, begun)
        assert (done.status, done.model, done.errors) == ("completed", "demo", None)
        assert done.request_counts is not None
        assert done.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
        assert done.created_at <= (done.in_progress_at or 0) <= (done.finalizing_at or 0) <= (done.completed_at or 0)
        output, errors = results(client, done.output_file_id), results(client, done.error_file_id)
        assert list(output) == [f"question-{n}" for n in range(5)]
        for each in output.values():
            assert each["error"] is None
            assert each["response"]["status_code"] == 200
            body = each["response"]["body"]
            assert (body["object"], body["model"]) == ("chat.completion", "demo@1.0")
            assert body["choices"][0]["message"]["content"] == ANSWER
            assert body["usage"]["total_tokens"] > 2
            assert body["system_fingerprint"].endswith("_float32")
            job = demo.http.get(f"/v1/jobs/{each['response']['request_id']}").json()
            assert (job["status"], job["tenant_id"]) == ("completed", "default")
        (wrong,) = errors.values()
        assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("wrong", 400)
        assert wrong["response"]["body"]["error"]["param"] == "temperature"
        (listed,) = [each for each in client.batches.list(limit=1).data if each.id == done.id]
        assert listed == done


def test_completions_and_responses_have_batches_too(demo: Machine) -> None:
    with client_of(demo) as client:
        prompt = begin(
            client,
            [line("one", "/v1/completions", prompt="The capital of", max_tokens=3, temperature=0, n=2, logprobs=1)],
            "/v1/completions",
        )
        response = begin(client, [line("two", "/v1/responses", input=QUESTION, temperature=0)], "/v1/responses")
        body = results(client, finish(client, prompt).output_file_id)["one"]["response"]["body"]
        alone = client.completions.create(
            model="demo", prompt="The capital of", max_tokens=3, temperature=0, n=2, logprobs=1
        )
        assert [choice["text"] for choice in body["choices"]] == [choice.text for choice in alone.choices]
        assert alone.choices[0].logprobs is not None
        assert body["choices"][1]["logprobs"]["tokens"] == alone.choices[1].logprobs.tokens  # type: ignore[union-attr]
        body = results(client, finish(client, response).output_file_id)["two"]["response"]["body"]
        assert (body["object"], body["status"]) == ("response", "completed")
        assert body["output"][0]["content"][0]["text"] == ANSWER


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_kept_as_it_was_until_it_is_deleted(scripted: Machine) -> None:
    with client_of(scripted) as client:
        content = ("ünïcödé 🦊\r\n" * 12_000).encode()  # several parts, cut within characters
        file = client.files.create(file=("dir/na\nme.jsonl", content), purpose="batch")
        assert (file.bytes, file.purpose, file.status, file.object) == (len(content), "batch", "processed", "file")
        assert client.files.retrieve(file.id) == file
        assert client.files.content(file.id).content == content
        later = client.files.create(
            file=("b.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert later.expires_at == later.created_at + 3600
        assert [each.id for each in client.files.list(limit=2)][:2] == [later.id, file.id]
        assert [each.id for each in client.files.list(limit=1, after=later.id).data] == [file.id]
        assert [each.id for each in client.files.list(order="asc", after=file.id).data] == [later.id]
        assert client.files.list(purpose="batch_output", after=file.id).data == []
        assert client.files.delete(file.id).deleted
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as missing:
                ask(file.id)
            assert missing.value.code == "file_not_found"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"files": {"file": ("a", b"")}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": {"file": ("a", b"\xff\xfe")}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": {"file": ("a", b"\xe2\x82")}, "data": {"purpose": "batch"}}, 400, "file"),
        ({"files": {"file": ("a", b"{}")}, "data": {"purpose": "fine-tune"}}, 400, "purpose"),
        ({"files": {"file": ("a", b"{}")}}, 400, "purpose"),
        ({"files": {"other": ("a", b"{}")}, "data": {"purpose": "batch"}}, 400, "other"),
        ({"files": {"x": (None, b"1")}, "data": {"purpose": "batch"}}, 400, "x"),
        ({"files": {"purpose": (None, b"batch")}}, 400, "file"),
        ({"json": {"file": "a", "purpose": "batch"}}, 400, None),
        ({"content": b""}, 400, None),
        ({"content": b"rubbish", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, None),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, 400, None),
        ({"files": {"file": ("a", b"x" * 300_001)}, "data": {"purpose": "batch"}}, 413, "file"),
        ({"files": {"file": ("a", b"x" * 900_000)}, "data": {"purpose": "batch"}}, 413, None),
        (
            {
                "files": {"file": ("a", b"{}")},
                "data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "9"},
            },
            400,
            "expires_after.seconds",
        ),
        (
            {"files": {"file": ("a", b"{}")}, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}},
            400,
            "expires_after",
        ),
    ],
)
def test_an_upload_that_is_not_good_is_refused(
    scripted: Machine, fields: dict[str, Any], status: int, param: str | None
) -> None:
    answer = scripted.http.post("/v1/files", **fields)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files?limit=0"),
        ("GET", "/v1/files?order=up"),
        ("GET", "/v1/files?nonsense=1"),
        ("GET", "/v1/files?purpose=vision"),
        ("GET", "/v1/batches?limit=1000"),
        ("GET", "/v1/batches?nonsense=1"),
    ],
)
def test_a_query_that_is_not_good_is_refused(scripted: Machine, method: str, path: str) -> None:
    assert scripted.http.request(method, path).status_code == 400


# --- batches that are not good ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["not JSON"], [("invalid_json_line", 1)]),
        (["[1]"], [("invalid_json_line", 1)]),
        ([" ", "", "\t"], [("empty_file", None)]),
        ([chat("a", "x"), chat("b", "x"), chat("a", "x")], [("duplicate_custom_id", 3)]),
        ([line("a", "/v1/completions", prompt="x")], [("url_mismatch", 1)]),
        ([chat("a", "x").replace("POST", "GET")], [("invalid_method", 1)]),
        ([chat("a", "x"), "", chat("b", "x", model="other")], [("mismatched_model", 3)]),
        ([chat("a", "x", model=None)], [("missing_required_parameter", 1)]),
        ([json.dumps({"custom_id": "a", "method": "POST", "url": CHAT})], [("missing_required_parameter", 1)]),
        (['{"custom_id": 1, "method": "POST", "url": "x", "body": {}}'], [("invalid_request", 1)]),
        ([chat("", "x")], [("invalid_request", 1)]),
        ([chat("a", "x")[:-1] + ', "more": 1}'], [("unknown_parameter", 1)]),
        ([chat("a", "x" * 270_000)], [("invalid_request", 1)]),
        ([chat("a", "x"), "{", chat("b", "x"), "}"], [("invalid_json_line", 2), ("invalid_json_line", 4)]),
    ],
)
def test_an_input_file_that_is_not_good_fails_with_the_lines_at_fault(
    scripted: Machine, lines: list[str], expected: list[tuple[str, int | None]]
) -> None:
    with client_of(scripted) as client:
        failed = finish(client, begin(client, lines))
        assert (failed.status, failed.output_file_id, failed.error_file_id) == ("failed", None, None)
        assert failed.failed_at is not None
        assert failed.errors is not None
        assert failed.errors.data is not None
        assert [(each.code, each.line) for each in failed.errors.data] == expected
        assert all(each.message for each in failed.errors.data)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"temperature": "hot"}, "temperature"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": []}, "messages"),
        ({"tenantId": "somebody"}, "tenantId"),
        ({"model": "unknown"}, "model"),
    ],
)
def test_a_request_that_its_route_would_refuse_is_a_line_of_the_error_file(
    scripted: Machine, body: dict[str, Any], param: str
) -> None:
    with client_of(scripted) as client:
        done = finish(client, begin(client, [line("a", **{"messages": [{"role": "user", "content": "x"}], **body})]))
        assert (done.status, done.output_file_id) == ("completed", None)
        found = results(client, done.error_file_id)["a"]["response"]
        assert 400 <= found["status_code"] < 500
        assert found["body"]["error"]["param"] == param


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"input_file_id": "file-unknown"}, 404, "input_file_id"),
        ({"endpoint": "/v1/nothing"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"input_file_id": None}, 400, "input_file_id"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "output_expires_after.seconds"),
    ],
)
def test_a_batch_that_is_not_good_is_refused(
    scripted: Machine, changes: dict[str, Any], status: int, param: str
) -> None:
    with client_of(scripted) as client:
        file = client.files.create(file=("a.jsonl", chat("a", "x").encode()), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **changes}
        answer = scripted.http.post("/v1/batches", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_a_batch_s_output_is_no_input_and_a_deleted_file_is_gone(scripted: Machine) -> None:
    with client_of(scripted) as client:
        done = finish(client, begin(client, [chat("a", "x")]))
        for file_id, kind in [
            (done.output_file_id, openai.BadRequestError),
            (done.input_file_id, openai.NotFoundError),
        ]:
            assert file_id is not None
            if kind is openai.NotFoundError:
                client.files.delete(file_id)
            with pytest.raises(kind):
                client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_unknown")
        with pytest.raises(openai.NotFoundError):
            client.batches.cancel("batch_unknown")
        with pytest.raises(openai.ConflictError, match="it is completed"):
            client.batches.cancel(done.id)


# --- their life ------------------------------------------------------------------------------------------------------


def counts(batch: Batch) -> dict[str, int]:
    assert batch.request_counts is not None
    return {name: int(str(number)) for name, number in batch.request_counts.to_dict().items()}


def wait_until_under_way(client: OpenAI, batch: Batch, num_completed: int = 1) -> None:
    def under_way() -> bool:
        return counts(client.batches.retrieve(batch.id))["completed"] >= num_completed

    eventually(under_way, what="lines completed")


def test_a_cancelled_batch_stops_soon_and_keeps_what_was_done(scripted: Machine) -> None:
    with client_of(scripted) as client:
        lines = [chat(f"quick-{n}", "tokens=2") for n in range(4)]
        lines += [chat(f"slow-{n}", "tokens=1000 every=0.05") for n in range(40)]
        batch = begin(client, lines)
        wait_until_under_way(client, batch, 4)
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert client.batches.cancel(batch.id).status in {"cancelling", "cancelled"}  # once more does no harm
        done = finish(client, batch)
        assert (done.status, done.completed_at) == ("cancelled", None)
        assert (done.cancelled_at or 0) - (done.cancelling_at or 0) <= 10
        assert counts(done) == {"total": 44, "completed": 4, "failed": 40}
        assert list(results(client, done.output_file_id)) == [f"quick-{n}" for n in range(4)]
        errors = results(client, done.error_file_id)
        assert {each["error"]["code"] for each in errors.values()} == {"batch_cancelled"}
        assert {each["response"] for each in errors.values()} == {None}
        assert [job for job in scripted.read("jobs", "list") if job["status"] in {"queued", "running"}] == []


def test_whoever_waits_for_an_answer_goes_before_a_batch(scripted: Machine) -> None:
    with client_of(scripted) as client:
        batch = begin(client, [chat(f"{n}", "tokens=10 every=0.05") for n in range(60)])
        wait_until_under_way(client, batch)
        for _ in range(5):
            answer = client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "tokens=1"}])
            assert answer.choices[0].message.content == "0 "
        assert counts(client.batches.retrieve(batch.id))["completed"] < 60
        client.batches.cancel(batch.id)
        assert finish(client, batch).status == "cancelled"


@pytest.mark.parametrize("keep", ["nothing", "all"])
def test_the_ledger_keeps_of_a_batch_s_jobs_what_was_asked_for(scripted: Machine, keep: str) -> None:
    with client_of(scripted) as client:
        done = finish(client, begin(client, [chat("a", "tokens=3", keep=keep)]))
        response = results(client, done.output_file_id)["a"]["response"]
        assert response["body"]["choices"][0]["message"]["content"] == "0 1 2 "
        job = scripted.http.get(f"/v1/jobs/{response['request_id']}").json()
        assert (job["result"], job["input"] is not None) == ((None, False) if keep == "nothing" else ("0 1 2 ", True))


def test_an_operator_lists_shows_and_cancels_batches(scripted: Machine) -> None:
    with client_of(scripted) as client:
        done = finish(client, begin(client, [chat("a", "tokens=1"), chat("b", "x", temperature=9)]))
        failed = finish(client, begin(client, ["not JSON"]))
        live = begin(client, [chat(f"{n}", "tokens=1000 every=0.05") for n in range(5)])
        eventually(lambda: client.batches.retrieve(live.id).status == "in_progress", what="a batch under way")
        newest, middle, oldest = scripted.read("batches", "list", "-n", "3")
        assert [each["id"] for each in (newest, middle, oldest)] == [live.id, failed.id, done.id]
        assert [each["id"] for each in scripted.read("batches", "list", "--status", "in_progress")] == [live.id]
        assert scripted.read("batches", "list", "--tenant", "nobody") == []
        assert scripted.read("batches", "show", done.id) == oldest
        shown = scripted.run("batches", "show", failed.id).stdout
        assert all(word in shown for word in (failed.id, "failed", "line 1: the line is not a JSON object"))
        table = scripted.run("batches", "list").stdout
        assert all(word in table for word in (live.id, "0/5", "1/2", "demo", "ENDPOINT"))
        files = {each["id"]: each for each in scripted.read("files", "list")}
        assert files[done.output_file_id]["purpose"] == "batch_output"
        assert files[done.input_file_id]["filename"] == "requests.jsonl"
        assert done.input_file_id in scripted.run("files", "list").stdout
        cancelled = scripted.run("batches", "cancel", live.id)
        assert (cancelled.returncode, live.id in cancelled.stdout) == (0, True), cancelled.stderr
        assert finish(client, live).status == "cancelled"
        assert scripted.read("batches", "cancel", live.id)["status"] == "cancelled"  # once more does no harm


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("show", "batch_none"), 1, "there is no batch 'batch_none'"),
        (("cancel", "batch_none"), 1, "tether batches list"),
        (("show", "batch_"), 2, "several batches begin with"),
        (("list", "--status", "late"), 2, "--status is one of validating"),
    ],
)
def test_a_batch_that_is_not_there_is_one_line_that_says_what_to_do(
    scripted: Machine, arguments: tuple[str, ...], code: int, says: str
) -> None:
    with client_of(scripted) as client:
        done = [finish(client, begin(client, [chat("a", "tokens=1")])) for _ in range(2)]
    wrong = scripted.run("batches", *arguments)
    assert (wrong.returncode, wrong.stdout) == (code, "")
    assert says in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    late = scripted.run("batches", "cancel", done[0].id)
    assert (late.returncode, "it is completed" in late.stderr) == (1, True)


def test_a_batch_goes_on_without_its_gateway_and_after_its_orchestrator_was_killed(machine: Machine) -> None:
    gateway, orchestrator = machine.start("gateway"), machine.start("orchestrator")
    worker = machine.start("worker", **machine.scripted())
    machine.wait_ready(gateway, orchestrator, worker)
    with client_of(machine) as client:
        names = [f"line-{n}" for n in range(60)]
        batch = begin(client, [chat(name, "tokens=5 every=0.02") for name in names])
        wait_until_under_way(client, batch, 5)
        gateway.kill()
        orchestrator.kill()
        machine.start("orchestrator")
        gateway = machine.start("gateway")
        machine.wait_ready(gateway)
        done = finish(client, batch)
        assert (done.status, counts(done)) == ("completed", {"total": 60, "completed": 60, "failed": 0})
        output = results(client, done.output_file_id)
        assert list(output) == names
        assert {each["response"]["body"]["choices"][0]["message"]["content"] for each in output.values()} == {
            "0 1 2 3 4 "
        }
        jobs = machine.read("jobs", "list", "-n", "1000")
        assert sorted(job["id"] for job in jobs) == sorted(each["response"]["request_id"] for each in output.values())
        assert {job["status"] for job in jobs} == {"completed"}


def test_files_and_batches_are_their_tenant_s_and_its_limits_are_waited_for(machine: Machine) -> None:
    def key(tenant: str, *options: str) -> str:
        done = machine.run("keys", "create", "--tenant", tenant, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    limits = machine.run("tenants", "create", "one", "--jobs-at-once", "2")
    assert limits.returncode == 0, limits.stderr
    one, two, look = key("one"), key("two"), key("one", "--scope", "read-only")
    machine.wait_ready(machine.start("up", **machine.scripted(slots=8)))
    with client_of(machine, one) as client, client_of(machine, two) as other, client_of(machine, look) as looks:
        batch = begin(client, [chat(f"{n}", "tokens=3 every=0.02") for n in range(12)])
        file_id = batch.input_file_id
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(file_id)
        for ask_batch in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                ask_batch(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
        assert other.files.list().data == []
        assert other.batches.list().data == []
        assert [each.id for each in looks.batches.list().data] == [batch.id]
        for forbidden in (looks.batches.cancel, looks.files.delete):
            with pytest.raises(openai.PermissionDeniedError):
                forbidden(batch.id)
        done = finish(client, batch)
        assert (done.status, counts(done)) == ("completed", {"total": 12, "completed": 12, "failed": 0})
