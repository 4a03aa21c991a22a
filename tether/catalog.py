"""The model names that people type: what they stand for, what they need, and whether this machine can serve them.

`resolve` turns a name into a `ModelSpec` without touching the network; `check` refuses, before anything heavy is loaded,
what cannot work here. A name is one of the catalogue's, a Hugging Face id (`org/name`, `org/name@revision`), or a local
folder. Nothing here imports torch or transformers; huggingface_hub is imported by the functions that ask the hub.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import psutil

from tether.errors import ModelUnavailable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo as HubModel

Kind = Literal["package", "hub", "folder"]

DEFAULT_VERSION = "1.0"
FLOAT32_LIMIT = 500_000_000
"""Up to this many parameters a model is loaded in float32, above it in bfloat16: half the memory, and faster where memory
sets the pace. The same on every machine, because only equal types continue each other's answers exactly."""
RUNTIME_BYTES = 400_000_000
"""What a runtime child takes before it has weights: Python, torch and transformers, measured at 385 MB."""
KV_TOKENS = 4096
"""The headroom for the KV cache: this many tokens, or the model's context where that is shorter."""
HUB_TIMEOUT_SECONDS = 10.0
WHOLE_HASH_BYTES = 256 << 20

_BYTES_OF: dict[str, float] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1.15, "int4": 0.75}
# In int8 and int4 the embeddings stay as they are, and each row or group of weights has a scale: a tenth more than the bits.
QUANTIZED = frozenset({"int8", "int4"})
_SAFETENSORS_MAX_HEADER = 100 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")
_CATALOGUE_ID = re.compile(r"([\w.-]+)(?:@([\w./-]+))?")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
# Sub-folders and `consolidated` hold the same weights again, in other forms.
_NOT_FETCHED = ["*/*", "consolidated*"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class ModelSpec(msgspec.Struct, frozen=True):
    """A model as it would be served: where it comes from and what it needs. None: not known before it is fetched."""

    name: str
    """The name under which the network knows it."""
    version: str
    kind: Kind
    source: str
    """A Hugging Face repository, or a folder's absolute path."""
    revision: str | None = None
    """The hub's branch, tag or commit."""
    gated: bool = False
    """The hub gives it only to those who accepted its licence."""
    num_parameters: int | None = None
    num_bytes: int | None = None
    """On disk."""
    dtype: str = "auto"
    """The type it is asked to be loaded as; `load_dtype` says which one that is."""
    kv_values_per_token: int = 0
    """Numbers that the KV cache keeps for a token, over all layers."""
    context_tokens: int | None = None
    licence: str = ""
    toy: bool = False
    description: str = ""

    @property
    def folder(self) -> Path | None:
        """The local folder, unless the model is the hub's."""
        return None if self.kind == "hub" else Path(self.source)

    @property
    def memory_need_bytes(self) -> int | None:
        """Memory to serve it: weights, a KV cache of one sequence, and the runtime itself."""
        if self.num_parameters is None:
            return None
        tokens = min(self.context_tokens or KV_TOKENS, KV_TOKENS)
        weights = self.num_parameters * _BYTES_OF[self.load_dtype]
        return RUNTIME_BYTES + round(weights + self.kv_values_per_token * tokens * _BYTES_OF[self.compute_dtype])

    @property
    def load_dtype(self) -> str:
        """The type it is loaded as: the one asked for, or by its size (see `FLOAT32_LIMIT`)."""
        return self._dtype_by_size if self.dtype == "auto" else self.dtype

    @property
    def compute_dtype(self) -> str:
        """The type of what is not weights: activations and KV cache."""
        return self._dtype_by_size if self.load_dtype in QUANTIZED else self.load_dtype

    @property
    def _dtype_by_size(self) -> str:
        return "float32" if (self.num_parameters or 0) <= FLOAT32_LIMIT else "bfloat16"

    def with_dtype(self, dtype: str) -> ModelSpec:
        """Return this model loaded as `dtype`, or by its size for `auto`; raise `ModelUnavailable` for an unknown type."""
        if dtype != "auto" and dtype not in _BYTES_OF:
            raise ModelUnavailable(f"a model cannot be loaded as `{dtype}`; use one of auto, {', '.join(_BYTES_OF)}")
        return msgspec.structs.replace(self, dtype=dtype)

    def served_as(self, name: str | None = None, version: str | None = None) -> ModelSpec:
        """Return this model under another name or version."""
        return msgspec.structs.replace(self, name=name or self.name, version=version or self.version)


def _hub(name: str, source: str, description: str, *, num_parameters: int, **facts: Any) -> ModelSpec:
    return ModelSpec(
        name,
        DEFAULT_VERSION,
        "hub",
        source,
        # Repositories are corrected now and then; the commit that was loaded is told in `ModelInfo.revision`.
        revision="main",
        num_parameters=num_parameters,
        description=description,
        **facts,
    )


def catalogue() -> tuple[ModelSpec, ...]:
    """Return the models that have a short name, the demo model first.

    The figures are those of the repositories' configs. The hub's own word on gates and sizes counts when `check` asks it.
    """
    return (
        _demo(),
        _hub(
            "tinygpt2",
            "sshleifer/tiny-gpt2",
            "GPT-2 shrunk until it speaks in random words; a toy for trying a download",
            num_parameters=102_714,
            num_bytes=2_514_146,
            kv_values_per_token=8,
            context_tokens=1024,
            toy=True,
        ),
        _hub(
            "tinyllama",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "small chat model that runs on almost any machine",
            num_parameters=1_100_048_384,
            num_bytes=2_200_119_864,
            kv_values_per_token=11_264,
            context_tokens=2048,
            licence="apache-2.0",
        ),
        _hub(
            "phi-2",
            "microsoft/phi-2",
            "small model, good at reasoning and code; not tuned for chat",
            num_parameters=2_779_683_840,
            num_bytes=5_559_367_680,
            kv_values_per_token=163_840,
            context_tokens=2048,
            licence="mit",
        ),
        _hub(
            "granite-4.0-micro",
            "ibm-granite/granite-4.0-micro",
            "long-context chat model in twelve languages, follows instructions, calls tools",
            num_parameters=3_402_836_480,
            num_bytes=6_805_672_960,
            kv_values_per_token=40_960,
            context_tokens=131_072,
            licence="apache-2.0",
        ),
        _hub(
            "mistral-7b",
            "mistralai/Mistral-7B-v0.1",
            "strong in several languages; the base model, not tuned for chat",
            num_parameters=7_241_732_096,
            num_bytes=14_483_464_192,
            kv_values_per_token=65_536,
            context_tokens=32_768,
            licence="apache-2.0",
            gated=True,
        ),
        _hub(
            "llama-3-8b",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "chat model, strong in reasoning and dialogue",
            num_parameters=8_030_261_248,
            num_bytes=16_060_522_496,
            kv_values_per_token=65_536,
            context_tokens=8192,
            licence="llama3",
            gated=True,
        ),
    )


def _demo() -> ModelSpec:
    folder = Path(__file__).parent / "models" / "demo"
    return ModelSpec(
        name="demo",
        version=DEFAULT_VERSION,
        kind="package",
        source=str(folder),
        num_parameters=984_192,
        num_bytes=sum(path.stat().st_size for path in folder.glob("*")),
        kv_values_per_token=1024,
        context_tokens=512,
        licence="apache-2.0",
        toy=True,
        description="a toy that ships with Tether and knows the capitals of countries; for trying the network",
    )


def resolve(name: str) -> ModelSpec:
    """Return what a name stands for; no network is asked, and a folder's files are not opened.

    A catalogue's name goes before a folder of the same name (type `./name` for the folder), and a folder before the hub.
    Raises `ModelUnavailable` for a name that can be none of these.
    """
    known = {spec.name: spec for spec in catalogue()}
    short = _CATALOGUE_ID.fullmatch(name)
    if short and (spec := known.get(short[1].lower())) and not (spec.folder and short[2]):
        return msgspec.structs.replace(spec, revision=short[2] or spec.revision)
    path = Path(name).expanduser()
    if name and path.is_dir():
        folder = path.resolve()
        return ModelSpec(folder.name, DEFAULT_VERSION, "folder", str(folder), description="a folder of this machine")
    if name.startswith((".", "/", "~")) or path.is_absolute():
        raise ModelUnavailable(f"there is no folder `{name}`")
    if _HUB_ID.fullmatch(name):
        repository, _, revision = name.partition("@")
        for spec in known.values():
            if spec.source.lower() == repository.lower():
                return msgspec.structs.replace(spec, name=repository, revision=revision or spec.revision)
        return ModelSpec(repository, DEFAULT_VERSION, "hub", repository, revision or "main")
    matches = near_matches(name, known)
    quoted = " or ".join(f"`{match}`" for match in matches)
    hint = f"did you mean {quoted}?" if matches else f"choose one of {', '.join(known)}."
    raise ModelUnavailable(
        f"there is no model `{name}`; {hint} A Hugging Face id (`org/name`) or a local folder (`./name`) works too"
    )


def near_matches(name: str, names: Iterable[str]) -> list[str]:
    """Return at most three of `names` that somebody who typed `name` may have meant, the nearest first."""
    folded = {candidate.casefold(): candidate for candidate in names}
    typed = name.casefold()
    near = difflib.get_close_matches(typed, folded, n=3, cutoff=0.6)
    inside = [key for key in folded if typed and (typed in key or key in typed) and key not in near]
    return [folded[key] for key in (near + inside)[:3]]


def check(spec: ModelSpec, *, free_bytes: int | None = None, offline: bool | None = None) -> ModelSpec:
    """Return the model with all that is known of it by now, or refuse it with one line that says what to do.

    `free_bytes` defaults to `free_memory_bytes()`, `offline` to what `HF_HUB_OFFLINE` says. Blocks for a question to the
    hub (10 s at most) where the model is not on this machine yet; nothing large is read or fetched.
    Raises `ModelUnavailable`: no such model, files missing or cut short, gated, out of reach, or too big for the memory.
    """
    offline = offline_wanted() if offline is None else offline
    if spec.folder:
        found = inspect_folder(spec, spec.folder)
    elif cached := cached_folder(spec):
        found = inspect_folder(spec, cached)
    elif offline:
        raise ModelUnavailable(_out_of_reach(spec, "HF_HUB_OFFLINE is set"))
    else:
        found = _ask_hub(spec)
    need = found.memory_need_bytes
    free = free_memory_bytes() if free_bytes is None else free_bytes
    if need is not None and need > free:
        raise ModelUnavailable(
            f"`{spec.name}` needs {_gigabytes(need)} of memory as {found.load_dtype} and {_gigabytes(free)} are free: "
            "close something, or choose a smaller model"
        )
    return found


def inspect_folder(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return `spec` with what the folder's config and weight headers say; the weights themselves are not read.

    Raises `ModelUnavailable` naming what is missing or broken.
    """
    missing = _missing_parts(folder)
    if missing:
        raise ModelUnavailable(
            f"`{folder}` is not a model: it has no {', no '.join(missing)}; save one there with `save_pretrained`"
        )
    config = _read_json(folder / "config.json")
    weights = weight_files(folder)
    num_bytes = sum(path.stat().st_size for path in weights)
    num_parameters = sum(count for path in weights for count in _count_parameters(path))
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    context = text.get("max_position_embeddings") or text.get("n_positions") or spec.context_tokens
    return msgspec.structs.replace(
        spec,
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        kv_values_per_token=_kv_values_per_token(text) or spec.kv_values_per_token,
        context_tokens=context,
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the model's weights, by name; safetensors where there are both forms."""
    for pattern in _WEIGHT_FILES:
        index = next(iter(sorted(folder.glob(pattern + ".index.json"))), None)
        if index:
            names = _read_json(index).get("weight_map", {}).values()
            return [folder / name for name in sorted(set(names))]
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return []


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Return the size of each tensor in the folder's safetensors files, by its name there; nothing for other files."""
    sizes: dict[str, int] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            for name, entry in _tensors(path).items():
                begin, end = entry["data_offsets"]
                sizes[name] = end - begin
    return sizes


def weights_hash(folder: Path) -> str:
    """Return what tells these weights from others: `sha256:…` over whole files, or `headers:…` above 256 MiB.

    `headers:` covers each file's size and its first and last MiB (for safetensors: names, shapes and places of all
    tensors), so that a big model starts at once; it does not notice a change in the middle of the weights.
    """
    files = weight_files(folder)
    whole = sum(path.stat().st_size for path in files) <= WHOLE_HASH_BYTES
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if whole:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                digest.update(file.read(1 << 20))
                file.seek(-min(size, 1 << 20), os.SEEK_END)
                digest.update(file.read())
    return f"{'sha256' if whole else 'headers'}:{digest.hexdigest()[:32]}"


def tokenizer_hash(folder: Path) -> str:
    """Return what tells this tokenizer, chat template included, from others."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(f"{name}:{path.stat().st_size}\n".encode() + path.read_bytes())
    return f"sha256:{digest.hexdigest()[:32]}"


def free_memory_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or its container's where that is less."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return free
    if limit == "max":
        return free
    # Cached file pages count as used there, and are given back under pressure.
    return min(free, int(limit) - used + int(stat.get("inactive_file", 0)))


def offline_wanted() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def cached_folder(spec: ModelSpec) -> Path | None:
    """Return the snapshot of a hub's model that this machine has in full, or None. Asks no network."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second that no other caller should pay
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    for weights in _WEIGHT_FILES:
        try:
            found = snapshot_download(
                spec.source,
                revision=spec.revision,
                local_files_only=True,
                allow_patterns=[*_SMALL_FILES, weights],
                ignore_patterns=_NOT_FETCHED,
            )
        except (LocalEntryNotFoundError, ValueError):
            continue
        if not _missing_parts(Path(found)):
            return Path(found)
    return None


def fetch(spec: ModelSpec, on_progress: Callable[[float], None]) -> Path:
    """Return the folder of a model, downloading it from the hub where it is not on this machine.

    `on_progress` is told the share of the bytes that has arrived, from several threads. Blocks for as long as it takes.
    Raises `ModelUnavailable` when the hub does not give it.
    """
    if there := spec.folder or cached_folder(spec):
        return there
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from tqdm import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415

    best = 0.0

    class Reporter(tqdm):  # type: ignore[misc]
        """A progress bar that tells its fraction and draws nothing."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal best
            told: bool | None = super().update(n)
            # Bytes received and bytes written have a bar each, and totals grow as files begin: never tell less than before.
            if self.unit == "B" and self.total and (fraction := min(1.0, self.n / self.total)) > best:
                best = fraction
                on_progress(fraction)
            return told

    with _hub_errors(spec):
        names = [file.rfilename for file in _hub_info(spec).siblings or ()]
        safe = any(fnmatch.fnmatch(name, _WEIGHT_FILES[0]) for name in names if "/" not in name)
        folder = snapshot_download(
            spec.source,
            revision=spec.revision,
            allow_patterns=[*_SMALL_FILES, _WEIGHT_FILES[0 if safe else 1]],
            ignore_patterns=_NOT_FETCHED,
            tqdm_class=Reporter,
        )
    return Path(folder)


def _missing_parts(folder: Path) -> list[str]:
    present = {path.name for path in folder.glob("*") if path.is_file()}
    weights = weight_files(folder)
    missing = []
    if "config.json" not in present:
        missing.append("config.json")
    if not present & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        missing.append("tokenizer (tokenizer.json)")
    if not weights:
        missing.append("weights (model.safetensors)")
    missing.extend(path.name for path in weights if path.name not in present)
    return missing


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelUnavailable(f"`{path}` cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise ModelUnavailable(f"`{path}` is not a JSON object")
    return found


def _count_parameters(path: Path) -> Iterator[int]:
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        # A pickled file tells nothing without being loaded: count two bytes a parameter, so that the need is not too low.
        yield size // 2
        return
    yield from (math.prod(entry["shape"]) for entry in _tensors(path).values())


def _tensors(path: Path) -> dict[str, Any]:
    """Return a safetensors file's header; raise `ModelUnavailable` where it does not fit the file."""
    # https://huggingface.co/docs/safetensors: 8 bytes of length, a JSON header, then the tensors without a gap.
    size = path.stat().st_size
    broken = ModelUnavailable(f"`{path}` is cut short or is not a safetensors file: fetch it again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _SAFETENSORS_MAX_HEADER):
            raise broken
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
            for entry in tensors.values():
                math.prod(entry["shape"])
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            raise broken from exc
    if 8 + length + end != size:
        raise broken
    return tensors


def _kv_values_per_token(config: dict[str, Any]) -> int:
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or hidden // heads
    return int(2 * layers * kv_heads * head_size)


@contextmanager
def _hub_errors(spec: ModelSpec) -> Iterator[None]:
    """Turn what the hub's client raises into one line that says what to do."""
    import httpx2  # noqa: PLC0415 - the hub's HTTP client, whose errors it lets through
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as exc:
        raise ModelUnavailable(
            f"`{spec.source}` is gated: accept its licence at https://huggingface.co/{spec.source}, then set HF_TOKEN"
        ) from exc
    except RevisionNotFoundError as exc:
        raise ModelUnavailable(f"`{spec.source}` has no revision `{spec.revision}`") from exc
    except (RepositoryNotFoundError, HFValidationError) as exc:
        sources = {known.source: known.name for known in catalogue() if known.kind == "hub"}
        near = near_matches(spec.source, sources)
        hint = f"; did you mean `{near[0]}` ({sources[near[0]]})?" if near else ""
        raise ModelUnavailable(
            f"there is no model `{spec.source}` on Hugging Face (a private one needs HF_TOKEN){hint}"
        ) from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError, OSError) as exc:
        raise ModelUnavailable(_out_of_reach(spec, "Hugging Face does not answer")) from exc


def _hub_info(spec: ModelSpec) -> HubModel:
    from huggingface_hub import HfApi  # noqa: PLC0415

    return HfApi().model_info(spec.source, revision=spec.revision, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS)


def _ask_hub(spec: ModelSpec) -> ModelSpec:
    from huggingface_hub import HfApi  # noqa: PLC0415

    with _hub_errors(spec):
        info = _hub_info(spec)
        if info.gated:
            # The description of a gated repository is public; this asks for the right to its files.
            HfApi().auth_check(spec.source)
    weights = [file for file in info.siblings or () if file.rfilename.endswith((".safetensors", ".bin"))]
    return msgspec.structs.replace(
        spec,
        gated=bool(info.gated),
        num_parameters=info.safetensors.total if info.safetensors else spec.num_parameters,
        num_bytes=sum(file.size or 0 for file in weights) or spec.num_bytes,
    )


def _out_of_reach(spec: ModelSpec, why: str) -> str:
    return (
        f"`{spec.source}` is not on this machine and {why}: download it first with a network "
        f"(`hf download {spec.source}`), or use a local folder"
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
