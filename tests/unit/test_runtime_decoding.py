"""From ids to text: whole characters, stop strings, ends; and the random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.decoding import Answer, TextStream, check_ids, check_sampling, ending_ids, uniform
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
        (Sampling(temperature=float("inf")), "temperature"),
        (Sampling(top_p=float("nan")), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(min_p=-0.1), "min_p"),
        (Sampling(min_p=1.1), "min_p"),
        (Sampling(min_p=float("nan")), "min_p"),
        (Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (Sampling(repetition_penalty=10.1), "repetition_penalty"),
        (Sampling(presence_penalty=2.1), "presence_penalty"),
        (Sampling(frequency_penalty=-2.1), "frequency_penalty"),
        (Sampling(frequency_penalty=float("nan")), "frequency_penalty"),
        (Sampling(logit_bias={1: 100.5}), "logit_bias"),
        (Sampling(logit_bias={1: float("nan")}), "logit_bias"),
        (Sampling(logit_bias={-1: 1.0}), "logit_bias"),
        (Sampling(logit_bias={1 << 40: 1.0}), "logit_bias"),
        (Sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias"),
        (Sampling(logprobs=-1), "logprobs"),
        (Sampling(logprobs=21), "logprobs"),
        (Sampling(min_tokens=-1), "min_tokens"),
        (Sampling(max_tokens=3, min_tokens=4), "min_tokens"),
        (Sampling(stop_token_ids=(-1,)), "stop_token_ids"),
        (Sampling(stop_token_ids=tuple(range(65))), "stop_token_ids"),
        (Sampling(n=0), "n"),
        (Sampling(n=129), "n"),
        (Sampling(regex=""), "regex"),
        (Sampling(regex="a" * 8193), "regex"),
        (Sampling(regex="a\\"), "regex"),
        (Sampling(regex="a", json_schema="{}"), "regex"),
        (Sampling(regex="a", min_tokens=1), "min_tokens"),
        (Sampling(json_schema="{}", ignore_eos=True), "ignore_eos"),
        (Sampling(json_schema="{"), "json_schema"),
    ],
)
def test_values_that_no_model_can_follow_are_refused_by_name(sampling: Sampling, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(sampling)
    assert caught.value.param == param


def test_the_ends_of_each_range_are_allowed() -> None:
    check_sampling(
        Sampling(
            max_tokens=5,
            temperature=1e-9,
            top_p=1.0,
            top_k=10**9,
            min_p=1.0,
            repetition_penalty=0.1,
            presence_penalty=-2.0,
            frequency_penalty=2.0,
            logit_bias={0: -100.0, (1 << 31) - 1: 100.0},
            logprobs=20,
            min_tokens=5,
            ignore_eos=True,
            stop_token_ids=tuple(range(64)),
            n=128,
        )
    )
    check_sampling(Sampling(regex="a\\\\"))
    check_sampling(Sampling(json_schema="true"))


@pytest.mark.parametrize(
    ("sampling", "param"),
    [(Sampling(stop_token_ids=(3, 9)), "stop_token_ids"), (Sampling(logit_bias={9: 1.0}), "logit_bias")],
)
def test_ids_beyond_the_vocabulary_are_refused_by_name(sampling: Sampling, param: str) -> None:
    check_ids(sampling, 10)
    with pytest.raises(InvalidRequest) as caught:
        check_ids(sampling, 9)
    assert caught.value.param == param


def test_sampling_written_before_it_had_these_fields_still_loads() -> None:
    old = b'{"max_tokens":3,"temperature":0.5,"top_p":0.25,"stop":["a"],"seed":4}'
    assert msgspec.json.decode(old, type=Sampling) == Sampling(3, 0.5, 0.25, ("a",), 4)


def test_sampling_goes_through_json_whole() -> None:
    whole = Sampling(logit_bias={7: -1.5, 0: 2.0}, stop_token_ids=(1, 2), json_schema='{"a": "é"}', logprobs=3)
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Sampling) == whole


def test_an_answer_ends_at_the_models_ends_and_the_callers() -> None:
    assert ending_ids(Sampling(stop_token_ids=(5,)), frozenset({1})) == {1, 5}
    assert ending_ids(Sampling(stop_token_ids=(5,), ignore_eos=True), frozenset({1})) == {5}


def test_a_stop_token_that_has_text_is_counted_and_not_told() -> None:
    stop_id = ids_of("c")[0]
    answer = Answer(bytes_to_text, ending_ids(Sampling(stop_token_ids=(stop_id,)), frozenset({END})), (), 100)
    assert [answer.push(token_id) for token_id in ids_of("abc")] == ["a", "b", ""]
    assert (answer.finish_reason, len(answer.ids)) == ("stop", 3)


def test_an_end_that_is_ignored_adds_nothing_and_the_answer_goes_on() -> None:
    answer = Answer(bytes_to_text, ending_ids(Sampling(ignore_eos=True), frozenset({END})), ("c",), 100)
    assert [answer.push(token_id) for token_id in [*ids_of("a"), END, *ids_of("bc")]] == ["a", "", "b", ""]
    assert answer.finish_reason == "stop"


def test_a_stop_string_may_begin_inside_one_token_and_end_inside_another() -> None:
    pieces = ["One ", "to", "o ma", "ny, I say", "!"]
    answer = Answer(lambda ids: "".join(pieces[token_id] for token_id in ids), frozenset(), ("oo many, I",), 100)
    told = [answer.push(token_id) for token_id in range(4)]
    assert told == ["One ", "t", "", ""]
    assert answer.finish_reason == "stop"


def test_an_end_inside_a_character_tells_what_there_is() -> None:
    assert run([*ids_of("aé")[:2], END]) == (["a", "", "\ufffd"], "stop")


def test_each_choice_of_a_prompt_has_numbers_of_its_own() -> None:
    numbers = {uniform(seed, position, choice) for seed in range(10) for position in range(10) for choice in range(10)}
    assert len(numbers) == 1000
    assert uniform(7, 3, 0) == uniform(7, 3)


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
