"""Says in one sentence what is wrong with a request, from what its validator found."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tether.errors import InvalidRequest


def refusal(
    errors: Sequence[Mapping[str, Any]], noun: Literal["field", "parameter"], known: Iterable[str]
) -> InvalidRequest:
    """Return the first thing that is wrong, and where; `known` are the names that there are, for one that is none."""
    first = errors[0]
    place = [str(part) for part in first["loc"]]
    param = ".".join(place) or None
    if param is None:
        return InvalidRequest(f"it should be a JSON object: {first['msg']}")
    if first["type"] == "missing":
        message = f"the field {param!r} is missing"
    elif first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], [name for name in known if name != place[-1]], n=1)
        message = f"there is no {noun} {param!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    else:
        text = re.sub(r"^Input should be ", "it should be ", first["msg"])
        message = f"{param}: {text[:1].lower()}{text[1:]}"
    return InvalidRequest(message, param=param)


def why_unreadable(what: str, cause: BaseException | None) -> str | None:
    """Say why `what` cannot be read as JSON, where its reader says too little; None where it says enough."""
    match cause:
        case UnicodeDecodeError():
            return f"{what} is not UTF-8"
        case RecursionError():
            return f"{what} is nested too deeply"
        case json.JSONDecodeError() | None:
            return None
        case ValueError():
            return f"{what} has a number that is too large"
        case _:
            return None
