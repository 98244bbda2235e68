"""Teacher-forced decoding: the next-token distributions that a quantized cache really gives.

A prefill attends exactly and never reads a code: the prefix is prefilled, every later token decoded over codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """Full-precision logits after each token from ``prefix`` on but the last: float32 ``[B, T - prefix - 1, V]``."""
    rows = []
    for row in input_ids[:, :-1]:
        output = model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=row.numel() - prefix)
        rows.append(output.logits.float().cpu())
    return torch.cat(rows)


def decode(model: PreTrainedModel, cache: KVCache, input_ids: Tensor, prefix: int) -> Iterator[tuple[int, Tensor]]:
    """Prefill ``input_ids [B, :prefix]`` into the cache and decode the rest but the last token, teacher-forced.

    Yields (index of the first token, float32 logits ``[B, n, V]`` after it and the n - 1 behind it). Tokens between two
    quantizations see the same codes, so they go through the model together: the numbers are those of one at a time.
    """
    with torch.inference_mode():
        model(input_ids=input_ids[:, :prefix].to(model.device), past_key_values=cache, logits_to_keep=1)
        cache.settle()
        first, stop = prefix, input_ids.shape[1] - 1
        while first < stop:
            last = min(first + min(core.tokens_until_due for core in cache.cores), stop)
            logits = model(input_ids=input_ids[:, first:last].to(model.device), past_key_values=cache).logits
            cache.settle()
            yield first, logits.float().cpu()
            first = last


def compare(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: Tensor,
    prefix: int,
    reference: Tensor,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Agreement:
    """How decoding over the cache agrees with ``reference``, the ``full_logits`` of the same tokens and prefix."""
    parts = []
    for first, logits in decode(model, cache, input_ids, prefix):
        count = logits.shape[1]
        targets = input_ids[:, first + 1 : first + count + 1]
        parts.append(_agreement(logits, reference[:, first - prefix : first - prefix + count], targets))
        on_tokens(count)
    return Agreement(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def _agreement(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, full = logits.log_softmax(-1), reference.log_softmax(-1)
    kl = (full.exp() * (full - quantized)).sum(-1)
    nll, nll_full = (-x.gather(2, targets[..., None]).squeeze(2) for x in (quantized, full))
    return kl, nll, nll_full, logits.argmax(-1) == reference.argmax(-1)
