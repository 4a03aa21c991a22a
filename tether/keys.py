"""API keys: what they look like, how they are hashed, what each may do. Pure.

A key is 256 random bits, so that no guess and no table of hashes ever meets one, and a fast hash is enough. What travels
from a gateway to an orchestrator is the key's digest; what is stored is a hash of that, keyed by the network's pepper.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Iterable
from typing import Final, get_args

from tether.errors import UsageError
from tether.records import Scope

PREFIX: Final = "sk-"
_ALPHABET: Final = string.ascii_letters + string.digits  # a double click takes all of it
_NUM_CHARS: Final = 43  # 62 ** 43 > 2 ** 256
_SHOWN_CHARS: Final = len(PREFIX) + 6
_KEY = re.compile(rf"{PREFIX}[A-Za-z0-9]{{{_NUM_CHARS}}}")

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
PEPPER_BYTES: Final = 32


def new_key() -> str:
    """Return a new key: `sk-` and 43 letters and digits."""
    return PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_NUM_CHARS))


def new_key_id() -> str:
    """Return a name for a key, which is no secret."""
    return f"key-{secrets.token_hex(6)}"


def new_pepper() -> str:
    """Return a new pepper in hexadecimal."""
    return secrets.token_hex(PEPPER_BYTES)


def is_key(text: str) -> bool:
    """Whether a text has the form of a key."""
    return _KEY.fullmatch(text) is not None


def shown_prefix(key: str) -> str:
    """Return the part of a key by which people tell it from others."""
    return key[:_SHOWN_CHARS]


def digest(key: str) -> str:
    """Return what a gateway sends in a key's place, in hexadecimal."""
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def stored_hash(key_digest: str, pepper: str) -> str:
    """Return what the store keeps of a key, in hexadecimal: its digest under the network's pepper."""
    return hashlib.blake2b(key_digest.encode(), digest_size=32, key=bytes.fromhex(pepper)).hexdigest()


def parse_scopes(names: Iterable[str]) -> frozenset[Scope]:
    """Return scopes by their names; raise `UsageError` for one that does not exist, or for none."""
    names = set(names)
    scopes = frozenset(scope for scope in SCOPES if scope in names)
    if not scopes or len(scopes) != len(names):
        raise UsageError(f"--scope is one of {', '.join(SCOPES)}; repeat it for several")
    return scopes
