"""Who sends a request, and what they may do: the gateway's side of API keys. Runs on asyncio.

A gateway has no store, so it asks an orchestrator whom a key stands for, and believes the answer for a few seconds: so long
may a key that was revoked still be good. A request that is open when its key ends is broken off within the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Final, Literal, Protocol

import msgspec

from tether import keys
from tether.errors import InvalidKey, JobNotFound, PermissionDenied, RateLimits, TetherError
from tether.messages import Authenticated
from tether.records import Actor, Scope

log = logging.getLogger(__name__)

BELIEF_SECONDS: Final = 4.0
"""How long an answer is believed, and how often the keys of open jobs are asked for again."""
REFUSAL_SECONDS: Final = 1.0
"""How long it is believed that a key is not good: it may just be on its way into the store."""
LOOK_SECONDS: Final = 0.5
"""How often it is looked whether the key of an open request is to be asked for again."""
MAX_KNOWN: Final = 4096
"""Answers that are kept; further ones take the oldest one's place."""

Need = Literal["run", "look"]
"""What a route does: it makes or changes something, or it only looks."""

_RUNNERS: Final[frozenset[Scope]] = frozenset({"models", "admin"})


class Authority(Protocol):
    """Who knows the keys."""

    async def authenticate(self, key_digest: str | None) -> Authenticated:
        """Return whom a key stands for; None asks only whether keys are needed."""
        ...


class Client(msgspec.Struct, frozen=True):
    """Who sends a request. Where there are no keys it is anybody, who may do all and says for which tenant."""

    key_id: str = ""
    tenant_id: str = ""
    scopes: frozenset[Scope] = frozenset(keys.SCOPES)
    key_digest: str = ""
    limits: RateLimits | None = None
    """What was left to it when its key was last asked for."""

    @property
    def is_anybody(self) -> bool:
        """Whether it came without a key, where none is needed."""
        return not self.key_id

    @property
    def sees_all(self) -> bool:
        """Whether it may see every tenant's jobs."""
        return "admin" in self.scopes

    @property
    def actor(self) -> Actor | None:
        """Who may act on what is another tenant's, for the audit log; None for whoever may not, and without keys."""
        return Actor(self.key_id, self.tenant_id) if self.key_id and self.sees_all else None

    def check(self, need: Need) -> None:
        """Raise `PermissionDenied` unless it may do what a route does."""
        if need == "run" and not self.scopes & _RUNNERS:
            raise PermissionDenied(
                f"this API key may only look (its scope is {', '.join(sorted(self.scopes))}); it takes one with `models`"
            )

    def tenant_for_job(self, named: str | None, *, param: str = "tenantId") -> str | None:
        """Return the tenant that its job is for. `named` is what the request says, in its field `param`.

        None where there is no key to say it and the request does not either. Raises `PermissionDenied` where it is
        another one than the key's.
        """
        if named is None or self.is_anybody:
            return named if self.is_anybody else self.tenant_id
        if named != self.tenant_id and not self.sees_all:
            raise PermissionDenied(f"this API key is of another tenant than {named!r}", param=param)
        return named

    def tenant_to_see(self, named: str | None, *, job_id: str | None = None) -> str | None:
        """Return the tenant whose jobs it wants to see; None: all. Another's job `job_id` is not there for it.

        Raises `JobNotFound`, or `PermissionDenied` for a listing.
        """
        if self.sees_all or named == self.tenant_id:
            return named
        if named is None:
            return self.tenant_id
        if job_id is not None:
            raise JobNotFound(f"there is no job {job_id!r}")
        raise PermissionDenied(f"this API key is of another tenant than {named!r}", param="tenant_id")


class _Held:
    """A request that is open for a client."""

    def __init__(self, client: Client, on_end: Callable[[], None]) -> None:
        self.client = client
        self.on_end = on_end


class _Known(msgspec.Struct, frozen=True):
    answer: Authenticated
    until: float
    """By the gateway's own clock."""


class Access:
    """Tells clients by their keys. `always`: a key is needed even while the network has none."""

    def __init__(
        self, authority: Authority, *, always: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._authority = authority
        self._always = always
        self._clock = clock
        self._known: dict[str | None, _Known] = {}
        self._asking: dict[str | None, asyncio.Task[Authenticated]] = {}
        self._held: set[_Held] = set()
        self._watching: asyncio.Task[None] | None = None

    async def client(self, authorization: str | None, need: Need) -> Client:
        """Return who sends a request with this `Authorization` header.

        Raises `InvalidKey`, `PermissionDenied`, or what keeps the network from saying it.
        """
        kind, _, token = (authorization or "").partition(" ")
        token = token.strip()
        is_key = kind.lower() == "bearer" and keys.is_key(token)
        digest = keys.digest(token) if is_key else None
        answer = await self._ask(digest)
        if answer.caller is not None and digest is not None:
            caller = answer.caller
            client = Client(caller.key_id, caller.tenant_id, caller.scopes, digest, answer.limits)
            client.check(need)
            return client
        if not answer.required and not self._always:
            return Client()
        if is_key:
            raise InvalidKey("this API key is not known, has expired, or was revoked")
        if authorization:
            raise InvalidKey(
                "this is no API key: it takes the header Authorization: Bearer sk-... with one of this network"
            )
        raise InvalidKey

    @contextlib.contextmanager
    def hold(self, client: Client, on_end: Callable[[], None]) -> Iterator[None]:
        """Watch over a client's key while the block runs; `on_end` is called once when the key ends before it."""
        held = _Held(client, on_end)
        self._held.add(held)
        if self._watching is None or self._watching.done():
            self._watching = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            self._held.discard(held)

    async def _ask(self, digest: str | None) -> Authenticated:
        known = self._known.get(digest)
        if known is not None and self._clock() < known.until:
            return known.answer
        return await self._ask_anew(digest)

    async def _ask_anew(self, digest: str | None) -> Authenticated:
        """Ask the authority; those who want to know the same at the same time share one question."""
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.get_running_loop().create_task(self._learn(digest))
            asking.add_done_callback(lambda _: self._asking.pop(digest, None))
        return await asyncio.shield(asking)

    async def _learn(self, digest: str | None) -> Authenticated:
        now = self._clock()  # before the question: the answer is no younger
        answer = await self._authority.authenticate(digest)
        seconds = BELIEF_SECONDS if answer.caller is not None or digest is None else REFUSAL_SECONDS
        if answer.caller is not None and answer.caller.valid_seconds is not None:
            seconds = min(seconds, answer.caller.valid_seconds)
        self._known.pop(digest, None)
        while len(self._known) >= MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[digest] = _Known(answer, now + seconds)
        return answer

    async def _watch(self) -> None:
        """Ask again for the keys of open requests, and end the requests of those that are not good any more."""
        while self._held:
            now = self._clock()
            digests = {held.client.key_digest for held in self._held}
            soonest = min((known.until for digest in digests if (known := self._known.get(digest))), default=math.inf)
            await asyncio.sleep(min(max(soonest - now, 0.05), LOOK_SECONDS))  # a key may come whose belief ends sooner
            for digest in {held.client.key_digest for held in self._held}:
                known = self._known.get(digest)
                if known is None or self._clock() >= known.until:
                    await self._check(digest)

    async def _check(self, digest: str) -> None:
        try:
            if (await self._ask_anew(digest)).caller is not None:
                return
        except TetherError as exc:
            log.debug("a key of open requests was not checked: %s", exc.message)  # nobody can say; asked again
            return
        for held in [each for each in self._held if each.client.key_digest == digest]:
            self._held.discard(held)
            held.on_end()
