"""Lloyd's iteration on the line: the levels of a scalar quantizer for any density, given as weighted samples."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 2000


def lloyd(samples: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Levels that are the means of their cells, from ascending ``levels [H, K]``; an empty cell keeps its own.

    ``samples [H, N]`` ascending and their ``weights [H, N]``, all float64.
    """
    mass, first = _prefix_sums(weights), _prefix_sums(weights * samples)
    ends = torch.tensor([0, samples.shape[1]], dtype=torch.int64).expand(len(samples), -1)
    for _ in range(ROUNDS):
        cuts = torch.searchsorted(samples, midpoints(levels))
        bounds = torch.cat([ends[:, :1], cuts, ends[:, 1:]], dim=1)
        cell_mass, cell_first = mass.gather(1, bounds).diff(dim=1), first.gather(1, bounds).diff(dim=1)
        updated = torch.where(cell_mass > 0, cell_first / cell_mass, levels)
        if torch.equal(updated, levels):
            break
        levels = updated
    return levels


def midpoints(levels: Tensor) -> Tensor:
    """Edges of the cells, ``[..., K] -> [..., K - 1]``, contiguous for ``searchsorted``."""
    return ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()


def _prefix_sums(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))
