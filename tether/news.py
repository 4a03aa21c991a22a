"""Topics: what orchestrators tell everybody, and what a node makes of it. Any message may be lost; the next repeats it.

An orchestrator publishes once a second, whole: itself on the control topic, the signed states of its workers on the
presence topic; and when it changes, who serves a model on that model's topic. A listener hears only orchestrators that it
has a link with: any member's word gets onto a topic. It believes a worker's state only with that worker's signature, a newer
sequence and a fresh time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
import trio

from tether import messages
from tether.bounds import MAX_STATES
from tether.credentials import CLOCK_LEEWAY_SECONDS
from tether.errors import ProtocolViolation, TetherError
from tether.hearsay import own_addresses
from tether.messages import ControlNews, ModelNews, PresenceNews, Signed
from tether.node_key import verify
from tether.records import WorkerState
from tether.wire import Transport

log = logging.getLogger(__name__)

NEWS_SECONDS = 1.0
REPEAT_ROUNDS = 10
"""Who serves a model is told when it changes, and once in so many rounds whether it changes or not."""
FRESH_SECONDS = 20.0
"""How old a worker's state, or an orchestrator's news, may be before it no longer counts."""
MAX_ORCHESTRATORS = 64
MAX_WORKERS = 2_000
"""Of whom news is kept at once; what is told of further ones is dropped."""
MAX_STATE_BYTES = 16 << 10
"""Of one worker's state; a hundred models take as many."""
MAX_NEWS_BYTES = 48 * 1024
"""Of one message: below what topics let through."""


class Broadcaster:
    """Publishes an orchestrator's news on the topics of `region`."""

    def __init__(
        self,
        transport: Transport,
        region: str,
        *,
        control: Callable[[int], ControlNews],
        states: Callable[[], Sequence[tuple[WorkerState, Signed]]],
    ) -> None:
        self._transport = transport
        self._region = region
        self._control = control
        self._states = states
        self._sequence = 0

    async def run(self) -> None:
        """Publish until cancelled."""
        served: dict[tuple[str, str], tuple[str, ...]] = {}
        while True:
            self._sequence += 1
            await self._publish(messages.control_topic(self._region), self._control(self._sequence))
            states = self._states()
            for states_at_once in _portions([signed for _, signed in states]):
                await self._publish(messages.presence_topic(self._region), PresenceNews(states_at_once))
            now_served = _served([state for state, _ in states])
            for name, version in sorted(now_served.keys() | served.keys()):
                workers = now_served.get((name, version), ())
                if workers != served.get((name, version)) or self._sequence % REPEAT_ROUNDS == 0:
                    news = ModelNews(name, version, workers)
                    await self._publish(messages.model_topic(name, version, self._region), news)
            served = now_served
            await trio.sleep(NEWS_SECONDS)

    async def _publish(self, topic: str, news: messages.News) -> None:
        try:
            await self._transport.publish(topic, messages.encode(news))
        except TetherError as exc:
            log.debug("nothing published on %s: %s", topic, exc.message)


class Listener:
    """Follows the control and presence topics of `region`; keeps what is fresh."""

    def __init__(
        self,
        transport: Transport,
        region: str,
        *,
        is_orchestrator: Callable[[str], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`is_orchestrator(peer_id)` says whom to hear; `clock` tells Unix seconds."""
        self._transport = transport
        self._region = region
        self._is_orchestrator = is_orchestrator
        self._clock = clock
        self._orchestrators: dict[str, tuple[ControlNews, float]] = {}
        self._workers: dict[str, WorkerState] = {}
        self.num_rejected = 0
        """Messages and states that did not count, since the start."""

    async def run(self) -> None:
        """Listen until cancelled."""
        async with trio.open_nursery() as nursery:
            for topic in (messages.control_topic(self._region), messages.presence_topic(self._region)):
                nursery.start_soon(self._follow, await self._transport.subscribe(topic))
            while True:
                await trio.sleep(FRESH_SECONDS)
                self._forget_old()

    @property
    def orchestrators(self) -> list[ControlNews]:
        """The orchestrators that were heard of lately."""
        now = time.monotonic()
        return [news for news, heard_at in self._orchestrators.values() if now - heard_at < FRESH_SECONDS]

    @property
    def workers(self) -> list[WorkerState]:
        """The workers that said something lately, wherever they have their links."""
        now = self._clock()
        return [state for state in self._workers.values() if now - state.sent_at < FRESH_SECONDS]

    @property
    def addresses(self) -> list[str]:
        """Where the orchestrators that were heard of can be dialled."""
        return [address for news in self.orchestrators for address in news.addresses]

    def load(self, orchestrator_id: str) -> int:
        """Return the jobs that an orchestrator has by its latest news; 0 where there is none."""
        news, _ = self._orchestrators.get(orchestrator_id, (None, 0.0))
        return news.num_queued + news.num_running if news is not None else 0

    def hear(self, origin: str, payload: bytes) -> None:
        """Take one message in, or reject it; never raises for what somebody sent."""
        try:
            if not self._is_orchestrator(origin):
                raise ProtocolViolation("no orchestrator that this node has a link with")
            match messages.decode_news(payload):
                case ControlNews() as news:
                    self._hear_control(origin, news)
                case PresenceNews(states):
                    for signed in states:
                        self._hear_state(origin, signed)
                case ModelNews():
                    return
        except ProtocolViolation as exc:
            self._reject(origin, exc)

    async def _follow(self, channel: trio.MemoryReceiveChannel[tuple[str, bytes]]) -> None:
        async with channel:
            async for origin, payload in channel:
                self.hear(origin, payload)

    def _hear_control(self, origin: str, news: ControlNews) -> None:
        if news.orchestrator_id != origin:
            raise ProtocolViolation("an orchestrator tells only of itself")
        if abs(self._clock() - news.sent_at) > CLOCK_LEEWAY_SECONDS:
            raise ProtocolViolation("not of this time")
        self._forget_old()
        known, _ = self._orchestrators.get(origin, (None, 0.0))
        if known is not None and known.boot_id == news.boot_id and known.sequence >= news.sequence:
            raise ProtocolViolation("older than what is known")
        if known is not None and known.boot_id != news.boot_id and known.sent_at >= news.sent_at:
            raise ProtocolViolation("of an earlier boot")
        if known is None and len(self._orchestrators) >= MAX_ORCHESTRATORS:
            raise ProtocolViolation("there are too many orchestrators")
        kept = msgspec.structs.replace(news, addresses=own_addresses(news.addresses, origin))
        self._orchestrators[origin] = kept, time.monotonic()

    def _reject(self, origin: str, error: ProtocolViolation) -> None:
        self.num_rejected += 1
        log.debug("news of %s rejected: %s", origin, error.message)

    def _hear_state(self, origin: str, signed: Signed) -> None:
        try:
            self._take_state(signed)
        except ProtocolViolation as exc:  # of one worker; the others' beside it count
            self._reject(origin, exc)

    def _take_state(self, signed: Signed) -> None:
        if len(signed.payload) > MAX_STATE_BYTES:
            raise ProtocolViolation(f"a worker's state of {len(signed.payload)} bytes; {MAX_STATE_BYTES} is the most")
        state = messages.decode_state(signed.payload)
        if verify(signed) != state.worker_id:
            raise ProtocolViolation("a worker's state must be signed by the worker itself")
        if abs(self._clock() - state.sent_at) > FRESH_SECONDS:
            raise ProtocolViolation("not fresh")
        known = self._workers.get(state.worker_id)
        if known is not None and known.boot_id == state.boot_id and known.sequence >= state.sequence:
            return  # repeated on purpose
        if known is not None and known.boot_id != state.boot_id and known.sent_at >= state.sent_at:
            return  # of an earlier boot, told by somebody who has not noticed its end
        if known is None and len(self._workers) >= MAX_WORKERS:
            raise ProtocolViolation("there are too many workers")
        self._workers[state.worker_id] = state

    def _forget_old(self) -> None:
        """Drop who was not heard of lately: with each news of an orchestrator, and where none comes, now and then."""
        now = time.monotonic()
        for peer_id in [p for p, (_, at) in self._orchestrators.items() if now - at >= FRESH_SECONDS]:
            del self._orchestrators[peer_id]
        fresh = {state.worker_id: state for state in self.workers}
        if len(fresh) < len(self._workers):
            self._workers = fresh


def _portions(states: list[Signed]) -> Iterator[tuple[Signed, ...]]:
    """Yield the states in portions that fit into one message each."""
    portion: list[Signed] = []
    num_bytes = 0
    for signed in states:
        size = len(msgspec.json.encode(signed)) + 1
        if portion and (num_bytes + size > MAX_NEWS_BYTES or len(portion) == MAX_STATES):
            yield tuple(portion)
            portion, num_bytes = [], 0
        portion.append(signed)
        num_bytes += size
    if portion:
        yield tuple(portion)


def _served(states: Sequence[WorkerState]) -> dict[tuple[str, str], tuple[str, ...]]:
    served: dict[tuple[str, str], list[str]] = {}
    for state in states:
        for model in state.models:
            if model.slots and state.takes_jobs:
                served.setdefault((model.name, model.version), []).append(state.worker_id)
    return {key: tuple(sorted(workers)) for key, workers in served.items()}
