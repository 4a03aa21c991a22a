"""What the attempts at a job say of it: whether another one is due, and what it must be like to go on exactly. Pure.

An orchestrator counts while it has the job, and begins from the ledger's rows where it takes one up from another: so the
bounds hold for the job, and not for each orchestrator that had it.
"""

from __future__ import annotations

from collections.abc import Iterable

from tether.errors import ErrorInfo, Poison, RuntimeDied, TetherError, WorkerFailed, WorkerLost
from tether.records import AttemptRecord, ModelInfo

_NOBODYS_FAULT = frozenset({"handed_over", "draining", "orchestrator_lost", None})
"""The error codes of attempts that ended because their worker left in good order, or because their orchestrator was lost."""


class Attempts:
    """The attempts at one job that are over."""

    def __init__(self) -> None:
        self.num_failures = 0
        """Those that failed by somebody's fault."""
        self.fingerprint = ""
        """Of the model of the newest one (`ModelInfo.fingerprint`); empty before the first."""
        self.completion_tokens = 0
        """Told by those that were counted from the ledger."""
        self._down: set[tuple[str, str, int]] = set()

    @classmethod
    def of(cls, records: Iterable[AttemptRecord]) -> Attempts:
        """Return what the ledger's rows of a job say."""
        found = cls()
        for record in records:
            found.fingerprint = record.fingerprint or found.fingerprint
            found.completion_tokens += record.completion_tokens
            if record.status in {"failed", "lost"} and record.error_code not in _NOBODYS_FAULT:
                found.fail(record.number, (record.worker_id, record.worker_boot), record.error_code or "")
        return found

    @property
    def num_down(self) -> int:
        """How many workers, or runtime children, went down while they ran the job."""
        return len(self._down)

    def fail(self, number: int, worker: tuple[str, str], code: str) -> None:
        """Count a failed attempt on a worker's boot, by its error code.

        A worker that was lost counts once for each start of it; a runtime child is another one each time.
        """
        self.num_failures += 1
        if code == WorkerLost.code:
            self._down.add((*worker, 0))
        elif code == RuntimeDied.code:
            self._down.add((*worker, number))

    def verdict(self, last: ErrorInfo, *, max_failures: int, max_down: int) -> TetherError | None:
        """Return why the job has failed, after an attempt that ended with `last`; None where another one is due."""
        if self.num_down >= max_down:
            return Poison(
                f"{self.num_down} workers went down while they ran this job, so it is not tried again; "
                f"the last one: {last.message}"
            )
        if self.num_failures >= max_failures:
            return WorkerFailed(f"{self.num_failures} attempts failed; the last one: {last.message}")
        return None

    def goes_on_exactly(self, model: ModelInfo) -> bool:
        """Whether an answer that these attempts began is continued by this model as it would have gone on.

        Another server's engine tells no token ids, so what it continues is never a replay.
        """
        return self.fingerprint in {"", model.fingerprint} and model.dtype != "remote"


def is_handed_over(error: ErrorInfo | None) -> bool:
    """Whether an attempt ended because its worker left in good order: nobody's fault."""
    return error is not None and error.code in _NOBODYS_FAULT
