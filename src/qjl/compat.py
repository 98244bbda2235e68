"""Every name of transformers and torch that is private, or that differs between their versions; each has a test.

``CACHE`` is the argument by which models and ``generate`` take a cache: ``cache`` in newer transformers,
``past_key_values`` before. ``CROP_TAKES_LENGTHS`` tells whether ``crop`` of transformers' own caches still takes a
length beside a negative number of tokens.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, get_layer_types_and_kwargs
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qjl.errors import QJLError

__all__ = [
    "CACHE",
    "CROP_TAKES_LENGTHS",
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "cache_argument",
    "decoder_of",
    "flash_attention_for_cpu",
    "get_layer_types_and_kwargs",
    "is_autocast_on",
    "is_sdpa_or_flash",
    "of_each_layer",
    "replaces_default_cache",
    "sdpa_attention_forward",
    "supports_sdpa",
    "takes_cache_from_users",
    "tree_leaves",
    "tree_map",
    "uses_attention_interface",
    "versions",
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


# Attention


def is_sdpa_or_flash(function: _Wrapper) -> bool:
    """Whether an attention function is transformers' own sdpa, or flash attention."""
    return function in (sdpa_attention_forward, flash_attention_forward)


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


def is_autocast_on(kind: str) -> bool:
    """Whether the caller's operations on devices of this kind run in a dtype that autocast chooses."""
    return torch.is_autocast_enabled(kind)


def flash_attention_for_cpu(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps; torch's public function keeps the latter to itself."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


# Configurations and models


def of_each_layer(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration of each layer: some models have other head counts or sizes in some of them."""
    return list(config.per_layer_config)


def replaces_default_cache(model: PreTrainedModel) -> bool:
    """Whether the model has a cache of its own kind in place of transformers'."""
    return not type(model)._supports_default_dynamic_cache()  # type: ignore[attr-defined]


def takes_cache_from_users(model: PreTrainedModel) -> bool:
    """Whether the model's forward pass has an argument for a cache."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return any(
        parameter.name in (CACHE, "past_key_values") or parameter.kind is parameter.VAR_KEYWORD
        for parameter in parameters
    )
