from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.members import ADDRESS
from tether.address_book import AddressBook


def test_the_address_book_lists_orchestrators_while_they_run(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    assert book.read() == ()
    with book.listed("12D3KooWAbc", [ADDRESS]):
        assert AddressBook(tmp_path).read() == (ADDRESS,)
        assert book.read() == (ADDRESS,), "reading takes nothing away"
    assert book.read() == ()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_address_book_drops_the_entry_of_an_orchestrator_that_was_killed(tmp_path: Path) -> None:
    lister = (
        "import sys; from pathlib import Path; from tether.address_book import AddressBook\n"
        "with AddressBook(Path(sys.argv[1])).listed('killed', ['/ip4/192.0.2.1/tcp/9/p2p/killed']):\n"
        "    print('listed', flush=True); sys.stdin.read()\n"
    )
    book = AddressBook(tmp_path)
    with (
        subprocess.Popen(
            [sys.executable, "-c", lister, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
        book.listed("alive", [ADDRESS]),
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"listed\n"
        assert set(book.read()) == {ADDRESS, "/ip4/192.0.2.1/tcp/9/p2p/killed"}
        process.kill()
        process.wait()
        assert (tmp_path / "run" / "killed.json").exists()
        assert book.read() == (ADDRESS,)
        assert not (tmp_path / "run" / "killed.json").exists()


def test_an_orchestrator_that_starts_again_takes_the_place_of_its_killed_self(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "peer.json"
    path.write_text('{"addresses":["/ip4/192.0.2.1/tcp/9/p2p/peer"]}')
    with path.open("rb") as killed, book.listed("peer", [ADDRESS]):
        # Somebody who has just found the old entry dead must not take the new one away.
        book._drop(path, killed.fileno())
        assert book.read() == (ADDRESS,)


def test_the_address_book_skips_what_it_cannot_read_and_puts_the_newest_first(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    with (
        book.listed("old", ["/ip4/192.0.2.1/tcp/1/p2p/old"]),
        book.listed("new", ["/ip4/192.0.2.1/tcp/2/p2p/new"]),
        (tmp_path / "run" / "broken.json").open("w") as broken,
    ):
        os.utime(tmp_path / "run" / "old.json", (1, 1))
        broken.write("{")
        fcntl.flock(broken, fcntl.LOCK_EX)
        (tmp_path / "run" / "folder.json").mkdir()
        assert book.read() == ("/ip4/192.0.2.1/tcp/2/p2p/new", "/ip4/192.0.2.1/tcp/1/p2p/old")
