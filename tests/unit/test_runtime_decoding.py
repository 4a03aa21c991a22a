"""From ids to text: whole characters, stop strings, ends; and the random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.decoding import Answer, TextStream, check_sampling, uniform
from tether.errors import InvalidRequest
from tether.records import Sampling

END = 0


def bytes_to_text(ids: Sequence[int]) -> str:
    """A tokenizer of bytes: id 1 + n is byte n, 0 is the end."""
    return bytes(token_id - 1 for token_id in ids if token_id).decode("utf-8", errors="replace")


def ids_of(text: str) -> list[int]:
    return [1 + byte for byte in text.encode()]


def words_to_text(ids: Sequence[int]) -> str:
    """A tokenizer that, like SentencePiece, drops the leading space of whatever it decodes first."""
    return "".join([" one", " two", " three", "!"][token_id] for token_id in ids).removeprefix(" ")


def run(ids: list[int], *, stop: tuple[str, ...] = (), max_tokens: int = 10_000) -> tuple[list[str], str | None]:
    answer = Answer(bytes_to_text, frozenset({END}), stop, max_tokens)
    texts = []
    for token_id in ids:
        texts.append(answer.push(token_id))
        if answer.finish_reason is not None:
            break
    return texts, answer.finish_reason


@given(st.text())
def test_any_text_comes_out_whole_and_never_with_half_a_character(text: str) -> None:
    stream = TextStream(bytes_to_text)
    pieces = [stream.push(token_id) for token_id in ids_of(text)]
    assert "".join(pieces) + stream.flush() == text
    assert all(piece.encode().decode() == piece for piece in pieces)


def test_a_character_of_several_tokens_is_told_with_its_last_one() -> None:
    stream = TextStream(bytes_to_text)
    assert [stream.push(token_id) for token_id in ids_of("é👋")] == ["", "é", "", "", "", "👋"]


def test_a_tokenizer_that_drops_leading_spaces_loses_none_between_words() -> None:
    stream = TextStream(words_to_text)
    assert "".join(stream.push(token_id) for token_id in [0, 1, 3, 2]) == "one two! three"


def test_bytes_that_are_no_character_are_told_at_the_end_as_they_stand() -> None:
    stream = TextStream(bytes_to_text)
    assert stream.push(1 + 0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_the_end_id_ends_the_answer_and_adds_no_text() -> None:
    assert run([*ids_of("ab"), END]) == (["a", "b", ""], "stop")


def test_an_answer_ends_with_length_at_its_last_id_and_tells_what_it_held() -> None:
    assert run(ids_of("abcd"), stop=("dx",), max_tokens=4) == (["a", "b", "c", "d"], "length")


def test_a_stop_string_over_several_tokens_is_never_told() -> None:
    assert run(ids_of("one, two, three"), stop=("two",)) == (["o", "n", "e", ",", " ", "", "", ""], "stop")


def test_what_only_began_like_a_stop_string_is_told_when_that_is_clear() -> None:
    texts, reason = run([*ids_of("twist"), END], stop=("two",))
    assert texts == ["", "", "twi", "s", "", "t"]
    assert reason == "stop"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    assert "".join(run(ids_of("abcdef"), stop=("de", "cdx", "bcd"))[0]) == "a"


def test_a_stop_string_may_hold_a_character_of_several_tokens() -> None:
    assert "".join(run(ids_of("São Tomé"), stop=("é",))[0]) == "São Tom"


@given(
    st.text(alphabet="abé👋", max_size=20),
    st.lists(st.text(alphabet="abé👋", min_size=1, max_size=4), max_size=3),
    st.integers(1, 60),
)
def test_told_text_is_the_text_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], max_tokens: int
) -> None:
    ids = ids_of(text)
    texts, _ = run([*ids, END], stop=tuple(stops), max_tokens=max_tokens)
    whole = bytes_to_text(ids[:max_tokens])
    # Of several stop strings the one that is complete first counts: a token here completes one character at most.
    for length in range(len(whole) + 1):
        starts = [whole[:length].find(stop) for stop in stops if stop in whole[:length]]
        if starts:
            whole = whole[: min(starts)]
            break
    assert "".join(texts) == whole


@given(
    st.text(alphabet="abé👋", min_size=1, max_size=12),
    st.lists(st.text(alphabet="abé👋", min_size=1, max_size=3), max_size=2),
    st.data(),
)
def test_a_replayed_answer_tells_the_rest_and_nothing_twice(text: str, stops: list[str], data: st.DataObject) -> None:
    ids = [*ids_of(text), END]
    whole, reason = run(ids, stop=tuple(stops))
    cut = data.draw(st.integers(0, len(whole)))
    again = Answer(bytes_to_text, frozenset({END}), tuple(stops), 10_000)
    replayed = [again.push(token_id) for token_id in ids[:cut]]
    rest = [again.push(token_id) for token_id in ids[cut : len(whole)]]
    assert replayed + rest == whole
    assert again.finish_reason == reason


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(max_tokens=0), "max_tokens"),
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=float("nan")), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(stop=("",)), "stop"),
        (Sampling(stop=("a",) * 17), "stop"),
    ],
)
def test_values_that_no_model_can_follow_are_refused_by_name(sampling: Sampling, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(sampling)
    assert caught.value.param == param


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500


@given(st.integers(), st.integers(0, 1 << 40))
def test_random_numbers_lie_in_the_unit_interval_for_any_seed(seed: int, position: int) -> None:
    assert 0 <= uniform(seed, position) < 1


def test_random_numbers_are_spread_evenly() -> None:
    counts = [0] * 10
    for position in range(20_000):
        counts[int(uniform(1, position) * 10)] += 1
    assert all(1800 < count < 2200 for count in counts)
