"""How the next token of one sequence is chosen, whatever sequences are beside it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """A ``temperature`` of 0 takes the likeliest token; ``seed`` None is another one each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


class Chooser:
    """Draws one token after another, with random numbers of its own."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        seed = secrets.randbits(63) if choice.seed is None else choice.seed
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token by its ``logits float32 [vocabulary]``."""
        if not self.choice.temperature:
            return int(logits.argmax())
        heights = (logits - logits.max()).double()  # so that no temperature is too low to divide by
        shares = (heights / self.choice.temperature).softmax(-1).cpu()
        tokens = None
        if self.choice.top_p < 1:
            shares, tokens = shares.sort(descending=True)
            shares = shares[shares.cumsum(-1) - shares < self.choice.top_p]
        sums = shares.cumsum(-1)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * sums[-1]
        drawn = min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
        return drawn if tokens is None else int(tokens[drawn])
