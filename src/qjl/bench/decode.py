"""One token's attention over a packed layer, as ``model.generate`` calls it, beside attention in full precision.

Timed is all of ``qjl.attention.attend``: query tables, packed tokens, the exact ones at both ends, the keys' mean,
and merging. The subject is a layer of synthetic tokens (``qjl.bench.synthetic``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qjl.attention import Scoring, attend
from qjl.bench import baselines
from qjl.bench.baselines import Reader, flash_decode, grouped_attention, multiply
from qjl.bench.protocol import (
    BF16,
    FP16,
    FP32,
    OURS,
    READ,
    REFERENCE,
    Settings,
    compared,
    conditions,
    head,
    of_the_limit,
    relative_error,
    require_accurate,
    using_backend,
)
from qjl.bench.synthetic import Shape, Subject, fill
from qjl.bench.timing import Timings, Work, copies_for, interleave, use_threads
from qjl.cache import CacheLayer
from qjl.presets import CacheConfig
from qjl.records import Row

BASELINES = {FP16: torch.float16, BF16: torch.bfloat16, FP32: torch.float32}  # the first keep their place in memory
PEAK, PEAK_SIZE = "matmul", 768
SWEEP = tuple(2**power for power in range(10, 20))


def measure(config: CacheConfig, tokens: int, settings: Settings, on_round: Callable[[], None] = lambda: None) -> Row:
    """Time one step over ``tokens`` tokens.

    Raises:
        Inaccurate: if the backend in use and the reference do not agree on it.
        QJLError: if no token would be packed, or the preset does not take this head_dim.
    """
    baselines.require_compiled()
    subject = fill(config, tokens, settings.shape, settings.dtype)
    scoring = Scoring(settings.shape.scaling)
    error = max_error(subject, scoring, settings.threads)
    require_accurate(error, f"{config.name} at {tokens} tokens")
    layers = subject.copies(copies_for(subject.layer.nbytes))
    reader = Reader()
    works: dict[str, Sequence[Work]] = {
        OURS: [partial(attend, subject.query, layer, scoring) for layer in layers],
        READ: [reader],
        PEAK: [multiply(PEAK_SIZE)],
    }
    works |= {name: works_of(name, tokens, settings) for name in affordable(tokens, settings)}
    timings = interleave(works, settings.repeats, settings.threads, on_round)
    return (
        head("decode", config.name, tokens, settings)
        | compared(timings, (BF16, FP32, FP16))
        | of_the_limit(subject.layer.nbytes, timings.ms(OURS), timings, reader)
        | {"max_error": error}
        | operations(tokens, settings.shape, timings)
        | _layer_facts(subject.layer)
        | conditions(settings)
    )


def max_error(subject: Subject, scoring: Scoring, threads: int) -> float:
    """Of the backend in use against the reference on the same bytes, before the output is rounded to their dtype."""
    query = subject.query.float()
    with use_threads(threads), torch.inference_mode():
        out = attend(query, subject.layer, scoring)
        with using_backend(REFERENCE):
            expected = attend(query, subject.layer, scoring)
    return relative_error(out, expected)


def affordable(tokens: int, settings: Settings) -> list[str]:
    """The baselines that fit into memory together."""
    names, room = [], settings.memory
    for name, dtype in BASELINES.items():
        nbytes = baseline_bytes(tokens, settings.shape, dtype)
        room -= nbytes * copies_for(nbytes)
        if room >= 0:
            names.append(name)
    return names


def baseline_bytes(tokens: int, shape: Shape, dtype: torch.dtype) -> int:
    """Of keys and values in full."""
    return 2 * shape.kv_heads * tokens * shape.head_dim * dtype.itemsize


def works_of(name: str, tokens: int, settings: Settings) -> list[Work]:
    """A baseline on as many copies of keys and values as it takes to find none of them in a cache."""
    shape, dtype = settings.shape, BASELINES[name]
    query = torch.randn(shape.kv_heads, shape.group, shape.head_dim).to(dtype)
    run = flash_decode if name == FP16 else grouped_attention
    count = copies_for(baseline_bytes(tokens, shape, dtype))
    pairs = [_keys_and_values(tokens, shape, dtype) for _ in range(count)]
    return [partial(run, query, keys, values, shape.scaling) for keys, values in pairs]


def _keys_and_values(tokens: int, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    keys, values = (torch.empty(shape.kv_heads, tokens, shape.head_dim, dtype=dtype).normal_() for _ in range(2))
    return keys, values


def operations(tokens: int, shape: Shape, timings: Timings) -> Row:
    """Multiplications and additions of attention in full precision, and the most a second of this machine, in float32.

    Codes need fewer: on a roofline they may lie above it.
    """
    peak = 2 * PEAK_SIZE**3 / timings.least_ms(PEAK) / 1e6
    return {"operations": 4 * shape.kv_heads * shape.group * tokens * shape.head_dim, "peak_gflops": peak}


def _layer_facts(layer: CacheLayer) -> Row:
    return {"packed_bytes": layer.nbytes - layer.exact_nbytes, "exact_tokens": layer.length - layer.packed_tokens[0]}
