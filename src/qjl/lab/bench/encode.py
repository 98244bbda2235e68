"""Keys or values to packed codes, beside the attention of the prefill that they come from.

A GPU encodes and attends to all tokens. A CPU would take minutes: there ``DISTINCT`` tokens are encoded and the rest
counted in proportion, and some queries of one KV head stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.lab.bench.baselines import BF16, FLASH, FP16, FP32
from qjl.lab.bench.devices import copies_for
from qjl.lab.bench.gate import (
    LIMIT,
    OURS,
    REFERENCE,
    BenchSettings,
    conditions,
    head,
    of_the_limit,
    require_accurate,
    using_backend,
)
from qjl.lab.bench.synthetic import DISTINCT, Maker, fill
from qjl.lab.bench.timing import Work, interleave, use_threads
from qjl.lab.results import Row
from qjl.methods.base import Codec
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

ROLES = ("key", "value")
NOT_COMPARED: Row = {f"ratio_{name}": None for name in (BF16, FP32, FP16)}
PROMPTS = tuple(2**power for power in range(10, 18))
SAMPLED_QUERIES = 64
SAMPLED = {BF16: torch.bfloat16, FP32: torch.float32}


def time_encoding(
    config: CacheConfig, role: str, tokens: int, settings: BenchSettings, on_round: Callable[[], None] = lambda: None
) -> Row:
    """Time the encoding of ``tokens`` keys or values of a layer.

    Raises:
        Inaccurate: if the codes of the backend in use decode worse than the reference's.
        QJLError: if the preset does not take this head_dim.
    """
    shape, place = settings.shape, settings.place
    codec, x = _codec(config, role, settings), _tokens(role, min(_whole_blocks(tokens), DISTINCT), settings)
    error = encoding_error(codec, x, _positions(x), settings.threads)
    require_accurate(error, f"{role}s of {config.name}", settings.backend)
    limit, sampled = place.limit(), settings.device.type == "cpu"
    subject = x if sampled else _repeated(x, _whole_blocks(tokens))
    first = _positions(subject)
    works: dict[str, Sequence[Work]] = {
        OURS: [partial(codec.encode_tokens, subject.clone(), first) for _ in range(copies_for(subject.nbytes, place))],
        LIMIT: [limit],
    }
    prefills = _some_queries(tokens, settings) if sampled else {FLASH: whole_prefill(tokens, settings)}
    works |= {name: [work] for name, work in prefills.items()}
    timings = interleave(works, settings.repeats, settings.threads, on_round, place.stopwatch)
    share = tokens / subject.shape[2]
    queries = shape.batch * shape.kv_heads * tokens / 2 / SAMPLED_QUERIES if sampled else 1
    ms, prefill_ms = timings.ms(OURS) * share, min(timings.ms(name) for name in prefills) * queries
    quantizer = config.key if role == "key" else config.value
    vectors = subject.shape[0] * subject.shape[1] * subject.shape[2]
    return (
        head("encode", config.name, tokens, settings)
        | {"role": role, "bits_per_vector": quantizer.bits(shape.head_dim) * shape.head_dim, "ms": ms}
        | NOT_COMPARED
        | of_the_limit(int(subject.nbytes * share), ms, timings, limit)
        | {"max_error": error, "prefill_ms": prefill_ms, "share_of_prefill": ms / prefill_ms}
        | {"ns_per_vector": timings.ms(OURS) * 1e6 / vectors}
        | conditions(settings)
    )


def encoding_error(codec: Codec, x: Tensor, first: Tensor, threads: int) -> float:
    """How much more of the tokens is lost than in the reference's codes. Codes may differ where two are as good."""

    def lost() -> float:
        return float((codec.dequantize(codec.encode_tokens(x, first), first) - x.float()).norm())

    with use_threads(threads), torch.no_grad():
        ours = lost()
        with using_backend(REFERENCE):
            reference = lost()
    return abs(ours - reference) / reference


def whole_prefill(tokens: int, settings: BenchSettings) -> Work:
    """torch's causal attention of all queries over all tokens."""
    shape = settings.shape
    heads = (shape.kv_heads * shape.group, shape.kv_heads, shape.kv_heads)
    sizes = [(shape.batch, count, tokens, shape.head_dim) for count in heads]
    query, keys, values = (torch.empty(size, dtype=settings.dtype, device=settings.device).normal_() for size in sizes)
    return partial(F.scaled_dot_product_attention, query, keys, values, is_causal=True, enable_gqa=True)


def _some_queries(tokens: int, settings: BenchSettings) -> dict[str, Work]:
    """torch's attention of some queries of one KV head over all tokens."""
    group, head_dim = settings.shape.group, settings.shape.head_dim
    query = torch.randn(1, 1, group * SAMPLED_QUERIES, head_dim)
    keys, values = torch.randn(2, 1, 1, tokens, head_dim)
    return {
        name: partial(F.scaled_dot_product_attention, query.to(dtype), keys.to(dtype), values.to(dtype))
        for name, dtype in SAMPLED.items()
    }


def _tokens(role: str, count: int, settings: BenchSettings) -> Tensor:
    maker = Maker(settings.shape)
    x = maker.keys(torch.arange(count)[None]) if role == "key" else maker.values(count)
    return x.to(settings.device, settings.dtype).repeat(settings.shape.batch, 1, 1, 1)


def _repeated(x: Tensor, tokens: int) -> Tensor:
    return x.repeat(1, 1, -(-tokens // x.shape[2]), 1)[:, :, :tokens].contiguous()


def _positions(x: Tensor) -> Tensor:
    """Of each block's first token."""
    return torch.arange(0, x.shape[2], BLOCK, device=x.device).repeat(x.shape[0], 1)


def _whole_blocks(tokens: int) -> int:
    return max(1, tokens // BLOCK) * BLOCK


def _codec(config: CacheConfig, role: str, settings: BenchSettings) -> Codec:
    least = config.recent + BLOCK + 1
    subject = fill(config, least, settings.shape, settings.dtype, settings.device)
    assert subject.layer.codecs is not None
    return subject.layer.codecs[role == "value"]
