"""What the commands print and how they end, in this process: one error line, an exit code, clean output."""

from __future__ import annotations

import io
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import trio

from tests.members import ADDRESS
from tests.store_contract import running_ledger
from tether import __version__, cli, console
from tether.invites import create_invite
from tether.network import Network
from tether.records import WorkerState
from tether.store import Store, open_store


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command on a data directory of its own."""
    monkeypatch.setenv("TETHER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TETHER_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("COLUMNS", "240")
    (tmp_path / "config.toml").touch()

    def run_one(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["tether", *arguments])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 0
        return Done(code, *capfd.readouterr())

    return run_one


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The data directory's store, with one worker whose name is `laptop`."""
    opened = open_store(f"sqlite:///{tmp_path}/tether.db")
    opened.migrate()
    opened.close()
    return opened


def test_the_version_needs_no_command(run: Run) -> None:
    assert run("--version") == (0, f"tether {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        ("workers", "drain", ""),
        ("workers", "resume", " "),
        ("keys", "revoke", ""),
        ("keys", "rotate", ""),
        ("tenants", "remove", ""),
        ("batches", "cancel", ""),
        ("jobs", "show", ""),
    ],
)
def test_an_empty_id_names_nothing(run: Run, store: Store, command: tuple[str, ...]) -> None:
    del store
    done = run(*command)
    assert done.code == 2
    assert "is empty" in done.err


@pytest.mark.parametrize(
    "command",
    [("workers", "drain"), ("keys", "revoke"), ("tenants", "remove"), ("batches", "cancel"), ("jobs", "show")],
)
def test_an_unknown_id_is_a_failure_and_no_misuse(run: Run, store: Store, command: tuple[str, ...]) -> None:
    del store
    done = run(*command, "nobody")
    assert done.code == 1
    assert done.err.startswith("error: there is no ")
    assert "nobody" in done.err


@pytest.mark.parametrize("arguments", [("jobs", "list"), ("models", "list", "--json"), ("--version",)])
def test_output_that_cannot_be_written_is_one_error_line(
    run: Run, store: Store, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    del store
    if arguments == ("jobs", "list"):
        arguments = ("store", "status")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        done = run(*arguments)
    assert done.code == 1
    assert done.err == "error: the output cannot be written: no space left on device\n"


def test_a_pipe_that_its_reader_has_closed_is_no_error(run: Run, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    del store
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        done = run("models", "list")
    assert (done.code, done.err) == (141, "")


def test_a_store_that_cannot_be_made_is_said_to_be_so(run: Run) -> None:
    done = run("store", "migrate", "--store", "sqlite:///proc/x.db")
    assert done.code == 1
    assert "/proc/x.db cannot be created: No such file" in done.err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("jobs", "list"), "no jobs yet"),
        (("jobs", "list", "--model", "nope"), "no job matches"),
        (("keys", "list"), "no keys yet; `tether keys create --tenant NAME` makes one"),
        (("keys", "list", "--tenant", "nobody"), "no key matches"),
        (("batches", "list", "--status", "failed"), "no batch matches"),
        (("files", "list", "--tenant", "nobody"), "no file matches"),
    ],
)
def test_an_empty_table_says_whether_a_filter_made_it_so(
    run: Run, store: Store, command: tuple[str, ...], says: str
) -> None:
    del store
    assert run(*command) == (0, "", says + "\n")


def test_a_value_in_the_configuration_file_is_blamed_on_the_file(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('[gateway]\nport = "abc"\n')
    done = run("gateway")
    assert done.code == 2
    assert f"{config}: [gateway] port = 'abc': " in done.err


@pytest.mark.parametrize(
    ("option", "value", "says"), [("--device", "tpu", "cpu, cuda"), ("--dtype", "float9", "bfloat16, float16")]
)
def test_a_device_or_a_type_that_no_machine_has_is_misuse(run: Run, option: str, value: str, says: str) -> None:
    done = run("worker", option, value)
    assert done.code == 2
    assert option in done.err
    assert says in done.err
    assert repr(value) in done.err


def test_a_command_to_type_next_quotes_what_it_names(run: Run) -> None:
    done = run("tenants", "create", "a b/c")
    assert "Next: tether keys create --tenant 'a b/c'" in done.out


def test_a_list_of_keys_says_which_is_in_its_grace_and_until_when(run: Run) -> None:
    done = run("keys", "create", "--tenant", "acme", "--expires", "2d", "--json")
    key_id = json.loads(done.out)["record"]["id"]
    assert run("keys", "rotate", key_id, "--grace", "1h").code == 0
    old, new = run("keys", "list").out.splitlines()[1:]
    assert "in grace" in old
    assert "in 1h " in old or "in 59m" in old
    assert "good" in new
    assert "in 2d " in new or "in 1d 23h" in new
    done = run("keys", "rotate", key_id)
    assert done.code == 1
    assert "was rotated before" in done.err


def test_the_end_of_a_worker_s_id_names_it_from_four_characters_on(run: Run, store: Store) -> None:
    store = open_store(store.url)
    worker = WorkerState("12D3KooWabcdefgh", "boot", 1, time.time(), "laptop", "eu", "cpu", ())

    async def save() -> None:
        async with running_ledger(store) as ledger:
            await ledger.save_workers([worker], orchestrator_id="o", now=time.time())

    trio.run(save)
    store.close()
    assert run("workers", "drain", "fgh").code == 1
    assert run("workers", "drain", "laptop").code == 0
    for command in (("workers", "list"), ("status",)):
        assert "drained" in run(*command).out
    assert run("workers", "resume", "efgh").code == 0
    assert "drained" not in run("workers", "list").out


def _stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def _invite() -> str:
    return create_invite(Network.found(), ["worker"], 3600, [ADDRESS])


def test_an_invite_is_read_from_stdin_or_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    invite = _invite()
    _stdin(monkeypatch, invite.encode() + b"\r\n")
    assert "joined as worker" in run("join", "-").out
    monkeypatch.setenv("TETHER_INVITE", invite)
    assert "joined as worker" in run("join").out
    monkeypatch.setenv("TETHER_INVITE", "-")
    _stdin(monkeypatch, invite.encode())
    assert "joined as worker" in run("join").out
    assert run("join", "nothing").code == 1, "what is typed goes before the environment"


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"\n", b"x" * 100_000])
def test_what_comes_on_stdin_and_is_no_invite_is_said_to_be_none(
    run: Run, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    _stdin(monkeypatch, data)
    done = run("join", "-")
    assert (done.code, done.out) == (1, "")
    assert "this is not an invite" in done.err
    assert len(done.err) < 200


def test_joining_without_an_invite_says_where_it_can_be(run: Run) -> None:
    done = run("join")
    assert done.code == 2
    assert "`-`" in done.err
    assert "TETHER_INVITE" in done.err


def test_libraries_log_only_warnings_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, library, own = logging.getLogger(), logging.getLogger("libp2p"), logging.getLogger("tether")
    for logger in (root, library, own):
        monkeypatch.setattr(logger, "handlers", list(logger.handlers))
        monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(library, "propagate", True)  # as the transport has it
    noisy = logging.getLogger("libp2p.network.auto_connector")
    monkeypatch.setattr(noisy, "level", logging.INFO)  # as it sets its own when imported
    for verbose in (0, 1, 2):
        console.configure_logging(verbose=verbose)
        noisy.info("AUTO_CONNECTOR_STATE")
        logging.getLogger("libp2p.host").error("a peer went away")
        logging.getLogger("tether.x").info("own")
        told = capsys.readouterr().err
        assert ("AUTO_CONNECTOR_STATE" in told, "went away" in told, "own" in told) == (verbose > 1, verbose > 1, True)
