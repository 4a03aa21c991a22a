"""Invites: printable words that let a machine join a network, and joining with one."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import time
from collections.abc import Iterable
from pathlib import Path

import base58
import msgspec

from tether.credentials import MAX_CHAIN, issue, listed, verify_chain
from tether.data_dir import MACHINE_KEY, NETWORK_KEY, locked, prepare_data_dir
from tether.errors import InviteError, NotAMember, UsageError
from tether.messages import Signed
from tether.network import Issuer, Network, NetworkFile, read_network_file, write_network_file
from tether.node_key import SEED_BYTES, NodeKey, public_key_of
from tether.records import Role

INVITE_PREFIX = "tether-invite-1:"

_ADDRESS = re.compile(
    r"/(?P<kind>ip4|ip6|dns|dns4|dns6)/(?P<host>[^/\s]+)/tcp/(?P<port>[0-9]{1,5})/p2p/(?P<peer_id>[0-9A-Za-z]+)"
)


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
            f"this machine may invite as {listed(allowed)}, not as {listed(missing)}; create the invite on the machine "
            "that founded the network"
        )
    if len(network.issuer.chain) + 3 > MAX_CHAIN:
        raise InviteError(
            "this machine's own credential comes from an invite still; start a role here, so that an orchestrator renews "
            "it, or create the invite on the machine that founded the network"
        )
    key = NodeKey.generate()
    expires_at = min(until, now + ttl_seconds)
    credential = issue(
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
    with locked(data_dir):
        file = read_network_file(data_dir)
        founded = (data_dir / NETWORK_KEY).exists()
        if founded and NodeKey.load(data_dir / NETWORK_KEY).public_key == invite.network:
            raise InviteError(f"{data_dir} founded this network; there is nothing to join")
        if founded or (file is not None and file.network != invite.network):
            raise InviteError(
                f"{data_dir} already belongs to another network; use another data directory with --data-dir, or delete "
                "this one if nothing in it is needed"
            )
        machine = NodeKey.load_or_create(data_dir / MACHINE_KEY)
        credential = issue(
            signer,
            invite.network,
            machine.public_key,
            roles=granted.may_issue,
            may_issue=granted.may_issue,
            now=now,
            expires_at=granted.expires_at,
        )
        chain = (*invite.chain, credential)
        write_network_file(data_dir, NetworkFile(invite.network, invite.addresses, chain))
    return Network(invite.network, Issuer(machine, chain), addresses=invite.addresses, data_dir=data_dir)
