"""Fidelity of a quantized cache to full precision: KL, perplexity, top-1, retrieval, and its true bits.

Protocol: ``prefix`` tokens exact, then ``decode`` tokens teacher-forced over the quantized cache with a window of
``recent`` exact tokens. Statistics come from one prefix only, another one for each seed, and serve all chunks: as
they would in use. A seed also sets the projections and the retrieval task, whose prompt is prefilled afresh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.errors import QJLError
from qjl.evals.decoding import Agreement, compare, full_logits
from qjl.evals.retrieval import FILLER_AFTER, FILLER_BEFORE, RetrievalTask, make_task, retrieved
from qjl.hf import KVCache
from qjl.presets import CacheConfig, resolve
from qjl.statistics import MIN_TOKENS


@dataclass(frozen=True)
class Protocol:
    """How fidelity is measured; all in tokens but ``chunks`` (stretches of text) and ``seeds``."""

    prefix: int = 512
    decode: int = 512
    chunks: int = 4
    seeds: int = 3
    recent: int | None = 32

    def __post_init__(self) -> None:
        if min(self.decode, self.chunks, self.seeds) < 1 or self.prefix < MIN_TOKENS:
            raise QJLError(f"fidelity needs prefix >= {MIN_TOKENS} and decode, chunks and seeds of at least 1.")

    @property
    def tokens(self) -> int:
        """Decoded positions per preset, for a progress bar."""
        return self.seeds * self.decode

    def configure(self, preset: str | Path | CacheConfig) -> CacheConfig:
        """The preset with this protocol's window."""
        config = resolve(preset)
        return config if self.recent is None else dataclasses.replace(config, recent=self.recent)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    protocol: Protocol = Protocol(),
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per preset, as soon as it is measured.

    ``kl`` in nats per token with its standard error over chunks and seeds, ``ppl`` over the decoded tokens,
    ``dppl_percent`` against full precision, ``top1`` agreement, ``retrieval`` and ``retrieval_full`` shares of 30
    codes, bits per number without and with the exact window and the codecs.

    Raises:
        QJLError: if the text is too short, or the chunk does not fit the model's context.
    """
    configs = [protocol.configure(preset) for preset in presets]
    chunks = _chunks(model, tokenizer, text, protocol)
    tasks = [make_task(tokenizer, chunks[0, :-1], seed) for seed in range(protocol.seeds)]
    full = CacheConfig(*resolve("full").for_layer(0), sinks=0, name="full")
    told_full = [retrieved(model, KVCache(model, full, share=False), task) for task in tasks]
    reference = full_logits(model, chunks, protocol.prefix)
    for config in configs:
        runs = []
        for seed, task in enumerate(tasks):
            cache = _cache_with_statistics(model, config, seed, chunks[seed % len(chunks), : protocol.prefix])
            agreement = compare(model, cache, chunks, protocol.prefix, reference, on_tokens)
            runs.append((agreement, cache, _retrieval(model, cache, task)))
        yield _summary(config, protocol, runs) | {"retrieval_full": _mean(told_full)}


def _cache_with_statistics(model: PreTrainedModel, config: CacheConfig, seed: int, prompt: Tensor) -> KVCache:
    """An empty cache whose codecs were fitted to one prompt, and to nothing else."""
    cache = KVCache(model, config.with_seed(seed), share=False)
    with torch.inference_mode():
        model(input_ids=prompt[None].to(model.device), past_key_values=cache, logits_to_keep=1)
    cache.settle()
    cache.reset()
    return cache


def _retrieval(model: PreTrainedModel, cache: KVCache, task: RetrievalTask) -> tuple[float, float]:
    """Retrieved share, and bits per number with the window: read before the cache is used again."""
    bits = cache.bits_with_window
    cache.reset()
    return retrieved(model, cache, task), bits


def _summary(
    config: CacheConfig, protocol: Protocol, runs: list[tuple[Agreement, KVCache, tuple[float, float]]]
) -> dict[str, Any]:
    agreements = [agreement for agreement, _, _ in runs]
    kl = torch.stack([agreement.kl for agreement in agreements])  # [seeds, chunks, decode]
    ppl, ppl_full = (
        math.exp(float(torch.stack([getattr(agreement, name) for agreement in agreements]).mean()))
        for name in ("nll", "nll_full")
    )
    bits_keys, bits_values = runs[0][1].bits
    return {
        "preset": config.name,
        "kl": float(kl.mean()),
        "kl_se": _standard_error(kl.mean(-1).flatten()),
        "ppl": ppl,
        "ppl_full": ppl_full,
        "dppl_percent": 100 * (ppl / ppl_full - 1),
        "top1": float(torch.stack([agreement.same_top.float() for agreement in agreements]).mean()),
        "retrieval": _mean([share for _, _, (share, _) in runs]),
        "bits_keys": bits_keys,
        "bits_values": bits_values,
        "bits": (bits_keys + bits_values) / 2,
        "bits_with_window": _mean([bits for _, _, (_, bits) in runs]),
        "seeds": protocol.seeds,
        "chunks": protocol.chunks,
        "prefix": protocol.prefix,
        "decode": protocol.decode,
        "recent": config.recent,
        "sinks": config.sinks,
    }


def _chunks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, protocol: Protocol) -> Tensor:
    """Stretches of text spread evenly over it: ``int64 [chunks, prefix + decode + 1]``."""
    length = protocol.prefix + protocol.decode + 1
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and length - 1 > context:
        raise QJLError(
            f"{length - 1} tokens are longer than the model's context of {context}: shorten prefix or decode."
        )
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    needed = max(length + protocol.chunks - 1, FILLER_BEFORE + FILLER_AFTER + 1)
    if len(tokens) < needed:
        raise QJLError(
            f"the text has {len(tokens)} tokens and {needed} are needed: give a longer one or shorten the run."
        )
    starts = torch.linspace(0, len(tokens) - length, protocol.chunks).long()
    return torch.stack([tokens[start : start + length] for start in starts])


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _standard_error(samples: Tensor) -> float | None:
    """None for a single sample, which says nothing of its error."""
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else None
