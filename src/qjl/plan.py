"""How many tokens and users fit into memory with each preset, from a model's configuration alone."""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qjl.architecture import LayerShape, context_length, layer_shapes, text_config
from qjl.errors import QJLError
from qjl.methods.base import LayerContext, Quantizer, storage_bytes
from qjl.models import weights_bytes
from qjl.packed import BLOCK, block_bits
from qjl.presets import CacheConfig
from qjl.statistics import MIN_TOKENS, QUANTILES, LayerStatistics

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?B)?", re.IGNORECASE)


def parse_memory(text: str) -> int:
    """Bytes from "24G" or "24GiB" (2**30 each), "24GB" (10**9 each), or a plain number of bytes.

    Raises:
        QJLError: if the text is none of these, or no memory at all.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise QJLError(f"memory {text!r} is not a size: write it as 24G, 512M or 80GB.")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    return round(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))


@dataclass(frozen=True)
class Plan:
    """What fits with one preset. ``tokens``: of a single user; ``users``: at ``context`` tokens each."""

    preset: str
    bits_keys: float
    bits_values: float
    tokens: int
    users: int
    context: int
    cache_bytes: int
    cache_bytes_full: int

    @property
    def compression(self) -> float:
        """How many times smaller than transformers' own cache, everything counted."""
        return self.cache_bytes_full / self.cache_bytes


@dataclass(frozen=True)
class _LayerSize:
    """One layer's cache for one user.

    The last ``recent`` tokens stay exact, and all of them below ``awaited`` tokens, where statistics are taken; the
    first ``sinks`` are exact and in codes. A layer that is not quantized has no ``block_bytes``, and maybe a ``limit``
    on its tokens.
    """

    token_bytes: int
    block_bytes: int = 0
    sinks: int = 0
    recent: int = 0
    awaited: int = 0
    limit: int | None = None

    def at(self, tokens: int) -> int:
        if not self.block_bytes:
            return self.token_bytes * (tokens if self.limit is None else min(tokens, self.limit))
        blocks = max(0, tokens - self.recent) // BLOCK if tokens >= self.awaited else 0
        exact = tokens - blocks * BLOCK + min(self.sinks, blocks * BLOCK)
        return blocks * self.block_bytes + exact * self.token_bytes

    def most_up_to(self, tokens: int) -> int:
        """The largest size on the way: it shrinks each time that a block is quantized."""
        full_window = tokens - (tokens - self.recent + 1) % BLOCK
        return max(self.at(max(0, n)) for n in (tokens, full_window, min(tokens, self.awaited - 1)))


class Planner:
    """Sizes of a model and of its caches, with weights and exact tokens in ``dtype``.

    Raises:
        QJLError: if the model has no cache that can be quantized.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shapes = layer_shapes(config)
        self.dtype = dtype
        self.config = copy.deepcopy(config)
        self.config.dtype = text_config(self.config).dtype = dtype

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of the weights."""
        return weights_bytes(self.config)

    @property
    def uncounted_layers(self) -> int:
        """Layers with a state of constant size, which the configuration does not tell."""
        return sum(not shape.is_quantized and shape.window is None for shape in self.shapes)

    @property
    def model_context(self) -> int | None:
        """Tokens that the model was made for."""
        return context_length(self.config)

    def plan(self, preset: CacheConfig, memory: int, context: int) -> Plan:
        """What fits into ``memory`` bytes beside the weights and the fitted codecs, which all users share.

        Raises:
            QJLError: if the weights alone do not fit.
        """
        layers = self._layers(preset)
        left = self._beside_weights(memory) - self.codec_bytes(preset)
        per_user = _most_up_to(layers, context)
        keys, values = preset.bits(self._head_dim, len(self.shapes))
        tokens = _tokens_within(layers, left)
        users = max(0, left // per_user)
        return Plan(preset.name, keys, values, tokens, users, context, per_user, self.full_bytes(context))

    def cache_bytes(self, preset: CacheConfig, tokens: int) -> int:
        """Bytes of one user's ``tokens`` in a ``KVCache``, the codecs apart."""
        return sum(layer.at(tokens) for layer in self._layers(preset))

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the same tokens in transformers' own cache."""
        return sum(self._exact_layer(shape).at(tokens) for shape in self.shapes)

    def codec_bytes(self, preset: CacheConfig) -> int:
        """Bytes of projections, maps and means of all layers, for statistics of usual shape."""
        layers = Counter(
            (shape.num_key_value_heads, shape.head_dim, preset.for_layer(shape.index))
            for shape in self.shapes
            if shape.is_quantized
        )
        shared: list[Tensor] = []
        own_bytes = 0
        for (heads, head_dim, quantizers), count in layers.items():
            first, second = (_fitted_tensors(heads, head_dim, quantizers) for _ in range(2))
            common = {tensor.data_ptr() for tensor in first} & {tensor.data_ptr() for tensor in second}
            shared += [tensor for tensor in first if tensor.data_ptr() in common]
            own_bytes += count * storage_bytes(tensor for tensor in first if tensor.data_ptr() not in common)
        return own_bytes + storage_bytes(shared)

    @property
    def _head_dim(self) -> int:
        return next(shape.head_dim for shape in self.shapes if shape.is_quantized)

    def _layers(self, preset: CacheConfig) -> list[_LayerSize]:
        return [
            self._quantized_layer(preset, shape) if shape.is_quantized else self._exact_layer(shape)
            for shape in self.shapes
        ]

    def _quantized_layer(self, preset: CacheConfig, shape: LayerShape) -> _LayerSize:
        quantizers = preset.for_layer(shape.index)
        bits = sum(block_bits(quantizer.layout(shape.head_dim, self.dtype)) for quantizer in quantizers)
        awaits_statistics = any(quantizer.needs_statistics for quantizer in quantizers)
        return _LayerSize(
            self._token_bytes(shape),
            block_bytes=shape.num_key_value_heads * bits // 8,
            sinks=preset.sinks,
            recent=preset.recent,
            awaited=MIN_TOKENS if awaits_statistics else 0,
        )

    def _exact_layer(self, shape: LayerShape) -> _LayerSize:
        """As transformers keeps it: a sliding window holds one token less than its size."""
        if shape.is_quantized:
            return _LayerSize(self._token_bytes(shape))
        return _LayerSize(self._token_bytes(shape), limit=shape.window - 1 if shape.window else 0)

    def _token_bytes(self, shape: LayerShape) -> int:
        return 2 * shape.num_key_value_heads * shape.head_dim * self.dtype.itemsize

    def _beside_weights(self, memory: int) -> int:
        if self.weights_bytes >= memory:
            raise QJLError(
                f"the weights alone take {self.weights_bytes / 2**30:.1f} GiB of {memory / 2**30:.1f} GiB: "
                "give more memory or a smaller model."
            )
        return memory - self.weights_bytes


def _most_up_to(layers: list[_LayerSize], tokens: int) -> int:
    return sum(layer.most_up_to(tokens) for layer in layers)


def _tokens_within(layers: list[_LayerSize], budget: int) -> int:
    """The most tokens of one user that never take more than ``budget`` bytes on the way there."""
    low, high = 0, 1
    while _most_up_to(layers, high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _most_up_to(layers, middle) <= budget else (low, middle)
    return low


def _fitted_tensors(heads: int, head_dim: int, quantizers: tuple[Quantizer, Quantizer]) -> list[Tensor]:
    """What the codecs of one layer keep, for statistics as uneven as those of real models."""
    spectrum = 1.0 / torch.arange(1, head_dim + 1)
    covariance = torch.diag(spectrum).expand(heads, -1, -1)
    mean = torch.zeros(heads, head_dim, dtype=torch.float32)
    quantiles = torch.linspace(-2, 2, QUANTILES, dtype=torch.float32).expand(heads, head_dim, -1)
    keys = (mean, covariance, covariance, quantiles)
    statistics = LayerStatistics(MIN_TOKENS, False, *keys, mean.clone(), covariance, covariance, quantiles)
    tensors: list[Tensor] = []
    for role, quantizer in zip(("key", "value"), quantizers, strict=True):
        device, dtype = torch.device("cpu"), torch.bfloat16
        context = LayerContext(role, heads, head_dim, device, dtype, statistics)
        tensors += quantizer.fit(context).tensors
    return tensors
