from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import pytest
import trio

from tether.bridge import Bridge, Outlet
from tether.errors import Draining, JobNotFound

P = ParamSpec("P")


def in_asyncio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run an async test under asyncio, with a bound."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


class Peers:
    """A main for the bridge, and things to call on its side."""

    def __init__(self) -> None:
        self.crash: trio.Event
        self.began = threading.Event()
        self.was_cancelled = threading.Event()
        self.num_put = 0
        self.grace: trio.Event | None = None
        self.is_finished = False

    async def main(self, stop: trio.Event, *, task_status: trio.TaskStatus[str]) -> None:
        self.crash = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._crash)
            task_status.started("peers")
            await stop.wait()
            if self.grace is not None:
                await self.grace.wait()
            self.is_finished = True
            nursery.cancel_scope.cancel()

    async def _crash(self) -> None:
        await self.crash.wait()
        raise RuntimeError("a crash")

    async def double(self, number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async def where(self) -> tuple[str, bool]:
        await trio.lowlevel.checkpoint()
        return threading.current_thread().name, trio.lowlevel.in_trio_run()

    async def fail(self) -> None:
        await trio.lowlevel.checkpoint()
        raise JobNotFound("no such job")

    async def crash_now(self) -> None:
        self.crash.set()
        await trio.sleep_forever()

    async def hang(self) -> None:
        self.began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.was_cancelled.set()

    async def count(self, outlet: Outlet[int], to: int) -> None:
        try:
            for number in range(to):
                if outlet.room == 0:
                    outlet.on_room = (room := trio.Event()).set
                    await room.wait()
                self.num_put += 1
                outlet.put([number])
                await trio.lowlevel.checkpoint()
        finally:
            self.was_cancelled.set()

    async def count_then_hang(self, outlet: Outlet[int], to: int) -> None:
        outlet.put(range(to))
        await self.hang()

    async def count_then_fail(self, outlet: Outlet[int], to: int) -> None:
        outlet.put(range(to))
        await self.fail()


async def until_set(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


# --- calls -----------------------------------------------------------------------------------------------------------


@in_asyncio
async def test_a_call_runs_on_trio_in_its_own_thread_and_its_value_comes_back() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        assert bridge.started == "peers"
        assert await bridge.call(peers.double, 21) == 42
        assert await bridge.call(peers.where) == ("tether-peers", True)
        assert await asyncio.gather(*(bridge.call(peers.double, n) for n in range(100))) == list(range(0, 200, 2))
    assert peers.is_finished


@in_asyncio
async def test_an_error_of_a_call_is_raised_where_it_is_awaited_and_harms_nothing_else() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        with pytest.raises(JobNotFound, match="no such job"):
            await bridge.call(peers.fail)
        assert await bridge.call(peers.double, 1) == 2


@in_asyncio
async def test_a_caller_that_is_cancelled_cancels_what_it_called() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        task = asyncio.create_task(bridge.call(peers.hang))
        await until_set(peers.began)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_set(peers.was_cancelled)
        assert await bridge.call(peers.double, 1) == 2


@in_asyncio
async def test_a_caller_that_is_cancelled_before_its_call_began_cancels_it_too() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        tasks = [asyncio.create_task(bridge.call(peers.hang)) for _ in range(50)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        assert await bridge.call(peers.double, 1) == 2
        nursery = bridge._nursery
        assert nursery is not None
        while nursery.child_tasks:
            await bridge.call(peers.double, 1)


# --- streams ---------------------------------------------------------------------------------------------------------


@in_asyncio
async def test_a_stream_yields_all_in_order_and_ends() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        assert [item async for items in bridge.stream(peers.count, 1000) for item in items] == list(range(1000))
        await until_set(peers.was_cancelled)


@in_asyncio
async def test_an_error_of_a_stream_comes_after_its_items() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        stream = bridge.stream(peers.count_then_fail, 3)
        assert await anext(stream) == [0, 1, 2]
        with pytest.raises(JobNotFound):
            await anext(stream)


@in_asyncio
async def test_a_slow_reader_holds_the_stream_back() -> None:
    peers = Peers()
    async with Bridge[str](peers.main, window=8) as bridge:
        stream = bridge.stream(peers.count, 1000)
        taken = await anext(stream)
        for _ in range(20):
            await bridge.call(peers.double, 1)
        assert peers.num_put == 8, "as many as may be on their way"
        while len(taken) < 9:
            taken += await anext(stream)
        assert taken == list(range(len(taken)))
        await stream.aclose()
        await until_set(peers.was_cancelled)


@in_asyncio
async def test_a_reader_that_leaves_cancels_its_stream() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        stream = bridge.stream(peers.count_then_hang, 1)
        assert await anext(stream) == [0]
        await until_set(peers.began)
        await stream.aclose()
        await until_set(peers.was_cancelled)


@in_asyncio
async def test_a_stream_that_is_left_is_cancelled_for_the_reason_that_is_told_then() -> None:
    reasons: list[str | None] = []
    peers = Peers()
    was_told = threading.Event()

    async def hang(outlet: Outlet[int]) -> None:
        outlet.put([0])
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            reasons.append(exc.reason)
            raise
        finally:
            was_told.set()

    async with Bridge[str](peers.main) as bridge:
        stream = bridge.stream(hang, why=lambda: "its key ended")
        assert await anext(stream) == [0]
        await stream.aclose()
        await until_set(was_told)
    assert reasons == ["its key ended"]


@in_asyncio
async def test_a_reader_that_is_cancelled_while_it_waits_cancels_its_stream() -> None:
    peers = Peers()
    async with Bridge[str](peers.main) as bridge:
        stream = bridge.stream(peers.count_then_hang, 0)
        task = asyncio.create_task(anext(stream))
        await until_set(peers.began)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_set(peers.was_cancelled)


# --- the end ---------------------------------------------------------------------------------------------------------


@in_asyncio
async def test_a_crash_on_trio_fails_what_is_under_way_and_says_why() -> None:
    peers = Peers()

    async def story() -> None:
        async with Bridge[str](peers.main) as bridge:
            call = asyncio.create_task(bridge.call(peers.hang))
            stream = asyncio.create_task(anext(bridge.stream(peers.count_then_hang, 0)))
            await until_set(peers.began)
            with pytest.raises(Draining):
                await bridge.call(peers.crash_now)
            with pytest.raises(Draining):
                await call
            with pytest.raises(Draining):
                await stream
            with pytest.raises(Draining):
                await bridge.call(peers.double, 1)

    with pytest.raises(ExceptionGroup) as caught:
        await story()
    assert caught.group_contains(RuntimeError, match="a crash", depth=None)


@in_asyncio
async def test_an_error_before_the_start_is_raised_at_the_start() -> None:
    async def main(_stop: trio.Event, *, task_status: trio.TaskStatus[str]) -> None:
        del task_status
        await trio.lowlevel.checkpoint()
        raise JobNotFound("no start")

    bridge = Bridge[str](main)
    with pytest.raises((JobNotFound, ExceptionGroup)):
        await bridge.__aenter__()
    bridge._thread.join(10)
    assert not bridge._thread.is_alive()


@in_asyncio
async def test_stopping_fails_what_is_under_way_and_main_has_its_own_time_to_end() -> None:
    peers = Peers()
    bridge = Bridge[str](peers.main)
    async with bridge:
        peers.grace = trio.Event()
        call = asyncio.create_task(bridge.call(peers.hang))
        await until_set(peers.began)
        bridge.stop()
        bridge.stop()
        with pytest.raises(Draining):
            await call
        with pytest.raises(Draining):
            await bridge.call(peers.double, 1)
        with pytest.raises(Draining):
            await anext(bridge.stream(peers.count, 1))
        assert not bridge.done.done()
        assert bridge._token is not None
        bridge._token.run_sync_soon(peers.grace.set)
        await bridge.done
    assert peers.is_finished
    with pytest.raises(Draining):
        await bridge.call(peers.double, 1)


@in_asyncio
async def test_a_main_that_ends_by_itself_ends_the_bridge() -> None:
    async def main(_stop: trio.Event, *, task_status: trio.TaskStatus[str]) -> None:
        task_status.started("brief")
        await trio.lowlevel.checkpoint()

    async with Bridge[str](main) as bridge:
        await bridge.done


@in_asyncio
async def test_an_error_of_the_block_is_the_one_that_is_raised() -> None:
    peers = Peers()

    async def story() -> None:
        async with Bridge[str](peers.main):
            raise KeyError

    with pytest.raises(KeyError):
        await story()
    assert peers.is_finished
