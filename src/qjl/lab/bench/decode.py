"""One token's attention over a packed layer, as ``model.generate`` calls it, beside attention in full precision.

Timed is all of ``PagedCache.attend``: storing the fresh token, query tables, packed tokens, the exact ones at both
ends, the keys' mean, and merging; and beside it the calls into the compiled library alone. The subject is a layer of
synthetic tokens (``qjl.lab.bench.synthetic``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from qjl.attention import Scoring
from qjl.lab.bench.baselines import BASELINES, Baseline
from qjl.lab.bench.devices import Place, copies_for
from qjl.lab.bench.flashinfer import FLASHINFER, FlashInfer
from qjl.lab.bench.gate import (
    LIMIT,
    OURS,
    REFERENCE,
    BenchSettings,
    RowErrors,
    compared,
    conditions,
    head,
    of_the_limit,
    require_right,
    using_backend,
)
from qjl.lab.bench.paged_steps import PagedStep, require_page
from qjl.lab.bench.peers import PEERS, Peer, packages, require_alike
from qjl.lab.bench.synthetic import FilledLayer, Shape, fill
from qjl.lab.bench.timing import Timings, Work, add_kernels, clock_of, interleave, use_threads
from qjl.lab.results import Row
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

PEAK, EAGER, KERNEL = "matmul", "eager", "kernel"
OTHERS: dict[str, Baseline | Peer | FlashInfer] = {**BASELINES, FLASHINFER: FlashInfer(), **PEERS}
Subject = FilledLayer | PagedStep
SWEEP = tuple(2**power for power in range(10, 20))


def time_decoding(
    config: CacheConfig, tokens: int, settings: BenchSettings, on_round: Callable[[], None] = lambda: None
) -> Row:
    """Time one step over ``tokens`` tokens.

    Raises:
        Inaccurate: if the backend in use and the reference do not agree on it.
        QJLError: if no token would be packed, the preset does not take this head_dim, or the pages cannot be made.
    """
    require_page(settings.page)
    place, names = settings.place, settings.against or settings.place.baselines
    if any(name in PEERS for name in names):
        require_alike(settings)
    limit = place.limit()
    scoring = Scoring(settings.shape.scaling)
    subject = _subject(config, tokens, settings, scoring)
    errors = row_errors(subject, scoring, settings.threads)
    require_right(errors, f"{config.name} at {tokens} tokens", settings, subject.pool)
    count = copies_for(subject.nbytes, place)
    has_kernels = settings.backend == "cpu"
    steps = _steps(subject, (1 + has_kernels) * count, scoring)
    eager, for_kernels = steps[:count], steps[count:]
    peak, operations = place.peak()
    ours = [place.ready(work) for work in eager]
    works: dict[str, Sequence[Work]] = {OURS: ours, LIMIT: [limit], PEAK: [peak]}
    if ours != eager:
        works[EAGER] = eager
    kernels: list[float] = []
    if has_kernels:
        works[KERNEL] = [partial(add_kernels, kernels, clock_of(settings.threads), step) for step in for_kernels]
    works |= {name: works_of(name, tokens, settings) for name in affordable(names, tokens, settings)}
    timings = interleave(works, settings.repeats, settings.threads, on_round, place.stopwatch)
    return (
        head("decode", config.name, tokens, settings)
        | compared(timings, names)
        | {"kernel_ms": median(kernels[1:]) if kernels else None}
        | {"eager_ms": timings.ms(EAGER) if EAGER in works else None}
        | of_the_limit(subject.nbytes, timings.ms(OURS), timings, limit)
        | errors.columns
        | _operations(sum(settings.lengths(tokens)), settings.shape, operations, timings)
        | {"packed_bytes": subject.packed_bytes, "exact_tokens": subject.exact_tokens}
        | {"page": settings.page, "lengths": settings.lengths(tokens) if settings.is_ragged else None}
        | conditions(settings, packages(name for name in names if name in works))
    )


def _subject(config: CacheConfig, tokens: int, settings: BenchSettings, scoring: Scoring) -> Subject:
    """A cache's layer, or, where pages or lengths are asked for, a step over pools."""
    layer = fill(config, tokens, settings.shape, settings.dtype, settings.device)
    if settings.page is None and not settings.is_ragged:
        return layer
    return PagedStep.of(layer, settings.page or BLOCK, settings.lengths(tokens), scoring)


def _steps(subject: Subject, count: int, scoring: Scoring) -> list[Work]:
    """The same on so many layers with bytes of their own, each of which has made what it makes once."""
    steps: list[Work] = [partial(one.attend, scoring) for one in subject.copies(count)]
    for step in steps:
        step()
    return steps


def row_errors(subject: Subject, scoring: Scoring, threads: int) -> RowErrors:
    """Of the backend in use against the reference on the same bytes, before the output is rounded to their dtype."""
    in_full = replace(subject, query=subject.query.float())
    with use_threads(threads), torch.no_grad():
        out = in_full.attend(scoring)
        with using_backend(REFERENCE):
            expected = in_full.attend(scoring)
    return RowErrors.of(out, expected)


def affordable(names: Sequence[str], tokens: int, settings: BenchSettings) -> list[str]:
    """Those of the others that run on the device and fit into memory together."""
    found, room = [], settings.memory
    for name in names:
        nbytes = bytes_of(name, tokens, settings.shape)
        room -= nbytes * copies_for(nbytes, settings.place)
        if room >= 0 and OTHERS[name].runs_on(settings.device):
            found.append(name)
    return found


def bytes_of(name: str, tokens: int, shape: Shape) -> int:
    """Of keys and values, as this one holds them."""
    return 2 * shape.batch * shape.kv_heads * tokens * shape.head_dim * OTHERS[name].bits // 8


def works_of(name: str, tokens: int, settings: BenchSettings) -> Sequence[Work]:
    """One of the others on as many copies of keys and values as it takes to find none of them in a cache."""
    count = copies_for(bytes_of(name, tokens, settings.shape), settings.place)
    other = OTHERS[name]
    if isinstance(other, Peer):
        return other.steps(name, tokens, settings, count)
    if isinstance(other, FlashInfer):
        return [settings.place.ready(step) for step in other.steps(tokens, settings, count)]
    shape, place = settings.shape, settings.place
    query = _normal(shape.group, shape, other.dtype, place)
    states = (_normal(tokens, shape, other.dtype, place) for _ in range(2 * count))
    pairs = zip(states, states, strict=True)
    return [place.ready(partial(other.attend, query, keys, values, shape.scaling)) for keys, values in pairs]


def _normal(length: int, shape: Shape, dtype: torch.dtype, place: Place) -> torch.Tensor:
    size = (shape.batch, shape.kv_heads, length, shape.head_dim)
    return torch.empty(size, dtype=dtype, device=place.device).normal_()


def _operations(tokens: int, shape: Shape, of_peak: int, timings: Timings) -> Row:
    """Multiplications and additions of attention in full precision over all sequences' ``tokens``, and the machine's
    most a second.

    Codes need fewer: on a roofline they may lie above it.
    """
    count = 4 * shape.kv_heads * shape.group * tokens * shape.head_dim
    return {"operations": count, "peak_gflops": of_peak / timings.least_ms(PEAK) / 1e6}
