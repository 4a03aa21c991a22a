"""The bytes of an encrypted connection: whole whatever pieces they come in, and an error for what is not the peer's."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from noise.connection import Keypair, NoiseConnection  # type: ignore[import-untyped]
from trio.testing import trio_test

from tether.errors import LinkClosed
from tether.noise_stream import MAX_MESSAGE_BYTES, TAG_BYTES, NoiseStream


def ciphers() -> tuple[NoiseConnection, NoiseConnection]:
    """Both ends of a Noise session, as libp2p's handshake leaves them."""
    ends = (
        NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256"),
        NoiseConnection.from_name(b"Noise_XX_25519_ChaChaPoly_SHA256"),
    )
    for end, begin in zip(ends, (NoiseConnection.set_as_initiator, NoiseConnection.set_as_responder), strict=True):
        begin(end)
        end.set_keypair_from_private_bytes(Keypair.STATIC, os.urandom(32))
        end.start_handshake()
    one, other = ends
    other.read_message(one.write_message())
    one.read_message(other.write_message())
    other.read_message(one.write_message())
    return one, other


class Piecemeal(trio.abc.Stream):
    """A stream that brings a few bytes at a time, and keeps what is sent."""

    def __init__(self, received: bytes = b"", size: int = 1) -> None:
        self.received = received
        self.sent = bytearray()
        self._size = size

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        size = min(self._size, max_bytes or self._size)
        piece, self.received = self.received[:size], self.received[size:]
        return piece

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def sealed(cipher: NoiseConnection, *plain: bytes) -> bytes:
    raw = Piecemeal()
    stream = NoiseStream(raw, cipher)
    for each in plain:
        await stream.write(each)
    return bytes(raw.sent)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1 << 20])
@trio_test
async def test_bytes_are_whole_whatever_pieces_they_come_in(size: int) -> None:
    one, other = ciphers()
    stream = NoiseStream(Piecemeal(await sealed(one, b"hello", b"", b", ", b"world"), size), other)
    assert await stream.read(3) == b"hel"
    assert await stream.read(6) == b"lo, wo"
    assert await stream.read(3) == b"rld"


@trio_test
async def test_without_a_number_the_next_bytes_are_read() -> None:
    one, other = ciphers()
    stream = NoiseStream(Piecemeal(await sealed(one, b"hello", b" you"), 1 << 20), other)
    assert await stream.read() == b"hello you"
    with pytest.raises(LinkClosed):
        await stream.read()


@trio_test
async def test_what_is_longer_than_a_message_travels_in_several() -> None:
    one, other = ciphers()
    data = os.urandom(3 * MAX_MESSAGE_BYTES)
    wire = await sealed(one, data)
    assert len(wire) == len(data) + 4 * (2 + TAG_BYTES)
    assert await NoiseStream(Piecemeal(wire, 4096), other).read(len(data)) == data


@trio_test
async def test_at_the_end_there_is_what_was_left_and_then_an_error() -> None:
    one, other = ciphers()
    stream = NoiseStream(Piecemeal(await sealed(one, b"last") + b"\x00\x30cut"), other)
    assert await stream.read(12) == b"last"
    with pytest.raises(LinkClosed):
        await stream.read(12)


@trio_test
async def test_a_message_that_was_changed_on_its_way_is_an_error() -> None:
    one, other = ciphers()
    wire = bytearray(await sealed(one, b"hello"))
    wire[4] ^= 1
    with pytest.raises(Exception, match="authentication"):
        await NoiseStream(Piecemeal(bytes(wire)), other).read(5)


@trio_test
async def test_a_closed_stream_takes_no_bytes() -> None:
    one, _ = ciphers()
    near, far = trio.testing.memory_stream_pair()
    await far.aclose()
    await near.aclose()
    with pytest.raises(LinkClosed):
        await NoiseStream(near, one).write(b"hello")
    with pytest.raises(LinkClosed):
        await NoiseStream(near, one).read(5)
