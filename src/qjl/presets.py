"""Cache configurations, and the named ones.

A preset is a ``CacheConfig`` with a name. Presets are also read from JSON files, so that a new combination needs no
code: ``{"key": {"method": "balanced", "num_bits": 3}, "value": {"method": "uniform"}, "recent": 64}``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qjl.errors import QJLError
from qjl.methods import METHODS
from qjl.methods.asymkv import AsymKV
from qjl.methods.balanced import Balanced
from qjl.methods.base import Quantizer
from qjl.methods.calibquant import CalibQuant
from qjl.methods.identity import Identity
from qjl.methods.int8_fp8 import Fp8, Int8
from qjl.methods.kivi import KIVI
from qjl.methods.kvquant import KVQuant
from qjl.methods.oscar import OSCAR
from qjl.methods.polarquant import PolarQuant
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.rabitq import RaBitQ
from qjl.methods.saw import SAW
from qjl.methods.transform import Transform
from qjl.methods.turboesm import TurboESM
from qjl.methods.turboquant import TurboQuant
from qjl.methods.uniform import TokenUniform
from qjl.methods.vidkv import VidKVKeys, VidKVValues


@dataclass(frozen=True)
class LayerOverride:
    """Other quantizers for layers ``first <= index < stop``; None keeps the configuration's own."""

    first: int
    stop: int
    key: Quantizer | None = None
    value: Quantizer | None = None


@dataclass(frozen=True)
class CacheConfig:
    """What a quantized cache does with its tokens.

    - ``key``, ``value``: the quantizers; ``overrides`` changes them for ranges of layers, later ones first.
    - ``sinks``: first tokens of each sequence, kept exact.
    - ``recent``: last tokens, kept exact; between ``recent`` and ``recent + 63`` are, since tokens are quantized in
      blocks of 64.
    - ``paper``: where it comes from, if that is not the paper of its keys' method.
    - ``pre_rope``: whether keys are quantized as they were before RoPE, which is undone and done again by position.
    """

    key: Quantizer
    value: Quantizer
    sinks: int = 4
    recent: int = 32
    pre_rope: bool = False
    overrides: tuple[LayerOverride, ...] = ()
    name: str = "custom"
    summary: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise QJLError("sinks and recent count tokens: they cannot be negative.")

    @property
    def source(self) -> str:
        """Where the configuration comes from: its own paper, or that of its keys' method."""
        return self.paper or self.key.source

    def for_layer(self, index: int) -> tuple[Quantizer, Quantizer]:
        """Key and value quantizer of layer ``index``."""
        key, value = self.key, self.value
        for override in self.overrides:
            if override.first <= index < override.stop:
                key, value = override.key or key, override.value or value
        return key, value

    def bits(self, head_dim: int, num_layers: int | None = None) -> tuple[float, float]:
        """True bits per key and value number of quantized tokens, averaged over the layers."""
        layers = [self.for_layer(index) for index in range(num_layers or 1)]
        keys = sum(key.bits(head_dim) for key, _ in layers) / len(layers)
        return keys, sum(value.bits(head_dim) for _, value in layers) / len(layers)

    def with_seed(self, seed: int) -> CacheConfig:
        """The same configuration with another projection seed in every quantizer that has one."""
        overrides = tuple(
            dataclasses.replace(one, key=_seeded(one.key, seed), value=_seeded(one.value, seed))
            for one in self.overrides
        )
        key, value = _seeded(self.key, seed), _seeded(self.value, seed)
        return dataclasses.replace(self, key=key, value=value, overrides=overrides)

    @property
    def is_exact(self) -> bool:
        """Whether no layer is quantized: full precision, which transformers' own cache serves as well."""
        of_ranges = (quantizer for one in self.overrides for quantizer in (one.key, one.value) if quantizer)
        return all(isinstance(quantizer, Identity) for quantizer in (self.key, self.value, *of_ranges))

    @property
    def settings(self) -> dict[str, Any]:
        """All that codes depend on, as ``to_dict`` has it: without the words about the preset."""
        return {name: value for name, value in to_dict(self).items() if name not in ("name", "summary", "paper")}

    @property
    def coding(self) -> tuple[object, ...]:
        """What codecs depend on: the quantizers of each layer, and what they see of keys."""
        return self.key, self.value, self.overrides, self.pre_rope

    def with_window(self, recent: int | None) -> CacheConfig:
        """The same configuration with so many exact tokens at the end; None keeps its own."""
        return self if recent is None else dataclasses.replace(self, recent=recent)


def _seeded(quantizer: Any, seed: int) -> Any:
    return dataclasses.replace(quantizer, seed=seed) if hasattr(quantizer, "seed") else quantizer


def _values(num_bits: float) -> Balanced:
    return Balanced(num_bits, "trellis", metric=False)


def _ours(name: str, key: Balanced | Transform, value_bits: float, summary: str, pre_rope: bool = False) -> CacheConfig:
    return CacheConfig(key, _values(value_bits), pre_rope=pre_rope, name=name, summary=summary)


def _published(
    name: str, key: Quantizer, value: Quantizer, summary: str, sinks: int = 0, recent: int = 0, pre_rope: bool = False
) -> CacheConfig:
    """The papers keep no window and no sinks where nothing else is said."""
    return CacheConfig(key, value, sinks, recent, pre_rope, name=name, summary=summary)


def _asymkv(plan: AsymKV) -> CacheConfig:
    first_layers = (LayerOverride(0, plan.l_k, key=plan.key(0)), LayerOverride(0, plan.l_v, value=plan.value(0)))
    return CacheConfig(
        plan.key(plan.l_k),
        plan.value(plan.l_v),
        sinks=0,
        recent=128,
        overrides=tuple(one for one in first_layers if one.stop),
        name=f"asymkv-{plan.l_k}-{plan.l_v}",
        paper=AsymKV.source,
        summary=f"AsymKV as published: KIVI, 2-bit keys in the first {plan.l_k} layers, 1 bit for the rest",
    )


_ALL = (
    CacheConfig(Identity(), Identity(), name="full", summary="full precision through the same path"),
    _ours("b1", Transform(1.5), 1.5, "1.5-bit keys and values: the smallest"),
    _ours("b2", Transform(2), 2, "2-bit keys and values"),
    _ours("b3", Transform(3), 2, "3-bit keys, 2-bit values: the default"),
    _ours("b3-3", Transform(3), 3, "3-bit keys and values"),
    _ours("b4", Transform(4), 4, "4-bit keys and values: next to full precision"),
    _ours("b1-pre", Transform(1.5), 1.5, "1.5-bit keys before RoPE, 1.5-bit values", pre_rope=True),
    _ours("b2-pre", Transform(2), 2, "2-bit keys before RoPE, 2-bit values", pre_rope=True),
    _ours("b3-pre", Transform(2.5), 2.5, "2.5-bit keys before RoPE, 2.5-bit values", pre_rope=True),
    _ours("qjl-1", Balanced(1, "signs"), 2, "d signs per key, centred and balanced"),
    _ours("qjl-2", Balanced(2, "signs"), 2, "2d signs per key, centred and balanced"),
    CacheConfig(
        QJL(2, outliers=8, outlier_ratio=2),
        TokenUniform(2, 32),
        sinks=0,
        recent=64,
        overrides=(LayerOverride(0, 15, key=QJL(4, outliers=8, outlier_ratio=1)),),
        name="qjl-paper",
        summary="QJL as published: 2d signs (4d in the first 15 layers), 8 outlier channels, 2-bit values",
    ),
    *(
        _published(f"kivi-{bits}", KIVI(bits), TokenUniform(bits), f"KIVI: {bits}-bit keys per channel", recent=128)
        for bits in (1, 2, 4)
    ),
    _asymkv(AsymKV(16)),
    _asymkv(AsymKV(32)),
    *(
        _published(
            f"kvquant-{bits}",
            KVQuant(bits, "channel", q_norm=bits == 2),
            KVQuant(bits, "token", q_norm=bits == 2),
            f"KVQuant: {bits}-bit k-means levels, 1 % outliers exact",
            sinks=1,
            pre_rope=True,
        )
        for bits in (2, 3, 4)
    ),
    *(
        _published(f"quarot-{bits}", QuaRot(bits), QuaRot(bits), f"QuaRot: Hadamard, {bits} bits per token")
        for bits in (2, 3, 4)
    ),
    _published("saw-int4", SAW(), SAW(order=1), "SAW-INT4: Hadamard keys, 4 bits per token"),
    *(
        _published(
            f"turboquant-{bits}", TurboQuant(bits), TurboQuant(bits), f"TurboQuant: rotation and {bits}-bit levels"
        )
        for bits in (1, 2, 2.5, 3, 3.5, 4)
    ),
    *(
        _published(
            f"turboquant-prod-{bits}",
            TurboQuant(bits, "prod"),
            TurboQuant(bits),
            f"TurboQuant, one of the keys' {bits} bits for a QJL residual",
        )
        for bits in (1, 2, 3, 4)
    ),
    _published("polarquant", PolarQuant(), PolarQuant(), "PolarQuant: rotation, four levels of angles"),
    *(
        _published(
            f"rabitq-{bits}", RaBitQ(bits), RaBitQ(bits), f"RaBitQ: centred, rotated, a {bits}-bit grid, an exact scale"
        )
        for bits in (1, 2, 3, 4)
    ),
    _published(
        "turboesm",
        TurboESM(),
        TurboESM(residual=False),
        "TurboESM: singular vectors, calibrated levels, 3 bits and a residual sign",
    ),
    _published(
        "vidkv",
        VidKVKeys(),
        VidKVValues(),
        "VidKV: 1.5-bit keys, half of them as spectra, ternary values",
        recent=128,
    ),
    _published(
        "calibquant",
        CalibQuant(0.5),
        CalibQuant(0.3),
        "CalibQuant without g: one bit, narrowed extremes per channel, for visual tokens",
    ),
    _published(
        "oscar",
        OSCAR(),
        OSCAR(),
        "OSCAR: rotations by what attention reads, clipped 2 bits",
        sinks=64,
        recent=256,
    ),
    _published("int8", Int8(), Int8(), "8 bits as engines do: integers, a scale per token"),
    _published("fp8", Fp8(), Fp8(), "8 bits as engines do: float8 e4m3, not scaled"),
)
PRESETS: dict[str, CacheConfig] = {preset.name: preset for preset in _ALL}
DEFAULT_PRESET = "b3"


def resolve(preset: str | Path | CacheConfig) -> CacheConfig:
    """A configuration from a preset's name, a JSON file, or a configuration itself.

    Raises:
        QJLError: for an unknown name, a missing or malformed file, or a field that no method has.
    """
    if isinstance(preset, CacheConfig):
        return preset
    if isinstance(preset, str) and preset in PRESETS:
        return PRESETS[preset]
    path = Path(preset)
    if path.suffix == ".json":
        return from_dict(_read_json(path), name=path.stem)
    raise QJLError(f"unknown preset {str(preset)!r}: choose one of {', '.join(PRESETS)}, or give a .json file.")


def from_dict(fields: Any, name: str = "custom") -> CacheConfig:
    """The inverse of ``to_dict``."""
    if not isinstance(fields, dict) or not {"key", "value"} <= set(fields):
        raise QJLError(f"preset {name!r} needs the fields key and value, each with a method.")
    known = {field.name for field in dataclasses.fields(CacheConfig)}
    _reject_unknown(set(fields) - known, known, f"preset {name!r}")
    fields = {"name": name} | fields
    fields["key"], fields["value"] = _quantizer(fields["key"], name), _quantizer(fields["value"], name)
    if not isinstance(fields.get("overrides", []), list):
        raise _wrong_type(name, f"overrides = {fields['overrides']!r}")
    fields["overrides"] = tuple(_override(one, name) for one in fields.get("overrides", []))
    return _build(CacheConfig, fields, name)


def to_dict(config: CacheConfig) -> dict[str, Any]:
    """Plain numbers and strings, for JSON."""
    return {
        "name": config.name,
        "summary": config.summary,
        "paper": config.paper,
        "key": _quantizer_fields(config.key),
        "value": _quantizer_fields(config.value),
        "sinks": config.sinks,
        "recent": config.recent,
        "pre_rope": config.pre_rope,
        "overrides": [
            {"first": one.first, "stop": one.stop}
            | {role: _quantizer_fields(getattr(one, role)) for role in ("key", "value") if getattr(one, role)}
            for one in config.overrides
        ],
    }


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QJLError(f"preset file {path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise QJLError(f"preset file {path} is not readable JSON: {error}.") from error


def _quantizer_fields(quantizer: Quantizer) -> dict[str, Any]:
    return {"method": quantizer.method} | dataclasses.asdict(quantizer)  # type: ignore[call-overload]


def _quantizer(fields: Any, name: str) -> Quantizer:
    if isinstance(fields, dict) and not isinstance(fields.get("method", ""), str):
        raise _wrong_type(name, f"method = {fields['method']!r}")
    if not isinstance(fields, dict) or fields.get("method") not in METHODS:
        raise QJLError(f"preset {name!r} needs a method for keys and values, one of {', '.join(METHODS)}.")
    method = METHODS[fields["method"]]
    settings = {field: value for field, value in fields.items() if field != "method"}
    known = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    _reject_unknown(set(settings) - known, known, f"method {method.method!r} in preset {name!r}")
    return _build(method, settings, name)


def _override(fields: Any, name: str) -> LayerOverride:
    if not isinstance(fields, dict):
        raise QJLError(f"each override in preset {name!r} needs the fields first and stop.")
    known = {field.name for field in dataclasses.fields(LayerOverride)}
    _reject_unknown(set(fields) - known, known, f"an override in preset {name!r}")
    roles = {role: _quantizer(fields[role], name) for role in ("key", "value") if role in fields}
    return _build(LayerOverride, fields | roles, name)


def _reject_unknown(unknown: set[str], known: set[str], where: str) -> None:
    if unknown:
        raise QJLError(f"{where} has no field {sorted(unknown)[0]!r}: it takes {', '.join(sorted(known))}.")


def _build(cls: Any, fields: dict[str, Any], name: str) -> Any:
    types = {field.name: _PLAIN_TYPES.get(field.type) for field in dataclasses.fields(cls)}
    for field, value in fields.items():
        expected = types[field]
        if expected and (not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected)):
            raise _wrong_type(name, f"{field} = {value!r}")
    try:
        return cls(**fields)
    except TypeError as error:
        raise QJLError(f"preset {name!r} misses a field: {error}.") from error


_PLAIN_TYPES: dict[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def _wrong_type(name: str, what: str) -> QJLError:
    return QJLError(f"preset {name!r} has a value of the wrong type: {what}.")
