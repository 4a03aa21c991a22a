"""Machines of one network, at one moment: credentials, invites and renewals for the tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tether.credentials import issue
from tether.identity import Identity
from tether.invites import create_invite, join
from tether.messages import Signed
from tether.network import Network
from tether.node_key import NodeKey
from tether.records import Role

NOW = 1_800_000_000.0
HOUR = 3_600.0
DAY = 24 * HOUR
ADDRESS = f"/ip4/192.0.2.1/tcp/4001/p2p/{NodeKey(bytes(32)).peer_id}"

NETWORK, MACHINE, PROCESS, STRANGER, INVITE = (NodeKey(bytes([n]) * 32) for n in (1, 2, 3, 4, 5))


def issued(
    issuer: NodeKey,
    network: NodeKey,
    subject: NodeKey,
    *,
    roles: Iterable[Role] = ("worker",),
    may_issue: Iterable[Role] = (),
    begins: float = NOW,
    ends: float = NOW + DAY,
) -> Signed:
    return issue(
        issuer, network.public_key, subject.public_key, roles=roles, may_issue=may_issue, now=begins, expires_at=ends
    )


def joined_in(tmp_path: Path, founder: Network, *roles: Role, ttl: float = HOUR) -> Network:
    return join(tmp_path, create_invite(founder, roles, ttl, [ADDRESS], now=NOW), NOW)


def renew(by: Network, joined: Network, now: float = NOW) -> tuple[Signed, ...]:
    allowed, _ = joined.may_issue(now)
    process = Identity(joined, NodeKey.generate(), allowed)
    renewed = Identity(by, NodeKey.generate(), ["orchestrator"]).renew(process.chain(now), now)
    if renewed:
        assert process.store_renewed(renewed, now)
        assert process.expires_at(now) > now + 80 * DAY
    return renewed
