"""Who this node is and who may do what: keys, credentials, invites, the address book."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from tether.messages import Signed
from tether.records import Role


class NodeKey:
    """An Ed25519 key."""

    peer_id: str
    public_key: bytes
    seed: bytes

    def sign(self, payload: bytes) -> Signed:
        """Return `payload` with this key's signature."""
        raise NotImplementedError


class ClaimedKey(Protocol):
    """A key slot of the data directory, held until `release` or the end of the process."""

    key: NodeKey
    slot: str

    def release(self) -> None:
        """Give the slot back."""


def claim_slot(data_dir: Path, name: str) -> ClaimedKey:
    """Claim `keys/<name>.key`, or `keys/<name>-2.key` and so on where another process holds it."""
    raise NotImplementedError


class Membership(msgspec.Struct, frozen=True):
    """What a chain of credentials proves."""

    peer_id: str
    roles: frozenset[Role]
    expires_at: float
    machine: bytes
    """The public key that signed the process's own credential."""


class Network:
    """The network that a data directory belongs to."""

    public_key: bytes
    addresses: tuple[str, ...]


def open_network(data_dir: Path) -> Network:
    """Load the network of this data directory, or found one."""
    raise NotImplementedError


class Identity:
    """What one process shows on its links, and how it judges what others show."""

    peer_id: str
    roles: frozenset[Role]

    def __init__(self, network: Network, key: NodeKey, roles: frozenset[Role]) -> None: ...

    def chain(self, now: float) -> tuple[Signed, ...]:
        """Return credentials for this process that are valid now."""
        raise NotImplementedError

    def verify(self, chain: tuple[Signed, ...], peer_id: str, now: float) -> Membership:
        """Return what `chain` proves of `peer_id`; raise `NotAMember` with the reason."""
        raise NotImplementedError


def verify(statement: Signed) -> str:
    """Return the peer id whose signature `statement` carries; raise `ProtocolViolation` where it does not hold."""
    raise NotImplementedError


class AddressBook:
    """Where this data directory's orchestrators listen: `run/<peer id>.json`."""

    def __init__(self, data_dir: Path) -> None: ...

    def write(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        """Tell the other roles of this data directory."""

    def remove(self, peer_id: str) -> None:
        """Take it back."""

    def read(self) -> tuple[str, ...]:
        """Return all addresses."""
        raise NotImplementedError
