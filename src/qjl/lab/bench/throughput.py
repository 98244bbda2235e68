"""How many sequences decode together in so much memory, and how many tokens per second that gives.

All sequences hold the same tokens. Batches double until the weights, the caches and what a step needs beside them no
longer fit; then the largest that does is searched for, to one part in ``PRECISION``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.lab.bench.caches import DYNAMIC, Rig, nbytes, refill
from qjl.lab.bench.peak import Peak
from qjl.lab.bench.timing import use_threads
from qjl.lab.results import Row
from qjl.teacher_forcing import prefill

PRECISION = 20
States = list[tuple[Tensor, Tensor]]


def find_throughput(
    rig: Rig, context: int, memory: int, steps: int, on_batch: Callable[[str], None] = lambda what: None
) -> Iterator[Row]:
    """A row per cache and batch, the largest batch of a cache last and marked; transformers' own cache first.

    Raises:
        QJLError: if not even the weights fit, or the system does not tell how much memory is held.
    """
    if rig.weights_bytes >= memory:
        raise QJLError(f"the weights alone take {rig.weights_bytes} bytes of {memory}: give more memory.")
    own = None
    with use_threads(rig.threads):
        exact = _states(rig, context)
        for name in sorted(rig.makers, key=lambda name: name != DYNAMIC):
            rows = _batches(rig, name, exact, context, memory, steps, on_batch)
            if name == DYNAMIC and rows:
                own = rows[-1]["tokens_per_second"]
            for row in rows:
                is_largest = row is rows[-1]
                gain = row["tokens_per_second"] / own if own and is_largest else None
                facts = {"is_largest": is_largest, f"ratio_{DYNAMIC}": gain, "memory": memory, "steps": steps}
                yield row | facts | rig.conditions(name)


def _states(rig: Rig, context: int) -> States:
    """Keys and values of each layer."""
    layers = prefill(rig.model, rig.ids(context)).layers
    return [(layer.keys, layer.values) for layer in layers]  # type: ignore[misc, union-attr]


def _batches(
    rig: Rig, name: str, exact: States, context: int, memory: int, steps: int, on_batch: Callable[[str], None]
) -> list[Row]:
    """Those that fit, by size."""
    rows: dict[int, Row] = {}

    def fits(batch: int) -> bool:
        on_batch(f"{name}, {context} tokens: {batch} sequences")
        row = _run(rig, name, exact, context, batch, steps)
        if row is None or rig.weights_bytes + row["peak_bytes"] > memory:
            return False
        rows[batch] = row
        return True

    search(fits)
    return [rows[batch] for batch in sorted(rows)]


def search(fits: Callable[[int], bool]) -> None:
    """Ask for 1, 2, 4 and so on, and then between the last that fits and the first that does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, high // PRECISION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)


@torch.no_grad()
def _run(rig: Rig, name: str, exact: States, context: int, batch: int, steps: int) -> Row | None:
    """None where it does not fit into the device at all."""
    peak, cache = Peak(rig.device), rig.makers[name]()
    token = rig.ids(1).expand(batch, -1)
    try:
        refill(cache, exact, context, batch, rig.model.dtype)
        rig.model(input_ids=token, **cache_argument(cache))
        peak.restart()
        ms = rig.timed(lambda: [rig.model(input_ids=token, **cache_argument(cache)) for _ in range(steps)]) / steps
    except torch.OutOfMemoryError:
        return None
    if peak.nbytes is None:
        raise QJLError("this system does not tell how much memory a process takes: measure on Linux or on a GPU.")
    return (
        rig.head("throughput", name, context)
        | {"batch": batch, "ms": ms, "tokens_per_second": 1e3 * batch / ms}
        | {"cache_bytes": nbytes(cache), "peak_bytes": peak.nbytes}
    )
