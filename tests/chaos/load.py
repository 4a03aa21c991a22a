"""The clients of the chaos suite: each asks for one answer, comes back where it is cut off, and writes down what it sees."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import httpx
import trio

from tests.chaos.history import (
    STREAMED,
    Accepted,
    Asked,
    Cut,
    Ended,
    GaveUp,
    History,
    Kind,
    Named,
    Refused,
    Started,
    Told,
)

ANSWER_SECONDS = 120.0
"""How long a client waits for its end: no job takes a tenth of it, and no fault lasts for half."""
AWAY_SECONDS = 0.1
"""Before a client that was cut off asks again, at the next gateway."""
LOOK_SECONDS = 0.2
"""Between two looks of a client that comes back for its answer."""


class Want(NamedTuple):
    """What a client is to ask for."""

    kind: Kind
    tenant: str
    text: str
    expected: str
    fields: Mapping[str, Any] = {}
    """Of the request, beside the text."""
    resumes_by_id: bool = False
    """A stream goes on with `GET /v1/jobs/{id}/stream`; otherwise with the same request and its key."""


class Prompt(NamedTuple):
    """A question whose answer is known."""

    text: str
    expected: str
    fields: Mapping[str, Any] = {}


def mix(random: Random, prompts: Sequence[Prompt], tenants: Sequence[str], kinds: Mapping[Kind, float]) -> Want:
    """Draw what a client asks for."""
    kind = random.choices(list(kinds), list(kinds.values()))[0]
    prompt = random.choice(prompts)
    return Want(kind, random.choice(tenants), prompt.text, prompt.expected, prompt.fields, random.random() < 0.5)


def scripted(random: Random, num_tokens: int, every_seconds: float) -> Prompt:
    """Return a script for the scripted runtime, some longer and some shorter than `num_tokens`."""
    count = random.randint(num_tokens * 3 // 4, num_tokens * 5 // 4)
    return Prompt(f"tokens={count} every={every_seconds}", "".join(f"{number} " for number in range(count)))


QUESTIONS = ("Tell me about Tether.", "What is the capital of France?", "How do I start a worker?", "Who are you?")


def demo(random: Random) -> list[Prompt]:
    """Return questions for the demo model, half of them greedy and half sampled with a seed; what they answer is not known."""
    long = {"maxTokens": 400, "minTokens": 300, "ignoreEos": True}
    sampled = [{**long, "temperature": 0.8, "seed": random.randrange(2**31)} for _ in QUESTIONS]
    return [
        Prompt(text, "", fields) for text, drawn in zip(QUESTIONS, sampled, strict=True) for fields in (long, drawn)
    ]


async def ask_once(url: str, key: str, prompt: Prompt) -> Prompt:
    """Return a question with its answer, as it is while nothing disturbs it."""
    body = {"modelId": "demo", "version": "1.0", "input": prompt.text, **prompt.fields}
    async with httpx.AsyncClient(timeout=ANSWER_SECONDS) as http:
        answer = await http.post(f"{url}/infer", json=body, headers={"Authorization": f"Bearer {key}"})
    answer.raise_for_status()
    return Prompt(prompt.text, answer.json()["result"], prompt.fields)


class Client:
    """One client at work; `history` has what it saw."""

    def __init__(
        self,
        number: int,
        want: Want,
        http: httpx.AsyncClient,
        gateways: Mapping[str, str],
        keys: Mapping[str, str],
        run_id: str,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        """`gateways` are URLs by name; which one is asked first goes by the client's number."""
        self.history = History(number, want.kind, want.tenant, want.expected)
        self._want = want
        self._http = http
        self._gateways = list(gateways.items())
        self._turn = number
        self._headers = {"Authorization": f"Bearer {keys[want.tenant]}", "Idempotency-Key": f"{run_id}-{number}"}
        self._answer_seconds = answer_seconds
        self._is_known = True

    async def run(self) -> None:
        """Ask, and ask again where that breaks off, until there is an end or the client's patience is over."""
        with trio.move_on_after(self._answer_seconds):
            while not self.history.is_over:
                name, url = self._gateways[self._turn % len(self._gateways)]
                self._see(Asked(trio.current_time(), name))
                try:
                    wait_seconds = await self._ask(url)
                except (httpx.TransportError, _BrokenOffError) as exc:
                    self._see(Cut(trio.current_time(), f"{type(exc).__name__}: {exc}"))
                    wait_seconds = AWAY_SECONDS
                if wait_seconds is not None and not self.history.is_over:
                    self._turn += 1
                    await trio.sleep(wait_seconds)
            return
        self._see(GaveUp(trio.current_time()))

    def _see(self, seen: Accepted | Named | Asked | Cut | Ended | GaveUp | Refused | Started | Told) -> None:
        self.history.seen.append(seen)

    async def _ask(self, url: str) -> float | None:
        """Send one request and read its answer; return how long to wait before the next one, if one is needed."""
        if self.history.kind in STREAMED:
            return await self._stream(url)
        job_id = self.history.job_id
        if self.history.kind == "background" and job_id is not None:
            return await self._look(url, job_id)
        body = {"modelId": "demo", "version": "1.0", "input": self._want.text, **self._want.fields}
        if self.history.kind == "background":
            body["wait"] = False
        answer = await self._http.post(f"{url}/infer", json=body, headers=self._headers)
        if answer.status_code == 202:
            self._accept(answer.json()["jobId"])
            return LOOK_SECONDS
        return self._whole(answer)

    @property
    def _job_id_to_resume(self) -> str | None:
        """The job by whose id a stream goes on; None where it is asked for with the same request again."""
        return self.history.job_id if self._want.resumes_by_id and self._is_known else None

    def _accept(self, job_id: str) -> None:
        if self.history.job_id != job_id or not self.history.is_accepted:
            self._see(Accepted(trio.current_time(), job_id))

    def _whole(self, answer: httpx.Response) -> float | None:
        """Take an answer that comes at once in one piece."""
        if "x-tether-job-id" in answer.headers and answer.status_code == 200:
            self._accept(answer.headers["x-tether-job-id"])
        if answer.status_code != 200:
            return self._error(answer.status_code, answer.headers, answer.json())
        self._see(Ended(trio.current_time(), answer.json()["result"], None))
        return None

    async def _look(self, url: str, job_id: str) -> float | None:
        """Look whether a job has ended."""
        answer = await self._http.get(f"{url}/v1/jobs/{job_id}", headers=self._headers)
        if answer.status_code != 200:
            return self._error(answer.status_code, answer.headers, answer.json())
        record = answer.json()
        if record["status"] in {"queued", "running"}:
            return LOOK_SECONDS
        error = None if record["status"] == "completed" else (record["error"] or {}).get("code", record["status"])
        self._see(Ended(trio.current_time(), record["result"], error))
        return None

    def _error(self, status: int, headers: httpx.Headers, body: dict[str, Any]) -> float | None:
        """Take an error: one that says when to come back is not the end."""
        code, again = body["error"]["code"], headers.get("retry-after")
        if again is None:
            if self.history.job_id is None and "x-tether-job-id" in headers:
                self._accept(headers["x-tether-job-id"])
            self._see(Ended(trio.current_time(), None, code))
            return None
        self._see(Refused(trio.current_time(), status, code, again))
        return min(float(again), 1.0)

    async def _stream(self, url: str) -> float | None:
        headers, job_id = dict(self._headers), self._job_id_to_resume
        if self.history.told:
            headers["Last-Event-ID"] = str(self.history.num_chars)
        if job_id is not None:
            request = self._http.stream("GET", f"{url}/v1/jobs/{job_id}/stream", headers=headers)
        elif self.history.kind == "chat":
            fields = {"max_tokens": 400, **self._want.fields}
            messages = [{"role": "user", "content": self._want.text}]
            body = {"model": "demo", "messages": messages, "stream": True, "temperature": 0, **fields}
            request = self._http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers)
        else:
            body = {"modelId": "demo", "version": "1.0", "input": self._want.text, "stream": True, **self._want.fields}
            request = self._http.stream("POST", f"{url}/infer", json=body, headers=headers)
        async with request as answer:
            if answer.status_code != 200:
                await answer.aread()
                if answer.status_code == 404 and job_id is not None and not self.history.told:
                    # A stream's headers name its job before it is accepted; the same request with its key brings it there.
                    self._is_known = False
                    raise _BrokenOffError("the job was not accepted before the cut")
                return self._error(answer.status_code, answer.headers, answer.json())
            job_id = answer.headers["x-tether-job-id"]
            if self.history.job_id != job_id:
                self._see(Named(trio.current_time(), job_id))
            take = self._take_chunk if self.history.kind == "chat" else self._take_event
            async for event_id, data in events(answer):
                take(event_id, data)
        if not self.history.is_over:
            raise _BrokenOffError("the stream closed before its end")
        return None

    def _break_off(self, code: str) -> None:
        """Take an error in mid-stream: a gateway that leaves ends its streams and not the jobs of those who come back."""
        if code == "draining":
            raise _BrokenOffError(code)
        self._see(Ended(trio.current_time(), None, code))

    def _take_event(self, event_id: str, data: str) -> None:
        """Take an event of `POST /infer`."""
        event, now = json.loads(data), trio.current_time()
        if event.get("type") is not None:
            self._accept(self.history.job_id or "")
        match event.get("type"):
            case "tokens":
                self._see(Told(now, event["text"], int(event_id)))
            case "started":
                self._see(Started(now, event["worker"], event["attempt"]))
            case "end":
                self._see(Ended(now, event["result"], None))
            case None:
                self._break_off(event["error"]["code"])

    def _take_chunk(self, event_id: str, data: str) -> None:
        """Take a chunk of the OpenAI dialect."""
        now = trio.current_time()
        if data == "[DONE]":
            self._see(Ended(now, None, None))
            return
        chunk = json.loads(data)
        if "error" in chunk:
            self._break_off(chunk["error"]["code"])
            return
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text:
            self._accept(self.history.job_id or "")
            self._see(Told(now, text, int(event_id.removesuffix("u").removesuffix("e"))))


class _BrokenOffError(Exception):
    """The stream ended without its end."""


async def events(answer: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """Yield the id and the data of each server-sent event that came as a whole."""
    event_id, data = "", ""
    async for line in answer.aiter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
        elif not line and data:
            yield event_id, data
            data = ""


class Load:
    """Clients at work, a number of them at once."""

    def __init__(
        self, gateways: Mapping[str, str], keys: Mapping[str, str], run_id: str, draw: Callable[[], Want], at_once: int
    ) -> None:
        self.histories: list[History] = []
        self._gateways = gateways
        self._keys = keys
        self._run_id = run_id
        self._draw = draw
        self._at_once = at_once
        self._closing = False

    @property
    def open(self) -> list[History]:
        """The clients that have no end yet."""
        return [history for history in self.histories if not history.is_over]

    @property
    def num_told(self) -> int:
        """How many pieces all clients have been told."""
        return sum(len(history.told) for history in self.histories)

    def close(self) -> None:
        """Let nobody new come; those that are there stay to their ends."""
        self._closing = True

    async def run(self) -> None:
        """Keep so many clients at work until `close`, and then until the last one has its end."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=5.0)
        async with httpx.AsyncClient(limits=limits, timeout=timeout) as http, trio.open_nursery() as nursery:
            for _ in range(self._at_once):
                nursery.start_soon(self._one_after_another, http)

    async def _one_after_another(self, http: httpx.AsyncClient) -> None:
        while not self._closing:
            client = Client(len(self.histories), self._draw(), http, self._gateways, self._keys, self._run_id)
            self.histories.append(client.history)
            await client.run()
