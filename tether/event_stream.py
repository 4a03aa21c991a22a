"""An HTTP answer of server-sent events: written as they come, with a comment after each silence, until its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tether.telling import COMMENT


class EventStream(Response):
    """The answer; `portions` are closed when it is over, however it ends.

    One task for the whole stream, which awaits nothing but the next portion and its writing: tasks, timers and layers of
    generators that each portion passes cost more than the portion.
    """

    media_type = "text/event-stream"

    def __init__(
        self, portions: AsyncGenerator[bytes, None], headers: Mapping[str, str], *, silence_seconds: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers(headers)
        self._portions = portions
        self._silence_seconds = silence_seconds
        self._writing = asyncio.Lock()
        self._wrote_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as ASGI has it
        """Answer; a client that leaves closes `portions`."""
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._wrote_at = loop.time()
        writing = loop.create_task(self._write_all(send))
        leaving = loop.create_task(client_left(receive))
        try:
            while not writing.done() and not leaving.done():
                silence = self._wrote_at + self._silence_seconds - loop.time()
                if silence > 0:
                    await asyncio.wait((writing, leaving), timeout=silence, return_when=asyncio.FIRST_COMPLETED)
                elif self._writing.locked():  # the client does not read
                    self._wrote_at = loop.time()
                else:
                    await self._write(send, COMMENT)
            if writing.done():
                writing.result()
        finally:
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write_all(self, send: Send) -> None:
        async with contextlib.aclosing(self._portions) as portions:
            async for portion in portions:
                if portion:
                    await self._write(send, portion)
        await self._write(send, b"", more=False)

    async def _write(self, send: Send, portion: bytes, *, more: bool = True) -> None:
        async with self._writing:
            await send({"type": "http.response.body", "body": portion, "more_body": more})
        self._wrote_at = asyncio.get_running_loop().time()


async def client_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        continue
