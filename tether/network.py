"""The network that a machine belongs to: founded, joined or opened, what it may issue there, and for how long.

Nothing here talks to the network, and a network's key never leaves its directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tether.credentials import ALL_ROLES, MAX_CHAIN, issue, listed, verify_chain
from tether.data_dir import (
    MACHINE_KEY,
    NETWORK_FILE,
    NETWORK_KEY,
    data_dir_error,
    locked,
    prepare_data_dir,
    write_over,
)
from tether.errors import DataDirError, KeyFileError, NotAMember
from tether.messages import Signed
from tether.node_key import NodeKey
from tether.records import Role

MEMBERSHIP_SECONDS = 90 * 86_400.0
"""How long a renewed machine, and a process of the founder's machine, is a member."""
RENEW_WITHIN_SECONDS = 30 * 86_400.0


class Issuer(msgspec.Struct, frozen=True):
    """A key that may sign credentials, and the chain that says so (empty for the network's own key)."""

    key: NodeKey
    chain: tuple[Signed, ...]


class NetworkFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`network.json` of a machine that joined."""

    network: bytes
    addresses: tuple[str, ...]
    chain: tuple[Signed, ...]


class Network:
    """The network that this machine belongs to, and what it may issue there."""

    def __init__(
        self,
        public_key: bytes,
        issuer: Issuer,
        *,
        addresses: tuple[str, ...] = (),
        data_dir: Path | None = None,
    ) -> None:
        """`data_dir` is where a joined network is kept up to date; None for one that lives in memory alone."""
        self.public_key = public_key
        self.issuer = issuer
        self.addresses = addresses
        self.data_dir = data_dir

    @classmethod
    def found(cls) -> Network:
        """Return a new network that lives in memory alone."""
        key = NodeKey.generate()
        return cls(key.public_key, Issuer(key, ()))

    @property
    def is_founder(self) -> bool:
        """Whether this machine holds the network's key."""
        return not self.issuer.chain

    def may_issue(self, now: float) -> tuple[frozenset[Role], float]:
        """Return the roles that this machine may issue, and until when; raise `NotAMember` where it no longer may."""
        if self.is_founder:
            return ALL_ROLES, float("inf")
        try:
            membership = verify_chain(self.issuer.chain, self.public_key, self.issuer.key.public_key, now)
        except NotAMember as exc:
            raise NotAMember(f"this machine is not a member of its network any more: {exc.message}") from exc
        return membership.may_issue, membership.expires_at

    def issue_process_credential(self, key: NodeKey, roles: Iterable[Role], now: float) -> tuple[Signed, ...]:
        """Return a chain that lets the process with this key act in `roles`.

        Raises `NotAMember` where this machine may not issue one of them, or nothing any more.
        """
        wanted = frozenset(roles)
        allowed, until = self.may_issue(now)
        if wanted - allowed:
            raise NotAMember(
                f"this machine joined as {listed(allowed)}; ask for an invite with "
                + " ".join(f"--role {role}" for role in sorted(allowed | wanted))
            )
        expires_at = min(until, now + MEMBERSHIP_SECONDS)
        own = issue(self.issuer.key, self.public_key, key.public_key, roles=wanted, now=now, expires_at=expires_at)
        return (*self.issuer.chain, own)

    def renew(self, chain: tuple[Signed, ...], now: float) -> tuple[Signed, ...]:
        """Return a new chain for the machine behind a process's verified `chain`, or () where none is due or possible.

        It is due when `chain` ends within 30 days; it is possible where this machine may issue the same roles, for
        longer, in a chain that still leaves room for the process's own credential. What may act in no role is an invite
        and no machine: it ends when its maker said.
        """
        if len(chain) < 2 or len(self.issuer.chain) + 2 > MAX_CHAIN:
            return ()
        try:
            shown = verify_chain(chain[:-1], self.public_key, chain[-1].signer, now)
            allowed, until = self.may_issue(now)
        except NotAMember:
            return ()
        expires_at = min(until, now + MEMBERSHIP_SECONDS)
        due = shown.expires_at - now <= RENEW_WITHIN_SECONDS
        if not shown.roles or not due or expires_at <= shown.expires_at:
            return ()
        if not (shown.roles | shown.may_issue) <= allowed:
            return ()
        renewed = issue(
            self.issuer.key,
            self.public_key,
            chain[-1].signer,
            roles=shown.roles,
            may_issue=shown.may_issue,
            now=now,
            expires_at=expires_at,
        )
        return (*self.issuer.chain, renewed)

    def store_renewed(self, chain: tuple[Signed, ...], now: float) -> bool:
        """Keep a renewed chain for this machine, and say whether it was better than what is there.

        Raises `NotAMember` for one that proves nothing, `DataDirError` where it cannot be written.
        """
        if self.is_founder:
            return False
        offered = verify_chain(chain, self.public_key, self.issuer.key.public_key, now)
        with contextlib.ExitStack() as stack:
            if self.data_dir is not None:
                stack.enter_context(locked(self.data_dir))
                self._reload()
            try:
                held = verify_chain(self.issuer.chain, self.public_key, self.issuer.key.public_key, now)
            except NotAMember:
                held = None
            if held is not None and (offered.expires_at <= held.expires_at or not held.may_issue <= offered.may_issue):
                return False
            self.issuer = Issuer(self.issuer.key, chain)
            self._save()
        return True

    def remember_addresses(self, addresses: Iterable[str]) -> None:
        """Keep the newest addresses of orchestrators for the next start; the founder's machine has its address book."""
        if self.is_founder:
            return
        wanted = tuple(dict.fromkeys((*addresses, *self.addresses)))[:32]
        if set(wanted) == set(self.addresses):
            return
        with contextlib.ExitStack() as stack:
            if self.data_dir is not None:
                stack.enter_context(locked(self.data_dir))
                self._reload()
            self.addresses = tuple(dict.fromkeys((*wanted, *self.addresses)))[:32]
            self._save()

    def reload(self) -> None:
        """Take over what another process of this machine stored meanwhile."""
        if self.data_dir is not None and not self.is_founder:
            with locked(self.data_dir):
                self._reload()

    def _reload(self) -> None:
        if self.data_dir is not None and (file := read_network_file(self.data_dir)) is not None:
            self.addresses = file.addresses
            self.issuer = Issuer(self.issuer.key, file.chain)

    def _save(self) -> None:
        if self.data_dir is not None:
            write_network_file(self.data_dir, NetworkFile(self.public_key, self.addresses, self.issuer.chain))


def read_network_file(data_dir: Path) -> NetworkFile | None:
    """Return what a machine that joined keeps, None for one that has not; raise `DataDirError` for what cannot be read."""
    path = data_dir / NETWORK_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=NetworkFile)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise data_dir_error(path, exc) from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise DataDirError(f"{path} is broken ({exc}); delete it and join again with a new invite") from exc


def write_network_file(data_dir: Path, file: NetworkFile) -> None:
    """Keep what a machine that joined has to know; raise `DataDirError` where it cannot be written."""
    write_over(data_dir / NETWORK_FILE, msgspec.json.encode(file))


def open_network(data_dir: Path) -> Network:
    """Return the network of this data directory: the one it joined, the one it founded, or one that it founds now.

    Safe when several processes start at the same moment. Raises `DataDirError` or `KeyFileError`.
    """
    prepare_data_dir(data_dir)
    with locked(data_dir):
        file = read_network_file(data_dir)
        if file is None:
            key = NodeKey.load_or_create(data_dir / NETWORK_KEY)
            return Network(key.public_key, Issuer(key, ()), data_dir=data_dir)
        try:
            machine = NodeKey.load(data_dir / MACHINE_KEY)
        except FileNotFoundError as exc:
            raise KeyFileError(
                f"{data_dir / 'machine.key'} is missing; delete {data_dir / 'network.json'} and join again with an invite"
            ) from exc
        return Network(file.network, Issuer(machine, file.chain), addresses=file.addresses, data_dir=data_dir)
