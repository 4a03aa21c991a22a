"""Who this node is and who may do what: keys, credentials, invites, and where this machine's orchestrators listen.

A network is an Ed25519 key. Whoever holds it signs credentials: statements that a public key may act in some roles until
some time, and may pass some roles on. A peer shows a chain of them, from one that the network's key signed down to its
own; every link of the chain can only narrow what the one above it allowed. Nothing here talks to the network, and a
network's key never leaves its directory.

A data directory holds

    network.key         the network's key, where this machine founded it
    network.json        where it joined one: the network's public key, orchestrators' addresses, this machine's chain
    machine.key         this machine's key, where it joined
    keys/<slot>.key     the key of one process; its public half is the process's peer id
    run/<peer id>.json  where an orchestrator of this directory listens at present

Key files are 32 bytes (the seed), readable by their owner alone. Times are Unix seconds of this machine's wall clock, and
five minutes of difference between two clocks are forgiven.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, get_args

import base58
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tether.errors import DataDirError, InviteError, KeyFileError, NotAMember, ProtocolViolation, UsageError
from tether.messages import Signed
from tether.records import Role

SEED_BYTES = 32
MAX_CHAIN = 4
CLOCK_LEEWAY_SECONDS = 300.0
MEMBERSHIP_SECONDS = 90 * 86_400.0
"""How long a renewed machine, and a process of the founder's machine, is a member."""
RENEW_WITHIN_SECONDS = 30 * 86_400.0
NETWORK_KEY = "network.key"
NETWORK_FILE = "network.json"
MACHINE_KEY = "machine.key"
INVITE_PREFIX = "tether-invite-1:"
MAX_SLOTS = 64

ALL_ROLES: frozenset[Role] = frozenset(get_args(Role))

# What an identity multihash of a protobuf-encoded Ed25519 public key begins with: 0x00 (identity), 36 bytes, then field 1
# (key type) = 1 (Ed25519) and field 2 = 32 bytes. See the libp2p specification of peer ids.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")

_ADDRESS = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/\s]+)/tcp/(?P<port>[0-9]{1,5})/p2p/(?P<peer_id>[0-9A-Za-z]+)"
)

# A signature is for one purpose, so that a signed state can never pass for a credential.
_CREDENTIAL = b"tether-credential-1:"
_STATEMENT = b"tether-statement-1:"


# --- keys ------------------------------------------------------------------------------------------------------------


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
        _write_new(path, secrets.token_bytes(SEED_BYTES))
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
    if not _holds(_STATEMENT, statement):
        raise ProtocolViolation("the signature does not hold")
    return peer_id_of(statement.signer)


def _holds(purpose: bytes, statement: Signed) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(statement.signer).verify(statement.signature, purpose + statement.payload)
    except (InvalidSignature, ValueError):
        return False
    return True


# --- files -----------------------------------------------------------------------------------------------------------


def prepare_data_dir(data_dir: Path) -> None:
    """Make the data directory (mode 0700) if there is none; raise `DataDirError` where it cannot be used."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise _data_dir_error(data_dir, exc) from exc
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        raise DataDirError(f"cannot write to the data directory {data_dir}; use another one with --data-dir")


def _data_dir_error(path: Path, exc: OSError) -> DataDirError:
    return DataDirError(f"cannot use {path}: {exc.strerror}; use another data directory with --data-dir")


def _write_temporary(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _write_new(path: Path, content: bytes) -> None:
    # A link fails where the name is taken, and what has the name is whole: nobody can read half a key, and of two
    # processes that make the same key at once one wins and both read the winner's.
    try:
        temporary = _write_temporary(path, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        finally:
            temporary.unlink()
    except OSError as exc:
        raise _data_dir_error(path, exc) from exc


def _write_over(path: Path, content: bytes) -> None:
    try:
        _write_temporary(path, content).replace(path)
    except OSError as exc:
        raise _data_dir_error(path, exc) from exc


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    path = data_dir / ".lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise _data_dir_error(path, exc) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- one key for each process ----------------------------------------------------------------------------------------


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


# --- credentials -----------------------------------------------------------------------------------------------------


class Credential(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a credential states: in this network, this public key may act in `roles` and pass on `may_issue`."""

    network: bytes
    subject: bytes
    roles: tuple[Role, ...]
    may_issue: tuple[Role, ...]
    not_before: float
    expires_at: float


class Membership(msgspec.Struct, frozen=True):
    """What a chain of credentials proves of a peer."""

    peer_id: str
    roles: frozenset[Role]
    may_issue: frozenset[Role]
    expires_at: float
    """The earliest end in the chain."""
    machine: bytes
    """The public key that signed the peer's own credential: its machine's, or the network's on the founder's machine."""


_credential_decoder = msgspec.json.Decoder(Credential)
_credential_encoder = msgspec.json.Encoder()


def _issue(
    issuer: NodeKey,
    network: bytes,
    subject: bytes,
    *,
    roles: Iterable[Role],
    may_issue: Iterable[Role] = (),
    now: float,
    expires_at: float,
) -> Signed:
    credential = Credential(network, subject, tuple(sorted(roles)), tuple(sorted(may_issue)), now, expires_at)
    return issuer.sign(_credential_encoder.encode(credential), purpose=_CREDENTIAL)


def verify_chain(chain: tuple[Signed, ...], network: bytes, subject: bytes | str, now: float) -> Membership:
    """Return what `chain` proves of `subject` (a public key or a peer id) in the network of that public key.

    Raises `NotAMember`, whose message says precisely what is wrong.
    """
    public_key = public_key_of(subject) if isinstance(subject, str) else subject
    if not chain:
        raise NotAMember("the peer shows no credential")
    if len(chain) > MAX_CHAIN:
        raise NotAMember(f"the chain of credentials is {len(chain)} long; {MAX_CHAIN} is the most")
    signer, allowed, expires_at = network, ALL_ROLES, float("inf")
    roles: frozenset[Role] = frozenset()
    for position, statement in enumerate(chain, start=1):
        if statement.signer != signer:
            wrong = "the key of another network" if position == 1 else "somebody else than the one before it names"
            raise NotAMember(f"credential {position} is signed by {wrong}")
        credential = _read_credential(statement, position)
        _check_credential(credential, position, network, allowed, now)
        signer, roles, allowed = credential.subject, frozenset(credential.roles), frozenset(credential.may_issue)
        expires_at = min(expires_at, credential.expires_at)
    if signer != public_key:
        raise NotAMember("the credential was issued to another peer")
    return Membership(peer_id_of(public_key), roles, allowed, expires_at, machine=chain[-1].signer)


def _read_credential(statement: Signed, position: int) -> Credential:
    if not _holds(_CREDENTIAL, statement):
        raise NotAMember(f"the signature of credential {position} does not hold")
    try:
        return _credential_decoder.decode(statement.payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise NotAMember(f"credential {position} is malformed: {exc}") from exc


def _check_credential(
    credential: Credential, position: int, network: bytes, allowed: frozenset[Role], now: float
) -> None:
    if credential.network != network:
        raise NotAMember(f"credential {position} is for another network")
    if beyond := frozenset((*credential.roles, *credential.may_issue)) - allowed:
        raise NotAMember(f"credential {position} grants {_listed(beyond)}, which its issuer may not issue")
    if now < credential.not_before - CLOCK_LEEWAY_SECONDS:
        raise NotAMember(f"credential {position} is not valid yet; are both machines' clocks right?")
    if now > credential.expires_at + CLOCK_LEEWAY_SECONDS:
        raise NotAMember(f"credential {position} expired {_ago(now - credential.expires_at)} ago; ask for an invite")


def _listed(roles: Iterable[Role]) -> str:
    return ", ".join(sorted(roles)) or "nothing"


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86_400.0), ("hour", 3_600.0), ("minute", 60.0)):
        if seconds >= size:
            number = int(seconds / size)
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return f"{int(seconds)} seconds"


# --- the network of a data directory ---------------------------------------------------------------------------------


class Issuer(msgspec.Struct, frozen=True):
    """A key that may sign credentials, and the chain that says so (empty for the network's own key)."""

    key: NodeKey
    chain: tuple[Signed, ...]


class _NetworkFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
                f"this machine joined as {_listed(allowed)}; ask for an invite with "
                + " ".join(f"--role {role}" for role in sorted(allowed | wanted))
            )
        expires_at = min(until, now + MEMBERSHIP_SECONDS)
        own = _issue(self.issuer.key, self.public_key, key.public_key, roles=wanted, now=now, expires_at=expires_at)
        return (*self.issuer.chain, own)

    def renew(self, chain: tuple[Signed, ...], now: float) -> tuple[Signed, ...]:
        """Return a new chain for the machine behind a process's verified `chain`, or () where none is due or possible.

        It is due when `chain` ends within 30 days; it is possible where this machine may issue the same roles, for
        longer, in a chain that still leaves room for the process's own credential.
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
        if not due or expires_at <= shown.expires_at or not (shown.roles | shown.may_issue) <= allowed:
            return ()
        renewed = _issue(
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
                stack.enter_context(_locked(self.data_dir))
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
                stack.enter_context(_locked(self.data_dir))
                self._reload()
            self.addresses = tuple(dict.fromkeys((*wanted, *self.addresses)))[:32]
            self._save()

    def reload(self) -> None:
        """Take over what another process of this machine stored meanwhile."""
        if self.data_dir is not None and not self.is_founder:
            with _locked(self.data_dir):
                self._reload()

    def _reload(self) -> None:
        if self.data_dir is not None and (file := _read_network_file(self.data_dir)) is not None:
            self.addresses = file.addresses
            self.issuer = Issuer(self.issuer.key, file.chain)

    def _save(self) -> None:
        if self.data_dir is not None:
            _write_network_file(self.data_dir, _NetworkFile(self.public_key, self.addresses, self.issuer.chain))


def _read_network_file(data_dir: Path) -> _NetworkFile | None:
    path = data_dir / NETWORK_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=_NetworkFile)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise _data_dir_error(path, exc) from exc
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise DataDirError(f"{path} is broken ({exc}); delete it and join again with a new invite") from exc


def _write_network_file(data_dir: Path, file: _NetworkFile) -> None:
    _write_over(data_dir / NETWORK_FILE, msgspec.json.encode(file))


def open_network(data_dir: Path) -> Network:
    """Return the network of this data directory: the one it joined, the one it founded, or one that it founds now.

    Safe when several processes start at the same moment. Raises `DataDirError` or `KeyFileError`.
    """
    prepare_data_dir(data_dir)
    with _locked(data_dir):
        file = _read_network_file(data_dir)
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


# --- invites ---------------------------------------------------------------------------------------------------------


class _Invite(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What an invite says; `seed` is a key that may sign for one new machine until the invite ends."""

    network: bytes
    addresses: tuple[str, ...]
    seed: bytes
    chain: tuple[Signed, ...]


def create_invite(
    network: Network, roles: Iterable[Role], ttl_seconds: float, addresses: Iterable[str], *, now: float | None = None
) -> str:
    """Return an invite: one printable word that lets a machine join as `roles` within `ttl_seconds`.

    Whoever has it can join, so it is to be handed over as a password is. `addresses` are where orchestrators can be
    dialled. Raises `InviteError` where this machine cannot invite, `UsageError` for no roles, no time, or an address that
    cannot be dialled.
    """
    now = time.time() if now is None else now
    wanted, addresses = frozenset(roles), tuple(addresses)
    if not wanted or ttl_seconds <= 0:
        raise UsageError("an invite needs at least one role and some time to live")
    for address in addresses:
        _check_address(address)
    try:
        allowed, until = network.may_issue(now)
    except NotAMember as exc:
        raise InviteError(exc.message) from exc
    if missing := wanted - allowed:
        raise InviteError(
            f"this machine may invite as {_listed(allowed)}, not as {_listed(missing)}; create the invite on the machine "
            "that founded the network"
        )
    if len(network.issuer.chain) + 3 > MAX_CHAIN:
        raise InviteError(
            "this machine's own credential comes from an invite still; start a role here, so that an orchestrator renews "
            "it, or create the invite on the machine that founded the network"
        )
    key = NodeKey.generate()
    expires_at = min(until, now + ttl_seconds)
    credential = _issue(
        network.issuer.key,
        network.public_key,
        key.public_key,
        roles=(),
        may_issue=wanted,
        now=now,
        expires_at=expires_at,
    )
    body = msgspec.msgpack.encode(_Invite(network.public_key, addresses, key.seed, (*network.issuer.chain, credential)))
    return INVITE_PREFIX + str(base58.b58encode(_checksum(body) + body), "ascii")


def invite_peer_id(token: str) -> str:
    """Return the peer id of an invite's key: no secret, and in the credentials of whoever joins with it.

    Raises `InviteError` for what is no invite.
    """
    return NodeKey(_parse_invite(token).seed).peer_id


def _check_address(address: str) -> None:
    """Raise `UsageError` unless the address looks as one that can be dialled; only transport.py knows all the forms."""
    matched = _ADDRESS.fullmatch(address)
    try:
        if matched is None:
            raise ValueError("it is of another form")
        if matched["kind"] in {"ip4", "ip6"} and ipaddress.ip_address(matched["host"]).version != int(
            matched["kind"][2]
        ):
            raise ValueError(f"{matched['host']} is no {matched['kind']} address")
        if not 0 < int(matched["port"]) < 65_536:
            raise ValueError(f"there is no port {matched['port']}")
        public_key_of(matched["peer_id"])
    except (ValueError, UsageError) as exc:
        raise UsageError(
            f"{address!r} is not an address that can be dialled, /ip4/<address>/tcp/<port>/p2p/<peer id>: {exc}"
        ) from exc


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"tether-invite:" + body).digest()[:4]


def _parse_invite(token: str) -> _Invite:
    word = "".join(token.split())
    if not word.startswith(INVITE_PREFIX):
        raise InviteError(f"this is not an invite; one begins with {INVITE_PREFIX}")
    damaged = InviteError("the invite is damaged, perhaps cut when it was copied; copy all of it")
    try:
        raw: bytes = base58.b58decode(word.removeprefix(INVITE_PREFIX))
    except ValueError as exc:
        raise damaged from exc
    if len(raw) < 4 or raw[:4] != _checksum(raw[4:]):
        raise damaged
    try:
        invite = msgspec.msgpack.decode(raw[4:], type=_Invite)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise InviteError(
            "this version of Tether cannot read the invite; use the same version on both machines"
        ) from exc
    if len(invite.seed) != SEED_BYTES:
        raise damaged
    return invite


def join(data_dir: Path, token: str, now: float) -> Network:
    """Make this data directory a member of the invite's network, and return that network.

    The machine makes a key of its own and signs it in with the invite's; its membership ends with the invite, unless an
    orchestrator renews it at its first link. A machine that is a member already may join the same network again, for
    other roles or after its membership ended.

    Raises `InviteError` for an invite that is malformed, damaged or expired, or where the directory belongs to another
    network, and `DataDirError` or `KeyFileError` where it cannot be used.
    """
    invite = _parse_invite(token)
    signer = NodeKey(invite.seed)
    try:
        granted = verify_chain(invite.chain, invite.network, signer.public_key, now)
    except NotAMember as exc:
        raise InviteError(f"the invite cannot be used: {exc.message}") from exc
    prepare_data_dir(data_dir)
    with _locked(data_dir):
        file = _read_network_file(data_dir)
        founded = (data_dir / NETWORK_KEY).exists()
        if founded and NodeKey.load(data_dir / NETWORK_KEY).public_key == invite.network:
            raise InviteError(f"{data_dir} founded this network; there is nothing to join")
        if founded or (file is not None and file.network != invite.network):
            raise InviteError(
                f"{data_dir} already belongs to another network; use another data directory with --data-dir, or delete "
                "this one if nothing in it is needed"
            )
        machine = NodeKey.load_or_create(data_dir / MACHINE_KEY)
        credential = _issue(
            signer,
            invite.network,
            machine.public_key,
            roles=granted.may_issue,
            may_issue=granted.may_issue,
            now=now,
            expires_at=granted.expires_at,
        )
        chain = (*invite.chain, credential)
        _write_network_file(data_dir, _NetworkFile(invite.network, invite.addresses, chain))
    return Network(invite.network, Issuer(machine, chain), addresses=invite.addresses, data_dir=data_dir)


# --- one process -----------------------------------------------------------------------------------------------------


class Identity:
    """What one process shows on its links, and how it judges what others show."""

    def __init__(self, network: Network, key: NodeKey, roles: Iterable[Role]) -> None:
        self.network = network
        self.key = key
        self.roles: frozenset[Role] = frozenset(roles)
        self.peer_id = key.peer_id
        self._chain: tuple[Signed, ...] = ()
        self._issued_at = 0.0
        self._expires_at = 0.0

    def chain(self, now: float) -> tuple[Signed, ...]:
        """Return credentials for this process; raise `NotAMember` where its machine can give it none.

        Ask before a role starts, so that a machine that may not have this role says so at once.
        """
        # Anew every hour, so that a link shows what the machine was renewed to since, by this process or another one.
        if not self._chain or now - self._issued_at > 3_600 or now > self._expires_at - RENEW_WITHIN_SECONDS:
            self.network.reload()
            self._chain = self.network.issue_process_credential(self.key, self.roles, now)
            self._issued_at = now
            self._expires_at = self.verify(self._chain, self.peer_id, now).expires_at
        return self._chain

    def expires_at(self, now: float) -> float:
        """Return when the shown credentials end."""
        self.chain(now)
        return self._expires_at

    def verify(self, chain: tuple[Signed, ...], peer_id: str, now: float) -> Membership:
        """Return what `chain` proves of `peer_id` in this network; raise `NotAMember` with the reason."""
        return verify_chain(chain, self.network.public_key, peer_id, now)

    def renew(self, chain: tuple[Signed, ...], now: float) -> tuple[Signed, ...]:
        """Return a newer chain for the machine of a peer that showed `chain`, or () where none is due or possible.

        Only orchestrators give any.
        """
        return self.network.renew(chain, now) if "orchestrator" in self.roles else ()

    def store_renewed(self, chain: tuple[Signed, ...], now: float) -> bool:
        """Keep a newer chain for this machine that an orchestrator offered, and say whether it was better."""
        stored = self.network.store_renewed(chain, now)
        if stored:
            self._chain = ()
        return stored


# --- where this machine's orchestrators listen -----------------------------------------------------------------------


class _AddressFile(msgspec.Struct, frozen=True):
    addresses: tuple[str, ...]


class AddressBook:
    """Where the orchestrators of one data directory listen at present: `run/<peer id>.json`.

    Each entry is locked by the process that it speaks of, for as long as that lives; the lock is the kernel's, so it ends
    with the process in whatever way. An entry that nobody holds is of a process that was killed: it is dropped.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._dir = data_dir / "run"

    @contextlib.contextmanager
    def listed(self, peer_id: str, addresses: Iterable[str]) -> Iterator[None]:
        """List an orchestrator for as long as the block runs; raise `DataDirError` where that cannot be written."""
        path = self._dir / f"{peer_id}.json"
        with contextlib.ExitStack() as stack:
            try:
                temporary = _write_temporary(path, msgspec.json.encode(_AddressFile(tuple(addresses))))
                fd = os.open(temporary, os.O_RDONLY)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)  # before anybody can see it without
                with _locked(self._data_dir):
                    temporary.replace(path)
            except OSError as exc:
                raise _data_dir_error(path, exc) from exc
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def read(self) -> tuple[str, ...]:
        """Return all addresses, those of the orchestrator that started last first; unreadable files are skipped."""
        found: list[tuple[float, tuple[str, ...]]] = []
        for path in self._dir.glob("[!.]*.json"):
            # A file may vanish or be half of another version's while it is read: it is only a hint where to dial.
            with (
                contextlib.suppress(OSError, DataDirError, msgspec.MsgspecError, UnicodeDecodeError),
                path.open("rb") as file,
            ):
                if _is_held(file.fileno()):
                    entry = msgspec.json.decode(file.read(), type=_AddressFile)
                    found.append((os.fstat(file.fileno()).st_mtime, entry.addresses))
                else:
                    self._drop(path, file.fileno())
        found.sort(key=lambda entry: entry[0], reverse=True)
        return tuple(dict.fromkeys(address for _, addresses in found for address in addresses))

    def _drop(self, path: Path, fd: int) -> None:
        with _locked(self._data_dir):
            # Unless its orchestrator has started again meanwhile: then the name is another file's by now.
            if os.path.samestat(os.fstat(fd), path.stat()):
                path.unlink()


def _is_held(fd: int) -> bool:
    """Whether another process, or another opening of the file in this one, holds a lock on it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
