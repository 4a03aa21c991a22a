"""Answers that a JSON Schema or a regular expression describes: which token may come next; the only importer of llguidance.

A guide is a function of the ids so far, as all decoding is: a resumed answer advances a new guide over the emitted ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from llguidance import LLMatcher, LLTokenizer

from tether.errors import InvalidRequest
from tether.records import Sampling

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # the stubs have it, the library does not

_JSON_FORM: JsonCompileOptions = {
    # One way to write each value, as json.dumps does: a small model cannot lose itself in white space.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # What cannot be expressed is refused, never left out.
    "lenient": False,
    "coerce_one_of": False,
}


class Guides:
    """A model's vocabulary, made ready once to guide any number of its answers."""

    def __init__(self, tokenizer: Any, num_vocabulary: int, end_ids: frozenset[int]) -> None:
        """Read a fast Hugging Face tokenizer (1.5 s for 128,000 tokens, so build it at the first guided job).

        `num_vocabulary` is the width of the model's logits; ids that the tokenizer does not have are never allowed.
        Raises `InvalidRequest` for a tokenizer that cannot guide.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not end_ids:
            raise InvalidRequest("this model's tokenizer cannot follow a schema or a regular expression")
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        try:
            self._vocabulary = LLTokenizer(backend.to_str(), n_vocab=num_vocabulary, eos_token=sorted(end_ids))
        except ValueError as exc:
            raise InvalidRequest(
                f"this model's tokenizer cannot follow a schema or a regular expression: {_reason(str(exc))}"
            ) from exc

    def compile(self, sampling: Sampling) -> Guide:
        """Return the guide of one answer; `sampling` has passed `check_sampling` and has a schema or a regular expression.

        Takes milliseconds and, for the largest schemas, some tenths of a second. Raises `InvalidRequest`, naming
        `json_schema` or `regex`, for one that is not valid, that no grammar can express, or that is too large.
        """
        param = "regex" if sampling.json_schema is None else "json_schema"
        try:
            if sampling.json_schema is not None:
                grammar = _schema_grammar(sampling.json_schema)
            elif sampling.regex is not None:
                grammar = LLMatcher.grammar_from_regex(sampling.regex)
            else:
                raise InvalidRequest("there is neither a schema nor a regular expression to follow")
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        except (ValueError, RecursionError) as exc:
            raise InvalidRequest(f"{param} cannot be followed: {_reason(str(exc))}", param=param) from exc
        # Some grammars that allow no answer are found out only when the first token is asked for.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"{param} cannot be followed: {_reason(matcher.get_error())}", param=param)
        return Guide(matcher, param)


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, param: str) -> None:
        self._matcher = matcher
        self._param = param

    def copy(self) -> Guide:
        """Return the guide of another answer that stands where this one does, without compiling anything again."""
        return Guide(self._matcher.deep_copy(), self._param)

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return self._matcher.is_accepting()

    def fill_mask(self, mask: torch.Tensor) -> None:
        """Write which ids may come next: `mask` is int32 on the CPU, of shape (⌈vocabulary / 32⌉,), a bit for each id.

        Raises `InvalidRequest` where the grammar turns out to be too complex to go on; `mask` then says nothing.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
        if self._matcher.is_error():
            raise self._too_complex()

    def advance(self, token_id: int) -> None:
        """Take the next id of the answer, one that the mask allows; raises `InvalidRequest` as `fill_mask` does."""
        if not self._matcher.consume_token(token_id):
            raise self._too_complex()

    def resume(self, emitted: Iterable[int]) -> None:
        """Take the ids of an answer that goes on; raises `InvalidRequest` (`emitted`) for one that may not come."""
        for token_id in emitted:
            # Asked first: once refused, the library does not say whether the id was wrong or the grammar too complex.
            if not self._matcher.validate_tokens([token_id]):
                raise InvalidRequest(f"`emitted` has ids that {self._param} does not allow", param="emitted")
            self.advance(token_id)

    def _too_complex(self) -> InvalidRequest:
        reason = _reason(self._matcher.get_error())
        return InvalidRequest(f"{self._param} cannot be followed further: {reason}", param=self._param)


def _schema_grammar(text: str) -> str:
    schema = msgspec.json.decode(text)
    if schema is False:
        raise InvalidRequest("json_schema cannot be followed: false admits nothing", param="json_schema")
    if schema is True:
        schema = {}
    # The library takes options from here; the gateway's users do not choose them.
    schema.pop("x-guidance", None)
    return LLMatcher.grammar_from_json_schema(msgspec.json.encode(schema).decode(), overrides=_JSON_FORM)


def _reason(message: str) -> str:
    """Return the line of the library's many that says what is wrong."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
