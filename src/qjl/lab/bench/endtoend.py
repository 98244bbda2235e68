"""Decoding with a whole model: a token's time over a cache of so many tokens, beside other caches and engines.

All transformers caches are filled from one prefill in full precision; llama.cpp prefills for itself. What attention
takes is the time beyond that of the engine's own step over ``BASE`` tokens in full precision, timed in the same rounds,
shared out over the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qjl import corpora, models, ops
from qjl.architecture import layer_shapes, text_config
from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.hf import KVCache
from qjl.lab import machine
from qjl.lab.bench import caches, llama
from qjl.lab.bench.gate import (
    MOST_ERROR,
    REFERENCE,
    WORST_ROW,
    error_budget,
    relative_error,
    require_accurate,
    using_backend,
)
from qjl.lab.bench.timing import Timings, Work, interleave, use_threads, wall_ms
from qjl.lab.results import Row
from qjl.lab.reuploads import fetch_gguf, place
from qjl.presets import CacheConfig
from qjl.teacher_forcing import prefill

BASE = 16
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LLAMA = "llama.cpp"
PEERS = (*caches.PEERS, LLAMA)


class Contestant(Protocol):
    """Something that decodes token by token."""

    def fill(self, context: int) -> None:
        """Hold exactly the first ``context`` tokens."""

    def step(self) -> object:
        """Decode one token more."""


@dataclass(eq=False)
class Transformer:
    """A model of transformers with one kind of cache; ``exact`` are each layer's keys and values after a prefill."""

    model: PreTrainedModel
    make: Callable[[], Cache]
    exact: Sequence[tuple[Tensor, Tensor]]
    cache: Cache = field(init=False)

    @property
    def is_checked(self) -> bool:
        """Whether the reference can tell if its logits are right: those of bfloat16 are too coarse."""
        return isinstance(self.make(), KVCache) and self.model.dtype == torch.float32

    @property
    def error_budget(self) -> float:
        """Of the layer that may err most."""
        assert isinstance(self.cache, KVCache)
        return max((error_budget(layer) for layer in self.cache.cores), default=MOST_ERROR)

    @torch.no_grad()
    def fill(self, context: int) -> None:
        self.cache = self.make()
        caches.refill(self.cache, self.exact, context, batch=1, dtype=self.model.dtype)

    def step(self) -> Tensor:
        token = torch.ones(1, 1, dtype=torch.int64)
        return self.model(input_ids=token, **cache_argument(self.cache)).logits[0]  # type: ignore[index]


def installed(peers: Sequence[str] = PEERS) -> list[str]:
    """Those whose packages are here.

    Raises:
        QJLError: if one is none of the ``PEERS``.
    """
    for peer in peers:
        if peer not in PEERS:
            raise QJLError(f"{peer!r} is not compared with: choose from {', '.join(PEERS)}.")
    return [peer for peer in peers if (llama.is_installed() if peer == LLAMA else caches.is_installed(peer))]


class Race:
    """A model, and all that decode with it.

    Raises:
        QJLError: if a preset does not take this model, or llama.cpp is asked for and the model is no GGUF.
    """

    def __init__(
        self,
        name: str,
        presets: Sequence[CacheConfig],
        peers: Sequence[str],
        longest: int,
        threads: int,
        progress: bool = False,
    ) -> None:
        source = place(name, progress=progress)
        loaded = {label: models.load(source, dtype=dtype, progress=progress) for label, dtype in DTYPES.items()}
        network, tokenizer = loaded["fp32"]
        self.name, self.threads = name, threads
        self.shapes = layer_shapes(network.config)
        self.contestants: dict[str, Contestant] = {}
        self.bases: dict[str, Contestant] = {}  # one for all caches of a model
        self.base_of: dict[str, str] = {}
        ids = _ids(tokenizer, max(longest, caches.FITTED))
        with use_threads(threads):
            exact = _states(prefill(network, ids))
            for label, (model, _) in loaded.items():
                self._add_caches(label, model, presets, peers, exact, ids)
        if LLAMA in peers:
            self._add_llamas(fetch_gguf(name, progress=progress), ids[0].tolist())

    def _add_caches(
        self,
        label: str,
        model: PreTrainedModel,
        presets: Sequence[CacheConfig],
        peers: Sequence[str],
        exact: Sequence[tuple[Tensor, Tensor]],
        ids: Tensor,
    ) -> None:
        made = caches.makers(model, presets, peers)
        for preset in presets:
            caches.warm(model, made[preset.name], ids)
        base = f"{label}, {BASE} tokens"
        self.bases[base] = Transformer(model, partial(DynamicCache, config=text_config(model.config)), exact)
        for name, make in made.items():
            self._add(f"{name} {label}", Transformer(model, make, exact), base)

    def _add_llamas(self, path: Path, ids: list[int]) -> None:
        base = f"{LLAMA}, {BASE} tokens"
        self.bases[base] = llama.Llama(path, llama.CACHES[0], ids[:BASE], self.threads)
        for kind in llama.CACHES:
            self._add(f"{LLAMA} {kind}", llama.Llama(path, kind, ids, self.threads), base)

    def _add(self, name: str, one: Contestant, base: str) -> None:
        self.contestants[name], self.base_of[name] = one, base

    def measure(
        self, contexts: Sequence[int], repeats: int, on_round: Callable[[], None] = lambda: None
    ) -> Iterator[Row]:
        """A row per context and contestant.

        Raises:
            Inaccurate: if the backend in use and the reference do not agree on the logits.
        """
        for context in sorted(contexts):
            with use_threads(self.threads):
                errors = {name: self._logit_error(name, context) for name in self._checked()}
                for one in self.contestants.values():
                    one.fill(context)
                for base in self.bases.values():
                    base.fill(BASE)
            works: dict[str, Sequence[Work]] = {name: [one.step] for name, one in self.contestants.items()}
            works |= {name: [base.step] for name, base in self.bases.items()}
            timings = interleave(works, repeats, self.threads, on_round, wall_ms)
            for name in self.contestants:
                yield self._row(name, context, repeats, timings, errors.get(name))

    def _checked(self) -> list[str]:
        return [name for name, one in self.contestants.items() if isinstance(one, Transformer) and one.is_checked]

    def _logit_error(self, name: str, context: int) -> float:
        """Of the next token's logits, of the backend in use against the reference."""
        one = self.contestants[name]
        assert isinstance(one, Transformer)
        with torch.no_grad():
            one.fill(context)
            logits = one.step()
            one.fill(context)
            with using_backend(REFERENCE):
                error = relative_error(logits, one.step())
        most = WORST_ROW * one.error_budget  # layers add up to less: to a budget at most in SmolLM2
        require_accurate(error, f"{name} at {context} tokens", ops.active_backend(), most)
        return error

    def _row(self, name: str, context: int, repeats: int, timings: Timings, error: float | None) -> Row:
        ms, beyond = timings.ms(name), timings.difference(name, self.base_of[name])
        low, attention, high = (part / len(self.shapes) for part in (beyond.low, beyond.median, beyond.high))
        ratios = {label: timings.ratio(f"{caches.DYNAMIC} {label}", name) for label in DTYPES}
        return (
            {"case": "generate", "backend": ops.active_backend(), "preset": name, "tokens": context}
            | {"head_dim": self.shapes[0].head_dim, "ms": ms, "tokens_per_second": 1e3 / ms}
            | {f"ratio_{caches.DYNAMIC}_{label}": ratio and ratio.median for label, ratio in ratios.items()}
            | {f"spread_{caches.DYNAMIC}_{label}": ratio and [ratio.low, ratio.high] for label, ratio in ratios.items()}
            | {"attention_ms_per_layer": attention, "spread_attention_ms_per_layer": [low, high], "max_error": error}
            | {"model": self.name, "threads": self.threads, "repeats": repeats, "isa": machine.instruction_set()}
            | {"machine": machine.describe()}
            | {"versions": machine.versions((*machine.PACKAGES, *caches.EXTRA_PACKAGES))}
        )


def _states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]


def _ids(tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    """The first tokens of the essays."""
    ids = tokenizer(corpora.essays(), return_tensors="pt").input_ids
    if ids.shape[1] < count:
        raise QJLError(f"the essays have {ids.shape[1]} tokens, fewer than {count}: give a shorter context.")
    return ids[:, :count]
