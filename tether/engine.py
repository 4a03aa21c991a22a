"""A loaded model and the requests that it answers: from a request to tokens, text, and its one end.

Models, tokenizers and configs are Hugging Face's as they are; the batch, the cache's layout, the sampling and the stopping
are ours. `Engine.step` is the story: who joins, who runs, what came out.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import msgspec
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tether import catalog, loading
from tether.batching import Batch, Limits, Plan
from tether.catalog import ModelSpec
from tether.chat import decode_chat, render
from tether.decoding import Answer, check_ids, check_sampling, ending_ids
from tether.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    QueueFull,
    from_info,
)
from tether.forward import BatchRunner, Runner, choose_runner
from tether.guided import Guide, Guides
from tether.kvcache import CacheLost
from tether.lanes import Lanes
from tether.packing import num_parameters
from tether.records import FinishReason, ModelInfo, Sampling, TokenLogprobs, Usage
from tether.runtime_messages import (
    End,
    Event,
    Generate,
    Stage,
    Started,
    Stats,
    Tokens,
    describe,
    is_out_of_memory,
)
from tether.sampling import Choice, Row, Sampler

log = logging.getLogger(__name__)

MAX_WAITING = 8
"""Requests beyond the slots that are kept in order; one more is told `queue_full`."""
USUAL_TOKENS = 2048
"""Slots are counted as if no sequence were longer; where many are, the youngest is put back."""
KV_SHARE = 0.5
"""The part of the free memory that the KV cache may take, on a machine that people work on; on a GPU it is 0.9."""


class Sequence:
    """One answer to one request on its way through the model; a request with `n` choices has n of them."""

    def __init__(
        self,
        request: Generate,
        choice: int,
        prompt_ids: list[int],
        answer: Answer,
        leader: Sequence | None,
        sampled: Row,
    ) -> None:
        self.request = request
        self.choice = choice
        self.tokens = [*prompt_ids, *answer.ids]
        """Prompt and answer so far; `push` adds to both."""
        self.num_tokens = len(self.tokens)
        self.num_computed = 0
        self.row = -1
        self.cache: Any = None
        self.leader = leader
        self.answer = answer
        self.num_emitted = len(answer.ids)
        self.ended: FinishReason | None = answer.finish_reason
        self.sampled = sampled
        """What the sampler keeps of it."""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that it adds."""
        self.tokens.append(token_id)
        self.num_tokens += 1
        return self.answer.push(token_id)

    @property
    def num_generated(self) -> int:
        """Tokens that were generated here."""
        return len(self.answer.ids) - self.num_emitted


class Job:
    """A request while it is live."""

    def __init__(self, request: Generate, sequences: list[Sequence], prompt_tokens: int) -> None:
        self.request = request
        self.sequences = sequences
        self.prompt_tokens = prompt_tokens
        self.arrived_at = time.monotonic()
        self.started_at: float | None = None
        self.has_token = False

    @property
    def live(self) -> list[Sequence]:
        """Its choices that go on."""
        return [sequence for sequence in self.sequences if sequence.ended is None]

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt, once it has started, and those generated here."""
        if self.started_at is None:
            return Usage()
        return Usage(self.prompt_tokens, sum(sequence.num_generated for sequence in self.sequences))


class Engine:
    """A model in memory, its tokenizer, and the requests that run on it.

    `add`, `cancel` and `step` return or leave events in the order in which they are to be told. Not thread-safe.
    """

    def __init__(self, model: Any, tokenizer: Any, info: ModelInfo, runner: Runner, limits: Limits) -> None:
        self.info = info
        self.model = model
        self.tokenizer = tokenizer
        # The context is enforced here, in `add`; the tokenizer would only print a warning.
        tokenizer.model_max_length = sys.maxsize
        self.num_vocabulary = _num_vocabulary(model)
        self.end_ids = _end_ids(model, tokenizer)
        self.runner = runner
        self._batch: Batch[Sequence] = Batch(limits)
        self._jobs: dict[str, Job] = {}
        self._events: list[Event] = []
        self._sampler = Sampler(self.num_vocabulary, model.device, self.end_ids)
        self._guides: Guides | None = None
        self._decode = _fast_decode(tokenizer)
        self._figures = _Figures()

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        *,
        device: str = "auto",
        threads: int | None = None,
        slots: int | None = None,
        kv_bytes: int | None = None,
        on_progress: Callable[[Stage, float], None] = lambda _stage, _fraction: None,
    ) -> Engine:
        """Load a model, downloading it first where need be; `on_progress` is told stage and fraction.

        `threads` of None gives each part of a small model's batch a thread of its own and leaves others to torch; `slots` of None is chosen by
        the model's size and the memory, `kv_bytes` of None is a share of what is free.
        Raises `ModelUnavailable` when the files do not make a model, or the device cannot hold it.
        """
        loaded = loading.load(spec, device=device, threads=threads, on_progress=on_progress)
        on_progress("warm-up", 0.0)
        with loading.explained(spec):
            lanes = Lanes(loading.num_lanes(loaded.model, threads))
            engine = cls.around(*loaded, slots=slots, kv_bytes=kv_bytes, lanes=lanes)
        on_progress("warm-up", 1.0)
        return engine

    @classmethod
    def around(
        cls,
        model: Any,
        tokenizer: Any,
        info: ModelInfo,
        *,
        slots: int | None = None,
        kv_bytes: int | None = None,
        lanes: Lanes | None = None,
    ) -> Engine:
        """Return the engine of a model that is in memory, warmed up; `info.slots` is set here."""
        limit_bytes = kv_bytes if kv_bytes is not None else _kv_limit_bytes(model.device)
        max_slots = slots if slots is not None else _most_slots(model)
        runner = choose_runner(
            model,
            _num_vocabulary(model),
            max_rows=2 * max_slots,
            context_tokens=info.context_tokens,
            limit_bytes=limit_bytes,
            lanes=lanes,
        )
        kv_tokens = sys.maxsize
        if isinstance(runner, BatchRunner):
            kv_tokens = limit_bytes // max(1, runner.cache.token_bytes)
            if slots is None:
                usual = max(1, min(info.context_tokens, USUAL_TOKENS))
                max_slots = max(1, min(max_slots, kv_tokens // usual))
        info = ModelInfo(**{**{name: getattr(info, name) for name in info.__struct_fields__}, "slots": max_slots})
        limits = Limits(max_slots, kv_tokens, chunk_tokens=_chunk_tokens(model), max_waiting=MAX_WAITING)
        return cls(model, tokenizer, info, runner, limits)

    # --- requests ----------------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether `step` would have nothing to do or to tell."""
        return not self._jobs and not self._events

    @property
    def stats(self) -> Stats:
        """The figures for presence."""
        return Stats(
            tokens_per_second=round(self._figures.tokens_per_second, 2),
            time_to_first_token_seconds=round(self._figures.first_token_seconds, 4),
            free_kv_tokens=self._batch.num_free_kv_tokens,
            reused_tokens=self.runner.num_reused_tokens,
            running=len(self._batch.running),
            waiting=len(self._batch.waiting),
        )

    def knows(self, request_id: str) -> bool:
        """Whether a request with this id is live."""
        return request_id in self._jobs

    def add(self, request: Generate) -> None:
        """Take a request, whose id is not live; its events come from the next steps. No forward pass runs here.

        Raises `InvalidRequest` for values that the model cannot follow, `ContextLengthExceeded` when the prompt leaves no
        room for an answer, `QueueFull` when as many wait as are kept.
        """
        sampling = request.sampling
        check_sampling(sampling)
        check_ids(sampling, self.num_vocabulary)
        if not all(0 <= token_id < self.num_vocabulary for ids in request.emitted for token_id in ids):
            raise InvalidRequest("`emitted` has ids that this model does not have", param="emitted")
        if len(request.emitted) > sampling.n:
            raise InvalidRequest("`emitted` has more choices than the request", param="emitted")
        if sampling.n > self.info.slots + MAX_WAITING:
            raise InvalidRequest(f"n must be at most {self.info.slots + MAX_WAITING} here", param="n")
        if not self._batch.can_take(sampling.n):
            raise QueueFull("this runtime has as many requests as it keeps")
        prompt_ids = self.prompt_ids(request)
        room = self._check_prompt(prompt_ids)
        guide = self._compile(sampling)
        sequences: list[Sequence] = []
        try:
            for choice in range(sampling.n):
                leader = sequences[0] if sequences else None
                sequences.append(self._open(request, choice, prompt_ids, min(sampling.max_tokens, room), leader, guide))
        except BaseException:
            for sequence in sequences:
                self._sampler.close(sequence.sampled)
            raise
        job = self._jobs[request.id] = Job(request, sequences, len(prompt_ids))
        for sequence in sequences:
            if sequence.ended is None:
                self._batch.add(sequence)
            else:  # what was emitted is all of it
                self._sampler.close(sequence.sampled)
        if not job.live:
            self._start(job)
            self._end(job)

    def cancel(self, request_id: str) -> bool:
        """End a request at once; return False when it is not live."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        self._drop(job)
        self._end(job, "cancelled")
        return True

    def answer(self, request: Generate) -> tuple[str, FinishReason]:
        """Return the whole text of a request's first choice, and how it ended, while nothing else runs.

        Raises what `add` raises, and the error with which the request ended.
        """
        self.add(request)
        text = ""
        while True:
            for event in self.step():
                if isinstance(event, Tokens) and event.choice == 0:
                    text += event.text
                elif isinstance(event, End):
                    if event.error is not None:
                        raise from_info(event.error)
                    return text, event.finish_reason

    # --- a step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """Compute the next token of every sequence that has a slot, and return what is to be told, in order.

        Raises only torch's error for an accelerator that this process cannot use any more: a new process can.
        """
        began = time.monotonic()
        self._admit()
        plan = self._batch.step()
        num_tokens = self._run(plan) if plan else 0
        self._figures.count(num_tokens, time.monotonic() - began)
        events, self._events = self._events, []
        return events

    def _admit(self) -> None:
        """Put back whom the cache cannot hold any more; let in whom it can."""
        while self._batch.is_crowded():
            self._put_back()
        while self._batch.can_admit():
            sequence = self._batch.admit()
            try:
                self.runner.take(sequence)
            except Exception as exc:  # noqa: BLE001 - torch has an error of its own for each device
                self._recover(exc, [sequence])
                return
            self._start(self._jobs[sequence.request.id])

    def _run(self, plan: Plan[Sequence]) -> int:
        """Run the plan's passes and take what comes out; return the number of new tokens."""
        num_tokens = 0
        running = [*plan.decode, *plan.prefill]
        in_pass = False
        try:
            self.runner.prepare(plan.decode, plan.prefill)
            in_pass = True
            if plan.decode:
                running = list(plan.decode)
                num_tokens += self._advance(*self.runner.decode(plan.decode))
            # With one gone, by a sibling's failure, the rows of the others no longer lie side by side: the next step reads them.
            if plan.prefill and all(sequence.ended is None for sequence in plan.prefill):
                running = list(plan.prefill)
                num_tokens += self._advance(*self.runner.prefill(plan.prefill, plan.width))
        except Exception as exc:  # noqa: BLE001 - a model may fail in any way; that is the end of these requests alone
            self._recover(exc, running, in_pass=in_pass)
        return num_tokens

    def _advance(self, sequences: list[Sequence], logits: torch.Tensor) -> int:
        """Choose and tell the next token of each sequence that is read, given its logits, of shape (sequences, vocabulary)."""
        read = [place for place, sequence in enumerate(sequences) if sequence.num_computed == sequence.num_tokens]
        if len(read) < len(sequences):
            sequences, logits = [sequences[place] for place in read], logits[read]
        try:
            chosen = self._sampler.choose(logits, [sequence.sampled for sequence in sequences])
        except Exception as exc:
            if is_device_broken(exc):
                raise
            self._fail(sequences, exc)
            return 0
        num_tokens = 0
        for sequence, choice in zip(sequences, chosen, strict=True):
            answer = sequence.answer
            if sequence.ended is not None:  # by a sibling's failure, earlier in this loop
                continue
            if not isinstance(choice, Choice):
                self._fail([sequence], choice, keep=False)
                continue
            position, token_id = len(answer.ids), choice.token_id
            text = sequence.push(token_id)
            logprobs = () if choice.logprobs is None else (self._with_texts(token_id, choice.logprobs),)
            self._events.append(Tokens(sequence.request.id, position, (token_id,), text, sequence.choice, logprobs))
            num_tokens += 1
            job = self._jobs[sequence.request.id]
            if not job.has_token:
                job.has_token = True
                self._figures.first_token(time.monotonic() - job.arrived_at)
            if answer.finish_reason is not None:
                self._leave(sequence, answer.finish_reason)
                if not job.live:
                    self._end(job)
        return num_tokens

    def _with_texts(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprobs:
        ids = [token_id, *(other for other, _ in logprobs.top)]
        return msgspec.structs.replace(logprobs, texts=tuple(self._decode([each]) for each in ids))

    # --- joining and leaving -----------------------------------------------------------------------------------------

    def _check_prompt(self, prompt_ids: list[int]) -> int:
        """Return how many tokens the context has left for an answer."""
        if not all(0 <= token_id < self.num_vocabulary for token_id in prompt_ids):
            # A tokenizer may have more than its model; in a pass one such id would be everybody's failure.
            raise InvalidRequest("the prompt has tokens that this model does not have", param="input")
        room = self.info.context_tokens - len(prompt_ids)
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_ids)} tokens and {self.info.name} takes {self.info.context_tokens}, "
                "answer included",
                param="input",
            )
        return room

    def _compile(self, sampling: Sampling) -> Guide | None:
        """Return what guides each of a request's choices, in a copy of its own: the largest schemas take a tenth of a second."""
        if not sampling.is_guided:
            return None
        if self._guides is None:
            self._guides = Guides(self.tokenizer, self.num_vocabulary, self.end_ids)
        return self._guides.compile(sampling)

    def _open(
        self,
        request: Generate,
        choice: int,
        prompt_ids: list[int],
        max_tokens: int,
        leader: Sequence | None,
        guide: Guide | None,
    ) -> Sequence:
        """Return a choice's sequence, which goes on after what was emitted of it."""
        sampling = request.sampling
        emitted = request.emitted[choice] if choice < len(request.emitted) else ()
        answer = Answer(self._decode, ending_ids(sampling, self.end_ids), sampling.stop, max_tokens)
        for token_id in emitted:
            if answer.finish_reason is not None:
                raise InvalidRequest("`emitted` goes on after the answer's end", param="emitted")
            answer.push(token_id)
        own_guide = None if guide is None else guide.copy()
        row = self._sampler.open(sampling, prompt_ids, emitted, choice=choice, guide=own_guide)
        return Sequence(request, choice, prompt_ids, answer, leader, row)

    def _start(self, job: Job) -> None:
        if job.started_at is None:
            job.started_at = time.monotonic()
            self._events.append(Started(job.request.id, job.prompt_tokens))

    def _leave(self, sequence: Sequence, reason: FinishReason, *, keep: bool = True) -> None:
        """Take a sequence out of the batch, running or waiting."""
        sequence.ended = reason
        self._batch.remove(sequence)
        if sequence.row >= 0 or sequence.cache is not None:
            self.runner.release(sequence, keep=keep)
        self._sampler.close(sequence.sampled)

    def _drop(self, job: Job, reason: FinishReason = "cancelled", *, keep: bool = True) -> None:
        for sequence in job.live:
            self._leave(sequence, reason, keep=keep)

    def _end(self, job: Job, reason: FinishReason | None = None, exc: Exception | None = None) -> None:
        """Tell a job's one end."""
        del self._jobs[job.request.id]
        usage = job.usage
        if usage.completion_tokens and job.started_at is not None and exc is None:
            self._figures.answered(usage.completion_tokens / len(job.sequences), time.monotonic() - job.started_at)
        ends = tuple(sequence.ended or "error" for sequence in job.sequences)
        error, retry = (None, False) if exc is None else describe(exc)
        self._events.append(
            End(
                job.request.id,
                reason or ends[0],
                usage,
                error,
                retry,
                round(self._figures.answer_tokens_per_second, 2),
                ends if len(ends) > 1 else (),
                self.stats,
            )
        )

    def _fail(self, sequences: Items[Sequence], exc: Exception, *, keep: bool = True) -> None:
        """End the jobs of these sequences with an error, and no others."""
        for request_id in dict.fromkeys(sequence.request.id for sequence in sequences):
            if (job := self._jobs.get(request_id)) is not None:
                self._drop(job, "error", keep=keep)
                self._end(job, "error", exc)

    def _put_back(self, *, keep: bool = True) -> None:
        """Let the youngest sequence wait; it keeps its tokens, and is read again when there is room, without `keep` from its first."""
        sequence = self._batch.put_back()
        if sequence.row >= 0 or sequence.cache is not None:
            self.runner.release(sequence, keep=keep)
        sequence.num_computed = 0

    def _recover(self, exc: Exception, sequences: list[Sequence], *, in_pass: bool = False) -> None:
        """Go on after work on these sequences failed: without room by putting the youngest back, else without them."""
        if is_device_broken(exc):
            raise exc
        if is_out_of_memory(exc) and len(self._batch.running) > 1:
            log.warning("out of memory with %d sequences; the youngest waits: %s", len(self._batch.running), exc)
            self._batch.shrink()
            # What recurrent layers took in before a pass failed cannot be told from what they would take in twice.
            if isinstance(exc, CacheLost) or (in_pass and self.runner.is_recurrent):
                while self._batch.running:
                    self._put_back(keep=False)
            else:
                self._put_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        self._fail(sequences, exc, keep=False)

    # --- text --------------------------------------------------------------------------------------------------------

    def prompt_ids(self, request: Generate) -> list[int]:
        """Return a request's prompt; raise `InvalidRequest` for a conversation that the chat template refuses."""
        if request.chat:
            return render(self.tokenizer, decode_chat(request.input)) or [min(self.end_ids, default=0)]
        return self.encode(request.input, raw=request.raw)

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
        return self._decode(list(ids))


def is_device_broken(exc: Exception) -> bool:
    """Whether an accelerator does nothing more for this process, as CUDA after a failed assertion in a kernel."""
    return isinstance(exc, torch.AcceleratorError) and "out of memory" not in str(exc)


class _Figures:
    """Moving averages for presence: one short answer, or one step, says little."""

    def __init__(self) -> None:
        self.answer_tokens_per_second = 0.0
        self.first_token_seconds = 0.0
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds else 0.0

    def count(self, num_tokens: int, seconds: float) -> None:
        """Take a step in; the last hundred or so weigh."""
        self._tokens = 0.99 * self._tokens + num_tokens
        self._seconds = 0.99 * self._seconds + seconds

    def first_token(self, seconds: float) -> None:
        self.first_token_seconds += (seconds - self.first_token_seconds) * (0.2 if self.first_token_seconds else 1.0)

    def answered(self, num_tokens: float, seconds: float) -> None:
        if seconds > 0:
            speed = num_tokens / seconds
            known = self.answer_tokens_per_second
            self.answer_tokens_per_second += (speed - known) * (0.2 if known else 1.0)


def _kv_limit_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.9)
    return int(catalog.free_memory_bytes() * KV_SHARE)


def _most_slots(model: Any) -> int:
    if model.device.type == "cuda":
        return 64
    return 32 if num_parameters(model) < loading.SMALL_PARAMETERS else 8


def _chunk_tokens(model: Any) -> int:
    return 512 if model.device.type == "cuda" else 128


def _num_vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _fast_decode(tokenizer: Any) -> Callable[[Items[int]], str]:
    """Return ids to text, special tokens left out, without the layers that a tokenizer puts around it for each call.

    With a byte-level tokenizer each token stands for its own bytes: they are asked for once, and joined here from then on,
    at a tenth of the price. A token whose bytes would not give its own text back ends that for good.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode(ids: Items[int]) -> str:
        text: str = backend.decode(ids, skip_special_tokens=True)
        return text

    if type(backend.decoder).__name__ != "ByteLevel":
        return decode
    special = frozenset(tokenizer.all_special_ids)
    bytes_of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    pieces: dict[int, bytes] = {}
    texts: dict[int, str] = {}
    is_plain = True

    def decode_bytes(ids: Items[int]) -> str:
        nonlocal is_plain
        if is_plain:
            try:
                if len(ids) == 1:
                    return texts[ids[0]]
                return b"".join([pieces[token_id] for token_id in ids]).decode("utf-8", "replace")
            except KeyError:
                for token_id in set(ids).difference(pieces):
                    token = "" if token_id in special else backend.id_to_token(token_id) or ""
                    piece = bytes(bytes_of_character.get(character, 0) for character in token)
                    is_plain = is_plain and piece.decode("utf-8", "replace") == decode([token_id])
                    pieces[token_id], texts[token_id] = piece, piece.decode("utf-8", "replace")
            return decode_bytes(ids)
        return decode(ids)

    return decode_bytes


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list) else [found])
