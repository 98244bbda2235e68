"""A tiny random model of any family that transformers has, from the family's own default configuration.

Widths become one number, so that parts that must fit each other do: text and vision, projections, experts. Layers are
cut to the first one of each type. What a family needs beside that is data, in ``qjl.lab.evals.corrections``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from qjl.lab.evals.corrections import CORRECTIONS, NEEDED

Fields = dict[str, Any]
TASKS: dict[str, Mapping[str, str]] = {  # the model's class of each family
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
HEADS, HEAD_DIM = 4, 64
WIDTH = HEADS * HEAD_DIM
VOCABULARY = 256
WORDS = range(8, 192)  # tokens that mean nothing to any family; special ones lie before and behind
LAYERS = range(2, 7)
GAIN = 1.5  # of a linear map: at the usual deviation of 0.02 the context hardly matters

_WIDTHS = {  # by the whole of a name; the first that fits counts
    r"qk_head_dim": 2 * HEAD_DIM,
    r"rotary_dim": HEAD_DIM // 2,
    r".*head_?dim|d_head|dim_head|d_kv|kv_channels|mamba_d_head|attention_head_size": HEAD_DIM,
    r"(.*_)?heads|n_heads?|.*_n_heads|.*num_attention_heads": HEADS,
    r"(.*_)?hidden_size(_.*)?|d_model|n_embd|(.*_)?embed_dim|emb_dim|embedding_(dim|size)|lru_width|d_inner": WIDTH,
    r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|n_inner|.*ffn_hidden_size|mlp_dim|feed_forward_size": WIDTH,
    r".*(projection|proj|output|input)_dim|.*(projector_.*|adapter_(in|out))_dim": WIDTH,
    r".*(input|output|pooler|projector)_size": WIDTH,
    r"mamba_d_ssm": 2 * WIDTH,
    r"query_pre_attn_scalar": HEAD_DIM,
    r".*(position_embeddings|_positions)|seq_len|max_seq_len|model_max_length|n_positions|n_ctx|context_length": 1024,
}
_LIMITS = {
    r".*vocab_size.*|n_words": VOCABULARY,
    r".*sliding_window(_size)?|local_attention|attention_(chunk|window)_size|window_size": 64,
    r"mamba_(n|num)_heads": 2 * HEADS,
    r".*_rank": 32,
    r".*state_size|.*d_state": 16,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_(topk|k|top_k)|top_k_experts": 2,
    r".*shared_experts|n_groups?|num_expert_group|topk_group": 1,
    r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers": 1,
}
_KV_HEADS = re.compile(r".*num_key_value_heads|num_kv_heads|kv_n_heads")
_DEPTHS = re.compile(r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth")
_INDEXES = re.compile(r".*(layers|indexes|indices|idxs|layer_ids)")
_SPECIAL = re.compile(r".*_token_(id|index)|.*_id")
_USUAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SET = {
    "tie_word_embeddings": False,  # else each token's own logit hides all others
    "is_decoder": True,
    "use_cache": True,
    "logit_scale": 1.0,
    "attention_multiplier": HEAD_DIM**-0.5,
}
_FORCED = ("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens")
_NOT_ASKED = {"transformers_version", "_name_or_path", "architectures", "id2label", "label2id", "dtype"}


def families(task: str) -> list[str]:
    """All that transformers has for a task, by name."""
    return sorted(TASKS[task])


def class_of(family: str, task: str) -> str:
    """The name of the model's class."""
    return TASKS[task][family]


def build(family: str, task: str) -> PreTrainedModel:
    """A model with random weights, the same each time, in float32."""
    torch.manual_seed(0)
    kind = getattr(transformers, class_of(family, task))
    model: PreTrainedModel = kind._from_config(_part(configuration(family), kind.config_class), dtype=torch.float32)
    redraw(model)
    if settings := getattr(model, "generation_config", None):
        settings.update(bos_token_id=1, eos_token_id=None, pad_token_id=0, **dict.fromkeys(_FORCED))
    return model.eval().requires_grad_(False)


def configuration(family: str) -> PreTrainedConfig:
    """The family's default configuration, shrunk."""
    kind, corrections = CONFIG_MAPPING[family], CORRECTIONS.get(family, {})
    fields = kind(**NEEDED.get(family, {})).to_dict()
    return kind(**_merged(_shrunk(fields, _special_tokens(fields)), corrections))


def _part(config: PreTrainedConfig, kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Of a configuration, the part that a model takes."""
    parts = (getattr(config, name) for name in config.sub_configs)
    return config if isinstance(config, kind) else next((part for part in parts if isinstance(part, kind)), config)


@torch.no_grad()
def redraw(model: PreTrainedModel) -> None:
    """New weights, large enough for what is far away to matter."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D):
            weight = module.weight
            inputs = weight[0].numel() if isinstance(module, nn.modules.conv._ConvNd) else weight.shape[-1]
            weight.normal_(std=GAIN * inputs**-0.5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "expert" in name:
            parameter.normal_(std=GAIN * parameter.shape[-1] ** -0.5)


def _shrunk(fields: Fields, tokens: Mapping[str, int]) -> Fields:
    """Of a configuration or a part of one; what is no size stays."""
    kept = _layers(fields)
    asked = {name: value for name, value in fields.items() if name not in _NOT_ASKED}
    return {name: _value(name, value, fields, kept, tokens) for name, value in asked.items()}


def _value(name: str, value: Any, fields: Fields, kept: list[int], tokens: Mapping[str, int]) -> Any:
    if name in _SET:
        return _SET[name]
    if name == "head_dim" and value is None:
        return HEAD_DIM
    if name in ("rope_parameters", "rope_scaling"):
        return _rope(value)
    if name == "per_layer_config" and value:
        return _per_layer(value, kept)
    if _is_fields(value):
        return _shrunk(value, tokens)
    if isinstance(value, list):
        return _list(name, value, _depth(fields), kept)
    if name in tokens and isinstance(value, int):
        return tokens[name]
    if type(value) is not int or value == 0:
        return value
    return _size(name, value, fields, kept)


def _per_layer(settings: Fields, kept: list[int]) -> dict[int, Fields]:
    """What layers have of their own: twice of what the others have, where that is a width."""
    return {
        kept.index(int(layer)): {name: 2 * (_of(name, _WIDTHS) or 0) or value for name, value in own.items()}
        for layer, own in settings.items()
        if int(layer) in kept
    }


def _size(name: str, value: int, fields: Fields, kept: list[int]) -> int:
    if _DEPTHS.fullmatch(name):
        return len(kept)
    if _KV_HEADS.fullmatch(name):
        return _kv_heads(value, fields)
    if name in ("image_size", "crop_size"):
        return 4 * fields["patch_size"] if isinstance(fields.get("patch_size"), int) else HEAD_DIM
    limit = _of(name, _LIMITS)
    return min(value, limit) if limit is not None else _of(name, _WIDTHS) or value


def _of(name: str, table: Mapping[str, int]) -> int | None:
    return next((size for pattern, size in table.items() if re.fullmatch(pattern, name)), None)


def _kv_heads(count: int, fields: Fields) -> int:
    """One, some or all heads stay that."""
    heads = [fields[name] for name in ("num_attention_heads", "n_heads", "n_head") if fields.get(name)]
    return {1: 1, heads[0] if heads else 0: HEADS}.get(count, HEADS // 2)


def _list(name: str, values: list[Any], depth: int, kept: list[int]) -> list[Any]:
    if name == "eos_token_id":
        return [2]
    if _is_indexes(name, values, depth):
        return [kept.index(index) for index in values if index in kept]
    return [values[index] for index in kept] if depth and len(values) == depth else values


def _is_indexes(name: str, values: list[Any], depth: int) -> bool:
    is_ascending = all(type(one) is int for one in values) and values == sorted(set(values))
    return bool(_INDEXES.fullmatch(name) and is_ascending and values and values[-1] < depth)


def _depth(fields: Fields) -> int:
    return next((v for name, v in fields.items() if _DEPTHS.fullmatch(name) and type(v) is int), 0)


def _layers(fields: Fields) -> list[int]:
    """The first layer of each type, as far as lists tell of types."""
    depth = _depth(fields)
    types = list(zip(*_types(fields, depth), strict=True)) or [()] * depth
    firsts = {types.index(one) for one in types}
    others = [index for index in range(depth) if index not in firsts]
    return sorted([*sorted(firsts), *others[: max(0, LAYERS.start - len(firsts))]][: LAYERS.stop - 1])


def _types(fields: Fields, depth: int) -> Iterator[Iterable[Any]]:
    for name, value in fields.items():
        if name == "per_layer_config" and value:
            own = {int(layer): str(settings) for layer, settings in value.items()}
            yield [own.get(index) for index in range(depth)]
        elif isinstance(value, list) and _is_indexes(name, value, depth):
            yield [index in value for index in range(depth)]
        elif (
            isinstance(value, list) and len(value) == depth and all(isinstance(one, str | int | float) for one in value)
        ):
            yield value


def _rope(parameters: Any) -> Any:
    """Sections of M-RoPE that fill the smaller head."""
    if parameters is None:
        return None
    found = {name: _rope(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    if sections := found.get("mrope_section"):
        half = int(HEAD_DIM // 2 * found.get("partial_rotary_factor", 1))
        scaled = [half * section // sum(sections) for section in sections]
        found["mrope_section"] = [half - sum(scaled[1:]), *scaled[1:]]
    return found


def _special_tokens(fields: Fields) -> dict[str, int]:
    """Numbers behind the words, the same wherever a name stands."""
    names = sorted(set(_special_names(fields)) - _USUAL.keys())
    return _USUAL | {name: WORDS.stop + number for number, name in enumerate(names)}


def _special_names(fields: Fields) -> Iterator[str]:
    for name, value in fields.items():
        if name not in _NOT_ASKED and _is_fields(value):
            yield from _special_names(value)
        elif _SPECIAL.fullmatch(name) and type(value) is int and value >= WORDS.start:
            yield name


def _is_fields(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _merged(fields: Fields, corrections: Fields) -> Fields:
    """Corrections win; in parts of a configuration, field by field."""
    both = {
        name: _merged(fields[name], value) if _is_fields(fields.get(name)) and _is_fields(value) else value
        for name, value in corrections.items()
    }
    return fields | both
