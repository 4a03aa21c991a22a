"""What can happen to a SQLite store under a running `tether up`, and what people are told of it until it is over."""

from __future__ import annotations

import contextlib
import resource
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.acceptance.test_failures import Client
from tests.clients import Load, check_ledger, limit
from tests.processes import Machine, Process, eventually
from tether.store import open_store

SCRIPT = "tokens=30 every=0.05"
WHOLE = "".join(f"{number} " for number in range(30))


class Up:
    """A `tether up` on a SQLite file, and what it says of its store."""

    def __init__(self, machine: Machine, file: Path) -> None:
        self.machine = machine
        self.file = file
        self.process = self._start()

    def _start(self) -> Process:
        process = self.machine.start("up", **self.machine.scripted(slots=8))
        self.machine.wait_ready(process)
        return process

    def start_again(self) -> None:
        self.process = self._start()

    def is_without(self, words: str) -> bool:
        """Whether `/readyz` says that the store cannot be used, and why."""
        error = self.machine.http.get("/readyz").json().get("error", {"code": "", "message": ""})
        return error["code"] == "store_unavailable" and words in error["message"]

    def works(self) -> bool:
        return self.machine.infer("tokens=2").status_code == 200

    def survives(self, harm: Callable[[], object], mend: Callable[[], object], words: str) -> None:
        """Do harm in the middle of an answer: it goes on, new jobs are refused, and all is well when it is mended."""
        client = Client(self.machine, SCRIPT)
        client.wait_for_tokens(3)
        harm()
        try:
            eventually(lambda: self.is_without(words), what=f"/readyz says {words!r}")
            refused = self.machine.infer("tokens=1")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            assert words in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            client.wait_for_tokens(30)
            assert client.is_alive(), "an end is told that is not in the ledger"
        finally:
            mend()
        client.expect_whole(WHOLE)
        eventually(self.works, what="jobs are taken again")
        eventually(lambda: self.machine.http.get("/readyz").status_code == 200)
        assert "Traceback" not in self.process.output


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system where this machine lets its users; say whether it does."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(folder)]
    is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    with small_disk(folder / "small"), Machine(folder / "machine") as machine:
        machine.environment["TETHER_STORE"] = f"sqlite:///{folder / 'small' / 'tether.db'}"
        yield Up(machine, folder / "small" / "tether.db")


def test_a_full_disk_is_named_and_the_store_is_used_again_when_there_is_room(up: Up) -> None:
    filler = up.file.parent / "filler"
    soft, hard = resource.prlimit(up.process.pid, resource.RLIMIT_FSIZE)

    def fill() -> None:
        if up.file.parent.is_mount():
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        else:  # the kernel refuses this process's writes beyond a limit, as a disk without room does
            resource.prlimit(up.process.pid, resource.RLIMIT_FSIZE, (4096, hard))

    def make_room() -> None:
        filler.unlink(missing_ok=True)
        resource.prlimit(up.process.pid, resource.RLIMIT_FSIZE, (soft, hard))

    up.survives(fill, make_room, "the disk that holds the store")


def test_a_store_that_another_process_keeps_locked_is_named_and_used_again_when_it_lets_go(up: Up) -> None:
    with contextlib.closing(sqlite3.connect(up.file, isolation_level=None, check_same_thread=False)) as other:
        up.survives(lambda: other.execute("BEGIN EXCLUSIVE"), lambda: other.execute("ROLLBACK"), "locked")


def test_a_lock_of_a_second_or_two_refuses_nobody(up: Up) -> None:
    answers: list[httpx.Response] = []
    with contextlib.closing(sqlite3.connect(up.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        asking = threading.Thread(target=lambda: answers.append(up.machine.infer("tokens=2")))
        asking.start()
        asking.join(1.5)  # the lock's time
        assert not answers
        other.execute("ROLLBACK")
    asking.join(30)
    assert answers[0].json()["result"] == "0 1 "


def test_a_store_that_cannot_be_written_is_named_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    with small_disk(folder) as is_mounted, Machine(tmp_path / "machine") as machine:
        if not is_mounted:
            pytest.skip("this machine mounts nothing for this user")
        machine.environment["TETHER_STORE"] = f"sqlite:///{folder / 'tether.db'}"
        assert machine.run("store", "migrate").returncode == 0
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        refused = machine.run("orchestrator")
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False), refused.stderr
        assert "cannot be written: Read-only file system" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("num_good_bytes", "words"), [(0, "is not a SQLite database; move it away"), (4096, "is damaged; restore it")]
)
def test_a_store_that_is_no_database_or_damaged_is_named_at_the_start(
    machine: Machine, num_good_bytes: int, words: str
) -> None:
    assert machine.run("store", "migrate").returncode == 0
    file = machine.data_dir / "tether.db"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:num_good_bytes] + b"\xa5" * (size - num_good_bytes))
    refused = machine.run("orchestrator")
    assert (refused.returncode, "Traceback" in refused.stderr) == (1, False), refused.stderr
    said = " ".join(refused.stderr.split())
    assert words in said
    assert "tether.db" in said


def test_after_a_power_cut_what_was_accepted_is_done_and_nothing_stays_reserved(up: Up) -> None:
    with contextlib.closing(open_store(f"sqlite:///{up.file}")) as store:
        limit(store, "power")
        with Load([up.machine.url], "power") as load:
            load.wait_for_more(3)
            up.process.kill()
        up.start_again()
        accepted = {each.job_id for each in load.answered}
        assert len(accepted) >= 9
        check_ledger(store, "power", accepted)
