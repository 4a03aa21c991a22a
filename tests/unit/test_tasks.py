"""Work that comes to a part which has ended."""

from __future__ import annotations

import pytest
import trio

from tether.tasks import start_if_open
from tether.testing import in_trio


@in_trio()
async def test_a_task_runs_in_an_open_nursery_and_is_dropped_by_one_that_has_ended() -> None:
    ran: list[str] = []

    async def task(name: str) -> None:
        ran.append(name)
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        start_if_open(nursery, task, "open")
    start_if_open(nursery, task, "ended")
    assert ran == ["open"]


@in_trio()
async def test_what_a_task_itself_raises_is_not_dropped() -> None:
    async def task() -> None:
        await trio.lowlevel.checkpoint()
        raise RuntimeError("a mistake")

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="a mistake")):
        async with trio.open_nursery() as nursery:
            start_if_open(nursery, task)
