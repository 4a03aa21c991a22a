"""All links of one node: accepted or dialled, one for each peer, kept alive; and what arrives on them is handed out.

A link begins with `Hello` and `Welcome`, in which each side shows its credentials; from then on both send typed messages
in frames of four bytes of length and one JSON object. What arrives is checked against the peer's roles and handed to the
one handler of its type, synchronously and in order. What is sent is put into a bounded buffer, and one task writes all
that waits in one go: under load the price of encryption and of a frame is paid once for many messages.

Rules that hold for every link:

- The stream's authenticated peer counts; an id inside a payload never does.
- Silence for `silence_seconds` is death, and so is a frame that takes longer than that and its size explain. `on_up` and
  `on_down` are called once each, in that order, and for two links of the same peer never interleaved: the older one is
  down before the newer one is up.
- The newest link of a peer wins. Two peers that dial each other at the same time settle on the link that the peer with
  the smaller id dialled.
- A malformed, oversized, forbidden or unexpected frame closes that link alone, and so does a handler that raises: the
  state that the handler kept for this peer cannot be trusted any more, and a fresh link begins without it. A handler
  therefore catches what its own `send` to other links raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar, get_args

import trio

from tether import messages
from tether.asking import Questions
from tether.credentials import CLOCK_LEEWAY_SECONDS, Membership
from tether.errors import LinkClosed, LinkError, ProtocolViolation
from tether.hearsay import Hearsay, own_addresses
from tether.hello import Introduction
from tether.identity import Identity
from tether.link import (
    PING,
    Frames,
    Link,
    LinkSettings,
    StreamLink,
    first_message,
    framed,
    tag_of,
    write_whole,
)
from tether.local_link import Handler, LocalLink
from tether.messages import Goodbye, Hello, LinkMessage, Ping, Refused, Welcome, decode_link, encode
from tether.records import Role
from tether.tasks import start_if_open
from tether.wire import Stream, Transport

log = logging.getLogger(__name__)

M = TypeVar("M")
R = TypeVar("R")

MAX_QUIET_SECONDS = 1.0
"""After so long without a message a ping is sent."""

OnUp = Callable[[Link], None]
OnDown = Callable[[Link, str], None]


class Links:
    """All links of one node: accepts them, dials them, keeps them alive, dispatches what arrives.

    Build it, register handlers, then `run`. Everything is to be called from the trio thread that runs it.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        *,
        name: str,
        region: str,
        boot_id: str,
        settings: LinkSettings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`identity` says this node's roles, shows its credentials and checks the others'; `clock` tells Unix seconds."""
        self._transport = transport
        self._identity = identity
        self._name = name
        self.settings = settings or LinkSettings()
        self._clock = clock
        self._introduction = Introduction(identity, name=name, region=region, boot_id=boot_id)
        self._local = LocalLink(
            transport.peer_id,
            roles=identity.roles,
            name=name,
            region=region,
            boot_id=boot_id,
            bound=self.settings.max_local_messages,
        )
        self._links: dict[str, StreamLink] = {}
        self._handlers: dict[type, Handler] = {}
        self._on_up: list[OnUp] = []
        self._on_down: list[OnDown] = []
        self._questions = Questions()
        self.hearsay = Hearsay(transport.peer_id)
        self._nursery: trio.Nursery | None = None
        self._is_closing = False
        for reply_type in get_args(messages.Reply):
            self.on(reply_type, self._questions.take)

    # --- what roles use ----------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """This node's peer id."""
        return self._transport.peer_id

    @property
    def name(self) -> str:
        """What people call this node."""
        return self._name

    @property
    def roles(self) -> frozenset[Role]:
        """This node's roles."""
        return self._identity.roles

    @property
    def local(self) -> Link:
        """The link to oneself: always open while `run` runs; never touches the network.

        What is sent on it arrives at this node's own handlers with this same link as its sender, later, in order, and
        never from inside `send`. `on_up` is called for it at start, and `on_down` at the end, where the node has
        several roles; a node of one role has nobody in itself to talk to. A handler that raises is logged, and the next
        message is its own.
        """
        return self._local

    @property
    def up(self) -> tuple[Link, ...]:
        """The links that are up, the local one first where the node has several roles."""
        own = (self._local,) if self._local.is_open and self._has_several_roles else ()
        return (*own, *self._links.values())

    @property
    def orchestrator_addresses(self) -> tuple[str, ...]:
        """Where orchestrators can be dialled, as far as this node knows: itself, its links' peers, and hearsay."""
        own = self._transport.addresses if "orchestrator" in self.roles else ()
        return tuple(dict.fromkeys((*own, *self.hearsay.addresses)))

    def get(self, peer_id: str) -> Link | None:
        """Return the peer's link, the local one for this node's own id, or None when it has none that is up."""
        if peer_id == self._local.peer_id:
            return self._local if self._local.is_open else None
        return self._links.get(peer_id)

    def get_remote(self, peer_id: str) -> StreamLink | None:
        """Return the link to another node, or None when it has none that is up."""
        return self._links.get(peer_id)

    def has_orchestrator(self, peer_id: str) -> bool:
        """Whether the link to this node is up, and it is an orchestrator."""
        link = self._links.get(peer_id)
        return link is not None and "orchestrator" in link.roles

    def with_role(self, role: Role) -> tuple[Link, ...]:
        """Return the links that are up to peers of this role."""
        return tuple(link for link in self.up if role in link.roles)

    def on(self, message_type: type[M], handler: Callable[[Link, M], None]) -> None:
        """Hand each message of this type to `handler`; raise `ValueError` where the type has a handler already.

        A handler is called synchronously and in order, so it must not take long. A message of a type without a handler
        closes the link that it came on. Replies are taken by `ask`.
        """
        if message_type in self._handlers:
            raise ValueError(f"{tag_of(message_type)} has a handler already")
        self._handlers[message_type] = handler

    def on_up(self, callback: OnUp) -> None:
        """Call `callback(link)` once for each link that comes up, before any of its messages."""
        self._on_up.append(callback)

    def on_down(self, callback: OnDown) -> None:
        """Call `callback(link, reason)` once for each link that was up, after the last of its messages."""
        self._on_down.append(callback)

    async def ask(
        self,
        link: Link,
        make_message: Callable[[int], LinkMessage],
        reply_type: type[R],
        *,
        timeout_seconds: float = 5.0,
    ) -> R:
        """Send `make_message(request_id)` and return the reply with that `request_id`.

        Raises what `send` raises, `LinkClosed` when the link goes down meanwhile, and `DeadlineExceeded` when no reply
        came in time. A reply that says an error is returned as it is.
        """
        return await self._questions.ask(link, make_message, reply_type, timeout_seconds=timeout_seconds)

    # --- life --------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the transport and all links until cancelled or closed; started when the transport listens.

        Raises what the transport raises, `PortTaken` among it.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                try:
                    await nursery.start(self._transport.run, self._accept)
                    nursery.start_soon(self._local.drain, self._handlers)
                    nursery.start_soon(self._watch_expiry)
                    self._local.is_running = True
                    if self._has_several_roles:
                        self._announce_local()
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._stop()
        except BaseExceptionGroup as group:
            raise _only(group) from group.__cause__

    async def close(self, reason: str = "") -> None:
        """Say `Goodbye` on every link, wait shortly for it to be written, and let `run` return."""
        self._is_closing = True
        open_links = list(self._links.values())
        for link in open_links:
            link.close(reason)
        with trio.move_on_after(self.settings.close_seconds):
            for link in open_links:
                await link.ended.wait()
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def _stop(self) -> None:
        self._is_closing = True
        for link in list(self._links.values()):
            self._down(link, "this node stops")
        if self._local.is_running:
            self._local.is_running = False
            self._questions.fail(self._local, "this node stops")
            if self._has_several_roles:
                self._call_on_down(self._local, "this node stops")

    @property
    def is_closing(self) -> bool:
        """Whether links are taken down, and none are begun any more."""
        return self._is_closing

    @property
    def is_renewal_due(self) -> bool:
        """Whether this machine's membership ends soon; a new hello to an orchestrator gets it renewed."""
        return self._introduction.is_renewal_due(self._clock())

    @property
    def _has_several_roles(self) -> bool:
        return len(self.roles) > 1

    def _announce_local(self) -> None:
        for callback in self._on_up:
            callback(self._local)

    async def _watch_expiry(self) -> None:
        while True:
            await trio.sleep(self.settings.expiry_seconds)
            now = self._clock()
            for link in list(self._links.values()):
                if now > link.expires_at + CLOCK_LEEWAY_SECONDS:
                    link.close("the peer's membership ended")

    # --- a link's beginning ------------------------------------------------------------------------------------------

    async def _accept(self, stream: Stream) -> None:
        frames = Frames()
        hello: LinkMessage | None = None
        try:
            with trio.move_on_after(self.settings.hello_seconds):
                hello = await first_message(stream, frames)
            if hello is None:
                log.info("no hello from %s in time", stream.peer_id, extra={"action": "no_hello"})
                stream.abort()
                return
            link, welcome = self._check_hello(stream, frames, hello)
        except LinkError as exc:
            await self._refuse(stream, exc)
            return
        link.put(framed(encode(welcome)))
        self._up(link)
        await self._serve(link)

    def _check_hello(self, stream: Stream, frames: Frames, message: LinkMessage) -> tuple[StreamLink, Welcome]:
        if self._is_closing:
            raise LinkClosed("this node is stopping")
        now = self._clock()
        hello, membership = self._introduction.check_hello(stream.peer_id, message, now)
        welcome = self._introduction.welcome(hello, self.orchestrator_addresses, now)
        if not self._is_preferred(stream.peer_id, hello.boot_id, is_dialled=False):
            raise LinkClosed("this node keeps the link that it dialled itself")
        own = own_addresses(hello.addresses, stream.peer_id)
        return self._new_link(stream, frames, hello, own, membership=membership, is_dialled=False), welcome

    def _new_link(
        self,
        stream: Stream,
        frames: Frames,
        shown: Hello | Welcome,
        addresses: tuple[str, ...],
        *,
        membership: Membership,
        is_dialled: bool,
    ) -> StreamLink:
        return StreamLink(
            stream,
            frames,
            shown,
            addresses=addresses,
            membership=membership,
            is_dialled=is_dialled,
            settings=self.settings,
            on_close=self._close,
        )

    def _is_preferred(self, peer_id: str, boot_id: str, *, is_dialled: bool) -> bool:
        """Whether a new link to this peer is to replace the one that there may be.

        The newest wins, except between two live processes that dialled each other at once: both keep the link that the
        smaller id dialled, whichever of the two came up last on which side.
        """
        old = self._links.get(peer_id)
        if old is None or old.boot_id != boot_id or old.is_dialled == is_dialled:
            return True
        return is_dialled == (self.peer_id < peer_id)

    async def _refuse(self, stream: Stream, error: LinkError) -> None:
        level = logging.INFO if isinstance(error, LinkClosed) else logging.WARNING
        log.log(level, "refused a link from %s: %s", stream.peer_id, error.message, extra={"action": "link_refused"})
        with trio.move_on_after(self.settings.hello_seconds):
            if await write_whole(stream, framed(encode(Refused(error.to_info()))), self.settings.write_seconds):
                # The peer closes when it has read the reason; closing first could take the reason from it.
                while await stream.read():
                    pass
        stream.abort()

    async def dial(self, address: str) -> None:
        """Dial, and bring the link up. Raises `LinkError` (`NotAMember` from either side's view) or `UsageError`."""
        stream = await self._transport.dial(address)
        frames = Frames()
        now = self._clock()
        try:
            own = self._transport.addresses if "orchestrator" in self.roles else ()
            hello = self._introduction.hello(own, now)
            answer: LinkMessage | None = None
            with trio.move_on_after(self.settings.hello_seconds):
                if await write_whole(stream, framed(encode(hello)), self.settings.write_seconds):
                    answer = await first_message(stream, frames)
            if answer is None:
                raise LinkClosed(f"no answer to hello within {self.settings.hello_seconds:g} s")
            welcome, membership = self._introduction.check_answer(stream.peer_id, answer, self._clock())
            theirs = own_addresses(welcome.orchestrators, stream.peer_id)
            link = self._new_link(stream, frames, welcome, theirs, membership=membership, is_dialled=True)
            if welcome.renewed:
                await trio.to_thread.run_sync(self._identity.store_renewed, welcome.renewed, now)
        except BaseException:
            stream.abort()
            raise
        if not self._is_preferred(link.peer_id, link.boot_id, is_dialled=True) or self._is_closing:
            stream.abort()
            return
        self.hearsay.learn(welcome.orchestrators)
        self._up(link)
        if self._nursery is None:
            raise LinkClosed("this node is not running")
        start_if_open(self._nursery, self._serve, link)
        await trio.to_thread.run_sync(self._identity.network.remember_addresses, self.orchestrator_addresses)

    # --- a link's life -----------------------------------------------------------------------------------------------

    def _up(self, link: StreamLink) -> None:
        if (old := self._links.get(link.peer_id)) is not None:
            self._down(old, "a newer link took its place")
        self._links[link.peer_id] = link
        self._transport.admit(link.stream)
        if "orchestrator" in link.roles:
            self.hearsay.learn(link.addresses)
        log.info(
            "link up: %s (%s)",
            link.name,
            "+".join(sorted(link.roles)),
            extra={"action": "link_up", "peer_id": link.peer_id},
        )
        try:
            for callback in self._on_up:
                callback(link)
        except Exception:
            log.exception("what is called when a link comes up failed", extra={"action": "handler_failed"})
            self._down(link, "this node failed to take the link")

    def _down(self, link: StreamLink, reason: str, *, is_graceful: bool = False) -> None:
        """Take the link down once: nothing is received from it any more, and its peer may come anew."""
        if link.reason is not None:
            if not is_graceful:
                link.stream.abort()
            return
        link.reason = reason
        link.gone.set()
        link.wake.set()
        if self._links.get(link.peer_id) is link:
            del self._links[link.peer_id]
        if not is_graceful:
            self._cut(link)
        log.info("link down: %s: %s", link.name, reason, extra={"action": "link_down", "peer_id": link.peer_id})
        self._questions.fail(link, reason)
        self._call_on_down(link, reason)

    def _cut(self, link: StreamLink) -> None:
        link.stream.abort()
        if link.peer_id not in self._links:
            self._transport.expel(link.peer_id)

    def _call_on_down(self, link: Link, reason: str) -> None:
        for callback in self._on_down:
            try:
                callback(link, reason)
            except Exception:
                log.exception("what is called when a link goes down failed", extra={"action": "handler_failed"})

    def _close(self, link: StreamLink, reason: str) -> None:
        if link.reason is None:
            link.put(framed(encode(Goodbye(reason))))
            self._down(link, reason or "closed by this node", is_graceful=True)

    async def _serve(self, link: StreamLink) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, link)
                self._down(link, await self._read(link))
                nursery.cancel_scope.cancel()
        finally:
            self._down(link, "this node stops")
            self._cut(link)
            link.ended.set()

    async def _write(self, link: StreamLink) -> None:
        """Write all that waits, in one go and again; ping when nothing does; after a graceful close, wait for the end."""
        while True:
            if not link.has_waiting:
                if not link.is_open:
                    break
                link.wake = trio.Event()
                with trio.move_on_after(min(MAX_QUIET_SECONDS, self.settings.silence_seconds / 3)) as quiet:
                    await link.wake.wait()
                if quiet.cancelled_caught:
                    link.put(PING)
            data = link.take()
            if not await write_whole(link.stream, data, self.settings.write_seconds):
                self._down(link, "a write failed, or took too long")
                return
            link.written(len(data))
        # The peer ends the stream when it has read the goodbye; ending it first could take what it has not read.
        await trio.sleep(self.settings.close_seconds)
        link.stream.abort()

    async def _read(self, link: StreamLink) -> str:
        """Dispatch what arrives, in order, until there is a reason to stop; return it."""
        while True:
            try:
                # Once it is closed what still arrives is read, so that the peer is not stuck, but not heard.
                while link.is_open and (payload := link.frames.pop()) is not None:
                    if (reason := self._receive(link, payload)) is not None:
                        return reason
            except ProtocolViolation as exc:
                log.warning("closing the link to %s: %s", link.name, exc.message, extra={"action": "link_violation"})
                return f"protocol violation: {exc.message}"
            if (reason := await link.feed()) is not None:
                return reason

    def _receive(self, link: StreamLink, payload: bytes) -> str | None:
        """Hand one message to its handler; return why the link is to end, if it is."""
        message = decode_link(payload)
        kind = type(message)
        if kind is Ping:
            return None
        if isinstance(message, Goodbye):
            return f"the peer left: {message.reason}" if message.reason else "the peer left"
        if kind not in link.allowed:
            raise ProtocolViolation(f"{'+'.join(sorted(link.roles))} may not send {tag_of(kind)}")
        handler = self._handlers.get(kind)
        if handler is None:
            raise ProtocolViolation(f"nobody here takes {tag_of(kind)}")
        try:
            handler(link, message)
        except ProtocolViolation:
            raise  # the peer's mistake, not this node's
        except Exception:
            log.exception(
                "the handler of %s failed; closing the link to %s",
                tag_of(kind),
                link.name,
                extra={"action": "handler_failed", "peer_id": link.peer_id},
            )
            return f"this node failed to handle {tag_of(kind)}"
        return None


def _only(group: BaseExceptionGroup) -> BaseException:
    """Return the one error inside a nursery's group, or the group where there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
