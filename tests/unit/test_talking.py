"""What a chat and a starting gateway tell the person at the terminal, without a network."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tether import chat_client, console, start
from tether.chat_client import Away, ChatAnswer, ChatOptions, pick
from tether.client import EventStream, GatewayClient, ServerEvent
from tether.errors import LinkClosed, ModelNotFound, NoWorker, ProtocolViolation, SetupError
from tether.node import Node, Plan
from tether.settings import GatewaySettings, NodeSettings
from tether.terminal_chat import TerminalChat


class Played(GatewayClient):
    """A gateway that answers what it is told to: a stream after the other, or an error."""

    def __init__(self, *, streams: list[list[str]] | None = None, **answers: Any) -> None:
        super().__init__("http://played")
        self._streams = streams or []
        self._answers = answers
        self.deleted: list[str] = []

    def delete(self, path: str) -> Any:
        self.deleted.append(path)

    def get(self, path: str, **_: object) -> Any:
        answer = self._answers[path.split("/")[1 if path == "/readyz" else 2]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stream(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> EventStream:
        del method, path, body, headers
        return cast("EventStream", _Stream(self._streams.pop(0)))


class _Stream:
    def __init__(self, texts: list[str]) -> None:
        self.headers = {"x-tether-job-id": "job-1"}
        self._texts = texts

    def __iter__(self) -> Iterator[ServerEvent | None]:
        for text in self._texts:
            if text == ":":
                yield None
                continue
            if text == "cut":
                raise LinkClosed("the connection to http://played was cut")
            yield ServerEvent(text)

    def close(self) -> None:
        pass


def chunk(text: str) -> str:
    return f'{{"choices": [{{"delta": {{"content": "{text}"}}}}]}}'


def test_an_answer_that_is_cut_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "PAUSE_SECONDS", 0)
    client = Played(streams=[[chunk("a"), "cut"], ["cut"], [chunk("b"), "[DONE]"]])
    answer = ChatAnswer(client, "demo", [], ChatOptions())
    assert list(answer) == ["a", Away("the connection to http://played was cut"), "b"]


PAUSED = {"error": {"code": "no_worker", "message": "no worker can take a job (paused 1)", "param": None}}
UNKNOWN = {"error": {"code": "model_not_found", "message": "did you mean 'demo'?", "param": "model"}}


@pytest.mark.parametrize(
    ("model", "answers", "kind", "says"),
    [
        (None, {"models": {"data": []}, "readyz": NoWorker("paused 2 (on battery)")}, NoWorker, "on battery"),
        (None, {"models": {"data": []}, "readyz": {}}, NoWorker, "no model is served"),
        ("demo", {"models": ModelNotFound(), "explain": PAUSED}, NoWorker, "paused 1"),
        ("dem", {"models": ModelNotFound(), "explain": UNKNOWN, "readyz": {}}, ModelNotFound, "did you mean 'demo'"),
        ("dem", {"models": ModelNotFound(), "explain": UNKNOWN, "readyz": NoWorker("start one")}, NoWorker, "start one"),
        ("demo", {"models": ModelNotFound(), "explain": []}, ProtocolViolation, "explains nothing"),
    ],
)  # fmt: skip
def test_a_chat_says_why_nobody_answers(
    model: str | None, answers: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        pick(Played(**answers), model)


@pytest.mark.parametrize(
    "answers",
    [
        {"models": {}},
        {"models": ModelNotFound(), "explain": {"error": None, "outcome": "waits"}},
        {"models": ModelNotFound(), "explain": {"error": {"code": "queue_full", "message": "no place"}}},
    ],
)
def test_a_chat_begins_where_somebody_will_serve_the_model(answers: dict[str, Any]) -> None:
    assert pick(Played(**answers), "demo") == "demo"


def test_an_answer_that_waits_ends_with_the_reason_when_nobody_serves_its_model_any_more() -> None:
    queued = '{"choices": [], "tether": {"queued": {"place": 1, "expected_seconds": null}}}'
    client = Played(streams=[[queued, ":"]], models=ModelNotFound(), explain=PAUSED)
    with pytest.raises(NoWorker, match="the answer ends here: no worker can take a job"):
        list(ChatAnswer(client, "demo", [], ChatOptions()))
    assert client.deleted == ["/v1/jobs/job-1"]


def test_lines_that_are_no_text_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/help\n\xffoo\n")))
    talk = TerminalChat(Played(), "demo", system=None, options=ChatOptions())
    with pytest.raises(SetupError, match="line 2 of the input is not UTF-8: invalid start byte at byte 1"):
        talk.run()


@pytest.mark.parametrize(
    ("settings", "needs_key", "says", "says_not"),
    [
        (GatewaySettings(), False, ["//localhost:8080/infer", "curl http://localhost:8080/v1/jobs\n"], ["Bearer", "jobs list"]),
        (
            GatewaySettings(host="0.0.0.0"),
            True,
            ["//localhost:8080/infer", "-H 'Authorization: Bearer sk-…' \\\n", "/v1/jobs -H 'Authorization"],
            ["tenantId", "0.0.0.0:8080/"],
        ),
        (GatewaySettings(store="sqlite:///a b.db"), False, ["jobs list --store 'sqlite:///a b.db'"], ["/v1/jobs"]),
    ],
)  # fmt: skip
def test_a_gateway_of_its_own_recommends_what_works_there(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: GatewaySettings,
    needs_key: bool,
    says: list[str],
    says_not: list[str],
) -> None:
    here = start._Here(Plan(node=NodeSettings(data_dir=tmp_path), gateway=True), [], settings)
    node = cast("Node", SimpleNamespace(knows_orchestrators=True))
    here.tell_gateway(node, f"http://{settings.host}:{settings.port}", needs_key)
    told = capsys.readouterr().out
    for text in says:
        assert text in told
    for text in says_not:
        assert text not in told


def test_nothing_is_drawn_on_a_terminal_while_no_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with console.LoadingProgress():
        pass
    assert capsys.readouterr().err == ""
    with console.LoadingProgress() as progress:
        progress.show("demo", "weights", 0.5)
    assert "loading demo: weights" in capsys.readouterr().err


def test_a_chat_in_a_pipe_says_that_it_asks_again_and_stdout_has_the_answer_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_client, "PAUSE_SECONDS", 0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    client = Played(streams=[[chunk("a"), "cut"], [chunk("b"), "[DONE]"]])
    assert TerminalChat(client, "demo", system=None, options=ChatOptions()).run() == 0
    told = capsys.readouterr()
    assert told.out == "ab\n"
    assert told.err.startswith("the connection to http://played was cut; asking for up to 20 s")
    assert len(told.err.splitlines()) == 1
