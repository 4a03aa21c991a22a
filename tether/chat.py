"""A conversation as a prompt: what the model's own chat template makes of messages and tools. Without torch."""

from __future__ import annotations

from typing import Any

import msgspec

from tether.errors import InvalidRequest
from tether.records import Chat, ChatMessage, Tool


def decode_chat(text: str) -> Chat:
    """Return the conversation that a job of the form `chat` has as its input; raise `InvalidRequest`."""
    try:
        return msgspec.json.decode(text.encode(), type=Chat)
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidRequest(f"this is no conversation: {exc}", param="messages") from exc


def render(tokenizer: Any, chat: Chat) -> list[int]:
    """Return the ids of a conversation's prompt, up to where the assistant is to speak.

    Raises `InvalidRequest` for what the template cannot say: a role that it does not have, tools that it leaves out.
    A model without a template takes one user's message, as it stands.
    """
    if tokenizer.chat_template is None:
        if len(chat.messages) > 1 or chat.messages[0].role != "user" or chat.tools:
            raise InvalidRequest(
                "this model has no chat template: send one message of the role `user`, or use /v1/completions",
                param="messages",
            )
        return list(tokenizer(chat.messages[0].content)["input_ids"])
    messages = [as_template(message) for message in chat.messages]
    tools = [_tool(tool) for tool in chat.tools]
    ids = _apply(tokenizer, messages, tools)
    if tools and ids == _apply(tokenizer, messages, []):
        raise InvalidRequest("this model's chat template has no tools", param="tools")
    return ids


def _apply(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    import jinja2  # noqa: PLC0415 - a worker whose models run elsewhere does not have it

    try:
        found = tokenizer.apply_chat_template(
            messages, tools=tools or None, add_generation_prompt=True, return_dict=False
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as exc:
        # Templates are other people's programs, and say in an error of their own what they do not take.
        raise InvalidRequest(f"the model's chat template refuses these messages: {exc}", param="messages") from exc
    return list(found)


def as_template(message: ChatMessage) -> dict[str, Any]:
    """Return a message as chat templates read it: the arguments of calls are objects there."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": msgspec.json.decode(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _tool(tool: Tool) -> dict[str, Any]:
    parameters = msgspec.json.decode(tool.parameters)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}
