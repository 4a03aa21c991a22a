"""Embeddings from a model that was made to answer: the mean of the last hidden state over an input's tokens, of length 1.

One input at a time, one forward pass each, between the steps of the answers that run; no cache is used. The vectors are told
as the tokens of an answer are: each is one token with the id -1, whose text is the vector in base64 on a line of its own.
So an attempt elsewhere goes on after those that were told.
"""

from __future__ import annotations

import base64
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from tether.engine import Engine, is_device_broken
from tether.errors import ContextLengthExceeded, InvalidRequest, OutputInvalid, UnsupportedParameter
from tether.records import FinishReason, Usage
from tether.runtime_messages import Embed, End, Event, Generate, Started, Tokens, describe

MAX_WAITING = 64
"""Requests that are kept; a worker sends no more than it has slots."""


class _Work:
    """A request that is under way."""

    def __init__(self, request: Embed, inputs: list[list[int]]) -> None:
        self.request = request
        self.inputs = inputs
        self.num_prompt_tokens = sum(map(len, inputs))
        self.num_done = request.num_told
        self.is_started = False

    @property
    def usage(self) -> Usage:
        """Tokens that were read, and vectors that were made here."""
        return Usage(self.num_prompt_tokens, self.num_done - self.request.num_told)


class EmbeddingEngine:
    """An engine that gives embeddings beside its answers; both share the one thread, step by step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._model: Any = engine.model
        self._tokenizer: Any = engine.tokenizer
        self._work: deque[_Work] = deque()
        self._events: list[Event] = []
        self.info = msgspec.structs.replace(engine.info, embeds=True)

    @property
    def is_idle(self) -> bool:
        """Whether `step` would have nothing to do or to tell."""
        return self._engine.is_idle and not self._work and not self._events

    def knows(self, request_id: str) -> bool:
        """Whether a request with this id is live."""
        return self._engine.knows(request_id) or any(work.request.id == request_id for work in self._work)

    def add(self, request: Generate) -> None:
        """Take a request for an answer, as the engine does."""
        self._engine.add(request)

    def embed(self, request: Embed) -> None:
        """Take a request for embeddings, whose id is not live; no forward pass runs here.

        Raises `InvalidRequest` for tokens that the model does not have, `UnsupportedParameter` for a number of dimensions that
        is not the model's own, and `ContextLengthExceeded`.
        """
        width = self._width
        if request.dimensions not in (None, width):
            raise UnsupportedParameter(
                f"the vectors of {self.info.name} have {width} dimensions, and no other number", param="dimensions"
            )
        if len(self._work) >= MAX_WAITING:
            raise InvalidRequest("this runtime has as many requests for embeddings as it keeps")
        self._work.append(_Work(request, [self._ids(each) for each in request.inputs]))

    def cancel(self, request_id: str) -> bool:
        """End a request at once; False when it is not live."""
        for work in self._work:
            if work.request.id == request_id:
                self._end(work, "cancelled")
                return True
        return self._engine.cancel(request_id)

    def step(self) -> list[Event]:
        """Go on with the answers by a token, and with the embeddings by an input; return what is to be told, in order."""
        events = [] if self._engine.is_idle else self._engine.step()
        if self._work:
            self._advance(self._work[0])
            self._work.rotate(-1)  # who asks for one vector does not wait for who asks for a thousand
        events += self._events
        self._events = []
        return events

    def answer(self, request: Generate) -> tuple[str, FinishReason]:
        """Return the whole text of a request, while nothing else runs."""
        return self._engine.answer(request)

    def vector(self, ids: Sequence[int]) -> list[float]:
        """Return the embedding of an input, of Euclidean length 1; raises `OutputInvalid` where the model's output is no number."""
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=self._model.device)
            hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            mean = hidden.to(torch.float32).mean(dim=0)
            found: list[float] = torch.nn.functional.normalize(mean, dim=0).tolist()
        if not all(map(math.isfinite, found)):
            raise OutputInvalid("the model's output is not a number")
        return found

    @property
    def _width(self) -> int:
        return int(self._model.get_input_embeddings().embedding_dim)

    def _ids(self, each: str | tuple[int, ...]) -> list[int]:
        ids = list(self._tokenizer(each)["input_ids"] if isinstance(each, str) else each)
        if not ids:
            raise InvalidRequest("an input has no tokens", param="input")
        if not all(0 <= token_id < self._engine.num_vocabulary for token_id in ids):
            raise InvalidRequest("an input has token ids that this model does not have", param="input")
        if len(ids) > self.info.context_tokens:
            raise ContextLengthExceeded(
                f"an input has {len(ids)} tokens and {self.info.name} takes {self.info.context_tokens}", param="input"
            )
        return ids

    def _advance(self, work: _Work) -> None:
        key = work.request.id
        if not work.is_started:
            work.is_started = True
            self._events.append(Started(key, work.num_prompt_tokens))
        if work.num_done < len(work.inputs):
            try:
                vector = self.vector(work.inputs[work.num_done])
            except Exception as exc:
                if is_device_broken(exc):
                    raise
                error, retry = describe(exc)
                self._work.remove(work)
                self._events.append(End(key, "error", work.usage, error, retry))
                self._work.rotate(1)
                return
            self._events.append(Tokens(key, work.num_done, (-1,), to_text(vector)))
            work.num_done += 1
        if work.num_done >= len(work.inputs):
            self._end(work, "stop")
            self._work.rotate(1)

    def _end(self, work: _Work, reason: FinishReason) -> None:
        self._work.remove(work)
        self._events.append(End(work.request.id, reason, work.usage))


def to_text(vector: Sequence[float]) -> str:
    """Return a vector as it is told: float32, little-endian, in base64, on a line of its own."""
    return base64.b64encode(torch.tensor(vector, dtype=torch.float32).numpy().astype("<f4").tobytes()).decode() + "\n"
