"""Keeps one link to every orchestrator that is known: dials, pauses longer each time, dials again."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from itertools import islice

import trio

from tether.errors import NotAMember, TetherError
from tether.hearsay import by_peer, peer_of
from tether.link import StreamLink
from tether.links import Links

log = logging.getLogger(__name__)

MAX_TARGETS = 128
"""Orchestrators that are dialled at once, whatever was said; those that come first are."""

OnRefused = Callable[[str, TetherError], None]


class Dialler:
    """Dials for `links`, from its `run` on."""

    def __init__(self, links: Links, *, on_refused: OnRefused = lambda *_: None) -> None:
        """`on_refused(address, error)` is called each time a dialled peer refuses this node, or is itself no member."""
        self._links = links
        self._settings = links.settings
        self._on_refused = on_refused
        self._targets: dict[str, tuple[str, ...]] = {}
        self._dialling: set[str] = set()

    async def run(self, addresses: Callable[[], Iterable[str]]) -> None:
        """Keep one link to every orchestrator that is known; runs until cancelled or closed, while the links run.

        `addresses()` is called in a thread, again and again, and may read files; what `Welcome`s tell of further
        orchestrators is dialled too, and this node itself never is.
        """
        hearsay = self._links.hearsay
        async with trio.open_nursery() as nursery:
            while not self._links.is_closing:
                hearsay.changed = trio.Event()
                given = await trio.to_thread.run_sync(lambda: tuple(addresses()))
                targets = by_peer((*given, *hearsay.addresses))
                targets.pop(self._links.peer_id, None)
                self._targets = dict(islice(targets.items(), MAX_TARGETS))
                for peer_id in self._targets:
                    if peer_id not in self._dialling:
                        self._dialling.add(peer_id)
                        nursery.start_soon(self._keep_dialling_peer, peer_id)
                with trio.move_on_after(self._settings.address_seconds):
                    await hearsay.changed.wait()
            nursery.cancel_scope.cancel()

    async def _keep_dialling_peer(self, peer_id: str) -> None:
        pause = self._settings.min_redial_seconds
        said: str | None = None
        try:
            while peer_id in self._targets and not self._links.is_closing:
                since = trio.current_time()
                if (link := self._links.get_remote(peer_id)) is not None:
                    await self._until_redial(link)
                    said = None
                    if trio.current_time() - since > self._settings.max_redial_seconds:
                        pause = self._settings.min_redial_seconds
                else:
                    error = await self._dial_any(self._targets[peer_id])
                    if error is None and self._links.get_remote(peer_id) is not None:
                        continue
                    if error is not None and error.message != said:
                        said = error.message
                        log.warning(
                            "no link to the orchestrator %s: %s", peer_id, said, extra={"action": "dial_failed"}
                        )
                    if isinstance(error, NotAMember):
                        pause = self._settings.refused_redial_seconds
                await trio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter is no secret
                pause = min(2 * pause, max(pause, self._settings.max_redial_seconds))
        finally:
            self._dialling.discard(peer_id)

    async def _until_redial(self, link: StreamLink) -> None:
        """Wait until the link is gone; meanwhile begin it anew, once a day, while this machine's membership ends soon."""
        while link.is_open:
            with trio.move_on_after(self._settings.renewal_seconds):
                await link.gone.wait()
            if link.is_open and link.is_dialled and self._links.is_renewal_due:
                await self._dial_any(link.addresses)

    async def _dial_any(self, addresses: Iterable[str]) -> TetherError | None:
        """Dial a peer's addresses in turn; return None when one worked (or a link came up meanwhile), or the last error."""
        error: TetherError | None = None
        for address in addresses:
            try:
                await self._links.dial(address)
            except TetherError as exc:
                error = exc
                if isinstance(exc, NotAMember):
                    self._on_refused(address, exc)
            else:
                return None
            if self._links.get_remote(peer_of(address)) is not None:
                return None
        return error
