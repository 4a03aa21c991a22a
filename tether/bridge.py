"""The one crossing between asyncio (HTTP) and trio (peers): trio runs in a thread of its own.

`Bridge` starts the thread, `call` runs one async function there and awaits its result here, `stream` yields what one
puts out there, with back-pressure. A cancelled caller cancels what it started on the other side; when trio ends, calls
under way fail with `Draining` and `done` says why it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import outcome
import trio

from tether.errors import Draining
from tether.tasks import start_if_open

T = TypeVar("T")
R = TypeVar("R")


class Outlet(Generic[T]):
    """Where what runs on trio puts the items of a stream. It never blocks: who has more than there is room for waits."""

    def __init__(self, cross: Callable[[Sequence[T]], None], room: int) -> None:
        self.room = room
        """How many more it takes now."""
        self.on_room: Callable[[], None] = _nothing
        """Called when there is more room."""
        self._cross = cross

    def put(self, items: Sequence[T]) -> None:
        """Send items on their way."""
        self.room -= len(items)
        self._cross(items)

    def give_back(self, num_items: int) -> None:
        """So many items have arrived."""
        self.room += num_items
        self.on_room()


def _nothing() -> None:
    pass


class _Inlet:
    """The other end, on asyncio: what has arrived."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.is_over = False
        self._loop = loop
        self._arrived: list[Any] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, items: Sequence[Any]) -> None:
        self._arrived += items
        self._wake()

    def end(self, error: Exception | None) -> None:
        self.is_over, self._error = True, error
        self._wake()

    async def take(self) -> list[Any]:
        """Return all that has arrived, one item at least; nothing at the end. Raises what ended it, after all items."""
        while not self._arrived and not self.is_over:
            self._waiter = self._loop.create_future()
            await self._waiter
        items, self._arrived = self._arrived, []
        if not items and self._error is not None:
            raise self._error
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Bridge(Generic[R]):
    """Run `main(stop, task_status=…)` on trio in a thread; what it reports as started is `started`.

    `main` returns soon after `stop` (a `trio.Event`) is set; it owns the graceful part of stopping.
    """

    def __init__(self, main: Callable[..., Awaitable[None]], *, window: int = 64) -> None:
        self._main = main
        self._window = window
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._crossing: deque[Callable[[], object]] = deque()
        self._is_called = False
        self._stop: trio.Event | None = None

    async def __aenter__(self) -> Bridge[R]:
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[R] = self._loop.create_future()
        self.done: asyncio.Future[None] = self._loop.create_future()
        """Resolves when trio has ended, with the error that ended it."""
        self._thread = threading.Thread(target=self._run_thread, name="tether-peers", daemon=True)
        self._thread.start()
        self.started: R = await asyncio.shield(self._ready)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        # A caller's own error says more than what trio says of being stopped because of it.
        if error is None:
            await asyncio.shield(self.done)
        else:
            await asyncio.wait([self.done])
            if not self.done.cancelled():
                self.done.exception()

    def stop(self) -> None:
        """Ask `main` to stop; `done` resolves when it has."""
        if self._token is not None and self._stop is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._stop.set)

    async def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Await `function(*args)` on trio."""
        future: asyncio.Future[T] = self._loop.create_future()
        scope = trio.CancelScope()

        async def task() -> None:
            error: Exception | None = Draining()
            try:
                with scope:
                    self._resolve(future, await function(*args))
                    error = None
            except Exception as exc:  # noqa: BLE001 - it is the caller's: it crosses with its traceback
                error = exc
            finally:
                if error is not None:
                    self._reject(future, error)

        self._spawn(task, lambda: self._reject(future, Draining()))
        try:
            return await future
        except asyncio.CancelledError:
            self._cancel(scope)
            raise

    async def stream(
        self, function: Callable[..., Awaitable[None]], *args: Any, why: Callable[[], str | None] = lambda: None
    ) -> AsyncGenerator[list[Any], None]:
        """Yield what `function(outlet, *args)` puts into its outlet on trio, all that has come at a time, until it returns.

        At most `window` items are on their way. Closed before, it cancels the function, for the reason that `why` tells then.
        """
        inlet = _Inlet(self._loop)
        outlet = Outlet[Any](lambda items: self._cross(partial(inlet.put, items)), self._window)
        scope = trio.CancelScope()

        def end(error: Exception | None) -> None:
            self._cross(partial(inlet.end, error))

        async def task() -> None:
            error: Exception | None = Draining()
            try:
                with scope:
                    await function(outlet, *args)
                error = None
            except Exception as exc:  # noqa: BLE001 - it is the caller's: it crosses with its traceback
                error = exc
            finally:
                end(error)

        self._spawn(task, lambda: end(Draining()))
        # Waking the other thread costs more than an item, so room is given back in halves of the window.
        num_taken = 0
        try:
            while items := await inlet.take():
                yield items
                num_taken += len(items)
                if num_taken >= self._window // 2:
                    self._post(partial(outlet.give_back, num_taken))
                    num_taken = 0
        finally:
            if not inlet.is_over:
                self._cancel(scope, why())

    def _run_thread(self) -> None:
        result = outcome.capture(trio.run, self._run)
        error = result.error if isinstance(result, outcome.Error) else None
        self._reject(self._ready, error or Draining())
        if error is not None:
            self._reject(self.done, error)
        else:
            self._resolve(self.done, None)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        stop = self._stop = trio.Event()

        async def main(task_status: trio.TaskStatus[R]) -> None:
            await self._main(stop, task_status=task_status)
            stop.set()

        async with trio.open_nursery() as outer:
            started: R = await outer.start(main)
            # Calls live in a nursery of their own: the node outlives them while it stops.
            async with trio.open_nursery() as calls:
                self._nursery = calls
                try:
                    self._resolve(self._ready, started)
                    await stop.wait()
                finally:
                    self._nursery = None  # from here on a call is refused
                calls.cancel_scope.cancel()

    def _resolve(self, future: asyncio.Future[T], value: T) -> None:
        self._cross(lambda: None if future.done() else future.set_result(value))

    def _reject(self, future: asyncio.Future[Any], error: BaseException) -> None:
        def reject() -> None:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever awaits it sees it; a caller that left must not log it as lost

        self._cross(reject)

    def _cross(self, function: Callable[[], object]) -> None:
        """Call a function on asyncio, after those before it; waking the other thread is paid once for all that wait."""
        self._crossing.append(function)
        if not self._is_called:
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the asyncio loop has closed: nobody listens
                self._loop.call_soon_threadsafe(self._arrive)

    def _arrive(self) -> None:
        # Before any is taken: whatever is put there from now on calls again, should this miss it.
        self._is_called = False
        for _ in range(len(self._crossing)):
            self._crossing.popleft()()

    def _spawn(self, task: Callable[[], Awaitable[None]], on_dead: Callable[[], None]) -> None:
        def start() -> None:
            if self._nursery is None:
                on_dead()
            else:
                start_if_open(self._nursery, task)

        try:
            if self._token is None:
                raise trio.RunFinishedError
            self._token.run_sync_soon(start)
        except trio.RunFinishedError:
            on_dead()

    def _post(self, function: Callable[[], None]) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)

    def _cancel(self, scope: trio.CancelScope, reason: str | None = None) -> None:
        self._post(partial(scope.cancel, reason))
