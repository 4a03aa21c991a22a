"""What is printed and logged: what peers and clients sent is text there and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from tether import console

STEERING = "x\n12:00:00 INFO    link up: forged\x1b[2J\r\x9b1m\u202e\u2028"


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    """Return a logger of the package, with logging as it was afterwards."""
    root, own, library = logging.getLogger(), logging.getLogger("tether"), logging.getLogger("libp2p")
    handlers, levels = list(root.handlers), [(each, each.level) for each in (root, own, library)]
    yield logging.getLogger("tether.x")
    root.handlers[:] = handlers
    for logger, level in levels:
        logger.setLevel(level)


def test_what_a_peer_says_is_one_line_of_the_log_whatever_is_in_it(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure_logging()
    log.info("refused a link: %s", STEERING)
    told = capsys.readouterr().err
    assert told.endswith("x\\n12:00:00 INFO    link up: forged\\x1b[2J\\r\\x9b1m\\u202e\\u2028\n")
    assert told.removesuffix("\n").isprintable()


def test_what_a_peer_says_cannot_make_a_record_out_of_a_traceback(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure_logging()
    try:
        raise ValueError(STEERING)
    except ValueError:
        log.exception("a handler failed")
    first, *rest = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert "ERROR" in first
    assert "  12:00:00 INFO    link up: forged\\x1b[2J\\r\\x9b1m\\u202e\\u2028" in rest
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_a_record_as_json_is_one_line_and_says_the_same(
    log: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure_logging(log_format="json")
    log.info("refused a link: %s", STEERING)
    told = capsys.readouterr().err.removesuffix("\n")
    assert told.isprintable()
    assert json.loads(told)["message"] == f"refused a link: {STEERING}"


def test_json_for_a_terminal_has_no_control_characters_and_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"model": STEERING + "日本\x7f"})
    told = capsys.readouterr().out
    assert told.replace("\n", "").isprintable()
    assert json.loads(told) == {"model": STEERING + "日本\x7f"}


def test_lines_facts_and_tables_spell_control_characters_out(capsys: pytest.CaptureFixture[str]) -> None:
    text = STEERING.replace("\n", "")
    console.print_line(text)
    console.print_facts([("model", text)])
    console.print_table(["MODEL"], [[text]], "none")
    told = capsys.readouterr().out
    assert told.count("forged\\x1b[2J\\r\\x9b1m\\u202e\\u2028") == 3
    assert told.replace("\n", "").isprintable()
