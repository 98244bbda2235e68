"""What Python costs around the kernels: per layer and token, per block of 64 tokens, per turn of a server.

Layers have the shape of SmolLM2's (3 KV heads of 64 numbers, 9 query heads). Tokens take the way that they take in
transformers: ``KVCache.update``, then the attention function that ``AttentionInterface`` gives. Times are of this
thread's processor, so that work beside does not count; the kernels' own is taken inside of the same calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from qjl import compat
from qjl.attention import Scoring
from qjl.cache.paged import Fitted, PagedCache
from qjl.hf import KVCache
from qjl.lab import machine
from qjl.lab.bench.gate import REFERENCE, RowErrors, error_budget, require_within_budget, using_backend
from qjl.lab.bench.planner_time import plan_us
from qjl.lab.bench.timing import clock_of, kernels_timed, stopwatch_of, use_threads
from qjl.lab.results import Row
from qjl.ops.cpu import library
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

LAYERS, TOKENS, ROWS, ROW_TOKENS = 30, 4096, 16, 640
KV_HEADS, HEADS, HEAD_DIM = 3, 9, 64
DTYPE = torch.bfloat16
ROUNDING = torch.finfo(DTYPE).eps / 2  # of an output


@dataclass(frozen=True)
class _Spent:
    """Microseconds of the processor, of a whole pass and of the kernels in it."""

    whole: float
    kernel: float


def time_overhead(
    config: CacheConfig, layers: int = LAYERS, repeats: int = 4 * BLOCK, on_part: Callable[[], None] = lambda: None
) -> Row:
    """All of it, on one thread; ``on_part`` is called four times.

    Raises:
        Inaccurate: if the backend in use and the reference do not agree on a token's attention.
        QJLError: if the compiled backend is not in use.
    """
    library.load()
    with use_threads(1), torch.no_grad():
        single = _tokens(config, layers, 1, TOKENS, repeats)
        on_part()
        rows = _tokens(config, layers, ROWS, ROW_TOKENS, max(repeats // 8, 8))
        on_part()
        turn = _turn_ms(config, layers, max(repeats // 8, 8))
        on_part()
        planned = plan_us()
        on_part()
    usual = [one for one in single if one.whole < 2 * statistics.median(each.whole for each in single)]
    python = statistics.median(one.whole - one.kernel for one in usual)
    packing = sorted(one.whole - one.kernel for one in single)[-max(1, len(single) // BLOCK) :]
    return {
        "case": "overhead",
        "preset": config.name,
        "layers": layers,
        "tokens": TOKENS,
        "repeats": repeats,
        "python_us_per_layer_token": python / layers,
        "kernel_us_per_layer_token": statistics.median(one.kernel for one in usual) / layers,
        "python_us_per_block": statistics.median(packing) - python,
        "rows_us_per_layer": statistics.median(one.whole for one in rows) / layers,
        "server_turn_ms": turn,
        "plan_us": planned,
        "isa": library.instruction_set(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def _tokens(config: CacheConfig, layers: int, batch: int, tokens: int, repeats: int) -> list[_Spent]:
    """Of passes over one token of each row, behind ``tokens`` others."""
    model = _model(layers)
    cache = KVCache(model, config)
    prompt = torch.randint(model.config.vocab_size, (batch, tokens))
    model(input_ids=prompt, logits_to_keep=1, **compat.cache_argument(cache))
    modules = [layer.self_attn for layer in model.model.layers]
    states = [_normal(batch, heads, 1) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    _require_right(cache, modules, states)
    return [_spent(lambda: _pass(cache, modules, *states)) for _ in range(repeats)]


def _pass(cache: KVCache, modules: list[Any], query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What a model's layers ask of a cache for one token; attention of the last layer."""
    cache.before_forward(1, None, None)
    for number, module in enumerate(modules):
        handles = cache.update(keys, values, number)
        attention = AttentionInterface().get_interface("sdpa", compat.sdpa_attention_forward)
        out, _ = attention(module, query, *handles, None, dropout=0.0, scaling=HEAD_DIM**-0.5)
    cache.after_forward()
    return out


def _require_right(cache: KVCache, modules: list[Any], states: list[Tensor]) -> None:
    out = _pass(cache, modules, *states)
    cache.crop(-1)
    with using_backend(REFERENCE):
        expected = _pass(cache, modules, *states)
    cache.crop(-1)
    errors = RowErrors.of(out.float(), expected.float())
    require_within_budget(errors, "one token's attention", "cpu", error_budget(cache.cores[-1]) + ROUNDING)


def _turn_ms(config: CacheConfig, layers: int, repeats: int) -> float:
    """Attention of a server's turn: rows of different lengths, a token of each."""
    codecs = KVCache(_model(layers), config).codecs
    store = PagedCache(range(layers), config.sinks, config.recent, Fitted(codecs))
    store.index.add_rows(ROWS)
    lengths = [ROW_TOKENS - row for row in range(ROWS)]
    _ragged(store, lengths)
    return statistics.median(_spent(lambda: _ragged(store, [1] * ROWS)).whole for _ in range(repeats)) / 1e3


def _ragged(store: PagedCache, counts: list[int]) -> None:
    query, keys, values = (_normal(1, heads, sum(counts)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    store.begin(counts)
    for layer in store.layers.values():
        store.append(layer, keys, values)
        store.attend_ragged(layer, query, Scoring(HEAD_DIM**-0.5))
    store.settle()


def _spent(work: Callable[[], object]) -> _Spent:
    with kernels_timed(clock_of(threads=1)) as kernels:
        whole = stopwatch_of(threads=1)(work)
    return _Spent(1e3 * whole, 1e3 * sum(kernels))


def _model(layers: int) -> LlamaForCausalLM:
    """A random one; what lies between its layers' attention is small."""
    torch.manual_seed(0)
    return _MODELS.setdefault(layers, LlamaForCausalLM(_config(layers)).eval().to(DTYPE))


_MODELS: dict[int, LlamaForCausalLM] = {}


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=64,
        vocab_size=128,
        max_position_embeddings=2 * TOKENS,
    )


def _normal(batch: int, heads: int, tokens: int) -> Tensor:
    """``[B, H, T, D]``, as projections lay them."""
    return torch.randn(batch, tokens, heads, HEAD_DIM).to(DTYPE).transpose(1, 2)
