"""Retrieval: codes told in a prompt of real text, asked for over the quantized cache.

The prompt tells 30 codes, "The code for X is dddd."; the same sentences follow in another order. They are decoded
teacher-forced, and a code is retrieved if every token of it is the model's first choice.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.hf import KVCache
from qjl.teacher_forcing import decode

PAIRS = 30
FILLER_BEFORE, FILLER_AFTER = 256, 128
# fmt: off
WORDS = (
    "angel", "apple", "beach", "blood", "brain", "bread", "candy", "chair", "clock", "cloud", "crown", "dance",
    "devil", "dream", "eagle", "earth", "field", "flame", "fruit", "ghost", "glass", "grass", "green", "heart",
    "honey", "horse", "hotel", "house", "island", "ivory", "jewel", "juice", "knife", "lemon", "light", "lunch",
    "maple", "metal", "money", "mouse", "music", "night", "novel", "nurse", "ocean", "olive", "opera", "paper",
    "pearl", "piano", "plant", "queen", "radio", "river", "smoke", "snake", "stone", "storm", "story", "sugar",
    "table", "tiger", "tower", "train", "uncle", "voice", "water", "wheel", "world", "youth", "zebra",
)
# fmt: on


@dataclass(frozen=True, eq=False)
class RetrievalTask:
    """``input_ids [1, T]``, of which ``prefix`` tell the codes; ``answers``: (first, stop) of each code asked for."""

    input_ids: Tensor
    prefix: int
    answers: tuple[tuple[int, int], ...]


def make_task(tokenizer: PreTrainedTokenizerBase, filler: Tensor, seed: int) -> RetrievalTask:
    """30 pairs of words and codes inside ``filler``, token ids of real text (at least 384)."""
    draw = random.Random(seed)
    pairs = [(word, draw.randrange(1000, 10000)) for word in draw.sample(WORDS, PAIRS)]
    tokens = filler[:FILLER_BEFORE].tolist()
    for word, code in pairs:
        tokens += _tokens(tokenizer, f"\nThe code for {word} is") + _tokens(tokenizer, f" {code}.")
    tokens += filler[FILLER_BEFORE : FILLER_BEFORE + FILLER_AFTER].tolist()
    prefix, answers = len(tokens), []
    for word, code in draw.sample(pairs, PAIRS):
        tokens += _tokens(tokenizer, f"\nThe code for {word} is")
        answer = _tokens(tokenizer, f" {code}")
        answers.append((len(tokens), len(tokens) + len(answer)))
        tokens += _tokens(tokenizer, f" {code}.")
    return RetrievalTask(torch.tensor([tokens]), prefix, tuple(answers))


def retrieved(model: PreTrainedModel, cache: KVCache, task: RetrievalTask) -> float:
    """Share of the codes given back over a cache that holds the task's prefix."""
    choices = torch.cat([x.argmax(-1).cpu() for _, x in decode(model, cache, task.input_ids, task.prefix)], dim=1)[0]
    right = [
        bool((choices[first - 1 - task.prefix : stop - 1 - task.prefix] == task.input_ids[0, first:stop]).all())
        for first, stop in task.answers
    ]
    return sum(right) / len(right)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
