from __future__ import annotations

import re

import pytest

from tether import keys
from tether.errors import UsageError


def test_a_key_is_random_and_has_a_form_that_a_double_click_takes() -> None:
    made = {keys.new_key() for _ in range(50)}
    assert len(made) == 50
    assert all(re.fullmatch(r"sk-[A-Za-z0-9]{43}", key) and keys.is_key(key) for key in made)


@pytest.mark.parametrize(
    "text", ["", "sk-", "sk-" + "a" * 42, "sk-" + "a" * 44, "SK-" + "a" * 43, "sk-" + "é" * 43, "\n"]
)
def test_what_is_no_key_is_told_without_asking_anybody(text: str) -> None:
    assert not keys.is_key(text)
    assert not keys.is_key(keys.new_key() + "\n")


def test_a_hash_depends_on_key_and_pepper_and_says_nothing_of_either() -> None:
    key, pepper = keys.new_key(), keys.new_pepper()
    stored = keys.stored_hash(keys.digest(key), pepper)
    assert stored == keys.stored_hash(keys.digest(key), pepper)
    assert stored != keys.stored_hash(keys.digest(key), keys.new_pepper())
    assert stored != keys.stored_hash(keys.digest(keys.new_key()), pepper)
    assert len({stored, keys.digest(key), key, pepper}) == 4
    assert keys.shown_prefix(key) == key[:9]


def test_scopes_are_named_exactly() -> None:
    assert keys.parse_scopes(["admin", "read-only", "admin"]) == {"admin", "read-only"}
    for wrong in ([], ["king"], ["models", "king"], [""]):
        with pytest.raises(UsageError, match="models, admin, read-only"):
            keys.parse_scopes(wrong)
