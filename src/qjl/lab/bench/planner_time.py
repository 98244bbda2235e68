"""How long the vLLM plugin takes to plan a step: all that happens on the host before layers are called."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from qjl.packed import BLOCK
from qjl.vllm.block_planner import PoolShape
from qjl.vllm.steps import Steps

SINKS, RECENT, MOST_QUERIES = 4, 32, 7  # of b3, where four query heads share keys and values


def plan_us(rows: int = 256, tokens: int = 32768, repeats: int = 128) -> float:
    """Microseconds of a decode step, the median of ``repeats`` that follow each other.

    Each of the rows has about ``tokens`` before the first step; they do not fill their pages at once.
    """
    device = torch.device("cpu")
    steps = Steps(PoolShape.of(BLOCK, SINKS, RECENT, rows, MOST_QUERIES), RECENT, MOST_QUERIES, device)
    context = tokens - np.arange(rows) % BLOCK
    columns = -(-(tokens + repeats) // BLOCK)
    table = torch.arange(rows * columns, dtype=torch.int32, device=device).view(rows, columns)
    steps.next(context, np.concatenate([[0], context.cumsum()]), table)
    starts, seconds = np.arange(rows + 1), []
    for step in range(1, repeats + 1):
        begin = time.perf_counter()
        steps.next(context + step, starts, table)
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)
