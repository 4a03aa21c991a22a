"""The KV cache: a row for each sequence in a few large tensors, passed to an unmodified model as `past_key_values`.

A row has its own length. What a forward pass may see is said by an additive mask of four dimensions, which transformers'
models take as it is; the cache only stores, at the places that the pass was told, and returns views of the rows in use.
Recurrent layers (Mamba) have one state a row instead. Tensors are made at a layer's first use, when its shapes are known.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from tether.batching import round_up

FULL = "full_attention"
SLIDING = "sliding_attention"
RECURRENT = frozenset({"linear_attention", "conv"})
NONE = "dummy"


class NotBatchable(ValueError):
    """This model has layers whose rows cannot share a batch here."""


class CacheLost(MemoryError):
    """Rows were being moved or made anew and it failed half-way: nothing that any row held is there any more."""


class Views(NamedTuple):
    """One layer's keys and values for a pass.

    It writes (rows * heads * length, head_dim), all of the layer, and reads (rows of the pass, heads, seen, head_dim).
    """

    written_keys: torch.Tensor
    written_values: torch.Tensor
    seen_keys: torch.Tensor
    seen_values: torch.Tensor


@dataclass
class _Attention:
    """One layer's keys and values, each (rows, heads, length, head_dim): a head's tokens lie side by side, as attention reads them."""

    keys: torch.Tensor
    values: torch.Tensor
    num_heads: int


class Window:
    """The rows that a pass works on: where it writes, and how much it sees. Passes over windows that share no row may run side by side."""

    def __init__(self, cache: KvCache, first: int, count: int) -> None:
        """Of `count` rows from `first`; `move` it before a pass."""
        self.first = first
        self.count = count
        self.seen = 0
        self._cache = cache
        self._num_resizes = cache.num_resizes
        self._columns = torch.empty(0, dtype=torch.long)
        self._places: dict[int, torch.Tensor] = {}
        self._views: dict[int, Views] = {}

    def move(self, seen: int, columns: torch.Tensor, *, goes_on: bool = False) -> None:
        """Prepare a pass that sees `seen` tokens of each row.

        `columns`, of shape (count, tokens), are the places of its tokens in their rows; `goes_on` says that each is one
        further than in the pass before.
        """
        is_same = self._num_resizes == self._cache.num_resizes
        if goes_on and is_same:
            for places in self._places.values():
                places += 1  # noqa: PLW2901 - in place
        else:
            self._places.clear()
        if seen != self.seen or not is_same:
            self._views.clear()
        self.seen, self._columns, self._num_resizes = seen, columns, self._cache.num_resizes

    @property
    def places(self) -> tuple[torch.Tensor, ...]:
        """Where the pass writes, for each number of heads that some layer has, in the order of `KvCache.num_heads`."""
        return tuple(self.places_of(num_heads) for num_heads in self._cache.num_heads)

    @property
    def views(self) -> tuple[torch.Tensor, ...]:
        """The pass's views of all layers that have been used, one behind the other."""
        return tuple(tensor for number in self._cache.layers for tensor in self.views_of(number))

    def places_of(self, num_heads: int) -> torch.Tensor:
        """Return where the vectors of a layer go, row after row and head after head: (row * heads + head) * length + column."""
        if num_heads not in self._places:
            device = self._columns.device
            rows = torch.arange(self.first * num_heads, (self.first + self.count) * num_heads, device=device)
            vectors = (rows * self._cache.length).view(self.count, num_heads, 1)
            self._places[num_heads] = (vectors + self._columns[:, None, :]).flatten()
        return self._places[num_heads]

    def views_of(self, number: int) -> Views:
        """Return the pass's views of a layer."""
        if number not in self._views:
            layer = self._cache.layers[number]
            rows = slice(self.first, self.first + self.count)
            self._views[number] = Views(
                layer.keys.view(-1, layer.keys.shape[3]),
                layer.values.view(-1, layer.values.shape[3]),
                layer.keys[rows, :, : self.seen],
                layer.values[rows, :, : self.seen],
            )
        return self._views[number]

    def given(self, places: tuple[torch.Tensor, ...], views: tuple[torch.Tensor, ...]) -> Window:
        """Return this window with these tensors, as `places` and `views` have them, in place of its own."""
        window = Window(self._cache, self.first, self.count)
        window.seen, window._columns = self.seen, self._columns
        window._places = dict(zip(self._cache.num_heads, places, strict=True))
        window._views = {
            number: Views(*views[4 * place : 4 * place + 4]) for place, number in enumerate(self._cache.layers)
        }
        return window


class KvCache:
    """Rows of keys, values and states for all layers, growing on demand up to a limit in bytes."""

    def __init__(self, config: Any, *, max_rows: int, max_length: int, limit_bytes: int) -> None:
        """Raises `NotBatchable` for layer types other than full, sliding and recurrent."""
        types, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        unknown = set(types) - {FULL, SLIDING, NONE} - RECURRENT
        if unknown:
            raise NotBatchable(f"layers of type {', '.join(sorted(unknown))}")
        windows = {option["sliding_window"] for option in options if "sliding_window" in option}
        if len(windows) > 1:
            raise NotBatchable("sliding windows of different sizes")
        self.window: int | None = windows.pop() if windows else None
        self.kinds = frozenset(types)
        self.is_recurrent = bool(self.kinds & RECURRENT)
        self.num_rows = 0
        self.length = 0
        self._max_rows = max_rows
        # The last column belongs to nobody: padding is written there.
        self._max_length = round_up(max_length + 1)
        self._limit_bytes = limit_bytes
        self.layers: dict[int, _Attention] = {}
        """The attention layers that have been used, by number."""
        self._conv: dict[tuple[int, int], torch.Tensor] = {}
        self._recurrent: dict[tuple[int, int], torch.Tensor] = {}
        self.num_resizes = 0
        """How often the rows were made anew: a window's views of those before are no good."""
        self._window = Window(self, 0, 0)

    # --- room --------------------------------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        """Bytes for one token in one row; 0 before the first pass."""
        return sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for layer in self.layers.values()
            for tensor in (layer.keys, layer.values)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes for one row's states, however long it is; 0 before the first pass."""
        states = [*self._conv.values(), *self._recurrent.values()]
        return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in states)

    def num_rows_within(self, length: int) -> int:
        """Return how many rows of that length the limit allows."""
        each = max(1, self.token_bytes * length + self.row_bytes)
        return min(self._max_rows, self._limit_bytes // each)

    def reserve(self, num_rows: int) -> int:
        """Make room for rows, in doubling steps; return how many there are, fewer than asked at the limit."""
        if num_rows > self.num_rows:
            doubled = max(num_rows, min(2 * self.num_rows, self._max_rows))
            target = min(doubled, self.num_rows_within(self.length))
            if target > self.num_rows:
                self.resize(target, self.length)
        return self.num_rows

    def length_for(self, num_tokens: int) -> int:
        """Return the length of rows for that many tokens, padding's column included: half as long again as now, or as needed."""
        if num_tokens + 1 <= self.length:
            return self.length
        needed = round_up(num_tokens + 1)
        return max(needed, min(self._max_length, round_up(self.length * 3 // 2)))

    def resize(self, num_rows: int, length: int) -> None:
        """Make all rows anew with that many of that length, keeping what they hold; raises `CacheLost` where it cannot.

        Layer by layer, so that the old and the new are in memory together for one layer only.
        """
        rows = min(num_rows, self.num_rows)
        columns = min(length, self.length)
        with self._whole_or_lost():
            for layer in self.layers.values():
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = _zeros((num_rows, old.shape[1], length, old.shape[3]), old)
                    if rows and columns:
                        new[:rows, :, :columns] = old[:rows, :, :columns]
                    setattr(layer, name, new)
            for states in (self._conv, self._recurrent):
                for key, old in states.items():
                    new = old.new_zeros((num_rows, *old.shape[1:]))
                    new[:rows] = old[:rows]
                    states[key] = new
        self.num_rows, self.length = num_rows, length
        self.num_resizes += 1

    @contextmanager
    def _whole_or_lost(self) -> Iterator[None]:
        """Go back to no rows where the block fails, having changed some layers and not others; raises `CacheLost`."""
        try:
            yield
        except Exception as exc:
            for layer in self.layers.values():
                layer.keys, layer.values = (
                    old.new_empty((0, old.shape[1], 0, old.shape[3])) for old in (layer.keys, layer.values)
                )
            for states in (self._conv, self._recurrent):
                for key, old in states.items():
                    states[key] = old.new_empty((0, *old.shape[1:]))
            self.num_rows = self.length = 0
            self.num_resizes += 1
            raise CacheLost(f"the KV cache was lost: {exc}") from exc

    def unfold(self) -> None:
        """Make all rows at their full length, where memory takes no room before it is used and the limit allows it.

        Rows that never grow never have to be copied while others wait for their tokens.
        """
        if self.layers and self._is_lazy and self.num_rows_within(self._max_length) >= self._max_rows:
            self.resize(self._max_rows, self._max_length)

    @property
    def _is_lazy(self) -> bool:
        return all(layer.keys.device.type == "cpu" for layer in self.layers.values())

    # --- rows --------------------------------------------------------------------------------------------------------

    def swap_rows(self, one: int, other: int, num_one: int, num_other: int) -> None:
        """Exchange two rows, of which so many tokens count; a row of none is only overwritten. Raises `CacheLost`."""
        with self._whole_or_lost():
            for layer in self.layers.values():
                for tensor in (layer.keys, layer.values):
                    if not num_one or not num_other:
                        source, target, num = (one, other, num_one) if num_one else (other, one, num_other)
                        tensor[target, :, :num] = tensor[source, :, :num]
                    else:
                        held = tensor[one, :, :num_one].clone()
                        tensor[one, :, :num_other] = tensor[other, :, :num_other]
                        tensor[other, :, :num_one] = held
            for states in (self._conv, self._recurrent):
                for state in states.values():
                    held = state[one].clone()
                    state[one] = state[other]
                    state[other] = held

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first tokens of a row those of another; not for recurrent layers."""
        for layer in self.layers.values():
            for tensor in (layer.keys, layer.values):
                tensor[target, :, :num_tokens] = tensor[source, :, :num_tokens]

    def clear_row(self, row: int) -> None:
        """Begin a row anew: its states are those before the first token."""
        for states in (self._conv, self._recurrent):
            for state in states.values():
                state[row].zero_()

    def wipe_row(self, row: int) -> None:
        """Zero all of a row: what is masked out still takes part in sums, and a NaN times nothing is a NaN."""
        self.clear_row(row)
        for layer in self.layers.values():
            for tensor in (layer.keys, layer.values):
                tensor[row].zero_()

    # --- a pass ------------------------------------------------------------------------------------------------------

    @contextmanager
    def through(self, window: Window) -> Iterator[None]:
        """Let passes in this block work on a window, which has been moved."""
        before, self._window = self._window, window
        try:
            yield
        finally:
            self._window = before

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_args: Any, **_options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, of shape (rows, heads, tokens, head_dim); return all that the pass sees."""
        layer = self.layers.get(layer_idx)
        if layer is None:
            shapes = [(self.num_rows, new.shape[1], self.length, new.shape[3]) for new in (keys, values)]
            layer = _Attention(_zeros(shapes[0], keys), _zeros(shapes[1], values), keys.shape[1])
            self.layers[layer_idx] = layer
        places = self._window.places_of(layer.num_heads)
        views = self._window.views_of(layer_idx)
        # One kernel that copies whole vectors: twice as fast as assigning by row, head and column.
        views.written_keys.index_copy_(0, places, keys.reshape(-1, keys.shape[3]))
        views.written_values.index_copy_(0, places, values.reshape(-1, values.shape[3]))
        return views.seen_keys, views.seen_values

    @property
    def num_heads(self) -> tuple[int, ...]:
        """The numbers of key and value heads that layers have, as far as they have been used."""
        return tuple(sorted({layer.num_heads for layer in self.layers.values()}))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the rows' convolution states, to be changed in place; None before the first pass."""
        return self._slice(self._conv, layer_idx, state_idx)

    def update_conv_state(
        self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> torch.Tensor:
        """Put new columns behind the kept ones; return both, and keep the last `conv_kernel_size`."""
        key = (layer_idx, state_idx)
        size = conv_kernel_size or states.shape[-1]
        if key not in self._conv:
            self._conv[key] = states.new_zeros((self.num_rows, *states.shape[1:-1], size))
        kept = self._conv[key][self._window.first : self._window.first + self._window.count]
        whole = torch.cat([kept, states], dim=-1)
        kept.copy_(whole[..., -size:])
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the rows' recurrent states, to be changed in place; None before the first pass."""
        return self._slice(self._recurrent, layer_idx, state_idx)

    def update_recurrent_state(
        self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Keep the rows' new recurrent states."""
        key = (layer_idx, state_idx)
        if key not in self._recurrent:
            self._recurrent[key] = states.new_zeros((self.num_rows, *states.shape[1:]))
        kept = self._recurrent[key][self._window.first : self._window.first + self._window.count]
        kept.copy_(states)
        return kept

    def _slice(
        self, states: dict[tuple[int, int], torch.Tensor], layer_idx: int, state_idx: int
    ) -> torch.Tensor | None:
        state = states.get((layer_idx, state_idx))
        return None if state is None else state[self._window.first : self._window.first + self._window.count]

    # --- what models ask of a cache ----------------------------------------------------------------------------------

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Return the tokens seen before this pass; rows differ, so models are given positions and masks instead."""
        return self._window.seen

    def get_query_offset(self, _layer_idx: int = 0) -> int:
        """Return the same, by the name that masks ask for."""
        return self._window.seen

    def get_mask_sizes(self, _query_length: int, _layer_idx: int = 0) -> tuple[int, int]:
        """Return the length and offset of a mask over this pass's view."""
        return self._window.seen, 0

    def has_previous_state(self, _layer_idx: int | None = None, _state_idx: int | None = None) -> bool:
        """Return True: a row that begins has the states before its first token, which are zeros."""
        return True

    def is_recording_past(self, _layer_idx: int) -> bool:
        """Return False: no pass is ever rolled back."""
        return False

    @property
    def is_compileable(self) -> bool:
        """False: transformers need not prepare for `torch.compile`."""
        return False


def _zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return zeros of a shape, of the type and on the device of another tensor; raise MemoryError where there is no room.

    A processor's are pages of the system that take no memory before they are written to, where torch would write them all.
    """
    num_bytes = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or not num_bytes:
        return like.new_zeros(shape)
    try:
        pages = mmap.mmap(-1, num_bytes)
    except OSError as exc:
        raise MemoryError(f"no room for {num_bytes} bytes of the KV cache") from exc
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
