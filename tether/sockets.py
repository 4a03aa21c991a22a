"""Several jobs on one WebSocket, `GET /v1/stream`: started by messages, told by messages, cancelled by messages.

Bounded both ways: a client that does not read stops its jobs' telling, one message each, and reads of its own messages; one
that is silent even to pings is cut off by the server below (http.py). What a socket leaves behind is cancelled, but for jobs
that have an idempotency key or were only resumed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from tether import quotas
from tether.auth import Client
from tether.desk import Desk, Left, Order, Taken, accepted_body
from tether.door import KEY_ENDED, PROTOCOL, client_of, while_key_is_good
from tether.errors import (
    Draining,
    InternalError,
    InvalidKey,
    InvalidRequest,
    JobCancelled,
    JobConflict,
    JobNotFound,
    QueueFull,
    RateLimited,
    TetherError,
    from_info,
)
from tether.job_routes import parse_body
from tether.messages import JobAccepted, JobEnd, JobEvent, JobQueued
from tether.records import Job
from tether.replies import error_response, job_headers, named
from tether.settings import GatewaySettings
from tether.socket_messages import (
    ENVELOPE_BYTES,
    GOING_AWAY,
    POLICY_VIOLATION,
    Cancel,
    Create,
    Ping,
    Resume,
    Unreadable,
    error_message,
    id_of,
    parse,
    read,
)

log = logging.getLogger(__name__)

MAX_UNREADABLE = 8
"""So many messages in a row that are none, and the client is taken for something else."""
LAST_WORDS_SECONDS = 2.0
"""How long a socket that is being closed may take to read why."""

_GONE = (WebSocketDisconnect, WebSocketDisconnected)
"""How a send says that nobody is there: the first one, and those after it."""

Take = Callable[[], Awaitable[Taken]]

Close = tuple[int, str]
"""The code and the reason with which a socket is closed."""


class Sockets:
    """The open sockets of a gateway; `stopping` lets them end their jobs and take no new ones."""

    def __init__(self, desk: Desk, settings: GatewaySettings, stopping: asyncio.Event) -> None:
        self._desk = desk
        self._settings = settings
        self._stopping = stopping
        self._num_open = 0

    async def serve(self, websocket: WebSocket) -> None:
        """Serve a socket to its end; one too many is refused as a request would be."""
        if self._stopping.is_set():
            await error_response(Draining())(websocket.scope, websocket.receive, websocket.send)
            return
        if self._num_open >= self._settings.max_sockets:
            error = QueueFull(f"this gateway has {self._num_open} sockets open, which is all it takes; try again soon")
            await error_response(error)(websocket.scope, websocket.receive, websocket.send)
            return
        self._num_open += 1
        try:
            await _Socket(websocket, self._desk, self._settings, self._stopping).run()
        finally:
            self._num_open -= 1


class _Open:
    """A job on a socket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.job: Job | None = None
        self.accepted = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.cancelling: asyncio.Task[None] | None = None


class _Socket:
    """One socket: a reader, a task for each job, and whoever sends has the lock."""

    def __init__(self, websocket: WebSocket, desk: Desk, settings: GatewaySettings, stopping: asyncio.Event) -> None:
        self._websocket = websocket
        self._desk = desk
        self._settings = settings
        self._stopping = stopping
        self._client: Client = client_of(websocket)
        self._jobs: dict[str, _Open] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Serve the socket until its client leaves, its key ends, or the gateway stops and its jobs have ended."""
        offered = self._websocket.scope.get("subprotocols", ())
        await self._websocket.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        key_ended = asyncio.Event()
        reading = asyncio.create_task(self._read())
        try:
            with while_key_is_good(self._websocket.scope, key_ended.set):
                await _first(reading, key_ended, self._stopping)
                if not reading.done() and not key_ended.is_set():
                    await _first(reading, key_ended, self._idle)
            if key_ended.is_set():
                error = InvalidKey(KEY_ENDED)
                await self._close((POLICY_VIOLATION, error.message), error)
            else:
                await self._close(reading.result() if reading.done() else (GOING_AWAY, "the gateway is stopping"))
        finally:
            reading.cancel()
            await self._end_jobs()
            await asyncio.gather(reading, return_exceptions=True)

    # --- what the client says ----------------------------------------------------------------------------------------

    async def _read(self) -> Close | None:
        """Handle the client's messages; return how to close the socket, or None where the client has left."""
        num_unreadable = 0
        max_bytes = self._settings.max_body_bytes + ENVELOPE_BYTES
        with contextlib.suppress(*_GONE):
            async for frame in self._frames():
                try:
                    value = read(frame, max_bytes)
                except Unreadable as exc:
                    num_unreadable += 1
                    if num_unreadable >= MAX_UNREADABLE:
                        return exc.code, exc.error.message
                    await self._send(error_message(exc.error))
                else:
                    num_unreadable = 0
                    await self._handle(value)
        return None

    async def _frames(self) -> AsyncGenerator[str | bytes, None]:
        while (message := await self._websocket.receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            yield message.get("bytes") or b"" if text is None else text

    async def _handle(self, value: Any) -> None:
        """Do what a message says; say why not."""
        name = id_of(value)
        if name in self._jobs:
            name = None  # an error with this id would be taken for that job's end
        try:
            match parse(value):
                case Ping():
                    await self._send({"type": "pong"})
                case Cancel() as cancel:
                    self._cancel(cancel.id)
                case Create() as create:
                    self._begin(create.id, partial(self._create, create))
                case Resume() as resume:
                    self._begin(resume.id, partial(self._resume, resume), is_resumed=True)
        except TetherError as exc:
            await self._send(error_message(exc, name))

    def _begin(self, name: str, take: Take, *, is_resumed: bool = False) -> None:
        """Start a job; raise why it is not."""
        if name in self._jobs:
            raise InvalidRequest(f"the id {name!r} is that of a job that has not ended here", param="id")
        if self._stopping.is_set():
            raise Draining
        if len(self._jobs) >= self._settings.max_jobs_per_socket:
            raise RateLimited(
                f"this socket has {len(self._jobs)} jobs open, which is all it may; wait for one to end",
                retry_after_seconds=1.0,
            )
        opened = self._jobs[name] = _Open(name)
        self._idle.clear()
        opened.task = asyncio.create_task(self._run(opened, take, is_resumed=is_resumed))

    async def _create(self, create: Create) -> Taken:
        body = parse_body(create.url, create.body)
        key, after = create.idempotency_key, create.after
        return await self._desk.take(Order(create.url, body, self._client, key, after, "after", "idempotency_key"))

    async def _resume(self, resume: Resume) -> Taken:
        tenant_id = self._client.tenant_to_see(resume.tenant_id, job_id=resume.job_id)
        usage = resume.include_usage
        return await self._desk.resume(resume.job_id, tenant_id, resume.after, "after", include_usage=usage)

    def _cancel(self, name: str) -> None:
        opened = self._jobs.get(name)
        if opened is None:
            raise JobNotFound(f"there is no job with the id {name!r} on this socket", param="id")
        if opened.cancelling is None:
            opened.cancelling = asyncio.create_task(self._cancel_job(opened))

    async def _cancel_job(self, opened: _Open) -> None:
        """Cancel a job as soon as the network has it; its end is told as any other."""
        await opened.accepted.wait()
        if opened.job is None:
            return
        with contextlib.suppress(*_GONE):
            try:
                await self._desk.cancel(opened.job)
            except JobConflict as exc:
                log.debug("job %s is not cancelled: %s", opened.job.id, exc.message)  # it has ended by itself
            except TetherError as exc:
                opened.cancelling = None  # it goes on, and may be cancelled again
                await self._send(error_message(exc, None, opened.job.id))

    # --- what the gateway says ---------------------------------------------------------------------------------------

    async def _run(self, opened: _Open, take: Take, *, is_resumed: bool) -> None:
        """Tell a job from its acceptance to its end."""
        with contextlib.suppress(*_GONE):  # the reader sees that too
            try:
                last = await self._tell_to_end(opened, take, is_resumed=is_resumed)
            except _GONE:
                raise
            except Exception:  # also where what would be the last message cannot be written
                log.exception("a job on a socket failed")
                last = _text_of(_error_of(opened, InternalError()))
            async with self._sending:
                self._forget(opened)  # from here on the client may use the id again
                await self._websocket.send_text(last)

    async def _tell_to_end(self, opened: _Open, take: Take, *, is_resumed: bool) -> str:
        """Tell a job's events; return the last message, which says how it ended or why it failed."""
        try:
            return _text_of(await self._tell(opened, take, is_resumed=is_resumed))
        except TetherError as exc:
            return _text_of(_error_of(opened, exc))

    async def _tell(self, opened: _Open, take: Take, *, is_resumed: bool) -> dict[str, Any]:
        """Tell a job's events; return the last one that says how it ended. Raises why it failed."""
        taken = await take()
        job = opened.job = taken.job
        if isinstance(taken, Left):
            acceptance = await self._desk.submit(taken)
            await self._say_accepted(opened, taken, acceptance)
            await self._send({"type": "event", "id": opened.name, "data": accepted_body(taken, acceptance)})
            return {"type": "done", "id": opened.name, "job_id": job.id}
        streams = is_resumed or job.stream
        async with contextlib.aclosing(taken.batches) as batches:
            async for events in batches:
                for event in events:
                    if not isinstance(event, JobEnd) or event.error is None:
                        await self._say_accepted(opened, taken, event)
                    await self._say(opened, taken, event, streams=streams)
        end = taken.telling.end
        if end is None:
            raise JobCancelled
        if end.error is not None:
            raise named(from_info(end.error), taken.telling.fields)
        if not streams:
            await self._send({"type": "event", "id": opened.name, "data": taken.telling.body()})
        return {"type": "done", "id": opened.name, "job_id": job.id, "attempts": end.attempt}

    async def _say_accepted(self, opened: _Open, taken: Taken, event: JobEvent) -> None:
        if opened.accepted.is_set():
            return
        opened.accepted.set()
        limits = event.limits if isinstance(event, JobAccepted) else None
        headers = {**job_headers(taken.job), **taken.headers, **quotas.headers(limits)}
        await self._send({"type": "accepted", "id": opened.name, "job_id": taken.job.id, "headers": headers})

    async def _say(self, opened: _Open, taken: Taken, event: JobEvent, *, streams: bool) -> None:
        if isinstance(event, JobQueued):
            message: dict[str, Any] = {"type": "queued", "id": opened.name, "place": event.place}
            message["deadline_seconds"] = round(event.deadline_seconds, 1)
            await self._send({**message, "expected_seconds": event.expected_seconds})
        elif not streams:
            taken.telling.add(event)
        else:
            for told in taken.telling.events(event):
                message = {"type": "event", "id": opened.name}
                if told.id is not None:
                    message["event_id"] = told.id
                await self._send({**message, "data": told.data})

    async def _send(self, message: dict[str, Any]) -> None:
        """Send a message, when those before it are sent and the client has room for one."""
        text = _text_of(message)
        async with self._sending:
            await self._websocket.send_text(text)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _forget(self, opened: _Open) -> None:
        if self._jobs.get(opened.name) is opened:
            del self._jobs[opened.name]
        if opened.cancelling is not None:
            opened.cancelling.cancel()
        if not self._jobs:
            self._idle.set()

    async def _end_jobs(self) -> list[str]:
        """End the tasks of all jobs, which cancels those that nobody comes back for; return their ids."""
        ended = list(self._jobs.values())
        tasks = [task for opened in ended for task in (opened.task, opened.cancelling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for opened in ended:
            self._forget(opened)
        return [opened.name for opened in ended]

    async def _close(self, close: Close | None, error: TetherError | None = None) -> None:
        """End all jobs, with an error where there is one to tell, and close the socket; the client may be gone."""
        names = await self._end_jobs()
        if close is None:
            return
        code, reason = close
        with contextlib.suppress(*_GONE, TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                if error is not None:
                    await self._send_errors(error, names)
                await self._websocket.close(code, _reason(reason))

    async def _send_errors(self, error: TetherError, names: list[str]) -> None:
        """Say what ended these jobs; where there is none, what ends the socket."""
        for name in names:
            await self._send(error_message(error, name))
        if not names:
            await self._send(error_message(error))


async def _first(*waited: asyncio.Task[Any] | asyncio.Event) -> None:
    """Wait until one of these is done or set."""
    tasks = [asyncio.create_task(each.wait()) for each in waited if isinstance(each, asyncio.Event)]
    try:
        others = [each for each in waited if isinstance(each, asyncio.Task)]
        await asyncio.wait([*tasks, *others], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _error_of(opened: _Open, error: TetherError) -> dict[str, Any]:
    """Return the message that an error is the end of a job."""
    return error_message(error, opened.name, opened.job.id if opened.job is not None else None)


def _text_of(message: dict[str, Any]) -> str:
    return msgspec.json.encode(message).decode()


def _reason(text: str) -> str:
    """Return a reason that fits into a close frame, which has 123 bytes for it."""
    return text.encode()[:123].decode(errors="ignore")
