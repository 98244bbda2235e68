"""Sees to it that a model uses the cache it was given, and says so where it does not.

A cache is handed to a forward pass, or to ``generate``, which then owes every pass of the model to it; ``enable`` makes
``generate`` owe that to a cache of its own. Models and versions of transformers have ways not to: a cache of another
kind, a keyword that is ignored, a cache that is dropped where RoPE changes. The first pass that does raises.
"""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from qjl import compat
from qjl.architecture import drops_cache_at, text_config
from qjl.errors import QJLError

ENABLED = "_qjl_enabled"  # set on a model by ``enable``: the configuration of its caches


class WatchedCache(compat.Cache):
    """A cache that is told of its model's forward passes; ``updates`` counts how often a layer was given tokens."""

    updates = 0

    @abstractmethod
    def before_generate(self) -> None:
        """A call of ``generate`` begins, which reads what comes behind as many tokens as the cache holds."""

    @abstractmethod
    def before_forward(self, tokens: int | None, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """A pass over so many tokens begins (None: not known), with this mask ``[B, T]`` and positions ``[B, Q]``."""

    @abstractmethod
    def after_forward(self) -> None:
        """All layers have read their tokens."""

    @abstractmethod
    def abandon(self) -> None:
        """The pass has failed."""


class Promise:
    """What one call of ``generate`` owes: that ``model`` reads and writes ``cache``.

    With ``is_enabled`` that cache is still to be made; ``release`` is for a user who asked for another one.
    """

    def __init__(self, model: GenerationMixin, cache: WatchedCache | None, is_enabled: bool) -> None:
        self.model = model
        self.is_enabled = is_enabled
        self.is_released = False
        self.cache: WatchedCache | None = None
        self._updates = 0
        if cache is not None:
            self.take(cache)

    def take(self, cache: WatchedCache) -> None:
        self.cache, self._updates = cache, cache.updates

    def release(self) -> None:
        self.is_released = True

    def require_used(self, used: Iterable[object]) -> None:
        """Raises QJLError unless the cache is among what a forward pass returned."""
        if not self.is_released and not any(thing is self.cache for thing in used):
            raise QJLError(_broken(self.model, "went on without it"))

    def require_kept(self) -> None:
        """Raises QJLError if the whole call did without the cache."""
        if self.is_released:
            return
        if self.cache is None:
            raise QJLError(_broken(self.model, "never asked for it"))
        if self.cache.updates == self._updates:
            raise QJLError(_broken(self.model, "never gave it a token"))


def _broken(model: Any, what: str) -> str:
    return (
        f"{type(model).__name__} was to use a quantized cache and {what} ({compat.versions()}), so its text would come "
        "from a cache in full precision: run it without qjl, or with versions that this qjl supports."
    )


_promise: ContextVar[Promise | None] = ContextVar("qjl-promise", default=None)


def promise_of(model: object) -> Promise | None:
    """What the call of ``generate`` that is running in this thread owes, if it is this model's."""
    promise = _promise.get()
    return promise if promise is not None and promise.model is model else None


def cache_among(args: Iterable[object], kwargs: dict[str, Any]) -> WatchedCache | None:
    """A cache of ours among arguments, whatever its keyword is."""
    return next((thing for thing in (*args, *kwargs.values()) if isinstance(thing, WatchedCache)), None)


def _generate(own: Any, model: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
    """In place of ``GenerationMixin.generate``."""
    given, is_enabled = cache_among(args, kwargs), ENABLED in vars(model)
    if given is None and not is_enabled:
        return own(model, *args, **kwargs)
    if given is not None:
        given.before_generate()
    promise = Promise(model, given, is_enabled)
    token = _promise.set(promise)
    try:
        with compat.Uncompiled():
            output = own(model, *args, **_renamed(kwargs))
    finally:
        _promise.reset(token)
    promise.require_kept()
    return output


def _renamed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A cache of ours under the keyword of this version, whichever of the two it was given by."""
    return {compat.CACHE if isinstance(thing, WatchedCache) else name: thing for name, thing in kwargs.items()}


def _update_model_kwargs(own: Any, model: GenerationMixin, outputs: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``GenerationMixin._update_model_kwargs_for_generation``, which follows each forward pass."""
    if promise := promise_of(model):
        promise.require_used(outputs.values())
    return own(model, outputs, *args, **kwargs)


compat.wrap(GenerationMixin, "generate", _generate)
compat.wrap(GenerationMixin, "_update_model_kwargs_for_generation", _update_model_kwargs)


# Hooks on the model


def attach(model: PreTrainedModel) -> None:
    """Have the model's caches told of its forward passes, which it computes as before."""
    compat.add_hooks(model, _before_forward, _after_forward)


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``."""
    compat.remove_hooks(model, _before_forward, _after_forward)


_Pass = tuple[PreTrainedModel, WatchedCache | None, int]  # of which model, with which cache and its updates before
_passes: ContextVar[tuple[_Pass, ...]] = ContextVar("qjl-passes", default=())


@torch.compiler.disable
def _before_forward(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache, inputs = cache_among(args, kwargs), _inputs(args, kwargs)
    if cache is None and (cache := _dropped_where_rope_changes(model, inputs)):
        cache.reset()
        kwargs = kwargs | {compat.CACHE: cache}
    _passes.set((*_passes.get(), (model, cache, cache.updates if cache else 0)))
    if cache is None:
        return None
    compat.Uncompiled.begin()
    named = dict(zip(_parameters(model), args, strict=False)) | kwargs
    tokens = None if inputs is None else inputs.shape[1]
    cache.before_forward(tokens, named.get("attention_mask"), named.get("position_ids"))
    return args, _renamed(kwargs) if compat.CACHE in _parameters(model) else kwargs


@torch.compiler.disable
def _after_forward(model: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    *before, (whose, cache, updates) = _passes.get() or ((None, None, 0),)
    if whose is not model:  # another hook failed before ours
        return
    _passes.set(tuple(before))
    if cache is None:
        return
    compat.Uncompiled.end()
    if output is None:
        cache.abandon()
        return
    if cache.updates == updates:
        raise QJLError(_broken(model, "did not look at it"))
    cache.after_forward()


def _dropped_where_rope_changes(model: PreTrainedModel, inputs: Tensor | None) -> WatchedCache | None:
    """The cache that is owed, where a model reads the whole text anew since its RoPE is another one from here on.

    Models with two sets of factors (LongRoPE) drop their cache there, whosever it is.
    """
    promise, limit = promise_of(model), drops_cache_at(text_config(model.config))
    if promise is None or promise.is_released or inputs is None or limit is None or inputs.shape[1] <= limit:
        return None
    return promise.cache


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    inputs = kwargs.get("input_ids", args[0] if args else None)
    return kwargs.get("inputs_embeds") if inputs is None else inputs


def _parameters(model: PreTrainedModel) -> tuple[str, ...]:
    return _parameters_of(type(model).forward)


@functools.cache
def _parameters_of(forward: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
