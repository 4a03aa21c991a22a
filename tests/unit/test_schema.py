"""Migrations: found, split, applied once, and compared with what a store has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tether import schema
from tether.database import SqliteDatabase, Statement
from tether.errors import SchemaError
from tether.schema import Migration

ONE = Migration(1, "one", "CREATE TABLE a (x);")
TWO = Migration(2, "two", "CREATE TABLE b (x); INSERT INTO b VALUES ('; -- no end');")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[SqliteDatabase]:
    database = SqliteDatabase(tmp_path / "store.db")
    yield database
    database.close()


def tables(database: SqliteDatabase) -> list[object]:
    sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name <> 'schema_migrations' ORDER BY name"
    return [row["name"] for row in database.query(Statement(sql, {}))]


def test_the_package_s_own_migrations_are_found_in_order() -> None:
    migrations = schema.load_migrations()
    assert [migration.version for migration in migrations] == list(range(1, len(migrations) + 1))
    assert migrations[0].name == "initial"


def test_migrations_inside_an_installed_package_go_before_a_folder_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tether"
    package.mkdir()
    monkeypatch.setattr(schema, "__file__", str(package / "schema.py"))
    assert schema.migrations_folder() == tmp_path / "migrations"
    (package / "migrations").mkdir()
    assert schema.migrations_folder() == package / "migrations"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0001_a.sql", "0003_c.sql"], "without gaps"),
        (["0001_a.sql", "0001_b.sql"], "without gaps"),
        (["0002_a.sql"], "without gaps"),
        (["1_a.sql"], "not named like a migration"),
        ([], "no migrations"),
    ],
)
def test_a_folder_of_migrations_in_disorder_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1;")
    with pytest.raises(SchemaError, match=message):
        schema.load_migrations(tmp_path)


@pytest.mark.parametrize(
    ("sql", "statements"),
    [
        ("", []),
        ("-- only; a comment\n/* and; another */ ;", []),
        ("SELECT 1; SELECT 2;", ["SELECT 1;", "SELECT 2;"]),
        ("SELECT ';'; SELECT 'it''s;';", ["SELECT ';';", "SELECT 'it''s;';"]),
        ('SELECT ";" AS [a;b], `c;d`;', ['SELECT ";" AS [a;b], `c;d`;']),
        ("SELECT 1 -- one; two\n; SELECT /* ; */ 2;", ["SELECT 1 -- one; two\n;", "SELECT /* ; */ 2;"]),
        ("SELECT 1; -- the end; really", ["SELECT 1;"]),
        (
            "CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE a SET x = 1; DELETE FROM b; END; SELECT 1;",
            [
                "CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE a SET x = 1; DELETE FROM b; END;",
                "SELECT 1;",
            ],
        ),
    ],
)
def test_a_script_is_split_where_sqlite_ends_a_statement(sql: str, statements: list[str]) -> None:
    assert schema.split_statements(sql) == statements


@pytest.mark.parametrize(
    "sql", ["SELECT 1", "SELECT 1; SELECT 'a;", "CREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1;"]
)
def test_a_script_that_breaks_off_is_refused(sql: str) -> None:
    with pytest.raises(SchemaError, match="has no end"):
        schema.split_statements(sql)


def test_an_empty_store_is_behind_and_each_migration_is_applied_once(database: SqliteDatabase) -> None:
    with pytest.raises(SchemaError, match=r"behind.*0001_one, 0002_two.*tether store migrate"):
        schema.check(database, [ONE, TWO])
    assert schema.migrate(database, [ONE, TWO], now=5.0) == (ONE, TWO)
    assert schema.migrate(database, [ONE, TWO], now=6.0) == ()
    schema.check(database, [ONE, TWO])
    assert tables(database) == ["a", "b"]
    assert schema.read_status(database, [ONE, TWO]) == schema.SchemaStatus(applied=(ONE, TWO), pending=())


def test_a_store_that_is_one_behind_gets_only_that_one(database: SqliteDatabase) -> None:
    schema.migrate(database, [ONE], now=5.0)
    status = schema.read_status(database, [ONE, TWO])
    assert (status.applied, status.pending, status.up_to_date) == ((ONE,), (TWO,), False)
    assert schema.migrate(database, [ONE, TWO], now=6.0) == (TWO,)


def test_a_store_that_is_newer_than_the_code_asks_for_an_upgrade(database: SqliteDatabase) -> None:
    schema.migrate(database, [ONE, TWO], now=5.0)
    for call in (
        lambda: schema.check(database, [ONE]),
        lambda: schema.migrate(database, [ONE], now=6.0),
        lambda: schema.read_status(database, [ONE]),
    ):
        with pytest.raises(SchemaError, match=r"newer than this Tether \(its schema is 2, ours 1\): upgrade Tether"):
            call()


def test_a_migration_that_was_edited_afterwards_is_found(database: SqliteDatabase) -> None:
    schema.migrate(database, [ONE], now=5.0)
    with pytest.raises(SchemaError, match="0001_one was edited"):
        schema.check(database, [Migration(1, "one", ONE.sql + " ")])


def test_a_migration_that_fails_changes_nothing_and_says_why(database: SqliteDatabase) -> None:
    broken = Migration(2, "broken", "CREATE TABLE b (x); CREATE TABLE a (x);")
    with pytest.raises(SchemaError, match=r"0002_broken failed.*already exists"):
        schema.migrate(database, [ONE, broken], now=5.0)
    assert tables(database) == ["a"]
    assert schema.migrate(database, [ONE, TWO], now=6.0) == (TWO,)
