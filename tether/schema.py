"""The store's tables: finds `migrations/NNNN_name.sql`, applies each once and in order, keeps the ledger.

A migration runs in one transaction that begins with its row in the ledger `schema_migrations`. When two processes
migrate at the same moment the second one's row is refused, its transaction changes nothing, and it looks again.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tether.database import Database, Row, Statement, StatementError, Value
from tether.errors import SchemaError

_FILE_NAME = re.compile(r"(\d{4})_(\w+)\.sql")
_COMMENT = re.compile(r"--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)

_LEDGER_TABLE = """\
CREATE TABLE IF NOT EXISTS schema_migrations (
    version INTEGER NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    applied_at REAL NOT NULL
) STRICT"""
_LEDGER_INSERT = """\
INSERT INTO schema_migrations (version, name, sha256, applied_at) VALUES (:version, :name, :sha256, :applied_at)"""
_LEDGER_EXISTS = "SELECT 1 AS found FROM sqlite_master WHERE type = 'table' AND name = 'schema_migrations'"
_LEDGER_ROWS = "SELECT version, name, sha256 FROM schema_migrations ORDER BY version"


class Migration(msgspec.Struct, frozen=True):
    """One step of the schema, as its file says it."""

    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        """The hash of the file, by which an edit after the fact is found."""
        return hashlib.sha256(self.sql.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:04d}_{self.name}"


class SchemaStatus(msgspec.Struct, frozen=True):
    """Which migrations a store has, and which it lacks."""

    applied: tuple[Migration, ...]
    pending: tuple[Migration, ...]

    @property
    def up_to_date(self) -> bool:
        """Whether nothing is pending."""
        return not self.pending


def migrations_folder() -> Path:
    """Return where the migrations are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def load_migrations(folder: Path | None = None) -> tuple[Migration, ...]:
    """Return the migrations in `folder`, in order; raise `SchemaError` for a wrong name, a gap or a double."""
    folder = folder or migrations_folder()
    migrations = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise SchemaError(f"{path.name} is not named like a migration, NNNN_name.sql")
        migrations.append(Migration(int(match[1]), match[2], path.read_text("utf-8")))
    if [migration.version for migration in migrations] != list(range(1, len(migrations) + 1)):
        raise SchemaError(f"the migrations in {folder} are not numbered 0001, 0002, ... without gaps")
    if not migrations:
        raise SchemaError(f"there are no migrations in {folder}; this installation of Tether is broken")
    return tuple(migrations)


def split_statements(sql: str) -> list[str]:
    """Return the statements of a script; raise `SchemaError` when the last one has no end.

    SQLite itself says where a statement ends, so a semicolon in a string, a comment or a trigger's body ends none.
    """
    statements = []
    start = 0
    for match in re.finditer(";", sql):
        piece = sql[start : match.end()]
        if sqlite3.complete_statement(piece):
            statements.append(piece.strip())
            start = match.end()
    if _COMMENT.sub("", sql[start:]).strip():
        raise SchemaError(f"a statement has no end: {sql[start:].strip()[:80]!r}")
    return [statement for statement in statements if _COMMENT.sub("", statement).strip(" \t\r\n;")]


def read_status(database: Database, migrations: Sequence[Migration]) -> SchemaStatus:
    """Compare a store with the code's `migrations`.

    Raises `SchemaError` when the store is newer than the code, or has a migration whose file was edited afterwards.
    """
    rows = _read_ledger(database)
    known = {migration.version: migration for migration in migrations}
    for row in rows:
        migration = known.get(int(row["version"] or 0))
        if migration is None:
            raise SchemaError(
                f"the store is newer than this Tether (its schema is {row['version']}, ours {len(migrations)}): "
                "upgrade Tether"
            )
        if row["sha256"] != migration.sha256:
            raise SchemaError(f"migration {migration} was edited after it was applied to this store; restore the file")
    applied = {int(row["version"] or 0) for row in rows}
    return SchemaStatus(
        applied=tuple(migration for migration in migrations if migration.version in applied),
        pending=tuple(migration for migration in migrations if migration.version not in applied),
    )


def check(database: Database, migrations: Sequence[Migration]) -> None:
    """Raise `SchemaError` unless the store's tables are exactly the code's."""
    pending = read_status(database, migrations).pending
    if pending:
        raise SchemaError(
            f"the store is behind this Tether ({', '.join(map(str, pending))} not applied): run `tether store migrate`"
        )


def migrate(database: Database, migrations: Sequence[Migration], *, now: float) -> tuple[Migration, ...]:
    """Apply what is pending and return what this call applied; safe while others do the same.

    Raises `SchemaError` as `read_status` does, and when a migration's SQL is refused.
    """
    applied: list[Migration] = []
    refused: tuple[Migration, StatementError] | None = None
    while True:
        pending = read_status(database, migrations).pending
        if not pending:
            return tuple(applied)
        migration = pending[0]
        if refused is not None and refused[0] is migration:  # nobody else applied it meanwhile: the SQL is at fault
            raise SchemaError(f"migration {migration} failed: {refused[1].message}") from refused[1]
        try:
            database.execute(_transaction(migration, now))
        except StatementError as exc:
            refused = (migration, exc)
        else:
            applied.append(migration)


def _transaction(migration: Migration, now: float) -> list[Statement]:
    row: dict[str, Value] = {
        "version": migration.version,
        "name": migration.name,
        "sha256": migration.sha256,
        "applied_at": now,
    }
    body = [Statement(sql, {}) for sql in split_statements(migration.sql)]
    return [Statement(_LEDGER_TABLE, {}), Statement(_LEDGER_INSERT, row), *body]


def _read_ledger(database: Database) -> list[Row]:
    if not database.query(Statement(_LEDGER_EXISTS, {}), settled=True):
        return []
    return database.query(Statement(_LEDGER_ROWS, {}), settled=True)
