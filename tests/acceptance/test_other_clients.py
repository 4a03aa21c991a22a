"""More clients that people have, unmodified, in an environment of their own: Simon Willison's `llm`, LangChain's ChatOpenAI."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.acceptance.test_openai_clients import CALL
from tests.processes import ANSWER, QUESTION, Machine

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".tools/clients/bin"
SURE = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}
WEATHER = 'def weather(place: str) -> str:\n    "How the weather is."\n    return "tokens=2 in " + place\n'


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with the demo model."""
    with Machine(tmp_path_factory.mktemp("demo")) as machine:
        machine.wait_ready(machine.start("up"))
        yield machine


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose model says what the test wants."""
    with Machine(tmp_path_factory.mktemp("scripted")) as machine:
        machine.wait_ready(machine.start("up", **machine.scripted()))
        yield machine


def run(machine: Machine, program: str, *arguments: str) -> str:
    """Run a client to its end; a missing one is a failure, because nobody else tests it."""
    if not (CLIENTS / program).exists():
        raise RuntimeError("no clients: run `make .tools/clients/.installed`")
    folder = machine.folder / "llm"
    folder.mkdir(exist_ok=True)
    (folder / "extra-openai-models.yaml").write_text(
        f"- model_id: tether\n  model_name: demo\n  api_base: {machine.url}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LANG", "PYTHONPATH"))}
    environment |= {"HOME": str(machine.folder), "LLM_USER_PATH": str(folder), "LLM_OPENAI_KEY": "sk-any"}
    done = subprocess.run(
        [str(CLIENTS / program), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**environment, "OPENAI_API_KEY": "sk-any"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def llm(machine: Machine, *arguments: str) -> str:
    return run(machine, "llm", "prompt", "-m", "tether", "--key", "sk-any", *arguments)


def test_llm_chats_streamed_or_not_and_remembers(demo: Machine) -> None:
    assert llm(demo, QUESTION, "-o", "temperature", "0").strip() == ANSWER
    assert llm(demo, QUESTION, "-o", "temperature", "0", "--no-stream").strip() == ANSWER
    told = json.loads(run(demo, "llm", "logs", "list", "--json", "-n", "0"))
    assert len(told) == 2
    assert len({(each["input_tokens"], each["output_tokens"]) for each in told}) == 1  # both ways tell what was used
    assert told[0]["output_tokens"] > 1
    assert llm(demo, "-c", QUESTION, "-o", "temperature", "0").strip()


def test_llm_has_answers_that_follow_a_schema(demo: Machine) -> None:
    found = json.loads(llm(demo, QUESTION, "--schema", json.dumps(SURE), "--no-stream"))
    assert isinstance(found["sure"], bool)


def test_llm_calls_a_function_and_goes_on_with_what_it_returns(scripted: Machine) -> None:
    for more in ((), ("--no-stream",)):
        assert llm(scripted, f"say={quote(CALL)}", "--functions", WEATHER, *more).strip() == "0 1"


def langchain(machine: Machine, kind: str, prompt: str) -> Any:
    return json.loads(
        run(machine, "python", str(ROOT / "tests/langchain_client.py"), kind, f"{machine.url}/v1", "demo", prompt)
    )


def test_langchain_chats_streams_and_follows_a_schema(demo: Machine) -> None:
    found = langchain(demo, "chat", QUESTION)
    assert found["whole"] == ANSWER
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"] > 2
    assert "".join(found["pieces"]) == ANSWER
    assert len([piece for piece in found["pieces"] if piece]) > 1
    assert found["batch"] == [ANSWER, ANSWER]
    assert isinstance(found["structured"]["sure"], bool)


def test_langchain_calls_a_tool_and_goes_on_with_what_it_returns(scripted: Machine) -> None:
    found = langchain(scripted, "call", f"say={quote(CALL)}")
    assert found["calls"] == found["streamed"] == [{"name": "weather", "args": {"place": "Paris"}}]
    assert found["end"] == "0 1 "
