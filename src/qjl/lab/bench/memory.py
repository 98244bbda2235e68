"""What a context costs a whole model with each cache: encoding the prompt, decoding after it, and memory.

Each round every cache reads the same prompt and decodes some tokens more, in an order that changes; a first round does
not count.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qjl.compat import cache_argument
from qjl.lab.bench.caches import DYNAMIC, Make, Rig, nbytes, ratio
from qjl.lab.bench.peak import Peak
from qjl.lab.bench.timing import Timings, use_threads
from qjl.lab.results import Row

CONTEXTS = tuple(2**power for power in range(10, 18))


@dataclass(frozen=True)
class _Run:
    """A prompt and the tokens after it: milliseconds, the latter per token, and bytes beside the weights."""

    prefill_ms: float
    step_ms: float
    prefill_peak: int | None
    step_peak: int | None
    cache: int


def weigh_caches(
    rig: Rig, context: int, steps: int, repeats: int, on_round: Callable[[], None] = lambda: None
) -> Iterator[Row]:
    """A row per cache."""
    ids, shuffled = rig.ids(context), random.Random(0)
    runs: dict[str, list[_Run]] = {name: [] for name in rig.makers}
    with use_threads(rig.threads):
        for _ in range(repeats + 1):
            for name in shuffled.sample(list(runs), len(runs)):
                runs[name].append(_run(rig, rig.makers[name], ids, steps))
            on_round()
    prefills = Timings({name: [run.prefill_ms for run in of[1:]] for name, of in runs.items()})
    decoding = Timings({name: [run.step_ms for run in of[1:]] for name, of in runs.items()})
    for name, of in runs.items():
        yield (
            rig.head("memory", name, context)
            | {"ms": decoding.ms(name), "prefill_ms": prefills.ms(name)}
            | ratio(DYNAMIC, decoding.ratio(DYNAMIC, name))
            | ratio(f"prefill_{DYNAMIC}", prefills.ratio(DYNAMIC, name))
            | {"cache_bytes": of[-1].cache, "peak_bytes": of[-1].step_peak, "prefill_peak_bytes": of[-1].prefill_peak}
            | {"smaller_than_dynamic": runs[DYNAMIC][-1].cache / of[-1].cache if DYNAMIC in runs else None}
            | {"steps": steps, "repeats": repeats}
            | rig.conditions(name)
        )


@torch.no_grad()
def _run(rig: Rig, make: Make, ids: Tensor, steps: int) -> _Run:
    model, peak, token = rig.model, Peak(rig.device), ids[:, :1]
    cache = make()
    peak.restart()
    prefill_ms = rig.timed(lambda: model(input_ids=ids, logits_to_keep=1, **cache_argument(cache)))
    prefill_peak = peak.nbytes
    peak.restart()
    step_ms = rig.timed(lambda: [model(input_ids=token, **cache_argument(cache)) for _ in range(steps)]) / steps
    return _Run(prefill_ms, step_ms, prefill_peak, peak.nbytes, nbytes(cache))
