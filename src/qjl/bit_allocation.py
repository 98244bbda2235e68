"""The configuration of least expected damage at a budget of bits, chosen for one model.

Layers are very unequal: in some of them a bit more takes ten times as much off the KL as in others. What a code costs
in each layer is known from two backward passes (``sensitivity``) and from what it makes of the layer's own keys and
values; damages of layers add up, so bits are shared out exactly, by dynamic programming. Teacher-forced decoding of
another text then has the last word, between that allocation and the same codes in all layers, before and after RoPE.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl import calibration, corpora, download, sensitivity
from qjl.architecture import LayerShape, find_rope, layer_shapes
from qjl.cache.paged import as_coded
from qjl.codecs import Codecs
from qjl.errors import QJLError
from qjl.fingerprints import Unnamed, fingerprint
from qjl.generation import require_context
from qjl.hf import KVCache, own_codecs
from qjl.methods.balanced import Balanced
from qjl.methods.base import Quantizer
from qjl.methods.identity import Identity
from qjl.methods.transform import Transform
from qjl.packed import BLOCK, block_bits
from qjl.presets import CacheConfig, LayerOverride, from_dict, to_dict
from qjl.statistics import LayerStatistics
from qjl.teacher_forcing import compare, full_log_probabilities, prefill, refill

logger = logging.getLogger("qjl")
KEYS = tuple(Transform(bits) for bits in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5))
MEASURED_KEYS = tuple(Transform(bits) for bits in (1, 2, 3, 5))  # the damage in between is geometric in the bits
VALUES = (
    Balanced(1, "trellis", metric=False),
    Balanced(2, "trellis", metric=False),
    Balanced(3, metric=False),
    Balanced(4, "trellis", metric=False),
    Balanced(5, metric=False),
)
ROWS, ROW_TOKENS = 2, 512  # that codes are tried on
PREFIX, DECODE = 512, 256  # of the decoding that has the last word
FORMAT = "qjl-choice-1"
_CHARACTERS_PER_TOKEN = 8  # more than any text has
_EXACT = CacheConfig(Identity(), Identity())
_MEAN_AGE = BLOCK // 2  # beyond the exact window, at which a token begins to be read from its code


@dataclass(frozen=True)
class Option:
    """A quantizer for one layer's keys or values: bits of a block of all heads, and the expected damage in nats."""

    quantizer: Quantizer
    bits: int
    damage: float


Place = tuple[int, str]  # a layer and "key" or "value"
Table = Mapping[Place, Sequence[Option]]
Picks = Mapping[Place, Option]


@torch.inference_mode(False)
def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bits: float,
    text: str | None = None,
    *,
    refresh: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> CacheConfig:
    """The configuration of least expected damage within ``bits`` true bits per number, for this model.

    It takes about a minute on a small model the first time, and is kept in the cache folder by the weights, the bits
    and the text (Paul Graham's essays if none is given). ``summary`` of the result explains it in one line.

    >>> config = qjl.choose(model, tokenizer, bits=2.5)
    >>> cache = qjl.KVCache(model, config)

    Args:
        model, tokenizer: as from ``qjl.load``.
        bits: the budget, keys and values averaged, all constants counted.
        text: of the kind that the cache is for; at least 1793 tokens.
        refresh: whether to choose anew where a choice is kept already.
        on_stage: hears what is being done.

    Raises:
        QJLError: if the budget is out of range, the text too short, the model's context too short or its attention
            out of reach, or if what is kept is damaged.
    """
    shapes = [shape for shape in layer_shapes(model.config) if shape.is_quantized]
    _require_within(bits, shapes)
    path = _path(model, bits, text)
    if path is not None and path.exists() and not refresh:
        return _read(path)
    probed, decoded = _tokens(model, tokenizer, corpora.essays() if text is None else text)
    on_stage("Measuring what the model is sensitive to")
    lab = _Lab(model, shapes, probed, on_stage)
    config = _best(lab, bits, decoded)
    if path is not None:
        _write(path, config)
    return config


def _best(lab: _Lab, bits: float, decoded: Tensor) -> CacheConfig:
    """The finalist that loses least in decoding, with its explanation."""
    tables = {pre_rope: lab.table(pre_rope) for pre_rope in ((False, True) if lab.rope else (False,))}
    capacity = _capacity(bits, lab.shapes)
    shared_out = [_configuration(_share_out(table, capacity), pre_rope) for pre_rope, table in tables.items()]
    uniform = [_configuration(_uniform(table, capacity), pre_rope) for pre_rope, table in tables.items()]
    trial = _Trial(lab, decoded)
    kls = {config: trial.kl(config) for config in dict.fromkeys(shared_out + uniform)}
    best = min(kls, key=kls.__getitem__)
    kl, of_uniform = kls[best], min(kls[config] for config in uniform)
    return dataclasses.replace(best, name=f"auto-{bits:g}", summary=_explanation(best, lab.shapes, kl, of_uniform))


# Budgets


def _capacity(bits: float, shapes: Iterable[LayerShape]) -> int:
    """Bits of a block of keys and values in all layers; a part of a bit is forgiven to rounding."""
    return int(bits * sum(2 * shape.num_key_value_heads * shape.head_dim * BLOCK for shape in shapes) + 1e-3)


def _cost(quantizer: Quantizer, shape: LayerShape) -> int:
    return shape.num_key_value_heads * block_bits(quantizer.layout(shape.head_dim))


def _require_within(bits: float, shapes: Sequence[LayerShape]) -> None:
    least, most = (
        sum(_cost(key, shape) + _cost(value, shape) for shape in shapes) / _capacity(1, shapes)
        for key, value in ((KEYS[0], VALUES[0]), (KEYS[-1], VALUES[-1]))
    )
    if not least <= bits <= most:
        low, high = math.ceil(least * 1000) / 1000, math.floor(most * 1000) / 1000
        raise QJLError(f"{bits:g} bits cannot be had by choice on this model: ask for {low:g} to {high:g}.")


# Damages


class _Lab:
    """A model, its statistics, and what it is sensitive to on ``input_ids [B, T]``."""

    def __init__(
        self,
        model: PreTrainedModel,
        shapes: Sequence[LayerShape],
        input_ids: Tensor,
        on_stage: Callable[[str], None],
    ) -> None:
        self.model, self.shapes, self.on_stage = model, shapes, on_stage
        self.rope = find_rope(model.config)
        self.statistics = _statistics(model, input_ids)
        window = _EXACT.recent + _MEAN_AGE
        self.sensitivities = sensitivity.probe(model, input_ids, sinks=_EXACT.sinks, window=window)

    def table(self, pre_rope: bool) -> dict[Place, list[Option]]:
        """What every quantizer costs and damages, in every layer."""
        keys = {(shape.index, "key"): self._keys(shape, pre_rope) for shape in self.shapes}
        return keys | self._values

    @functools.cached_property
    def _values(self) -> dict[Place, list[Option]]:
        return {
            (shape.index, "value"): [
                Option(value, _cost(value, shape), self._damage(shape, _EXACT.key, value)) for value in VALUES
            ]
            for shape in self.shapes
        }

    def _keys(self, shape: LayerShape, pre_rope: bool) -> list[Option]:
        measured = [self._damage(shape, key, _EXACT.value, pre_rope) for key in MEASURED_KEYS]
        widths = [key.num_bits for key in MEASURED_KEYS]
        logarithms = np.log(np.maximum(measured, np.finfo(float).tiny))
        return [
            Option(key, _cost(key, shape), math.exp(np.interp(key.num_bits, widths, logarithms)))
            for key in KEYS
            if all(_packs(key, any_shape) for any_shape in self.shapes)
        ]

    def _damage(self, shape: LayerShape, key: Quantizer, value: Quantizer, pre_rope: bool = False) -> float:
        """Expected KL where the layer's tokens are read as these quantizers give them back."""
        coded, role = (key, "keys") if value.is_exact else (value, "values")
        self.on_stage(f"Trying {coded.bits(shape.head_dim):.2f}-bit {role} in layer {shape.index}")
        layer = self.sensitivities[shape.index]
        config = CacheConfig(key, value, sinks=0, recent=0, pre_rope=pre_rope)
        codecs = Codecs(config, {shape.index: self.rope}, self.statistics.get)
        return layer.damage(*as_coded(layer.keys, layer.values, codecs, shape.index))

    def cache(self, config: CacheConfig) -> KVCache:
        """An empty cache with the codecs that damages were measured with."""
        return KVCache(self.model, config, codecs=own_codecs(self.model, config, self.statistics.get))


class _Trial:
    """What teacher-forced decoding loses: ``PREFIX`` tokens exact, the others of ``input_ids [T]`` over the codes."""

    def __init__(self, lab: _Lab, input_ids: Tensor) -> None:
        self.lab, self.input_ids = lab, input_ids[None]
        self.reference = full_log_probabilities(lab.model, self.input_ids, PREFIX)
        self.prefix = prefill(lab.model, self.input_ids[:, :PREFIX])

    def kl(self, config: CacheConfig) -> float:
        """In nats per token."""
        keys, values = _bits_of(config, self.lab.shapes)
        self.lab.on_stage(f"Decoding with keys of {fmean(keys):.2f} and values of {fmean(values):.2f} bits")
        cache = self.lab.cache(config)
        refill(cache, self.prefix)
        return float(compare(self.lab.model, cache, self.input_ids, PREFIX, self.reference).kl.mean())


def _statistics(model: PreTrainedModel, input_ids: Tensor) -> dict[int, LayerStatistics]:
    """Those of ``qjl calibrate``, or else of these tokens."""
    layers = [shape.index for shape in layer_shapes(model.config) if shape.is_quantized]
    on_disk = KVCache(model, _EXACT).codecs.statistics
    known = {index: statistics for index in layers if (statistics := on_disk(index)) is not None}
    return known if len(known) == len(layers) else calibration.model_statistics(model, input_ids)


def _packs(quantizer: Quantizer, shape: LayerShape) -> bool:
    """Whether its codes fill bytes at this head_dim; those of whole bits always do."""
    try:
        quantizer.layout(shape.head_dim)
    except QJLError:
        return False
    return True


# Allocations


def allocate(tables: Sequence[Sequence[Option]], capacity: int) -> list[Option]:
    """One option of each table, of the least total damage within ``capacity`` bits; of equals those of fewer bits.

    Dynamic programming over the bits spent so far, in units of the greatest common divisor of all costs.
    """
    unit = math.gcd(*(option.bits for options in tables for option in options))
    room = capacity // unit + 1
    least = torch.zeros(room, dtype=torch.float64)  # damage of the tables so far, within 0 to room - 1 units
    choices = []
    for options in tables:
        damages = torch.full((len(options), room), torch.inf, dtype=torch.float64)
        for row, option in zip(damages, options, strict=True):
            cost = min(option.bits // unit, room)
            row[cost:] = least[: room - cost] + option.damage
        least, choice = damages.min(0)
        choices.append(choice)
    picked, left = [], room - 1
    for options, choice in zip(reversed(tables), reversed(choices), strict=True):
        picked.append(options[int(choice[left])])
        left -= picked[-1].bits // unit
    return picked[::-1]


def _share_out(table: Table, capacity: int) -> Picks:
    """To every place its own quantizer."""
    return dict(zip(table, allocate(list(table.values()), capacity), strict=True))


def _uniform(table: Table, capacity: int) -> Picks:
    """The best pair of quantizers for all layers."""
    keys, values = ([options for place, options in table.items() if place[1] == role] for role in ("key", "value"))
    pairs = [
        (*key, *value)
        for key, value in product(zip(*keys, strict=True), zip(*values, strict=True))
        if sum(option.bits for option in (*key, *value)) <= capacity
    ]
    best = min(pairs, key=lambda options: sum(option.damage for option in options))
    places = [place for role in ("key", "value") for place in table if place[1] == role]
    return dict(zip(places, best, strict=True))


def _configuration(picks: Picks, pre_rope: bool) -> CacheConfig:
    """The most frequent pair of quantizers, and overrides for runs of layers that have another one."""
    layers = sorted({layer for layer, _ in picks})
    pairs = {layer: (picks[layer, "key"].quantizer, picks[layer, "value"].quantizer) for layer in layers}
    ((common, _),) = Counter(pairs.values()).most_common(1)
    runs = [(pair, list(run)) for pair, run in groupby(layers, key=pairs.__getitem__)]
    overrides = tuple(LayerOverride(run[0], run[-1] + 1, *pair) for pair, run in runs if pair != common)
    return CacheConfig(*common, pre_rope=pre_rope, overrides=overrides)


# Explanations


def _bits_of(config: CacheConfig, shapes: Iterable[LayerShape]) -> tuple[list[float], list[float]]:
    """True bits of keys and of values in each layer."""
    quantizers = [(config.for_layer(shape.index), shape.head_dim) for shape in shapes]
    keys, values = ([pair[role].bits(head_dim) for pair, head_dim in quantizers] for role in (0, 1))
    return keys, values


def _explanation(config: CacheConfig, shapes: Sequence[LayerShape], kl: float, kl_of_uniform: float) -> str:
    keys, values = _bits_of(config, shapes)
    frame = ", before RoPE" if config.pre_rope else ""
    parts = [f"{name} {fmean(bits):.2f} bits{_range(bits)}" for name, bits in (("keys", keys), ("values", values))]
    against = f", the best uniform one {kl_of_uniform:.4f}" if config.overrides else ""
    return f"{', '.join(parts)}{frame}; in a probe KL {kl:.4f}{against}"


def _range(bits: Sequence[float]) -> str:
    return f" ({min(bits):.1f} to {max(bits):.1f})" if min(bits) < max(bits) else ""


# Texts and files


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[Tensor, Tensor]:
    """Rows to try codes on, ``[ROWS, ROW_TOKENS]``, and a stretch behind them to decode, ``[PREFIX + DECODE + 1]``."""
    require_context(model, PREFIX + DECODE, "the probe that chooses")
    probed, decoded = ROWS * ROW_TOKENS, PREFIX + DECODE + 1
    start = text[: (probed + decoded) * _CHARACTERS_PER_TOKEN]
    tokens = tokenizer(start, return_tensors="pt", verbose=False).input_ids[0]
    if len(tokens) < probed + decoded:
        raise QJLError(
            f"a choice needs a text of at least {probed + decoded} tokens, this one has {len(tokens)}: give a longer "
            "one, or none."
        )
    return tokens[:probed].view(ROWS, ROW_TOKENS), tokens[probed : probed + decoded]


def _path(model: PreTrainedModel, bits: float, text: str | None) -> Path | None:
    """Where a choice is kept; None, which is told, for a model without a fingerprint."""
    try:
        name = fingerprint(model)
    except Unnamed as error:
        logger.warning("%s", error)
        return None
    digest = "" if text is None else f"-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return download.cache_dir() / "choices" / f"{name}-{bits:g}{digest}.json"


def _write(path: Path, config: CacheConfig) -> None:
    with download.scratch() as folder:
        whole = folder / path.name
        whole.write_text(json.dumps({"format": FORMAT, "config": to_dict(config)}, indent=1), encoding="utf-8")
        download.publish(whole, path)


def _read(path: Path) -> CacheConfig:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["format"] != FORMAT:
            raise QJLError("another version wrote it.")
        return from_dict(kept["config"])
    except (OSError, ValueError, LookupError, TypeError, QJLError) as error:
        raise QJLError(f"the choice kept in {path} is damaged or of another version: delete it.") from error
