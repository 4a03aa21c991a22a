"""The store on a SQLite file: the contract, and what can go wrong with a file."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.store_contract import (
    NOW,
    OpenStore,
    StoreContract,
    admit,
    job,
    running_ledger,
    tenant_query,
    trio_test,
)
from tether.database import SqliteDatabase, Statement, connect
from tether.errors import DataDirError, InternalError, SchemaError, SetupError, StoreUnavailable, UsageError
from tether.ledger import Ledger
from tether.named_queries import Query, Write, WriteResult
from tether.store import Store, open_store, serve_command
from tether.tenant_store import TenantStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "it's a store.db"


@pytest.fixture
def open_store_again(path: Path) -> Iterator[OpenStore]:
    opened: list[Store] = []

    def again() -> Store:
        opened.append(open_store(f"sqlite://{path}"))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store_again: OpenStore) -> Store:
    store = open_store_again()
    store.migrate()
    return store


class TestSqliteStore(StoreContract):
    """The whole contract."""


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_private_and_durable(store: Store, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert store.counts()["queued"] == 0
    database = store._database
    assert isinstance(database, SqliteDatabase)
    assert database._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert database._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_three_slashes_or_four_mean_the_same_absolute_path(tmp_path: Path) -> None:
    for slashes in ("sqlite://", "sqlite:///"):
        database = connect(f"{slashes}{tmp_path}/a%20b.db")
        assert isinstance(database, SqliteDatabase)
        assert database.path == tmp_path / "a b.db"
        database.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "store.db",
        "sqlite:",
        "sqlite://",
        "sqlite://store.db",
        "sqlite:////",
        "mysql://x",
        "rqlite://",
        "rqlite://:4001",
        "rqlite://host:x",
        "rqlite://host:70000",
        "rqlite://a:1,,b:2",
        "rqlite://host:4001/db",
    ],
)
def test_a_url_that_names_no_store_is_a_mistake_in_usage(url: str) -> None:
    with pytest.raises(UsageError, match="a store is sqlite"):
        open_store(url)


def test_a_missing_store_is_not_made_where_it_is_only_looked_at(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store at"):
        open_store(f"sqlite://{path}", create=False)
    assert not path.exists()


def test_a_folder_in_the_file_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "store.db").mkdir()
    with pytest.raises(DataDirError, match=r"store\.db cannot be written"):
        open_store(f"sqlite://{tmp_path}/store.db")


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(DataDirError, match="cannot be created"):
        open_store(f"sqlite://{tmp_path}/data/store.db")


def test_a_folder_that_is_not_writable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:  # as root, no folder's mode would
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tether.database.os.open", refuse)
    with pytest.raises(DataDirError, match="Permission denied"):
        open_store(f"sqlite://{tmp_path}/store.db")


def test_a_file_that_is_no_database_is_named(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("dear diary, " * 1000)
    with pytest.raises(StoreUnavailable, match="is not a SQLite database"):
        open_store(f"sqlite://{path}")


def test_a_damaged_file_is_named(store: Store, path: Path) -> None:
    TenantStore(store).set_tenant("tenant-1", now=NOW)
    store.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(StoreUnavailable, match="is damaged"):
        open_store(f"sqlite://{path}")


def test_damage_that_shows_only_later_is_named_too(store: Store, path: Path) -> None:
    for number in range(200):
        store.write((tenant_query(f"tenant-{number}"),))
    store.close()
    content = bytearray(path.read_bytes())
    content[-8192:] = b"\xff" * 8192
    path.write_bytes(content)
    damaged = open_store(f"sqlite://{path}")
    with pytest.raises(StoreUnavailable, match="is damaged"):
        damaged.read("tenants")
    damaged.close()


def test_a_lock_that_another_process_keeps_is_waited_for_and_then_named(store: Store, path: Path) -> None:
    impatient = Store(connect(f"sqlite://{path}", deadline_seconds=0.05))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        TenantStore(impatient).set_tenant("tenant-1")
    assert TenantStore(impatient).tenant("tenant-1") is None  # readers need no lock
    other.execute("COMMIT")
    TenantStore(impatient).set_tenant("tenant-1")
    other.close()
    impatient.close()


@trio_test
async def test_a_full_disk_refuses_jobs_and_takes_them_again_when_there_is_room(store: Store) -> None:
    database = store._database
    assert isinstance(database, SqliteDatabase)
    writer = database._writer
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    async with running_ledger(store) as ledger:
        writer.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreUnavailable, match="is full"):
            await admit(ledger, job(input="x" * 100_000))
        assert store.counts()["queued"] == 0
        writer.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert (await admit(ledger, job(input="x" * 100_000))).accepted


def test_a_store_without_tables_says_what_to_run(path: Path) -> None:
    store = open_store(f"sqlite://{path}")
    with pytest.raises(SchemaError, match="tether store migrate"):
        store.check()
    with pytest.raises(SchemaError, match="tether store migrate"):
        store.counts()
    with pytest.raises(SchemaError, match="tether store migrate"):
        TenantStore(store).set_tenant("tenant-1")
    store.ping()
    store.close()


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    store.close()
    for call in (store.ping, store.counts, lambda: TenantStore(store).set_tenant("tenant-1")):
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


def test_a_row_that_a_newer_tether_wrote_is_named(store: Store) -> None:
    store._database.execute(
        [
            Statement(
                "INSERT INTO workers VALUES ('w', 'b', 1, 'n', 'r', 'g', 'ready', '[{\"name\": 1}]', 0, 'o', 1, 1, '', NULL)",
                {},
            )
        ]
    )
    with pytest.raises(SchemaError, match="upgrade Tether"):
        store.workers()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rqlite://me:secret@127.0.0.1:4001,127.0.0.1:4003", "rqlite://me:***@127.0.0.1:4001,127.0.0.1:4003"),
        ("rqlite://me:sec@ret@127.0.0.1:4001", "rqlite://me:***@127.0.0.1:4001"),
        ("rqlite://me:se:c://ret@127.0.0.1:4001", "rqlite://me:***@127.0.0.1:4001"),
        ("rqlite://:secret@127.0.0.1:4001", "rqlite://:***@127.0.0.1:4001"),
        ("rqlite://me@127.0.0.1:4001", "rqlite://me@127.0.0.1:4001"),
        ("rqlite://127.0.0.1:4001", "rqlite://127.0.0.1:4001"),
    ],
)
def test_a_password_is_not_kept_where_it_could_be_shown(url: str, shown: str) -> None:
    store = open_store(url)
    assert store.url == shown
    store.close()


def test_the_path_of_a_file_is_shown_as_it_is(tmp_path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite://{tmp_path}/a:b@c.db")) as store:
        assert store.url == f"sqlite://{tmp_path}/a:b@c.db"


@pytest.mark.parametrize(
    "url",
    [
        "rqlite://me:s3cret@host:99999",
        "rqlite://me:s3@cret@host:99999",
        "rqlite://me:s3cret@good:4001,bad:x",
        "rqlit://me:s3cret@host:4001",
        "rqlite:/me:s3cret@host:4001",
        "me:s3cret@host:4001",
        "me:s3://cret@host",
        "sqlite://me:s3cret@host:4001",
    ],
)
def test_a_mistyped_url_is_told_without_its_password(url: str) -> None:
    with pytest.raises(UsageError, match="a store is sqlite") as caught:
        open_store(url)
    assert "s3" not in caught.value.message
    assert "cret" not in caught.value.message


def test_the_command_that_serves_rqlite_is_found_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rqlited = tmp_path / "rqlited"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="no rqlited on PATH"):
        serve_command(tmp_path / "data")
    rqlited.touch(mode=0o755)
    assert serve_command(tmp_path / "data", port=5001) == [
        str(rqlited),
        "-http-addr",
        "127.0.0.1:5001",
        "-raft-addr",
        "127.0.0.1:5002",
        str(tmp_path / "data" / "rqlite"),
    ]


# --- group commit ----------------------------------------------------------------------------------------------------


class SlowStore(Store):
    """Records its batches, and holds each until it is let go."""

    def __init__(self, path: Path) -> None:
        super().__init__(connect(f"sqlite://{path}"))
        self.migrate()
        self.batches: list[list[str]] = []
        self.begun = trio.Event()
        self.go_on = trio.Event()
        self.failure: Exception | None = None

    def write_batch(self, writes: list[Write]) -> list[WriteResult]:  # type: ignore[override]
        self.batches.append([str(write[0].params["id"]) for write in writes])
        trio.from_thread.run_sync(self.begun.set)
        trio.from_thread.run(self.go_on.wait)
        if self.failure is not None:
            raise self.failure
        return super().write_batch(writes)


@pytest.fixture
def slow_store(path: Path) -> Iterator[SlowStore]:
    store = SlowStore(path)
    yield store
    store.close()


@trio_test
async def test_what_waits_while_a_batch_is_written_goes_in_the_next_one_in_order(slow_store: SlowStore) -> None:
    async with running_ledger(slow_store, max_batch=3) as ledger, trio.open_nursery() as nursery:
        nursery.start_soon(ledger.write, (tenant_query("first"),))
        await slow_store.begun.wait()
        for number in range(5):
            nursery.start_soon(ledger.write, (tenant_query(str(number)),))
            await trio.testing.wait_all_tasks_blocked()
        slow_store.go_on.set()
    assert slow_store.batches == [["first"], ["0", "1", "2"], ["3", "4"]]


@trio_test
async def test_a_batch_of_long_texts_is_cut_short(slow_store: SlowStore) -> None:
    slow_store.go_on.set()
    ledger = Ledger(slow_store, max_batch_chars=1000)
    async with trio.open_nursery() as outer:
        await outer.start(ledger.run)
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ledger.write, (tenant_query(f"{number}" * 600),))
        outer.cancel_scope.cancel()
    assert [len(batch) for batch in slow_store.batches] == [2, 2]


@trio_test
async def test_a_caller_that_is_cancelled_in_flight_does_not_disturb_its_batch(slow_store: SlowStore) -> None:
    async with running_ledger(slow_store) as ledger, trio.open_nursery() as nursery:
        cancelled = trio.CancelScope()

        async def give_up() -> None:
            with cancelled:
                await ledger.write((tenant_query("given up"),))

        nursery.start_soon(give_up)
        await slow_store.begun.wait()
        nursery.start_soon(ledger.write, (tenant_query("kept"),))
        cancelled.cancel()
        await trio.testing.wait_all_tasks_blocked()
        slow_store.go_on.set()
    assert [row["id"] for row in slow_store.read("tenants")] == ["given up", "kept"]


@trio_test
async def test_a_caller_that_is_cancelled_while_it_waits_withdraws_its_write(slow_store: SlowStore) -> None:
    async with running_ledger(slow_store) as ledger, trio.open_nursery() as nursery:
        nursery.start_soon(ledger.write, (tenant_query("first"),))
        await slow_store.begun.wait()
        with trio.move_on_after(0.01):
            await ledger.write((tenant_query("withdrawn"),))
        slow_store.go_on.set()
    assert slow_store.batches == [["first"]]


@trio_test
async def test_more_than_may_wait_is_refused_at_once(slow_store: SlowStore) -> None:
    async with running_ledger(slow_store, max_waiting=2) as ledger, trio.open_nursery() as nursery:
        nursery.start_soon(ledger.write, (tenant_query("first"),))
        await slow_store.begun.wait()
        for name in "ab":
            nursery.start_soon(ledger.write, (tenant_query(name),))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StoreUnavailable, match="2 writes wait") as caught:
            await ledger.write((tenant_query("c"),))
        assert caught.value.retry_after_seconds
        slow_store.go_on.set()


@trio_test
async def test_a_store_that_fails_tells_every_caller_of_the_batch_and_serves_the_next(slow_store: SlowStore) -> None:
    failures: list[StoreUnavailable] = []

    async def write(ledger: Ledger, name: str) -> None:
        try:
            await ledger.write((tenant_query(name),))
        except StoreUnavailable as exc:
            failures.append(exc)

    slow_store.go_on.set()
    slow_store.failure = StoreUnavailable("gone")
    async with running_ledger(slow_store) as ledger:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(write, ledger, name)
        slow_store.failure = None
        await write(ledger, "d")
    assert [failure.message for failure in failures] == ["gone"] * 3
    assert len(set(map(id, failures))) == 3  # each has a traceback of its own
    assert [row["id"] for row in slow_store.read("tenants")] == ["d"]


@trio_test
async def test_a_stopping_ledger_finishes_what_it_began_and_refuses_the_rest(slow_store: SlowStore) -> None:
    ledger = Ledger(slow_store)
    outcomes: dict[str, object] = {}

    async def write(name: str) -> None:
        try:
            outcomes[name] = await ledger.write((tenant_query(name),))
        except StoreUnavailable as exc:
            outcomes[name] = exc.message

    async with trio.open_nursery() as callers, trio.open_nursery() as runner:
        await runner.start(ledger.run)
        callers.start_soon(write, "begun")
        await slow_store.begun.wait()
        callers.start_soon(write, "waiting")
        await trio.testing.wait_all_tasks_blocked()
        runner.cancel_scope.cancel()
        slow_store.go_on.set()
    await write("late")
    assert outcomes["begun"] == (1,)
    assert outcomes["waiting"] == outcomes["late"] == "this node is stopping and writes no more"


@trio_test
async def test_a_mistake_in_the_store_s_own_code_reaches_the_callers_and_the_log(slow_store: SlowStore) -> None:
    slow_store.go_on.set()
    slow_store.failure = ZeroDivisionError("a bug")
    with pytest.RaisesGroup(ZeroDivisionError):
        async with running_ledger(slow_store) as ledger:
            with pytest.raises(StoreUnavailable, match="the log says why"):
                await ledger.write((tenant_query("a"),))
            await trio.sleep_forever()


# --- nothing foreign gets through --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_BUSY, StoreUnavailable),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, StoreUnavailable),
        (sqlite3.SQLITE_LOCKED, StoreUnavailable),
        (sqlite3.SQLITE_FULL, StoreUnavailable),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreUnavailable),
        (sqlite3.SQLITE_READONLY_DIRECTORY, StoreUnavailable),
        (sqlite3.SQLITE_CANTOPEN, StoreUnavailable),
        (sqlite3.SQLITE_NOMEM, StoreUnavailable),
        (sqlite3.SQLITE_CONSTRAINT, InternalError),
        (None, InternalError),
    ],
)
def test_every_error_of_sqlite_becomes_one_of_ours(store: Store, code: int | None, expected: type[Exception]) -> None:
    failure = sqlite3.OperationalError("as if")
    if code is not None:
        failure.sqlite_errorcode = code
    database = store._database
    assert isinstance(database, SqliteDatabase)
    for index in (None, 0):
        with pytest.raises(expected) as caught, database._translated(index):
            raise failure
        assert caught.value.__cause__ is failure


@pytest.mark.parametrize("value", ["\ud800", 2**70, object()], ids=["surrogate", "too big", "no value"])
def test_a_value_that_cannot_be_kept_is_an_error_of_ours(store: Store, value: object) -> None:
    with pytest.raises(InternalError):
        store.job(value)  # type: ignore[arg-type]
    with pytest.raises(InternalError):
        store.write((Query("worker_gone", {"id": value, "boot_id": "", "orchestrator_id": "", "now": 0.0}),))  # type: ignore[dict-item]
