"""Teacher-forced decoding: the next-token distributions that a quantized cache really gives.

A prefill attends exactly and never reads a code, so the prefix is prefilled and every later token is decoded over codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qjl.hf import KVCache


@dataclass(frozen=True, eq=False)
class Agreement:
    """What teacher-forced decoding of ``[B, T]`` tokens gave, per token, against full precision.

    ``kl``: KL(full || quantized) in nats; ``nll``, ``nll_full``: of the true next token; ``same_top``: bool.
    """

    kl: Tensor
    nll: Tensor
    nll_full: Tensor
    same_top: Tensor


@torch.inference_mode()
def full_logits(model: PreTrainedModel, input_ids: Tensor, prefix: int) -> Tensor:
    """Full-precision logits after each of the tokens from ``prefix`` on but the last: float32 ``[B, T - prefix - 1, V]``."""
    rows = []
    for row in input_ids[:, :-1]:
        output = model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=row.numel() - prefix)
        rows.append(output.logits.float().cpu())
    return torch.cat(rows)


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: Tensor,
    prefix: int,
    reference: Tensor,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Agreement:
    """Prefill ``input_ids [B, :prefix]`` into the cache, then decode the rest teacher-forced.

    ``reference`` are the ``full_logits`` of the same tokens; the last token is only ever a target. Tokens between two
    quantizations see the same codes, so they go through the model together: the numbers are those of one at a time.
    """
    model(input_ids=input_ids[:, :prefix].to(model.device), past_key_values=cache, logits_to_keep=1)
    cache.settle()
    parts, done = [], 0
    while done < reference.shape[1]:
        count = min(min(core.tokens_until_due for core in cache.cores), reference.shape[1] - done)
        first = prefix + done
        logits = model(input_ids=input_ids[:, first : first + count].to(model.device), past_key_values=cache).logits
        cache.settle()
        targets = input_ids[:, first + 1 : first + count + 1]
        parts.append(_agreement(logits.float().cpu(), reference[:, done : done + count], targets))
        done += count
        on_tokens(count)
    return Agreement(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def _agreement(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, full = logits.log_softmax(-1), reference.log_softmax(-1)
    kl = (full.exp() * (full - quantized)).sum(-1)
    nll, nll_full = (-x.gather(2, targets[..., None]).squeeze(2) for x in (quantized, full))
    return kl, nll, nll_full, logits.argmax(-1) == reference.argmax(-1)
