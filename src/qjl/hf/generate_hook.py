"""``enable`` and ``disable``: plain ``model.generate(...)`` with quantized caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from qjl import compat
from qjl.errors import QJLError
from qjl.hf.kv_cache import KVCache
from qjl.hf.promises import ENABLED, detach, promise_of
from qjl.hf.sources import forget_statistics
from qjl.presets import DEFAULT_PRESET, CacheConfig, resolve


def enable(model: PreTrainedModel, preset: str | Path | CacheConfig = DEFAULT_PRESET) -> PreTrainedModel:
    """Make plain ``model.generate(...)`` use a fresh quantized cache for each call. Returns the model.

    A cache or a ``cache_implementation`` given to ``generate`` still wins.

    Raises:
        QJLError: as ``KVCache``; from ``generate``, if the model turns out not to use the cache.
    """
    config = resolve(preset)
    KVCache(model, config)  # raises now what would go wrong later
    for writer in _writers(model):
        vars(writer)[ENABLED] = config
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable`` and what ``KVCache(model)`` added: the model is transformers' own again."""
    for writer in _writers(model):
        vars(writer).pop(ENABLED, None)
        forget_statistics(writer)
        detach(writer)
    return model


def _writers(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models whose ``generate`` runs: some multimodal ones have one inside that writes for them."""
    if type(model).generate is GenerationMixin.generate:  # type: ignore[attr-defined]
        return [model]
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and isinstance(part, GenerationMixin)]


def _prepare_cache(
    own: Any,
    model: GenerationMixin,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of ``GenerationMixin._prepare_cache_for_generation``."""
    result = own(model, generation_config, model_kwargs, *args, **kwargs)
    promise = promise_of(model)
    if promise is None or promise.cache is not None or not promise.is_enabled:
        return result
    cache = model_kwargs.get(compat.CACHE)
    if _is_chosen_by_user(cache, generation_config):
        promise.release()
    elif type(cache) is not compat.DynamicCache:
        raise QJLError(
            f"{type(model).__name__} has a cache of its own ({type(cache).__name__}, {compat.versions()}): it "
            "cannot be quantized, so call qjl.disable(model)."
        )
    else:
        fresh = KVCache(model, vars(model)[ENABLED])  # type: ignore[arg-type]
        if generation_config.is_assistant:
            fresh.activate_past_recording()
        promise.take(fresh)
        model_kwargs[compat.CACHE] = fresh
    return result


def _is_chosen_by_user(cache: object, generation_config: GenerationConfig) -> bool:
    if generation_config.cache_implementation or generation_config.use_cache is False:
        return True
    return compat.is_given_by_user(cache)


compat.wrap(GenerationMixin, "_prepare_cache_for_generation", _prepare_cache)
