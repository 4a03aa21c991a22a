"""What an orchestrator does for tenants: it says whom a key stands for, and keeps their shares of the queue in mind."""

from __future__ import annotations

import logging
import time

import trio

from tether import quotas
from tether.answering import Answering
from tether.errors import TetherError
from tether.ledger import Ledger
from tether.link import Link
from tether.links import Links
from tether.messages import Authenticate, Authenticated
from tether.orchestrator import Orchestrator
from tether.stored import Allowance
from tether.tenant_store import TenantStore

log = logging.getLogger(__name__)

ROUND_SECONDS = 5.0
"""How long a new weight, and a key's last use, may take to be known."""


def authenticate(tenants: TenantStore, key_digest: str | None, request_id: int = 0) -> Authenticated:
    """Return whom a key stands for, by a store; it blocks. None asks only whether keys are needed."""
    now = time.time()
    caller = tenants.caller(key_digest, now=now) if key_digest is not None else None
    if caller is None:
        return Authenticated(request_id, tenants.has_keys())
    (limits,) = tenants.store.allowances([Allowance(caller.tenant_id, caller.key_id, "", None)], now=now)
    return Authenticated(request_id, True, caller, limits=quotas.rate_limits(limits, now))


class Tenancy:
    """Answers gateways that ask for keys, each question in a task of its own."""

    def __init__(self, links: Links, ledger: Ledger, orchestrator: Orchestrator) -> None:
        self._ledger = ledger
        self._tenants = TenantStore(ledger.store)
        self._orchestrator = orchestrator
        self._used: dict[str, float] = {}
        self._answering = Answering()
        links.on(Authenticate, self._on_authenticate)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer until cancelled; started when the shares are known."""
        await self._round()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._answering.run)
            task_status.started()
            while True:
                await trio.sleep(ROUND_SECONDS)
                await self._round()

    async def _round(self) -> None:
        """Read the tenants' weights, and write when keys were used last; what fails is done at the next round."""
        used, self._used = self._used, {}
        try:
            self._orchestrator.set_weights(await self._ledger.read(self._tenants.weights))
            await self._ledger.save_keys_used(used)
        except TetherError as exc:
            self._used = used | self._used
            log.debug("tenants not looked at: %s", exc.message)

    def _on_authenticate(self, link: Link, question: Authenticate) -> None:
        async def answer() -> Authenticated:
            found = await self._ledger.read(authenticate, self._tenants, question.key_digest, question.request_id)
            if found.caller is not None:
                self._used[found.caller.key_id] = time.time()
            return found

        self._answering.soon(link, answer, lambda error: Authenticated(question.request_id, error=error))
