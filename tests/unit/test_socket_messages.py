"""What is said on a socket, by itself: what is a message, whose it is, what is wrong with it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import InvalidRequest, RateLimited
from tether.guard import origin_of
from tether.socket_messages import Cancel, Create, Ping, Resume, Unreadable, error_message, id_of, parse, read

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each)
)


def test_each_kind_of_message_is_read() -> None:
    create = {"type": "create", "id": "a", "url": "/infer", "body": {"x": [1]}, "idempotency_key": "k", "after": "3"}
    assert parse(create) == Create(**create)  # type: ignore[arg-type]
    resume = {"type": "resume", "id": "a", "job_id": "j", "after": "3", "include_usage": True, "tenant_id": "t"}
    assert parse(resume) == Resume(**resume)  # type: ignore[arg-type]
    assert parse({"type": "cancel", "id": "a"}) == Cancel(type="cancel", id="a")
    assert parse({"type": "ping"}) == Ping(type="ping")


@given(
    JSON
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["create", "resume", "cancel", "ping"])},
        optional={"id": JSON, "url": JSON, "body": JSON, "job_id": JSON, "after": JSON},
    )
)
def test_whatever_comes_is_a_message_or_an_error_of_the_request(value: Any) -> None:
    with suppress(InvalidRequest):
        parse(value)
    assert id_of(value) is None or 1 <= len(value["id"]) <= 128


@given(st.text(max_size=20) | st.binary(max_size=20))
def test_whatever_a_frame_holds_is_json_or_unreadable(frame: str | bytes) -> None:
    code = 1000
    try:
        read(frame, 10)
    except Unreadable as exc:
        code = exc.code
    assert code in {1000, 1003, 1007, 1009}
    assert (code == 1003) == isinstance(frame, bytes)


def test_the_size_of_a_message_is_that_of_its_bytes() -> None:
    assert read('"éé"', 6) == "éé"
    with pytest.raises(Unreadable) as caught:
        read('"ééé"', 7)
    assert (caught.value.code, caught.value.error.status) == (1009, 413)


@pytest.mark.parametrize("name", ["", "x" * 129, "a\n", "\x7f", 7, None, ["a"]])
def test_what_cannot_be_an_id_names_no_job(name: Any) -> None:
    assert id_of({"type": "create", "id": name}) is None
    assert id_of({"type": "cancel", "id": "a"}) is None
    with pytest.raises(InvalidRequest) as caught:
        parse({"type": "resume", "id": name, "job_id": "j"})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == "id"


def test_an_error_says_what_its_answer_by_http_would() -> None:
    error = RateLimited("wait", retry_after_seconds=1.5)
    assert error_message(error, "a", "j") == {
        "type": "error",
        "id": "a",
        "job_id": "j",
        "status": 429,
        "headers": {"Retry-After": "2"},
        "error": {"message": "wait", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"},
    }


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://app.example", "https://app.example"),
        ("https://app.example:443/x", "https://app.example"),
        ("http://app.example:443", "http://app.example:443"),
        ("http://[::1]:80", "http://[::1]"),
        ("null", None),
        ("file://", None),
        ("https://", None),
        ("http://x:notaport", None),
        ("http://[", None),
    ],
)
def test_an_origin_is_scheme_host_and_port(url: str, origin: str | None) -> None:
    assert origin_of(url) == origin
