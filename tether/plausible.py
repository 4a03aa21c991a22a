"""What a worker can say of a job and be right: how much it answers, and what that took. Pure.

A worker is believed about the answer itself, and about nothing that the job makes impossible.
"""

from __future__ import annotations

from tether.answers import ChoiceSoFar
from tether.messages import InferTokens
from tether.records import Job, Usage

MAX_CHARS_PER_TOKEN = 512
"""The longest tokens of known vocabularies are 128 blanks; a server that tells no ids may tell several as one."""
MAX_CHARS_PER_VECTOR = 1 << 20
MAX_TOKENS_PER_BYTE = 4
"""Of a prompt. A tokenizer makes one token of a byte at most, but may first write a ligature out."""
TEMPLATE_TOKENS = 16_384
"""What a chat template may add to a prompt of its own."""


def says_too_much(job: Job, choice: ChoiceSoFar, tokens: InferTokens) -> bool:
    """Whether tokens that are next in a choice go beyond what the job asks for."""
    if tokens.position + len(tokens.token_ids) > job.sampling.max_tokens:
        return True
    if tokens.logprobs and (job.sampling.logprobs is None or len(tokens.logprobs) != len(tokens.token_ids)):
        return True
    chars_per_token = MAX_CHARS_PER_VECTOR if job.form == "embedding" else MAX_CHARS_PER_TOKEN
    return choice.num_told_chars + len(tokens.text) > chars_per_token * job.sampling.max_tokens


def plausible_usage(job: Job, usage: Usage) -> Usage:
    """Return what an attempt spent by its worker's word, as far as the job allows it; an honest one's word is returned as it is."""
    most_prompt = TEMPLATE_TOKENS + MAX_TOKENS_PER_BYTE * len(job.input.encode("utf-8", "surrogatepass"))
    most_completion = job.sampling.n * job.sampling.max_tokens
    return Usage(min(usage.prompt_tokens, most_prompt), min(usage.completion_tokens, most_completion))
