from __future__ import annotations

import fcntl
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import base58
import msgspec
import pytest

from tether import identity
from tether.errors import DataDirError, InviteError, KeyFileError, NotAMember, ProtocolViolation, UsageError
from tether.identity import (
    AddressBook,
    Identity,
    Issuer,
    Network,
    NodeKey,
    claim_slot,
    create_invite,
    join,
    open_network,
    peer_id_of,
    public_key_of,
    verify,
    verify_chain,
)
from tether.messages import Signed
from tether.records import Role

NOW = 1_800_000_000.0
HOUR = 3_600.0
DAY = 24 * HOUR
ADDRESS = f"/ip4/192.0.2.1/tcp/4001/p2p/{NodeKey(bytes(32)).peer_id}"


# --- keys


def test_a_peer_id_is_the_multihash_of_the_public_key_and_back() -> None:
    key = NodeKey(b"\x01" * 32)
    assert key.peer_id.startswith("12D3KooW")
    assert peer_id_of(key.public_key) == key.peer_id
    assert public_key_of(key.peer_id) == key.public_key


@pytest.mark.parametrize("text", ["", "12D3KooW", "not base58: 0OIl", "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG"])
def test_what_is_no_peer_id_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="is not a peer id"):
        public_key_of(text)


def test_a_key_file_is_made_once_with_mode_600(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "one.key"
    key = NodeKey.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes() == key.seed
    assert NodeKey.load_or_create(path).peer_id == key.peer_id
    assert [p.name for p in path.parent.iterdir()] == ["one.key"], "no temporary file is left"


def test_a_broken_key_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "broken.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=r"5 bytes instead of 32; restore it from a backup, or delete it"):
        NodeKey.load_or_create(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        (
            "network.key",
            r"restore it from a backup: without it this network is lost, and every machine has to join a new",
        ),
        ("machine.key", r"restore it from a backup, or delete it and .*network\.json and join again with an invite"),
        ("gateway.key", r"restore it from a backup, or delete it to get a new key"),
    ],
)
def test_what_to_do_about_a_broken_key_file_depends_on_whose_it_is(tmp_path: Path, name: str, remedy: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=remedy):
        NodeKey.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(KeyFileError, match=r"is a directory, not a key file; move it away, and restore"):
        NodeKey.load_or_create(path)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open.key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        NodeKey.load(path)


def test_a_key_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "any.key"
    with pytest.raises(KeyFileError, match="cannot read the key file"):
        NodeKey.load(path)


def test_a_missing_key_file_is_not_made_by_load(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NodeKey.load(tmp_path / "none.key")


def test_a_signature_holds_for_its_payload_and_its_purpose_alone() -> None:
    key = NodeKey.generate()
    statement = identity.sign(key, b"state")
    assert verify(statement) == key.peer_id
    for changed in (
        msgspec.structs.replace(statement, payload=b"other"),
        msgspec.structs.replace(statement, signer=NodeKey.generate().public_key),
        msgspec.structs.replace(statement, signer=b"short"),
        msgspec.structs.replace(statement, signature=b""),
        key.sign(b"state", purpose=b"something else:"),
    ):
        with pytest.raises(ProtocolViolation, match="does not hold"):
            verify(changed)


# --- slots


def test_processes_of_one_directory_get_slots_of_their_own(tmp_path: Path) -> None:
    with claim_slot(tmp_path, "worker") as first, claim_slot(tmp_path, "worker") as second:
        assert (first.slot, second.slot) == ("worker", "worker-2")
        assert first.key.peer_id != second.key.peer_id
        with claim_slot(tmp_path, "gateway") as other:
            assert other.slot == "gateway"
    with claim_slot(tmp_path, "worker") as again:
        assert again.slot == "worker"
        assert again.key.peer_id == first.key.peer_id, "a peer id survives a restart"


def test_releasing_a_slot_twice_is_harmless(tmp_path: Path) -> None:
    claimed = claim_slot(tmp_path, "worker")
    claimed.release()
    claimed.release()
    with claim_slot(tmp_path, "worker") as again:
        assert again.slot == "worker"


def test_a_slot_is_not_inherited_by_a_child(tmp_path: Path) -> None:
    with claim_slot(tmp_path, "worker"):
        fds = [fd for fd in Path("/proc/self/fd").iterdir() if _target(fd).endswith("worker.key")]
        assert fds
        assert not any(os.get_inheritable(int(fd.name)) for fd in fds)


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except OSError:
        return ""


def test_no_more_slots_than_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MAX_SLOTS", 1)
    with claim_slot(tmp_path, "worker"), pytest.raises(DataDirError, match="already run as worker"):
        claim_slot(tmp_path, "worker")


def test_a_data_directory_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for data_dir in (in_the_way, in_the_way / "below"):
        with pytest.raises(DataDirError, match="--data-dir"):
            claim_slot(data_dir, "worker")
        with pytest.raises(DataDirError, match="--data-dir"):
            open_network(data_dir)


def test_a_data_directory_without_write_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataDirError, match="cannot write to the data directory"):
        open_network(tmp_path)


# --- chains


def _issue(
    issuer: NodeKey,
    network: NodeKey,
    subject: NodeKey,
    *,
    roles: Iterable[Role] = ("worker",),
    may_issue: Iterable[Role] = (),
    begins: float = NOW,
    ends: float = NOW + DAY,
) -> Signed:
    return identity._issue(
        issuer, network.public_key, subject.public_key, roles=roles, may_issue=may_issue, now=begins, expires_at=ends
    )


NETWORK, MACHINE, PROCESS, STRANGER = (NodeKey(bytes([n]) * 32) for n in (1, 2, 3, 4))


def test_a_chain_from_the_networks_key_proves_membership_until_its_earliest_end() -> None:
    chain = (
        _issue(NETWORK, NETWORK, MACHINE, roles=(), may_issue=("worker", "gateway"), ends=NOW + DAY),
        _issue(MACHINE, NETWORK, PROCESS, roles=("worker",), ends=NOW + 9 * DAY),
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
        ((_issue(STRANGER, NETWORK, PROCESS),), "credential 1 is signed by the key of another network"),
        ((_issue(NETWORK, STRANGER, PROCESS),), "credential 1 is for another network"),
        ((_altered(_issue(NETWORK, NETWORK, PROCESS)),), "signature of credential 1 does not hold"),
        ((_issue(NETWORK, NETWORK, STRANGER),), "was issued to another peer"),
        (
            (_issue(NETWORK, NETWORK, MACHINE, may_issue=("worker",)), _issue(STRANGER, NETWORK, PROCESS)),
            "credential 2 is signed by somebody else",
        ),
        (
            (_issue(NETWORK, NETWORK, MACHINE, roles=("worker",)), _issue(MACHINE, NETWORK, PROCESS)),
            "credential 2 grants worker, which its issuer may not issue",
        ),
        (
            (
                _issue(NETWORK, NETWORK, MACHINE, may_issue=("worker",)),
                _issue(MACHINE, NETWORK, PROCESS, may_issue=("orchestrator",)),
            ),
            "credential 2 grants orchestrator, worker"[:24],
        ),
        ((_issue(NETWORK, NETWORK, PROCESS, ends=NOW - HOUR),), "credential 1 expired 1 hour ago; ask for an invite"),
        ((_issue(NETWORK, NETWORK, PROCESS, ends=NOW - 3 * DAY),), "expired 3 days ago"),
        ((_issue(NETWORK, NETWORK, PROCESS, begins=NOW + HOUR),), "credential 1 is not valid yet"),
        ((NETWORK.sign(b"{}", purpose=b"tether-credential-1:"),), "credential 1 is malformed"),
        ((NETWORK.sign(b"\xff", purpose=b"tether-credential-1:"),), "credential 1 is malformed"),
        ((NETWORK.sign(msgspec.json.encode(Signed(b"", b"", b""))),), "signature of credential 1 does not hold"),
        ((_issue(NETWORK, NETWORK, NETWORK, may_issue=("worker",)),) * 5, "5 long; 4 is the most"),
    ],
)
def test_a_chain_that_proves_nothing_says_precisely_why(chain: tuple[Signed, ...], reason: str) -> None:
    with pytest.raises(NotAMember, match=reason):
        verify_chain(chain, NETWORK.public_key, PROCESS.public_key, NOW)


def test_five_minutes_between_two_clocks_are_forgiven() -> None:
    chain = (_issue(NETWORK, NETWORK, PROCESS, begins=NOW, ends=NOW + HOUR),)
    for now in (NOW - 299, NOW + HOUR + 299):
        assert verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, now).roles == {"worker"}
    for now in (NOW - 301, NOW + HOUR + 301):
        with pytest.raises(NotAMember):
            verify_chain(chain, NETWORK.public_key, PROCESS.peer_id, now)


def test_a_process_may_not_pass_its_role_on() -> None:
    network = Network.found()
    process, other = NodeKey.generate(), NodeKey.generate()
    chain = network.issue_process_credential(process, ["worker"], NOW)
    forged = _issue(process, NodeKey(network.issuer.key.seed), other)
    with pytest.raises(NotAMember, match="credential 2 grants worker"):
        verify_chain((*chain, forged), network.public_key, other.peer_id, NOW)


# --- networks


def test_the_first_role_founds_a_network_and_the_next_one_finds_it(tmp_path: Path) -> None:
    first, second = open_network(tmp_path), open_network(tmp_path)
    assert first.is_founder
    assert first.public_key == second.public_key
    assert (tmp_path / "network.key").stat().st_mode & 0o777 == 0o600


def _open(data_dir: Path, found: multiprocessing.Queue[bytes]) -> None:
    found.put(open_network(data_dir).public_key)


def test_roles_that_start_at_the_same_moment_found_one_network(tmp_path: Path) -> None:
    # The lock is held until all of them are at it.
    context = multiprocessing.get_context("fork")
    found: multiprocessing.Queue[bytes] = context.Queue()
    fd = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    processes = [context.Process(target=_open, args=(tmp_path, found)) for _ in range(4)]
    for process in processes:
        process.start()
    fcntl.flock(fd, fcntl.LOCK_UN)
    keys = {found.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    os.close(fd)
    assert len(keys) == 1


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


# --- invites


def _joined(tmp_path: Path, founder: Network, *roles: Role, ttl: float = HOUR) -> Network:
    return join(tmp_path, create_invite(founder, roles, ttl, [ADDRESS], now=NOW), NOW)


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


def test_a_machine_may_not_have_a_role_that_its_invite_does_not_name(tmp_path: Path) -> None:
    joined = _joined(tmp_path, Network.found(), "worker")
    with pytest.raises(NotAMember, match="joined as worker; ask for an invite with --role gateway --role worker"):
        Identity(joined, NodeKey.generate(), ["gateway"]).chain(NOW)


def test_a_membership_ends_with_its_invite_unless_it_is_renewed(tmp_path: Path) -> None:
    joined = _joined(tmp_path, Network.found(), "worker", ttl=HOUR)
    worker = Identity(joined, NodeKey.generate(), ["worker"])
    assert worker.expires_at(NOW) == NOW + HOUR
    with pytest.raises(NotAMember, match="not a member of its network any more: credential 1 expired 1 hour ago"):
        worker.chain(NOW + 2 * HOUR)


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
    return "tether-invite-1:" + str(base58.b58encode(identity._checksum(body) + body), "ascii")


def test_an_expired_invite_is_refused(tmp_path: Path) -> None:
    token = create_invite(Network.found(), ["worker"], HOUR, [ADDRESS], now=NOW)
    with pytest.raises(InviteError, match=r"cannot be used: credential 1 expired 2 hours ago"):
        join(tmp_path, token, NOW + 3 * HOUR)


def test_a_directory_of_another_network_does_not_join(tmp_path: Path) -> None:
    mine = Network.found()
    founded = open_network(tmp_path / "founded")
    _joined(tmp_path / "joined", mine, "worker")
    for directory in ("founded", "joined"):
        with pytest.raises(InviteError, match=r"already belongs to another network; use another data directory"):
            _joined(tmp_path / directory, Network.found(), "worker")
    with pytest.raises(InviteError, match="founded this network; there is nothing to join"):
        _joined(tmp_path / "founded", founded, "worker")


def test_a_machine_may_join_its_network_again_for_other_roles(tmp_path: Path) -> None:
    founder = Network.found()
    first = _joined(tmp_path, founder, "worker")
    second = _joined(tmp_path, founder, "worker", "gateway")
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
    joined = _joined(tmp_path / "a", founder, "worker", "orchestrator")
    with pytest.raises(InviteError, match="may invite as orchestrator, worker, not as gateway"):
        create_invite(joined, ["gateway"], HOUR, [ADDRESS], now=NOW)
    with pytest.raises(InviteError, match="comes from an invite still"):
        create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW)
    _renew(founder, joined)
    third = join(tmp_path / "b", create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW), NOW)
    worker = Identity(third, NodeKey.generate(), ["worker"])
    assert verify_chain(worker.chain(NOW), founder.public_key, worker.peer_id, NOW).roles == {"worker"}
    with pytest.raises(InviteError, match="not a member of its network any more"):
        create_invite(joined, ["worker"], HOUR, [ADDRESS], now=NOW + 91 * DAY)


# --- renewal


def _renew(by: Network, joined: Network, now: float = NOW) -> tuple[Signed, ...]:
    allowed, _ = joined.may_issue(now)
    process = Identity(joined, NodeKey.generate(), allowed)
    renewed = Identity(by, NodeKey.generate(), ["orchestrator"]).renew(process.chain(now), now)
    if renewed:
        assert process.store_renewed(renewed, now)
        assert process.expires_at(now) > now + 80 * DAY
    return renewed


def test_an_orchestrator_renews_a_machine_whose_membership_ends_soon(tmp_path: Path) -> None:
    founder = Network.found()
    joined = _joined(tmp_path, founder, "worker")
    assert len(_renew(founder, joined)) == 1
    assert open_network(tmp_path).may_issue(NOW) == (frozenset({"worker"}), NOW + 90 * DAY), (
        "it is kept for the next start"
    )
    assert _renew(founder, joined) == (), "it is not due again"
    assert len(_renew(founder, joined, NOW + 61 * DAY)) == 1


def test_another_process_of_the_machine_finds_the_renewed_chain(tmp_path: Path) -> None:
    founder = Network.found()
    joined = _joined(tmp_path, founder, "worker")
    other = Identity(open_network(tmp_path), NodeKey.generate(), ["worker"])
    assert other.expires_at(NOW) == NOW + HOUR
    _renew(founder, joined)
    assert other.expires_at(NOW + 60) == NOW + 90 * DAY


def test_only_who_may_issue_the_roles_renews_them(tmp_path: Path) -> None:
    founder = Network.found()
    worker = _joined(tmp_path / "w", founder, "worker")
    gateway = _joined(tmp_path / "g", founder, "gateway", "orchestrator")
    _renew(founder, gateway)
    assert _renew(gateway, worker) == ()
    process = Identity(worker, NodeKey.generate(), ["worker"])
    assert Identity(founder, NodeKey.generate(), ["gateway"]).renew(process.chain(NOW), NOW) == ()


def test_a_joined_orchestrator_renews_as_long_as_it_is_a_member_itself(tmp_path: Path) -> None:
    founder = Network.found()
    worker = _joined(tmp_path / "w", founder, "worker", ttl=100 * DAY)
    other = _joined(tmp_path / "o", founder, "worker", "orchestrator", ttl=HOUR)
    _renew(founder, other)
    process = Identity(worker, NodeKey.generate(), ["worker"])
    now = NOW + 80 * DAY
    assert other.renew(process.chain(now), now) == (), "its own membership ends before the machine's"
    _renew(founder, other, now)
    renewed = other.renew(process.chain(now), now)
    assert len(renewed) == 2
    assert process.store_renewed(renewed, now)
    assert process.expires_at(now) == now + 90 * DAY


def test_the_founders_own_processes_need_no_renewal() -> None:
    founder = Network.found()
    process = Identity(founder, NodeKey.generate(), ["worker"])
    assert founder.renew(process.chain(NOW), NOW + 89 * DAY) == ()
    assert not process.store_renewed((), NOW)


def test_a_renewed_chain_that_proves_nothing_or_less_is_not_kept(tmp_path: Path) -> None:
    founder = Network.found()
    joined = _joined(tmp_path, founder, "worker", "gateway", ttl=10 * DAY)
    machine = joined.issuer.key
    key = founder.issuer.key
    process = Identity(joined, NodeKey.generate(), ["worker"])
    with pytest.raises(NotAMember):
        process.store_renewed((_issue(STRANGER, key, machine, ends=NOW + 90 * DAY),), NOW)
    fewer = (_issue(key, key, machine, roles=("worker",), may_issue=("worker",), ends=NOW + 90 * DAY),)
    sooner = (_issue(key, key, machine, may_issue=("worker", "gateway"), ends=NOW + DAY),)
    assert not process.store_renewed(fewer, NOW)
    assert not process.store_renewed(sooner, NOW)
    assert open_network(tmp_path).may_issue(NOW)[0] == {"worker", "gateway"}


# --- files of a joined machine


def test_a_broken_network_file_says_what_to_do(tmp_path: Path) -> None:
    _joined(tmp_path, Network.found(), "worker")
    (tmp_path / "machine.key").unlink()
    with pytest.raises(KeyFileError, match=r"machine.key is missing; delete .*network.json and join again"):
        open_network(tmp_path)
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(DataDirError, match=r"is broken .* join again"):
        open_network(tmp_path)


def test_a_joined_machine_remembers_orchestrators_for_its_next_start(tmp_path: Path) -> None:
    joined = _joined(tmp_path, Network.found(), "worker")
    joined.remember_addresses(["/ip4/192.0.2.2/tcp/1/p2p/x"])
    joined.remember_addresses(["/ip4/192.0.2.2/tcp/1/p2p/x"])
    assert open_network(tmp_path).addresses == ("/ip4/192.0.2.2/tcp/1/p2p/x", ADDRESS)
    founder = Network.found()
    founder.remember_addresses([ADDRESS])
    assert founder.addresses == ()


def test_a_network_in_memory_writes_nothing() -> None:
    founder = Network.found()
    machine = NodeKey.generate()
    chain = (_issue(founder.issuer.key, founder.issuer.key, machine, may_issue=("worker",)),)
    joined = Network(founder.public_key, Issuer(machine, chain))
    joined.remember_addresses([ADDRESS])
    joined.reload()
    assert joined.addresses == (ADDRESS,)
    assert _renew(founder, joined)


# --- the address book


def test_the_address_book_lists_orchestrators_while_they_run(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    assert book.read() == ()
    with book.listed("12D3KooWAbc", [ADDRESS]):
        assert AddressBook(tmp_path).read() == (ADDRESS,)
        assert book.read() == (ADDRESS,), "reading takes nothing away"
    assert book.read() == ()
    assert list((tmp_path / "run").iterdir()) == []


def test_the_address_book_drops_the_entry_of_an_orchestrator_that_was_killed(tmp_path: Path) -> None:
    lister = (
        "import sys; from pathlib import Path; from tether.identity import AddressBook\n"
        "with AddressBook(Path(sys.argv[1])).listed('killed', ['/ip4/192.0.2.1/tcp/9/p2p/killed']):\n"
        "    print('listed', flush=True); sys.stdin.read()\n"
    )
    book = AddressBook(tmp_path)
    with (
        subprocess.Popen(
            [sys.executable, "-c", lister, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process,
        book.listed("alive", [ADDRESS]),
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"listed\n"
        assert set(book.read()) == {ADDRESS, "/ip4/192.0.2.1/tcp/9/p2p/killed"}
        process.kill()
        process.wait()
        assert (tmp_path / "run" / "killed.json").exists()
        assert book.read() == (ADDRESS,)
        assert not (tmp_path / "run" / "killed.json").exists()


def test_an_orchestrator_that_starts_again_takes_the_place_of_its_killed_self(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "peer.json"
    path.write_text('{"addresses":["/ip4/192.0.2.1/tcp/9/p2p/peer"]}')
    with path.open("rb") as killed, book.listed("peer", [ADDRESS]):
        # Somebody who has just found the old entry dead must not take the new one away.
        book._drop(path, killed.fileno())
        assert book.read() == (ADDRESS,)


def test_the_address_book_skips_what_it_cannot_read_and_puts_the_newest_first(tmp_path: Path) -> None:
    book = AddressBook(tmp_path)
    with (
        book.listed("old", ["/ip4/192.0.2.1/tcp/1/p2p/old"]),
        book.listed("new", ["/ip4/192.0.2.1/tcp/2/p2p/new"]),
        (tmp_path / "run" / "broken.json").open("w") as broken,
    ):
        os.utime(tmp_path / "run" / "old.json", (1, 1))
        broken.write("{")
        fcntl.flock(broken, fcntl.LOCK_EX)
        (tmp_path / "run" / "folder.json").mkdir()
        assert book.read() == ("/ip4/192.0.2.1/tcp/2/p2p/new", "/ip4/192.0.2.1/tcp/1/p2p/old")
