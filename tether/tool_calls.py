"""Calls of functions in what a model says: the text as it comes in, content and calls out, piece by piece.

Models of different families write a call in different ways; all of them are JSON objects with a name and arguments:

    <tool_call>{"name": "f", "arguments": {}}</tool_call>      Hermes, Qwen, Granite 4
    [TOOL_CALLS][{"name": "f", "arguments": {}}]               Mistral
    <|tool_call|>[{"name": "f", "arguments": {}}]              Granite 3
    {"name": "f", "parameters": {}}                            Llama 3; and each of the above without its special token

An object that begins with a known name and then its arguments is a call from there on, and its arguments are told as they
come, as the model wrote them. One with its members in another order is a call when it is whole.

What is told after some text is a function of that text, however it was cut: so a stream that goes on elsewhere tells the
same calls, none twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

_MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|tool_call|>", "<|python_tag|>")
_BETWEEN = re.compile(r"(?:\[TOOL_CALLS\]|<\|tool_call\|>|<\|python_tag\|>|</?tool_call>|[\s,;\[\]])*")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=["{])', re.DOTALL)
_PLAIN = re.compile(
    r"""(?:[^"\\]|\\[^u]
        |\\u(?![dD][89abAB])[0-9a-fA-F]{4}
        |\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})+""",
    re.VERBOSE | re.DOTALL,
)
"""The part of a JSON string that can be read, whatever follows it."""
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u[0-9a-fA-F]{4}|\\.", re.DOTALL)
_PAIR_CHARS = 12
"""Of an escaped pair of surrogates, the longest thing in a string of which a part cannot be read."""
_DECODER = json.JSONDecoder(strict=False)
MAX_CALL_CHARS = 65_536
"""A longer object whose beginning does not show that it is a call is none: it is told as text."""


class CallDelta(msgspec.Struct, frozen=True):
    """A piece of a call; the first piece of each has its id and its name."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


class ToolCallParser:
    """Tells content and calls apart in one answer; `names` are the tools' names, `key` makes the calls' ids."""

    def __init__(self, key: str, names: Iterable[str], *, parallel: bool = True) -> None:
        self._key = key
        self._names = frozenset(names)
        self._parallel = parallel
        self._waiting = ""
        self._place: Literal["content", "between", "object", "string", "after", "rest"] = "content"
        """Where the text has come to: in a call, its arguments are an object or a string, and have something behind them."""
        self._nesting = _Nesting()
        self._told_content = False
        self._deltas: list[CallDelta] = []
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """Take more text; return the content, and of each call what is new, that are now certain."""
        self._waiting += text
        self._deltas = []
        content = self._take_content() if self._place == "content" else ""
        while self._waiting and self._step():
            continue
        return content, _joined(self._deltas)

    def flush(self) -> str:
        """Return, at the answer's end, what was held back and was no call after all."""
        rest, self._waiting = self._waiting, ""
        if self._place not in {"content", "between"}:
            return ""
        if self.num_calls:
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
                self._place = "between"
                return ""
        places = [place for marker in _MARKERS if (place := waiting.find(marker)) >= 0]
        if places:
            content, self._waiting = waiting[: min(places)], waiting[min(places) :]
            self._place = "between"
            return content if content.strip() else ""
        held = max(_overlap(waiting, marker) for marker in _MARKERS)
        content, self._waiting = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
        if not content.strip() and not self._told_content:
            self._waiting = content + self._waiting
            return ""
        self._told_content = self._told_content or bool(content)
        return content

    def _step(self) -> bool:
        """Take a step in the calls; False where it takes more text."""
        match self._place:
            case "between":
                return self._begin_call()
            case "object":
                return self._take_object()
            case "string":
                return self._take_string()
            case "after":
                return self._take_after()
            case "rest":
                end = self._nesting.end_in(self._waiting)
                self._waiting, self._place = ("", "rest") if end is None else (self._waiting[end:], "between")
                return end is not None
            case "content":
                return False

    def _begin_call(self) -> bool:
        start = _between(self._waiting)
        if self._waiting[start : start + 1] != "{":
            return False
        head = _HEAD.match(self._waiting, start)
        if head is None:
            return self._take_whole(start)
        name = _name_of(head[1])
        if name not in self._names:
            return False
        self._tell_name(name)
        self._waiting = self._waiting[head.end() :]
        self._place = "object" if self._waiting[0] == "{" else "string"
        self._nesting = _Nesting()
        if self._place == "string":
            self._waiting = self._waiting[1:]
        return True

    def _take_whole(self, start: int) -> bool:
        """Take a call whose beginning does not show it, when all of it is there."""
        if len(self._waiting) > MAX_CALL_CHARS:
            return False
        try:
            found, end = _DECODER.raw_decode(self._waiting, start)
        except (json.JSONDecodeError, RecursionError):
            return False
        name = found.get("name")
        if not isinstance(name, str) or name not in self._names:
            return False
        self._waiting = self._waiting[end:]
        self._tell_name(name)
        self._tell(_arguments_of(found))
        return True

    def _take_object(self) -> bool:
        end = self._nesting.end_in(self._waiting)
        if end is None:
            end = len(self._waiting)
        else:
            self._place = "after"
        self._tell(self._waiting[:end])
        self._waiting = self._waiting[end:]
        return self._place == "after"

    def _take_string(self) -> bool:
        """Take arguments that are JSON within a string: they are told without the string around them."""
        if (plain := _PLAIN.match(self._waiting)) is not None:
            self._tell(_unescaped(plain[0]))
            self._waiting = self._waiting[plain.end() :]
        elif self._waiting[0] == '"':
            self._waiting, self._place = self._waiting[1:], "after"
        elif len(self._waiting) >= _PAIR_CHARS:  # an escape that says nothing
            self._tell("\ufffd")
            self._waiting = self._waiting[2:]
        else:
            return False
        return True

    def _take_after(self) -> bool:
        """Take what is behind a call's arguments, to the end of its object; a model may have forgotten that."""
        bare = self._waiting.lstrip()
        if not bare:
            return False
        if bare[0] == ",":
            self._nesting = _Nesting(depth=1)
            self._waiting, self._place = bare, "rest"
        else:
            self._waiting, self._place = bare.removeprefix("}"), "between"
        return True

    def _tell_name(self, name: str) -> None:
        digest = hashlib.blake2b(f"{self._key}\0{self.num_calls}".encode(), digest_size=12).hexdigest()
        if self._parallel or not self.num_calls:
            self._deltas.append(CallDelta(self.num_calls, f"call_{digest}", name))
        self.num_calls += 1

    def _tell(self, arguments: str) -> None:
        if arguments and (self._parallel or self.num_calls == 1):
            self._deltas.append(CallDelta(self.num_calls - 1, arguments=arguments))


class _Nesting:
    """How deep in an object a text has come."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def end_in(self, text: str) -> int | None:
        """Take text in; return the place behind the object's end, if that is in it."""
        for place, char in enumerate(text):
            if self._in_string:
                self._in_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


def _joined(deltas: list[CallDelta]) -> list[CallDelta]:
    """Return the pieces with those of one call in one."""
    found: list[CallDelta] = []
    for delta in deltas:
        if found and found[-1].index == delta.index:
            arguments = found[-1].arguments + delta.arguments
            found[-1] = msgspec.structs.replace(found[-1], arguments=arguments)
        else:
            found.append(delta)
    return found


def _name_of(text: str) -> str | None:
    """Return the name that a JSON string is."""
    try:
        name: str = _DECODER.decode(text)
    except json.JSONDecodeError:
        return None
    return name


def _arguments_of(call: dict[str, Any]) -> str:
    arguments = call.get("arguments", call.get("parameters", {}))
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _unescaped(text: str) -> str:
    """Return a part of a JSON string as the text that it stands for; what is no escape stays as it is."""
    return _ESCAPE.sub(_unescape, text)


def _unescape(escape: re.Match[str]) -> str:
    try:
        found: str = _DECODER.decode(f'"{escape[0]}"')
    except json.JSONDecodeError:
        return escape[0]
    return found


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
