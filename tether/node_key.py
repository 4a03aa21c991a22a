"""A node's key: its peer id, its signatures, its file, and one for each process of a data directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import Self

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tether.data_dir import MACHINE_KEY, NETWORK_FILE, NETWORK_KEY, prepare_data_dir, write_new
from tether.errors import DataDirError, KeyFileError, ProtocolViolation, UsageError
from tether.messages import Signed

SEED_BYTES = 32
MAX_SLOTS = 64

# What an identity multihash of a protobuf-encoded Ed25519 public key begins with: 0x00 (identity), 36 bytes, then field 1
# (key type) = 1 (Ed25519) and field 2 = 32 bytes. See the libp2p specification of peer ids.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")

# A signature is for one purpose, so that a signed state can never pass for a credential.
_STATEMENT = b"tether-statement-1:"


def peer_id_of(public_key: bytes) -> str:
    """Return the peer id (`12D3Koo…`) of a 32-byte Ed25519 public key."""
    return str(base58.b58encode(_PEER_ID_PREFIX + public_key), "ascii")


def public_key_of(peer_id: str) -> bytes:
    """Return the public key in a peer id; raise `UsageError` for what is not the id of an Ed25519 key."""
    try:
        raw: bytes = base58.b58decode(peer_id)
    except ValueError as exc:
        raise UsageError(f"{peer_id!r} is not a peer id; one looks like 12D3KooW…") from exc
    if not raw.startswith(_PEER_ID_PREFIX) or len(raw) != len(_PEER_ID_PREFIX) + 32:
        raise UsageError(f"{peer_id!r} is not a peer id; one looks like 12D3KooW…")
    return raw[len(_PEER_ID_PREFIX) :]


class NodeKey:
    """An Ed25519 key: its 32-byte `seed`, its `public_key`, and the `peer_id` that libp2p calls its holder by."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._private.public_key().public_bytes_raw()
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> NodeKey:
        """Return a new key."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def load(cls, path: Path) -> NodeKey:
        """Return the key in the file at `path`.

        Raises `FileNotFoundError` where there is none, and `KeyFileError` for one that cannot be read, that others can
        read, or that holds no key.
        """
        try:
            mode = path.stat().st_mode
            seed = path.read_bytes()
        except FileNotFoundError:
            raise
        except IsADirectoryError as exc:
            raise KeyFileError(
                f"{path} is a directory, not a key file; move it away, and restore the key file from a backup if there was one"
            ) from exc
        except OSError as exc:
            raise KeyFileError(
                f"cannot read the key file {path}: {exc.strerror}; run as its owner, or make it readable for this user"
            ) from exc
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFileError(f"others can read the key file {path}; run `chmod 600 {path}`")
        if len(seed) != SEED_BYTES:
            raise KeyFileError(
                f"the key file {path} is broken: {len(seed)} bytes instead of {SEED_BYTES}; {_remedy(path)}"
            )
        return cls(seed)

    @classmethod
    def load_or_create(cls, path: Path) -> NodeKey:
        """Return the key at `path`, made now where there is none; of two processes at once both get the same.

        Raises `KeyFileError` as `load` does, and `DataDirError` where it cannot be written.
        """
        with contextlib.suppress(FileNotFoundError):
            return cls.load(path)
        write_new(path, secrets.token_bytes(SEED_BYTES))
        return cls.load(path)

    def sign(self, payload: bytes, *, purpose: bytes = _STATEMENT) -> Signed:
        """Return `payload` with this key's signature, which holds for this purpose alone."""
        return Signed(signer=self.public_key, payload=payload, signature=self._private.sign(purpose + payload))


def _remedy(path: Path) -> str:
    """Return what to do about a key file that is no good; what its loss costs depends on whose key it was."""
    if path.name == NETWORK_KEY:
        return "restore it from a backup: without it this network is lost, and every machine has to join a new one"
    if path.name == MACHINE_KEY:
        return (
            f"restore it from a backup, or delete it and {path.with_name(NETWORK_FILE)} and join again with an invite"
        )
    return "restore it from a backup, or delete it to get a new key (and with it a new peer id)"


def sign(key: NodeKey, payload: bytes) -> Signed:
    """Return `payload` with the signature of `key`."""
    return key.sign(payload)


def verify(statement: Signed) -> str:
    """Return the peer id that signed `statement`; raise `ProtocolViolation` where the signature does not hold."""
    if not holds(_STATEMENT, statement):
        raise ProtocolViolation("the signature does not hold")
    return peer_id_of(statement.signer)


def holds(purpose: bytes, statement: Signed) -> bool:
    """Whether the signature of `statement` is its signer's, for this purpose."""
    try:
        Ed25519PublicKey.from_public_bytes(statement.signer).verify(statement.signature, purpose + statement.payload)
    except (InvalidSignature, ValueError):
        return False
    return True


class ClaimedKey:
    """A key slot that this process holds until `release`, or until it ends in whatever way."""

    def __init__(self, key: NodeKey, slot: str, fd: int) -> None:
        self.key = key
        self.slot = slot
        self._fd: int | None = fd

    def release(self) -> None:
        """Give the slot back; may be repeated."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claim_slot(data_dir: Path, name: str) -> ClaimedKey:
    """Claim `keys/<name>.key`, or `keys/<name>-2.key` and so on where other processes hold those before it.

    Two processes of one data directory so never share a peer id, and the first one of a kind has the same after each
    restart. Raises `DataDirError`, or `KeyFileError` for a slot whose file is no key.
    """
    prepare_data_dir(data_dir)
    for number in range(1, MAX_SLOTS + 1):
        slot = name if number == 1 else f"{name}-{number}"
        path = data_dir / "keys" / f"{slot}.key"
        key = NodeKey.load_or_create(path)
        # The lock is the kernel's and ends with the process; the descriptor is not inherited by children.
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return ClaimedKey(key, slot, fd)
    raise DataDirError(f"{MAX_SLOTS} processes already run as {name} from {data_dir}; use another one with --data-dir")
