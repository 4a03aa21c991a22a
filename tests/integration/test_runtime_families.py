"""Other architectures, built from their configs with random weights: the same code, and transformers' own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tether import catalog
from tether.engine import Engine, Sequence, choose
from tether.errors import ContextLengthExceeded, ModelUnavailable, OutputInvalid
from tether.records import Sampling
from tether.runtime_messages import Generate

PROMPT = "Ordinary machines serve language models together, über alles Grenzen hinweg."


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


def make_model(family: str, folder: Path, *, chat_template: str | None = None) -> Path:
    torch.manual_seed(3)
    size = save_tokenizer(folder, chat_template=chat_template)
    model: Any
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
                initializer_range=0.5,
            )
        )  # fmt: skip
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
                initializer_range=0.5,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return folder


def load(folder: Path, *, threads: int = 1) -> Engine:
    return Engine.load(catalog.check(catalog.resolve(str(folder)), free_bytes=1 << 50), device="cpu", threads=threads)


def finish(sequence: Sequence) -> tuple[list[int], str]:
    ids, text = [], ""
    while sequence.finish_reason is None:
        _, token_id, added = sequence.step()
        ids.append(token_id)
        text += added
    return ids, text


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load(folder)


def test_greedy_ids_equal_those_of_transformers_own_generate(engine: Engine, folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in (PROMPT, "a", "together 👋"):
        inputs = engine.tokenizer(prompt, return_tensors="pt")
        whole = reference.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)
        expected = whole[0, inputs["input_ids"].shape[1] :].tolist()
        ids, text = finish(engine.start(Generate("", prompt, Sampling(max_tokens=40))))
        assert ids == expected
        assert text == engine.decode(expected)


def test_the_model_is_told_as_its_files_say(engine: Engine, folder: Path) -> None:
    info = engine.info
    assert (info.name, info.version, info.context_tokens, info.dtype) == (folder.name, "1.0", 128, "float32")
    assert info.revision == catalog.weights_hash(folder)
    assert not info.toy


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=30), Sampling(max_tokens=30, temperature=0.8, seed=9)])
def test_an_answer_resumed_at_any_position_goes_on_with_the_same_ids_and_text(
    engine: Engine, sampling: Sampling
) -> None:
    whole = engine.start(Generate("", PROMPT, sampling))
    pieces = []
    while whole.finish_reason is None:
        pieces.append(whole.step()[1:])
    ids, texts = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
    for cut in range(len(ids) + 1):
        rest, text = finish(engine.start(Generate("", PROMPT, sampling, tuple(ids[:cut]))))
        assert ids[:cut] + rest == ids
        assert "".join(texts[:cut]) + text == "".join(texts)


def test_context_is_counted_with_the_answer(engine: Engine) -> None:
    tokens = len(engine.encode(PROMPT, raw=True))
    sequence = engine.start(Generate("", PROMPT, Sampling(max_tokens=1000, temperature=5.0)))
    ids, _ = finish(sequence)
    assert sequence.finish_reason == "stop" or len(ids) == 128 - tokens
    with pytest.raises(ContextLengthExceeded, match=f"{engine.info.name} takes 128"):
        engine.start(Generate("", PROMPT * 20))


def test_a_model_without_a_chat_template_gets_the_plain_prompt(engine: Engine) -> None:
    assert engine.encode(PROMPT, raw=False) == engine.tokenizer(PROMPT)["input_ids"]
    assert len(engine.encode("", raw=False)) == 1


def test_a_chat_template_frames_the_prompt_unless_it_is_raw(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine = load(make_model("llama", tmp_path / "chat", chat_template=template))
    assert engine.decode(engine.encode("hi", raw=False)) == "[user]hi>"
    assert engine.decode(engine.encode("hi", raw=True)) == "hi"


def test_logits_that_are_no_numbers_end_the_answer_as_invalid(tmp_path: Path) -> None:
    engine = load(make_model("llama", tmp_path / "broken"))
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(OutputInvalid):
        engine.start(Generate("", PROMPT)).step()


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match="this machine has no device `nonsense`"):
        Engine.load(catalog.resolve(str(folder)), device="nonsense")


def test_a_model_may_be_loaded_in_another_type(folder: Path) -> None:
    engine = Engine.load(catalog.resolve(str(folder)).with_dtype("bfloat16"), device="cpu")
    assert engine.info.dtype == "bfloat16"
    ids, _ = finish(engine.start(Generate("", PROMPT, Sampling(max_tokens=5))))
    assert 1 <= len(ids) <= 5


# --- sampling --------------------------------------------------------------------------------------------------------


def draw(logits: torch.Tensor, **sampling: Any) -> list[int]:
    return [choose(logits, Sampling(**sampling), position) for position in range(4000)]


def test_sampled_tokens_come_as_often_as_the_model_says() -> None:
    wanted = torch.tensor([0.1, 0.2, 0.3, 0.4])
    counts = torch.bincount(torch.tensor(draw(wanted.log(), temperature=1.0)), minlength=4) / 4000
    assert torch.allclose(counts, wanted, atol=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.tensor([0.2, 0.8]).log()
    assert set(draw(logits, temperature=1e-6)) == {1}
    assert abs(sum(draw(logits, temperature=1000.0)) / 4000 - 0.5) < 0.05


def test_top_p_keeps_the_likeliest_tokens_that_together_reach_it() -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert set(draw(logits, temperature=1.0, top_p=0.4)) == {3}
    assert set(draw(logits, temperature=1.0, top_p=0.69)) == {2, 3}
    assert set(draw(logits, temperature=1.0, top_p=1e-9)) == {3}


def test_a_token_that_is_ruled_out_is_never_taken() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf")])
    assert set(draw(logits, temperature=1.0)) == {1}


def test_a_rounding_error_that_swaps_two_likely_tokens_does_not_change_the_choice() -> None:
    logits = torch.tensor([1.0, 1.0, 0.5])
    swapped = torch.tensor([1.0, 1.0 + 1e-6, 0.5])
    pairs = zip(draw(logits, temperature=1.0), draw(swapped, temperature=1.0), strict=True)
    assert sum(one != other for one, other in pairs) <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_finite_maximum_are_invalid(value: float) -> None:
    with pytest.raises(OutputInvalid):
        choose(torch.full((4,), value), Sampling(), 0)
