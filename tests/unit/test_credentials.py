from __future__ import annotations

import msgspec
import pytest

from tests.members import DAY, HOUR, INVITE, MACHINE, NETWORK, NOW, PROCESS, STRANGER, issued
from tether.credentials import verify_chain, verify_process
from tether.errors import NotAMember
from tether.messages import Signed
from tether.network import Network
from tether.node_key import NodeKey


def test_a_chain_from_the_networks_key_proves_membership_until_its_earliest_end() -> None:
    chain = (
        issued(NETWORK, NETWORK, MACHINE, roles=(), may_issue=("worker", "gateway"), ends=NOW + DAY),
        issued(MACHINE, NETWORK, PROCESS, roles=("worker",), ends=NOW + 9 * DAY),
    )
    membership = verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, NOW)
    assert membership.roles == {"worker"}
    assert membership.may_issue == frozenset()
    assert membership.expires_at == NOW + DAY
    assert membership.machine == MACHINE.public_key
    assert membership.peer_id == PROCESS.peer_id


def _altered(statement: Signed) -> Signed:
    return msgspec.structs.replace(statement, payload=statement.payload.replace(b"worker", b"operator"))


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((), "shows no credential"),
        ((issued(STRANGER, NETWORK, PROCESS),), "credential 1 is signed by the key of another network"),
        ((issued(NETWORK, STRANGER, PROCESS),), "credential 1 is for another network"),
        ((_altered(issued(NETWORK, NETWORK, PROCESS)),), "signature of credential 1 does not hold"),
        ((issued(NETWORK, NETWORK, STRANGER),), "was issued to another peer"),
        (
            (issued(NETWORK, NETWORK, MACHINE, may_issue=("worker",)), issued(STRANGER, NETWORK, PROCESS)),
            "credential 2 is signed by somebody else",
        ),
        (
            (issued(NETWORK, NETWORK, MACHINE, roles=("worker",)), issued(MACHINE, NETWORK, PROCESS)),
            "credential 2 grants worker, which its issuer may not issue",
        ),
        (
            (
                issued(NETWORK, NETWORK, MACHINE, may_issue=("worker",)),
                issued(MACHINE, NETWORK, PROCESS, may_issue=("orchestrator",)),
            ),
            "credential 2 grants orchestrator, worker"[:24],
        ),
        ((issued(NETWORK, NETWORK, PROCESS, ends=NOW - HOUR),), "credential 1 expired 1 hour ago; ask for an invite"),
        ((issued(NETWORK, NETWORK, PROCESS, ends=NOW - 3 * DAY),), "expired 3 days ago"),
        ((issued(NETWORK, NETWORK, PROCESS, begins=NOW + HOUR),), "credential 1 is not valid yet"),
        ((NETWORK.sign(b"{}", purpose=b"tether-credential-1:"),), "credential 1 is malformed"),
        ((NETWORK.sign(b"\xff", purpose=b"tether-credential-1:"),), "credential 1 is malformed"),
        ((NETWORK.sign(msgspec.json.encode(Signed(b"", b"", b""))),), "signature of credential 1 does not hold"),
        ((issued(NETWORK, NETWORK, NETWORK, may_issue=("worker",)),) * 5, "5 long; 4 is the most"),
    ],
)
def test_a_chain_that_proves_nothing_says_precisely_why(chain: tuple[Signed, ...], reason: str) -> None:
    with pytest.raises(NotAMember, match=reason):
        verify_chain(chain, NETWORK.public_key, PROCESS.public_key, NOW)


def test_five_minutes_between_two_clocks_are_forgiven() -> None:
    chain = (issued(NETWORK, NETWORK, PROCESS, begins=NOW, ends=NOW + HOUR),)
    for now in (NOW - 299, NOW + HOUR + 299):
        assert verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, now).roles == {"worker"}
    for now in (NOW - 301, NOW + HOUR + 301):
        with pytest.raises(NotAMember):
            verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, now)


def test_a_process_may_not_pass_its_role_on() -> None:
    network = Network.found()
    process, other = NodeKey.generate(), NodeKey.generate()
    chain = network.issue_process_credential(process, ["worker"], NOW)
    forged = issued(process, NodeKey(network.issuer.key.seed), other)
    with pytest.raises(NotAMember, match="credential 2 grants worker"):
        verify_chain((*chain, forged), network.public_key, other.peer_id, NOW)


def _orchestrator(issuer: NodeKey, subject: NodeKey) -> Signed:
    return issued(issuer, NETWORK, subject, roles=("orchestrator", "worker"), may_issue=("orchestrator", "worker"))


def _machine(issuer: NodeKey, subject: NodeKey) -> Signed:
    return issued(issuer, NETWORK, subject, may_issue=("worker",))


def _invite(issuer: NodeKey, subject: NodeKey) -> Signed:
    return issued(issuer, NETWORK, subject, roles=(), may_issue=("worker",))


_PROCESS = issued(MACHINE, NETWORK, PROCESS)


@pytest.mark.parametrize(
    ("chain", "invite"),
    [
        ((issued(NETWORK, NETWORK, PROCESS),), None),
        ((_machine(NETWORK, MACHINE), _PROCESS), None),
        ((_orchestrator(NETWORK, STRANGER), _machine(STRANGER, MACHINE), _PROCESS), None),
        ((_invite(NETWORK, INVITE), _machine(INVITE, MACHINE), _PROCESS), INVITE),
        ((_machine(NETWORK, STRANGER), _invite(STRANGER, INVITE), _machine(INVITE, MACHINE), _PROCESS), INVITE),
    ],
)
def test_a_process_of_a_machine_that_was_let_in_is_a_member_and_shows_the_invite(
    chain: tuple[Signed, ...], invite: NodeKey | None
) -> None:
    membership = verify_process(chain, NETWORK.public_key, PROCESS.peer_id, NOW)
    assert membership.roles == {"worker"}
    assert membership.invite == (invite.public_key if invite else None)


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ((_invite(NETWORK, INVITE), issued(INVITE, NETWORK, PROCESS)), "credential 2 is signed by an invite"),
        (
            (_machine(NETWORK, MACHINE), _invite(MACHINE, INVITE), issued(INVITE, NETWORK, PROCESS)),
            "credential 3 is signed by an invite",
        ),
        ((_invite(NETWORK, INVITE), _invite(INVITE, MACHINE), _PROCESS), "credential 2 is signed by an invite"),
        (
            (_machine(NETWORK, STRANGER), _machine(STRANGER, MACHINE), _PROCESS),
            "credential 2 is a machine's, signed by a machine that is no orchestrator",
        ),
        (
            (_invite(NETWORK, INVITE), _machine(INVITE, STRANGER), _machine(STRANGER, MACHINE), _PROCESS),
            "credential 3 is a machine's, signed by a machine that is no orchestrator",
        ),
    ],
)
def test_nobody_comes_in_by_a_key_that_signs_for_what_is_not_its_to_let_in(
    chain: tuple[Signed, ...], reason: str
) -> None:
    assert verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, NOW).roles == {"worker"}, "each signature holds"
    with pytest.raises(NotAMember, match=reason):
        verify_process(chain, NETWORK.public_key, PROCESS.peer_id, NOW)
