"""`tether chat` on a real terminal (a pty) and in a pipe, against real processes."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import pytest

from tests.ports import free_port
from tests.processes import ANSWER, QUESTION, STOP_SECONDS, Machine, eventually

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


STYLES = re.compile(r"\x1b(\[[0-9;?]*([A-Za-z]|$)|$)")
OWN_TERMINAL = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
"""Makes the terminal the process's own, so that Ctrl-C reaches it."""


class Terminal:
    """A terminal in which somebody types `tether chat`."""

    def __init__(self, machine: Machine, *arguments: str, **environment: str) -> None:
        self._main, side = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, "-m", "tether", "chat", "--url", machine.url, *arguments],
            stdin=side,
            stdout=side,
            stderr=side,
            env={**machine.environment, "TERM": "xterm", **environment},
        )
        os.close(side)
        self._raw = b""
        self.shown = ""
        """What is there to read, without styles."""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def until(self, text: str, seconds: float = 60.0) -> str:
        """Wait until something new is shown that matches; return what was new before it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(text, self.shown[self._seen :])):
            assert time.monotonic() < deadline, f"not shown: {text!r} in {self.shown[self._seen :]!r}"
            self._read(0.5)
        before = self.shown[self._seen : self._seen + found.start()]
        self._seen += found.end()
        return before

    def interrupt_at_prompt(self) -> None:
        """Type Ctrl-C once the prompt waits: CPython loses a signal that comes between readline's prompt and its wait."""
        eventually(lambda: psutil.Process(self._process.pid).status() == psutil.STATUS_SLEEPING, what="a prompt")
        self.type(CTRL_C)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def code(self) -> int:
        """Wait for its end, and return its exit code."""
        deadline = time.monotonic() + STOP_SECONDS
        while self._process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            self._read(0.1)
        self._read(0.0)
        return self._process.returncode

    def _read(self, seconds: float) -> None:
        if select.select([self._main], [], [], seconds)[0]:
            try:
                self._raw += os.read(self._main, 65536)
                self.shown = STYLES.sub("", self._raw.decode(errors="ignore"))
            except OSError:  # Linux's way to say that the other side is closed
                time.sleep(0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network with the demo model."""
    with Machine(tmp_path_factory.mktemp("chat-demo")) as machine:
        machine.wait_ready(machine.start("up"))
        yield machine


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A network whose model says what the test wants, in one slot."""
    with Machine(tmp_path_factory.mktemp("chat-script")) as machine:
        machine.wait_ready(machine.start("up", **machine.scripted(slots=1)))
        yield machine


def newest(machine: Machine) -> dict[str, Any]:
    jobs: list[dict[str, Any]] = machine.http.get("/v1/jobs?limit=1").json()["data"]
    return jobs[0]


def test_a_question_is_answered_and_the_conversation_is_kept_saved_and_cleared(demo: Machine, tmp_path: Path) -> None:
    with Terminal(demo, "--temperature", "0") as terminal:
        terminal.until("demo> ")
        terminal.type(f"{QUESTION}\r")
        terminal.until(re.escape(ANSWER))
        terminal.until("demo> ")
        terminal.type(f"/save {tmp_path / 'talk.json'}\r")
        terminal.until("2 messages")
        terminal.type(f"/save {tmp_path / 'talk.json'}\r")
        terminal.until("there is a file")
        terminal.type(f"/save {tmp_path / 'no' / 'talk'}\r")
        terminal.until("cannot write")
        terminal.type("/system Be brief.\r/clear\r")
        terminal.until("begins anew")
        terminal.type(f"/save {tmp_path / 'talk.txt'}\r")
        terminal.until("1 messages")
        terminal.type("/quit\r")
        assert terminal.code() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["model"] == "demo"
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["content"].strip() == ANSWER
    assert (tmp_path / "talk.txt").read_text() == "system: Be brief.\n\n"


def test_what_was_said_before_goes_with_the_next_question_and_typed_lines_come_back(scripted: Machine) -> None:
    with Terminal(scripted, "--system", "Be brief.") as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=2\r")
        terminal.until("0 1 ")
        terminal.until("demo> ")
        terminal.type("tokens=3\r")
        terminal.until("0 1 2 ")
        terminal.until("demo> ")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
    record = scripted.http.get(f"/v1/jobs/{newest(scripted)['id']}").json()
    messages = json.loads(record["input"])["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    with Terminal(scripted) as terminal:
        terminal.until("demo> ")
        terminal.type(UP)
        terminal.until("tokens=3")
        terminal.type("\r")
        terminal.until("0 1 2 ")
        terminal.until("demo> ")


def test_ctrl_c_ends_the_answer_and_not_the_program_and_twice_at_the_prompt_leaves(scripted: Machine) -> None:
    with Terminal(scripted) as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=2000 every=0.05\r")
        terminal.until("0 1 2 ")
        terminal.type(CTRL_C)
        terminal.until("cancelled")
        terminal.until("demo> ")
        assert newest(scripted)["status"] == "cancelled"
        terminal.type("every=600\r")  # before the first token
        eventually(lambda: newest(scripted)["status"] == "running", what="a running job")
        terminal.type(CTRL_C)
        terminal.until("cancelled")
        terminal.until("demo> ")
        eventually(lambda: newest(scripted)["status"] == "cancelled", what="its end")
        terminal.interrupt_at_prompt()
        terminal.until("Ctrl-C again")
        terminal.until("demo> ")
        terminal.type("tokens=1\r")
        terminal.until("0 ")
        terminal.until("demo> ")
        terminal.interrupt_at_prompt()
        terminal.until("Ctrl-C again")
        terminal.until("demo> ")
        terminal.interrupt_at_prompt()
        assert terminal.code() == 0
        assert "Traceback" not in terminal.shown


def test_a_terminal_that_is_closed_cancels_the_answer(scripted: Machine) -> None:
    with Terminal(scripted) as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=2000 every=0.05\r")
        terminal.until("0 1 2 ")
        terminal.send(signal.SIGHUP)
        assert terminal.code() == 128 + signal.SIGHUP
    assert newest(scripted)["status"] == "cancelled"


def test_commands_say_what_they_do_and_a_mistake_is_one_line(scripted: Machine) -> None:
    with Terminal(scripted) as terminal:
        for typed, said in (
            ("/models", r"\* demo"),
            ("/model", "this is demo"),
            ("/model dem", "error: no worker serves a model 'dem'; did you mean 'demo'"),
            ("/modle", "did you mean /model"),
            ("/help", "/save FILE"),
            ("/save", "the name of a file"),
            ("error=worker_failed", "error: "),
        ):
            terminal.until("demo> ")
            terminal.type(f"{typed}\r")
            terminal.until(said)
        terminal.until("demo> ")
        terminal.type(CTRL_D)
        assert terminal.code() == 0


def test_who_waits_for_a_slot_sees_the_place(scripted: Machine) -> None:
    job_id = scripted.infer("tokens=2000 every=0.05", wait=False).json()["jobId"]
    eventually(lambda: scripted.http.get(f"/v1/jobs/{job_id}").json()["status"] == "running", what="a running job")
    with Terminal(scripted) as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=3\r")
        terminal.until("waiting for a slot: place 1")
        scripted.http.delete(f"/v1/jobs/{job_id}")
        terminal.until("0 1 2 ")
        terminal.until("demo> ")


def test_a_gateway_that_is_killed_and_comes_back_goes_on_with_the_answer(machine: Machine) -> None:
    machine.start("orchestrator").wait_for("Ready.")
    machine.start("worker", **machine.scripted())
    gateway = machine.start("gateway")
    machine.wait_ready(gateway)
    with Terminal(machine) as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=60 every=0.1\r")
        shown = terminal.until("4 ")
        gateway.kill()
        again = machine.start("gateway")
        shown += "4 " + terminal.until("demo> ")
        assert " ".join(str(number) for number in range(60)) in " ".join(shown.split())
        again.kill()
        terminal.type("tokens=1\r")
        terminal.until("error: no gateway answers")
        terminal.until("demo> ")
        terminal.type(CTRL_D)
        assert terminal.code() == 0
        assert "Traceback" not in terminal.shown


def test_a_model_that_goes_in_mid_answer_is_one_line_and_the_prompt_again(machine: Machine) -> None:
    machine.start("orchestrator").wait_for("Ready.")
    worker = machine.start("worker", **machine.scripted())
    machine.wait_ready(machine.start("gateway"))
    with Terminal(machine) as terminal:
        terminal.until("demo> ")
        terminal.type("tokens=2000 every=0.05\r")
        terminal.until("0 1 2 ")
        worker.kill()
        terminal.until("error: the answer ends here: no worker can take a job for 'demo' now")
        terminal.until("demo> ")


def piped(machine: Machine, text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tether", "chat", "--url", machine.url, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env={**machine.environment, **environment},
        check=False,
    )


def test_a_pipe_s_lines_are_answered_one_by_one_and_nothing_else_is_on_stdout(scripted: Machine) -> None:
    done = piped(scripted, "tokens=2\n\ntokens=1\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1 \n0 \n", "")
    failed = piped(scripted, "error=worker_failed\ntokens=1\n")
    assert (failed.returncode, failed.stdout) == (1, "0 \n")
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1


def test_a_chat_that_cannot_begin_says_why_in_one_line(scripted: Machine, machine: Machine) -> None:
    for arguments, says in (
        (("dem",), "did you mean 'demo'"),
        (("--url", f"http://127.0.0.1:{free_port()}"), "tether up"),
    ):
        done = piped(scripted, "x\n", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert machine.run("keys", "create", "--tenant", "a").returncode == 0
    machine.wait_ready(machine.start("up", **machine.scripted()))
    done = piped(machine, "x\n", TETHER_API_KEY="sk-" + "a" * 43)
    assert (done.returncode, "API key" in done.stderr) == (1, True)
    done = piped(machine, "x\n")
    assert (done.returncode, "--key" in done.stderr) == (1, True)
