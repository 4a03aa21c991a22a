"""Other architectures, built from their configs with random weights: the same code, and transformers' own answers."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from tether import catalog, kvcache
from tether.batching import Limits
from tether.embedding import EmbeddingEngine
from tether.engine import Engine, Sequence
from tether.errors import ContextLengthExceeded, InvalidRequest, ModelUnavailable, OutputInvalid
from tether.forward import BatchRunner
from tether.kvcache import KvCache
from tether.records import FinishReason, Sampling
from tether.runtime_messages import Embed, End, Event, Generate, Tokens

PROMPT = "Ordinary machines serve language models together, über alles Grenzen hinweg."
CONTEXT = 128


def save_tokenizer(folder: Path, *, chat_template: str | None = None) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROMPT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=chat_template).save_pretrained(
        folder
    )
    return tokenizer.get_vocab_size()


def config_of(family: str, vocab_size: int) -> Any:
    """A tiny model of a family, with weights so wide apart that its answers do not all look the same."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 0, "initializer_range": 0.5,
    }  # fmt: skip
    hybrid: dict[str, Any] = {
        **common, "initializer_range": 0.2, "num_key_value_heads": 2, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
    }  # fmt: skip
    match family:
        case "gpt2":
            return GPT2Config(
                vocab_size=vocab_size, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
                initializer_range=0.5,
            )  # fmt: skip
        case "phi":
            return PhiConfig(**common, partial_rotary_factor=0.5)
        case "tinyllama":
            return LlamaConfig(**common, num_key_value_heads=2)
        case "llama3":
            scaling = {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }  # fmt: skip
            return LlamaConfig(**common, num_key_value_heads=1, rope_parameters=scaling)
        case "longrope":
            scaling = {
                "rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0, "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4, "original_max_position_embeddings": CONTEXT // 2,
            }  # fmt: skip
            return Phi3Config(**common, num_key_value_heads=2, rope_parameters=scaling)
        case "mistral":
            return MistralConfig(**common, num_key_value_heads=2, sliding_window=16)
        case "granite-attention":
            return GraniteMoeHybridConfig(**hybrid, layer_types=["full_attention"] * 2)
        case "granite-mamba":
            hybrid["num_hidden_layers"] = 3
            layers = ["linear_attention", "full_attention", "linear_attention"]
            return GraniteMoeHybridConfig(**hybrid, layer_types=layers)
    raise ValueError(family)


FAMILIES = ["gpt2", "phi", "tinyllama", "llama3", "mistral", "granite-attention", "granite-mamba"]


def make_model(family: str, folder: Path, *, chat_template: str | None = None) -> Path:
    torch.manual_seed(3)
    config = config_of(family, save_tokenizer(folder, chat_template=chat_template))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, *, slots: int | None = 4, kv_bytes: int | None = None) -> Engine:
    spec = catalog.check(catalog.resolve(str(folder)), free_bytes=1 << 50)
    return Engine.load(spec, device="cpu", threads=1, slots=slots, kv_bytes=kv_bytes)


class Answers:
    """What came of some requests: by id and choice the ids and texts, and each request's end."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[str, int], list[Tokens]] = {}
        self.ends: dict[str, End] = {}

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Tokens):
                self.pieces.setdefault((event.id, event.choice), []).append(event)
            elif isinstance(event, End):
                assert event.id not in self.ends
                self.ends[event.id] = event

    def ids(self, request_id: str, choice: int = 0) -> list[int]:
        return [token_id for piece in self.pieces.get((request_id, choice), []) for token_id in piece.token_ids]

    def text(self, request_id: str, choice: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces.get((request_id, choice), []))

    def positions(self, request_id: str) -> list[int]:
        return [piece.position for piece in self.pieces.get((request_id, 0), [])]

    def reason(self, request_id: str) -> FinishReason:
        return self.ends[request_id].finish_reason


def run(engine: Engine, *requests: Generate) -> Answers:
    """Run requests that come together to their ends."""
    answers = Answers()
    for request in requests:
        engine.add(request)
    while not engine.is_idle:
        answers.take(engine.step())
    assert set(answers.ends) == {request.id for request in requests}
    return answers


def finish(engine: Engine, request: Generate) -> tuple[list[int], str]:
    answers = run(engine, request)
    error = answers.ends[request.id].error
    assert error is None, error
    return answers.ids(request.id), answers.text(request.id)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("tinyllama", tmp_path_factory.mktemp("llama"))


def expected_ids(engine: Engine, folder: Path, prompt: str, num_tokens: int) -> list[int]:
    """What transformers' own `generate` answers."""
    reference = AutoModelForCausalLM.from_pretrained(folder)
    inputs = engine.tokenizer(prompt, return_tensors="pt")
    whole = reference.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    ids: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def test_every_named_family_runs_in_one_batch(engine: Engine) -> None:
    assert isinstance(engine.runner, BatchRunner)


def test_greedy_ids_equal_those_of_transformers_own_generate(engine: Engine, folder: Path) -> None:
    for prompt in (PROMPT, "a", "together 👋"):
        expected = expected_ids(engine, folder, prompt, 40)
        ids, text = finish(engine, Generate("", prompt, Sampling(max_tokens=40)))
        assert ids == expected
        assert text == engine.decode(expected)


def test_answers_in_a_mixed_batch_with_others_joining_and_leaving_equal_those_alone(
    engine: Engine, folder: Path
) -> None:
    chance = random.Random(7)
    requests = []
    for number in range(14):
        words = " ".join(chance.choices(PROMPT.split(), k=chance.randint(1, 5)))
        requests.append(Generate(str(number), words, Sampling(max_tokens=chance.randint(1, 50))))
    answers = Answers()
    waiting = list(requests)
    cancelled = set()
    while waiting or not engine.is_idle:
        for _ in range(chance.choice([0, 0, 1, 3])):
            if waiting and len(answers.ends) + 6 > len(requests) - len(waiting):
                engine.add(waiting.pop())
        if chance.random() < 0.04 and engine.cancel("13"):
            cancelled.add("13")
        answers.take(engine.step())
    for request in requests:
        expected = expected_ids(engine, folder, request.input, request.sampling.max_tokens)
        if request.id in cancelled:
            assert answers.reason(request.id) == "cancelled"
            expected = expected[: len(answers.ids(request.id))]
        assert answers.ids(request.id) == expected
        assert answers.positions(request.id) == list(range(len(expected)))


@torch.inference_mode()
def test_logits_of_a_mixed_batch_are_the_models_own(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], torch.Tensor]] = []
    advance = engine._advance

    def note_and_advance(sequences: list[Sequence], logits: torch.Tensor) -> int:
        for sequence, row in zip(sequences, logits, strict=True):
            seen.append((sequence.tokens[: sequence.num_computed], row.clone()))
        return advance(sequences, logits)

    monkeypatch.setattr(engine, "_advance", note_and_advance)
    run(engine, *(Generate(text, text, Sampling(max_tokens=25)) for text in (PROMPT, PROMPT * 2, "a", "alles")))
    assert len(seen) > 25
    for tokens, logits in seen:
        whole = engine.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        assert torch.allclose(logits, whole, atol=2e-3 * float(whole.std()))


def test_a_long_prompt_read_in_chunks_gives_the_same_answer(engine: Engine, folder: Path) -> None:
    prompt = (PROMPT + " ") * 2
    expected = expected_ids(engine, folder, prompt, 8)
    answers = Answers()
    engine.add(Generate("other", "a", Sampling(max_tokens=100)))
    answers.take(engine.step())
    limits = engine._batch.limits
    engine._batch.limits = Limits(limits.slots, limits.kv_tokens, chunk_tokens=7)
    engine.add(Generate("long", prompt, Sampling(max_tokens=8)))
    while not engine.is_idle:
        answers.take(engine.step())
    engine._batch.limits = limits
    assert answers.ids("long") == expected


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=30), Sampling(max_tokens=30, temperature=0.8, seed=9)])
def test_an_answer_resumed_at_any_position_goes_on_with_the_same_ids_and_text(
    engine: Engine, sampling: Sampling
) -> None:
    whole = run(engine, Generate("", PROMPT, sampling))
    ids, texts = whole.ids(""), [piece.text for piece in whole.pieces["", 0]]
    for cut in range(len(ids) + 1):
        rest = run(engine, Generate("", PROMPT, sampling, (tuple(ids[:cut]),)))
        assert ids[:cut] + rest.ids("") == ids
        assert "".join(texts[:cut]) + rest.text("") == whole.text("")
        assert rest.positions("") == list(range(cut, len(ids)))


def test_what_goes_on_from_an_ended_sequence_is_read_only_where_it_is_new(engine: Engine) -> None:
    whole, _ = finish(engine, Generate("", PROMPT, Sampling(max_tokens=24, ignore_eos=True)))
    other, _ = finish(engine, Generate("", PROMPT[::-1], Sampling(max_tokens=12, ignore_eos=True)))
    prompt_ids = engine.encode(PROMPT[::-1], raw=True)
    before = engine.runner.num_reused_tokens
    finish(engine, Generate("", PROMPT[::-1], Sampling(max_tokens=24, ignore_eos=True), (tuple(other),)))
    # The last token was told, and never read.
    assert engine.runner.num_reused_tokens - before == len(prompt_ids) + len(other) - 1
    rest, _ = finish(engine, Generate("", PROMPT, Sampling(max_tokens=24, ignore_eos=True), (tuple(whole[:12]),)))
    assert whole[:12] + rest == whole


def test_a_beginning_shared_with_others_is_used_again(engine: Engine, folder: Path) -> None:
    engine.runner.num_reused_tokens = 0
    texts = [PROMPT + end for end in (" one", " two", " three", " four")]
    answers = run(engine, *(Generate(text, text, Sampling(max_tokens=10)) for text in texts))
    again = run(engine, *(Generate(text, text, Sampling(max_tokens=10)) for text in reversed(texts)))
    for text in texts:
        assert answers.ids(text) == again.ids(text) == expected_ids(engine, folder, text, 10)
    assert engine.runner.is_recurrent or engine.runner.num_reused_tokens > len(engine.encode(PROMPT, raw=True))


def test_choices_of_one_request_share_its_prompt_and_end_together(engine: Engine) -> None:
    engine.runner.num_reused_tokens = 0
    sampling = Sampling(max_tokens=12, temperature=1.5, seed=4, n=3)
    answers = run(engine, Generate("n", PROMPT, sampling))
    end = answers.ends["n"]
    lengths = [len(answers.ids("n", choice)) for choice in range(3)]
    num_prompt = len(engine.encode(PROMPT, raw=True))
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (num_prompt, sum(lengths))
    assert len(end.choices) == 3
    assert engine.runner.is_recurrent or engine.runner.num_reused_tokens >= 2 * (num_prompt - 1)
    cut = tuple(tuple(answers.ids("n", choice)[: 4 * choice]) for choice in range(3))
    rest = run(engine, Generate("n", PROMPT, sampling, cut))
    for choice in range(3):
        assert [*cut[choice], *rest.ids("n", choice)] == answers.ids("n", choice)
    assert rest.ends["n"].choices == end.choices


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_without_room_the_youngest_is_put_back_and_all_answers_are_the_same(engine: Engine, folder: Path) -> None:
    assert isinstance(engine.runner, BatchRunner)
    cache = engine.runner.cache
    # Two sequences of 64 tokens, or one of 128.
    small = load(folder, slots=4, kv_bytes=2 * 64 * cache.token_bytes + 4 * cache.row_bytes)
    texts = ("a", "b", "c", "together 👋")
    answers = run(small, *(Generate(text, text, Sampling(max_tokens=90, ignore_eos=True)) for text in texts))
    alone = run(engine, *(Generate(text, text, Sampling(max_tokens=90, ignore_eos=True)) for text in texts))
    for text in texts:
        assert answers.ends[text].error is None
        assert answers.ids(text) == alone.ids(text)


@pytest.mark.parametrize("failing", [1, 2, 9])
def test_memory_that_runs_out_in_mid_batch_puts_the_youngest_back_and_loses_nothing(llama: Path, failing: int) -> None:
    engine = load(llama)
    texts = ("a", "b", PROMPT, "together 👋")
    requests = [Generate(text, text, Sampling(max_tokens=30)) for text in texts]
    expected = run(engine, *requests)
    engine = load(llama)
    forward = engine.model.forward
    num_calls = 0

    def fail_once(*args: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(*args, **options)

    engine.model.forward = fail_once
    answers = run(engine, *requests)
    for text in texts:
        assert answers.ends[text].error is None
        assert answers.ids(text) == expected.ids(text)


def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rows grow on demand, as an accelerator's do."""
    monkeypatch.setattr(KvCache, "unfold", lambda _self: None)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_memory_that_runs_out_while_rows_grow_loses_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    small_rows(monkeypatch)
    short = Generate("short", "together", Sampling(max_tokens=60, ignore_eos=True))
    long = Generate("long", PROMPT, Sampling(max_tokens=3, ignore_eos=True))
    expected = run(load(llama), short, long)
    engine = load(llama)
    answers = Answers()
    engine.add(short)
    for _ in range(10):
        answers.take(engine.step())
    make = kvcache._zeros
    num_calls = 0

    def fail_once(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(shape, like)

    monkeypatch.setattr(kvcache, "_zeros", fail_once)
    engine.add(long)
    while not engine.is_idle:
        answers.take(engine.step())
    assert num_calls > failing
    for request in (short, long):
        assert answers.ends[request.id].error is None
        assert answers.ids(request.id) == expected.ids(request.id)


def test_memory_that_runs_out_while_rows_are_moved_loses_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine.runner, BatchRunner)
    cache = engine.runner.cache
    requests = [
        Generate(text, text, Sampling(max_tokens=num, ignore_eos=True))
        for text, num in (("a", 5), ("b", 30), ("c", 30))
    ]
    expected = run(engine, *requests)
    num_calls = 0

    def fail_half_way(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        with cache._whole_or_lost():
            monkeypatch.undo()
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache, "swap_rows", fail_half_way)
    answers = run(engine, *requests)
    assert num_calls == 1
    for request in requests:
        assert answers.ends[request.id].error is None
        assert answers.ids(request.id) == expected.ids(request.id)


def test_memory_that_runs_out_within_a_pass_loses_nothing_of_any_family(engine: Engine) -> None:
    requests = [Generate(text, text, Sampling(max_tokens=30, ignore_eos=True)) for text in ("a", PROMPT)]
    expected = run(engine, *requests)
    answers = Answers()
    for request in requests:
        engine.add(request)
    for _ in range(10):
        answers.take(engine.step())
    decode = engine.runner.decode

    def fail_after_the_pass(sequences: Any) -> Any:
        engine.runner.decode = decode  # type: ignore[method-assign]
        held = [sequence.num_computed for sequence in sequences]
        decode(sequences)  # what the layers took in cannot be taken back
        for sequence, num_computed in zip(sequences, held, strict=True):
            sequence.num_computed = num_computed
        engine.runner._members = ()  # type: ignore[attr-defined]
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.runner.decode = fail_after_the_pass  # type: ignore[method-assign]
    while not engine.is_idle:
        answers.take(engine.step())
    for request in requests:
        assert answers.ends[request.id].error is None
        assert answers.ids(request.id) == expected.ids(request.id)


@pytest.mark.parametrize("where", ["pass", "choice"])
def test_an_accelerator_that_does_nothing_more_ends_the_process(
    llama: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = load(llama)

    def fail(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    if where == "pass":
        monkeypatch.setattr(engine.runner, "prefill", fail)
    else:
        monkeypatch.setattr(engine._sampler, "choose", fail)
    engine.add(Generate("a", PROMPT))
    engine.add(Generate("b", "b" + PROMPT))
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_prompt_with_tokens_that_the_model_does_not_have_is_refused_alone(llama: Path) -> None:
    engine = load(llama)
    good = Generate("good", PROMPT, Sampling(max_tokens=5))
    expected = run(engine, good)
    engine.tokenizer.add_tokens(["[PAD]"])
    engine.add(good)
    with pytest.raises(InvalidRequest, match="does not have"):
        engine.add(Generate("bad", "a [PAD] b", Sampling(max_tokens=5)))
    answers = Answers()
    while not engine.is_idle:
        answers.take(engine.step())
    assert answers.ids("good") == expected.ids("good")


def test_a_choice_that_fails_disturbs_nobody_who_is_read_beside_its_sibling(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(llama)
    good = [Generate(f"good {number}", f"{number}{PROMPT}", Sampling(max_tokens=5)) for number in (1, 2)]
    expected = [finish(engine, request) for request in good]
    engine = load(llama)  # which has read nothing yet
    choose = engine._sampler.choose

    def fail_first_choice(logits: torch.Tensor, rows: Any) -> list[Any]:
        outcomes: list[Any] = list(choose(logits, rows))
        for place, row in enumerate(rows):
            if row.sampling.n == 2 and row.choice == 0 and row.position == 2:
                outcomes[place] = OutputInvalid("broken")
        return outcomes

    monkeypatch.setattr(engine._sampler, "choose", fail_first_choice)
    answers = Answers()
    # Too short to be shared: the second choice reads it for itself, while the first one goes on, and fails.
    engine.add(Generate("bad", "x y", Sampling(max_tokens=20, n=2, temperature=1.0)))
    answers.take(engine.step())
    for request in good:
        engine.add(request)
    while not engine.is_idle:
        answers.take(engine.step())
    assert answers.reason("bad") == "error"
    assert [(answers.ids(request.id), answers.text(request.id)) for request in good] == expected


def test_logits_that_are_no_numbers_end_that_job_alone(llama: Path) -> None:
    engine = load(llama)
    expected = run(engine, Generate("good", PROMPT, Sampling(max_tokens=30)))
    bad_id = engine.encode("\x00", raw=True)[0]
    assert bad_id not in expected.ids("good")
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[bad_id] = float("nan")
    answers = run(engine, *(Generate(text, text, Sampling(max_tokens=30)) for text in ("ab\x00cd", "\x00")))
    mixed = run(
        engine,
        Generate("bad", "ab\x00cd", Sampling(max_tokens=30)),
        Generate("good", PROMPT, Sampling(max_tokens=30)),
        Generate("bad too", "\x00", Sampling(max_tokens=30)),
    )
    for end in (*answers.ends.values(), mixed.ends["bad"], mixed.ends["bad too"]):
        assert end.error
        assert (end.finish_reason, end.error.code) == ("error", "output_invalid")
    assert mixed.ids("good") == expected.ids("good")
    # The rows that held them are clean for those who come after.
    after = run(engine, *(Generate(str(number), PROMPT, Sampling(max_tokens=30)) for number in range(4)))
    assert all(after.ids(str(number)) == expected.ids("good") for number in range(4))


def test_a_model_whose_layers_cannot_be_batched_runs_its_sequences_one_by_one(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(load(llama), *(Generate(text, text, Sampling(max_tokens=20)) for text in ("a", PROMPT)))
    monkeypatch.setattr("tether.kvcache.FULL", "another_kind")
    engine = load(llama)
    assert not isinstance(engine.runner, BatchRunner)
    assert "one by one" in caplog.text
    answers = run(engine, *(Generate(text, text, Sampling(max_tokens=20)) for text in ("a", PROMPT)))
    assert [answers.ids(text) for text in ("a", PROMPT)] == [expected.ids(text) for text in ("a", PROMPT)]


def test_answers_of_a_model_that_tells_long_sequences_from_short_ones_are_its_own_in_any_company(
    tmp_path: Path,
) -> None:
    folder = make_model("longrope", tmp_path)
    engine = load(folder)
    lengths = {"a": 30, "crosses": 90, PROMPT * 3: 20}
    assert len(engine.encode(PROMPT * 3, raw=True)) > CONTEXT // 2
    requests = [Generate(text, text, Sampling(max_tokens=num, ignore_eos=True)) for text, num in lengths.items()]
    answers = run(engine, *requests)
    expected = {text: expected_ids(engine, folder, text, num) for text, num in lengths.items()}
    assert {text: answers.ids(text) for text in lengths} == expected
    for cut in (1, 60, 89):  # resumed on either side of the switch
        rest = run(engine, msgspec.structs.replace(requests[1], emitted=(tuple(expected["crosses"][:cut]),)))
        assert [*expected["crosses"][:cut], *rest.ids("crosses")] == expected["crosses"]


def test_a_model_whose_context_ends_before_its_sequences_are_long_runs_them_together(tmp_path: Path) -> None:
    engine = load(make_model("longrope", tmp_path))
    info = msgspec.structs.replace(engine.info, context_tokens=CONTEXT // 2)
    assert isinstance(Engine.around(engine.model, engine.tokenizer, info).runner, BatchRunner)


def test_a_request_that_was_already_answered_leaves_nothing_behind(llama: Path) -> None:
    engine = load(llama)
    for _ in range(10):
        ended = run(engine, Generate("x", "a", Sampling(max_tokens=3, presence_penalty=1.0), emitted=((1, 2, 3),)))
        assert ended.reason("x") == "length"
        counts = engine._sampler._counts
        assert len(counts.free) == counts.seen.shape[0]


def test_an_embedding_that_is_no_number_is_an_error(llama: Path) -> None:
    engine = EmbeddingEngine(load(llama))
    bad_id = load(llama).encode("\x00", raw=True)[0]
    with torch.no_grad():
        engine._model.get_input_embeddings().weight[bad_id] = float("nan")
    engine.embed(Embed("bad", ("\x00",)))
    engine.embed(Embed("good", ("a",)))
    ends: dict[str, End] = {}
    while not engine.is_idle:
        ends |= {event.id: event for event in engine.step() if isinstance(event, End)}
    assert ends["good"].error is None
    assert ends["bad"].error is not None
    assert ends["bad"].error.code == "output_invalid"


def test_context_is_counted_with_the_answer(engine: Engine) -> None:
    tokens = len(engine.encode(PROMPT, raw=True))
    answers = run(engine, Generate("", PROMPT, Sampling(max_tokens=1000, temperature=5.0)))
    assert answers.reason("") == "stop" or len(answers.ids("")) == CONTEXT - tokens
    with pytest.raises(ContextLengthExceeded, match=f"{engine.info.name} takes {CONTEXT}"):
        engine.add(Generate("", PROMPT * 20))


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_model_is_told_as_its_files_say(engine: Engine, folder: Path) -> None:
    info = engine.info
    assert (info.name, info.version, info.context_tokens, info.dtype) == (folder.name, "1.0", CONTEXT, "float32")
    assert info.revision == catalog.weights_hash(folder)
    assert info.slots == 4
    assert not info.toy


def test_slots_are_as_many_as_the_memory_holds(llama: Path) -> None:
    engine = load(llama, slots=None)
    assert engine.info.slots == 32
    assert isinstance(engine.runner, BatchRunner)
    assert load(llama, slots=None, kv_bytes=5 * CONTEXT * engine.runner.cache.token_bytes).info.slots == 5


def test_a_model_without_a_chat_template_gets_the_plain_prompt(engine: Engine) -> None:
    assert engine.encode(PROMPT, raw=False) == engine.tokenizer(PROMPT)["input_ids"]
    assert len(engine.encode("", raw=False)) == 1


def test_a_chat_template_frames_the_prompt_unless_it_is_raw(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine = load(make_model("tinyllama", tmp_path / "chat", chat_template=template))
    assert engine.decode(engine.encode("hi", raw=False)) == "[user]hi>"
    assert engine.decode(engine.encode("hi", raw=True)) == "hi"


def test_a_device_that_is_not_there_is_refused(llama: Path) -> None:
    with pytest.raises(ModelUnavailable, match="this machine has no device `nonsense`"):
        Engine.load(catalog.resolve(str(llama)), device="nonsense")


def test_a_model_may_be_loaded_in_another_type(folder: Path) -> None:
    engine = Engine.load(catalog.resolve(str(folder)).with_dtype("bfloat16"), device="cpu", slots=2)
    assert engine.info.dtype == "bfloat16"
    ids, _ = finish(engine, Generate("", PROMPT, Sampling(max_tokens=5)))
    assert 1 <= len(ids) <= 5


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_of_any_ids_is_what_the_tokenizer_itself_says(llama: Path) -> None:
    engine = load(llama)
    chance = random.Random(1)
    for _ in range(3000):
        # Halves of characters and ids that no token has, too.
        ids = [chance.randrange(engine.num_vocabulary + 5) for _ in range(chance.randint(1, 6))]
        assert engine.decode(ids) == engine.tokenizer.decode(ids, skip_special_tokens=True)
