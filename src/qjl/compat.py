"""Every name of transformers and torch that is private, or that differs between their versions; each has a test.

``CACHE`` is the argument by which models and ``generate`` take a cache: ``cache`` in newer transformers,
``past_key_values`` before. ``CROP_TAKES_LENGTHS`` tells whether ``crop`` of transformers' own caches still takes a
length beside a negative number of tokens.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, get_layer_types_and_kwargs
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.output_capturing import _active_collector

from qjl.errors import QJLError

__all__ = [
    "CACHE",
    "CROP_TAKES_LENGTHS",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "TorchDynamoException",
    "Uncompiled",
    "add_hooks",
    "are_weights_collected",
    "cache_argument",
    "compiled_module",
    "compute_buffers",
    "decoder_of",
    "flash_attention_for_cpu",
    "flash_attention_forward",
    "get_layer_types_and_kwargs",
    "gguf_bar",
    "gguf_reader",
    "has_own_forward",
    "hooks_of",
    "is_given_by_user",
    "is_sdpa_or_flash",
    "of_each_layer",
    "parts_of",
    "remove_hooks",
    "replaces_default_cache",
    "sdpa_attention_forward",
    "supports_sdpa",
    "takes_cache_from_users",
    "tensors_of",
    "tree_leaves",
    "tree_map",
    "uses_attention_interface",
    "versions",
    "wants_weights",
    "window_of",
    "wrap",
]

_Wrapper = Callable[..., Any]


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _takes_lengths() -> bool:
    try:
        DynamicLayer().crop(1)
    except ValueError:
        return False
    return True


CACHE = "cache" if _takes(GenerationMixin.prepare_inputs_for_generation, "cache") else "past_key_values"
CROP_TAKES_LENGTHS = _takes_lengths()


def versions() -> str:
    """For messages: which versions do not go together."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def cache_argument(cache: Cache | None) -> dict[str, Cache | None]:
    """A cache as the keyword that models and ``generate`` of this version take.

    >>> model(input_ids=ids, **cache_argument(cache))
    """
    return {CACHE: cache}


def wrap(owner: type, name: str, wrapper: _Wrapper) -> None:
    """Have ``wrapper(own, *arguments)`` called in place of a method of transformers, ``own`` being that method.

    Raises:
        QJLError: if this version has no such method.
    """
    own = vars(owner).get(name)
    if own is None:
        raise QJLError(
            f"{owner.__name__} has no {name} in {versions()}: install a version of transformers that this qjl "
            "supports (5.19 to 5.24 are tested)."
        )

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    setattr(owner, name, call)


_HOMES_OF_GGUF = {
    "GGUF_ARCHS": "transformers.integrations.gguf",
    "GGUF_CONFIG_ARCHS": "transformers.integrations.gguf",
    "GGUF_CONFIG_MAPPING": "transformers.integrations.ggml",
    "get_gguf_config": "transformers.integrations.gguf",
    "load_gguf_checkpoint": "transformers.modeling_gguf_pytorch_utils",
    "read_gguf_metadata": "transformers.integrations.gguf",
}


def gguf_bar(bar: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Another progress bar in place of the one that ``load_gguf_checkpoint`` shows."""
    return mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", bar)


def gguf_reader(name: str) -> Any:
    """One of the names by which transformers reads GGUF files.

    Raises:
        QJLError: if this version has no such name.
    """
    found = getattr(import_module(_HOMES_OF_GGUF[name]), name, None)
    if found is None:
        raise QJLError(f"{_HOMES_OF_GGUF[name]} has no {name} in {versions()}: load the model from safetensors files.")
    return found


# Attention


def is_sdpa_or_flash(function: _Wrapper) -> bool:
    """Whether an attention function is transformers' own sdpa, or flash attention."""
    return function in (sdpa_attention_forward, flash_attention_forward)


def are_weights_collected() -> bool:
    """Whether the forward pass that runs keeps the weights of its attention, of which some models do not tell it."""
    collected = _active_collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def wants_weights(module: torch.nn.Module) -> bool:
    """Whether a module's configuration asks for the weights of attention; read at every token of every layer."""
    config = vars(module).get("config")
    return config is not None and bool(object.__getattribute__(config, "__dict__").get("_output_attentions"))


@functools.cache
def supports_sdpa(module_name: str) -> bool:
    """Whether the models of a Python module say that sdpa computes what their own attention does."""
    return any(model._supports_sdpa for model in _models_in(module_name))


def _models_in(module_name: str) -> Iterator[type[PreTrainedModel]]:
    for thing in list(vars(sys.modules[module_name]).values()):
        if isinstance(thing, type) and issubclass(thing, PreTrainedModel) and thing.__module__ == module_name:
            yield thing


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that reads text, without its head and without encoders of images or sound."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder if isinstance(decoder, PreTrainedModel) else model


def uses_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the decoder's layers call the attention that its configuration names."""
    return type(decoder_of(model))._can_set_attn_implementation()


class Uncompiled:
    """Between ``begin`` and ``end``, or in a ``with``, what was given to ``torch.compile`` runs as it was written.

    torch keeps that for the whole process: as long as one thread needs it, no thread meets compiled code.
    """

    _lock = threading.Lock()
    _open = 0
    _stance: Any = None

    @classmethod
    def begin(cls) -> None:
        with cls._lock:
            if not cls._open:
                cls._stance = torch.compiler.set_stance("force_eager")
            cls._open += 1

    @classmethod
    def end(cls) -> None:
        with cls._lock:
            cls._open -= 1
            if not cls._open:
                cls._stance.__exit__(None, None, None)

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()


def flash_attention_for_cpu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps; torch's public function keeps the latter to itself."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


# Configurations and models


def of_each_layer(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration of each layer: some models have other head counts or sizes in some of them."""
    return list(config.per_layer_config) if hasattr(config, "num_hidden_layers") else []


def add_hooks(model: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    """Have two functions called around each forward pass, once however often they are added."""
    if before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, with_kwargs=True, always_call=True)


def remove_hooks(model: torch.nn.Module, *functions: Callable[..., Any]) -> None:
    """Undo ``add_hooks``."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in functions]:
            del hooks[number]


def hooks_of(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """What is called around its forward passes."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether nothing replaces its class's forward function but accelerate's hooks, or torch.compile's work on it."""
    forward = vars(module).get("_old_forward", vars(module).get("forward"))
    original = getattr(forward, "_torchdynamo_orig_callable", forward)
    return original is None or getattr(original, "__func__", None) is type(module).forward


def parts_of(module: torch.nn.Module) -> dict[str, torch.nn.Module | None]:
    """Modules directly inside, by name."""
    return dict(module._modules)


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor | None]:
    """Its own parameters and buffers, by name."""
    return {**module._parameters, **module._buffers}


def compiled_module(module: torch.nn.Module) -> torch.nn.Module | None:
    """What ``torch.compile`` has put into this module."""
    return module._modules.get("_orig_mod")


def compute_buffers(model: PreTrainedModel) -> None:
    """Those that no file holds, as transformers does when it loads a model."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
                vars(module)["_is_hf_initialized"] = False
    model.initialize_weights()


def is_given_by_user(cache: object) -> bool:
    """Whether ``generate`` was called with this cache, and did not make it."""
    return getattr(cache, "_is_user_defined", False)


def window_of(layer: object) -> Tensor | None:
    """The number of tokens that a layer of transformers holds at most, as its caches give it when iterated."""
    return getattr(layer, "_sliding_window_tensor", None)


def replaces_default_cache(model: PreTrainedModel) -> bool:
    """Whether the model has a cache of its own kind in place of transformers'."""
    supports = getattr(type(model), "_supports_default_dynamic_cache", None)  # models that generate have it
    return supports is not None and not supports()


def takes_cache_from_users(model: PreTrainedModel) -> bool:
    """Whether the forward pass has an argument for a cache: the model's or its decoder's."""
    return any(_has_cache_argument(type(part).forward) for part in (model, decoder_of(model)))


def _has_cache_argument(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters
    found = [parameters[name] for name in {CACHE, "past_key_values"} if name in parameters]
    return any("dict" not in str(parameter.annotation) for parameter in found)  # XLM has a dict of that name
