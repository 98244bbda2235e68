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
ROWS, TOKENS, STEPS = 256, 32768, 128


def plan_us() -> float:
    """Microseconds of a decode step, the median of ``STEPS`` that follow each other.

    Each of the rows has about ``TOKENS`` before the first step; they do not fill their pages at once.
    """
    device = torch.device("cpu")
    steps = Steps(PoolShape.of(BLOCK, SINKS, RECENT, ROWS, MOST_QUERIES), RECENT, MOST_QUERIES, ROWS, device)
    context = TOKENS - np.arange(ROWS) % BLOCK
    columns = -(-(TOKENS + STEPS) // BLOCK)
    table = torch.arange(ROWS * columns, dtype=torch.int32, device=device).view(ROWS, columns)
    steps.next(context, np.concatenate([[0], context.cumsum()]), table)
    starts, seconds = np.arange(ROWS + 1), []
    for step in range(1, STEPS + 1):
        begin = time.perf_counter()
        steps.next(context + step, starts, table)
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)
