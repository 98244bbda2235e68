"""The CPU's scan of packed keys alone: ``<q, k>`` of a group of queries and all keys, tables included.

Beside it stand scans of other kinds with as many bits per key. FAISS also keeps the best ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qjl import ops
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
from qjl.methods.base import Codec, Quantizer
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.ops.cpu import attention
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

SCORES = 2  # budgets: tables of integers err a little in every score, and attention over many of them averages that
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
    packed = PackedKeys.of(subject)
    queries = subject.query.reshape(1, shape.kv_heads, shape.group, shape.head_dim)
    error = _score_error(queries, packed, settings.threads)
    require_accurate(error, f"{name} at {tokens} tokens", settings.backend, SCORES * packed.pool.key_form.error_budget)
    nbytes, m = packed.nbytes, 8 * packed.pool.keys["codes"].shape[2]
    copies = [packed.copy() for _ in range(copies_for(nbytes, place))]
    limit = place.limit()
    works: dict[str, Sequence[Work]] = {OURS: [partial(scores, queries, copy) for copy in copies], LIMIT: [limit]}
    works |= {name: others for name in SCANS if (others := _other_scans(name, m, packed.tokens, settings))}
    if faiss_scans.is_installed():
        faiss_scans.use_threads(settings.threads)
    timings = interleave(works, settings.repeats, settings.threads, on_round, place.stopwatch)
    return (
        head("scan", name, tokens, settings)
        | NOT_COMPARED
        | compared(timings, SCANS)
        | of_the_limit(nbytes, timings.ms(OURS), timings, limit)
        | {"max_error": error, "bits_per_key": m}
        | {"ns_per_vector": timings.ms(OURS) * 1e6 / (packed.tokens * shape.kv_heads)}
        | conditions(settings)
    )


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """Keys of one row, all of them packed, in pages of 64."""

    pool: Pool
    exact: ExactPool
    rows: Rows
    codec: Codec

    @classmethod
    def of(cls, subject: FilledLayer) -> PackedKeys:
        layer, pages = subject.layer, int(subject.cache.index.blocks[0])
        assert layer.pages is not None
        assert layer.pages.operand is not None
        assert layer.exact is not None
        lengths, skip, counts = (torch.tensor([number], dtype=torch.int32) for number in (pages * BLOCK, 0, 0))
        table, slots = torch.arange(pages, dtype=torch.int32)[None], torch.zeros(1, 0, dtype=torch.int32)
        rows = Rows(table, lengths, skip, torch.zeros(1, dtype=torch.int64), slots, counts, pages * BLOCK)
        return cls(layer.pages.operand, layer.exact.operand, rows, layer.pages.codecs[0])

    @property
    def tokens(self) -> int:
        return self.rows.longest

    @property
    def nbytes(self) -> int:
        return sum(field[: self.rows.table.shape[1]].nbytes for field in self.pool.keys.values())

    def copy(self) -> PackedKeys:
        """With bytes of its own."""
        return replace(self, pool=replace(self.pool, keys={name: x.clone() for name, x in self.pool.keys.items()}))

    def decoded(self) -> Tensor:
        """``float32 [1, H, T, D]``."""
        pages = self.rows.table[0].long()
        blocks = {name: field[pages].transpose(0, 1)[None] for name, field in self.pool.keys.items()}
        return self.codec.dequantize(blocks, pages[None] * BLOCK)


def scores(queries: Tensor, packed: PackedKeys) -> Tensor:
    """``<q, k>`` of ``queries [1, H, group, D]`` and all packed keys, as the backend in use takes them."""
    if ops.active_backend() == REFERENCE:
        return queries.float() @ packed.decoded().transpose(2, 3)
    return attention.score(queries, packed.pool, packed.exact, packed.rows)


def _score_error(queries: Tensor, packed: PackedKeys, threads: int) -> float:
    with use_threads(threads), torch.no_grad():
        out = scores(queries, packed)
        with using_backend(REFERENCE):
            return relative_error(out, scores(queries, packed))


def _other_scans(name: str, m: int, tokens: int, settings: BenchSettings) -> list[Work]:
    shape = settings.shape
    copies = copies_for(shape.kv_heads * tokens * m // 8, settings.place)
    if name != POPCOUNT:
        return faiss_scans.works(name, m, tokens, shape, copies)
    if not SignRows.takes(m):
        return []
    query = torch.randn(shape.kv_heads, shape.group, m)
    return [partial(popcount_scan, query, SignRows.random(shape.kv_heads, tokens, m)) for _ in range(copies)]
