"""Make the points of ``src/qjl/trellis.json`` again: some starts, the best of them refined. About ten minutes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qjl.trellis import POINTS, WIDTHS, train

STARTS, LENGTH = 8, 32
SPREADS = {1: (1.0, 0.25), 2: (0.9, 0.5), 4: (0.7, 0.4)}  # of the first own and next points
FILE = Path(__file__).parent.parent / "src" / "qjl" / "trellis.json"


def trained(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best points of several random starts."""
    runs = [_steps(*_start(width, seed), samples=600, steps=60, seed=seed) for seed in range(STARTS)]
    own, following, _ = min(runs, key=lambda run: run[2])
    own, following, distortion = _steps(own, following, samples=6000, steps=40, seed=STARTS)
    print(f"{width} coordinates to a nibble: {distortion:.4f}")
    return own, following


def _start(width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    own, following = (spread * torch.randn(POINTS, width, generator=generator) for spread in SPREADS[width])
    return own, following


def _steps(
    own: torch.Tensor, following: torch.Tensor, samples: int, steps: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(1000 + seed)
    distortion = float("inf")
    for _ in range(steps):
        drawn = torch.randn(samples, LENGTH, own.shape[1], generator=generator)
        own, following, distortion = train(own, following, drawn)
    return own, following, distortion


def _rounded(points: torch.Tensor) -> list[list[float]]:
    """Multiples of 1/32, so that kernels sum them as 8-bit integers; it costs .1 % of distortion at most."""
    return [[round(32 * x) / 32 for x in point] for point in points.tolist()]


if __name__ == "__main__":
    stored = {}
    for width in WIDTHS:
        own, following = trained(width)
        stored[width] = {"own": _rounded(own), "next": _rounded(following)}
    FILE.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
