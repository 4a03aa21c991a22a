from __future__ import annotations

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from tests.members import ADDRESS, DAY, HOUR, NOW, STRANGER, issued, joined_in, renew
from tether.errors import DataDirError, KeyFileError, NotAMember
from tether.identity import Identity
from tether.network import Issuer, Network, open_network
from tether.node_key import NodeKey


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


def test_an_orchestrator_renews_a_machine_whose_membership_ends_soon(tmp_path: Path) -> None:
    founder = Network.found()
    joined = joined_in(tmp_path, founder, "worker")
    assert len(renew(founder, joined)) == 1
    assert open_network(tmp_path).may_issue(NOW) == (frozenset({"worker"}), NOW + 90 * DAY), (
        "it is kept for the next start"
    )
    assert renew(founder, joined) == (), "it is not due again"
    assert len(renew(founder, joined, NOW + 61 * DAY)) == 1


def test_another_process_of_the_machine_finds_the_renewed_chain(tmp_path: Path) -> None:
    founder = Network.found()
    joined = joined_in(tmp_path, founder, "worker")
    other = Identity(open_network(tmp_path), NodeKey.generate(), ["worker"])
    assert other.expires_at(NOW) == NOW + HOUR
    renew(founder, joined)
    assert other.expires_at(NOW + 60) == NOW + 90 * DAY


def test_only_who_may_issue_the_roles_renews_them(tmp_path: Path) -> None:
    founder = Network.found()
    worker = joined_in(tmp_path / "w", founder, "worker")
    gateway = joined_in(tmp_path / "g", founder, "gateway", "orchestrator")
    renew(founder, gateway)
    assert renew(gateway, worker) == ()
    process = Identity(worker, NodeKey.generate(), ["worker"])
    assert Identity(founder, NodeKey.generate(), ["gateway"]).renew(process.chain(NOW), NOW) == ()


def test_a_joined_orchestrator_renews_as_long_as_it_is_a_member_itself(tmp_path: Path) -> None:
    founder = Network.found()
    worker = joined_in(tmp_path / "w", founder, "worker", ttl=100 * DAY)
    other = joined_in(tmp_path / "o", founder, "worker", "orchestrator", ttl=HOUR)
    renew(founder, other)
    process = Identity(worker, NodeKey.generate(), ["worker"])
    now = NOW + 80 * DAY
    assert other.renew(process.chain(now), now) == (), "its own membership ends before the machine's"
    renew(founder, other, now)
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
    joined = joined_in(tmp_path, founder, "worker", "gateway", ttl=10 * DAY)
    machine = joined.issuer.key
    key = founder.issuer.key
    process = Identity(joined, NodeKey.generate(), ["worker"])
    with pytest.raises(NotAMember):
        process.store_renewed((issued(STRANGER, key, machine, ends=NOW + 90 * DAY),), NOW)
    fewer = (issued(key, key, machine, roles=("worker",), may_issue=("worker",), ends=NOW + 90 * DAY),)
    sooner = (issued(key, key, machine, may_issue=("worker", "gateway"), ends=NOW + DAY),)
    assert not process.store_renewed(fewer, NOW)
    assert not process.store_renewed(sooner, NOW)
    assert open_network(tmp_path).may_issue(NOW)[0] == {"worker", "gateway"}


def test_a_broken_network_file_says_what_to_do(tmp_path: Path) -> None:
    joined_in(tmp_path, Network.found(), "worker")
    (tmp_path / "machine.key").unlink()
    with pytest.raises(KeyFileError, match=r"machine.key is missing; delete .*network.json and join again"):
        open_network(tmp_path)
    (tmp_path / "network.json").write_text("{")
    with pytest.raises(DataDirError, match=r"is broken .* join again"):
        open_network(tmp_path)


def test_a_joined_machine_remembers_orchestrators_for_its_next_start(tmp_path: Path) -> None:
    joined = joined_in(tmp_path, Network.found(), "worker")
    joined.remember_addresses(["/ip4/192.0.2.2/tcp/1/p2p/x"])
    joined.remember_addresses(["/ip4/192.0.2.2/tcp/1/p2p/x"])
    assert open_network(tmp_path).addresses == ("/ip4/192.0.2.2/tcp/1/p2p/x", ADDRESS)
    founder = Network.found()
    founder.remember_addresses([ADDRESS])
    assert founder.addresses == ()


def test_a_network_in_memory_writes_nothing() -> None:
    founder = Network.found()
    machine = NodeKey.generate()
    chain = (issued(founder.issuer.key, founder.issuer.key, machine, may_issue=("worker",)),)
    joined = Network(founder.public_key, Issuer(machine, chain))
    joined.remember_addresses([ADDRESS])
    joined.reload()
    assert joined.addresses == (ADDRESS,)
    assert renew(founder, joined)


def test_an_invite_is_never_renewed(tmp_path: Path) -> None:
    founder = Network.found()
    invite, process = NodeKey.generate(), NodeKey.generate()
    key = founder.issuer.key
    chain = (
        issued(key, key, invite, roles=(), may_issue=("worker",), ends=NOW + HOUR),
        issued(invite, key, process, ends=NOW + HOUR),
    )
    assert founder.renew(chain, NOW) == ()
