"""Credentials: signed statements of who may act in which roles, and what a chain of them proves.

A network is an Ed25519 key. Whoever holds it signs credentials: statements that a public key may act in some roles until
some time, and may pass some roles on. A peer shows a chain of them, from one that the network's key signed down to its
own; every link of the chain can only narrow what the one above it allowed. A machine signs for its processes and for
invites, which act in no role; an invite signs for machines alone, so that whoever joins shows by which one; an orchestrator's
machine signs for machines too, because it renews them. Times are Unix seconds of this machine's wall clock, and five minutes
of difference between two clocks are forgiven.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import get_args

import msgspec

from tether.errors import NotAMember
from tether.messages import Signed
from tether.node_key import NodeKey, holds, peer_id_of, public_key_of
from tether.records import Role

MAX_CHAIN = 4
CLOCK_LEEWAY_SECONDS = 300.0

ALL_ROLES: frozenset[Role] = frozenset(get_args(Role))

_CREDENTIAL = b"tether-credential-1:"


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
    invite: bytes | None = None
    """The public key of the invite by which the machine joined; None where no chain shows it, or no longer."""


_credential_decoder = msgspec.json.Decoder(Credential)
_credential_encoder = msgspec.json.Encoder()


def issue(
    issuer: NodeKey,
    network: bytes,
    subject: bytes,
    *,
    roles: Iterable[Role],
    may_issue: Iterable[Role] = (),
    now: float,
    expires_at: float,
) -> Signed:
    """Return the credential of `subject` (a public key) in `network` (one too), signed by `issuer`."""
    credential = Credential(network, subject, tuple(sorted(roles)), tuple(sorted(may_issue)), now, expires_at)
    return issuer.sign(_credential_encoder.encode(credential), purpose=_CREDENTIAL)


def verify_chain(chain: tuple[Signed, ...], network: bytes, subject: bytes | str, now: float) -> Membership:
    """Return what `chain` proves of `subject` (a public key or a peer id) in the network of that public key.

    Raises `NotAMember`, whose message says precisely what is wrong.
    """
    return _membership(_read_chain(chain, network, subject, now), chain)


def verify_process(chain: tuple[Signed, ...], network: bytes, peer_id: str, now: float) -> Membership:
    """Return what `chain` proves of a process that shows it: the network's key signed for it, or its machine did.

    Raises `NotAMember` as `verify_chain` does, and for a chain in which a key signs for what is not its to let in.
    """
    credentials = _read_chain(chain, network, peer_id, now)
    for position, (issuer, subject) in enumerate(pairwise(credentials), start=2):
        is_machine = bool(subject.roles) and position < len(credentials)
        if not issuer.roles and not is_machine:
            raise NotAMember(f"credential {position} is signed by an invite, which lets in a machine and nothing else")
        if issuer.roles and is_machine and "orchestrator" not in issuer.roles:
            raise NotAMember(f"credential {position} is a machine's, signed by a machine that is no orchestrator")
    return _membership(credentials, chain)


def _read_chain(chain: tuple[Signed, ...], network: bytes, subject: bytes | str, now: float) -> list[Credential]:
    public_key = public_key_of(subject) if isinstance(subject, str) else subject
    if not chain:
        raise NotAMember("the peer shows no credential")
    if len(chain) > MAX_CHAIN:
        raise NotAMember(f"the chain of credentials is {len(chain)} long; {MAX_CHAIN} is the most")
    signer, allowed = network, ALL_ROLES
    credentials: list[Credential] = []
    for position, statement in enumerate(chain, start=1):
        if statement.signer != signer:
            wrong = "the key of another network" if position == 1 else "somebody else than the one before it names"
            raise NotAMember(f"credential {position} is signed by {wrong}")
        credential = _read_credential(statement, position)
        _check_credential(credential, position, network, allowed, now)
        credentials.append(credential)
        signer, allowed = credential.subject, frozenset(credential.may_issue)
    if signer != public_key:
        raise NotAMember("the credential was issued to another peer")
    return credentials


def _membership(credentials: list[Credential], chain: tuple[Signed, ...]) -> Membership:
    own = credentials[-1]
    return Membership(
        peer_id_of(own.subject),
        frozenset(own.roles),
        frozenset(own.may_issue),
        min(credential.expires_at for credential in credentials),
        machine=chain[-1].signer,
        invite=credentials[-3].subject if len(credentials) >= 3 and not credentials[-3].roles else None,
    )


def _read_credential(statement: Signed, position: int) -> Credential:
    if not holds(_CREDENTIAL, statement):
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
        raise NotAMember(f"credential {position} grants {listed(beyond)}, which its issuer may not issue")
    if now < credential.not_before - CLOCK_LEEWAY_SECONDS:
        raise NotAMember(f"credential {position} is not valid yet; are both machines' clocks right?")
    if now > credential.expires_at + CLOCK_LEEWAY_SECONDS:
        raise NotAMember(f"credential {position} expired {_ago(now - credential.expires_at)} ago; ask for an invite")


def listed(roles: Iterable[Role]) -> str:
    """Return roles as a sentence names them."""
    return ", ".join(sorted(roles)) or "nothing"


def _ago(seconds: float) -> str:
    for unit, size in (("day", 86_400.0), ("hour", 3_600.0), ("minute", 60.0)):
        if seconds >= size:
            number = int(seconds / size)
            return f"{number} {unit}{'' if number == 1 else 's'}"
    return f"{int(seconds)} seconds"
