"""What the tests of libp2p share: nodes on loopback, hosts as the library makes them, peers in processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self, cast

import multiaddr
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as Noise

from tether.dialling import Dialler
from tether.identity import Identity
from tether.link import Link, LinkSettings
from tether.links import Links
from tether.messages import LinkMessage
from tether.network import Issuer, Network
from tether.node_key import NodeKey
from tether.records import Role
from tether.transport import Libp2pTransport
from tether.wire import Stream

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ROOT = Path(__file__).parents[1]


class Changes:
    """Lets a test wait until something is true, without sleeping."""

    def __init__(self) -> None:
        self._changed = trio.Event()

    def note(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.wait()


class StreamPeer:
    """A transport that admits every stream, and keeps what came."""

    def __init__(self, key: NodeKey | None = None, *, admits: bool = True, **options: Any) -> None:
        options.setdefault("listen", [LOOPBACK])
        self.transport = Libp2pTransport(key or NodeKey.generate(), **options)
        self.admits = admits
        self.streams: list[Stream] = []
        self.data: list[bytes] = []
        self.num_ended = 0
        self.changes = Changes()

    @property
    def address(self) -> str:
        return self.transport.addresses[0]

    async def on_stream(self, stream: Stream) -> None:
        if self.admits:
            self.transport.admit(stream)
        self.streams.append(stream)
        self.changes.note()
        while data := await stream.read():
            self.data.append(data)
            self.changes.note()
        self.num_ended += 1
        self.changes.note()

    async def dial(self, other: StreamPeer) -> Stream:
        """Dial and admit, as a link does, and wait until the other side has the stream too."""
        before = len(other.streams)
        stream = await self.transport.dial(other.address)
        self.transport.admit(stream)
        await other.changes.until(lambda: len(other.streams) > before)
        return stream


@contextlib.asynccontextmanager
async def running(*peers: StreamPeer) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for peer in peers:
            await nursery.start(peer.transport.run, peer.on_stream)
        yield nursery
        nursery.cancel_scope.cancel()


async def until_heard(
    news: trio.MemoryReceiveChannel[tuple[str, bytes]], origin: StreamPeer, payload: bytes, *, topic: str = "news"
) -> list[tuple[str, bytes]]:
    """Publish until `news` has it: gossip is lossy until the next heartbeat has put peers into the mesh, so real news repeat too.

    Returns what came before; a repetition may still come after.
    """
    transport = origin.transport

    async def publish() -> None:
        while True:
            await transport.publish(topic, payload)
            await trio.sleep(0.1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        before: list[tuple[str, bytes]] = []
        while (message := await news.receive()) != (transport.peer_id, payload):
            before.append(message)
        nursery.cancel_scope.cancel()
    return before


class LinkNode:
    """Links over libp2p, and what happened on them."""

    def __init__(
        self,
        network: Network,
        *roles: Role,
        name: str = "",
        key: NodeKey | None = None,
        settings: LinkSettings | None = None,
        **options: Any,
    ) -> None:
        self.key = key or NodeKey.generate()
        if "orchestrator" in roles:
            options.setdefault("listen", [LOOPBACK])
        self.transport = Libp2pTransport(self.key, **options)
        self.name = name or "+".join(roles)
        self.links = Links(
            self.transport,
            Identity(network, self.key, roles),
            name=self.name,
            region="here",
            boot_id=os.urandom(4).hex(),
            settings=settings,
        )
        self.events: list[str] = []
        self.reasons: list[str] = []
        self.times: list[float] = []
        self.received: list[LinkMessage] = []
        self.changes = Changes()
        self.dialler = Dialler(self.links)
        self.links.on_up(self._on_up)
        self.links.on_down(self._on_down)

    def _on_up(self, link: Link) -> None:
        self.events.append(f"up {link.name}")
        self.changes.note()

    def _on_down(self, link: Link, reason: str) -> None:
        self.events.append(f"down {link.name}")
        self.reasons.append(reason)
        self.times.append(trio.current_time())
        self.changes.note()

    def take(self, message_type: type) -> LinkNode:
        def collect(_: Link, message: LinkMessage) -> None:
            self.received.append(message)
            self.changes.note()

        self.links.on(message_type, collect)
        return self

    async def until_up(self, peer_id: str) -> Link:
        await self.changes.until(lambda: self.links.get(peer_id))
        link = self.links.get(peer_id)
        assert link is not None
        return link

    def dials(self, nursery: trio.Nursery, *addresses: str) -> None:
        nursery.start_soon(self.dialler.run, lambda: addresses)


@contextlib.asynccontextmanager
async def linking(*nodes: LinkNode) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.links.run)
        yield nursery
        nursery.cancel_scope.cancel()


# --- the library as it comes


def naked_host(key: NodeKey | None = None, *, connection_config: ConnectionConfig | None = None) -> BasicHost:
    """A host with the library's defaults, but Noise, so that it can dial a hardened one."""
    key_pair = create_new_key_pair((key or NodeKey.generate()).seed)
    noise = Noise(key_pair, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(key_pair=key_pair, sec_opt={TProtocol(NOISE): noise}, connection_config=connection_config)
    return cast(BasicHost, host)


@contextlib.asynccontextmanager
async def naked(host: BasicHost, listen: str | None = None) -> AsyncIterator[str]:
    """Run a host; give its first address."""
    async with host.run([multiaddr.Multiaddr(listen)] if listen else []):
        try:
            yield str(host.get_addrs()[0]) if listen else ""
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(3):
                await host.close()


def peer_info(address: str) -> PeerInfo:
    parsed = multiaddr.Multiaddr(address)
    return PeerInfo(ID.from_string(parsed.value_for_protocol("p2p")), [parsed])


# --- a peer in a process of its own


class PeerProcess:
    """`tests/link_peer.py`: a worker that links to an orchestrator; it says `up` each time that it did."""

    def __init__(self, network: Network, key: NodeKey, address: str, *, flood: bool = False) -> None:
        self.key = key
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.link_peer",
                network.issuer.key.seed.hex(),
                key.seed.hex(),
                address,
                "flood" if flood else "quiet",
            ],
            cwd=ROOT,
        )

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def network_of(seed: str) -> Network:
    """The founder's network again, in another process."""
    key = NodeKey(bytes.fromhex(seed))
    return Network(key.public_key, Issuer(key, ()))


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that somebody listens on, as libp2p does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])
