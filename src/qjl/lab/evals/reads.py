"""How much of what a model attended to was read as codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qjl.hf import KVCache


@dataclass
class Reads:
    """What counted positions attended to: tokens in all, and those of them that were codes."""

    codes: int = 0
    tokens: int = 0

    @property
    def share(self) -> float:
        """Of codes, 0 to 1."""
        return self.codes / max(self.tokens, 1)

    def add(self, codes: int, tokens: int) -> None:
        self.codes += codes
        self.tokens += tokens

    def add_step(self, cache: KVCache) -> None:
        """The step of one token per row that comes next."""
        core = cache.cores[0]
        self.add(sum(core.packed_tokens), core.batch * (core.length + 1) - sum(core.padding))


class Watch:
    """Counts what each step of ``generate`` attended to, called as a processor of its logits."""

    def __init__(self, cache: KVCache, reads: Reads) -> None:
        self.cache, self.reads = cache, reads
        self.packed = sum(cache.cores[0].packed_tokens)  # before the step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        core = self.cache.cores[0]
        self.reads.add(self.packed, core.batch * core.length - sum(core.padding))
        self.packed = sum(core.packed_tokens)
        return scores
