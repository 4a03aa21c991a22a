from __future__ import annotations

from pathlib import Path

import base58
import pytest

from tests.members import ADDRESS, DAY, HOUR, NOW, joined_in, renew
from tether import invites
from tether.credentials import verify_chain
from tether.errors import InviteError, UsageError
from tether.identity import Identity
from tether.invites import create_invite, join
from tether.network import Network, open_network
from tether.node_key import NodeKey


def test_an_invite_makes_another_machine_a_member_without_the_networks_key(tmp_path: Path) -> None:
    founder = open_network(tmp_path / "founder")
    token = create_invite(founder, ["worker"], HOUR, [ADDRESS], now=NOW)
    assert token.startswith("tether-invite-1:")
    assert token.isprintable()
    assert " " not in token
    assert len(token) < 2_000

    joined = join(tmp_path / "other", token, NOW)
    assert joined.public_key == founder.public_key
    assert joined.addresses == (ADDRESS,)
    assert not (tmp_path / "other" / "network.key").exists()
    assert (tmp_path / "other" / "machine.key").stat().st_mode & 0o777 == 0o600
    seed = (tmp_path / "founder" / "network.key").read_bytes()
    assert seed not in base58.b58decode(token.removeprefix("tether-invite-1:"))
    for path in (tmp_path / "other").iterdir():
        assert seed not in path.read_bytes()

    again = open_network(tmp_path / "other")
    assert not again.is_founder
    assert again.addresses == (ADDRESS,)
    worker = Identity(again, NodeKey.generate(), ["worker"])
    assert Identity(founder, NodeKey.generate(), ["orchestrator"]).verify(
        worker.chain(NOW), worker.peer_id, NOW
    ).roles == {"worker"}


def test_an_invite_survives_line_breaks_of_a_terminal(tmp_path: Path) -> None:
    token = create_invite(Network.found(), ["worker"], HOUR, [ADDRESS], now=NOW)
    wrapped = "\n  ".join(token[at : at + 80] for at in range(0, len(token), 80))
    assert not join(tmp_path, f" {wrapped}\n", NOW).is_founder


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda token: token[:-9], "is damaged, perhaps cut"),
        (lambda token: token[: len(token) // 2], "is damaged"),
        (lambda token: token[:40] + ("a" if token[40] != "a" else "b") + token[41:], "is damaged"),
        (lambda token: token[:30] + "0" + token[31:], "is damaged"),
        (lambda token: token.removeprefix("tether-"), "is not an invite; one begins with tether-invite-1:"),
        (lambda _: "", "is not an invite"),
        (lambda _: "tether-invite-1:", "is damaged"),
        (lambda _: _wrapped(b"\x93\x01\x02\x03"), "cannot read the invite"),
    ],
)
def test_an_invite_that_was_damaged_is_noticed(tmp_path: Path, spoil: object, reason: str) -> None:
    token = create_invite(Network.found(), ["worker"], HOUR, [ADDRESS], now=NOW)
    assert callable(spoil)
    with pytest.raises(InviteError, match=reason):
        join(tmp_path, spoil(token), NOW)
    assert not (tmp_path / "network.json").exists()


def _wrapped(body: bytes) -> str:
    return "tether-invite-1:" + str(base58.b58encode(invites._checksum(body) + body), "ascii")


def test_an_expired_invite_is_refused(tmp_path: Path) -> None:
    token = create_invite(Network.found(), ["worker"], HOUR, [ADDRESS], now=NOW)
    with pytest.raises(InviteError, match=r"cannot be used: credential 1 expired 2 hours ago"):
        join(tmp_path, token, NOW + 3 * HOUR)


def test_a_directory_of_another_network_does_not_join(tmp_path: Path) -> None:
    mine = Network.found()
    founded = open_network(tmp_path / "founded")
    joined_in(tmp_path / "joined", mine, "worker")
    for directory in ("founded", "joined"):
        with pytest.raises(InviteError, match=r"already belongs to another network; use another data directory"):
            joined_in(tmp_path / directory, Network.found(), "worker")
    with pytest.raises(InviteError, match="founded this network; there is nothing to join"):
        joined_in(tmp_path / "founded", founded, "worker")


def test_a_machine_may_join_its_network_again_for_other_roles(tmp_path: Path) -> None:
    founder = Network.found()
    first = joined_in(tmp_path, founder, "worker")
    second = joined_in(tmp_path, founder, "worker", "gateway")
    assert first.issuer.key.peer_id == second.issuer.key.peer_id, "it stays the same machine"
    assert second.may_issue(NOW)[0] == {"worker", "gateway"}


def test_an_invite_needs_roles_and_time() -> None:
    with pytest.raises(UsageError):
        create_invite(Network.found(), [], HOUR, [ADDRESS], now=NOW)
    with pytest.raises(UsageError):
        create_invite(Network.found(), ["worker"], 0.0, [ADDRESS], now=NOW)


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:4100",
        "",
        "/ip4/10.0.0.1/tcp/4100",
        ADDRESS + "/p2p/x",
        ADDRESS[:-1],
        ADDRESS.replace("192.0.2.1", "192.0.2.256"),
        ADDRESS.replace("192.0.2.1", "::1"),
        ADDRESS.replace("/4001/", "/65536/"),
        ADDRESS.replace("/4001/", "/0/"),
        ADDRESS.replace("/tcp/", "/udp/"),
        ADDRESS + "\n",
    ],
)
def test_an_invite_has_no_address_that_cannot_be_dialled(address: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not an address that can be dialled, /ip4/<address>/tcp/<port>/p2p/<peer id>"
    ):
        create_invite(Network.found(), ["worker"], HOUR, [ADDRESS, address], now=NOW)


@pytest.mark.parametrize("host", ["ip4/10.0.0.1", "ip6/::1", "dns/example.org", "dns4/example.org", "dns6/example.org"])
def test_an_invite_may_have_any_address_that_a_node_announces(host: str) -> None:
    create_invite(Network.found(), ["worker"], HOUR, [ADDRESS.replace("ip4/192.0.2.1", host)], now=NOW)


def test_a_joined_machine_invites_only_as_what_it_is_and_once_it_was_renewed(tmp_path: Path) -> None:
    founder = Network.found()
    joined = joined_in(tmp_path / "a", founder, "worker", "orchestrator")
    with pytest.raises(InviteError, match="may invite as orchestrator, worker, not as gateway"):
        create_invite(joined, ["gateway"], HOUR, [ADDRESS], now=NOW)
    with pytest.raises(InviteError, match="comes from an invite still"):
        create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW)
    renew(founder, joined)
    third = join(tmp_path / "b", create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW), NOW)
    worker = Identity(third, NodeKey.generate(), ["worker"])
    assert verify_chain(worker.chain(NOW), founder.public_key, worker.peer_id, NOW).roles == {"worker"}
    with pytest.raises(InviteError, match="not a member of its network any more"):
        create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW + 91 * DAY)
