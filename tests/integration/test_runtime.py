"""The runtime child as a worker and a person use it: a real process, real pipes, the demo model."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tether import catalog
from tether.records import ModelInfo, Sampling, Usage
from tether.runtime_messages import (
    Cancel,
    End,
    Event,
    Fatal,
    Generate,
    Loading,
    Ready,
    Refused,
    Request,
    Started,
    Tokens,
    decode_event,
    encode,
)

PATIENCE_SECONDS = 90.0
GREEDY = Sampling()
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
LONG = "Tell me about Tether."
COUNT = "Count to twenty."
GREETINGS = "Say hello in many languages."


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "tether.runtime", *options]


class Child:
    """A runtime in `--stream` mode, whose events arrive in a queue."""

    def __init__(self, *options: str, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command("--stream", *options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._errors: list[bytes] = []
        self._threads = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr
        self._errors.extend(self.process.stderr)

    @property
    def errors(self) -> str:
        """What it wrote to stderr; complete after `close`."""
        return b"".join(self._errors).decode()

    def send(self, request: Request | bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(request if isinstance(request, bytes) else encode(request))
        self.process.stdin.flush()

    def next(self) -> Event | None:
        """The next event, or None at the end of stdout."""
        line = self._lines.get(timeout=PATIENCE_SECONDS)
        return None if line is None else decode_event(line)

    def until_ready(self) -> ModelInfo:
        while isinstance(event := self.next(), Loading):
            assert 0 <= event.fraction <= 1
        assert isinstance(event, Ready), event
        return event.model

    def until_end(self, sequence_id: str) -> list[Event]:
        events = []
        while True:
            event = self.next()
            assert event is not None, self.errors
            events.append(event)
            if isinstance(event, End) and event.id == sequence_id:
                return events

    def ask(self, text: str, sampling: Sampling = GREEDY, emitted: tuple[int, ...] = ()) -> list[Event]:
        self.send(Generate("ask", text, sampling, (emitted,)))
        return self.until_end("ask")

    def close(self) -> int:
        assert self.process.stdin
        assert self.process.stdout
        assert self.process.stderr
        self.process.stdin.close()
        try:
            code = self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()
            for thread in self._threads:
                thread.join()
            self.process.stdout.close()
            self.process.stderr.close()
        return code


def text_of(events: Sequence[Event | None]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def ids_of(events: list[Event]) -> tuple[int, ...]:
    return tuple(token_id for event in events if isinstance(event, Tokens) for token_id in event.token_ids)


def end_of(events: list[Event]) -> End:
    end = events[-1]
    assert isinstance(end, End)
    return end


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child("--model", "demo")
    child.until_ready()
    yield child
    assert child.close() == 0
    assert child.errors == ""


# --- by hand ---------------------------------------------------------------------------------------------------------


def by_hand(lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options), input=lines, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


def test_a_question_by_hand_prints_exactly_one_line() -> None:
    done = by_hand('{"input":"What is the capital of France?"}\n', "--model", "demo")
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"result": "The capital of France is Paris."}\n', "")


def test_each_bad_line_by_hand_gets_an_error_and_the_loop_goes_on_to_the_end_of_stdin() -> None:
    lines = [
        '{"input":"what is the capital of france"}',
        "nope",
        '{"input":3}',
        '{"input":"hi","surprise":1}',
        '{"input":"hi","temperature":-1}',
        json.dumps({"input": "word " * 600}),
        "",
        '{"input":"What is the capital of Japan?","max_tokens":3}',
        '{"input":"What is the capital of Japan?","stop":[" is"]}',
        '{"input":"The capital of Japan is","raw":true}',
    ]
    done = by_hand("\n".join(lines), "--model", "demo", "--threads", "1")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert [next(iter(found)) for found in answers] == ["result"] + ["error"] * 5 + ["result"] * 3
    assert answers[0]["result"] == PARIS
    assert "takes 512" in answers[5]["error"]
    assert PARIS.replace("France", "Japan").startswith(answers[6]["result"])
    assert [found["result"] for found in answers[7:]] == ["The capital of Japan", " Tokyo."]


def test_a_model_that_cannot_be_served_by_hand_is_one_line_on_stderr() -> None:
    done = by_hand("", "--model", "dmo")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tether.runtime: there is no model `dmo`; did you mean `demo`?")
    assert done.stderr.count("\n") == 1


# --- the worker's protocol -------------------------------------------------------------------------------------------


def test_loading_is_told_and_the_model_says_what_it_is() -> None:
    child = Child("--model", "demo", "--as", "toy", "--as-version", "7", "--dtype", "float32", "--slots", "3")
    stages: dict[str, list[float]] = {}
    while isinstance(event := child.next(), Loading):
        stages.setdefault(event.stage, []).append(event.fraction)
    assert list(stages) == ["import", "weights", "warm-up"]
    for fractions in stages.values():
        assert (fractions[0], fractions[-1]) == (0.0, 1.0)
        assert fractions == sorted(fractions)
    folder = catalog.resolve("demo").folder
    assert folder
    assert event == Ready(
        ModelInfo(
            "toy",
            "7",
            catalog.weights_hash(folder),
            "float32",
            512,
            catalog.tokenizer_hash(folder),
            slots=3,
            toy=True,
            embeds=True,
        )
    )
    assert child.close() == 0


def test_an_answer_is_streamed_token_by_token_with_positions_and_usage(child: Child) -> None:
    events = child.ask(FRANCE)
    started, *tokens, end = events
    assert isinstance(started, Started)
    assert started.prompt_tokens > 5
    assert text_of(events) == PARIS
    positions = [event.position for event in tokens if isinstance(event, Tokens)]
    assert positions == list(range(len(tokens)))
    assert isinstance(end, End)
    assert (end.finish_reason, end.error) == ("stop", None)
    assert end.usage == Usage(started.prompt_tokens, len(tokens))
    assert end.tokens_per_second > 0


def test_a_long_answer_is_long_enough_to_watch(child: Child) -> None:
    events = child.ask(LONG)
    assert 60 <= len(ids_of(events)) <= 200
    assert text_of(events).endswith("another one goes on where it stopped.")


def test_an_answer_ends_at_max_tokens_and_where_the_context_ends(child: Child) -> None:
    short = child.ask(LONG, Sampling(max_tokens=5))
    assert (end_of(short).finish_reason, len(ids_of(short))) == ("length", 5)
    crowded = child.ask("word " * 166, Sampling(max_tokens=400, temperature=50.0))
    usage = end_of(crowded).usage
    assert end_of(crowded).finish_reason == "length"
    assert usage.prompt_tokens + usage.completion_tokens == 512


def test_a_prompt_over_the_context_is_refused_before_any_work(child: Child) -> None:
    (end,) = child.ask("word " * 600)
    assert isinstance(end, End)
    assert end.error
    assert (end.error.code, end.error.param, end.retry) == ("context_length_exceeded", "input", False)


def test_cancelling_before_the_first_token_ends_with_none(child: Child) -> None:
    child.send(encode(Generate("a", LONG)) + encode(Generate("b", LONG)) + encode(Cancel("b")) + encode(Cancel("a")))
    first = child.until_end("b")
    ends = [event for event in first + child.until_end("a") if isinstance(event, End)]
    assert [(end.id, end.finish_reason) for end in ends] == [("b", "cancelled"), ("a", "cancelled")]
    assert ends[0].usage == Usage()


def test_cancelling_in_mid_answer_stops_within_a_few_tokens(child: Child) -> None:
    child.send(Generate("a", LONG))
    while not isinstance(child.next(), Tokens):
        pass
    child.send(Cancel("a"))
    end = end_of(child.until_end("a"))
    assert end.finish_reason == "cancelled"
    assert 1 <= end.usage.completion_tokens < 100
    child.send(Cancel("a"))
    child.send(Cancel("never seen"))
    assert text_of(child.ask(FRANCE)) == PARIS


def test_bad_lines_are_answered_and_disturb_nobody(child: Child) -> None:
    child.send(encode(Generate("good", FRANCE)) + b"nope\n[]\n" + b'{"id":"bad","input":7}\n' + b'{"input":"x"}\n')
    events: list[Event | None] = []
    while (
        len([event for event in events if isinstance(event, End)]) < 2
        or len([event for event in events if isinstance(event, Refused)]) < 3
    ):
        events.append(child.next())
    ends = {event.id: event for event in events if isinstance(event, End)}
    assert ends["good"].finish_reason == "stop"
    assert ends["bad"].error
    assert ends["bad"].error.code == "invalid_request"
    assert not ends["bad"].retry
    assert text_of(events) == PARIS


def test_a_live_id_a_second_time_is_refused(child: Child) -> None:
    child.send(encode(Generate("a", LONG)) + encode(Generate("a", FRANCE)))
    events = child.until_end("a")
    (refused,) = [event for event in events if isinstance(event, Refused)]
    assert refused.id == "a"
    assert text_of(events).startswith("Tether is a network")


@pytest.mark.parametrize(
    ("sampling", "emitted", "param"),
    [
        (Sampling(top_p=0), (), "top_p"),
        (Sampling(stop=("",)), (), "stop"),
        (Sampling(), (-1,), "emitted"),
        (Sampling(), (1 << 40,), "emitted"),
        (Sampling(), (1, 1), "emitted"),
    ],
)
def test_values_that_cannot_be_followed_are_refused_by_name(
    child: Child, sampling: Sampling, emitted: tuple[int, ...], param: str
) -> None:
    (end,) = child.ask(FRANCE, sampling, emitted)
    assert isinstance(end, End)
    assert end.error
    assert (end.error.code, end.error.param, end.retry) == ("invalid_request", param, False)


def test_a_stop_string_over_token_borders_is_never_told(child: Child) -> None:
    events = child.ask(COUNT, Sampling(stop=("eleven, tw", "twenty")))
    assert text_of(events) == "One, two, three, four, five, six, seven, eight, nine, ten, "
    assert end_of(events).finish_reason == "stop"


def test_characters_of_several_tokens_are_told_whole(child: Child) -> None:
    events = child.ask(GREETINGS)
    tokens = [event for event in events if isinstance(event, Tokens)]
    assert "\ufffd" not in text_of(events)
    assert text_of(events).endswith("안녕하세요 👋🌍")
    assert any(event.text == "" for event in tokens[:-1])


@pytest.mark.parametrize(
    ("question", "sampling"),
    [
        (FRANCE, Sampling()),
        (FRANCE, Sampling(temperature=0.8, seed=5)),
        (COUNT, Sampling(max_tokens=45, stop=("thirteen, f",))),
        (GREETINGS, Sampling(max_tokens=60)),
        (GREETINGS, Sampling(max_tokens=60, stop=("γειά", "xx"))),
        (LONG, Sampling(max_tokens=40, temperature=0.8, seed=11)),
        ("What is love?", Sampling(max_tokens=40, temperature=6.0, top_p=0.95, seed=3)),
        ("What is love?", Sampling(max_tokens=40, temperature=6.0, seed=-1)),
    ],
)
def test_an_answer_resumed_at_any_position_goes_on_as_if_it_had_never_stopped(
    child: Child, question: str, sampling: Sampling
) -> None:
    whole = child.ask(question, sampling)
    tokens = [event for event in whole if isinstance(event, Tokens)]
    ids, reason = ids_of(whole), end_of(whole).finish_reason
    for cut in range(len(ids) + 1):
        rest = child.ask(question, sampling, ids[:cut])
        assert ids[:cut] + ids_of(rest) == ids
        assert "".join(event.text for event in tokens[:cut]) + text_of(rest) == text_of(whole)
        assert [event.position for event in rest if isinstance(event, Tokens)] == list(range(cut, len(ids)))
        assert end_of(rest).finish_reason == reason
        assert end_of(rest).usage.completion_tokens == len(ids) - cut


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(child: Child) -> None:
    def answer(seed: int) -> str:
        return text_of(child.ask(FRANCE, Sampling(max_tokens=30, temperature=6.0, seed=seed)))

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) > 1


def test_jobs_run_together_and_each_gets_the_answer_that_it_gets_alone(child: Child) -> None:
    questions = {"a": LONG, "b": COUNT, "c": GREETINGS, "d": FRANCE, "e": "Capital of Japan?"}
    samplings = {name: Sampling(temperature=0.8 * (name in "bd"), seed=3, max_tokens=200) for name in questions}
    alone = {name: ids_of(child.ask(text, samplings[name])) for name, text in questions.items()}
    child.send(b"".join(encode(Generate(name, text, samplings[name])) for name, text in questions.items()))
    events: list[Event] = []
    while sum(isinstance(event, End) for event in events) < len(questions):
        event = child.next()
        assert event is not None, child.errors
        events.append(event)
    for name in questions:
        assert ids_of([event for event in events if isinstance(event, Tokens) and event.id == name]) == alone[name]
    first_end = next(place for place, event in enumerate(events) if isinstance(event, End))
    assert {event.id for event in events[:first_end] if isinstance(event, Tokens)} == set(questions)
    end = events[-1]
    assert isinstance(end, End)
    assert end.stats is not None
    assert (end.stats.running, end.stats.waiting) == (0, 0)
    assert end.stats.tokens_per_second > 0
    assert end.stats.time_to_first_token_seconds > 0
    assert end.stats.free_kv_tokens > 512


def test_several_choices_come_with_their_numbers_and_one_end(child: Child) -> None:
    events = child.ask(FRANCE, Sampling(n=3, temperature=1.0, seed=2, max_tokens=40))
    assert [type(event) for event in events].count(Started) == 1
    assert {event.choice for event in events if isinstance(event, Tokens)} == {0, 1, 2}
    assert len(end_of(events).choices) == 3
    assert end_of(events).finish_reason == end_of(events).choices[0]


# --- its surroundings ------------------------------------------------------------------------------------------------


def test_the_end_of_stdin_ends_the_child_in_mid_answer() -> None:
    child = Child("--model", "demo")
    child.until_ready()
    child.send(Generate("a", LONG))
    while not isinstance(child.next(), Tokens):
        pass
    assert child.close() == 0


def test_the_end_of_stdin_ends_the_child_while_it_loads() -> None:
    child = Child("--model", "demo")
    assert isinstance(child.next(), Loading)
    assert child.close() == 0


def test_a_killed_parent_leaves_no_child_behind(tmp_path: Path) -> None:
    # The child's stderr, inherited from the parent, reaches its end only when both are gone.
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen({command('--stream', '--model', 'demo')!r}, stdin=-1, stdout=-1)\n"
        "print(child.stdout.readline().decode(), end='', flush=True)\n"
        "child.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert b"loading" in process.stdout.readline()
        process.kill()
        process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_does_not_end_the_child_before_its_parent_decides(number: signal.Signals) -> None:
    child = Child("--model", "demo")
    assert isinstance(child.next(), Loading)
    child.process.send_signal(number)
    child.until_ready()
    child.process.send_signal(number)
    assert text_of(child.ask(FRANCE)) == PARIS
    assert child.close() == 0


def test_nothing_that_a_library_prints_or_reads_can_corrupt_the_stream(tmp_path: Path) -> None:
    # From the first moment of loading to the exit, by Python and below it, and with a hunger for stdin.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, sys, threading\n"
        "def print_all_the_time():\n"
        "    while 'tether.engine' not in sys.modules:\n"
        "        threading.Event().wait(0.001)\n"
        "    assert sys.stdin.read() == ''\n"
        "    for _ in range(3000):\n"
        "        print('Loading weights: 100%')\n"
        '        os.write(1, b\'{"event":"ready"}\\n\')\n'
        "        threading.Event().wait(0.001)\n"
        "threading.Thread(target=print_all_the_time, daemon=True).start()\n"
        "atexit.register(print, 'goodbye')\n"
    )
    child = Child("--model", "demo", env={"PYTHONPATH": str(tmp_path)})
    child.until_ready()
    assert [text_of(child.ask(FRANCE)) for _ in range(20)] == [PARIS] * 20
    assert child.close() == 0
    assert "Loading weights: 100%" in child.errors
    assert '{"event":"ready"}' in child.errors


def test_a_line_above_the_limit_is_refused_and_the_loop_goes_on(child: Child) -> None:
    child.send(b'{"id":"big","input":"' + b"x" * (9 << 20) + b'"}\n')
    refused = child.next()
    assert isinstance(refused, Refused)
    assert "longer than" in refused.error.message
    assert text_of(child.ask(FRANCE)) == PARIS


def test_a_model_that_cannot_be_served_is_fatal_and_says_what_to_do(tmp_path: Path) -> None:
    child = Child("--model", "phi-2", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    fatal = child.next()
    assert isinstance(fatal, Fatal)
    assert fatal.error.code == "model_unavailable"
    assert "download it first with a network" in fatal.error.message
    assert child.next() is None
    assert child.process.wait(PATIENCE_SECONDS) == 1
    child.close()


def test_a_folder_that_is_no_model_for_transformers_is_fatal_in_one_line(tmp_path: Path) -> None:
    folder = catalog.resolve("demo").folder
    assert folder
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (broken / name).write_bytes((folder / name).read_bytes())
    (broken / "config.json").write_text('{"model_type": "surprise"}')
    child = Child("--model", str(broken))
    while isinstance(event := child.next(), Loading):
        pass
    assert isinstance(event, Fatal)
    assert event.error.message.startswith("`broken` cannot be loaded: ")
    assert "\n" not in event.error.message
    assert child.process.wait(PATIENCE_SECONDS) == 1
    child.close()
