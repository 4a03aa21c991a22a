"""A data directory: what is where in it, and files that are private, written whole, and changed by one process at a time.

A data directory holds

    network.key         the network's key, where this machine founded it
    network.json        where it joined one: the network's public key, orchestrators' addresses, this machine's chain
    machine.key         this machine's key, where it joined
    keys/<slot>.key     the key of one process; its public half is the process's peer id
    run/<peer id>.json  where an orchestrator of this directory listens at present

Key files are 32 bytes (the seed), readable by their owner alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from tether.errors import DataDirError

NETWORK_KEY = "network.key"
NETWORK_FILE = "network.json"
MACHINE_KEY = "machine.key"


def prepare_data_dir(data_dir: Path) -> None:
    """Make the data directory (mode 0700) if there is none; raise `DataDirError` where it cannot be used."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise data_dir_error(data_dir, exc) from exc
    if not os.access(data_dir, os.R_OK | os.W_OK | os.X_OK):
        raise DataDirError(f"cannot write to the data directory {data_dir}; use another one with --data-dir")


def data_dir_error(path: Path, exc: OSError) -> DataDirError:
    """Return what to say where a file of a data directory cannot be used."""
    return DataDirError(f"cannot use {path}: {exc.strerror}; use another data directory with --data-dir")


def write_temporary(path: Path, content: bytes) -> Path:
    """Write a private file beside `path`, to take that name when it is whole; raise `OSError` where that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def write_new(path: Path, content: bytes) -> None:
    """Write a private file, unless there is one already; raise `DataDirError` where it cannot be written."""
    # A link fails where the name is taken, and what has the name is whole: nobody can read half a key, and of two
    # processes that make the same key at once one wins and both read the winner's.
    try:
        temporary = write_temporary(path, content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        finally:
            temporary.unlink()
    except OSError as exc:
        raise data_dir_error(path, exc) from exc


def write_over(path: Path, content: bytes) -> None:
    """Write a private file in place of whatever has its name; raise `DataDirError` where it cannot be written."""
    try:
        write_temporary(path, content).replace(path)
    except OSError as exc:
        raise data_dir_error(path, exc) from exc


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock, which one process has at a time; raise `DataDirError` where it cannot be used."""
    path = data_dir / ".lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise data_dir_error(path, exc) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
