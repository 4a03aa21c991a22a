"""What people see: tables, progress, logs, one red line for an error. The only importer of rich.

Data goes to stdout and everything else to stderr, so that `tether jobs list --json | …` is clean. Colours and progress
bars are for terminals; `NO_COLOR` and pipes get plain text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from tether.errors import OutputClosed, OutputFailed

LOG_FORMATS = ("auto", "plain", "json")

_STEERING = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class _DataConsole(Console):
    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to `_data`; rich would end the process here."""
        raise  # noqa: PLE0704 - rich calls this where it has caught the error


def stdout() -> Console:
    """Return the console for data; wide enough for whole rows where nobody looks."""
    console = _DataConsole(highlight=False)
    return console if console.is_terminal else _DataConsole(highlight=False, width=240)


def stderr() -> Console:
    """Return the console for everything that is not data."""
    return Console(stderr=True, highlight=False)


def visible(text: str, *, keep: str = "") -> str:
    """Return a text with its control characters spelled out: what a client or a worker sent must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char in keep or char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def print_error(message: str) -> None:
    """Say in one red line what went wrong and what to do."""
    stderr().print(Text.assemble(("error: ", "bold red"), visible(" ".join(message.split()))), soft_wrap=True)


def print_warning(message: str) -> None:
    """Say in one yellow line what somebody should know."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), visible(message)), soft_wrap=True)


def print_note(text: str) -> None:
    """Say something by the way, which is no data."""
    stderr().print(Text(visible(text, keep="\n"), style="dim"), soft_wrap=True)


@contextmanager
def _data() -> Iterator[None]:
    """Write what the block prints to stdout; raise `OutputFailed`, or `OutputClosed` where its reader has left."""
    try:
        yield
        sys.stdout.flush()
    except OSError as exc:
        # What is left in the buffer would fail again when Python flushes it at its end.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):
            raise OutputClosed from exc
        raise OutputFailed(f"the output cannot be written: {(exc.strerror or str(exc)).lower()}") from exc


def print_line(text: str = "") -> None:
    """Say one line of plain data."""
    with _data():
        stdout().print(Text(visible(text, keep="\n")), soft_wrap=True)


def print_piece(text: str) -> None:
    """Say a piece of an answer as it comes, on the line where the last one ended."""
    with _data():
        sys.stdout.write(visible(text, keep="\n\t"))


def print_json(value: Any) -> None:
    """Print records, or anything that JSON has, as indented JSON."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    # JSON itself has escapes for no more than the first 32 of what steers a terminal.
    text = _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    with _data():
        sys.stdout.write(text + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """Print rows as a table, or `empty` where there are none."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column in {"ID", "STATUS", "WHEN"}, overflow="fold")
    for row in rows:
        table.add_row(
            *[
                Text("-" if cell is None or cell == "" else visible(str(cell)), style=_STYLES.get(str(cell), ""))
                for cell in row
            ]
        )
    if table.row_count:
        with _data():
            stdout().print(table)
    else:
        stderr().print(Text(empty))


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print one thing's facts, a line each."""
    rows = [(name, "-" if value is None or value == "" else visible(str(value), keep="\n\t")) for name, value in facts]
    width = max(len(name) for name, _ in rows)
    with _data():
        for name, value in rows:
            stdout().print(
                Text.assemble((f"{name:{width}}  ", "bold"), (value, _STYLES.get(value, ""))), soft_wrap=True
            )


_STYLES = {
    "completed": "green",
    "ready": "green",
    "up": "green",
    "running": "cyan",
    "queued": "yellow",
    "loading": "yellow",
    "draining": "yellow",
    "failed": "red",
    "expired": "red",
    "gone": "red",
    "silent": "red",
    "cancelled": "magenta",
}


def ago(at: float | None, now: float | None = None) -> str:
    """Return how long ago a time was, in the two largest units that say it."""
    if at is None:
        return "-"
    return f"{_two_units((time.time() if now is None else now) - at)} ago"


def until(at: float | None, now: float) -> str:
    """Return how long it is until a time, or how long ago it was."""
    return f"in {_two_units(at - now)}" if at is not None and at > now else ago(at, now)


def _two_units(duration: float) -> str:
    seconds = max(0, round(duration))
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // smaller_size
            return f"{seconds // size}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{seconds}s"


def took(start: float | None, end: float | None) -> str:
    """Return a duration for a table."""
    return "-" if start is None or end is None else f"{max(0.0, end - start):.2f}s"


def shorten(text: str | None, length: int = 60) -> str:
    """Return a text's beginning on one line."""
    line = visible(" ".join((text or "").split()))
    return line if len(line) <= length else line[: length - 1] + "…"


class LoadingProgress:
    """Shows how far each model's loading is: bars on a terminal, a line a stage elsewhere."""

    def __init__(self) -> None:
        console = stderr()
        self._is_terminal = console.is_terminal
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars away; may be repeated."""
        if self._is_terminal:
            self._progress.stop()

    def show(self, model: str, stage: str, fraction: float) -> None:
        """Show that a model is at `fraction` (0 to 1) of a stage."""
        if self._is_terminal:
            if not self._tasks:  # not before: bars without a model would be drawn again and again for nothing
                self._progress.start()
            if model not in self._tasks:
                self._tasks[model] = self._progress.add_task("", total=1.0)
            self._progress.update(self._tasks[model], description=f"loading {model}: {stage}", completed=fraction)
        elif self._stages.get(model) != stage:
            self._console.print(Text(visible(f"loading {model}: {stage}")), soft_wrap=True)
        self._stages[model] = stage


# --- logs ------------------------------------------------------------------------------------------------------------

_PLAIN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class _PlainFormatter(logging.Formatter):
    """One line a record, with control characters spelled out, as peers and clients have a part in what is logged.

    A traceback follows on lines that are indented, so that none of them can be taken for a record.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the record's line."""
        return visible(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """Return a traceback's lines."""
        return textwrap.indent(visible(super().formatException(ei), keep="\n"), "  ")


class _JsonFormatter(logging.Formatter):
    """One JSON object a line; what a record was given as `extra` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in record.__dict__.items() if key not in _PLAIN_ATTRIBUTES}
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(*, verbose: int = 0, log_format: str = "auto") -> None:
    """Send logs to stderr: Tether's from INFO (DEBUG when `verbose`), libraries' from WARNING (more when very verbose)."""
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_PlainFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose > 1 else logging.WARNING)
    logging.getLogger("tether").setLevel(logging.DEBUG if verbose else logging.INFO)
    # libp2p logs each peer that goes away as an error; the links say the same once, in their own words.
    logging.getLogger("libp2p").setLevel(logging.DEBUG if verbose > 1 else logging.CRITICAL)
    if verbose < 2:
        handler.addFilter(_keeps_its_place)


def _keeps_its_place(record: logging.LogRecord) -> bool:
    """Whether a record is to be told where libraries only warn: some set levels of their own loggers when imported."""
    name = record.name.partition(".")[0]
    return record.levelno >= {"tether": logging.DEBUG, "libp2p": logging.CRITICAL}.get(name, logging.WARNING)
