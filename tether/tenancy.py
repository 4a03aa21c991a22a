"""What an orchestrator does for tenants: it says whom a key stands for, and keeps their shares of the queue in mind."""

from __future__ import annotations

import logging
import time

import trio

from tether import quotas
from tether.errors import InternalError, LinkError, QueueFull, TetherError
from tether.links import Link, Links
from tether.messages import Authenticate, Authenticated
from tether.orchestrator import Orchestrator
from tether.store import Allowance, Ledger, Store

log = logging.getLogger(__name__)

ROUND_SECONDS = 5.0
"""How long a new weight, and a key's last use, may take to be known."""
MAX_OPEN = 256
"""Keys that may be looked up at the same time; a further one is refused."""


def authenticate(store: Store, key_digest: str | None, request_id: int = 0) -> Authenticated:
    """Return whom a key stands for, by a store; it blocks. None asks only whether keys are needed."""
    now = time.time()
    caller = store.caller(key_digest, now=now) if key_digest is not None else None
    if caller is None:
        return Authenticated(request_id, store.has_keys())
    (limits,) = store.allowances([Allowance(caller.tenant_id, caller.key_id, "", None)], now=now)
    return Authenticated(request_id, True, caller, limits=quotas.rate_limits(limits, now))


class Tenancy:
    """Answers gateways that ask for keys, each question in a task of its own."""

    def __init__(self, links: Links, ledger: Ledger, orchestrator: Orchestrator) -> None:
        self._ledger = ledger
        self._orchestrator = orchestrator
        self._used: dict[str, float] = {}
        self._num_open = 0
        self._nursery: trio.Nursery
        links.on(Authenticate, self._on_authenticate)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; started when the shares are known."""
        await self._round()
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                await trio.sleep(ROUND_SECONDS)
                await self._round()

    async def _round(self) -> None:
        """Read the tenants' weights, and write when keys were used last; what fails is done at the next round."""
        used, self._used = self._used, {}
        try:
            self._orchestrator.set_weights(await self._ledger.read(self._ledger.store.weights))
            await self._ledger.save_keys_used(used)
        except TetherError as exc:
            self._used = used | self._used
            log.debug("tenants not looked at: %s", exc.message)

    def _on_authenticate(self, link: Link, question: Authenticate) -> None:
        if self._num_open >= MAX_OPEN:
            error = QueueFull("too many keys are being looked up already; try again soon").to_info()
            self._send(link, Authenticated(question.request_id, error=error))
            return
        self._num_open += 1
        self._nursery.start_soon(self._answer, link, question)

    async def _answer(self, link: Link, question: Authenticate) -> None:
        try:
            answer = await self._look_up(question)
        except TetherError as exc:
            answer = Authenticated(question.request_id, error=exc.to_info())
        except Exception:
            log.exception("a key was not looked up")
            answer = Authenticated(question.request_id, error=InternalError().to_info())
        finally:
            self._num_open -= 1
        self._send(link, answer)

    async def _look_up(self, question: Authenticate) -> Authenticated:
        answer = await self._ledger.read(authenticate, self._ledger.store, question.key_digest, question.request_id)
        if answer.caller is not None:
            self._used[answer.caller.key_id] = time.time()
        return answer

    def _send(self, link: Link, answer: Authenticated) -> None:
        try:
            link.send(answer)
        except LinkError as exc:
            log.debug("no answer to %s: %s", link.name, exc.message)
