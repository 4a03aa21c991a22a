from __future__ import annotations

import contextlib
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import make_job, make_state
from tether import messages
from tether.errors import ErrorInfo, ProtocolViolation
from tether.messages import (
    SENDERS,
    ControlNews,
    Hello,
    InferEnd,
    InferStart,
    InferTokens,
    JobEnd,
    LinkMessage,
    ModelNews,
    News,
    Presence,
    PresenceNews,
    Signed,
    Submit,
    decode_link,
    decode_news,
    decode_state,
    encode,
)
from tether.records import Role, Usage

KINDS = typing.get_args(LinkMessage)
DECODERS = [decode_link, decode_news, decode_state]


def test_every_message_has_its_senders_and_nothing_else_has() -> None:
    assert SENDERS.keys() == set(KINDS)
    assert all(senders <= set(typing.get_args(Role)) and senders for senders in SENDERS.values())


def test_tags_are_unique_and_say_what_they_are_in_lower_case() -> None:
    tags = [str(kind.__struct_config__.tag) for kind in (*KINDS, *typing.get_args(News))]
    assert len(set(tags)) == len(tags)
    assert all(tag == tag.lower() for tag in tags)


@pytest.mark.parametrize(
    "message",
    [
        Hello(1, "boot", ("worker",), "name", "here", (Signed(b"k", b"p", b"s"),), ("/ip4/127.0.0.1/tcp/1",)),
        Presence(Signed(b"\0\xff", b"payload", b"")),
        InferStart(make_job("🦊 \0 \u2028"), 2, ((1, 2, 3), ())),
        InferTokens("job", 1, 0, (5,), 'a "quote"'),
        InferEnd("job", 1, "error", Usage(1, 2), ErrorInfo("worker_failed", "x", None, 2.0), retry=True),
        Submit(make_job(), ((1,),), ("one ",)),
        JobEnd("job", "completed", 1, "stop", Usage(), text="whole"),
    ],
)
def test_a_message_comes_back_as_it_was_sent(message: LinkMessage) -> None:
    assert decode_link(encode(message)) == message


def test_news_and_states_come_back_as_they_were_sent() -> None:
    signed = Signed(b"k", encode(make_state(held={"someone": 2})), b"s")
    news: News
    for news in (
        PresenceNews((signed,)),
        ModelNews("demo", "1.0", ("a", "b")),
        ControlNews("id", "boot", 1, ("address",), 2, 3, draining=False),
    ):
        assert decode_news(encode(news)) == news
    assert decode_state(signed.payload) == make_state(held={"someone": 2})


def test_fields_that_a_newer_peer_adds_are_ignored() -> None:
    assert decode_link(b'{"type":"goodbye","reason":"bye","new_field":[1]}') == messages.Goodbye("bye")


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "a number": b"1",
    "a list": b"[]",
    "null": b"null",
    "no type": b"{}",
    "an unknown type": b'{"type":"launch"}',
    "a type that is no text": b'{"type":7}',
    "a missing field": b'{"type":"infer.tokens","job_id":"j"}',
    "a wrong field": b'{"type":"infer.cancel","job_id":1,"attempt":1}',
    "a number too large": b'{"type":"infer.cancel","job_id":"j","attempt":1e400}',
    "an unknown role": b'{"type":"welcome","protocol":1,"boot_id":"","roles":["king"],"name":"","region":"","chain":[]}',
    "half a surrogate": b'{"type":"goodbye","reason":"\\ud800"}',
    "no UTF-8": b'{"type":"goodbye","reason":"\xff\xfe"}',
    "bad base64": b'{"type":"presence","state":{"signer":"!","payload":"","signature":""}}',
    "too deep": b"[" * 100_000,
    "too deep in an object": b'{"type":' * 50_000,
    "two objects": b'{"type":"ping"}{"type":"ping"}',
    "an int where JSON has none": b'{"type":"infer.cancel","job_id":"j","attempt":NaN}',
}


@pytest.mark.parametrize("payload", MALFORMED.values(), ids=MALFORMED)
def test_malformed_bytes_are_a_violation_whoever_decodes_them(payload: bytes) -> None:
    for decode in DECODERS:
        with pytest.raises(ProtocolViolation, match="malformed"):
            decode(payload)


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_violation_and_nothing_else(payload: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(ProtocolViolation):
            decode(payload)


@given(
    st.integers(0, len(KINDS) - 1),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    ),
    st.data(),
)
def test_well_formed_json_of_any_shape_is_a_message_or_a_violation(
    number: int, value: object, data: st.DataObject
) -> None:
    kind = KINDS[number]
    body = {"type": kind.__struct_config__.tag}
    for name in kind.__struct_fields__:
        if data.draw(st.booleans()):
            body[name] = value
    with contextlib.suppress(ProtocolViolation):
        assert isinstance(decode_link(msgspec.json.encode(body)), kind)
