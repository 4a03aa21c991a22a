"""One runtime child: real processes, most of them the scripted runtime."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import psutil
import pytest
import trio

from tests.support import until
from tether import child as child_module
from tether.child import RuntimeChild
from tether.errors import InternalError, RuntimeDied
from tether.records import ModelInfo, Usage
from tether.runtime_messages import Cancel, End, Event, Generate, Loading, Started, Tokens
from tether.testing import in_trio

SCRIPTED = ["-m", "tether.scripted", "--model", "demo", "--slots", "3"]


class Ward:
    """A child and all that it was heard to say."""

    def __init__(self, arguments: list[str], variables: tuple[str, ...] = ()) -> None:
        self.events: list[Event] = []
        self.log: list[str] = []
        self.loadings: list[Loading] = []
        self.child = RuntimeChild(
            "demo",
            arguments,
            on_event=self.events.append,
            on_ready=lambda model: self.log.append(f"ready {model.slots}"),
            on_lost=lambda: self.log.append("lost"),
            on_loading=self.loadings.append,
            variables=variables,
        )

    def has(self, entry: str, count: int) -> bool:
        return self.log.count(entry) == count

    def of(self, key: str) -> list[Event]:
        return [event for event in self.events if getattr(event, "id", None) == key]

    async def end_of(self, key: str) -> End:
        await until(lambda: any(isinstance(event, End) for event in self.of(key)))
        (end,) = [event for event in self.of(key) if isinstance(event, End)]
        return end


@asynccontextmanager
async def running(ward: Ward) -> AsyncIterator[RuntimeChild]:
    async with trio.open_nursery() as nursery:
        await nursery.start(ward.child.run)
        yield ward.child
        nursery.cancel_scope.cancel()


def program(text: str) -> list[str]:
    """A child of a few lines; `READY` in it is the line that a child says when it is ready."""
    ready = '{"event":"ready","model":{"name":"demo","version":"1.0","slots":1}}'
    return ["-u", "-c", text.replace("READY", repr(ready))]


@in_trio()
async def test_a_child_is_ready_answers_and_ends_with_its_keeper() -> None:
    ward = Ward(SCRIPTED)
    async with running(ward) as child:
        assert child.model == ModelInfo("demo", "1.0", revision="script", context_tokens=4096, slots=3, embeds=True)
        assert [loading.fraction for loading in ward.loadings] == [0.5, 1.0]
        pid = child.pid
        assert pid is not None
        child.send(Generate("one", "tokens=2"))
        child.send(Generate("two", "tokens=1", emitted=()))
        assert await ward.end_of("one") == End("one", "stop", Usage(1, 2))
        await ward.end_of("two")
        assert ward.of("one")[:2] == [Started("one", 1), Tokens("one", 0, (0,), "0 ")]
    assert ward.child.model is None
    assert ward.child.pid is None
    assert not psutil.pid_exists(pid)
    assert ward.log == ["ready 3", "lost"]


@in_trio()
async def test_a_sequence_is_cancelled() -> None:
    ward = Ward(SCRIPTED)
    async with running(ward) as child:
        child.send(Generate("one", "tokens=1000 every=0.01"))
        await until(lambda: len(ward.of("one")) > 2)
        child.send(Cancel("one"))
        assert (await ward.end_of("one")).finish_reason == "cancelled"


@in_trio()
async def test_a_child_that_dies_is_started_again_and_what_ran_on_it_is_told_as_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "FIRST_PAUSE_SECONDS", 0.01)
    ward = Ward(SCRIPTED)
    async with running(ward) as child:
        for number in (1, 2):
            pid = child.pid
            assert pid is not None
            if number == 1:
                os.kill(pid, signal.SIGKILL)
            else:
                child.kill()
            await until(partial(ward.has, "lost", number))
            with pytest.raises(RuntimeDied, match="is not ready"):
                child.send(Generate("one", "tokens=1"))
            await until(partial(ward.has, "ready 3", number + 1))
            assert child.pid != pid
        assert child.num_starts == 3
        child.send(Generate("one", "tokens=1"))
        await ward.end_of("one")


@in_trio(clock_jumps=True)
async def test_the_pause_between_starts_grows_while_a_child_keeps_dying(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ward = Ward(SCRIPTED)

    async def die(_task_status: object) -> None:
        ward.child.num_starts += 1
        ward.child._was_ready = True
        lifetime = 61 if ward.child.num_starts == 9 else 1
        await trio.sleep(lifetime)
        raise RuntimeDied("it ended")

    monkeypatch.setattr(ward.child, "_run_once", die)
    with trio.move_on_after(300):
        await ward.child.run()
    pauses = [float(record.getMessage().split()[-2]) for record in caplog.records]
    assert pauses[:8] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert pauses[8:11] == [0.5, 1.0, 2.0], "the ninth lived for a minute"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(7)", "it ended with exit code 7"),
        ("import os; os.kill(os.getpid(), 9)", r"it ended with signal 9 \(killed, perhaps for memory\)"),
        ("import os; os.kill(os.getpid(), 15)", "it ended with signal 15"),
        ("print('loading the model...')", "it broke the protocol: malformed line from the runtime"),
        ('print(\'{"event":"dance"}\')', "it broke the protocol"),
    ],
)
def test_a_first_start_that_fails_says_how(text: str, message: str) -> None:
    @in_trio()
    async def main() -> None:
        ward = Ward(program(text))
        with pytest.raises(RuntimeDied, match=message):
            await ward.child.run()
        assert ward.log == []

    main()


@in_trio()
async def test_a_child_that_cannot_serve_says_its_own_reason() -> None:
    fatal = '{"event":"fatal","error":{"code":"internal_error","message":"no such weights"}}'
    ward = Ward(program(f"print({fatal!r})"))
    with pytest.raises(InternalError, match="no such weights"):
        await ward.child.run()


@in_trio()
async def test_a_program_that_cannot_be_started_is_a_dead_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(RuntimeDied, match="it cannot be started: No such file"):
        await Ward(SCRIPTED).child.run()


@in_trio()
async def test_a_line_without_an_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "MAX_LINE_BYTES", 100_000)
    ward = Ward(program("import sys, time; sys.stdout.write('x' * 1_000_000); sys.stdout.flush(); time.sleep(60)"))
    with pytest.raises(RuntimeDied, match="a line without an end"):
        await ward.child.run()


@in_trio()
async def test_lines_that_come_in_pieces_and_many_at_once_are_all_heard() -> None:
    text = (
        "import sys, time\n"
        'line = \'{"event":"started","id":"%d","prompt_tokens":1}\\n\'\n'
        "data = READY + '\\n' + ''.join(line % n for n in range(500))\n"
        "for begin in range(0, len(data), 777):\n"
        "    sys.stdout.write(data[begin:begin + 777]); sys.stdout.flush()\n"
        "sys.stdin.read()\n"
    )
    ward = Ward(program(text))
    async with running(ward):
        await until(lambda: len(ward.events) == 500)
        assert [event.id for event in ward.events if isinstance(event, Started)] == [str(n) for n in range(500)]


@in_trio()
async def test_a_child_that_does_not_exit_when_it_is_asked_to_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "STOP_SECONDS", 0.05)
    ward = Ward(program("import time; print(READY); time.sleep(600)"))
    async with running(ward) as child:
        pid = child.pid
        assert pid is not None
    assert not psutil.pid_exists(pid)


@in_trio()
async def test_a_ctrl_c_on_the_terminal_does_not_reach_the_child() -> None:
    ward = Ward(SCRIPTED)
    async with running(ward) as child:
        assert child.pid is not None
        assert os.getpgid(child.pid) != os.getpgid(0)


@in_trio()
async def test_a_child_has_its_keepers_environment_but_none_of_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TEST", "TETHER_SCRIPTED_TEST", "TETHER_NAMED_KEY", "TETHER_STORE", "TETHER_API_KEY"):
        monkeypatch.setenv(name, "x")
    text = (
        "import os, sys\n"
        "has = [name for name in os.environ if name.startswith(('HF_TEST', 'TETHER_', 'PYTHONUNBUFFERED'))]\n"
        "print(READY.replace('1.0', ' '.join(sorted(has))))\n"
        "sys.stdin.read()\n"
    )
    ward = Ward(program(text), ("TETHER_NAMED_KEY",))
    async with running(ward) as child:
        assert child.model is not None
        assert child.model.version == "HF_TEST PYTHONUNBUFFERED TETHER_NAMED_KEY TETHER_SCRIPTED_TEST"
