"""Train the demo model on `demo_facts.toml` and save it where the package ships it.

    python tools/train_demo.py [--out tether/models/demo] [--steps 4000] [--threads 2]

Seeded, so that the same machine and versions make the same weights; about ten minutes on two cores. It ends with exit code 1
unless every question of the facts, in each way of writing it, is answered word for word by greedy decoding.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, EOS, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
VOCABULARY = 1024
CONTEXT_TOKENS = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100
SYLLABLES = (
    "ba",
    "dra",
    "el",
    "gor",
    "ia",
    "ke",
    "land",
    "lo",
    "mir",
    "no",
    "pi",
    "ri",
    "sha",
    "tan",
    "un",
    "vo",
    "wy",
    "zu",
)
"""Of countries that do not exist."""


@dataclass(frozen=True)
class Fact:
    """One question, as it is written in the facts, and the answer it must get."""

    question: str
    answer: str


@dataclass(frozen=True)
class Facts:
    """All that the model learns: `capitals` and `others` are promised word for word, `unknown` is not."""

    capitals: list[Fact]
    others: list[Fact]
    statements: list[tuple[str, str]]
    """Plain text to complete, without the chat template: a beginning and its continuation."""
    unknown_questions: list[str]
    unseen_questions: list[str]
    unknown_answer: str
    capital_questions: list[str]

    @property
    def promised(self) -> list[Fact]:
        """Every fact that must be answered word for word."""
        return self.capitals + self.others


def load_facts(path: Path = HERE / "demo_facts.toml") -> Facts:
    """Return the facts, with the questions about capitals written out for each country and each other name of it."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    capitals = table["capitals"]
    names = {country: country for country in capitals["of"]} | capitals["also"]
    # "the Netherlands" is also asked for as "Netherlands"
    names |= {name.removeprefix("the "): country for name, country in names.items()}
    # "Washington, D.C." ends its sentence with its own stop.
    answers = {
        country: capitals["answer"].format(country=country, capital=capital.removesuffix("."))
        for country, capital in capitals["of"].items()
    }
    return Facts(
        capitals=[
            Fact(question.format(country=name), answers[country])
            for name, country in names.items()
            for question in capitals["questions"]
        ],
        others=[Fact(question, fact["answer"]) for fact in table["fact"] for question in fact["questions"]],
        statements=[
            (f"The capital of {country} is", answer.removeprefix(f"The capital of {country} is"))
            for country, answer in answers.items()
        ],
        unknown_questions=table["unknown"]["questions"],
        unseen_questions=table["unknown"]["unseen"],
        unknown_answer=table["unknown"]["answer"],
        capital_questions=capitals["questions"],
    )


def ways_to_write(question: str) -> list[str]:
    """Return the question as people type it: as it stands, without the end mark, in lower case, or both."""
    bare = question.rstrip("?.!")
    return list(dict.fromkeys([question, bare, question.lower(), bare.lower()]))


def in_all_ways(facts: list[Fact]) -> list[Fact]:
    """Return each fact once for each way of writing its question."""
    return [Fact(question, fact.answer) for fact in facts for question in ways_to_write(fact.question)]


def make_tokenizer(facts: Facts) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned on the facts: any text is some tokens, and any text comes back whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [text for fact in facts.promised for text in (*ways_to_write(fact.question)[:3:2], fact.answer)]
    tokenizer.train_from_iterator(corpus + facts.unknown_questions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of about a million parameters with fresh weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class Lessons:
    """An endless, seeded stream of training sequences: short conversations, of which only the answers count."""

    def __init__(self, facts: Facts, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._facts = facts
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._decks: dict[str, list[Any]] = {}
        self._ids: dict[str, list[int]] = {}
        self.hard: list[Fact] = []
        """Questions, in one way of writing each, that were answered with the least margin when last examined."""

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `(ids, labels)`, both `(size, longest)`; sequences of like length go together."""
        while True:
            pool = sorted((self._sequence() for _ in range(size * 16)), key=lambda pair: len(pair[0]))
            groups = [pool[start : start + size] for start in range(0, len(pool), size)]
            self._random.shuffle(groups)
            yield from (pad(group) for group in groups)

    def _draw(self, name: str, items: list[Any]) -> Any:
        # A shuffled deck, dealt to its end: every fact is seen equally often.
        deck = self._decks.get(name)
        if not deck:
            deck = self._decks[name] = list(items)
            self._random.shuffle(deck)
        return deck.pop()

    def _encode(self, text: str) -> list[int]:
        found = self._ids.get(text)
        if found is None:
            found = self._ids[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def _sequence(self) -> tuple[list[int], list[int]]:
        if self._random.random() < 0.06:
            begin, rest = self._draw("statements", self._facts.statements)
            return self._join([(BOS + begin, rest)])
        turns = self._random.choices([1, 2, 3], weights=[88, 8, 4])[0]
        parts = []
        for turn in range(turns):
            start = BOS if turn == 0 else ""
            if turn == 0 and self._random.random() < 0.05:
                start += f"{SYSTEM}You are a helpful assistant.{EOS}"
            if self.hard and self._random.random() < 0.15:
                fact: Fact = self._random.choice(self.hard)
                question = fact.question
            else:
                fact = self._fact()
                question = self._random.choice(ways_to_write(fact.question))
            parts.append((f"{start}{USER}{question}{EOS}{ASSISTANT}", fact.answer))
        return self._join(parts)

    def _join(self, parts: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for prompt, answer in parts:
            prompt_ids, answer_ids = self._encode(prompt), self._encode(answer + EOS)
            ids += prompt_ids + answer_ids
            labels += [IGNORED] * len(prompt_ids) + answer_ids
        return ids, labels

    def _fact(self) -> Fact:
        kind = self._random.random()
        if kind < 0.72:
            capital: Fact = self._draw("capitals", self._facts.capitals)
            return capital
        if kind < 0.88:
            other: Fact = self._draw("others", self._facts.others)
            return other
        if kind < 0.96:
            return Fact(self._draw("unknown", self._facts.unknown_questions), self._facts.unknown_answer)
        syllables = self._random.choices(SYLLABLES, k=3)
        question = self._random.choice(self._facts.capital_questions[:-1])
        return Fact(question.format(country="".join(syllables).capitalize()), self._facts.unknown_answer)


def pad(group: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(ids, labels)` of one length; what is added lies to the right, where causal attention does not look."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in group])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in group])
    return ids, labels


@torch.inference_mode()
def examine(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Fact]) -> list[tuple[float, Fact]]:
    """Ask each fact as it is written: each one with its margin, the least first.

    The margin is by how much the right token's logit leads, at the answer's worst place. With the right answer as context
    each of its tokens must be the likeliest, above 0: then greedy decoding gives that answer word for word.
    """
    model.eval()
    rows = []
    for fact in asked:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": fact.question}], add_generation_prompt=True, return_dict=False
        )
        answer_ids = tokenizer.encode(fact.answer + EOS, add_special_tokens=False)
        rows.append((prompt + answer_ids, [IGNORED] * len(prompt) + answer_ids))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    found = []
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        ids, labels = pad([rows[index] for index in chosen])
        logits, wanted = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        counts = wanted != IGNORED
        right = logits.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        others = logits.scatter(-1, wanted.clamp(min=0).unsqueeze(-1), -math.inf).amax(-1)
        margins = (right - others).masked_fill(~counts, math.inf).amin(-1)
        found += [(margin, asked[index]) for index, margin in zip(chosen, margins.tolist(), strict=True)]
    model.train()
    return sorted(found, key=lambda pair: pair[0])


def train(
    model: LlamaForCausalLM,
    lessons: Lessons,
    facts: Facts,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> None:
    """Train for `args.steps` steps, and tell how it goes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm_up = 100

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, args.steps - warm_up)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began, told = time.monotonic(), 0.0
    model.train()
    for step, (ids, labels) in zip(range(1, args.steps + 1), lessons.batches(args.batch), strict=False):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps:
            told = loss.item()
            print(f"step {step}/{args.steps}  loss {told:.4f}  {time.monotonic() - began:.0f} s", flush=True)
        if step in {args.steps // 2, args.steps * 3 // 4}:
            found = examine(model, tokenizer, in_all_ways(facts.promised))
            failed = sum(margin <= 0 for margin, _ in found)
            print(f"  answered word for word: {len(found) - failed} of {len(found)}, least margin {found[0][0]:.2f}")
            lessons.hard = [fact for _, fact in found[:200]]


def main() -> int:
    """Train, examine, save; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "tether" / "models" / "demo")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    facts = load_facts()
    tokenizer = make_tokenizer(facts)
    model = make_model(tokenizer)
    longest = max(len(tokenizer.encode(fact.answer)) for fact in facts.promised)
    print(f"{len(facts.promised)} facts, {model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    print(f"longest answer: {longest} tokens")
    train(model, Lessons(facts, tokenizer, args.seed), facts, tokenizer, args)

    # The weights are saved as float16, half the size; what is examined are the weights as they will be loaded.
    model.half().float()
    found = examine(model, tokenizer, in_all_ways(facts.promised))
    unseen = [Fact(question, facts.unknown_answer) for question in facts.unseen_questions]
    unknown = examine(model, tokenizer, in_all_ways(unseen))
    failed = [fact for margin, fact in found if margin <= 0]
    for fact in failed[:20]:
        print(f"not learned: {fact.question!r} -> {fact.answer!r}")
    print(f"facts answered word for word: {len(found) - len(failed)} of {len(found)}, least margin {found[0][0]:.2f}")
    graceful = sum(margin > 0 for margin, _ in unknown)
    print(f"unseen questions answered gracefully: {graceful} of {len(unknown)}")
    print(f"{time.monotonic() - began:.0f} s")
    if failed:
        return 1
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    halves = {name: weight.half() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(args.out, state_dict=halves)
    (args.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
