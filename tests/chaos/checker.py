"""Says what is wrong with what clients saw and what the store says. Pure: histories and rows in, findings out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from tests.chaos.history import STREAMED, Accepted, Ended, GaveUp, History, Named, Refused

Row = dict[str, Any]

Wrong = Literal[
    "lost", "missing", "doubled", "text", "hung", "ends", "unended", "quota", "ledger", "refused", "memory", "slow"
]
"""
lost     an accepted job is not in the store, or has failed where it should not have
missing  a piece of an answer did not come
doubled  a piece of an answer came twice
text     the answer is another one than that of an undisturbed run
hung     a client saw no end
ends     a client, or the store, saw more than one end
unended  a job is still live in the store after everybody had their answers
quota    a counter is not what its jobs used
ledger   the store and the client disagree, or the store has a job that nobody was told of
refused  a request was turned away where none is to be, or without `Retry-After`
"""

LIVE = frozenset({"queued", "running"})


class Finding(NamedTuple):
    """Something that must not be."""

    wrong: Wrong
    who: str
    what: str


class Ledger(NamedTuple):
    """The rows of the store when all is over."""

    jobs: Sequence[Row]
    attempts: Sequence[Row] = ()
    counters: Sequence[Row] = ()


class Tolerance(NamedTuple):
    """What may happen to a job under the faults at hand, besides its answer."""

    refusals: frozenset[str] = frozenset()
    """Codes with which a request may be turned away before it is accepted; each needs its `Retry-After`."""
    ends: frozenset[str] = frozenset()
    """Error codes with which an accepted job may end."""


def check(
    histories: Iterable[History], ledger: Ledger, tolerance: Tolerance, *, others: Container[str] = ()
) -> list[Finding]:
    """Return everything that is wrong; nothing, where all is well. `others` are jobs of other clients in the store."""
    histories = list(histories)
    findings: list[Finding] = []
    jobs = {row["id"]: row for row in ledger.jobs}
    for history in histories:
        findings += _ends(history)
        findings += _pieces(history)
        findings += _refusals(history, tolerance)
        findings += _outcome(history, jobs, tolerance)
    findings += _strangers(histories, ledger, others)
    findings += _ledger_ends(ledger)
    findings += _counters(ledger)
    return findings


def _name(history: History) -> str:
    return f"client {history.number} ({history.kind}, job {history.job_id})"


def _ends(history: History) -> Iterator[Finding]:
    ends = [each for each in history.seen if isinstance(each, Ended)]
    if not ends or any(isinstance(each, GaveUp) for each in history.seen):
        yield Finding("hung", _name(history), f"saw no end; the last it saw: {history.seen[-1:]}")
    if len(ends) > 1:
        yield Finding("ends", _name(history), f"saw {len(ends)} ends: {ends}")
    elif ends and history.seen[-1] is not ends[0]:
        yield Finding("ends", _name(history), f"saw more after the end: {history.seen[-1]}")


def _pieces(history: History) -> Iterator[Finding]:
    """Each event says where in the answer its text ends, so all of them have to lie side by side."""
    num_chars = 0
    for piece in history.told:
        begin = piece.end - len(piece.text)
        if begin < num_chars:
            yield Finding("doubled", _name(history), f"{piece.text!r} at {begin}, after {num_chars} characters")
        elif begin > num_chars:
            yield Finding("missing", _name(history), f"nothing from {num_chars} to {begin}, before {piece.text!r}")
        elif history.expected[begin : piece.end] != piece.text:
            expected = history.expected[begin : piece.end]
            yield Finding("text", _name(history), f"{piece.text!r} at {begin}, not {expected!r}")
        num_chars = max(num_chars, piece.end)
    end = history.end
    if end is None or end.error is not None:
        return
    if history.kind in STREAMED and num_chars < len(history.expected):
        yield Finding("missing", _name(history), f"ended after {num_chars} of {len(history.expected)} characters")
    if end.result is not None and end.result != history.expected:
        yield Finding("text", _name(history), f"the result is {end.result!r}, not {history.expected!r}")


def _refusals(history: History, tolerance: Tolerance) -> Iterator[Finding]:
    for each in history.seen:
        if isinstance(each, Refused):
            if each.code not in tolerance.refusals:
                yield Finding("refused", _name(history), f"{each.status} {each.code}")
            elif each.retry_after is None:
                yield Finding("refused", _name(history), f"{each.status} {each.code} without Retry-After")


def _outcome(history: History, jobs: dict[str, Row], tolerance: Tolerance) -> Iterator[Finding]:
    """What was accepted is done, or ended with a reason that the faults explain; client and store say the same."""
    ids = {each.job_id for each in history.seen if isinstance(each, Named | Accepted)}
    if len(ids) > 1:
        yield Finding("ledger", _name(history), f"was told several jobs: {sorted(ids)}")
    end = history.end
    row = jobs.get(history.job_id or "")
    if row is None and not history.is_accepted:
        if end is not None and end.error is None:
            yield Finding("ledger", _name(history), "has an answer, and was never told its job")
        elif end is not None and end.error not in tolerance.refusals:
            yield Finding("refused", _name(history), f"was never accepted: {end.error}")
        return
    if row is None:
        yield Finding("lost", _name(history), f"its job is not in the store; the last it saw: {history.seen[-3:]}")
        return
    if row["status"] in LIVE:
        yield Finding("unended", _name(history), f"its job is still {row['status']}")
    elif row["status"] != "completed" and row["error_code"] not in tolerance.ends:
        yield Finding("lost", _name(history), f"its job ended {row['status']}: {row['error_code']}")
    if end is None:
        return
    if (end.error is None) != (row["status"] == "completed"):
        yield Finding("ledger", _name(history), f"was told {end}, and the store has {row['status']}")
    elif end.error is None and row["result"] != history.expected:
        yield Finding("text", _name(history), f"the store has {row['result']!r}, not {history.expected!r}")


def _strangers(histories: Sequence[History], ledger: Ledger, others: Container[str]) -> Iterator[Finding]:
    """One job for each client that was accepted, and no others: nobody pays for a job that was made twice."""
    known = {history.job_id for history in histories}
    for row in ledger.jobs:
        if row["id"] not in known and row["id"] not in others:
            yield Finding("ledger", f"job {row['id']}", f"no client was told of it; it is {row['status']}")
    ids = Counter(history.job_id for history in histories if history.job_id is not None)
    for job_id, count in ids.items():
        if count > 1:
            yield Finding("ledger", f"job {job_id}", f"{count} clients were told that it is theirs")


def _ledger_ends(ledger: Ledger) -> Iterator[Finding]:
    completed = Counter(row["job_id"] for row in ledger.attempts if row["status"] == "completed")
    for job_id, count in completed.items():
        if count > 1:
            yield Finding("ends", f"job {job_id}", f"{count} attempts completed it")
    statuses = {row["id"]: row["status"] for row in ledger.jobs}
    for row in ledger.attempts:
        if row["status"] == "running" and statuses.get(row["job_id"]) not in LIVE:
            yield Finding("unended", f"job {row['job_id']}", f"attempt {row['number']} still holds a slot")


def _counters(ledger: Ledger) -> Iterator[Finding]:
    """Each counter has what the jobs used that say they are counted in it, and nothing is reserved for jobs that ended."""
    used: Counter[tuple[Any, ...]] = Counter()
    reserved: Counter[tuple[Any, ...]] = Counter()
    for row in ledger.jobs:
        for key_id, model, unit, window, start in json.loads(row["charges"] or "[]"):
            counter = (row["tenant_id"], key_id, model, unit, window, start)
            if unit == "requests":
                used[counter] += 1
            elif row["status"] in LIVE:
                reserved[counter] += row["reserved_tokens"]
            else:
                used[counter] += row["prompt_tokens"] + row["completion_tokens"]
    names = ("tenant_id", "key_id", "model", "unit", "window_seconds", "window_start")
    rows = {tuple(row[name] for name in names): row for row in ledger.counters}
    for counter in sorted(used.keys() | reserved.keys() | rows.keys()):
        row = rows.get(counter, {"used": 0, "reserved": 0})
        found, due = (row["used"], row["reserved"]), (used[counter], reserved[counter])
        if found != due:
            words = " ".join(str(part) for part in counter if part != "")
            yield Finding("quota", words, f"used and reserved are {found}, and its jobs make {due}")
