"""What numbers and names in a peer's messages may be: decoding refuses anything else, so that nothing further in meets it.

JSON has integers of any length. The store takes 64 bits, floats overflow, and a sum or a quotient of what a peer says ends
up where other peers' jobs are decided about. Each field of a message or record that a peer fills has one of these types.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MAX_COUNT = 2**31 - 1
MAX_NAME_CHARS = 255
"""Of what people call things, as the longest name of a host or a file."""
MAX_REVISION_CHARS = 1024
MAX_SLOTS = 65_536
"""Of one model on one worker."""
MAX_MODELS = 256
"""Of one worker."""
MAX_STATES = 256
"""Of workers, told together on a topic."""
MAX_HOLDERS = 4096
"""Orchestrators that one worker runs jobs for."""
MAX_CHOICES = 128
MAX_TOP = 32
"""Likeliest tokens told beside a chosen one."""
MAX_MESSAGE_CHARS = 16_384
"""Of an error; a message that carries it beside other things still fits into a frame."""
MAX_SECONDS = 1e9
"""Thirty years, which is how long anybody may ask to wait."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
LargeCount = Annotated[int, Meta(ge=0, le=2**53)]
"""Bytes, requests, and tokens of many answers together: sums of many still fit into the store's 64 bits."""
Change = Annotated[int, Meta(ge=-(2**53), le=2**53)]
"""A count that may be below nothing."""
Integer = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""As wide as the store's."""
Priority = Annotated[int, Meta(ge=-MAX_COUNT, le=MAX_COUNT)]
TokenId = Annotated[int, Meta(ge=-1, le=MAX_COUNT)]
"""-1 stands for a token whose id nobody knows."""
Seconds = Annotated[float, Meta(ge=0.0, le=MAX_SECONDS)]
LongSeconds = Annotated[float, Meta(ge=0.0, le=1e18)]
"""What many waits make together."""
Time = Annotated[float, Meta(ge=0.0, le=1e12)]
"""Unix seconds."""
Rate = Annotated[float, Meta(ge=0.0, le=1e12)]
Name = Annotated[
    str,
    Meta(max_length=MAX_NAME_CHARS, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z"),
]
"""On one line and read as it is written: names end up in logs and in tables on terminals."""
Revision = Annotated[str, Meta(max_length=MAX_REVISION_CHARS)]
Message = Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]
TokenText = Annotated[str, Meta(max_length=4096)]
Slots = Annotated[int, Meta(ge=0, le=MAX_SLOTS)]
FreeTokens = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""Room in a cache; the largest number stands for no bound."""
NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
