"""What the runtime makes of a model, in ratios within one run: its batch against a bare loop and transformers' own batching.

    python tools/bench_runtime.py                            random Llamas of 0.6M and 82M parameters on this processor
    python tools/bench_runtime.py --shape 0.6m --batches 32  one row of that table, and nothing of sharing and memory
    python tools/bench_runtime.py --device cuda --shape 8b   an 8B-shaped one on a GPU, with the share of its memory's speed

Every job has a prompt of 53 tokens and makes 64 new ones. `bare` is a loop of forward passes over a fixed batch with
transformers' own cache; ours goes through the child's pipes (on a GPU, through the engine), prompts, text and all;
`continuous` is transformers' continuous batching. On a processor both of these run with one thread and with all cores, and the
faster counts; ours is as the child sets itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tether.records import Sampling  # noqa: E402 - a script of the repository
from tether.runtime_messages import End, Event, Generate, Ready, Tokens, decode_event, encode  # noqa: E402

PROMPT_TOKENS = 53
NEW_TOKENS = 64
BATCHES = (1, 8, 32)
SHAPES: dict[str, dict[str, int]] = {
    "0.6m": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 512},
    "82m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
            "num_key_value_heads": 12, "vocab_size": 16384},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
ROUNDS = 3
GOALS: dict[str, float] = {
    **{f"{shape}_b{batch}_to_bare": 1.0 for shape in ("0.6m", "82m") for batch in BATCHES},
    "0.6m_b32_to_continuous": 4.0,
    "82m_b32_to_continuous": 1.7,
    "82m_int8_b1_to_bare_float32": 2.2,
}


# --- the models ------------------------------------------------------------------------------------------------------


def make_tokenizer(folder: Path) -> Any:
    """A byte-level tokenizer without merges: a letter is a token, and any id has some text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [first + second for first in letters[:180] for second in letters[:180]]
    vocabulary = {token: number for number, token in enumerate(["<end>", *letters, *pairs])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(shape: str, *, device: str = "cpu", dtype: str = "float32") -> Any:
    """A random Llama of a shape, in memory."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(1)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config.dtype = getattr(torch, dtype)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prompt(chance: random.Random, num_tokens: int = PROMPT_TOKENS) -> str:
    """A text of that many tokens, which nobody has sent before."""
    return "".join(chance.choices(string.ascii_letters, k=num_tokens))


def ids_of(chance: random.Random, batch: int) -> list[list[int]]:
    """Prompts as ids."""
    return [[chance.randrange(1, 250) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]


# --- what ours is compared to ----------------------------------------------------------------------------------------


def bare_loop(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of a loop of forward passes over a fixed batch, greedy, with transformers' own cache."""
    import torch  # noqa: PLC0415

    with torch.inference_mode():
        began = time.perf_counter()
        ids, cache = torch.tensor(prompts, device=model.device), None
        for _ in range(NEW_TOKENS):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        ids.tolist()
        return time.perf_counter() - began


def continuous_batching(model: Any, prompts: list[list[int]]) -> float:
    """Seconds of transformers' own continuous batching for the same work, its start and end left out."""
    from transformers import GenerationConfig  # noqa: PLC0415

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(generation_config=config) as manager:
        times = []
        for _ in range(2):
            began = time.perf_counter()
            for ids in prompts:
                manager.add_request(ids, max_new_tokens=NEW_TOKENS)
            num_ended = 0
            while num_ended < len(prompts):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("transformers' continuous batching gives no result")
                num_ended += result.is_finished()
            times.append(time.perf_counter() - began)
    return times[-1]  # the first has the warm-up in it


# --- ours, through the pipes -----------------------------------------------------------------------------------------


class Child:
    """A runtime child, spoken to as a worker does."""

    def __init__(self, folder: Path, slots: int = 32, dtype: str = "float32") -> None:
        arguments = ["--stream", "--model", str(folder), "--dtype", dtype, "--slots", str(slots)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tether.runtime", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        while not isinstance(event := self.next(), Ready):
            if event is None:
                raise RuntimeError("the child ended")
        self._count = 0

    def next(self) -> Event | None:
        """The next event, or None at the end."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        return decode_event(line) if line else None

    def send(self, *requests: Generate) -> None:
        """Write requests in one go."""
        assert self.process.stdin
        self.process.stdin.write(b"".join(map(encode, requests)))
        self.process.stdin.flush()

    def job(self, text: str, max_tokens: int = NEW_TOKENS) -> Generate:
        """A request that makes exactly so many tokens."""
        self._count += 1
        return Generate(str(self._count), text, Sampling(max_tokens=max_tokens, ignore_eos=True), raw=True)

    def run(self, requests: list[Generate]) -> float:
        """Seconds from the first line to the last end."""
        assert self.process.stdout
        began = time.perf_counter()
        self.send(*requests)
        waiting = len(requests)
        while waiting:
            line = self.process.stdout.readline()
            if line.startswith(b'{"event":"end"'):
                end = decode_event(line)
                assert isinstance(end, End)
                assert end.error is None, end.error
                waiting -= 1
        return time.perf_counter() - began

    def close(self) -> None:
        """End it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@contextmanager
def child_of(folder: Path, slots: int = 32, dtype: str = "float32") -> Iterator[Child]:
    """A child that ends with the block."""
    child = Child(folder, slots, dtype)
    try:
        yield child
    finally:
        child.close()


def on_threads(
    num_threads: int, work: Callable[[Any, list[list[int]]], float], model: Any, ids: list[list[int]]
) -> float:
    """Seconds of some work with so many of torch's threads."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(num_threads)
    return work(model, ids)


def throughput(shape: str, folder: Path, batches: Sequence[int]) -> dict[str, float]:
    """Tokens a second at each batch, ours and the bare loop's in turn, and the ratios; continuous batching at 32."""
    make_tokenizer(folder)
    model = make_model(shape)
    model.save_pretrained(folder)
    all_cores = os.cpu_count() or 1
    # A large model is slower on one thread wherever it has been measured.
    counts = sorted({1, all_cores} if model.num_parameters() < 20_000_000 else {all_cores})
    chance = random.Random(shape)
    figures: dict[str, float] = {}
    with child_of(folder) as child:
        for batch in batches:
            references = {"bare": bare_loop} | ({"continuous": continuous_batching} if batch == max(BATCHES) else {})
            ways: dict[str, Callable[[], float]] = {
                f"{name} {count}": lambda work=work, count=count, batch=batch: on_threads(  # type: ignore[misc]
                    count, work, model, ids_of(chance, batch)
                )
                for name, work in references.items()
                for count in counts
            }
            ways["ours"] = lambda batch=batch: child.run([child.job(prompt(chance)) for _ in range(batch)])  # type: ignore[misc]
            measured = in_turns(ways)
            seconds = {"ours": measured["ours"]}
            for name in references:
                best = min(counts, key=lambda count, name=name: statistics.median(measured[f"{name} {count}"]))  # type: ignore[misc]
                figures[f"{shape}_b{batch}_{name}_threads"] = best
                seconds[name] = measured[f"{name} {best}"]
            work = batch * NEW_TOKENS
            for way, found in seconds.items():
                figures[f"{shape}_b{batch}_{way}_tokens_per_second"] = work / statistics.median(found)
                if way != "ours":
                    ratios = [one / other for one, other in zip(found, seconds["ours"], strict=True)]
                    figures[f"{shape}_b{batch}_to_{way}"] = statistics.median(ratios)
    return figures


def in_turns(ways: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Seconds of each way, measured in turns, so that a busy moment meets all of them; a first round is warm-up.

    Short ones are measured more often: on cores that others use too, three runs of 50 ms say nothing.
    """
    longest = max(way() for way in ways.values())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(ROUNDS, min(25, int(3 / longest)))):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds


def small_weights(shape: str, folder: Path) -> dict[str, float]:
    """Tokens a second of one job with weights in 8 bits, beside our own float32 and the bare loop's."""
    model = make_model(shape)
    chance = random.Random(shape)
    with child_of(folder) as wide, child_of(folder, dtype="int8") as small:
        seconds = in_turns(
            {
                "bare": lambda: bare_loop(model, ids_of(chance, 1)),
                "float32": lambda: wide.run([wide.job(prompt(chance))]),
                "int8": lambda: small.run([small.job(prompt(chance))]),
            }
        )
    speed = {way: NEW_TOKENS / statistics.median(found) for way, found in seconds.items()}
    return {
        f"{shape}_int8_b1_tokens_per_second": speed["int8"],
        f"{shape}_int8_b1_to_float32": speed["int8"] / speed["float32"],
        f"{shape}_int8_b1_to_bare_float32": speed["int8"] / speed["bare"],
    }


def sharing(shape: str, folder: Path) -> dict[str, float]:
    """How jobs feel each other: steps to a joining job's first token, and the gap that a long prompt tears."""
    chance = random.Random(5)
    figures: dict[str, float] = {}
    with child_of(folder) as child:
        child.run([child.job(prompt(chance)) for _ in range(32)])
        first, *others = [child.job(prompt(chance), 400) for _ in range(31)]
        child.send(first, *others)
        started: set[str] = set()
        while len(started) < 31:
            if isinstance(event := child.next(), Tokens):
                started.add(event.id)
        joining = child.job(prompt(chance), 8)
        child.send(joining)
        steps = _steps_until(child, joining.id, first.id)
        figures[f"{shape}_join_steps"] = steps
        _drain(child, 31 + 1)

        first, *others = [child.job(prompt(chance), 400) for _ in range(8)]
        child.send(first, *others)
        long = child.job(prompt(chance, 500), 4)
        quiet: list[float] = []
        torn: list[float] = []
        sent, last = False, time.perf_counter()
        ended = 0
        while ended < 9:
            event = child.next()
            if isinstance(event, Tokens) and event.id == first.id:
                now = time.perf_counter()
                (torn if sent and ended == 0 else quiet).append(now - last)
                last = now
                if event.position == 100:
                    child.send(long)
                    sent = True
            if isinstance(event, End):
                ended += 1
        figures[f"{shape}_gap_ms"] = 1000 * statistics.median(quiet)
        # While the 500 tokens are read, each gap has one chunk in it: 4 of them at 128 tokens a chunk.
        figures[f"{shape}_gap_with_chunk_ms"] = 1000 * max(torn)
    return figures


def _steps_until(child: Child, wanted: str, reference: str) -> int:
    """Steps (tokens of `reference`) from now to the first token of `wanted`."""
    steps = 0
    while True:
        event = child.next()
        if isinstance(event, Tokens):
            if event.id == wanted:
                return steps
            steps += event.id == reference


def _drain(child: Child, num_ends: int) -> None:
    while num_ends:
        num_ends -= isinstance(child.next(), End)


def soak(shape: str, folder: Path, num_jobs: int) -> dict[str, float]:
    """Growth of the child's memory over the second half of many jobs of all lengths; in the first, rows are used first."""
    import psutil  # noqa: PLC0415

    chance = random.Random(9)
    with child_of(folder) as child:
        process = psutil.Process(child.process.pid)
        sizes = []
        for _ in range(10):
            for _ in range(max(1, num_jobs // 320)):
                child.run([child.job(prompt(chance, chance.randint(1, 100)), chance.randint(1, 30)) for _ in range(32)])
            sizes.append(process.memory_info().rss)
    return {f"{shape}_soak_growth_mb": (sizes[-1] - sizes[4]) / 1e6}


def runtime_figures(
    *, soak_jobs: int = 1600, shapes: Sequence[str] = ("0.6m", "82m"), batches: Sequence[int] = BATCHES
) -> dict[str, float]:
    """All figures of the processor's table, by name; `GOALS` has the bounds. Of some batches only, nothing but their speed."""
    figures: dict[str, float] = {}
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            figures |= throughput(shape, Path(folder), batches)
            if set(batches) != set(BATCHES):
                continue
            if shape == "0.6m":
                figures |= soak(shape, Path(folder), soak_jobs)
            else:
                figures |= small_weights(shape, Path(folder))
            figures |= sharing(shape, Path(folder))
    return figures


# --- on an accelerator -----------------------------------------------------------------------------------------------


def accelerator_figures(shape: str, device: str) -> dict[str, float]:
    """Tokens a second on a device at batches up to 64, and the share of the memory's bandwidth, in bfloat16.

    The bandwidth is measured here, by copying; the share counts a step's weights and nothing else, so that it says how
    near decoding is to reading the weights once a token.
    """
    import torch  # noqa: PLC0415

    from tether.engine import Engine  # noqa: PLC0415
    from tether.records import ModelInfo  # noqa: PLC0415

    model = make_model(shape, device=device, dtype="bfloat16")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    bandwidth = copy_bandwidth(device)
    chance = random.Random(shape)
    figures: dict[str, float] = {"weights_gb": weights / 1e9, "copy_gb_per_second": bandwidth / 1e9}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder))
    info = ModelInfo(shape, "1", dtype="bfloat16", context_tokens=2048)
    engine = Engine.around(model, tokenizer, info, slots=64, kv_bytes=20 << 30)

    def ours(batch: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(batch):
            sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
            engine.add(Generate(str(number), prompt(chance), sampling, raw=True))
        while not engine.is_idle:
            engine.step()
        return time.perf_counter() - began

    ways: dict[str, Callable[[int], float]] = {
        "bare": lambda batch: bare_loop(model, ids_of(chance, batch)),
        "ours": ours,
        "continuous": lambda batch: continuous_batching(model, ids_of(chance, batch)),
    }
    for batch in (1, 8, 32, 64):
        for way, seconds_of in ways.items():
            seconds_of(batch)
            seconds = min(seconds_of(batch) for _ in range(2))
            figures[f"{shape}_b{batch}_{way}_tokens_per_second"] = batch * NEW_TOKENS / seconds
            figures[f"{shape}_b{batch}_{way}_bandwidth_share"] = weights * NEW_TOKENS / seconds / bandwidth
            print(f"b{batch} {way}: {batch * NEW_TOKENS / seconds:.0f} tokens/s", flush=True)
    return figures


def copy_bandwidth(device: str) -> float:
    """Bytes a second that the device's memory reads and writes in a large copy."""
    import torch  # noqa: PLC0415

    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * 10 * source.numel() / best


def has_cuda() -> bool:
    """Whether there is a device for the accelerator's table."""
    import torch  # noqa: PLC0415

    return torch.cuda.is_available()


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the table of an accelerator (a CUDA device)")
    parser.add_argument("--shape", choices=SHAPES, help="only this model (cuda: 8b)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCHES, help="on a processor, only the speed of these"
    )
    parser.add_argument(
        "--soak-jobs",
        type=int,
        default=1600,
        help="jobs whose second half must leave memory flat; before the 10,000th, caches fill",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    if options.device == "cpu":
        shapes = (options.shape,) if options.shape else ("0.6m", "82m")
        figures = runtime_figures(soak_jobs=options.soak_jobs, shapes=shapes, batches=options.batches)
    elif not has_cuda():
        parser.error("--device cuda needs a CUDA device, and torch finds none here")
    else:
        figures = accelerator_figures(options.shape or "8b", options.device)
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        goal = GOALS.get(name)
        verdict = "" if goal is None else f"   goal {goal:g}: {'reached' if value >= goal else 'MISSED'}"
        print(f"{name:42} {value:12.2f}{verdict}")


if __name__ == "__main__":
    main()
