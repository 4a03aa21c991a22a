from __future__ import annotations

from pathlib import Path

import pytest

from tests.members import DAY, HOUR, NOW, joined_in
from tether.errors import NotAMember
from tether.identity import Identity
from tether.network import Network
from tether.node_key import NodeKey


def test_an_identity_shows_a_chain_that_its_network_accepts() -> None:
    network = Network.found()
    one = Identity(network, NodeKey.generate(), ["worker", "gateway"])
    other = Identity(network, NodeKey.generate(), ["orchestrator"])
    membership = other.verify(one.chain(NOW), one.peer_id, NOW)
    assert membership.roles == {"worker", "gateway"}
    assert one.chain(NOW) is one.chain(NOW + 60), "it is signed once an hour"
    assert one.expires_at(NOW) == NOW + 90 * DAY
    with pytest.raises(NotAMember, match="issued to another peer"):
        other.verify(one.chain(NOW), other.peer_id, NOW)


def test_an_identity_signs_itself_anew_before_its_credential_ends() -> None:
    one = Identity(Network.found(), NodeKey.generate(), ["worker"])
    one.chain(NOW)
    assert one.expires_at(NOW + 80 * DAY) == NOW + 170 * DAY


def test_a_machine_may_not_have_a_role_that_its_invite_does_not_name(tmp_path: Path) -> None:
    joined = joined_in(tmp_path, Network.found(), "worker")
    with pytest.raises(NotAMember, match="joined as worker; ask for an invite with --role gateway --role worker"):
        Identity(joined, NodeKey.generate(), ["gateway"]).chain(NOW)


def test_a_membership_ends_with_its_invite_unless_it_is_renewed(tmp_path: Path) -> None:
    joined = joined_in(tmp_path, Network.found(), "worker", ttl=HOUR)
    worker = Identity(joined, NodeKey.generate(), ["worker"])
    assert worker.expires_at(NOW) == NOW + HOUR
    with pytest.raises(NotAMember, match="not a member of its network any more: credential 1 expired 1 hour ago"):
        worker.chain(NOW + 2 * HOUR)
