from __future__ import annotations

import re

import msgspec
import pytest

from tether import errors
from tether.errors import ErrorInfo, InternalError, OutputClosed, SetupError, TetherError, UsageError, from_info


def classes(root: type[TetherError] = TetherError) -> list[type[TetherError]]:
    return [
        root,
        *(found for sub in root.__subclasses__() if sub.__module__ == errors.__name__ for found in classes(sub)),
    ]


def drawn() -> dict[str, tuple[str, int | None, str | None]]:
    """The tree in the docstring: each class's parent, and the status and code beside it."""
    found: dict[str, tuple[str, int | None, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+)\b(?:\s+(\d{3}) (\w+)|\s+(\w+)( \(.*)?$|\s+\S.*)?", line)
        if match is None or not (match[1] or match[2] == "TetherError"):
            continue
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        status = int(match[3]) if match[3] else None
        found[match[2]] = (path[depth - 1] if depth else "", status, match[4] or match[5])
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    tree = drawn()
    assert list(tree) == [cls.__name__ for cls in classes()]
    for cls in classes():
        parent, status, code = tree[cls.__name__]
        assert cls is TetherError or cls.__base__ is getattr(errors, parent)
        assert status in {None, cls.status}
        assert code in {None, cls.code}, cls


def test_a_code_belongs_to_one_class_or_is_inherited_from_its_parent() -> None:
    owners: dict[str, type[TetherError]] = {}
    for cls in classes():
        owner = owners.setdefault(cls.code, cls)
        assert issubclass(cls, owner), f"{cls.__name__} and {owner.__name__} share {cls.code}"


@pytest.mark.parametrize("cls", classes())
def test_an_error_crosses_a_wire_and_comes_back_as_the_same_kind(cls: type[TetherError]) -> None:
    error = cls("what happened", param="version", retry_after_seconds=1.5)
    info = msgspec.json.decode(msgspec.json.encode(error.to_info()), type=ErrorInfo)
    back = from_info(info)
    assert (back.code, back.status, back.type) == (cls.code, cls.status, cls.type)
    assert back.to_info() == error.to_info()
    assert isinstance(back, cls) or cls is errors.InvalidRequest or cls is TetherError
    assert str(back) == "what happened"


@pytest.mark.parametrize("cls", classes())
def test_an_error_without_a_message_says_its_docstring(cls: type[TetherError]) -> None:
    assert str(cls()) == " ".join((cls.__doc__ or "").split())
    assert cls().retry_after_seconds == cls.default_retry_after_seconds


def test_an_unknown_code_of_a_newer_peer_is_an_internal_error() -> None:
    back = from_info(ErrorInfo("from_the_future", "something new"))
    assert type(back) is InternalError
    assert back.message == "something new"


def test_setup_errors_have_exit_codes() -> None:
    assert {cls.exit_code for cls in classes(SetupError) if cls not in {UsageError, OutputClosed}} == {1}
    assert (UsageError.exit_code, OutputClosed.exit_code) == (2, 141)
