"""From logits to token ids, for all rows of a step at once: bias, penalties, temperature, truncation, the draw.

The order is: guide, logit bias, the ban on ends (`min_tokens`), penalties, temperature, top-k, top-p, min-p.

Likelihoods are whole numbers of units before they are summed, so that sums do not depend on the order in which a device adds:
a draw is the same on one thread, on many, and on an accelerator, as far as the logits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from tether.decoding import check_ids, ending_ids, uniform
from tether.errors import OutputInvalid, RequestError
from tether.guided import Guide
from tether.records import Sampling, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What is told of a token that the model rules out, as OpenAI does: JSON has no infinity."""
TOP_P_SHARES = (32, 4)
"""On a CPU a thirty-second of the vocabulary is put in order for top-p, then a quarter, and all of it only where those do not
reach `top_p`."""
BLOCK_ELEMENTS = 1 << 17
"""On a CPU rows are shaped so many logits at a time, 1 MiB as float64, which stay in its cache from pass to pass: over 32
rows of 32,000 logits that takes a third of the time."""
PEAK_BLOCK = 128
"""On a CPU, logits that are looked through together for the likeliest one."""

_NOT_A_NUMBER = -1
_NOTHING_LEFT = -2


class Choice(msgspec.Struct, frozen=True):
    """What came out for one row."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    """Where the row's sampling asks for them."""


@dataclass(slots=True, eq=False)
class Row:
    """What the sampler keeps of one sequence from `Sampler.open` to `Sampler.close`; its fields are the sampler's."""

    sampling: Sampling
    choice: int
    position: int
    guide: Guide | None
    bias: _Additions | None = None
    ban: _Additions | None = None
    """What keeps the answer from ending before `min_tokens`."""
    slot: int | None = None
    """Where the sampler counts this row's tokens; None without a penalty."""

    is_plain: bool = False
    """Whether the likeliest id of the logits as they are is the one to take."""
    num_logprobs: int | None = None

    def update(self) -> None:
        """Note what the position changes."""
        self.is_plain = not (
            self.sampling.temperature or self.guide or self.bias or self.slot is not None or self.active_ban
        )

    @property
    def active_ban(self) -> _Additions | None:
        """The ban on ends, while the answer is too short to end."""
        return self.ban if self.position < self.sampling.min_tokens else None


@dataclass(frozen=True, slots=True)
class _Additions:
    """Values to add to the logits of some ids."""

    ids: torch.Tensor
    values: torch.Tensor


@dataclass(slots=True)
class _Counts:
    """Which tokens each penalised sequence has: a slot is a row of both tensors, of shape (slots, vocabulary)."""

    num_vocabulary: int
    device: torch.device
    seen: torch.Tensor = field(init=False)
    """Tokens of the prompt or the answer."""
    times: torch.Tensor = field(init=False)
    """How often the answer has each token."""
    free: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.seen = torch.zeros(0, self.num_vocabulary, dtype=torch.bool, device=self.device)
        self.times = torch.zeros(0, self.num_vocabulary, dtype=torch.int32, device=self.device)

    def take(self, prompt_ids: Sequence[int], emitted: Sequence[int]) -> int:
        """Return a slot that has counted these ids."""
        if not self.free:
            size = self.seen.shape[0]
            grown = max(4, 2 * size)
            self.seen = torch.cat([self.seen, self.seen.new_zeros(grown - size, self.num_vocabulary)])
            self.times = torch.cat([self.times, self.times.new_zeros(grown - size, self.num_vocabulary)])
            self.free = list(range(grown - 1, size - 1, -1))
        slot = self.free.pop()
        answer = _send(torch.tensor(list(emitted), dtype=torch.long), self.device)
        everything = _send(torch.tensor([*prompt_ids, *emitted], dtype=torch.long), self.device)
        self.seen[slot].zero_().index_fill_(0, everything, True)
        self.times[slot].zero_().index_add_(0, answer, torch.ones_like(answer, dtype=torch.int32))
        return slot

    def add(self, slots: torch.Tensor, ids: torch.Tensor) -> None:
        """Count one more id in each slot; a negative one is none."""
        valid, at = ids >= 0, ids.clamp(min=0)
        self.seen[slots, at] |= valid
        self.times[slots, at] += valid.int()


class Sampler:
    """Chooses the next token of every sequence in a batch.

    Usage: `row = sampler.open(...)` when a sequence starts or resumes; each step `sampler.choose(logits, rows)`, which also
    takes the chosen ids in (counts, guide, position); `sampler.close(row)` when it leaves. Not thread-safe.
    """

    def __init__(self, num_vocabulary: int, device: torch.device, end_ids: frozenset[int]) -> None:
        """Make a sampler for logits of `num_vocabulary` columns on `device`; `end_ids` are the model's own."""
        # Apple's GPUs have no 64-bit floats, which the draw needs: there all but plain argmax happens on the CPU.
        self._device = torch.device("cpu") if device.type == "mps" else device
        self._num_vocabulary = num_vocabulary
        self._end_ids = end_ids
        self._counts = _Counts(num_vocabulary, self._device)
        columns = torch.arange(num_vocabulary, device=self._device)
        self._mask_word, self._mask_bit = columns // 32, (columns % 32).int()
        # The likeliest token has 2**bits units and all together fewer than 2**62; a float64 has 53 bits.
        self._bits = min(52, 62 - num_vocabulary.bit_length())

    @torch.inference_mode()
    def open(
        self,
        sampling: Sampling,
        prompt_ids: Sequence[int],
        emitted: Sequence[int] = (),
        *,
        choice: int = 0,
        guide: Guide | None = None,
    ) -> Row:
        """Return the state of a sequence whose answer so far is `emitted`; `choice` tells the `n` answers of a job apart.

        A guided sampling needs its new `guide`, which is advanced over `emitted` here. Raises `InvalidRequest` for ids
        that the vocabulary does not have and for emitted ids that the guide does not allow.
        """
        if sampling.is_guided != (guide is not None):
            raise ValueError("a guide and a sampling that asks for one belong together")
        check_ids(sampling, self._num_vocabulary)
        if guide is not None:
            guide.resume(emitted)
        row = Row(sampling, choice, len(emitted), guide)
        if sampling.logit_bias:
            row.bias = self._additions(list(sampling.logit_bias), list(sampling.logit_bias.values()))
        # Even with `ignore_eos`, where an early end-of-sequence id would end nothing, it is no part of an answer.
        ends = sorted(ending_ids(sampling, self._end_ids) | self._end_ids)
        if ends and len(emitted) < sampling.min_tokens:
            row.ban = self._additions(ends, [float("-inf")] * len(ends))
        if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
            row.slot = self._counts.take(prompt_ids, emitted)
        row.num_logprobs = sampling.logprobs
        row.update()
        return row

    def close(self, row: Row) -> None:
        """Give a row's memory back; closing twice does nothing."""
        if row.slot is not None:
            self._counts.free.append(row.slot)
            row.slot = None

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> list[Choice | OutputInvalid | RequestError]:
        """Choose the next id of each row, given the logits, of shape (len(rows), vocabulary), any float dtype.

        A row whose logits leave nothing to choose (NaN, infinity, all ruled out) or whose guide became too complex has an
        error in its place, not raised: its sequence ends with it, and the other rows are not touched by it. `logits` is left
        as it is. One host synchronisation.
        """
        if not rows:
            return []
        shaped = [place for place, row in enumerate(rows) if not row.is_plain]
        telling = [place for place, row in enumerate(rows) if row.num_logprobs is not None]
        if shaped or telling:
            logits = logits.to(self._device)
        peaks, ids = _likeliest(logits)
        ids = torch.where(peaks.isfinite(), ids, _NOT_A_NUMBER)
        failed: dict[int, RequestError] = {}
        for block in self._blocks(shaped):
            ids = self._choose_shaped(logits, ids, rows, block, failed)
        numbers = self._logprobs(logits, ids, rows, telling) if telling else ids
        found = numbers.tolist()  # the step's one wait for the device
        return _told(rows, found, telling, failed)

    def _blocks(self, places: list[int]) -> list[list[int]]:
        """Return `places` in the portions in which they are worked on."""
        size = max(1, BLOCK_ELEMENTS // self._num_vocabulary) if self._device.type == "cpu" else len(places)
        return [places[first : first + size] for first in range(0, len(places), max(1, size))]

    def _choose_shaped(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        rows: Sequence[Row],
        places: list[int],
        failed: dict[int, RequestError],
    ) -> torch.Tensor:
        """Return `ids` with those of the rows at `places` chosen by their parameters."""
        chosen_rows = [rows[place] for place in places]
        work = _take(logits, places).to(torch.float64, copy=True)
        self._mask(work, chosen_rows, places, failed)
        self._add_biases(work, chosen_rows)
        self._penalise(work, chosen_rows)
        peak, best = _likeliest(work)
        peak = peak[:, None]  # NaN, where the row was
        drawn = [at for at, row in enumerate(chosen_rows) if row.sampling.temperature]
        if drawn:
            likely = self._draw(_take(work, drawn), _take(peak, drawn), [chosen_rows[at] for at in drawn])
            best = _put(best, drawn, likely)
        best = torch.where(peak[:, 0].isfinite(), best, _NOTHING_LEFT)
        was = _take(ids, places)
        best = torch.where(was < 0, was, best)
        counted = [at for at, row in enumerate(chosen_rows) if row.slot is not None]
        if counted:
            self._counts.add(self._slots(chosen_rows), _take(best, counted))
        return _put(ids, places, best)

    def _mask(
        self, work: torch.Tensor, rows: Sequence[Row], places: Sequence[int], failed: dict[int, RequestError]
    ) -> None:
        """Rule out what the guides do not allow."""
        guided = [(at, row.guide) for at, row in enumerate(rows) if row.guide is not None]
        if not guided:
            return
        masks = torch.full((len(guided), (self._num_vocabulary + 31) // 32), -1, dtype=torch.int32)
        for mask, (at, guide) in zip(masks, guided, strict=True):
            try:
                guide.fill_mask(mask)
            except RequestError as exc:
                failed[places[at]] = exc
        words = _send(masks, self._device).index_select(1, self._mask_word)
        allowed = (words >> self._mask_bit) & 1 == 1
        places_here = _send(torch.tensor([at for at, _ in guided]), self._device)
        work[places_here] = work[places_here].masked_fill(~allowed, float("-inf"))

    def _add_biases(self, work: torch.Tensor, rows: Sequence[Row]) -> None:
        """Add each row's logit biases, and its ban on ends."""
        found = [(at, a) for at, row in enumerate(rows) for a in (row.bias, row.active_ban) if a is not None]
        if not found:
            return
        sizes = [addition.ids.shape[0] for _, addition in found]
        owners = _send(torch.tensor([at for at, _ in found]).repeat_interleave(torch.tensor(sizes)), self._device)
        ids = torch.cat([addition.ids for _, addition in found])
        values = torch.cat([addition.values for _, addition in found])
        # An id may have both a bias and a ban, so the two must add up.
        work.index_put_((owners, ids), values, accumulate=True)

    def _penalise(self, work: torch.Tensor, rows: Sequence[Row]) -> None:
        """Make what was there before less likely.

        Repetition as in CTRL (Keskar et al. 2019, section 4.1) in the form of Hugging Face's
        `RepetitionPenaltyLogitsProcessor`, over prompt and answer: a positive logit is divided, a negative one multiplied.
        Then presence and frequency as in OpenAI's API, over the answer: logit - times * frequency - (times > 0) * presence.
        """
        places = [at for at, row in enumerate(rows) if row.slot is not None]
        if not places:
            return
        slots = self._slots(rows)
        seen, times = self._counts.seen.index_select(0, slots), self._counts.times.index_select(0, slots)
        repetition, presence, frequency = self._columns(
            [
                (
                    rows[at].sampling.repetition_penalty,
                    rows[at].sampling.presence_penalty,
                    rows[at].sampling.frequency_penalty,
                )
                for at in places
            ]
        )
        part = _take(work, places)
        repeated = torch.where(part < 0, part * repetition, part / repetition)
        part = torch.where(seen, repeated, part) - times * frequency - (times > 0) * presence
        work[_send(torch.tensor(places), self._device)] = part

    def _draw(self, work: torch.Tensor, peak: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Return each row's drawn id: where the cumulated likelihood, in the order of ids, passes the position's number.

        Not in the order of likelihood, where two nearly equal tokens that change places by a rounding error would change
        the choice. Rows without a finite `peak` come out as any id. `work` is used up.
        """
        settings = [row.sampling for row in rows]
        numbers = [uniform(row.sampling.seed, row.position, row.choice) for row in rows]
        temperature, number = self._columns([(s.temperature, u) for s, u in zip(settings, numbers, strict=True)])
        # Subtracting before dividing keeps a tiny temperature from overflowing; the likeliest token has weight 1.
        units = work.sub_(peak).div_(temperature).exp_().mul_(2.0**self._bits).long()
        self._keep_top_k(units, settings)
        self._keep_top_p(units, settings)
        self._keep_min_p(units, settings)
        cumulated = units.cumsum(-1)
        total = cumulated[:, -1:]
        target = torch.minimum((number * total).long(), total - 1)
        # right=True: the first id whose sum is above the target, so that an id of no units is never taken.
        found = torch.searchsorted(cumulated, target, right=True)
        return found[:, 0].clamp(max=self._num_vocabulary - 1)

    def _keep_top_k(self, units: torch.Tensor, settings: Sequence[Sampling]) -> None:
        """Keep the k likeliest tokens of each row (Fan et al. 2018), and those equal to the last of them."""
        places = [at for at, s in enumerate(settings) if 0 < s.top_k < self._num_vocabulary]
        if places:
            counts = [settings[at].top_k for at in places]
            part = _take(units, places)
            ordered = part.topk(max(counts)).values
            least = ordered.gather(-1, _send(torch.tensor(counts), self._device)[:, None] - 1)
            self._keep(units, places, part, least)

    def _keep_top_p(self, units: torch.Tensor, settings: Sequence[Sampling]) -> None:
        """Keep the likeliest tokens that together reach `top_p` (Holtzman et al. 2020), and those equal to the last of them."""
        places = [at for at, s in enumerate(settings) if s.top_p < 1]
        if not places:
            return
        # On an accelerator a sort is cheap, and asking whether fewer tokens are enough would be a wait.
        shares = TOP_P_SHARES if self._device.type == "cpu" else ()
        for width in [*(self._num_vocabulary // share for share in shares if share < self._num_vocabulary), 0]:
            part = _take(units, places)
            (wanted,) = self._columns([(settings[at].top_p,) for at in places])
            ordered = part.topk(width).values if width else part.sort(descending=True).values
            kept = (ordered.cumsum(-1) - ordered < wanted * part.sum(-1, keepdim=True)).sum(-1, keepdim=True)
            # Where all of them are kept, more may have to be: nothing is ruled out until the next, greater width.
            least = ordered.gather(-1, (kept - 1).clamp(min=0)).masked_fill(kept == ordered.shape[-1], 0)
            self._keep(units, places, part, least)
            if width:
                places = [at for at, count in zip(places, kept[:, 0].tolist(), strict=True) if count == width]
                if not places:
                    return

    def _keep_min_p(self, units: torch.Tensor, settings: Sequence[Sampling]) -> None:
        """Keep tokens that have at least `min_p` of the likeliest one's likelihood (Nguyen et al. 2024)."""
        places = [at for at, s in enumerate(settings) if s.min_p > 0]
        if places:
            (least,) = self._columns([(settings[at].min_p * 2.0**self._bits,) for at in places])
            self._keep(units, places, _take(units, places), least)

    def _keep(self, units: torch.Tensor, places: Sequence[int], part: torch.Tensor, least: torch.Tensor) -> None:
        units[_send(torch.tensor(places), self._device)] = part.masked_fill(part < least, 0)

    def _logprobs(
        self, logits: torch.Tensor, ids: torch.Tensor, rows: Sequence[Row], places: list[int]
    ) -> torch.Tensor:
        """Return the ids and, for the rows at `places`, the model's own log-probabilities, in one flat tensor."""
        wide = _take(logits, places).double()
        wide = (wide - wide.logsumexp(-1, keepdim=True)).nan_to_num_(LEAST_LOGPROB).clamp_(min=LEAST_LOGPROB)
        chosen = wide.gather(-1, _take(ids, places).clamp(min=0)[:, None])
        likeliest = wide.topk(_num_alternatives(rows, self._num_vocabulary))
        parts = [ids, chosen, likeliest.values, likeliest.indices]
        return torch.cat([part.double().flatten() for part in parts])

    def _additions(self, ids: list[int], values: list[float]) -> _Additions:
        return _Additions(
            _send(torch.tensor(ids, dtype=torch.long), self._device),
            _send(torch.tensor(values, dtype=torch.float64), self._device),
        )

    def _columns(self, values: Sequence[tuple[float, ...]]) -> tuple[torch.Tensor, ...]:
        """Return numbers given row by row as columns, each of shape (rows, 1), in one transfer."""
        return _send(torch.tensor(values, dtype=torch.float64), self._device)[:, :, None].unbind(1)

    def _slots(self, rows: Sequence[Row]) -> torch.Tensor:
        return _send(torch.tensor([row.slot for row in rows if row.slot is not None]), self._device)


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the greatest value of each row and the first id that has it; NaN counts as the greatest.

    A processor finds a maximum thirty times as fast as its place: over many logits, blocks are looked through first, and then one block.
    """
    num_ids = logits.shape[-1]
    if logits.device.type != "cpu" or logits.numel() < 1 << 17 or num_ids < 4 * PEAK_BLOCK:
        found = logits.max(-1)
        return found.values, found.indices
    whole = num_ids // PEAK_BLOCK
    peaks = logits[:, : whole * PEAK_BLOCK].reshape(-1, whole, PEAK_BLOCK).amax(-1)
    if whole * PEAK_BLOCK < num_ids:
        peaks = torch.cat([peaks, logits[:, whole * PEAK_BLOCK :].amax(-1, keepdim=True)], -1)
    block = peaks.argmax(-1, keepdim=True)
    ids = (block * PEAK_BLOCK + torch.arange(PEAK_BLOCK)).clamp_(max=num_ids - 1)
    within = logits.gather(-1, ids).argmax(-1, keepdim=True)
    return peaks.gather(-1, block)[:, 0], ids.gather(-1, within)[:, 0]


def _send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return host values on `device`, without waiting for what the device is doing: from pageable memory CUDA would."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _take(values: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Return the rows at `places`; all of them, in order, are not copied."""
    if len(places) == values.shape[0]:
        return values
    return values.index_select(0, _send(torch.tensor(places), values.device))


def _put(values: torch.Tensor, places: list[int], new: torch.Tensor) -> torch.Tensor:
    """Return `values` with the rows at `places` replaced."""
    if len(places) == values.shape[0]:
        return new
    return values.index_copy(0, _send(torch.tensor(places), values.device), new)


def _num_alternatives(rows: Sequence[Row], num_vocabulary: int) -> int:
    return min(num_vocabulary, max(row.num_logprobs or 0 for row in rows))


def _told(
    rows: Sequence[Row], numbers: list[float], telling: list[int], failed: dict[int, RequestError]
) -> list[Choice | OutputInvalid | RequestError]:
    """Take the chosen ids in, and return each row's outcome."""
    logprobs: dict[int, TokenLogprobs] = {}
    if telling:
        told = len(rows) + len(telling)
        width = (len(numbers) - told) // (2 * len(telling))
        for at, place in enumerate(telling):
            count = min(width, rows[place].num_logprobs or 0)
            first, first_id = told + at * width, told + (len(telling) + at) * width
            values, ids = numbers[first : first + count], numbers[first_id : first_id + count]
            top = tuple((int(token_id), value) for token_id, value in zip(ids, values, strict=True))
            logprobs[place] = TokenLogprobs(numbers[len(rows) + at], top)
    outcomes: list[Choice | OutputInvalid | RequestError] = []
    for place, row in enumerate(rows):
        token_id = int(numbers[place])
        if place in failed:
            outcomes.append(failed[place])
        elif token_id < 0:
            reason = "is not a number" if token_id == _NOT_A_NUMBER else "leaves nothing to choose"
            outcomes.append(OutputInvalid(f"the model's output {reason}"))
        else:
            if row.guide is not None:
                try:
                    row.guide.advance(token_id)
                except RequestError as exc:
                    outcomes.append(exc)
                    continue
            row.position += 1
            if row.ban is not None:
                row.update()
            outcomes.append(Choice(token_id, logprobs.get(place)))
    return outcomes
