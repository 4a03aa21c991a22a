from __future__ import annotations

import base64
import struct
from typing import Any

import msgspec
import pytest

from tests.support import make_job, make_state
from tether.cursor import Cursor
from tether.errors import InternalError, InvalidRequest, NoWorker, UnsupportedParameter
from tether.job_routes import parse_body
from tether.messages import JobAccepted, JobEnd, JobTokens
from tether.openai_embeddings import EmbeddingAnswer, EmbeddingRequest, embedding_job
from tether.records import EmbeddingInput, Job, ModelInfo, Usage
from tether.scheduler import WorkerView, best, choose, refusal
from tether.settings import GatewaySettings

END = JobEnd("j", "completed", 1, "stop", Usage(5, 2))


def make(**body: Any) -> Job:
    request = parse_body("/v1/embeddings", {"model": "demo", "input": ["a", [1, 2]], **body})
    assert isinstance(request, EmbeddingRequest)
    return embedding_job(request, GatewaySettings(), "tenant")


def text(*vector: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() + "\n"


def told(answer: EmbeddingAnswer, *texts: str, end: JobEnd = END) -> EmbeddingAnswer:
    answer.add(JobAccepted("j", "running", "1.0"))
    for place, each in enumerate(texts):
        answer.add(JobTokens("j", 1, place, (-1,), each))
    answer.add(end)
    return answer


def test_a_request_becomes_a_job_whose_vectors_are_kept_only_on_request() -> None:
    job = make(dimensions=7)
    assert (job.form, job.keep, job.sampling.max_tokens) == ("embedding", "nothing", 2)
    assert msgspec.json.decode(job.input, type=EmbeddingInput) == EmbeddingInput(("a", (1, 2)), 7)
    assert make(keep="all").keep == "all"


def test_vectors_are_told_as_floats_or_as_they_came_in_one_piece_or_several() -> None:
    first, second = text(0.5, 1.0), text(-1.0, 0.25)
    floats = told(EmbeddingAnswer(make()), first, second).body()
    assert [each["embedding"] for each in floats["data"]] == [[0.5, 1.0], [-1.0, 0.25]]
    assert floats["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert told(EmbeddingAnswer(make()), first + second).body() == floats
    raw = told(EmbeddingAnswer(make(), encoding="base64"), first, second).body()
    assert [each["embedding"] for each in raw["data"]] == [first.strip(), second.strip()]


def test_missing_vectors_are_an_error_and_never_left_out() -> None:
    with pytest.raises(InternalError, match="1 vectors for 2"):
        told(EmbeddingAnswer(make()), text(1.0)).body()


def test_a_stream_of_vectors_has_no_middle_to_begin_at() -> None:
    with pytest.raises(InvalidRequest):
        EmbeddingAnswer(make(), seen=Cursor(1))


def test_only_workers_whose_model_gives_embeddings_are_asked_for_them() -> None:
    def view(name: str, **state: Any) -> WorkerView:
        embeds = state.pop("embeds", False)
        model = ModelInfo("demo", "1.0", slots=2, embeds=embeds)
        return WorkerView(make_state(name, models=(model,), **state))

    job = make_job(form="embedding")
    cannot, can = view("cannot"), view("can", embeds=True)
    assert best(job, [cannot, can]) == "can"
    assert best(make_job(), [cannot]) == "cannot"
    nobody = choose(job, [cannot])
    assert (nobody.worker_id, nobody.can_wait, nobody.counts()["no_embeddings"]) == (None, False, 1)
    error = refusal(job, nobody, [cannot])
    assert (type(error), error.param) == (UnsupportedParameter, "model")
    leaving = view("leaving", embeds=True, draining=True)
    assert isinstance(refusal(job, choose(job, [cannot, leaving]), [cannot, leaving]), NoWorker)
