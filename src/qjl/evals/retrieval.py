"""Retrieval: codes told in a prompt of real text, asked for over the quantized cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.hf import KVCache

PAIRS = 30
FILLER_BEFORE, FILLER_AFTER = 256, 128
_WORDS = (
    "apple river stone cloud tiger music paper light green ocean bread chair table horse glass smoke night heart "
    "money house water train plant metal earth dance story world voice crown field storm sugar table beach brain "
    "clock dream fruit grass honey ivory juice knife lemon mouse nurse olive piano queen radio snake tower uncle "
    "wheel youth zebra angel blood candy devil eagle flame ghost hotel island jewel lunch maple novel opera pearl"
).split()


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """``prompt [1, T]``, one question per row ``[PAIRS, Q]``, and the answers' tokens ``[PAIRS, A]``."""

    prompt: Tensor
    questions: Tensor
    answers: Tensor


def make_task(tokenizer: PreTrainedTokenizerBase, filler: Tensor, seed: int) -> RetrievalTask:
    """30 pairs "the code for X is dddd" inside ``filler`` (token ids of real text, at least 384).

    Words and codes are drawn so that all questions, and all answers, have equally many tokens.
    """
    draw = random.Random(seed)
    words = _of_equal_length(tokenizer, [f"The code for {word} is" for word in sorted(set(_WORDS))])
    chosen = draw.sample(words, PAIRS)
    codes = [f" {draw.randrange(1000, 10000)}" for _ in chosen]
    told = "".join(f"\n{question}{code}." for question, code in zip(chosen, codes, strict=True))
    prompt = [
        *filler[:FILLER_BEFORE].tolist(),
        *_tokens(tokenizer, told),
        *filler[FILLER_BEFORE : FILLER_BEFORE + FILLER_AFTER].tolist(),
    ]
    questions = [_tokens(tokenizer, f"\n{question}") for question in chosen]
    answers = [_tokens(tokenizer, code) for code in codes]
    length = min(len(answer) for answer in answers)
    return RetrievalTask(
        torch.tensor([prompt]), torch.tensor(questions), torch.tensor([answer[:length] for answer in answers])
    )


@torch.inference_mode()
def retrieved(model: PreTrainedModel, cache: KVCache, task: RetrievalTask) -> float:
    """Share of codes given back exactly, all questions asked side by side over one prompt's cache."""
    device = model.device
    model(input_ids=task.prompt.to(device), past_key_values=cache, logits_to_keep=1)
    cache.settle()
    cache.batch_repeat_interleave(len(task.questions))
    tokens, given = task.questions.to(device), []
    for _ in range(task.answers.shape[1]):
        logits = model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        given.append(tokens.cpu())
    return float((torch.cat(given, dim=1) == task.answers).all(1).float().mean())


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _of_equal_length(tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> list[str]:
    """The questions of the commonest length in tokens."""
    lengths = [len(_tokens(tokenizer, f"\n{question}")) for question in questions]
    commonest = max(set(lengths), key=lengths.count)
    return [question for question, length in zip(questions, lengths, strict=True) if length == commonest]
