"""A name for what a model computes: the same for the same model, wherever and in whatever dtype it is loaded.

It covers the configuration, a sample of every tensor, the kinds of modules with the numbers they were given, and the
adapters at work. Modules are described under the names they have without adapters, so that a model whose adapters are
off has the name of the model without them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qjl import compat
from qjl.errors import QJLError

FORMAT = 2
_SAMPLES = 16  # of a tensor that is large
_SMALL = 256  # numbers of a tensor that is taken whole
_STORED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_IDLE_ENTRIES = {  # of a configuration: they change nothing that a model computes
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "experts_implementation",
    "finetuning_task",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}
_IDLE_ATTRIBUTES = {
    "compute_type_is_set",  # these two by bitsandbytes, when it first runs
    "gradient_checkpointing",
    "padding_idx",
    "support_avx512bf16_for_cpu",
    "training",
}
_GROWING_ROPES = {"dynamic", "longrope"}
_HARMLESS_OWNERS = {"accelerate", "bitsandbytes", "peft", "qjl", "torch", "transformers"}


class Unnamed(QJLError):
    """A model whose computation has no name: nothing about it can be kept on disk."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason}, so that nothing tells this model from others: its caches, statistics and choices cannot be "
            "kept on disk."
        )


def digest(value: Any) -> str:
    """A short name, the same for equal JSON: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(model: PreTrainedModel) -> str:
    """A name for what this model computes, 32 hexadecimal digits; neither its dtype nor its device matter.

    Raises:
        QJLError: if part of it is not here or cannot be read: weights that are sharded over processes, offloaded or
            packed by torch, functions and hooks of others that replace what a module does.
    """
    unwrapped = _unwrapped(model)
    digest = hashlib.sha256(_as_json([FORMAT, _entries(unwrapped.config)]))
    parts = [_part(name, module, adapters) for name, module, adapters in _walk(unwrapped, "", None, set())]
    for part in sorted(parts, key=lambda part: part.name):
        digest.update(_as_json([part.name, part.kind, part.numbers]))
        for name, tensor in sorted(part.tensors.items()):
            digest.update(_as_json([name, list(tensor.shape)]))
            digest.update(_sampled(tensor))
    return digest.hexdigest()[:32]


def fingerprint_or_none(model: PreTrainedModel) -> str | None:
    """The same; None for a model that has none."""
    try:
        return fingerprint(model)
    except Unnamed:
        return None


def fingerprint_of_folder(folder: Path) -> str | None:
    """The fingerprint that the model in a folder will have, from some pages of its files; None where transformers
    makes its parameters of other tensors than the files have.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    compat.compute_buffers(model)
    _take_weights(model, _stored_tensors(folder))
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return None
    return fingerprint(model)


def _as_json(value: Any) -> bytes:
    return json.dumps(_numbered(value), sort_keys=True, default=str).encode()


def _numbered(value: Any) -> Any:
    """With whole numbers written in one way, and keys as text."""
    if isinstance(value, dict):
        return {str(key): _numbered(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbered(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _sampled(tensor: Tensor) -> bytes:
    """Floating-point numbers in bfloat16, so that the dtype a model is loaded in does not matter."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    if flat.numel() > _SMALL:
        flat = flat[:: flat.numel() // _SAMPLES][:_SAMPLES]
    sample = flat.cpu()
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return sample.contiguous().view(torch.uint8).numpy().tobytes()


# Configurations


def _entries(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says that is not the default, so that new entries of another version change nothing."""
    return {"model_type": config.model_type} | _unlike(config.to_dict(), _defaults(cast(Hashable, type(config))))


@functools.cache
def _defaults(kind: Any) -> dict[str, Any]:
    try:
        return kind().to_dict()
    except (TypeError, ValueError, LookupError, AttributeError):  # some must be told more
        return {}


def _unlike(entries: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, entry in entries.items():
        default = defaults.get(name)
        if name.startswith("_") or name in _IDLE_ENTRIES or entry == default:
            continue
        if isinstance(entry, dict) and isinstance(default, dict) and "model_type" in default:
            is_same_kind = entry.get("model_type") == default["model_type"]
            entry = {"model_type": entry.get("model_type")} | _unlike(entry, default if is_same_kind else {})
        found[name] = entry
    return found


# Modules


Adapters = frozenset[str] | None  # those at work; None outside of any adapter
Found = tuple[str, nn.Module, Adapters]


@dataclass(frozen=True)
class _Part:
    """What a module is without those inside it: its kind, the numbers and the tensors that it was given."""

    name: str
    kind: str
    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


def _unwrapped(model: Any) -> PreTrainedModel:
    """Without what torch.compile and PEFT put around a model."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise Unnamed("an adapter puts tokens of its own before each prompt")
    inner = getattr(model, "_orig_mod", None) or (model.get_base_model() if hasattr(model, "get_base_model") else None)
    return model if inner is None else _unwrapped(inner)


def _walk(module: nn.Module, name: str, adapters: Adapters, seen: set[int]) -> Iterator[Found]:
    """Modules under the names that they have without adapters, and behind each what the adapters at work there are."""
    if id(module) in seen:
        return
    seen.add(id(module))
    inner, active = _adapted(module)
    if inner is not None:
        yield from _walk(inner, name, None, seen)
        if not active:
            return
        name, adapters = f"{name}.adapters", active
    yield name, module, adapters
    for key, child in module.named_children():
        if child is not inner and not _is_at_rest(module, key, adapters):
            yield from _walk(child, f"{name}.{key}".lstrip("."), adapters, seen)


def _adapted(module: nn.Module) -> tuple[nn.Module | None, Adapters]:
    """What a module of PEFT adapts, or torch.compile wraps, and the adapters that are at work there."""
    wrapped = compat.compiled_module(module)
    if wrapped is not None:
        return wrapped, None
    parts = compat.parts_of(module)
    inner = parts.get("base_layer") or parts.get("original_module")
    if inner is None or not hasattr(module, "active_adapters"):
        return None, None
    is_off = module.disable_adapters or getattr(module, "merged", False)
    active = frozenset[str]() if is_off else _held(module) & set(cast(Iterable[str], module.active_adapters))
    for name, replacement in (parts.get("modules_to_save") or nn.ModuleDict()).named_children():
        if name in active:
            return replacement, None
    return inner, active


def _held(module: nn.Module) -> frozenset[str]:
    """The adapters that have anything in a module."""
    keyed = [child for child in module.children() if _is_keyed(child)]
    return frozenset(key for child in keyed for key in [*compat.parts_of(child), *compat.tensors_of(child)])


def _is_keyed(container: nn.Module) -> bool:
    """Whether its parts are named by adapters."""
    return type(container).__name__.endswith("Dict")


def _is_at_rest(container: nn.Module, key: str, adapters: Adapters) -> bool:
    """Whether a part belongs to an adapter that is not at work: PEFT keeps those of each kind in a dictionary."""
    return adapters is not None and _is_keyed(container) and key not in adapters


def _part(name: str, module: nn.Module, adapters: Adapters) -> _Part:
    _require_readable(name, module)
    kept = [*compat.tensors_of(module).items(), *vars(module).items()]
    given = {key: value for key, value in kept if not _is_idle(module, key) and not _is_at_rest(module, key, adapters)}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    numbers = {key: _at_work(value, adapters) for key, value in given.items() if _is_plain(key, value)}
    if isinstance(module, PreTrainedModel):  # which carries much that only loading sets
        numbers = {key: value for key, value in numbers.items() if isinstance(value, float)}
    numbers |= {f"{key} made by": _maker(tensor) for key, tensor in tensors.items() if _is_made_of_others(tensor)}
    plain = [pair for key, tensor in tensors.items() for pair in _plain_tensors(key, tensor, f"{name}.{key}")]
    plain += _scales("weight", given.get("state"))  # where bitsandbytes moves them when it first runs
    return _Part(name, type(module).__name__, numbers, dict(plain))


def _is_idle(module: nn.Module, key: str) -> bool:
    """What changes nothing, or changes by running: frequencies of a RoPE that grows with the sequence."""
    kinds = getattr(module, "rope_type", None)
    grows = bool(_GROWING_ROPES & set(kinds.values() if isinstance(kinds, dict) else [kinds]))
    follows = key.endswith(("inv_freq", "attention_scaling")) and not key.endswith("original_inv_freq")
    return key in _IDLE_ATTRIBUTES or key.endswith("max_seq_len_cached") or (grows and follows)


def _is_plain(key: str, value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return not key.startswith("_") and all(_is_plain("", one) for one in value)
    if isinstance(value, dict):
        return not key.startswith("_") and all(_is_plain("", one) for one in value.values())
    return not key.startswith("_") and isinstance(value, (bool, int, float, str))


def _at_work(value: Any, adapters: Adapters) -> Any:
    """What a module says of its adapters, it says by their names."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if adapters is None or not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if key in adapters}


def _plain_tensors(key: str, tensor: Tensor, path: str) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that it is made of; bitsandbytes keeps the scales of its weights beside them."""
    if hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id"):
        raise Unnamed(f"{path} is sharded over processes")
    if tensor.is_meta:
        raise Unnamed(f"{path} is offloaded")
    if _is_made_of_others(tensor):
        for name in cast(Any, tensor).__tensor_flatten__()[0]:
            yield from _plain_tensors(f"{key}.{name}", getattr(tensor, name), path)
        return
    yield key, tensor.detach()
    yield from _scales(key, tensor)


def _is_made_of_others(tensor: Tensor) -> bool:
    """Whether it is one of torchao's, or another that quantizes."""
    return hasattr(tensor, "__tensor_flatten__")


def _maker(tensor: Any) -> str:
    return f"{type(tensor).__name__} {tensor.__tensor_flatten__()[1]}"


def _scales(key: str, holder: Any) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside a weight, or beside its scales."""
    for name in ("SCB", "absmax", "code", "offset"):
        value = getattr(holder, name, None)
        if isinstance(value, Tensor):
            yield f"{key}.{name}", value
    for name in ("quant_state", "state2"):
        state = getattr(holder, name, None)
        if state is not None:
            yield from _scales(f"{key}.{name}", state)


def _require_readable(name: str, module: nn.Module) -> None:
    """What a module does is told by its kind and by what it holds, unless others have put their own code in."""
    if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
        raise Unnamed(f"{name} packs its weights where they cannot be read")
    if not compat.has_own_forward(module):
        raise Unnamed(f"{name or 'the model'} has another forward function than its class")
    for hook in compat.hooks_of(module):
        function = getattr(hook, "func", hook)
        owner = getattr(function, "__module__", None) or type(function).__module__
        if owner.partition(".")[0] not in _HARMLESS_OWNERS:
            raise Unnamed(f"{name or 'the model'} has a forward hook of {owner}, which may change what it computes")


# Folders


def _take_weights(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> None:
    wanted = model.state_dict()
    fitting = {name: tensor for name, tensor in stored.items() if name in wanted and wanted[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False, assign=True)
    model.tie_weights()


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of a folder's safetensors files, as views of the files."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype in _STORED_DTYPES}
