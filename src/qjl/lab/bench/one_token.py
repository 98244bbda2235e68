"""What other engines are asked for: attention of one token over a cache of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.lab.bench.baselines import grouped_attention
from qjl.lab.bench.synthetic import Shape


@dataclass(frozen=True, eq=False)
class OneToken:
    """The last of T tokens, in float32: ``query [H, group, D]``, and ``keys, values [H, T, D]`` up to its own."""

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float

    @classmethod
    def random(cls, tokens: int, shape: Shape) -> OneToken:
        heads, dim = shape.kv_heads, shape.head_dim
        keys, values = torch.randn(2, heads, tokens, dim)
        return cls(torch.randn(heads, shape.group, dim), keys, values, shape.scaling)

    @property
    def heads(self) -> int:
        return self.keys.shape[0]

    @property
    def group(self) -> int:
        return self.query.shape[1]

    @property
    def count(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2]

    def attention(self) -> Tensor:
        """Exact: ``[H, group, D]``."""
        return grouped_attention(self.query[None], self.keys[None], self.values[None], self.scaling)[0]


@dataclass(eq=False)
class EngineStep:
    """Stores the token, and attends to all: ``out [H, group, D]`` holds what it gave last. ``kept`` outlives it."""

    run: Callable[[], object]
    out: Tensor
    kept: object

    def __call__(self) -> None:
        self.run()
