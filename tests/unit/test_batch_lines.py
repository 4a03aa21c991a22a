"""The pure parts of a batch: lines in, jobs, outcomes, parts of files."""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether import batch_lines
from tether.batch_lines import (
    MAX_LINE_CHARS,
    PART_BYTES,
    LineChecker,
    LineReader,
    Outcome,
    Parts,
    job_id_of,
    job_or_refusal,
    outcome_of,
    pause_seconds,
    refused,
    split,
    to_job,
)
from tether.errors import InvalidRequest, NoWorker, RequestError, UnsupportedParameter
from tether.messages import JobAccepted, JobEnd, JobEvent, JobTokens
from tether.queueing import is_background
from tether.quotas import Limit
from tether.records import BatchLine, BatchRecord, Usage

NOW = 1_800_000_000.0
BATCH = BatchRecord(
    "batch_1", "tenant", "key_1", "/v1/chat/completions", "file-1", created_at=NOW, expires_at=NOW + 86_400
)
BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


def line(number: int = 1, **body: Any) -> BatchLine:
    return BatchLine(number, f"custom-{number}", json.dumps({**BODY, **body}))


def read(*parts: str) -> list[str]:
    reader = LineReader()
    return [text for part in parts for text in reader.feed(part)] + list(reader.flush())


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))), st.integers(1, 9))
def test_lines_are_the_same_however_the_file_is_cut(lines: list[str], size: int) -> None:
    text = "\n".join(lines)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    found = read(*parts)
    assert found + [""] * (len(text.split("\n")) - len(found)) == text.split("\n")


def test_of_a_line_without_end_only_a_bounded_beginning_is_kept() -> None:
    (found,) = read(*["x" * PART_BYTES] * 100)
    assert MAX_LINE_CHARS < len(found) <= MAX_LINE_CHARS + 2 * PART_BYTES


def test_a_checker_gives_up_after_so_many_mistakes_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    checker = LineChecker("/v1/chat/completions")
    while not checker.is_hopeless:
        assert checker.check("rubbish") is None
    assert len(checker.mistakes) == batch_lines.MAX_MISTAKES
    monkeypatch.setattr(batch_lines, "MAX_LINES", 2)
    checker = LineChecker("/v1/chat/completions")
    for number in range(4):
        whole = {"custom_id": f"{number}", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
        assert (checker.check(json.dumps(whole)) is not None) == (number < 2)
    assert checker.is_hopeless
    assert {mistake.code for mistake in checker.mistakes} == {"too_many_tasks"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"custom_id": "\ud800"}', "nul\0l", '{"custom_id": 1e999999}', '"a"'])
def test_a_line_that_is_no_json_object_is_a_mistake_and_no_crash(text: str) -> None:
    checker = LineChecker("/v1/chat/completions")
    assert checker.check(text) is None
    assert [mistake.code for mistake in checker.mistakes] == ["invalid_json_line"]


def test_a_line_that_cannot_be_checked_is_a_mistake_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a mistake in here")

    checker = LineChecker("/v1/chat/completions")
    monkeypatch.setattr(checker, "_parse", broken)
    assert checker.check("{}") is None
    assert [(mistake.code, mistake.line) for mistake in checker.mistakes] == [("internal_error", 1)]


@pytest.mark.parametrize(
    ("broken", "status", "code"),
    [
        (ValueError("a mistake in here"), 500, "internal_error"),
        (InvalidRequest("no", param="n"), 400, "invalid_request"),
    ],
)
def test_a_line_of_which_no_job_can_be_made_has_that_as_its_outcome(
    monkeypatch: pytest.MonkeyPatch, broken: Exception, status: int, code: str
) -> None:
    def fail(*_: object) -> None:
        raise broken

    monkeypatch.setattr(batch_lines, "parse_body", fail)
    found = job_or_refusal(BATCH, line(), NOW)
    assert isinstance(found, Outcome)
    told = json.loads(found.text)["response"]
    assert (found.completed, told["status_code"], told["body"]["error"]["code"]) == (False, status, code)


def test_a_byte_order_mark_is_no_mistake() -> None:
    checker = LineChecker("/v1/chat/completions")
    whole = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": BODY}
    assert checker.check("\ufeff" + json.dumps(whole)) is not None
    assert (checker.model, checker.num_lines, checker.mistakes) == ("demo", 1, [])


def test_a_line_s_job_has_an_id_of_its_own_that_is_always_the_same() -> None:
    ids = {job_id_of(BATCH, line(number), again) for number in range(50) for again in range(3)}
    assert len(ids) == 150
    assert job_id_of(BATCH, line(7)) == job_id_of(BATCH, line(7, seed=3))
    other = msgspec.structs.replace(BATCH, id="batch_2")
    assert job_id_of(other, line(7)) not in ids
    for each in ids:
        assert (uuid.UUID(each).version, uuid.UUID(each).variant) == (7, uuid.RFC_4122)
        assert uuid.UUID(each).int >> 80 == int(NOW * 1000)


def test_a_line_s_job_runs_in_the_background_for_its_batch_s_tenant_and_key() -> None:
    job = to_job(BATCH, line(priority=50), NOW + 1).job
    assert is_background(job)
    assert job.priority > to_job(BATCH, line(), NOW).job.priority
    assert (job.tenant_id, job.key_id, job.wait, job.stream) == ("tenant", "key_1", False, False)
    assert job.deadline_seconds == 86_399
    again = to_job(BATCH, line(), NOW + 5)
    assert again.job.sampling.seed == to_job(BATCH, line(), NOW).job.sampling.seed
    assert to_job(BATCH, line(seed=5), NOW).job.sampling.seed == 5
    assert to_job(BATCH, line(), NOW + 90_000).job.deadline_seconds == 1


@pytest.mark.parametrize(("keep", "kept", "drops"), [("nothing", "result", True), ("result", "result", False)])
def test_an_answer_is_kept_until_its_line_has_it(keep: Any, kept: str, drops: bool) -> None:
    made = to_job(msgspec.structs.replace(BATCH, keep=keep), line(), NOW)
    assert (made.job.keep, made.drops_answer) == (kept, drops)


@pytest.mark.parametrize(
    "wrong", [{"stream": True}, {"n": 0}, {"tenantId": "x"}, {"what": 1}, {"deadline_seconds": 1e6}]
)
def test_what_a_route_would_refuse_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        to_job(BATCH, line(**wrong), NOW)
    assert caught.value.param == next(iter(wrong))


def test_a_response_of_a_batch_stands_alone() -> None:
    batch = msgspec.structs.replace(BATCH, endpoint="/v1/responses")
    body = {"model": "demo", "input": "hi", "previous_response_id": "resp_1"}
    with pytest.raises(UnsupportedParameter, match="stand alone"):
        to_job(batch, BatchLine(1, "a", json.dumps(body)), NOW)


def test_outcomes_have_the_form_of_the_files() -> None:
    made = to_job(BATCH, line(), NOW)
    accepted, tokens = JobAccepted(made.job.id, "running", "1.0"), JobTokens(made.job.id, 1, 0, (1,), "hello")
    done = outcome_of(BATCH, line(), made, [accepted, tokens, JobEnd("", "completed", 1, "stop", Usage(1, 2))])
    found = json.loads(done.text)
    assert done.completed
    assert (found["id"], found["custom_id"], found["error"]) == ("batch_req_1_1", "custom-1", None)
    assert found["response"]["request_id"] == made.job.id
    assert found["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    error = NoWorker("nobody").to_info()
    made = to_job(BATCH, line(), NOW)
    failed = outcome_of(BATCH, line(), made, [JobEnd("", "failed", 0, "error", Usage(), error)])
    assert (failed.completed, json.loads(failed.text)["response"]["status_code"]) == (False, 503)
    wrong = json.loads(refused(BATCH, line(), InvalidRequest("no", param="n")).text)
    assert wrong["response"]["body"]["error"] == {
        "message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_request",
    }  # fmt: skip


def test_an_answer_that_cannot_be_told_is_its_lines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made = to_job(BATCH, line(), NOW)
    events: list[JobEvent] = [
        JobAccepted("j", "running"),
        JobTokens("j", 1, 0, (1,), "hi"),
        JobEnd("j", "completed", 1, "stop", Usage()),
    ]

    def broken(*_: object) -> None:
        raise ValueError("a mistake in here")

    for place in ("add", "body"):
        with monkeypatch.context() as patch:
            patch.setattr(made.answer, place, broken)
            found = outcome_of(BATCH, line(), made, events)
        told = json.loads(found.text)["response"]
        assert (found.completed, told["status_code"], told["body"]["error"]["code"]) == (False, 500, "internal_error")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50)))
def test_parts_together_are_the_text(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_lines, "PART_BYTES", 8)
        parts = Parts()
        found = [part for text in texts for part in parts.feed(text)] + list(parts.flush())
    assert "".join(part for _, part in found) == "".join(texts)
    assert [number for number, _ in found] == list(range(parts.num_parts))
    assert parts.num_bytes == len("".join(texts).encode())
    assert all(len(part.encode()) <= 8 for _, part in found)


def test_an_empty_text_is_one_empty_piece() -> None:
    assert split("") == [""]


@pytest.mark.parametrize(
    ("unit", "window", "most", "spent", "pause"),
    [
        ("requests", 60, 100, 74, 0.0),
        ("requests", 60, 100, 75, 60.0),
        ("tokens", 60, 100, 64, 0.0),
        ("tokens", 60, 100, 66, 60.0),
        ("tokens", 60, 9, 0, 0.0),  # no wait would help
        ("tokens", 60, 10, 0, 0.0),  # all of it, where less would never do
        ("jobs", 0, 4, 2, 0.0),
        ("jobs", 0, 4, 3, 1.0),
        ("jobs", 0, 1, 0, 0.0),
        ("jobs", 0, 1, 1, 1.0),
        ("job_tokens", 0, 10, 0, 0.0),
        ("requests", 60, 0, 0, 0.0),
    ],
)
def test_a_batch_leaves_others_room_within_each_limit(
    unit: Any, window: int, most: int, spent: int, pause: float
) -> None:
    now = 60.0 * 1000
    assert pause_seconds([Limit("", "", unit, window, most, spent)], 10, now) == pause
