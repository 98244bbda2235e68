"""Kernels alone: scores of packed keys, and encoding.

- ``scan``: ``<q, k>`` of a group of queries and all keys, tables included, beside scans of other kinds with as many
  bits per key. FAISS also keeps the best ten.
- ``encode``: keys or values to packed codes, beside the attention of the prefill that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl import ops
from qjl.bench import baselines, faiss_scans
from qjl.bench.baselines import Reader, SignRows, popcount_scan
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
from qjl.bench.synthetic import DISTINCT, Maker, fill
from qjl.bench.timing import Work, copies_for, interleave, use_threads
from qjl.cache import PackedSegment
from qjl.methods.base import Codec, Quantizer
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.ops.cpu import decoding
from qjl.packed import BLOCK
from qjl.presets import CacheConfig
from qjl.records import Row

MOST_SCORE_ERROR = 1e-3  # integer tables err a little in every score, and a softmax over many of them averages that out
POPCOUNT = "popcount"
SCANS = (POPCOUNT, faiss_scans.PQ, faiss_scans.RABITQ)
NOT_COMPARED: Row = {f"ratio_{name}": None for name in (BF16, FP32, FP16)}
ROLES = ("key", "value")
PREFILL_QUERIES = 64  # timed of a prefill
PREFILL = {BF16: torch.bfloat16, FP32: torch.float32}


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
    name: str, quantizer: Quantizer, tokens: int, settings: Settings, on_round: Callable[[], None] = lambda: None
) -> Row:
    """Time the scores of all packed keys.

    Raises:
        Inaccurate: if the backend in use and the reference do not agree on them.
        QJLError: if no token would be packed.
    """
    baselines.require_compiled()
    shape = settings.shape
    subject = fill(CacheConfig(quantizer, TurboQuant(2), 0, 0, name=name), tokens, shape, settings.dtype)
    _, segment = subject.layer.segments()
    assert segment is not None
    rows = subject.query.float().reshape(1, shape.kv_heads, shape.group, shape.head_dim)
    error = _score_error(rows, segment, settings.threads)
    require_accurate(error, f"{name} at {tokens} tokens", MOST_SCORE_ERROR)
    nbytes, m = sum(field.nbytes for field in segment.keys.values()), 8 * segment.keys["codes"].shape[3]
    copies = [_copied(segment) for _ in range(copies_for(nbytes))]
    reader = Reader()
    works: dict[str, Sequence[Work]] = {OURS: [partial(scores, rows, copy) for copy in copies], READ: [reader]}
    works |= {name: others for name in SCANS if (others := _other_scans(name, m, segment.blocks * BLOCK, settings))}
    if faiss_scans.is_installed():
        faiss_scans.use_threads(settings.threads)
    timings = interleave(works, settings.repeats, settings.threads, on_round)
    return (
        head("scan", name, tokens, settings)
        | NOT_COMPARED
        | compared(timings, SCANS)
        | of_the_limit(nbytes, timings.ms(OURS), timings, reader)
        | {"max_error": error, "bits_per_key": m}
        | _per_vector(timings.ms(OURS), segment.blocks * BLOCK * shape.kv_heads)
        | conditions(settings)
    )


def scores(rows: Tensor, segment: PackedSegment) -> Tensor:
    """``<q, k>`` of ``rows [1, H, group, D]`` and all packed keys, as the backend in use takes them."""
    if ops.active_backend() == REFERENCE or segment.as_operand is None:
        return segment.key_codec.score(rows, segment.keys, segment.first)
    return decoding.score(rows, segment.as_operand)


def _score_error(rows: Tensor, segment: PackedSegment, threads: int) -> float:
    with use_threads(threads), torch.inference_mode():
        out = scores(rows, segment)
        with using_backend(REFERENCE):
            return relative_error(out, scores(rows, segment))


def _copied(segment: PackedSegment) -> PackedSegment:
    return replace(segment, keys={name: field.clone() for name, field in segment.keys.items()})


def _other_scans(name: str, m: int, tokens: int, settings: Settings) -> list[Work]:
    shape = settings.shape
    if name != POPCOUNT:
        return faiss_scans.works(name, m, tokens, shape)
    if not SignRows.takes(m):
        return []
    query = torch.randn(shape.kv_heads, shape.group, m)
    copies = copies_for(shape.kv_heads * tokens * m // 8)
    return [partial(popcount_scan, query, SignRows.random(shape.kv_heads, tokens, m)) for _ in range(copies)]


def encode(
    config: CacheConfig, role: str, tokens: int, settings: Settings, on_round: Callable[[], None] = lambda: None
) -> Row:
    """Time the encoding of a layer's keys or values, on ``DISTINCT`` tokens; that of ``tokens`` is in proportion.

    Raises:
        Inaccurate: if the codes of the backend in use decode worse than the reference's.
        QJLError: if the preset does not take this head_dim.
    """
    shape = settings.shape
    codec = _codec(config, role, settings)
    maker, first = Maker(shape), torch.arange(0, DISTINCT, BLOCK)[None]
    x = (maker.keys(torch.arange(DISTINCT)[None]) if role == "key" else maker.values(DISTINCT)).to(settings.dtype)
    error = _encoding_error(codec, x, first, settings.threads)
    require_accurate(error, f"{role}s of {config.name}")
    reader = Reader()
    works: dict[str, Sequence[Work]] = {
        OURS: [partial(codec.quantize, x.clone(), first) for _ in range(copies_for(x.nbytes))],
        READ: [reader],
    }
    works |= {name: [_prefill(tokens, dtype, settings)] for name, dtype in PREFILL.items()}
    timings = interleave(works, settings.repeats, settings.threads, on_round)
    ms = timings.ms(OURS) * tokens / DISTINCT
    prefill_ms = min(timings.ms(name) for name in PREFILL) * shape.kv_heads * tokens / 2 / PREFILL_QUERIES
    quantizer = config.key if role == "key" else config.value
    return (
        head("encode", config.name, tokens, settings)
        | {"role": role, "bits_per_vector": quantizer.bits(shape.head_dim) * shape.head_dim, "ms": ms}
        | NOT_COMPARED
        | of_the_limit(x.nbytes * tokens // DISTINCT, ms, timings, reader)
        | {"max_error": error, "prefill_ms": prefill_ms, "share_of_prefill": ms / prefill_ms}
        | _per_vector(timings.ms(OURS), DISTINCT * shape.kv_heads)
        | conditions(settings)
    )


def _codec(config: CacheConfig, role: str, settings: Settings) -> Codec:
    subject = fill(config, config.sinks + config.recent + BLOCK, settings.shape, settings.dtype)
    _, segment = subject.layer.segments()
    assert segment is not None
    return segment.key_codec if role == "key" else segment.value_codec


def _encoding_error(codec: Codec, x: Tensor, first: Tensor, threads: int) -> float:
    """How much more of the tokens is lost than in the reference's codes. Codes may differ where two are as good."""

    def lost() -> float:
        return float((codec.dequantize(codec.quantize(x, first), first) - x.float()).norm())

    with use_threads(threads), torch.inference_mode():
        ours = lost()
        with using_backend(REFERENCE):
            reference = lost()
    return abs(ours - reference) / reference


def _prefill(tokens: int, dtype: torch.dtype, settings: Settings) -> Work:
    """torch's attention of some queries of one KV head over all tokens."""
    group, head_dim = settings.shape.group, settings.shape.head_dim
    query = torch.randn(1, 1, group * PREFILL_QUERIES, head_dim).to(dtype)
    keys, values = torch.randn(2, 1, 1, tokens, head_dim).to(dtype)
    return partial(F.scaled_dot_product_attention, query, keys, values)


def _per_vector(ms: float, vectors: int) -> Row:
    return {"ns_per_vector": ms * 1e6 / vectors}
