"""Fidelity of a quantized cache to full precision: KL, perplexity, top-1, retrieval, and its true bits.

Protocol: ``prefix`` tokens exact, then ``decode`` tokens teacher-forced over the quantized cache with a window of
``recent`` exact tokens. Statistics come from one prefix only, another one for each seed, and serve all chunks: as
they would in use. A seed also sets the projections and the retrieval task. A preset in which no seed can make a
difference is measured once. Errors are those over chunks, of their means over seeds: seeds that read the same chunk are
no samples of other text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl import calibration
from qjl.architecture import context_length
from qjl.errors import QJLError
from qjl.hf import KVCache
from qjl.lab.evals.retrieval import FILLER_AFTER, FILLER_BEFORE, make_task, retrieved
from qjl.methods.identity import Identity
from qjl.presets import CacheConfig, resolve
from qjl.statistics import MIN_TOKENS, LayerStatistics
from qjl.teacher_forcing import (
    Agreement,
    calibrated_cache,
    compare,
    full_log_probabilities,
    prefill,
    refill,
)


@dataclass(frozen=True)
class FidelityProtocol:
    """How fidelity is measured: tokens, ``chunks`` of text, ``seeds``, and whether to ask for codes too.

    ``recent`` is the exact window of every preset, None its own.
    """

    prefix: int = 512
    decode: int = 512
    chunks: int = 4
    seeds: int = 3
    recent: int | None = 32
    retrieval: bool = True

    def __post_init__(self) -> None:
        if min(self.decode, self.chunks, self.seeds) < 1 or self.prefix < MIN_TOKENS:
            raise QJLError(f"fidelity needs prefix >= {MIN_TOKENS} and decode, chunks and seeds of at least 1.")

    @property
    def tokens(self) -> int:
        """Decoded positions per preset, for a progress bar."""
        return self.seeds * self.decode


def measure_fidelity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    protocol: FidelityProtocol = FidelityProtocol(),
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[dict[str, Any]]:
    """One JSON-ready object per preset, as soon as it is measured.

    ``kl`` in nats per token with its standard error over chunks, ``kl_of_chunks``, ``ppl`` over the decoded tokens,
    ``dppl_percent`` against full precision with its error, ``top1`` agreement, ``retrieval`` and ``retrieval_full``
    shares of 30 codes (None if not asked for), bits per number without and with the exact window and the codecs.

    Raises:
        QJLError: if the text is too short, or the chunk does not fit the model's context.
    """
    configs = [resolve(preset).with_window(protocol.recent) for preset in presets]
    trial = Evaluation(model, tokenizer, text, protocol)
    for config in configs:
        yield trial.row(config, on_tokens)


@dataclass(frozen=True, eq=False)
class _Run:
    """What one seed gave."""

    agreement: Agreement
    retrieval: list[float]
    bits: tuple[float, float]
    bits_with_window: float


class Evaluation:
    """A model on a text, in full precision: all that does not depend on the preset, worked out once."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, protocol: FidelityProtocol
    ) -> None:
        self.model, self.protocol = model, protocol
        self.chunks = _chunks(model, tokenizer, text, protocol)
        self.reference = full_log_probabilities(model, self.chunks, protocol.prefix)
        self.prefix = prefill(model, self.chunks[:, : protocol.prefix])
        seeds = range(protocol.seeds if protocol.retrieval else 0)
        self.tasks = [make_task(tokenizer, self.chunks[0, :-1], seed) for seed in seeds]
        self.task_prefixes = [prefill(model, task.input_ids[:, : task.prefix]) for task in self.tasks]
        full = KVCache(model, CacheConfig(Identity(), Identity()))
        self.retrieval_full = _mean([self._retrieved(full, seed) for seed in seeds])
        self._statistics: dict[int, dict[int, LayerStatistics]] = {}

    def row(self, config: CacheConfig, on_tokens: Callable[[int], None]) -> dict[str, Any]:
        """What ``measure`` gives for one preset, with the window that it has."""
        runs = self.runs(config, on_tokens)
        on_tokens((self.protocol.seeds - len(runs)) * self.protocol.decode)
        return _summary(config, self.protocol, runs) | {"retrieval_full": self.retrieval_full}

    def rows_by_seed(self, config: CacheConfig, on_tokens: Callable[[int], None]) -> list[dict[str, Any]]:
        """The same for each seed alone; a single row where no seed makes a difference."""
        runs = self.runs(config, on_tokens)
        on_tokens((self.protocol.seeds - len(runs)) * self.protocol.decode)
        return [_summary(config, self.protocol, [run]) | {"seed": seed} for seed, run in enumerate(runs)]

    def runs(self, config: CacheConfig, on_tokens: Callable[[int], None]) -> list[_Run]:
        """One per seed; a single one where neither a projection nor statistics of a prompt could make a difference."""
        seeds = range(self.protocol.seeds)
        if config.with_seed(0) == config.with_seed(1) and not KVCache(self.model, config).needs_statistics:
            return [self._run(config, 0, seeds, on_tokens)]
        return [self._run(config, seed, [seed], on_tokens) for seed in seeds]

    def _run(self, config: CacheConfig, seed: int, tasks: Iterable[int], on_tokens: Callable[[int], None]) -> _Run:
        cache = self._cache(config, seed)
        refill(cache, self.prefix)
        agreement = compare(self.model, cache, self.chunks, self.protocol.prefix, self.reference, on_tokens)
        bits_with_window = cache.bits_with_window
        retrieval = [self._retrieved(cache, task) for task in tasks if self.tasks]
        return _Run(agreement, retrieval, cache.bits, bits_with_window)

    def _cache(self, config: CacheConfig, seed: int) -> KVCache:
        """An empty cache whose codecs are fitted to one prompt, and to nothing else."""
        return calibrated_cache(self.model, config.with_seed(seed), functools.partial(self._statistics_of, seed))

    def _statistics_of(self, seed: int) -> dict[int, LayerStatistics]:
        """Of one prefix, measured once for all presets.

        They are those that a cache takes from its first prompt, but for the sinks, which never count: of the 4 that
        calibration leaves out, a preset with fewer would have counted some.
        """
        if seed not in self._statistics:
            prompt = self.chunks[seed % len(self.chunks), : self.protocol.prefix]
            self._statistics[seed] = calibration.model_statistics(self.model, prompt[None])
        return self._statistics[seed]

    def _retrieved(self, cache: KVCache, task: int) -> float:
        refill(cache, self.task_prefixes[task])
        return retrieved(self.model, cache, self.tasks[task])


def _summary(config: CacheConfig, protocol: FidelityProtocol, runs: list[_Run]) -> dict[str, Any]:
    agreements = [run.agreement for run in runs]
    kl = _of_chunks([agreement.kl for agreement in agreements])
    worse = _of_chunks([agreement.nll - agreement.nll_full for agreement in agreements])
    ppl, ppl_full = (
        math.exp(float(torch.stack([getattr(agreement, name) for agreement in agreements]).mean()))
        for name in ("nll", "nll_full")
    )
    bits_keys, bits_values = runs[0].bits
    return {
        "preset": config.name,
        "kl": float(kl.mean()),
        "kl_se": _standard_error(kl),
        "kl_of_chunks": kl.tolist(),
        "ppl": ppl,
        "ppl_full": ppl_full,
        "dppl_percent": 100 * (ppl / ppl_full - 1),
        "dppl_percent_se": _scaled(_standard_error(worse), 100 * ppl / ppl_full),
        "top1": float(torch.stack([agreement.same_top.float() for agreement in agreements]).mean()),
        "retrieval": _mean([share for run in runs for share in run.retrieval]),
        "bits_keys": bits_keys,
        "bits_values": bits_values,
        "bits": (bits_keys + bits_values) / 2,
        "bits_with_window": _mean([run.bits_with_window for run in runs]),
        "seeds": len(runs),
        "chunks": protocol.chunks,
        "prefix": protocol.prefix,
        "decode": protocol.decode,
        "recent": config.recent,
        "sinks": config.sinks,
        "method_keys": config.key.method,
        "method_values": config.value.method,
        "source": config.source,
        "source_values": config.value.source,
        "pre_rope": config.pre_rope,
    }


def _chunks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, protocol: FidelityProtocol
) -> Tensor:
    """Stretches of text spread evenly over it: ``int64 [chunks, prefix + decode + 1]``."""
    length = protocol.prefix + protocol.decode + 1
    context = context_length(model.config)
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


def _of_chunks(seeds: list[Tensor]) -> Tensor:
    """Means over seeds and tokens: ``seeds x [chunks, decode] -> [chunks]``."""
    return torch.stack(seeds).mean((0, 2))


def _scaled(error: float | None, factor: float) -> float | None:
    return None if error is None else factor * error


def _mean(numbers: list[float]) -> float | None:
    """None where nothing was measured."""
    return sum(numbers) / len(numbers) if numbers else None


def _standard_error(samples: Tensor) -> float | None:
    """None for a single sample, which says nothing of its error."""
    return float(samples.std() / math.sqrt(len(samples))) if len(samples) > 1 else None
