"""A loaded model and the sequences that run on it: the only importer of torch and transformers.

Models, tokenizers and configs are Hugging Face's as they are; the decode loop, the sampling and the stopping are ours.
One sequence runs at a time.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether import catalog
from tether.catalog import ModelSpec
from tether.decoding import Answer, check_sampling, uniform
from tether.errors import ContextLengthExceeded, InvalidRequest, ModelUnavailable, OutputInvalid
from tether.records import FinishReason, ModelInfo, Sampling, Usage
from tether.runtime_messages import Generate, Stage

log = logging.getLogger(__name__)

SMALL_PARAMETERS = 20_000_000
"""Below this a step is so short that handing parts of it to other threads costs more than it saves."""
DEFAULT_CONTEXT_TOKENS = 2048


class Engine:
    """A model in memory, its tokenizer, and what the network is told of it."""

    def __init__(self, model: Any, tokenizer: Any, info: ModelInfo) -> None:
        self.info = info
        self.model = model
        self.tokenizer = tokenizer
        # The context is enforced here, in `start`; the tokenizer would only print a warning.
        tokenizer.model_max_length = sys.maxsize
        self.num_vocabulary: int = model.get_input_embeddings().weight.shape[0]
        self.end_ids = _end_ids(model, tokenizer)
        # Without it a model computes logits for the whole prompt, of which only the last row is used.
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        *,
        device: str = "auto",
        threads: int | None = None,
        on_progress: Callable[[Stage, float], None] = lambda _stage, _fraction: None,
    ) -> Engine:
        """Load a model, downloading it first where need be; `on_progress` is told stage and fraction.

        `threads` of None lets a small model run on one thread and leaves others to torch.
        Raises `ModelUnavailable` when the files do not make a model, or the device cannot hold it.
        """
        chosen = _choose_device(device)
        folder = catalog.fetch(spec, lambda fraction: on_progress("download", fraction))
        spec = catalog.inspect_folder(spec, folder)
        if chosen.type == "cuda" and (spec.memory_need_bytes or 0) > (free := torch.cuda.mem_get_info(chosen)[0]):
            raise ModelUnavailable(
                f"`{spec.name}` needs {(spec.memory_need_bytes or 0) / 1e9:.1f} GB of the GPU's memory and "
                f"{free / 1e9:.1f} GB are free: choose a smaller model, or `--device cpu`"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        elif (spec.num_parameters or 0) < SMALL_PARAMETERS:
            torch.set_num_threads(1)
        on_progress("weights", 0.0)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            dtype = getattr(torch, spec.load_dtype)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            model = model.to(chosen).eval()
            on_progress("weights", 1.0)
            engine = cls(model, tokenizer, _info(spec, folder, model, tokenizer))
            on_progress("warm-up", 0.0)
            engine.forward([0], None)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as exc:
            log.debug("loading %s failed", folder, exc_info=True)
            raise ModelUnavailable(f"`{spec.name}` cannot be loaded: {_first_line(exc)}") from exc
        on_progress("warm-up", 1.0)
        return engine

    def start(self, request: Generate) -> Sequence:
        """Return the sequence that answers a request, before any of it has run.

        Raises `InvalidRequest` for values that the model cannot follow, `ContextLengthExceeded` when the prompt leaves no
        room for an answer.
        """
        check_sampling(request.sampling)
        if not all(0 <= token_id < self.num_vocabulary for token_id in request.emitted):
            raise InvalidRequest("`emitted` has ids that this model does not have", param="emitted")
        prompt_ids = self.encode(request.input, raw=request.raw)
        room = self.info.context_tokens - len(prompt_ids)
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_ids)} tokens and {self.info.name} takes {self.info.context_tokens}, "
                "answer included",
                param="input",
            )
        return Sequence(self, prompt_ids, request.sampling, min(request.sampling.max_tokens, room), request.emitted)

    def encode(self, text: str, *, raw: bool) -> list[int]:
        """Return a prompt's ids: `text` as a user's message in the chat template, or as it stands where there is none."""
        if self.tokenizer.chat_template is not None and not raw:
            message = [{"role": "user", "content": text}]
            ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer(text)["input_ids"]
        return list(ids) or [min(self.end_ids, default=0)]

    def decode(self, ids: Any) -> str:
        """Return the text of some ids, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @torch.inference_mode()
    def forward(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Run ids through the model after those in `cache`; return the last one's logits and the grown cache."""
        inputs = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, **self._extra)
        return out.logits[0, -1], out.past_key_values


class Sequence:
    """One request on its way through the model, one token a step.

    `emitted` are ids that were told before, elsewhere perhaps: the sequence goes on after them, with the same ids and the
    same text as if it had never stopped, as far as the model gives the same logits for them in one pass as one by one.
    """

    def __init__(
        self, engine: Engine, prompt_ids: list[int], sampling: Sampling, max_tokens: int, emitted: tuple[int, ...]
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._prompt_tokens = len(prompt_ids)
        self._num_emitted = len(emitted)
        self._cache: Any = None
        self._answer = Answer(engine.decode, engine.end_ids, sampling.stop, max_tokens)
        for token_id in emitted:
            if self._answer.finish_reason is not None:
                raise InvalidRequest("`emitted` goes on after the answer's end", param="emitted")
            self._answer.push(token_id)
        self._next_ids = prompt_ids + list(emitted)
        self._began: float | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended, or None while it goes on."""
        return self._answer.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt, and those that this sequence generated so far."""
        return Usage(self._prompt_tokens, len(self._answer.ids) - self._num_emitted)

    @property
    def seconds_running(self) -> float:
        """Time since the first step began."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def step(self) -> tuple[int, int, str]:
        """Generate one token and return its position in the answer, its id, and the text that it adds.

        Raises `OutputInvalid` when the model's logits are no numbers.
        """
        if self._began is None:
            self._began = time.monotonic()
        logits, self._cache = self._engine.forward(self._next_ids, self._cache)
        position = len(self._answer.ids)
        token_id = choose(logits, self._sampling, position)
        self._next_ids = [token_id]
        return position, token_id, self._answer.push(token_id)


@torch.inference_mode()
def choose(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Return the token id for `position`, given the logits, of shape (vocabulary,).

    Greedy at temperature 0. Otherwise the id where the cumulated probability, in float64 and in the order of ids, passes
    the position's random number: not in the order of probability, where two nearly equal tokens that change places by a
    rounding error would change the choice. `top_p` keeps the likeliest tokens that together reach it.
    Raises `OutputInvalid` when the logits are no numbers.
    """
    if not math.isfinite(logits.max().item()):
        raise OutputInvalid("the model's output is not a number")
    if sampling.temperature == 0:
        return int(logits.argmax())
    wide = logits.cpu().double()
    # Subtracting before dividing keeps a tiny temperature from overflowing.
    probabilities = torch.softmax((wide - wide.max()) / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        probabilities[ids[before >= sampling.top_p]] = 0.0
    cumulated = probabilities.cumsum(0)
    drawn = uniform(sampling.seed, position) * cumulated[-1]
    # right=True: the first id whose sum is above the number, so that an id of probability 0 is never taken.
    found = int(torch.searchsorted(cumulated, drawn, right=True))
    return min(found, int(probabilities.nonzero()[-1]))


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as exc:
        raise ModelUnavailable(f"this machine has no device `{device}`: {_first_line(exc)}") from exc
    return chosen


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])


def _info(spec: ModelSpec, folder: Path, model: Any, tokenizer: Any) -> ModelInfo:
    context = spec.context_tokens or min(tokenizer.model_max_length, DEFAULT_CONTEXT_TOKENS)
    return ModelInfo(
        name=spec.name,
        version=spec.version,
        # A snapshot of the hub lies in a folder named after its commit.
        revision=folder.name if spec.kind == "hub" else catalog.weights_hash(folder),
        dtype=str(model.dtype).removeprefix("torch."),
        context_tokens=context,
        tokenizer_hash=catalog.tokenizer_hash(folder),
        slots=1,
        toy=spec.toy,
    )


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
