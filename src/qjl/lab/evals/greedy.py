"""Greedy decoding over a cache: one text, or many side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from qjl.compat import cache_argument
from qjl.generation import end_tokens
from qjl.hf import KVCache
from qjl.lab.evals.eval_model import EvalModel
from qjl.teacher_forcing import feed

STOP = "\n\n"
KEPT = 0.75  # the share of rows still being written below which the others leave the batch


@torch.inference_mode()
def continue_greedily(subject: EvalModel, cache: KVCache, question: Tensor, max_new_tokens: int) -> str:
    """The likeliest text after ``question [1, T]``, read over a cache of what comes before it, up to an empty line."""
    model, tokenizer = subject.model, subject.tokenizer
    ends = end_tokens(model)
    feed(model, cache, question[:, :-1])
    token, found = question[:, -1:], []
    for _ in range(max_new_tokens):
        token = model(input_ids=token.to(model.device), **cache_argument(cache)).logits[:, -1:].argmax(-1)
        if int(token) in ends:
            break
        found.append(int(token))
        if STOP in tokenizer.decode(found[-8:]):
            break
    return str(tokenizer.decode(found, skip_special_tokens=True)).partition(STOP)[0]


@torch.inference_mode()
def write(
    model: PreTrainedModel,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_step: Callable[[], None] | None = None,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, up to the one that ends a text, which is left out.

    All of a prompt but its last token is prefilled into the empty cache. A row that has ended leaves the batch once
    enough others have too: what is left costs less. ``on_step`` is called before each token's pass.
    """
    ends, device = torch.tensor(sorted(end_tokens(model)), device=model.device), model.device
    ids, mask = (x.to(device) for x in _left_padded(prompts, max_new_tokens))
    _, length = ids.shape
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # padding has none
    past = slice(0, length - 1)
    model(
        input_ids=ids[:, past],
        attention_mask=mask[:, past],
        position_ids=positions[:, past],
        **cache_argument(cache),
        logits_to_keep=1,
    )
    written = ids.new_full((len(prompts), max_new_tokens), -1)
    rows, token = torch.arange(len(prompts), device=device), ids[:, -1:]
    for step in range(max_new_tokens):
        stop = length + step
        if on_step is not None:
            on_step()
        logits = model(
            input_ids=token,
            attention_mask=mask[rows, :stop],
            position_ids=positions[rows, stop - 1 : stop],
            **cache_argument(cache),
        ).logits
        token = logits[:, -1:].argmax(-1)
        written[rows, step] = token[:, 0]
        is_open = ~torch.isin(written[rows], ends).any(-1)
        if not is_open.any():
            break
        if is_open.float().mean() < KEPT:
            kept = is_open.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, token = rows[kept], token[kept]
    return [_before(row, set(ends.tolist()) | {-1}) for row in written.tolist()]


def _left_padded(prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor]:
    """``input_ids [B, T]``, and the mask of these and ``room`` more, ``int64 [B, T + room]``."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = [[0] * empty + list(prompt) for empty, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * empty + [1] * (longest - empty + room) for empty in padding]
    return torch.tensor(ids), torch.tensor(mask)


def _before(row: list[int], ends: set[int]) -> list[int]:
    """Tokens before the one that ends the text."""
    return row[: next((index for index, token in enumerate(row) if token in ends), len(row))]
