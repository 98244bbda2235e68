"""Teacher-forced decoding: the next-token distributions that a quantized cache really gives.

A prefill attends exactly and never reads a code: its keys and values are the same for every preset. So a model is
prefilled once, every quantized cache is filled from that, and all later tokens are decoded over its codes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from qjl.architecture import text_config
from qjl.compat import cache_argument
from qjl.hf import KVCache, QuantizedLayer, own_codecs
from qjl.presets import CacheConfig
from qjl.statistics import LayerStatistics

_SLICE_NUMBERS = 1 << 20  # compared at once, so that what comes between stays in a processor's cache


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
def full_log_probabilities(model: PreTrainedModel, input_ids: Tensor, prefix: int) -> Tensor:
    """In full precision, after each token from ``prefix`` on but the last: float32 ``[B, T - prefix - 1, V]``."""
    rows = []
    for row in input_ids[:, :-1]:
        output = model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=row.numel() - prefix)
        rows.append(log_probabilities(output.logits).cpu())
    return torch.cat(rows)


def log_probabilities(logits: Tensor) -> Tensor:
    """``[..., V]``, in float32."""
    return logits.float().log_softmax(-1)


def calibrated_cache(
    model: PreTrainedModel, config: CacheConfig, statistics: Callable[[], Mapping[int, LayerStatistics]]
) -> KVCache:
    """An empty cache whose codecs, if they need statistics, are fitted to these of each layer and to nothing else."""
    measured = functools.cache(statistics)
    return KVCache(model, config, codecs=own_codecs(model, config, lambda layer: measured().get(layer)))


@torch.no_grad()
def feed(model: PreTrainedModel, cache: Cache, input_ids: Tensor) -> None:
    """Put ``input_ids [B, T]`` through the model, all at once; none are fine."""
    if input_ids.shape[1]:
        model(input_ids=input_ids.to(model.device), logits_to_keep=1, **cache_argument(cache))


def prefill(model: PreTrainedModel, input_ids: Tensor) -> DynamicCache:
    """Transformers' own cache after ``input_ids [B, T]``."""
    cache = DynamicCache(config=text_config(model.config))
    feed(model, cache, input_ids)
    return cache


@torch.inference_mode()
def refill(cache: KVCache, exact: DynamicCache) -> None:
    """Make the cache what it were if the model had prefilled it; ``exact`` stays as it is.

    Codecs must not wait for a prompt: they need no statistics or have them.
    """
    cache.reset()
    for index, layer in enumerate(exact.layers):
        if not isinstance(cache.layers[index], QuantizedLayer):
            cache.layers[index] = copy.deepcopy(layer)
        elif layer.get_seq_length():  # type: ignore[union-attr]
            cache.update(layer.keys, layer.values, index)  # type: ignore[union-attr, arg-type]
    cache.settle()


def decode(model: PreTrainedModel, cache: KVCache, input_ids: Tensor, prefix: int) -> Iterator[tuple[int, Tensor]]:
    """Decode ``input_ids [B, prefix:]`` but the last token, teacher-forced, over a cache of all tokens before.

    Yields (index of the first token, logits ``[B, n, V]`` after it and the n - 1 behind it). Tokens between two
    quantizations see the same codes, so they go through the model together: the numbers are those of one at a time.
    """
    with torch.inference_mode():
        first, stop = prefix, input_ids.shape[1] - 1
        while first < stop:
            last = min(first + cache.tokens_until_due, stop)
            logits = model(input_ids=input_ids[:, first:last].to(model.device), **cache_argument(cache)).logits
            cache.settle()
            yield first, logits
            first = last


def compare(
    model: PreTrainedModel,
    cache: KVCache,
    input_ids: Tensor,
    prefix: int,
    reference: Tensor,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Agreement:
    """How ``decode`` agrees with ``reference``, the ``full_log_probabilities`` of the same tokens and prefix."""
    parts = []
    for first, logits in decode(model, cache, input_ids, prefix):
        count = logits.shape[1]
        targets = input_ids[:, first + 1 : first + count + 1]
        parts.append(_agreement(logits, reference[:, first - prefix : first - prefix + count], targets))
        on_tokens(count)
    return Agreement(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def _agreement(logits: Tensor, reference: Tensor, targets: Tensor) -> list[Tensor]:
    size = max(1, _SLICE_NUMBERS // logits.shape[-1])
    slices = zip(*(x.flatten(0, 1).split(size) for x in (logits, reference, targets)), strict=True)
    parts = [_agreement_of_rows(*(x.to(logits.device) for x in one)) for one in slices]
    return [torch.cat(part).view(targets.shape).cpu() for part in zip(*parts, strict=True)]


def _agreement_of_rows(logits: Tensor, full: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized = log_probabilities(logits)
    nll, nll_full = (-x.gather(1, targets[:, None]).squeeze(1) for x in (quantized, full))
    same_top = quantized.argmax(-1) == full.argmax(-1)
    kl = full.exp().mul_(torch.sub(full, quantized, out=quantized)).sum(-1)
    return kl, nll, nll_full, same_top
