"""How far a client has read a stream: the `id:` of each chunk, and what a client that comes back names as its last.

The number of characters of each choice that the client has, so that any gateway can go on from there, with or without
tokens: `12`, or `12,7` for two choices. Before a choice's first chunk `-`, after its last an `e` (`12e`), and after the
whole stream's usage a `u` at the end.
"""

from __future__ import annotations

import re

from tether.errors import InvalidRequest

_FORM = re.compile(r"(?:-|\d{1,9}e?)(?:,(?:-|\d{1,9}e?))*u?", re.ASCII)


class Cursor:
    """A place in a stream of some choices."""

    def __init__(self, num_choices: int = 1) -> None:
        self.chars = [-1] * num_choices
        """Characters of each choice that were told; -1 before its first chunk."""
        self.ended = [False] * num_choices
        self.has_usage = False

    @classmethod
    def parse(cls, text: str, num_choices: int, param: str) -> Cursor:
        """Return the cursor that a client names; raise `InvalidRequest` for one that is none of this stream's."""
        if _FORM.fullmatch(text) is None:
            raise InvalidRequest(f"{param} must be the id of an event of this stream", param=param)
        pieces = text.removesuffix("u").split(",")
        if len(pieces) != num_choices:
            raise InvalidRequest(
                f"{param} is the id of another stream: this one has {num_choices} choices", param=param
            )
        cursor = cls(num_choices)
        cursor.has_usage = text.endswith("u")
        for choice, piece in enumerate(pieces):
            cursor.ended[choice] = piece.endswith("e")
            cursor.chars[choice] = -1 if piece == "-" else int(piece.removesuffix("e"))
        return cursor

    def furthest(self, other: Cursor) -> Cursor:
        """Return how far a client has read that has read as far as this cursor and another of the same stream."""
        found = Cursor(len(self.chars))
        found.chars = [max(pair) for pair in zip(self.chars, other.chars, strict=True)]
        found.ended = [one or two for one, two in zip(self.ended, other.ended, strict=True)]
        found.has_usage = self.has_usage or other.has_usage
        return found

    def __str__(self) -> str:
        if len(self.chars) == 1 and self.chars[0] >= 0 and not (self.ended[0] or self.has_usage):
            return str(self.chars[0])  # as nearly every event of nearly every stream has it
        pieces = [
            "-" if chars < 0 else f"{chars}{'e' if ended else ''}"
            for chars, ended in zip(self.chars, self.ended, strict=True)
        ]
        return ",".join(pieces) + ("u" if self.has_usage else "")
