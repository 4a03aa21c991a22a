"""A job that ended elsewhere is told as if it had been heard: tokens, and then its end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.support import make_job
from tether.answers import AnswersSoFar
from tether.errors import JobCancelled
from tether.infer_api import Answer
from tether.messages import InferTokens, JobEnd, JobEvent, JobTokens
from tether.openai_api import ChatAnswer, CompletionAnswer
from tether.openai_responses import ResponseAnswer
from tether.records import Chat, ChatMessage, ChoiceResult, JobRecord, Sampling, TokenLogprobs, Usage
from tether.retelling import ending_of, story_of

LOGPROBS = (TokenLogprobs(-1.0, (), ("ab",)), TokenLogprobs(-2.0, (), ("cd",)))
CHAT = msgspec.json.encode(Chat((ChatMessage("user", "x"),))).decode()


def known(*texts: str) -> AnswersSoFar:
    answers = AnswersSoFar(len(texts))
    for choice, text in zip(answers.choices, texts, strict=True):
        choice.take(InferTokens("j", 1, 0, tuple(range(len(text))), text))
    return answers


def completed(text: str, reason: Any = "stop") -> JobEnd:
    return JobEnd("j", "completed", 2, reason, Usage(1, 4), text=text)


@pytest.mark.parametrize("seen", ["", "ab", "abcd", "abcde"])
def test_what_is_not_known_comes_first_and_nothing_twice(seen: str) -> None:
    *rest, end = ending_of(completed("abcd"), known(seen))
    assert end == JobEnd("j", "completed", 2, "stop", Usage(1, 4))
    missing = "abcd"[len(seen) :]
    assert rest == ([JobTokens("j", 2, len(seen), (), missing)] if missing else [])


def test_each_of_several_answers_has_its_own_rest_and_reason() -> None:
    text = msgspec.json.encode([ChoiceResult("abc", "stop"), ChoiceResult("xyz", "length")]).decode()
    *rest, end = ending_of(completed(text), known("a", "xyz"))
    assert rest == [JobTokens("j", 2, 1, (), "bc", 0)]
    assert isinstance(end, JobEnd)
    assert end.choices == ("stop", "length")


def test_of_a_job_that_failed_there_is_only_the_end() -> None:
    end = JobEnd("j", "cancelled", 1, "cancelled", Usage(), JobCancelled().to_info(), text="a part")
    assert list(ending_of(end, known(""))) == [msgspec.structs.replace(end, text=None)]


def record(**changes: Any) -> JobRecord:
    plain = JobRecord(
        id="j",
        tenant_id="t",
        model="demo",
        version="1",
        status="completed",
        attempt=1,
        input="x",
        result="abcd",
        finish_reason="stop",
        error=None,
        usage=Usage(1, 2),
        sampling=Sampling(logprobs=0),
        wait=True,
        stream=True,
        priority=0,
        deadline_seconds=9.0,
        region=None,
        session_key=None,
        keep="all",
        orchestrator_id=None,
        worker_id="w",
        created_at=1.0,
        started_at=1.0,
        ended_at=2.0,
    )
    return msgspec.structs.replace(plain, **changes)


def test_the_ledger_s_story_has_the_log_probabilities() -> None:
    story = story_of(record(logprobs=(LOGPROBS,), fingerprint="sha256:abc/float32/x"))
    assert [type(event).__name__ for event in story] == ["JobStarted", "JobTokens", "JobEnd"]
    assert story[1] == JobTokens("j", 1, 0, (), "abcd", 0, LOGPROBS)


def test_an_answer_that_was_not_kept_is_an_error() -> None:
    (end,) = story_of(record(result=None))
    assert isinstance(end, JobEnd)
    assert end.error is not None
    assert end.error.code == "job_conflict"


@pytest.mark.parametrize("kind", [Answer, ChatAnswer, CompletionAnswer, ResponseAnswer])
def test_every_stream_has_the_text_of_such_a_job_before_its_end(kind: Any) -> None:
    form = {Answer: "text", CompletionAnswer: "prompt", ChatAnswer: "chat", ResponseAnswer: "response"}[kind]
    job = make_job(CHAT if form in {"chat", "response"} else "x", form=form)
    heard: list[JobEvent] = [JobTokens(job.id, 1, 0, (0, 1), "ab")]
    telling, pieces = kind(job), []
    for event in [*heard, *ending_of(completed("abcd"), known("ab"))]:
        for told in telling.events(event):
            data = told.data
            choice = (data.get("choices") or [{}])[0]
            delta = data.get("delta") or choice.get("delta", {}).get("content") or choice.get("text") or ""
            pieces.append(data["text"] if data.get("type") == "tokens" else delta)
    assert "".join(pieces) == "abcd"
