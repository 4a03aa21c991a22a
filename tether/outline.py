"""What is kept of a conversation whose input is not: as much as its answer is told by. Pure.

What a model says becomes calls only for someone who knows the names of the tools that it was shown. They are in the input,
which a job with `keep: "result"` has only until its end.
"""

from __future__ import annotations

import msgspec

from tether.records import Chat, Job, Tool

_CONVERSATIONS = frozenset({"chat", "response"})


def outline_of(job: Job) -> str | None:
    """Return the `Chat` of a job whose input is not kept, as JSON and without what anybody said: no message, and of a tool the name.

    None where there is nothing to keep, or what came as a conversation is none: then no worker can run it either.
    """
    if job.keep != "result" or job.form not in _CONVERSATIONS:
        return None
    try:
        chat = msgspec.json.decode(job.input.encode("utf-8", "surrogatepass"), type=Chat)
    except (msgspec.MsgspecError, RecursionError):
        return None
    tools = tuple(Tool(tool.name, parameters=msgspec.Raw(b"null")) for tool in chat.tools)
    outline = msgspec.structs.replace(chat, messages=(), tools=tools, has_instructions=False)
    return msgspec.json.encode(outline).decode() if outline != Chat(()) else None
