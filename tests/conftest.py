"""What all tests share: a machine with real processes of Tether, and a real rqlited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.processes import Machine
from tests.rqlited import Rqlited, running

# How long an example takes says how busy the machine is, and nothing about what is tested.
settings.register_profile("tether", deadline=None)
settings.load_profile("tether")


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine of its own: a data directory, free ports, processes that end with the test."""
    with Machine(tmp_path / "machine") as found:
        yield found


@pytest.fixture(scope="session")
def rqlited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rqlited]:
    """One rqlited for all tests that only need any; its tables may hold what others left."""
    with running(tmp_path_factory.mktemp("rqlited")) as node:
        yield node
