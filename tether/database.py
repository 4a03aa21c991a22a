"""Two databases behind one small interface: a SQLite file, and rqlite through pyrqlite. All of it blocks.

`execute` runs statements in one transaction and returns what became of each; `query` returns rows. Whatever goes
wrong leaves this module as `StoreUnavailable` (the store cannot do anything now), `SchemaError` (its tables are not
ours) or `StatementError` (this one statement is at fault, and its transaction changed nothing). The only importer of
pyrqlite.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sqlite3
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import msgspec
from pyrqlite.connections import Connection as PyrqliteConnection

from tether.errors import DataDirError, InternalError, SchemaError, StoreUnavailable, TetherError, UsageError

Value = str | int | float | None
Row = dict[str, Value]

MIN_SQLITE = (3, 38, 0)  # STRICT tables and the -> and ->> operators
_NUM_READERS = 3


class Statement(NamedTuple):
    """SQL with `:name` parameters and their values; more values than the SQL names do no harm."""

    sql: str
    params: Mapping[str, Value]


class Applied(NamedTuple):
    """What became of one statement."""

    num_rows: int
    """Rows that it inserted, changed or deleted."""
    rows: Sequence[Row] = ()
    """What its RETURNING says; rqlite may not see that there is one, and says nothing then."""


class StatementError(InternalError):
    """The store refused a statement."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(f"the store refused a statement: {message}")
        self.index = index
        """Which of the transaction's statements is at fault."""


class Database(Protocol):
    """What the store needs of a database. Safe to call from several threads."""

    def execute(self, statements: Sequence[Statement]) -> list[Applied]:
        """Run the statements in one transaction and return what became of each.

        Raises `StatementError`, `SchemaError` or `StoreUnavailable`. After the last one nobody knows whether the
        transaction was committed.
        """
        ...

    def query(self, statement: Statement, *, settled: bool = False) -> list[Row]:
        """Return the rows of a SELECT. `settled`: nothing that was committed anywhere before may be missing."""
        ...

    def close(self) -> None:
        """Close all connections. A call that is waiting for the database raises `StoreUnavailable`."""
        ...


# --- SQLite ----------------------------------------------------------------------------------------------------------

# These say that the file as a whole cannot be used now; the rest is one statement's fault.
_SQLITE_FAILURES = {
    sqlite3.SQLITE_BUSY: "another process has kept the store {path} locked",
    sqlite3.SQLITE_LOCKED: "another process has kept the store {path} locked",
    sqlite3.SQLITE_FULL: "the disk that holds the store {path} is full",
    sqlite3.SQLITE_IOERR: "the disk that holds the store {path} fails",
    sqlite3.SQLITE_READONLY: "the store {path} is read-only",
    sqlite3.SQLITE_CANTOPEN: "the store {path} cannot be opened",
    sqlite3.SQLITE_NOTADB: "{path} is not a SQLite database; move it away, or name another store",
    sqlite3.SQLITE_CORRUPT: "the store {path} is damaged; restore it from a backup, or move it away",
    sqlite3.SQLITE_NOMEM: "there is no memory left for the store {path}",
}


class SqliteDatabase:
    """A SQLite file in WAL mode: one writer at a time, a few readers beside it."""

    def __init__(self, path: Path, *, create: bool = True, busy_seconds: float = 5.0) -> None:
        if sqlite3.sqlite_version_info < MIN_SQLITE:
            raise SchemaError(
                f"Python's SQLite is {sqlite3.sqlite_version}; Tether needs {'.'.join(map(str, MIN_SQLITE))} or newer"
            )
        self.path = path
        self._busy_seconds = busy_seconds
        self._closed = False
        self._write_lock = threading.Lock()
        _prepare_file(path, create=create)
        self._writer = self._connect()
        self._readers: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(_NUM_READERS):
            self._readers.put(None)  # opened when first needed

    def execute(self, statements: Sequence[Statement]) -> list[Applied]:
        """See `Database.execute`."""
        with self._write_lock:
            self._check_open()
            try:
                return self._transact(statements)
            finally:
                if self._writer.in_transaction:
                    with contextlib.suppress(sqlite3.Error):  # what made it fail is on its way up already
                        self._writer.execute("ROLLBACK")

    def query(self, statement: Statement, *, settled: bool = False) -> list[Row]:
        """See `Database.query`; one file is always settled."""
        del settled
        connection = self._readers.get()
        try:
            self._check_open()
            with self._translated():
                if connection is None:
                    connection = self._connect()
                return _rows(connection.execute(statement.sql, statement.params))
        finally:
            self._readers.put(connection)

    def close(self) -> None:
        """See `Database.close`; waits for the calls that are running."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            readers = [self._readers.get() for _ in range(_NUM_READERS)]
            for connection in (*readers, self._writer):
                if connection is not None:
                    connection.close()
            for _ in readers:
                self._readers.put(None)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")

    def _transact(self, statements: Sequence[Statement]) -> list[Applied]:
        applied = []
        with self._translated():
            self._writer.execute("BEGIN IMMEDIATE")
        for index, statement in enumerate(statements):
            with self._translated(index):
                cursor = self._writer.execute(statement.sql, statement.params)
                rows = _rows(cursor)
                # Everything but INSERT, UPDATE and DELETE says -1.
                applied.append(Applied(max(cursor.rowcount, 0), rows))
        with self._translated():
            self._writer.execute("COMMIT")
        return applied

    def _connect(self) -> sqlite3.Connection:
        with self._translated():
            connection = sqlite3.connect(
                self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            try:
                self._enter_wal(connection)
                # What a client was told must outlive a power cut; a sync is cheap beside group commit.
                connection.execute("PRAGMA synchronous = FULL")
            except BaseException:
                connection.close()
                raise
            return connection

    def _enter_wal(self, connection: sqlite3.Connection) -> None:
        # SQLite does not wait for the lock here when two processes open a new file at the same moment.
        give_up_at = time.monotonic() + self._busy_seconds
        while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _translated(self, index: int | None = None) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise self._translate(exc, index) from exc
        except (UnicodeError, OverflowError, TypeError) as exc:  # a value that SQLite cannot keep
            if index is None:
                raise InternalError(f"the store refused a query: {exc}") from exc
            raise StatementError(index, str(exc)) from exc

    def _translate(self, exc: sqlite3.Error, index: int | None) -> TetherError:
        # The low byte is the kind; the rest says where exactly. Errors of the Python module itself have no code.
        code = getattr(exc, "sqlite_errorcode", -1) & 0xFF
        if code in _SQLITE_FAILURES:
            return StoreUnavailable(f"{_SQLITE_FAILURES[code].format(path=self.path)} ({exc})")
        return _refusal(str(exc), index)


def _rows(cursor: sqlite3.Cursor) -> list[Row]:
    if cursor.description is None:
        return []
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def _prepare_file(path: Path, *, create: bool) -> None:
    """Make sure that there is a file that this process can write to. Prompts are private: mode 0600."""
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600))
    except OSError as exc:
        if create and not path.exists():
            raise DataDirError(f"the store {path} cannot be created: {exc.strerror or exc}") from exc
        if isinstance(exc, FileNotFoundError):
            raise StoreUnavailable(
                f"there is no store at {path}; `tether up` or `tether store migrate` makes one"
            ) from exc
        raise DataDirError(f"the store {path} cannot be written: {exc.strerror or exc}") from exc


def _refusal(message: str, index: int | None) -> TetherError:
    if message.startswith(("no such table", "no such column")) or "has no column named" in message:
        return SchemaError(f"the store's tables are not this Tether's ({message}); run `tether store migrate`")
    if index is None:
        return InternalError(f"the store refused a query: {message}")
    return StatementError(index, message)


# --- rqlite ----------------------------------------------------------------------------------------------------------

_CONNECT_SECONDS = 1.0
_ANSWER_SECONDS = 3.0  # longer than an election, shorter than the deadline: a frozen host must not use all of it up
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 0.5


class Host(NamedTuple):
    """Where one rqlited answers."""

    name: str
    port: int

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class _Result(msgspec.Struct):
    """What rqlite says of one statement."""

    error: str | None = None
    rows_affected: int = 0
    columns: list[str] = []
    values: list[list[Value]] = []

    @property
    def rows(self) -> list[Row]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.values]


class _Answer(msgspec.Struct):
    results: list[_Result] = []
    error: str | None = None


class _HostFailed(Exception):
    """This host could not answer; another one might."""


class _HttpClient(PyrqliteConnection):  # type: ignore[misc]  # pyrqlite has no types
    """pyrqlite's connection, without its blind retries, with time limits, and with rqlite's own batches.

    pyrqlite's cursor writes parameters into the SQL itself and sends one statement at a time; `post` sends what rqlite
    calls parameterised statements, many in one request.
    """

    def __init__(self, scheme: str, host: Host, user: str | None, password: str | None) -> None:
        super().__init__(scheme=scheme, host=host.name, port=host.port, timeout=_CONNECT_SECONDS, max_redirects=0)
        if user is not None:
            # pyrqlite breaks the header into lines where the password is long.
            token = b64encode(f"{user}:{password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {token}"
        self._headers["Content-Type"] = "application/json"

    @property
    def used(self) -> bool:
        """Whether the socket is open from an earlier request, and may be stale."""
        return self._connection.sock is not None

    def post(self, path: str, body: bytes, *, timeout_seconds: float) -> tuple[int, bytes]:
        """Return the answer's status and body; raise what `http.client` and sockets raise."""
        http: HTTPConnection | HTTPSConnection = self._connection
        if http.sock is None:
            http.timeout = min(_CONNECT_SECONDS, timeout_seconds)
            http.connect()
        http.sock.settimeout(timeout_seconds)
        response = self._fetch_response("POST", path, body=body)
        return response.status, response.read()

    def _retry_request(self, method: str, uri: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        self._connection.request(method, uri, body=body, headers={**self._headers, **(headers or {})})
        return self._connection.getresponse()


class RqliteDatabase:
    """One rqlite cluster, reached through any of its hosts.

    A request that fails is sent again to the next host, within the deadline; so every statement has to be harmless
    when it is applied twice.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        user: str | None = None,
        password: str | None = None,
        secure: bool = False,
        deadline_seconds: float = 10.0,
    ) -> None:
        self.hosts = tuple(hosts)
        self._scheme = "https" if secure else "http"
        self._user, self._password = user, password
        self._deadline_seconds = deadline_seconds
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards the two below
        self._first = 0  # the host that answered last
        self._idle: dict[Host, list[_HttpClient]] = {host: [] for host in self.hosts}

    def execute(self, statements: Sequence[Statement]) -> list[Applied]:
        """See `Database.execute`."""
        if not statements:
            return []
        results = self._post("/db/execute?transaction", statements)
        # With RETURNING it counts nothing, and returns a row for each.
        return [Applied(result.rows_affected or len(result.values), result.rows) for result in results]

    def query(self, statement: Statement, *, settled: bool = False) -> list[Row]:
        """See `Database.query`: `settled` asks the whole cluster, otherwise the leader answers for itself."""
        (result,) = self._post(f"/db/query?level={'strong' if settled else 'weak'}", [statement])
        return result.rows

    def close(self) -> None:
        """See `Database.close`."""
        self._closing.set()
        with self._lock:
            for clients in self._idle.values():
                while clients:
                    clients.pop().close()

    def _post(self, path: str, statements: Sequence[Statement]) -> list[_Result]:
        """Return one result for each statement, or raise what rqlite says of one of them."""
        results = self._ask_in_turn(path, _encode(statements))
        for index, result in enumerate(results):  # the one at fault is the last: it ended the transaction
            if result.error is not None:
                raise _rqlite_refusal(result.error, index)
        if len(results) != len(statements):
            raise StoreUnavailable(f"what answers does not answer as rqlite does: {len(results)} results")
        return results

    def _ask_in_turn(self, path: str, body: bytes) -> list[_Result]:
        """Ask the hosts in turn until one answers, or the deadline passes."""
        give_up_at = time.monotonic() + self._deadline_seconds
        pause = _FIRST_PAUSE_SECONDS
        while True:
            first = self._first
            for offset in range(len(self.hosts)):
                number = (first + offset) % len(self.hosts)
                remaining = give_up_at - time.monotonic()
                if self._closing.is_set():
                    raise StoreUnavailable("the store is closed")
                try:
                    results = self._ask(self.hosts[number], path, body, min(_ANSWER_SECONDS, max(remaining, 0.05)))
                except _HostFailed as exc:
                    failure = exc
                else:
                    self._first = number
                    return results
            if time.monotonic() + pause >= give_up_at:
                raise StoreUnavailable(f"rqlite cannot be reached: {failure}") from failure
            self._closing.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _ask(self, host: Host, path: str, body: bytes, timeout_seconds: float) -> list[_Result]:
        client = self._take(host)
        try:
            was_used = client.used
            try:
                status, answer = client.post(path, body, timeout_seconds=timeout_seconds)
            except (ConnectionError, HTTPException):
                if not was_used:
                    raise
                # The host closed an idle connection, or was started again: that says nothing about its health.
                client.close()
                status, answer = client.post(path, body, timeout_seconds=timeout_seconds)
        except (OSError, HTTPException) as exc:
            client.close()
            raise _HostFailed(f"{host}: {exc or type(exc).__name__}") from exc
        except BaseException:
            client.close()
            raise
        self._give_back(host, client)
        return self._parse(host, status, answer)

    def _take(self, host: Host) -> _HttpClient:
        with self._lock:
            if self._idle[host]:
                return self._idle[host].pop()
        return _HttpClient(self._scheme, host, self._user, self._password)

    def _give_back(self, host: Host, client: _HttpClient) -> None:
        with self._lock:
            if not self._closing.is_set():
                self._idle[host].append(client)
                return
        client.close()

    def _parse(self, host: Host, status: int, body: bytes) -> list[_Result]:
        text = body[:200].decode("utf-8", "replace").strip()
        if status in (401, 403):
            raise StoreUnavailable(f"rqlite at {host} refuses this user and password (HTTP {status})")
        if status == 400:
            raise InternalError(f"rqlite at {host} does not understand a request: {text}")
        if status != 200:  # 503 "leader not found" and 500 "leadership lost" end with the election
            raise _HostFailed(f"{host}: HTTP {status} {text}")
        try:
            answer = msgspec.json.decode(body, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise StoreUnavailable(f"{host} does not answer as rqlite does: {text}") from exc
        if answer.error is not None:
            raise _HostFailed(f"{host}: {answer.error}")
        return answer.results


def _encode(statements: Sequence[Statement]) -> bytes:
    try:
        return msgspec.json.encode([(sql, params) for sql, params in statements])
    except (msgspec.MsgspecError, UnicodeError, OverflowError, TypeError):
        for index, statement in enumerate(statements):
            try:
                msgspec.json.encode(statement.params)
            except (msgspec.MsgspecError, UnicodeError, OverflowError, TypeError) as exc:
                raise StatementError(index, str(exc)) from exc
        raise


# rqlite passes on SQLite's words, not its codes.
_RQLITE_FAILURES = ("disk is full", "disk I/O error", "readonly database", "is locked", "malformed", "out of memory")


def _rqlite_refusal(message: str, index: int | None) -> TetherError:
    if any(words in message for words in _RQLITE_FAILURES):
        return StoreUnavailable(f"rqlite cannot write: {message}")
    return _refusal(message, index)


# --- URLs ------------------------------------------------------------------------------------------------------------

_FORMS = "a store is sqlite:///path or rqlite://[user:password@]host:port[,host:port...] (rqlites:// for HTTPS)"

# As `connect` reads it: the login ends at the last @, and its password begins at its first colon.
_LOGIN = re.compile(r"\A(?P<before>(?>\w*://|)[^:]*):.*@", re.DOTALL)


def connect(url: str, *, create: bool = True, deadline_seconds: float = 10.0) -> SqliteDatabase | RqliteDatabase:
    """Return the database that `url` names; raise `UsageError` for a URL that names none."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite":
        if not rest.startswith("/") or rest.endswith("/"):
            raise UsageError(f"{without_password(url)!r} has no absolute path: {_FORMS}")
        # Three slashes or four: the path is absolute, so that no store depends on where a command was typed.
        path = Path("/" + unquote(rest).lstrip("/"))
        return SqliteDatabase(path, create=create, busy_seconds=min(5.0, deadline_seconds))
    if separator and scheme in ("rqlite", "rqlites"):
        login, _, names = rest.rstrip("/").rpartition("@")
        user, _, password = login.partition(":")
        return RqliteDatabase(
            [_parse_host(name, url) for name in names.split(",")],
            user=unquote(user) if login else None,
            password=unquote(password) if login else None,
            secure=scheme == "rqlites",
            deadline_seconds=deadline_seconds,
        )
    raise UsageError(f"{without_password(url)!r} is not a store: {_FORMS}")


def _parse_host(text: str, url: str) -> Host:
    name, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        name, port = text, "4001"
    if not name or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in name:
        raise UsageError(f"{without_password(url)!r} has no host and port where {text!r} stands: {_FORMS}")
    return Host(name.strip("[]"), int(port))


def without_password(url: str) -> str:
    """Return a store's URL as it may be shown, or what was meant as one: a mistyped one has a password in it as well."""
    if url.startswith("sqlite:///"):
        return url
    return _LOGIN.sub(r"\g<before>:***@", url)
