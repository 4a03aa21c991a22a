from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator

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
from tether.records import Role, Usage, WorkerState

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
        ControlNews("id", "boot", 1, ("address",), 2, 3, draining=False, sent_at=4.5),
    ):
        assert decode_news(encode(news)) == news
    assert decode_state(signed.payload) == make_state(held={"someone": 2})


def test_fields_that_a_newer_peer_adds_are_ignored() -> None:
    assert decode_link(b'{"type":"goodbye","reason":"bye","new_field":[1]}') == messages.Goodbye("bye")


def _types(root: object) -> list[tuple[str, msgspec.inspect.Type]]:
    """Return all types of what is in messages, with the struct and the field where each is."""
    found: list[tuple[str, msgspec.inspect.Type]] = []
    seen: set[object] = set()

    def walk(kind: object, place: str) -> None:
        if isinstance(kind, msgspec.inspect.StructType):
            if kind.cls not in seen:
                seen.add(kind.cls)
                for field in kind.fields:
                    walk(field.type, f"{kind.cls.__name__}.{field.name}")
        elif isinstance(kind, msgspec.inspect.Type):
            found.append((place, kind))
            for name in kind.__struct_fields__:
                inner = getattr(kind, name)
                for each in inner if isinstance(inner, tuple) else (inner,):
                    walk(each, place)

    walk(msgspec.inspect.type_info(root), "")
    return found


@pytest.mark.parametrize("root", [LinkMessage, News, WorkerState], ids=["links", "topics", "states"])
def test_no_integer_in_a_message_is_larger_than_the_store_can_hold(root: object) -> None:
    integers = [(place, kind) for place, kind in _types(root) if isinstance(kind, msgspec.inspect.IntType)]
    assert integers
    for place, kind in integers:
        assert kind.ge is not None, place
        assert kind.le is not None, place
        assert -(2**63) <= kind.ge <= kind.le <= 2**63 - 1, place


def test_nothing_that_a_worker_says_of_itself_is_without_bounds() -> None:
    bounded = [
        (place, kind)
        for place, kind in _types(WorkerState)
        if isinstance(
            kind,
            msgspec.inspect.StrType
            | msgspec.inspect.DictType
            | msgspec.inspect.VarTupleType
            | msgspec.inspect.FloatType,
        )
    ]
    assert len(bounded) > 10
    for place, kind in bounded:
        if isinstance(kind, msgspec.inspect.FloatType):
            assert kind.ge == 0.0, place
            assert kind.le is not None, place
        else:
            assert kind.max_length is not None, place


EXTREMES = [10**400, -(10**400), 2**64, 2**63, -(2**63) - 1, 2**53 + 1, 2**31, -(2**31), -2, 1e308, -1e308]


@given(st.integers(0, len(KINDS) - 1), st.data())
def test_extreme_numbers_in_any_field_are_a_violation_or_fit_into_the_store(number: int, data: st.DataObject) -> None:
    kind = KINDS[number]
    extreme = st.sampled_from(EXTREMES) | st.integers(-(2**70), 2**70)
    body: dict[str, object] = {"type": kind.__struct_config__.tag}
    for field in msgspec.structs.fields(kind):
        text = str(field.type)
        plain = extreme if "int" in text or "float" in text else st.just("x")
        nested = st.builds(lambda each: {"prompt_tokens": each}, extreme) if "Usage" in text else plain
        body[field.name] = data.draw(nested if field.required or data.draw(st.booleans()) else st.just(None))
    body = {name: value for name, value in body.items() if value is not None}
    try:
        message = decode_link(msgspec.json.encode(body))
    except ProtocolViolation:
        return
    for value in _numbers(msgspec.to_builtins(message)):
        assert -(2**63) <= value < 2**63 or isinstance(value, float)


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, dict):
        yield from (number for each in value.values() for number in _numbers(each))
    elif isinstance(value, list | tuple):
        yield from (number for each in value for number in _numbers(each))


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


def test_little_of_what_is_malformed_is_repeated() -> None:
    for decode in DECODERS:
        with pytest.raises(ProtocolViolation) as caught:
            decode(msgspec.json.encode({"type": "x" * 60_000}))
        assert len(caught.value.message) < 250


@pytest.mark.parametrize("name", ["two\nlines", "end\n", "\x1b[2J", "\x7f", "\x9b1m", "\u2028", "\u202e"])
def test_a_name_is_on_one_line_and_steers_no_terminal(name: str) -> None:
    with pytest.raises(ProtocolViolation, match="malformed"):
        decode_state(encode(make_state(name=name)))


def test_a_name_may_be_of_any_script() -> None:
    state = make_state(name="Büro 2, 日本 👩\u200d🔬")
    assert decode_state(encode(state)) == state


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
