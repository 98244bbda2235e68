"""What a transformers configuration says about its cache: layers, heads, RoPE."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qjl import compat
from qjl.errors import QJLError
from qjl.rope import Rope

FULL_ATTENTION = "full_attention"
_PROBED_POSITIONS = (0, 1, 7, 101)


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer's cache: ``kind`` as transformers names it; a window bounds its tokens.

    Cross-attention holds tokens of an image or a sound in place of the text's.
    """

    index: int
    kind: str
    num_key_value_heads: int
    head_dim: int
    window: int | None = None
    is_cross_attention: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether a ``KVCache`` quantizes it; other layers stay as transformers has them."""
        return self.kind == FULL_ATTENTION


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The decoder's part of a configuration."""
    if getattr(config, "is_encoder_decoder", False):
        raise QJLError(f"{config.model_type} is an encoder-decoder model: only decoder-only models are supported.")
    return config.get_text_config(decoder=True)


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """Every layer's cache, from the configuration alone.

    Raises:
        QJLError: if no layer has full attention, so that there is nothing to quantize.
    """
    decoder = text_config(config)
    name = config.model_type
    layers = compat.of_each_layer(decoder)
    if not _some_have(layers, "num_attention_heads"):
        raise QJLError(f"{name} has no attention layers: there is no key-value cache to quantize.")
    if _some_have(layers, "kv_lora_rank"):
        raise QJLError(f"{name} caches latents in place of keys and values: such a cache cannot be quantized.")
    kinds, settings = compat.get_layer_types_and_kwargs(decoder)
    crossing = set(getattr(decoder, "cross_attention_layers", None) or ())
    shapes = [
        LayerShape(
            index,
            kind,
            getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads,
            getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads,
            setting.get("sliding_window"),
            index in crossing,
        )
        # layers beyond the kinds share the keys of others
        for index, (kind, setting, layer) in enumerate(zip(kinds, settings, layers, strict=False))
    ]
    if not any(shape.is_quantized for shape in shapes):
        found = ", ".join(sorted(set(kinds)))
        raise QJLError(f"{name} has no full-attention layers (only {found}): there is nothing to quantize.")
    return shapes


def _some_have(layers: Iterable[PreTrainedConfig], name: str) -> bool:
    """Asked of the layers, since a configuration whose layers differ in it does not tell."""
    return any(getattr(layer, name, None) is not None for layer in layers)


def find_rope(config: PreTrainedConfig, layer_kind: str = FULL_ATTENTION) -> Rope | None:
    """The model's own RoPE, read from its code and checked against it; None where no fixed R_n describes it.

    Without it keys are centred after RoPE: still exact in expectation, with larger codes.
    """
    decoder = text_config(config)
    if _grows(_rope_parameters(decoder, layer_kind)):
        return None
    try:
        module = importlib.import_module(type(decoder).__module__.replace("configuration_", "modeling_"))
        embedding = _rotary_embedding(module, decoder)
        if getattr(embedding, "mrope_section", None):
            return None  # M-RoPE: positions of image tokens are not those of their storage
        inv_freq, scaling = (_per_kind(embedding, layer_kind, name) for name in ("inv_freq", "attention_scaling"))
        true = _probe(module, embedding, inv_freq, layer_kind)
    except (ImportError, AttributeError, TypeError, LookupError, ValueError, RuntimeError):
        return None  # another design of RoPE, or none: both mean there is no R_n to use
    for interleaved in (False, True):
        rope = Rope(inv_freq.float().cpu(), float(scaling), interleaved)
        if torch.allclose(rope.rotate(*_basis(rope.rotary_dim)), true, atol=1e-3):
            return rope
    return None


def ropes_of(config: PreTrainedConfig) -> dict[int, Rope | None]:
    """The RoPE of each layer that is quantized."""
    return {shape.index: find_rope(config, shape.kind) for shape in layer_shapes(config) if shape.is_quantized}


def rope_is_used(config: PreTrainedConfig) -> bool:
    """Whether the configuration speaks of RoPE in layers of full attention, of any kind."""
    decoder = text_config(config)
    return bool(_rope_parameters(decoder, FULL_ATTENTION) or getattr(decoder, "rotary_dim", None))


def _rope_parameters(decoder: PreTrainedConfig, layer_kind: str) -> dict[str, Any]:
    parameters = getattr(decoder, "rope_parameters", None) or {}
    return parameters.get(layer_kind, parameters) or {}


def _grows(parameters: dict[str, Any]) -> bool:
    """Whether the frequencies change with the length of the sequence."""
    kind = parameters.get("rope_type")
    return kind == "dynamic" or (kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor"))


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None where its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def drops_cache_at(decoder: PreTrainedConfig) -> int | None:
    """The length of a text beyond which its model reads it anew, with other frequencies (LongRoPE); None: never."""
    return getattr(decoder, "original_max_position_embeddings", None)


def _rotary_embedding(module: ModuleType, decoder: PreTrainedConfig) -> Any:
    prefix = type(decoder).__name__.removesuffix("Config").removesuffix("Text")
    names = [name for name in vars(module) if name.endswith("RotaryEmbedding") and "Vision" not in name]
    names.sort(key=lambda name: not name.startswith(prefix))
    return getattr(module, names[0])(config=decoder)


def _per_kind(embedding: Any, layer_kind: str, name: str) -> Any:
    """Models with several RoPEs prefix their buffers with the layer kind."""
    own = getattr(embedding, f"{layer_kind}_{name}", None)
    return own if own is not None else getattr(embedding, name)


def _basis(rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Unit vectors at the probed positions: ``[1, rotary_dim, P, rotary_dim]`` and ``[1, P]``."""
    positions = torch.tensor([_PROBED_POSITIONS], dtype=torch.int64)
    unit = torch.eye(rotary_dim, dtype=torch.float32)[None, :, None, :].expand(1, -1, positions.shape[1], -1)
    return unit, positions


def _probe(module: ModuleType, embedding: Any, inv_freq: Tensor, layer_kind: str) -> Tensor:
    unit, positions = _basis(2 * inv_freq.shape[0])
    has_kinds = hasattr(embedding, f"{layer_kind}_inv_freq")
    arguments = (unit, positions, layer_kind) if has_kinds else (unit, positions)
    cos, sin = embedding(*arguments)
    return module.apply_rotary_pos_emb(unit, unit, cos, sin)[1]
