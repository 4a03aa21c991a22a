"""Topics: gossipsub of py-libp2p, tamed; any message may be lost, and nothing that a peer says ends it.

Defects by their numbers are in docs/libp2p.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import libp2p.pubsub.pubsub as pubsub_module
import trio
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import TrioManager

from tether.errors import ProtocolViolation

log = logging.getLogger(__name__)

MAX_TOPIC_BYTES = 900 << 10
TOPIC_MESSAGES = 4096
"""What may wait in a subscription."""
MAX_CHILD_TASKS = 100_000
_PUBLISH_PATIENCE_SECONDS = 0.25
_PUBLISH_QUEUE = 16


def _steady(async_fn: Callable[..., Awaitable[Any]], name: str, *, is_daemon: bool) -> Callable[..., Awaitable[None]]:
    async def steady(*args: Any) -> None:
        while True:
            try:
                await async_fn(*args)
            except Exception:
                log.warning("a task of libp2p's topics failed: %s", name, exc_info=True)
            else:
                return
            if not is_daemon:
                return
            await trio.sleep(1.0)

    return steady


class SteadyManager(TrioManager):
    """Runs a pubsub service whose tasks may fail one by one without taking the service down (defects 2 and 6)."""

    def __init__(self, service: Any) -> None:
        super().__init__(service, max_children_per_task=MAX_CHILD_TASKS)

    def run_task(
        self,
        async_fn: Any,
        *args: Any,
        daemon: bool = False,
        name: str | None = None,
        _internal: bool = False,
    ) -> None:
        """Called by the service for each of its tasks."""
        known_as = str(name or getattr(async_fn, "__qualname__", async_fn))
        task = async_fn if _internal else _steady(async_fn, known_as, is_daemon=daemon)
        super().run_task(task, *args, daemon=daemon, name=known_as, _internal=_internal)


class Topics:
    """Gossipsub, tamed: lossy by contract, for news that the next message repeats."""

    def __init__(self, host: BasicHost, is_admitted: Callable[[str], bool]) -> None:
        self._own_id = str(host.get_id())
        self._is_admitted = is_admitted
        self._subscribers: dict[str, list[trio.MemorySendChannel[tuple[str, bytes]]]] = {}
        # Read at each subscription; the library's 32 loses most of a burst.
        pubsub_module.SUBSCRIPTION_CHANNEL_SIZE = TOPIC_MESSAGES
        self._router = GossipSub(
            # 1.1 on purpose: 1.2 sends an IDONTWANT to every mesh peer for every message.
            [PROTOCOL_ID_V11],
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            prune_back_off=10,
            do_px=False,
            spam_protection_enabled=False,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
            pending_messages_ttl=0.0,
        )
        self.pubsub = Pubsub(
            host,
            self._router,
            strict_signing=True,
            seen_ttl=120,
            max_inbound_rpc_size=1 << 20,
            max_subscriptions_per_peer=512,
            max_subscriptions_per_rpc=512,
            validation_timeout=1.0,
        )
        # From the clock in microseconds: after a restart with the same key no sequence number is used again.
        self.pubsub.counter = time.time_ns() // 1000
        self._push = self.pubsub.push_msg
        setattr(self.pubsub, "push_msg", self._push_safely)  # noqa: B010 - a method of the library's object

    async def run(self, nursery: trio.Nursery) -> None:
        """Start the services in `nursery`; return when they take peers."""
        for service in (self._router, self.pubsub):
            manager = SteadyManager(service)
            nursery.start_soon(manager.run)
            await manager.wait_started()
        await self.pubsub.wait_until_ready()
        self._nursery = nursery

    async def _push_safely(self, forwarder: ID, message: rpc_pb2.Message) -> None:
        try:
            if str(forwarder) != self._own_id:
                origin = str(ID(message.from_id))
                if not self._is_admitted(str(forwarder)) or not self._is_admitted(origin):
                    log.debug("dropped a topic's message of %s, forwarded by %s", origin, forwarder)
                    return
                if len(message.topicIDs) != 1:
                    return
            await self._push(forwarder, message)
        except Exception as exc:  # noqa: BLE001 - a malformed message must not end pubsub (defect 2)
            log.warning("dropped a malformed topic message from %s: %r", forwarder, exc)

    def add_peer(self, peer_id: ID) -> None:
        """Open a stream for topics to a peer that was admitted; on its newest connection, if it had one (defect 8)."""
        if peer_id in self.pubsub.peers:
            # Forgets the stream, and opens one anew because the peer is connected.
            self.pubsub._handle_dead_peer(peer_id)  # noqa: SLF001 - the library has no public way
        else:
            self.pubsub.manager.run_task(self.pubsub._handle_new_peer_with_retry, peer_id)  # noqa: SLF001

    def remove_peer(self, peer_id: ID) -> None:
        """Forget a peer that left."""
        if self.pubsub.manager.is_running:
            self.pubsub._handle_dead_peer(peer_id)  # noqa: SLF001

    async def publish(self, topic: str, payload: bytes) -> None:
        """Tell whoever is subscribed; raise `ProtocolViolation` for more than `MAX_TOPIC_BYTES`."""
        if len(payload) > MAX_TOPIC_BYTES:
            raise ProtocolViolation(f"a topic's message of {len(payload)} bytes; {MAX_TOPIC_BYTES} is the most")
        # The library drops what does not fit a peer's queue of 32; a burst waits for room, but nobody slow holds it up.
        with trio.move_on_after(_PUBLISH_PATIENCE_SECONDS):
            # The library's queues tell nobody when they drain.
            while any(len(q) > _PUBLISH_QUEUE for q in self.pubsub.peer_queues.values()):  # noqa: ASYNC110
                await trio.sleep(0.002)
        await self.pubsub.publish(topic, payload)

    async def subscribe(self, topic: str) -> trio.MemoryReceiveChannel[tuple[str, bytes]]:
        """Return a channel of (origin's peer id, payload); the newest is lost when it is full."""
        send, receive = trio.open_memory_channel[tuple[str, bytes]](TOPIC_MESSAGES)
        if topic in self._subscribers:
            self._subscribers[topic].append(send)
        else:
            self._subscribers[topic] = [send]
            subscription = await self.pubsub.subscribe(topic)
            self._nursery.start_soon(self._pump, topic, subscription)
        return receive

    async def _pump(self, topic: str, subscription: Any) -> None:
        channels = self._subscribers[topic]
        async for message in subscription:
            origin = str(ID(message.from_id))
            if origin == self._own_id:
                continue
            for channel in tuple(channels):
                try:
                    channel.send_nowait((origin, bytes(message.data)))
                except trio.WouldBlock:
                    log.debug("a subscriber of %s does not keep up", topic)
                except trio.BrokenResourceError:
                    channel.close()
                    channels.remove(channel)
            if not channels:
                del self._subscribers[topic]
                await subscription.unsubscribe()
                return
