"""Starting a task in a nursery of somebody else, who may be ending at this moment."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVarTuple, Unpack

import trio

Ts = TypeVarTuple("Ts")


def start_if_open(nursery: trio.Nursery, task: Callable[[Unpack[Ts]], Awaitable[object]], *args: *Ts) -> None:
    """Start a task, or drop it if the nursery has ended.

    The parts of a node end together, in any order: one that comes back from a thread, where it can't be cancelled, may bring
    work to another that is gone by then. It is cancelled itself wherever it waits next, so nobody misses the work.
    """
    with contextlib.suppress(RuntimeError):  # "Nursery is closed to new arrivals"; trio has no other way to ask
        nursery.start_soon(task, *args)
