"""What a response was asked with, as items; and a response that goes on after another one (`previous_response_id`).

A response's job has the whole conversation that the model reads, so nobody has to follow a chain: one record is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from tether.active import job_of
from tether.errors import JobConflict, ResponseNotFound
from tether.messages import JobEvent
from tether.openai_responses import ResponseAnswer, job_id_of
from tether.records import LIVE, Chat, ChatMessage, Job, JobRecord

PARAM = "previous_response_id"


def check_kept(record: JobRecord) -> None:
    """Raise `ResponseNotFound` for a job that is no response, or of which nothing was kept."""
    if record.form != "response":
        raise ResponseNotFound(f"job {record.id} is no response")
    if record.status not in LIVE and (record.keep == "nothing" or (record.result is None and record.error is None)):
        raise ResponseNotFound("this response was not kept (`store`, `keep`, or its age), or was deleted")


def previous_of(job: Job) -> str | None:
    """Return the id of the job after which a response goes on; None where it begins a conversation."""
    previous_id = _chat(job.input).previous_id if job.form == "response" else None
    return job_id_of(previous_id) if previous_id is not None else None


def continued(job: Job, before: JobRecord, story: Iterable[JobEvent]) -> Job:
    """Return a response's job with the conversation before it; `story` is what happened to that one.

    The instructions of the one before are not taken over, and neither are its tools: a request says its own. Raises
    `ResponseNotFound`, or `JobConflict` where the one before has no answer.
    """
    try:
        check_kept(before)
    except ResponseNotFound as exc:
        exc.param = PARAM
        raise
    if before.status != "completed":
        raise JobConflict(f"the response is {before.status}, and has no answer to go on after", param=PARAM)
    if before.input is None:
        raise ResponseNotFound("of this response only the answer was kept (`keep`)", param=PARAM)
    chat, old = _chat(job.input), _chat(before.input)
    answer = ResponseAnswer(job_of(before))
    for event in story:
        answer.add(event)
    own = chat.messages[:1] if chat.has_instructions else ()
    messages = (*own, *_without_instructions(old), answer.message(), *_without_instructions(chat))
    chat = msgspec.structs.replace(chat, messages=messages)
    return msgspec.structs.replace(job, input=msgspec.json.encode(chat).decode())


def input_items(record: JobRecord, *, after: str | None, limit: int, order: Literal["asc", "desc"]) -> dict[str, Any]:
    """Return a page of what the model read: all messages, calls and their outcomes, but for the instructions."""
    check_kept(record)
    if record.input is None:
        raise ResponseNotFound("of this response only the answer was kept (`keep`)")
    items = list(_items(record.id, _without_instructions(_chat(record.input))))
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ResponseNotFound(f"the response has no item {after!r}", param="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }


def _items(job_id: str, messages: tuple[ChatMessage, ...]) -> Iterator[dict[str, Any]]:
    number = 0

    def named(prefix: str, kind: str, **fields: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"id": f"{prefix}_{job_id}_in_{number - 1}", "type": kind, "status": "completed", **fields}

    for message in messages:
        if message.role == "tool":
            yield named("fco", "function_call_output", call_id=message.tool_call_id, output=message.content)
            continue
        if message.content or not message.tool_calls:
            part: dict[str, Any] = {"type": "input_text", "text": message.content}
            if message.role == "assistant":
                part = {"type": "output_text", "text": message.content, "annotations": [], "logprobs": []}
            yield named("msg", "message", role=message.role, content=[part])
        for call in message.tool_calls:
            yield named("fc", "function_call", call_id=call.id, name=call.name, arguments=call.arguments)


def _without_instructions(chat: Chat) -> tuple[ChatMessage, ...]:
    return chat.messages[1:] if chat.has_instructions else chat.messages


def _chat(text: str) -> Chat:
    return msgspec.json.decode(text.encode(), type=Chat)
