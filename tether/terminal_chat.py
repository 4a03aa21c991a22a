"""The terminal's side of a chat: lines in, answers out, commands that begin with a slash."""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import platformdirs

from tether import console
from tether.chat_client import RESUME_SECONDS, Away, ChatAnswer, ChatOptions, Message, Queued, pick, served
from tether.client import GatewayClient
from tether.errors import ContextLengthExceeded, JobConflict, OutputFailed, SetupError, TetherError

HISTORY_LINES = 1000

HELP = """\
/model [NAME]   talk to another model, or say which one this is
/models         which models are served now
/system [TEXT]  what the model is told before the conversation; alone: nothing
/clear          begin anew
/save FILE      write the conversation to a file, as text, or as JSON where it ends in .json
/help           this
/quit           leave; so does Ctrl-D, and Ctrl-C twice. Ctrl-C while an answer comes ends the answer."""


class Leave(Exception):
    """The user wants to leave."""


class TerminalChat:
    """A conversation with `model` on this terminal, or for the lines of a pipe."""

    def __init__(self, client: GatewayClient, model: str, *, system: str | None, options: ChatOptions) -> None:
        self._client = client
        self._model = model
        self._system = system
        self._options = options
        self._messages: list[Message] = []
        self._is_terminal = sys.stdin.isatty()
        self._num_failed = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/model": self._use_model,
            "/models": self._list_models,
            "/system": self._use_system,
            "/clear": self._clear,
            "/save": self._save,
            "/help": lambda _: console.print_note(HELP),
            "/quit": self._leave,
        }

    def run(self) -> int:
        """Talk until the user leaves or the pipe ends; return the exit code."""
        with _ended_by_signals(), _edited_lines() if self._is_terminal else contextlib.nullcontext():
            if self._is_terminal:
                console.print_note(f"{self._model} at {self._client.url}; /help says what can be typed, Ctrl-D leaves")
            try:
                for line in self._prompted() if self._is_terminal else _piped():
                    self._take(line)
            except Leave:
                return 0
        return 1 if self._num_failed and not self._is_terminal else 0

    def _prompted(self) -> Iterator[str]:
        """Yield what is typed. Two Ctrl-C in a row leave, as Ctrl-D does."""
        num_interrupts = 0
        while num_interrupts < 2:
            try:
                line = input(f"{console.visible(self._model)}> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                num_interrupts += 1
                sys.stdout.write("\n")
                if num_interrupts == 1:
                    console.print_note("Ctrl-C again, or Ctrl-D, leaves")
                continue
            num_interrupts = 0
            yield line
        else:
            return
        sys.stdout.write("\n")

    def _take(self, line: str) -> None:
        """Answer a line, or do what it says; what goes wrong is said in one line."""
        text = line.strip()
        if not text:
            return
        try:
            if text.startswith("/"):
                self._do(text)
            else:
                self._ask(text)
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            console.print_note("cancelled")
        except OutputFailed:
            raise  # whatever is answered next would not be read either
        except TetherError as exc:
            self._num_failed += 1
            hint = "; /clear begins anew" if isinstance(exc, ContextLengthExceeded) else ""
            console.print_error(exc.message + hint)

    def _ask(self, text: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        question = {"role": "user", "content": text}
        answer = ChatAnswer(self._client, self._model, [*system, *self._messages, question], self._options)
        try:
            self._show(answer)
        except TetherError:
            with contextlib.suppress(TetherError):  # what broke the answer off says it all
                answer.cancel()
            raise
        except BaseException:
            with contextlib.suppress(JobConflict):  # it had just ended
                answer.cancel()
            raise
        finally:
            if answer.text:
                self._messages += [question, {"role": "assistant", "content": answer.text}]
                console.print_piece("\n")

    def _show(self, answer: ChatAnswer) -> None:
        for piece in answer:
            if isinstance(piece, Queued):
                wait = "" if piece.expected_seconds is None else f", about {piece.expected_seconds:.0f} s"
                console.print_note(f"waiting for a slot: place {piece.place}{wait}")
            elif isinstance(piece, Away):
                if self._is_terminal:
                    continue  # it would stand in the middle of an answer that somebody sees stand still
                console.print_note(f"{piece.why}; asking for up to {RESUME_SECONDS:.0f} s for the rest of the answer")
            else:
                console.print_piece(piece)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _do(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name, list(self._commands), n=1)
            raise TetherError(
                f"there is no {name}; " + (f"did you mean {near[0]}?" if near else "/help lists what there is")
            )
        command(rest.strip())

    def _use_model(self, name: str) -> None:
        if name:
            self._model = pick(self._client, name)
        console.print_note(f"this is {self._model}")

    def _list_models(self, _: str) -> None:
        names = served(self._client)
        console.print_note(
            "\n".join(f"{'*' if name == self._model else ' '} {name}" for name in names) or "none is served now"
        )

    def _use_system(self, text: str) -> None:
        self._system = text or None
        console.print_note(
            f"the model is told: {text}" if text else "the model is told nothing before the conversation"
        )

    def _clear(self, _: str) -> None:
        self._messages.clear()
        console.print_note("the conversation begins anew")

    def _save(self, name: str) -> None:
        if not name:
            raise TetherError("/save takes the name of a file")
        path = Path(name).expanduser()
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._messages]
        if path.suffix == ".json":
            text = json.dumps({"model": self._model, "messages": messages}, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "".join(f"{message['role']}: {message['content']}\n\n" for message in messages)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise TetherError(f"there is a file {path} already; name another one") from None
        except OSError as exc:
            raise TetherError(f"cannot write {path}: {(exc.strerror or str(exc)).lower()}") from exc
        console.print_note(f"{len(messages)} messages are in {path}")

    def _leave(self, _: str) -> None:
        raise Leave


def _piped() -> Iterator[str]:
    """Yield the lines of the input; raise `SetupError` for what is no text."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as exc:
            raise SetupError(f"line {number} of the input is not UTF-8: {exc.reason} at byte {exc.start + 1}") from exc
        yield text


@contextlib.contextmanager
def _edited_lines() -> Iterator[None]:
    """Let lines be edited, with those of earlier runs to go back to, where the platform can."""
    try:
        import readline  # noqa: PLC0415 - not there on every platform
    except ImportError:
        yield
        return
    path = Path(platformdirs.user_state_dir("tether", appauthor=False)) / "chat_history"
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):  # there is none yet, or it cannot be read: then there is none
        readline.read_history_file(path)
    try:
        yield
    finally:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
        except OSError as exc:
            console.print_warning(f"what was typed is not kept: {exc}")


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a closed terminal, or a polite end, cancel the answer that is under way before the process ends."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
