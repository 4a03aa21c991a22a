"""Uses LangChain's ChatOpenAI as its documentation does, and prints what came of it as one JSON object.

Run by tests/acceptance/test_other_clients.py with the Python of `.tools/clients`: `langchain_client.py BASE_URL MODEL PROMPT`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Sure(BaseModel):
    """Whether it is."""

    sure: bool


@tool  # type: ignore[untyped-decorator]  # LangChain is not in the environment that types are checked in
def weather(place: str) -> str:
    """How the weather is."""
    return f"tokens=2 in {place}"


def main(base_url: str, model: str, prompt: str) -> dict[str, Any]:
    """Return what each way of asking gives."""
    chat = ChatOpenAI(base_url=base_url, model=model, api_key="sk-any", temperature=0, max_retries=0)
    whole = chat.invoke(prompt)
    found: dict[str, Any] = {"whole": whole.content, "usage": whole.usage_metadata}
    found["pieces"] = [chunk.content for chunk in chat.stream(prompt)]
    found["batch"] = [answer.content for answer in chat.batch([prompt, prompt])]
    found["structured"] = chat.with_structured_output(Sure, method="json_schema").invoke(prompt).model_dump()
    return found


def call(base_url: str, model: str, prompt: str) -> dict[str, Any]:
    """Return what comes of a conversation with a tool."""
    chat = ChatOpenAI(base_url=base_url, model=model, api_key="sk-any", max_retries=0).bind_tools([weather])
    asked = chat.invoke(prompt)
    first, *others = chat.stream(prompt)
    streamed = sum(others, start=first)
    (wanted,) = asked.tool_calls
    result = weather.invoke(wanted["args"])
    end = chat.invoke([HumanMessage(prompt), asked, ToolMessage(result, tool_call_id=wanted["id"])])
    return {
        "calls": [{"name": wanted["name"], "args": wanted["args"]}],
        "streamed": [{"name": each["name"], "args": each["args"]} for each in streamed.tool_calls],
        "end": end.content,
    }


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    sys.stdout.write(json.dumps((main if kind == "chat" else call)(*rest)))
