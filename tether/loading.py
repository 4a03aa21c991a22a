"""From a model's name to a model in memory: fetched, on a device, in a type, with a progress that people can watch.

Between `catalog` (what a model is and needs, without torch) and `engine` (what runs on it).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tether import catalog
from tether.catalog import ModelSpec
from tether.errors import ModelUnavailable
from tether.packing import PackedLinear, is_available, num_parameters, pack, seconds_of
from tether.quantization import Int4Linear, Int8Linear, quantize
from tether.records import ModelInfo
from tether.runtime_messages import Stage

log = logging.getLogger(__name__)

SMALL_PARAMETERS = 20_000_000
"""Below this a kernel is so short that handing parts of it to other threads costs more than it saves: those get rows instead."""
MAX_LANES = 4
"""Threads for a small model's rows: beyond, each has too few."""
DEFAULT_CONTEXT_TOKENS = 2048
CLEARLY_FASTER = 0.85
"""Another type than the size's must need less than this part of its time: measurements on a busy machine differ by a tenth."""

OnProgress = Callable[[Stage, float], None]


class Loaded(NamedTuple):
    """A model that is ready to run, its tokenizer, and what the network is told of it (`slots` is the engine's to say)."""

    model: Any
    tokenizer: Any
    info: ModelInfo


def load(
    spec: ModelSpec,
    *,
    device: str = "auto",
    threads: int | None = None,
    on_progress: OnProgress = lambda _stage, _fraction: None,
) -> Loaded:
    """Load a model, downloading it first where need be; `on_progress` is told stage and fraction, up to the weights.

    `threads` of None lets a small model run on one thread and leaves others to torch. A type of `auto` is, on a
    processor, the faster one of float32 and bfloat16 (`choose_dtype`).
    Raises `ModelUnavailable` when the files do not make a model, or the device cannot hold it.
    """
    chosen = choose_device(device)
    check_dtype(spec, chosen)
    folder = catalog.fetch(spec, lambda fraction: on_progress("download", fraction))
    spec = catalog.inspect_folder(spec, folder)
    _check_gpu_memory(spec, chosen)
    set_threads(threads, spec.num_parameters or 0)
    on_progress("weights", 0.0)
    with explained(spec):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        dtype = choose_dtype(spec, folder, chosen)
        model = _read_weights(folder, dtype, spec.compute_dtype, lambda fraction: on_progress("weights", fraction))
        model = model.to(chosen).eval()
        if chosen.type == "cpu":
            log.info("%d weights are packed", pack(model))
    on_progress("weights", 1.0)
    return Loaded(model, tokenizer, _info(spec, folder, dtype, tokenizer))


def choose_device(device: str) -> torch.device:
    """Return the device that `auto` or a name stands for; raise `ModelUnavailable` when this machine has none of it."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as exc:
        raise ModelUnavailable(f"this machine has no device `{device}`: {first_line(exc)}") from exc
    return chosen


def check_dtype(spec: ModelSpec, device: torch.device) -> None:
    """Raise `ModelUnavailable` for a type that the device does not compute in."""
    if spec.dtype in catalog.QUANTIZED and device.type != "cpu":
        raise ModelUnavailable(
            f"{spec.dtype} weights are for a processor, and this is `{device.type}`: choose `--dtype bfloat16`, "
            "or `--device cpu`"
        )


def choose_dtype(spec: ModelSpec, folder: Path, device: torch.device) -> str:
    """Return the type to load a model in: the one asked for, or by its size, or on a processor the faster one.

    A toy keeps float32 everywhere, so that it answers alike everywhere. Otherwise the type by size is left only for one
    that is clearly faster for the model's own shapes, and whose weights fit the memory.
    """
    by_size = spec.load_dtype
    if spec.dtype != "auto" or device.type != "cpu" or spec.toy:
        return by_size
    shape = _widest_layer(folder)
    if shape is None:
        return by_size
    seconds = measure_linear(*shape)
    other = "bfloat16" if by_size == "float32" else "float32"
    log.info(
        "a layer of %d x %d takes %s", *shape, {dtype: f"{1e6 * found:.0f} us" for dtype, found in seconds.items()}
    )
    fits = (spec.with_dtype(other).memory_need_bytes or 0) <= catalog.free_memory_bytes()
    return other if fits and seconds[other] < CLEARLY_FASTER * seconds[by_size] else by_size


@torch.inference_mode()
def measure_linear(num_inputs: int, num_outputs: int) -> dict[str, float]:
    """Return the seconds that a linear layer takes on this processor, by type: one row and a small batch together.

    The better of torch's own layer and a packed one. Takes some 50 ms with the threads that are set.
    """
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(num_outputs, num_inputs, dtype=dtype)
        layers: list[nn.Module] = [nn.Linear(num_inputs, num_outputs, bias=False, dtype=dtype)]
        if is_available():
            layers.append(PackedLinear(weight, None))
        found[str(dtype).removeprefix("torch.")] = min(seconds_of(layers, num_inputs, dtype))
    return found


def set_threads(threads: int | None, num_parameters: int) -> None:
    """Set torch's threads: as asked, or one for a small model."""
    if threads is not None:
        torch.set_num_threads(threads)
    elif num_parameters < SMALL_PARAMETERS:
        torch.set_num_threads(1)


def num_lanes(model: Any, threads: int | None) -> int:
    """Return how many parts of a batch may be computed side by side: where a small model has a thread for each, as by default."""
    if threads is not None or model.device.type != "cpu" or num_parameters(model) >= SMALL_PARAMETERS:
        return 1
    # Not every system says which of its cores this process may use.
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(MAX_LANES, num_cores)


@contextmanager
def explained(spec: ModelSpec) -> Iterator[None]:
    """Turn what transformers and torch raise for a folder that is no model into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, MemoryError) as exc:
        log.debug("loading %s failed", spec.source, exc_info=True)
        raise ModelUnavailable(f"`{spec.name}` cannot be loaded: {first_line(exc)}") from exc


@contextmanager
def weights_watched(folder: Path, on_progress: Callable[[float], None]) -> Iterator[None]:
    """Tell the share of the weights' bytes that is in memory, while transformers loads them."""
    sizes = catalog.tensor_bytes(folder)
    total = sum(sizes.values())

    def watch(_factory: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return _Watched(positional[0] if positional else named.get("iterable"), sizes, total, on_progress)

    previous = transformers_logging.set_tqdm_hook(watch)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Watched:
    """In place of the progress bar that transformers draws over the tensors that it loads."""

    def __init__(self, items: Any, sizes: dict[str, int], total: int, on_progress: Callable[[float], None]) -> None:
        self._items = items
        self._sizes = sizes
        self._total = total
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for item in self._items if self._items is not None else ():
            yield item
            name = item[0] if isinstance(item, tuple) else item
            done += self._sizes.get(name, 0)
            if self._total:
                self._on_progress(min(1.0, done / self._total))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, _count: float = 1) -> None:
        """Do nothing: bars that are stepped by hand are not about weights."""

    def set_description(self, _text: str = "") -> None:
        """Do nothing: there is no bar to write on."""

    def set_postfix(self, *_: object, **__: object) -> None:
        """Do nothing: there is no bar to write on."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


def _read_weights(folder: Path, dtype: str, compute_dtype: str, on_progress: Callable[[float], None]) -> Any:
    """Return the model in `dtype`.

    For 8 and 4 bits the files are mapped in the type that they have and given up layer by layer, so that memory holds the
    small weights, and never the large ones as a whole.
    """
    is_quantized = dtype in catalog.QUANTIZED
    share = 0.3 if is_quantized else 1.0
    with weights_watched(folder, lambda fraction: on_progress(share * fraction)):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if is_quantized else getattr(torch, dtype), local_files_only=True
        )
    if is_quantized:
        num_weights = quantize(model, dtype, lambda fraction: on_progress(share + (1 - share) * fraction))
        log.info("%d weights are %s, the others %s", num_weights, dtype, compute_dtype)
        _set_float_type(model, getattr(torch, compute_dtype))
    return model


def _set_float_type(model: Any, dtype: torch.dtype) -> None:
    """Give the weights that were not quantized one type; scales keep theirs, and so do buffers (angles of positions)."""
    read = model.dtype
    for module in model.modules():
        if not isinstance(module, Int8Linear | Int4Linear):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == read:
                    parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _check_gpu_memory(spec: ModelSpec, device: torch.device) -> None:
    need = spec.memory_need_bytes or 0
    if device.type == "cuda" and need > (free := torch.cuda.mem_get_info(device)[0]):
        raise ModelUnavailable(
            f"`{spec.name}` needs {need / 1e9:.1f} GB of the GPU's memory and {free / 1e9:.1f} GB are free: "
            "choose a smaller model, or `--device cpu`"
        )


def _widest_layer(folder: Path) -> tuple[int, int] | None:
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    hidden = getattr(config, "hidden_size", None)
    if not hidden:
        return None
    return hidden, getattr(config, "intermediate_size", None) or 4 * hidden


def _info(spec: ModelSpec, folder: Path, dtype: str, tokenizer: Any) -> ModelInfo:
    return ModelInfo(
        name=spec.name,
        version=spec.version,
        # A snapshot of the hub lies in a folder named after its commit.
        revision=folder.name if spec.kind == "hub" else catalog.weights_hash(folder),
        dtype=dtype,
        context_tokens=spec.context_tokens or min(tokenizer.model_max_length, DEFAULT_CONTEXT_TOKENS),
        tokenizer_hash=catalog.tokenizer_hash(folder),
        slots=1,
        toy=spec.toy,
    )


def first_line(exc: Exception) -> str:
    """Return an error's first line, or its class where it has none."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
