from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tether import node_key
from tether.errors import DataDirError, KeyFileError, ProtocolViolation, UsageError
from tether.node_key import NodeKey, claim_slot, peer_id_of, public_key_of, sign, verify


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
    statement = sign(key, b"state")
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
    monkeypatch.setattr(node_key, "MAX_SLOTS", 1)
    with claim_slot(tmp_path, "worker"), pytest.raises(DataDirError, match="already run as worker"):
        claim_slot(tmp_path, "worker")
