"""The bytes of an encrypted connection, in few steps: reads ahead, opens and seals Noise messages as they lie there.

libp2p reads each message from the socket in two calls and through four layers, each with a lock or a checkpoint of its
own; what a link sends is small, so that costs more than the encryption. The bytes on the wire are the same.
"""

from __future__ import annotations

from typing import Protocol

import trio

from tether.errors import LinkClosed

READ_BYTES = 1 << 16
MAX_MESSAGE_BYTES = (1 << 16) - 1
"""Of a Noise message, by its specification (section 3)."""
TAG_BYTES = 16
_MAX_PLAIN_BYTES = MAX_MESSAGE_BYTES - TAG_BYTES


class Cipher(Protocol):
    """Both directions of a session after its handshake, message by message and in order."""

    def encrypt(self, data: bytes) -> bytes:
        """Return a message sealed."""
        ...

    def decrypt(self, data: bytes) -> bytes:
        """Return a message opened; raise where it is not the peer's next one."""
        ...


class NoiseStream:
    """Plain bytes over a stream of Noise messages. One task may read and one may write."""

    def __init__(self, stream: trio.abc.Stream, cipher: Cipher) -> None:
        self._stream = stream
        self._cipher = cipher
        self._sealed = bytearray()
        self._plain = bytearray()

    async def read(self, num_bytes: int | None = None) -> bytes:
        """Return that many bytes, or those that there were before the stream ended; None: the next ones, one or more.

        Raises `LinkClosed` at the end, and what the cipher raises for a message that is not the peer's.
        """
        plain = self._plain
        while len(plain) < (num_bytes or 1):
            if not await self._fill():
                if plain:
                    break
                raise LinkClosed("the connection ended")
        data = bytes(memoryview(plain)[:num_bytes])
        del plain[: len(data)]
        return data

    async def write(self, data: bytes) -> None:
        """Return when the stream has taken all of `data`; raise `LinkClosed` when it cannot."""
        sealed = bytearray()
        for start in range(0, len(data), _MAX_PLAIN_BYTES):
            message = self._cipher.encrypt(data[start : start + _MAX_PLAIN_BYTES])
            sealed += len(message).to_bytes(2, "big") + message
        try:
            await self._stream.send_all(sealed)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise LinkClosed(f"the connection ended: {exc}") from exc

    async def _fill(self) -> bool:
        """Open the messages that the next piece completes; False at the end of the stream."""
        try:
            piece = await self._stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        sealed = self._sealed
        sealed += piece
        start = 0
        while len(sealed) >= (begin := start + 2) and len(sealed) >= (
            end := begin + int.from_bytes(sealed[start:begin], "big")
        ):
            self._plain += self._cipher.decrypt(bytes(sealed[begin:end]))
            start = end
        del sealed[:start]
        return bool(piece)
