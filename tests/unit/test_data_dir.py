from __future__ import annotations

import os
from pathlib import Path

import pytest

from tether.errors import DataDirError
from tether.network import open_network
from tether.node_key import claim_slot


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
