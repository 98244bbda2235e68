"""The CPU's scan of packed keys alone: ``<q, k>`` of a group of queries and all keys, tables included.

Beside it stand scans of other kinds with as many bits per key. FAISS also keeps the best ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from qjl import ops
from qjl.codecs import Pair
from qjl.lab.bench import baselines, faiss_scans
from qjl.lab.bench.baselines import SignRows, popcount_scan
from qjl.lab.bench.devices import copies_for
from qjl.lab.bench.encode import NOT_COMPARED
from qjl.lab.bench.gate import (
    LIMIT,
    OURS,
    REFERENCE,
    BenchSettings,
    compared,
    conditions,
    head,
    of_the_limit,
    relative_error,
    require_accurate,
    using_backend,
)
from qjl.lab.bench.synthetic import FilledLayer, fill
from qjl.lab.bench.timing import Work, interleave, use_threads
from qjl.lab.results import Row
from qjl.methods.base import Quantizer
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.ops.cpu import decoding
from qjl.ops.forms import PackedTokens
from qjl.packed import BLOCK, Blocks
from qjl.presets import CacheConfig

MOST_SCORE_ERROR = 1e-3  # integer tables err a little in every score, and a softmax over many of them averages that out
POPCOUNT = "popcount"
SCANS = (POPCOUNT, faiss_scans.PQ, faiss_scans.RABITQ)


def scanned(m: Sequence[int], bits: Sequence[int], head_dim: int) -> dict[str, Quantizer]:
    """Sketches of m signs, and codes of so many bits per coordinate.

    Raises:
        QJLError: for a code that this head_dim does not take.
    """
    codes: dict[str, Quantizer] = {f"signs-{signs}": QJL(signs / head_dim) for signs in m}
    codes |= {f"levels-{count}": TurboQuant(count) for count in bits}
    for code in codes.values():
        code.layout(head_dim)
    return codes


def scan(
    name: str, quantizer: Quantizer, tokens: int, settings: BenchSettings, on_round: Callable[[], None] = lambda: None
) -> Row:
    """Time the scores of all packed keys.

    Raises:
        Inaccurate: if the backend in use and the reference do not agree on them.
        QJLError: if no token would be packed.
    """
    baselines.require_compiled()
    shape, place = settings.shape, settings.place
    subject = fill(CacheConfig(quantizer, TurboQuant(2), 0, 0, name=name), tokens, shape, settings.dtype)
    segment = PackedKeys.of(subject)
    rows = subject.query.float().reshape(1, shape.kv_heads, shape.group, shape.head_dim)
    error = _score_error(rows, segment, settings.threads)
    require_accurate(error, f"{name} at {tokens} tokens", settings.backend, MOST_SCORE_ERROR)
    nbytes, m = sum(field.nbytes for field in segment.keys.values()), 8 * segment.keys["codes"].shape[3]
    copies = [_copied(segment) for _ in range(copies_for(nbytes, place))]
    limit = place.limit()
    works: dict[str, Sequence[Work]] = {OURS: [partial(scores, rows, copy) for copy in copies], LIMIT: [limit]}
    works |= {name: others for name in SCANS if (others := _other_scans(name, m, segment.blocks * BLOCK, settings))}
    if faiss_scans.is_installed():
        faiss_scans.use_threads(settings.threads)
    timings = interleave(works, settings.repeats, settings.threads, on_round, place.stopwatch)
    return (
        head("scan", name, tokens, settings)
        | NOT_COMPARED
        | compared(timings, SCANS)
        | of_the_limit(nbytes, timings.ms(OURS), timings, limit)
        | {"max_error": error, "bits_per_key": m}
        | {"ns_per_vector": timings.ms(OURS) * 1e6 / (segment.blocks * BLOCK * shape.kv_heads)}
        | conditions(settings)
    )


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """Packed keys ``[1, H, blocks, *shape]`` of one row with their values, codecs and positions ``[1, blocks]``."""

    keys: Blocks
    values: Blocks
    codecs: Pair
    first: Tensor

    @classmethod
    def of(cls, subject: FilledLayer) -> PackedKeys:
        pages, index = subject.layer.pages, subject.cache.index
        assert pages is not None
        blocks = index.blocks[0]
        keys, values = (
            {name: field.transpose(0, 1)[None, :, :blocks].contiguous() for name, field in side.items()}
            for side in pages.fields
        )
        return cls(keys, values, pages.codecs, torch.arange(blocks)[None] * BLOCK)

    @property
    def blocks(self) -> int:
        return self.first.shape[1]

    @cached_property
    def operand(self) -> PackedTokens | None:
        key, value = self.codecs[0].form, self.codecs[1].form
        if key is None or value is None:
            return None
        return PackedTokens(self.keys, self.values, key, value, self.first)


def scores(rows: Tensor, segment: PackedKeys) -> Tensor:
    """``<q, k>`` of ``rows [1, H, group, D]`` and all packed keys, as the backend in use takes them."""
    if ops.active_backend() == REFERENCE or segment.operand is None:
        return rows @ segment.codecs[0].dequantize(segment.keys, segment.first).transpose(2, 3)
    return decoding.score(rows, segment.operand)


def _score_error(rows: Tensor, segment: PackedKeys, threads: int) -> float:
    with use_threads(threads), torch.no_grad():
        out = scores(rows, segment)
        with using_backend(REFERENCE):
            return relative_error(out, scores(rows, segment))


def _copied(segment: PackedKeys) -> PackedKeys:
    return replace(segment, keys={name: field.clone() for name, field in segment.keys.items()})


def _other_scans(name: str, m: int, tokens: int, settings: BenchSettings) -> list[Work]:
    shape = settings.shape
    copies = copies_for(shape.kv_heads * tokens * m // 8, settings.place)
    if name != POPCOUNT:
        return faiss_scans.works(name, m, tokens, shape, copies)
    if not SignRows.takes(m):
        return []
    query = torch.randn(shape.kv_heads, shape.group, m)
    return [partial(popcount_scan, query, SignRows.random(shape.kv_heads, tokens, m)) for _ in range(copies)]
