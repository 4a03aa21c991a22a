"""Clients that ask one thing after another while something dies; what they were told is held against the store.

Afterwards each accepted job has ended once and whole, no slot is reserved, and the counters of the tenant's limits are what
its jobs used.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any, NamedTuple, Self

import httpx

from tests.processes import eventually
from tether.database import Statement
from tether.store import Store
from tether.tenant_store import TenantStore

COMPLETED = frozenset({"completed"})


def words(number: int) -> str:
    """What the scripted runtime answers to `tokens=NUMBER`."""
    return "".join(f"{each} " for each in range(number))


QUICK, QUICK_WHOLE = "tokens=10 every=0.03", words(10)


class Told(NamedTuple):
    """What a client was told of one job."""

    kind: str
    status: int
    """Of HTTP; 0 where the connection was cut."""
    job_id: str = ""
    text: str = ""
    code: str = ""
    retry_after: str = ""
    seconds: float = 0.0


class Load:
    """Clients that ask one thing after another: streams, whole answers, and jobs that nobody waits for."""

    def __init__(self, urls: list[str], tenant: str, num_clients: int = 6) -> None:
        self.told: list[Told] = []
        self._tenant = tenant
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(urls[number % len(urls)], number), daemon=True)
            for number in range(num_clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, url: str, number: int) -> None:
        with httpx.Client(base_url=url, timeout=90) as http:
            while not self._stop.is_set():
                kind = ("stream", "plain", "left")[number % 3]
                begun = time.monotonic()
                try:
                    told = ask(http, self._tenant, kind)
                except httpx.TransportError:
                    told = Told(kind, 0)
                    self._stop.wait(0.1)
                self.told.append(told._replace(seconds=time.monotonic() - begun))
                if kind == "left" or told.status != 200:
                    self._stop.wait(0.2)

    @property
    def answered(self) -> list[Told]:
        return [told for told in self.told if told.status in {200, 202}]

    @property
    def refused(self) -> list[Told]:
        return [told for told in self.told if told.status not in {200, 202}]

    def wait_for_more(self, number: int) -> None:
        """Wait until so many more jobs were answered, by each kind of client."""
        before = len(self.told)

        def enough() -> bool:
            kinds = [told.kind for told in self.told[before:] if told.status in {200, 202}]
            return all(kinds.count(kind) >= number for kind in ("stream", "plain", "left"))

        eventually(enough, what=f"{number} more answers of each kind")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a client hangs"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def ask(http: httpx.Client, tenant: str, kind: str, text: str = QUICK, **fields: object) -> Told:
    """Ask for an answer and return what was told; raise where the connection is cut."""
    body = {"tenantId": tenant, "modelId": "demo", "version": "1.0", "input": text, **fields}
    if kind == "left":
        body["wait"] = False
    if kind != "stream":
        return told_of(kind, http.post("/infer", json=body))
    body["stream"] = True
    with http.stream("POST", "/infer", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return told_of(kind, answer)
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: ")]
    end = events[-1]
    if end["type"] != "end":
        return Told(kind, 500, end.get("jobId", ""), code=end.get("error", {}).get("code", str(end)))
    pieces = "".join(event["text"] for event in events if event["type"] == "tokens")
    return Told(kind, 200, end["jobId"], pieces)


def told_of(kind: str, answer: httpx.Response) -> Told:
    body = answer.json()
    retry_after = answer.headers.get("retry-after", "")
    if "error" in body:
        return Told(kind, answer.status_code, "", "", body["error"]["code"], retry_after)
    return Told(kind, answer.status_code, body["jobId"], body.get("result") or "")


def query(store: Store, sql: str, **params: str) -> list[dict[str, Any]]:
    """Return rows of the store by any SQL, as all of a cluster has them."""
    return [dict(row) for row in store._database.query(Statement(sql, params), settled=True)]


def limit(store: Store, tenant: str) -> None:
    """Give a tenant limits that it will not reach, so that it is counted."""
    TenantStore(store).set_tenant(tenant, requests_per_day=100_000, tokens_per_day=10_000_000, jobs_at_once=10_000)


def check_ledger(store: Store, tenant: str, accepted: set[str], *, ended: frozenset[str] = COMPLETED) -> None:
    """Hold the store against what was accepted, once everything has ended."""
    live = "SELECT count(*) AS n FROM jobs WHERE tenant_id = :tenant AND status IN ('queued', 'running')"
    eventually(lambda: query(store, live, tenant=tenant)[0]["n"] == 0, what="the ends of all jobs")
    jobs = {row["id"]: row for row in query(store, "SELECT * FROM jobs WHERE tenant_id = :tenant", tenant=tenant)}
    assert accepted <= jobs.keys()
    others = {job_id: (row["status"], row["error_code"]) for job_id, row in jobs.items() if row["status"] not in ended}
    assert not others.keys() & accepted, {job_id: others[job_id] for job_id in others.keys() & accepted}
    # An admission whose answer was lost was refused, and taken back when the store could be reached again.
    assert {code for _, code in others.values()} <= {"store_unavailable"}, others
    running = "SELECT count(*) AS n FROM attempts WHERE status = 'running'"
    assert query(store, running)[0]["n"] == 0, "a slot is still reserved"
    counters = {
        row["unit"]: (row["used"], row["reserved"])
        for row in query(
            store,
            "SELECT unit, sum(used) AS used, sum(reserved) AS reserved FROM quota_counters "
            "WHERE tenant_id = :tenant AND window_seconds = 86400 GROUP BY unit",
            tenant=tenant,
        )
    }
    kept = [row for row in jobs.values() if row["id"] not in others]
    used = sum(row["prompt_tokens"] + row["completion_tokens"] for row in jobs.values())
    assert counters == {"requests": (len(kept), 0), "tokens": (used, 0)}
