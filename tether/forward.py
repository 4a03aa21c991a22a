"""Forward passes for many sequences at once: rows of the KV cache, positions and masks; or one by one where that fails.

Both runners promise the same: `prefill` and `decode` compute the next tokens of sequences and return the logits after the
last one, of shape (sequences, vocabulary); tokens that were computed before, for them or for an ended sequence with the
same beginning, are not computed again. A sequence's `num_computed` moves only when its pass has succeeded.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from tether.batching import round_up
from tether.kvcache import FULL, SLIDING, KvCache, NotBatchable, Window
from tether.lanes import Lanes, divided
from tether.quantization import is_quantized
from tether.recording import Masks, NotRecordable, Pass, plain, record
from tether.rows import RowOwner, Rows

log = logging.getLogger(__name__)

PROBE_IDS = 12
"""Tokens of the sequences with which a model's batched passes are compared to its own."""


class Runnable(RowOwner, Protocol):
    """What a pass needs to know of a sequence: its tokens, and how many of them were computed."""

    cache: Any
    """A runner's own state of the sequence."""


Logits = tuple[list[Any], torch.Tensor]
"""Sequences in the order of the rows beside them."""


class Runner(Protocol):
    """How sequences get their logits."""

    num_reused_tokens: int
    """Prompt tokens that needed no work, in all."""

    def take(self, sequence: Any) -> None:
        """Give a sequence its place; sets `num_computed` to the tokens that are there already.

        Raises MemoryError where there is no room, or torch's own error; `CacheLost` where nobody has a place any more.
        """

    def release(self, sequence: Any, *, keep: bool = True) -> None:
        """Take its place back; what it holds may be reused, unless it is broken."""

    def prepare(self, decoding: Items[Any], reading: Items[Any]) -> None:
        """Make room for a step; before `decode` and `prefill`. Raises as `take` does."""

    def decode(self, sequences: Items[Any]) -> Logits:
        """Compute the one missing token of each."""

    def prefill(self, sequences: Items[Any], width: int) -> Logits:
        """Compute the next tokens of each, `width` at most."""

    @property
    def is_recurrent(self) -> bool:
        """Whether a pass that failed half-way leaves sequences that must be read again from the start."""


def _extra_arguments(model: Any) -> dict[str, Any]:
    # Without it a model computes logits for the whole prompt, of which only the last row is used.
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"use_cache": True, **({"logits_to_keep": 1} if keeps else {})}


class _Part:
    """Sequences whose rows lie side by side, and that go on together by one token a pass."""

    def __init__(self, sequences: Items[Any], cache: KvCache, device: torch.device) -> None:
        """Of sequences in the order of their rows."""
        starts = [sequence.num_computed for sequence in sequences]
        self.sequences = sequences
        self.positions = torch.tensor(starts, device=device)[:, None]
        self.longest: int = max(starts)
        self.window = Window(cache, sequences[0].row, len(sequences))


class BatchRunner:
    """All sequences in the rows of one cache."""

    def __init__(
        self, model: Any, *, max_rows: int, context_tokens: int, limit_bytes: int, lanes: Lanes | None = None
    ) -> None:
        """`lanes` are what the passes of a recorded model may be divided over.

        Raises `NotBatchable` for a model with layers of other kinds.
        """
        self._model = model
        self._device = model.device
        self.cache = KvCache(model.config, max_rows=max_rows, max_length=context_tokens, limit_bytes=limit_bytes)
        self.rows = Rows(self.cache, exact_only=self.cache.is_recurrent)
        self.num_reused_tokens = 0
        self._plain = plain(model, self.cache, _extra_arguments(model))
        self._recorded: dict[bool, Pass] = {}
        self._is_recording = False
        self._columns = torch.empty(0, dtype=torch.long, device=self._device)
        self._hidden = torch.tensor(torch.finfo(model.dtype).min, dtype=model.dtype, device=self._device)
        self._visible = torch.zeros((), dtype=model.dtype, device=self._device)
        self._lanes = lanes or Lanes(1)
        self._members: tuple[Any, ...] = ()
        self._ordered: list[Any] = []
        self._parts: list[_Part] = []

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state that a failed pass may have moved."""
        return self.cache.is_recurrent

    # --- places ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def take(self, sequence: Any) -> None:
        """Give a sequence a row, with the longest beginning that some row already holds."""
        cache, rows = self.cache, self.rows
        # Fewer than were given out, where the cache was lost since.
        rows.limit(cache.num_rows)
        if not cache.length:
            cache.resize(0, round_up(len(sequence.tokens) + 1))
        num_owned = rows.num_owned
        if num_owned == cache.num_rows and cache.reserve(num_owned + 1) == num_owned:
            # Rows that grew for a long sequence may be longer than those of today need.
            length = round_up(max(rows.longest_owned, len(sequence.tokens)) + 1)
            if length >= cache.length or cache.num_rows_within(length) <= num_owned:
                raise MemoryError("the KV cache has no room for another sequence")
            cache.resize(num_owned + 1, length)
            self._members = ()
        sequence.num_computed = rows.take(sequence)
        self.num_reused_tokens += sequence.num_computed

    @torch.inference_mode()
    def release(self, sequence: Any, *, keep: bool = True) -> None:
        """Take the row back."""
        row = sequence.row
        # It may come back to another row, or be read anew, before the next one decodes.
        self._members = ()
        self.rows.release(sequence, keep=keep)
        if not keep and row < self.cache.num_rows:
            self.cache.wipe_row(row)

    @torch.inference_mode()
    def prepare(self, decoding: Items[Any], reading: Items[Any]) -> None:
        """Grow the rows to the longest sequence, giving up kept ones first, and put the step's rows side by side."""
        cache, rows = self.cache, self.rows
        members = tuple(decoding)
        if members and members == self._members and not reading and self._longest + 2 < cache.length:
            return
        # A prompt's whole length at once: growing copies all rows, and others wait for their tokens meanwhile.
        longest = max(len(sequence.tokens) for sequence in [*decoding, *reading])
        length = cache.length_for(longest)
        if length > cache.length:
            num_owned = rows.num_owned
            if cache.num_rows_within(length) < num_owned:
                length = round_up(longest + 1)
            num_rows = min(cache.num_rows, max(num_owned, cache.num_rows_within(length)))
            if num_rows < cache.num_rows:
                rows.compact()
                rows.limit(num_rows)
            cache.resize(num_rows, length)
            self._members = ()
        if len(self._columns) != cache.length:
            self._columns = torch.arange(cache.length, device=self._device)
            self._members = ()
        if rows.arrange(decoding, reading):
            self._members = ()

    @property
    def _longest(self) -> int:
        return max(part.longest for part in self._parts)

    # --- passes ------------------------------------------------------------------------------------------------------

    def decode(self, sequences: Items[Any]) -> Logits:
        """Compute one token for each sequence, in the first rows."""
        members = tuple(sequences)
        goes_on = members == self._members
        self._members = ()
        if not goes_on:
            # Somebody joined, left or moved.
            self._ordered = sorted(members, key=lambda sequence: sequence.row)
            parts = divided(self._ordered, self._num_parts(len(members), 1))
            self._parts = [_Part(part, self.cache, self._device) for part in parts]
        logits = self._run([partial(self._go_on, part, goes_on=goes_on) for part in self._parts])
        self._members = members
        for sequence in members:
            sequence.num_computed += 1
        return self._ordered, logits

    @torch.inference_mode()
    def _go_on(self, part: _Part, *, goes_on: bool) -> torch.Tensor:
        if goes_on:
            part.positions += 1
            part.longest += 1
        ids = torch.tensor([sequence.tokens[-1] for sequence in part.sequences], device=self._device)[:, None]
        part.window.move(round_up(part.longest + 1), part.positions, goes_on=goes_on)
        return self._forward(ids, part.positions, part.window)

    def prefill(self, sequences: Items[Any], width: int) -> Logits:
        """Compute the next tokens of each sequence, in rows that lie side by side, shorter ones padded on the left."""
        ordered = sorted(sequences, key=lambda sequence: sequence.row)
        # A state takes in whatever it is given, padding too.
        num_parts = len(ordered) if self.cache.is_recurrent else self._num_parts(len(ordered), width)
        logits = self._run([partial(self._read, part, width) for part in divided(ordered, num_parts)])
        for sequence in ordered:
            sequence.num_computed = min(len(sequence.tokens), sequence.num_computed + width)
        return ordered, logits

    @torch.inference_mode()
    def _read(self, sequences: Items[Any], width: int) -> torch.Tensor:
        starts = [sequence.num_computed for sequence in sequences]
        pieces = [sequence.tokens[start : start + width] for sequence, start in zip(sequences, starts, strict=True)]
        longest = max(len(piece) for piece in pieces)
        ids = torch.tensor([[0] * (longest - len(piece)) + piece for piece in pieces], device=self._device)
        # Position of the first column, were the padding part of the sequence.
        offsets = [start - (longest - len(piece)) for start, piece in zip(starts, pieces, strict=True)]
        places = torch.tensor(offsets, device=self._device)[:, None] + torch.arange(longest, device=self._device)
        is_real = places >= torch.tensor(starts, device=self._device)[:, None]
        # The cache's last column belongs to nobody: padding goes there.
        columns = torch.where(is_real, places, self.cache.length - 1)
        end = max(start + len(piece) for start, piece in zip(starts, pieces, strict=True))
        window = Window(self.cache, sequences[0].row, len(sequences))
        window.move(round_up(end), columns)
        return self._forward(ids, places.clamp(min=0), window)

    def _num_parts(self, num_rows: int, num_tokens: int) -> int:
        """Into how many parts a pass is divided; only recorded ones may run side by side."""
        is_recorded = (num_tokens == 1) in self._recorded and not self._is_recording
        return self._lanes.num_parts(num_rows, num_tokens) if is_recorded else 1

    def _run(self, parts: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
        """Return the logits of all parts: side by side where they are recorded, else one after the other."""
        found = self._lanes.run(parts) if self._recorded and not self._is_recording else [part() for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, window: Window) -> torch.Tensor:
        """Run the model on ids and their positions, both (rows, tokens); return the last logits, (rows, vocabulary)."""
        masks = self._masks(positions, window.seen)
        # transformers' attention takes another way where there is one token a row.
        way = ids.shape[1] == 1
        if self._is_recording and way not in self._recorded:
            self._recorded[way] = record(self._plain, ids, positions, masks, window)
        return self._recorded.get(way, self._plain)(ids, positions, masks, window)

    def _masks(self, positions: torch.Tensor, num_seen: int) -> Masks:
        """Return the additive masks: each position sees itself and what came before."""
        cache = self.cache
        columns = self._columns[:num_seen]
        positions = positions[:, None, :, None]
        hidden = columns > positions
        masks = {}
        if FULL in cache.kinds or cache.window is None:
            masks[FULL] = torch.where(hidden, self._hidden, self._visible)
        if cache.window is not None:
            hidden = hidden | (columns <= positions - cache.window)
            masks[SLIDING] = torch.where(hidden, self._hidden, self._visible)
        return masks

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the passes in this block, one for each way that they can take, and run the recordings from then on.

        A pass in it may raise `NotRecordable`.
        """
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def forget_recordings(self) -> None:
        """Run passes as the model has them."""
        self._recorded = {}


def rope_switch(config: Any) -> int:
    """Return the length beyond which a model rotates all of a sequence's positions by other angles (LongRoPE, Ding et al. 2024).

    `sys.maxsize` for a model that does not. transformers looks at the longest sequence of a pass for it.
    """
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [
        rope,
        *(each for each in rope.values() if isinstance(each, dict)),
    ]  # one for each type of layer, or one for all
    return min(
        (each["original_max_position_embeddings"] for each in kinds if each.get("rope_type") == "longrope"),
        default=sys.maxsize,
    )


class SerialRunner:
    """One pass for each sequence, with the model's own cache: right for any model, and as slow as that."""

    is_recurrent = True

    def __init__(self, model: Any) -> None:
        self._model = model
        self._switch = rope_switch(model.config)
        self.num_reused_tokens = 0
        self._extra = _extra_arguments(model)

    def take(self, sequence: Any) -> None:
        """Begin with an empty cache."""
        sequence.cache, sequence.num_computed = None, 0

    def release(self, sequence: Any, *, keep: bool = True) -> None:  # noqa: ARG002 - nothing is kept
        """Drop its cache."""
        sequence.cache = None

    def prepare(self, decoding: Items[Any], reading: Items[Any]) -> None:
        """Nothing: a model's own cache grows by itself."""

    def decode(self, sequences: Items[Any]) -> Logits:
        """Compute the last token of each."""
        return self.prefill(sequences, 1)

    @torch.inference_mode()
    def prefill(self, sequences: Items[Any], width: int) -> Logits:
        """Compute the next tokens of each."""
        return list(sequences), torch.cat([self._read(sequence, width) for sequence in sequences])

    def _read(self, sequence: Any, width: int) -> torch.Tensor:
        if sequence.num_computed <= self._switch < len(sequence.tokens):
            # Its first tokens too are to be rotated by the other angles, as in a prompt of that length: read in one pass beyond it.
            sequence.cache, sequence.num_computed = None, 0
            width = max(width, self._switch + 1)
        piece = sequence.tokens[sequence.num_computed : sequence.num_computed + width]
        ids = torch.tensor([piece], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=sequence.cache, **self._extra)
        sequence.cache = out.past_key_values
        sequence.num_computed += len(piece)
        logits: torch.Tensor = out.logits[:, -1]
        return logits


class _Probe:
    """A sequence for trying a runner out."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.row = -1
        self.num_computed = 0
        self.cache: Any = None


@torch.inference_mode()
def disagreement(model: Any, runner: Runner, num_vocabulary: int) -> float:
    """Return how far a runner's logits are from the model's own, as a mean, in standard deviations of the logits.

    Two sequences of different lengths are read, and decode one token, in one batch.
    """
    ids = [(7 * place + 3) % num_vocabulary for place in range(PROBE_IDS)]
    probes = [_Probe(ids[: PROBE_IDS // 2]), _Probe([*ids[1:], ids[0]])]
    expected = [model(input_ids=torch.tensor([probe.tokens], device=model.device)).logits[0, -1] for probe in probes]
    held = [probe.tokens.pop() for probe in probes]
    for probe in probes:
        runner.take(probe)
    runner.prepare([], probes)
    runner.prefill(probes, PROBE_IDS)
    for probe, last in zip(probes, held, strict=True):
        probe.tokens.append(last)
    runner.prepare(probes, [])
    order, logits = runner.decode(probes)
    for probe in probes:
        runner.release(probe, keep=False)
    wanted = torch.stack([expected[probes.index(probe)] for probe in order]).float()
    return float((logits.float() - wanted).abs().mean() / wanted.std())


def choose_runner(
    model: Any,
    num_vocabulary: int,
    *,
    max_rows: int,
    context_tokens: int,
    limit_bytes: int,
    lanes: Lanes | None = None,
) -> Runner:
    """Return the fastest runner that gives this model's own logits; it has been warmed up.

    `lanes` are what a small model's passes may be divided over.
    """
    if context_tokens > rope_switch(model.config):
        log.warning("this model has other angles for long sequences than for short ones: they run one by one")
        return SerialRunner(model)
    tolerance = 1e-3 if model.dtype == torch.float32 and not is_quantized(model) else 0.1
    try:
        runner = BatchRunner(
            model, max_rows=max_rows, context_tokens=context_tokens, limit_bytes=limit_bytes, lanes=lanes
        )
        apart = disagreement(model, runner, num_vocabulary)
    except (NotBatchable, TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as exc:
        if "memory" in str(exc):
            raise
        log.warning("this model cannot run sequences together (%s: %s): they run one by one", type(exc).__name__, exc)
    else:
        # A model whose logits are no numbers is not a matter of batching.
        if not apart > tolerance:
            _record(model, runner, num_vocabulary, tolerance)
            runner.cache.unfold()
            return runner
        log.warning("this model's batched logits are off by %.2g: sequences run one by one", apart)
    return SerialRunner(model)


def _record(model: Any, runner: BatchRunner, num_vocabulary: int, tolerance: float) -> None:
    """Let a runner run a recording of the model's pass, where that is right and worth it: on a processor.

    An accelerator's work runs beside Python's, and TorchScript would compile kernels for each new size there.
    """
    if model.device.type != "cpu" or runner.is_recurrent:
        return
    model.requires_grad_(requires_grad=False)
    try:
        with runner.recording():
            disagreement(model, runner, num_vocabulary)
        apart = disagreement(model, runner, num_vocabulary)
    except NotRecordable as exc:
        log.info("this model's pass cannot be recorded: %s", exc)
        runner.forget_recordings()
        return
    if apart > tolerance:
        log.warning("this model's recorded pass is off by %.2g: it is not used", apart)
        runner.forget_recordings()
