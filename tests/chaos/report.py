"""What the chaos suite prints: a line while it runs, a table at its end, or JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.outcome import Outcome

MOST_FINDINGS = 20
"""Findings that are shown of each fault; the JSON has all."""

_WORST = {"lost", "missing", "doubled", "ends", "unended", "hung", "quota"}


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value that so large a share of the sorted values does not exceed; None of no values."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as the table and the JSON have it."""
    pauses = outcome.pauses
    return {
        "fault": outcome.fault,
        "engine": outcome.engine,
        "injected": len(outcome.injections),
        "jobs": len(outcome.histories),
        "streams_hit": outcome.num_hit,
        "lost": outcome.count("lost", "missing", "unended"),
        "doubled": outcome.count("doubled", "ends"),
        "wrong": outcome.count("text", "ledger", "quota", "refused", "memory", "slow"),
        "hung": outcome.count("hung"),
        "pause_p50_seconds": quantile(pauses, 0.5),
        "pause_p99_seconds": quantile(pauses, 0.99),
        "pause_max_seconds": pauses[-1] if pauses else None,
        "seconds": outcome.seconds,
        **outcome.facts,
        "findings": [finding._asdict() for finding in outcome.findings],
    }


def show(console: Console, outcomes: Sequence[Outcome], seed: int) -> None:
    """Print the table, and below it what was found wrong."""
    table = Table(title=f"seed {seed}", title_justify="left")
    for name in ("fault", "engine"):
        table.add_column(name, no_wrap=True)
    for name in (
        "injected",
        "jobs",
        "streams hit",
        "lost",
        "doubled",
        "wrong",
        "hung",
        "pause p50",
        "pause p99",
        "took",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        found = summary(outcome)
        numbers = ("injected", "jobs", "streams_hit", "lost", "doubled", "wrong", "hung")
        table.add_row(
            outcome.fault,
            outcome.engine,
            *(str(found[name]) for name in numbers),
            _seconds(found["pause_p50_seconds"]),
            _seconds(found["pause_p99_seconds"]),
            f"{outcome.seconds:.0f} s",
            style="red" if outcome.findings else None,
        )
    console.print(table)
    for outcome in outcomes:
        for name, fact in outcome.facts.items():
            console.print(f"{outcome.fault}: {name}: {fact}", markup=False, soft_wrap=True)
        findings = sorted(outcome.findings, key=lambda finding: finding.wrong not in _WORST)
        for finding in findings[:MOST_FINDINGS]:
            console.print(
                f"{outcome.fault}: {finding.wrong}: {finding.who}: {finding.what}",
                markup=False,
                style="red",
                soft_wrap=True,
            )
        if len(outcome.findings) > MOST_FINDINGS:
            console.print(f"{outcome.fault}: and {len(outcome.findings) - MOST_FINDINGS} more", style="red")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
