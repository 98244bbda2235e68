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
        index = cache.index
        self.add(sum(index.packed_tokens), sum(index.lengths) + index.batch)


class Watch:
    """Counts what each step of ``generate`` attended to, called as a processor of its logits."""

    def __init__(self, cache: KVCache, reads: Reads) -> None:
        self.cache, self.reads = cache, reads
        self.packed = sum(cache.packed_tokens)  # before the step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.reads.add(self.packed, sum(self.cache.index.lengths))
        self.packed = sum(self.cache.packed_tokens)
        return scores
