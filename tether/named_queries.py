"""Named queries: the SQL of the store is in `queries/*.sql`, each statement under a name, with the parameters it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tether.database import Applied, Value
from tether.errors import SchemaError, TetherError

_QUERY_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT_LINE = re.compile(r"^\s*--.*$", re.MULTILINE)
_PARAMETER = re.compile(r":([a-z]\w*)")


class Query(NamedTuple):
    """A named query and its parameters."""

    name: str
    params: Mapping[str, Value]


Write = tuple[Query, ...]
"""Statements of one caller that belong together: all of them are applied, or none."""

WriteResult = tuple[Applied, ...] | TetherError
"""What became of each statement of a `Write`, or why none of them was applied."""


class NamedQuery(NamedTuple):
    """A statement from a `.sql` file and the parameters that it names."""

    sql: str
    names: tuple[str, ...]


def load_queries(folder: Path | None = None) -> dict[str, NamedQuery]:
    """Return the named queries of the package's `.sql` files, without their comments; raise `SchemaError` for a double.

    A query begins with a line `-- name: some_name` and has one statement.
    """
    queries: dict[str, NamedQuery] = {}
    for path in sorted((folder or Path(__file__).parent / "queries").glob("*.sql")):
        _, *pieces = _QUERY_NAME.split(path.read_text("utf-8"))
        for name, body in zip(pieces[::2], pieces[1::2], strict=True):
            if name in queries:
                raise SchemaError(f"there are two queries named {name}")
            # Every statement of a batch carries its text over the wire: no indentation, no final semicolon.
            lines = [line.strip() for line in _COMMENT_LINE.sub("", body).splitlines()]
            sql = " ".join(line for line in lines if line).rstrip(";")
            queries[name] = NamedQuery(sql, tuple(dict.fromkeys(_PARAMETER.findall(sql))))
    return queries


def counts(applied: tuple[Applied, ...]) -> tuple[int, ...]:
    """Return the rows that each statement of a write affected."""
    return tuple(each.num_rows for each in applied)
