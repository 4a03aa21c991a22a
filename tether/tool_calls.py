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
MAX_HEAD_CHARS = 1024
"""A call's beginning that is longer, far beyond any tool's name, shows nothing: it is a call when it is whole."""
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
        self._skipped = ""
        """What stands before the first call, and is text where there is none after all."""
        self._place: Literal["content", "between", "begun", "object", "string", "after", "rest", "text"] = "content"
        """Where the text has come to: an object may have begun, and be a call, whose arguments are an object or a string and
        have something behind them; or what comes is text to the end."""
        self._nesting = _Nesting()
        self._num_nested = 0
        """How much of a begun object is in the nesting already."""
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
        if (
            self._place == "text" and not self.num_calls
        ):  # behind calls it waits for the end: all content is before them
            content += self._skipped + self._waiting
            self._skipped = self._waiting = ""
        return content, _joined(self._deltas)

    def flush(self) -> str:
        """Return, at the answer's end, what was held back and was no call after all."""
        rest, self._waiting = self._waiting, ""
        if self._place not in {"content", "between", "begun", "text"}:
            return ""
        return rest[_between(rest) :] if self.num_calls else self._skipped + rest

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
            return content if self._told_content or content.strip() else ""
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
                return self._find_object()
            case "begun":
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
            case "content" | "text":
                return False

    def _find_object(self) -> bool:
        """Skip what stands between calls."""
        start = _between(self._waiting)
        if self._waiting[:start].endswith("[") and "[TOOL_CALLS]".startswith(self._waiting[start - 1 :]):
            start -= 1  # it may be no bracket, but a marker's beginning
        self._skipped += self._waiting[:start]
        self._waiting = self._waiting[start:]
        if self._waiting[:1] == "{":
            self._place, self._nesting, self._num_nested = "begun", _Nesting(), 0
            return True
        if not any(marker.startswith(self._waiting) for marker in (*_MARKERS, "</tool_call>")):
            self._place = "text"
        return False

    def _begin_call(self) -> bool:
        """Take a call's beginning; or all of a call whose beginning does not show it."""
        head = _HEAD.match(self._waiting, 0, MAX_HEAD_CHARS)
        if head is None:
            return self._take_whole()
        name = _name_of(head[1])
        if name not in self._names:
            self._place = "text"
            return False
        self._tell_name(name)
        self._waiting = self._waiting[head.end() :]
        self._place = "object" if self._waiting[0] == "{" else "string"
        self._nesting = _Nesting()
        if self._place == "string":
            self._waiting = self._waiting[1:]
        return True

    def _take_whole(self) -> bool:
        new = self._waiting[self._num_nested : MAX_CALL_CHARS]
        end = self._nesting.end_in(new)
        if end is None:
            self._num_nested += len(new)
            if self._num_nested >= MAX_CALL_CHARS:
                self._place = "text"
            return False
        end += self._num_nested
        call = _call_of(self._waiting[:end])
        if call is None or call[0] not in self._names:
            self._place = "text"
            return False
        self._waiting, self._place = self._waiting[end:], "between"
        self._tell_name(call[0])
        self._tell(call[1])
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
        self._skipped = ""

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


def _call_of(text: str) -> tuple[str, str] | None:
    """Return the name and the arguments in an object that may be a call."""
    try:
        call: dict[str, Any] = _DECODER.decode(text)
        arguments = call.get("arguments", call.get("parameters", {}))
        told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):  # no JSON, a number of too many digits, or too deep
        return None
    name = call.get("name")
    return (name, _sendable(told)) if isinstance(name, str) else None


def _unescaped(text: str) -> str:
    """Return a part of a JSON string as the text that it stands for; what is no escape stays as it is."""
    return _sendable(_ESCAPE.sub(_unescape, text))


def _sendable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON can name but no UTF-8 can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
