"""Where the orchestrators of one data directory listen at present, for the other processes there."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from tether.data_dir import data_dir_error, locked, write_temporary
from tether.errors import DataDirError


class _AddressFile(msgspec.Struct, frozen=True):
    addresses: tuple[str, ...]


class AddressBook:
    """Where the orchestrators of one data directory listen at present: `run/<peer id>.json`.

    Each entry is locked by the process that it speaks of, for as long as that lives; the lock is the kernel's, so it ends
    with the process in whatever way. An entry that nobody holds is of a process that was killed: it is dropped.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._dir = data_dir / "run"

    @contextlib.contextmanager
    def listed(self, peer_id: str, addresses: Iterable[str]) -> Iterator[None]:
        """List an orchestrator for as long as the block runs; raise `DataDirError` where that cannot be written."""
        path = self._dir / f"{peer_id}.json"
        with contextlib.ExitStack() as stack:
            try:
                temporary = write_temporary(path, msgspec.json.encode(_AddressFile(tuple(addresses))))
                fd = os.open(temporary, os.O_RDONLY)
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)  # before anybody can see it without
                with locked(self._data_dir):
                    temporary.replace(path)
            except OSError as exc:
                raise data_dir_error(path, exc) from exc
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def read(self) -> tuple[str, ...]:
        """Return all addresses, those of the orchestrator that started last first; unreadable files are skipped."""
        found: list[tuple[float, tuple[str, ...]]] = []
        for path in self._dir.glob("[!.]*.json"):
            # A file may vanish or be half of another version's while it is read: it is only a hint where to dial.
            with (
                contextlib.suppress(OSError, DataDirError, msgspec.MsgspecError, UnicodeDecodeError),
                path.open("rb") as file,
            ):
                if _is_held(file.fileno()):
                    entry = msgspec.json.decode(file.read(), type=_AddressFile)
                    found.append((os.fstat(file.fileno()).st_mtime, entry.addresses))
                else:
                    self._drop(path, file.fileno())
        found.sort(key=lambda entry: entry[0], reverse=True)
        return tuple(dict.fromkeys(address for _, addresses in found for address in addresses))

    def _drop(self, path: Path, fd: int) -> None:
        with locked(self._data_dir):
            # Unless its orchestrator has started again meanwhile: then the name is another file's by now.
            if os.path.samestat(os.fstat(fd), path.stat()):
                path.unlink()


def _is_held(fd: int) -> bool:
    """Whether another process, or another opening of the file in this one, holds a lock on it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
