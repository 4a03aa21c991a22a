"""Calls of functions in what a model says: the text as it comes in, content and calls out.

Models of different families write a call in different ways; all of them are JSON objects with a name and arguments:

    <tool_call>{"name": "f", "arguments": {}}</tool_call>      Hermes, Qwen, Granite 4
    [TOOL_CALLS][{"name": "f", "arguments": {}}]               Mistral
    <|tool_call|>[{"name": "f", "arguments": {}}]              Granite 3
    {"name": "f", "parameters": {}}                            Llama 3; and each of the above without its special token

What is told after some text is a function of that text, however it was cut: so a stream that goes on elsewhere tells the
same calls, none twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from tether.records import ToolCall

_MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>")
_BETWEEN = re.compile(r"(?:\[TOOL_CALLS\]|<\|tool_call\|>|<\|python_tag\|>|</?tool_call>|[\s,;\[\]])*")
_DECODER = json.JSONDecoder()
MAX_CALL_CHARS = 65_536
"""A longer object is no call: it is told as text."""


class ToolCallParser:
    """Tells content and calls apart in one answer; `names` are the tools' names, `key` makes the calls' ids."""

    def __init__(self, key: str, names: Iterable[str], *, parallel: bool = True) -> None:
        self._key = key
        self._names = frozenset(names)
        self._parallel = parallel
        self._waiting = ""
        self._in_calls = False
        self._told_content = False
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take more text; return the content and the calls that are now certain."""
        self._waiting += text
        content = "" if self._in_calls else self._take_content()
        calls = self._take_calls() if self._in_calls else []
        return content, calls

    def flush(self) -> str:
        """Return, at the answer's end, what was held back and was no call after all."""
        rest, self._waiting = self._waiting, ""
        if self._in_calls and self.num_calls:
            rest = rest[_between(rest) :]
        return rest

    def _take_content(self) -> str:
        """Return the text before the first call, as far as it is certain to be no call's beginning."""
        waiting = self._waiting
        if not self._told_content:
            bare = waiting.lstrip()
            if not bare:
                return ""
            if bare[0] == "{" or (bare[0] == "[" and not "[TOOL_CALLS]".startswith(bare[:12])):
                self._in_calls = True
                return ""
        places = [place for marker in _MARKERS if (place := waiting.find(marker)) >= 0]
        if places:
            content, self._waiting = waiting[: min(places)], waiting[min(places) :]
            self._in_calls = True
            return content if content.strip() else ""
        held = max(_overlap(waiting, marker) for marker in _MARKERS)
        content, self._waiting = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
        if not content.strip() and not self._told_content:
            self._waiting = content + self._waiting
            return ""
        self._told_content = self._told_content or bool(content)
        return content

    def _take_calls(self) -> list[ToolCall]:
        calls: list[ToolCall] = []
        while True:
            start = _between(self._waiting)
            if len(self._waiting) > MAX_CALL_CHARS:
                return calls
            if start >= len(self._waiting) or self._waiting[start] != "{":
                return calls
            try:
                found, end = _DECODER.raw_decode(self._waiting, start)
            except (json.JSONDecodeError, RecursionError):
                return calls
            call = self._call(found)
            if call is None:
                return calls
            self._waiting = self._waiting[end:]
            if self._parallel or not self.num_calls:
                calls.append(call)
                self.num_calls += 1

    def _call(self, found: Any) -> ToolCall | None:
        """Return the call that an object is, or None for any other object."""
        if not isinstance(found, dict) or found.get("name") not in self._names:
            return None
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        digest = hashlib.blake2b(f"{self._key}\0{self.num_calls}".encode(), digest_size=12).hexdigest()
        return ToolCall(f"call_{digest}", found["name"], arguments)


def _between(text: str) -> int:
    """Return where the next call may begin."""
    found = _BETWEEN.match(text)
    return found.end() if found is not None else 0


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` with which `marker` begins."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
