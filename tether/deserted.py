"""Ends jobs whose clients waited at a gateway that was lost, and did not come back through another one.

Without a bound such jobs run to their ends, and their results can be fetched; an operator for whom work that nobody may
want costs more than a client's second try sets one.
"""

from __future__ import annotations

import trio

from tether.orchestrator import Orchestrator

ROUND_SECONDS = 0.5


class Deserted:
    """Looks again and again for jobs that nobody waits for any more."""

    def __init__(self, orchestrator: Orchestrator, *, most_seconds: float) -> None:
        """`most_seconds`: how long after its gateway was lost a client may come back for its job."""
        self._orchestrator = orchestrator
        self._most_seconds = most_seconds

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look(trio.current_time())
            await trio.sleep(ROUND_SECONDS)

    def look(self, now: float) -> None:
        """Cancel the jobs whose clients were not heard of for too long at `now`, a time of trio's clock."""
        for active in self._orchestrator.jobs:
            if active.deserted_at is not None and now - active.deserted_at >= self._most_seconds:
                self._orchestrator.cancel(active, "its gateway was lost, and its client did not come back")
