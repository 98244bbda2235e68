"""What a GGUF file's metadata say of the numbers a model computes, where transformers does not read it.

Each entry is put in the configuration, says what holds anyway, or is refused by its name; none is passed over. What
transformers reads is taken as it is, but for RoPE and the sizes of heads, which it reads for some kinds alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedConfig

from qjl.compat import gguf_reader
from qjl.errors import QJLError

if TYPE_CHECKING:
    from gguf import GGUFReader

_FREQUENCIES = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_READ_HERE = {  # as a whole, by the functions below
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_IDLE = {"rope.scaling.finetuned", "tensor_data_layout", "vocab_size", "embedding_length_out"}
_ENTRIES = {  # of configurations, by that of the file; a kind of model has one of them, or none
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length_swa": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.value_length_swa": ("head_dim",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "context_length": ("max_position_embeddings",),
    "embedding_length_per_layer_input": ("hidden_size_per_layer_input",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "feed_forward_length": ("n_inner", "ffn_hidden_size", "intermediate_size"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values that change nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (1,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
_ALIBI = {"bloom"}
_PARTIAL = {"nemotron", "phi3", "stablelm"}  # models whose RoPE may turn a part of each head
_WINDOWED = {"gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "mistral", "phi3"}
_SCALED_BY_HEAD = {"gemma2": 46, "gemma3_text": 62}  # layers of the one size that scales by hidden_size per head
_OWN_HEADS = {"gemma4_text", "minimax_m2"}  # models of several sizes of heads, or of a rotary width by name


@dataclass(frozen=True)
class _File:
    path: str
    architecture: str
    entries: Mapping[str, Any]  # without the name of the architecture
    factors: Mapping[str, list[float]]  # of RoPE, by the names of their tensors

    def refusal(self, key: str, why: str = "which this kind of model does not have here") -> QJLError:
        value = self.entries.get(key)
        told = "" if value is None or isinstance(value, list) else f" = {value}"
        name = f"{self.architecture}.{key}" if key in self.entries else key
        return QJLError(
            f"{self.path} says {name}{told}, {why}: give the model as a folder with config.json and safetensors."
        )


def require_readable(reader: GGUFReader, path: str) -> None:
    """Before transformers reads a file's configuration.

    Raises:
        QJLError: if the file is one of several, or its layers differ in a way that it does not tell apart.
    """
    file = _read(reader, path)
    parts = reader.fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise QJLError(f"{path} is one of {parts.contents()} files: join them with llama-gguf-split --merge first.")
    if file.architecture in gguf_reader("GGUF_CONFIG_ARCHS"):
        return
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(file.entries.get(key), list):
            raise file.refusal(key, "which differs from layer to layer")


def complete(config: PreTrainedConfig, reader: GGUFReader, path: str) -> None:
    """Put in a configuration what transformers leaves out of a file's metadata.

    Raises:
        QJLError: if an entry changes what is computed, and the kind of model cannot have it.
    """
    file = _read(reader, path)
    if file.architecture in gguf_reader("GGUF_CONFIG_ARCHS"):
        _require_all_read(file)
        return
    if hasattr(config, "num_attention_heads"):
        if config.model_type not in _OWN_HEADS:
            _set_heads(config, file)
        _set_attention_scale(config, file)
    _set_window(config, file)
    _set_rope(config, file)
    known = _read_by_transformers(config) | _READ_HERE | _IDLE | {"attention.sliding_window", "attention.scale"}
    for key in file.entries.keys() - known:
        _set_entry(config, file, key)


def _read(reader: GGUFReader, path: str) -> _File:
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}."
    entries = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    factors = {
        tensor.name: tensor.data.tolist() for tensor in reader.tensors if tensor.name in (_FREQUENCIES, _LONG, _SHORT)
    }
    return _File(path, architecture, entries, factors)


def _read_by_transformers(config: PreTrainedConfig) -> set[str]:
    kind = config.model_type.removesuffix("_text")
    names = cast(Mapping[str, Mapping[str, str | None]], gguf_reader("GGUF_CONFIG_MAPPING")).get(kind, {})
    return {key for key, name in names.items() if name is not None}


def _require_all_read(file: _File) -> None:
    """For the kinds of models whose whole configuration transformers makes of the metadata."""
    metadata, tensors = gguf_reader("read_gguf_metadata")(file.path)
    asked = _Asked(metadata)
    gguf_reader("get_gguf_config")(asked, tensors)
    known = {key.removeprefix(f"{file.architecture}.") for key in asked.keys_asked} | _IDLE | {"attention.value_length"}
    for key in file.entries.keys() - known:
        if file.entries[key] not in _NEUTRAL.get(key, ()):
            raise file.refusal(key)


class _Asked(dict[str, Any]):
    """A dictionary that remembers what it was asked for."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        super().__init__(entries)
        self.keys_asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)


def _set_entry(config: PreTrainedConfig, file: _File, key: str) -> None:
    value = file.entries[key]
    name = next((name for name in _ENTRIES.get(key, ()) if hasattr(config, name)), None)
    if key in _ENTRIES_OF_WINDOWS:
        _ENTRIES_OF_WINDOWS[key](config, file, key)
    elif name is not None:
        setattr(config, name, value)
    elif value not in _NEUTRAL.get(key, ()) and not (key.endswith("max_alibi_bias") and config.model_type in _ALIBI):
        raise file.refusal(key)


# Heads


def _head_dim(config: PreTrainedConfig, file: _File) -> int:
    implied = config.hidden_size // config.num_attention_heads
    return int(file.entries.get("attention.key_length", implied))


def _set_heads(config: PreTrainedConfig, file: _File) -> None:
    head_dim = _head_dim(config, file)
    if file.entries.get("attention.value_length", head_dim) != head_dim:
        raise file.refusal("attention.value_length", f"and its keys have {head_dim}")
    if head_dim != getattr(config, "head_dim", config.hidden_size // config.num_attention_heads):
        config.head_dim = head_dim
    turned = file.entries.get("rope.dimension_count", head_dim)
    if config.model_type in _PARTIAL:
        config.rope_parameters["partial_rotary_factor"] = turned / head_dim
        config.partial_rotary_factor = turned / head_dim
    elif turned != head_dim:
        raise file.refusal("rope.dimension_count", f"and its heads have {head_dim}")


def _set_window(config: PreTrainedConfig, file: _File) -> None:
    key = "attention.sliding_window"
    window = file.entries.get(key) or None
    if config.model_type in _WINDOWED:
        config.sliding_window = config.sliding_window if window is None and config.model_type != "mistral" else window
    elif window is not None and window < file.entries.get("context_length", 0):
        raise file.refusal(key)


def _set_pattern(config: PreTrainedConfig, file: _File, key: str) -> None:
    """Which layers have a window: one flag for each, or every how many layers one has none."""
    pattern, layers = file.entries[key], range(config.num_hidden_layers)
    flags = pattern if isinstance(pattern, list) else [bool(pattern) and (layer + 1) % pattern != 0 for layer in layers]
    if not hasattr(config, "layer_types") or len(flags) != len(layers):
        raise file.refusal(key)
    config.layer_types = ["sliding_attention" if flag else "full_attention" for flag in flags]


def _set_theta_of_windows(config: PreTrainedConfig, file: _File, key: str) -> None:
    parameters = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if parameters is None:
        raise file.refusal(key)
    parameters["rope_theta"] = file.entries[key]


def _require_whole_heads(config: PreTrainedConfig, file: _File, key: str) -> None:
    head_dim = file.entries.get("attention.key_length_swa", getattr(config, "head_dim", None))
    if file.entries[key] != head_dim:
        raise file.refusal(key, f"and its heads have {head_dim}")


_ENTRIES_OF_WINDOWS: Mapping[str, Callable[[PreTrainedConfig, _File, str], None]] = {
    "attention.sliding_window_pattern": _set_pattern,
    "rope.dimension_count_swa": _require_whole_heads,
    "rope.freq_base_swa": _set_theta_of_windows,
}


def _set_attention_scale(config: PreTrainedConfig, file: _File) -> None:
    head_dim, stated = _head_dim(config, file), file.entries.get("attention.scale")
    if hasattr(config, "query_pre_attn_scalar"):
        is_largest = config.num_hidden_layers == _SCALED_BY_HEAD.get(config.model_type)
        implied = config.hidden_size // config.num_attention_heads if is_largest else head_dim
        config.query_pre_attn_scalar = stated**-2 if stated else implied
    elif stated and not math.isclose(stated, head_dim**-0.5, rel_tol=1e-5):
        raise file.refusal("attention.scale")


# RoPE


def _set_rope(config: PreTrainedConfig, file: _File) -> None:
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        stated = [key for key in [*file.entries, *file.factors] if key.startswith("rope") and key not in _IDLE]
        if stated:
            raise file.refusal(stated[0])
        return
    whole = parameters.get("full_attention", parameters)
    if "rope.freq_base" in file.entries:
        whole["rope_theta"] = file.entries["rope.freq_base"]
    if whole.get("rope_type") == "proportional":
        _require_proportion(whole, file)
        return
    scaling = _scaling(config, file)
    if scaling is not None:
        kept = {key: whole[key] for key in ("rope_theta", "partial_rotary_factor", "truncate") if key in whole}
        whole.clear()
        whole.update(kept | scaling)


def _require_proportion(parameters: Mapping[str, Any], file: _File) -> None:
    """Gemma 4 turns a part of its frequencies, and the file holds the others still."""
    factors = file.factors.get(_FREQUENCIES, [])
    turned = sum(factor == 1.0 for factor in factors)
    if turned != len(factors) * parameters.get("partial_rotary_factor", 1.0):
        raise file.refusal(_FREQUENCIES, "of other frequencies than this kind of model turns")


def _scaling(config: PreTrainedConfig, file: _File) -> dict[str, Any] | None:
    """RoPE parameters of the scaling that a file states; None for none."""
    kind = "longrope" if _LONG in file.factors else file.entries.get("rope.scaling.type", "linear")
    if _FREQUENCIES in file.factors:
        if _factor(file) != 1.0 or _LONG in file.factors:
            raise file.refusal(_FREQUENCIES, "beside another scaling of RoPE")
        return _of_frequencies(config, file)
    if kind not in _SCALINGS:
        raise file.refusal("rope.scaling.type", f"and only {', '.join(_SCALINGS)} are known")
    return _SCALINGS[kind](config, file)


def _factor(file: _File) -> float:
    if file.entries.get("rope.scaling.type") == "none":
        return 1.0
    stated = file.entries.get("rope.scaling.factor", file.entries.get("rope.scale_linear", 0.0))
    return float(stated) or 1.0


def _attention_factor(file: _File) -> float:
    stated = file.entries.get("rope.scaling.yarn_attn_factor", file.entries.get("rope.scaling.attn_factor", 1.0))
    return float(stated)


def _original_length(config: PreTrainedConfig, file: _File) -> int:
    return int(file.entries.get("rope.scaling.original_context_length", config.max_position_embeddings))


def _none(config: PreTrainedConfig, file: _File) -> None:
    if _attention_factor(file) != 1.0:
        raise file.refusal("rope.scaling.attn_factor", "and its RoPE is not scaled so")


def _linear(config: PreTrainedConfig, file: _File) -> dict[str, Any] | None:
    _none(config, file)
    factor = _factor(file)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _yarn(config: PreTrainedConfig, file: _File) -> dict[str, Any]:
    factor = _factor(file)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(config, file),
        "attention_factor": _attention_factor(file) * (0.1 * math.log(factor) + 1.0),
        "beta_fast": float(file.entries.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(file.entries.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _longrope(config: PreTrainedConfig, file: _File) -> dict[str, Any]:
    if file.factors.keys() != {_LONG, _SHORT}:
        raise file.refusal("rope.scaling.type", f"without {_LONG} and {_SHORT}")
    config.original_max_position_embeddings = _original_length(config, file)
    return {
        "rope_type": "longrope",
        "short_factor": file.factors[_SHORT],
        "long_factor": file.factors[_LONG],
        "attention_factor": _attention_factor(file),
        "original_max_position_embeddings": config.original_max_position_embeddings,
    }


def _of_frequencies(config: PreTrainedConfig, file: _File) -> dict[str, Any]:
    """Those of Llama 3 are stated one by one; so does longrope, which here is one set at any length."""
    factors = file.factors[_FREQUENCIES]
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


_SCALINGS: Mapping[str, Callable[[PreTrainedConfig, _File], dict[str, Any] | None]] = {
    "none": _none,
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
}
