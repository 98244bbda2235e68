"""Attention over packed codes inside of transformers' models, whatever attention they were loaded with.

``KVCache.update`` returns handles in place of tensors. The functions that ``AttentionInterface`` gives to models are
wrapped: where key and value are both handles of one layer, and nothing is asked for that codes cannot give, they are
scored on their codes. In all other cases the model's own function computes, on plain tensors: a handle decodes itself
wherever a torch operation meets it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from qjl import compat
from qjl.attention import Scoring, attend_dense
from qjl.cache.index import TokenIndex
from qjl.cache.layer import Layer, Tokens
from qjl.cache.paged import PagedCache
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.modes import for_keeps, outside_modes, uncompiled

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class _Handed:
    """What one update gave a layer: its fresh tokens, and how to decode all that it held then, at most once."""

    def __init__(self, layer: QuantizedLayer, fresh: Tokens) -> None:
        self.layer, self.fresh = layer, fresh
        self.step = layer.store.index.step
        self.length = layer.store.columns(layer.core)

    @property
    def is_open(self) -> bool:
        """Whether the pass goes on in which it was given."""
        return self.step is not None and self.layer.store.index.step is self.step

    def require_current(self) -> None:
        """Raises QJLError if the layer has other tokens by now, which the handles do not speak of."""
        held = self.layer.store.columns(self.layer.core)
        if held != self.length:
            raise QJLError(
                f"the model reads {self.layer.core.name} as it was at {self.length} tokens, and it holds {held}: "
                "such a model's cache cannot be quantized."
            )

    @functools.cached_property
    def states(self) -> Tokens:
        self.require_current()
        keys, values = self.layer.store.dense(self.layer.core, self.fresh if self.is_open else None)
        return keys.contiguous(), values.contiguous()


class CachedStates(torch.Tensor):
    """A handle on one layer's keys or values; any torch operation on it sees the decoded tensor."""

    handed: _Handed
    _part: int

    @staticmethod
    def __new__(cls, handed: _Handed, part: int) -> CachedStates:
        like = handed.fresh[part]
        shape = (like.shape[0], like.shape[1], handed.length, like.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, handed: _Handed, part: int) -> None:
        self.handed = handed
        self._part = part

    @property
    def layer(self) -> QuantizedLayer:
        return self.handed.layer

    @for_keeps
    def decoded(self) -> Tensor:
        """``[B, H, T, D]`` in the model's dtype, contiguous as the handle says it is."""
        return self.handed.states[self._part]

    def is_key_of(self, value: object) -> TypeGuard[CachedStates]:
        """Whether these are the keys and those the values that one update handed out."""
        return isinstance(value, CachedStates) and self.handed is value.handed and self._part < value._part

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = compat.tree_map(
            lambda x: x.decoded() if isinstance(x, CachedStates) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        part = ("keys", "values")[self._part]
        return f"CachedStates({part} of {self.layer.core.name}, {self.shape[2]} tokens)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QJLError(f"{self!r} is a handle on a cache: save its tensor, handle.clone().")


class QuantizedLayer(Copied, compat.CacheLayerMixin):
    """A layer of a ``PagedCache`` as transformers wants a layer.

    ``has_text`` tells whether it holds the tokens of the text, as self-attention does; cross-attention holds others,
    which the text's padding says nothing of.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, store: PagedCache, core: Layer, has_text: bool = True) -> None:
        self.store, self.core = store, core
        self.has_text = has_text
        self.knows_padding = not has_text
        self._scoring: Scoring | None = None

    def _copied(self) -> dict[str, Any]:
        return vars(self) | {"_scoring": None}

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.core.shape is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the tokens; None before there are any."""
        return None if self.core.shape is None else self.core.shape.dtype

    @property
    def device(self) -> torch.device | None:
        return None if self.core.shape is None else self.core.shape.device

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys, decoded: for inspection, not on the way of generation. None before there are any."""
        return self._states(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        """In a hook of the layer's attention, as it reads a prompt: of fewer tokens (``PagedCache.replace``)."""
        self.store.replace(self.core, 0, states)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self._states(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self.store.replace(self.core, 1, states)

    def _states(self, side: int) -> Tensor | None:
        if not self.is_initialized:
            return None
        if (replaced := self.core.replaced.get(side)) is not None:
            return replaced
        step = self.store.index.step
        if step is not None and self.core.step is step and self.core.fresh is None:
            raise QJLError(
                f"keys and values of {self.core.name} can be read until the next layer is given its own, and after the "
                "pass: read them there."
            )
        return self.store.dense(self.core, self.core.fresh)[side].clone()

    @property
    def batch_size(self) -> int:
        return self.store.index.batch or -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The first tokens tell what there is to know."""

    @outside_modes
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fresh = self.store.append(self.core, _detached(key_states), _detached(value_states))
        handed = _Handed(self, fresh)
        return CachedStates(handed, 0), CachedStates(handed, 1)

    def scoring(
        self, scaling: float, mask: Tensor | None, softcap: float | None, sink_logits: Tensor | None
    ) -> Scoring:
        """The same object as long as nothing is another."""
        if mask is not None:  # which would be kept as long
            return Scoring(scaling, mask, softcap, sink_logits)
        kept = self._scoring
        is_same = kept is not None and kept.sink_logits is sink_logits
        if kept is None or not is_same or kept.scaling != scaling or kept.softcap != softcap:
            kept = self._scoring = Scoring(scaling, None, softcap, sink_logits)
        return kept

    def attend(self, query: Tensor, scoring: Scoring, handed: _Handed) -> Tensor:
        """Attention of ``query [B, Hq, Q, D]``, that of the tokens updated last: ``[B, Q, Hq, Dv]``."""
        store = self.store
        out = store.attend(self.core, query, scoring, handed.fresh)
        if store.source.waits:
            self.observe(query, out.transpose(1, 2))
        return out

    @for_keeps
    def observe(self, query: Tensor, out: Tensor) -> None:
        """Count the queries ``[B, Hq, Q, D]`` of the tokens updated last, and their outputs, as long as awaited."""
        self.store.source.observe(self.core, self.store, query, out)

    def observe_mask(self, mask: Tensor, position_ids: Tensor | None) -> None:
        """Left padding from the mask of a forward pass, for a cache that no hook tells it to."""
        index = self.store.index
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = shown.any(2).any(1).expand(index.batch, -1)
        self.store.set_padding(*padding_of(seen, position_ids, index.columns, index))

    def get_seq_length(self) -> int:
        keys = self.core.replaced.get(0)
        return self.store.columns(self.core) if keys is None else keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        capacity = self.store.index.capacity
        return -1 if capacity is None else capacity.tokens

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise QJLError("the layers of a quantized cache change together: call the same method of the cache.")

    reset = crop = reorder_cache = batch_select_indices = batch_repeat_interleave = _refuse  # type: ignore[assignment]

    def offload(self) -> None:
        raise QJLError("a quantized cache is not offloaded: it is small enough to stay on its device.")

    prefetch = offload


def _detached(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def padding_of(real: Tensor, position_ids: Tensor | None, past: int, index: TokenIndex) -> tuple[list[int], list[int]]:
    """Left padding of each row and the RoPE position of its first real token.

    ``real`` bool [B, past + Q] are the tokens that count; without ``position_ids [B or 1, Q]`` models number
    the columns. Rows that began in the past keep the origin they have in the index.
    """
    padding = (real.cumsum(1) == 0).sum(1)
    origin = padding
    if position_ids is not None and position_ids.dim() == 2:
        first = (padding - past).clamp(0, position_ids.shape[1] - 1)
        origin = position_ids.expand(real.shape[0], -1).gather(1, first[:, None].to(position_ids.device))[:, 0]
    before = index.origins.tolist() if past else [0] * real.shape[0]
    rows = zip(padding.tolist(), origin.tolist(), before, strict=True)
    pairs = [(pad, now if pad >= past else then) for pad, now, then in rows]
    return [pad for pad, _ in pairs], [position for _, position in pairs]


# What models call


def _find_attention(own: Any, interface: AttentionInterface, name: str, default: Attention) -> Attention:
    """In place of ``AttentionInterface.get_interface``."""
    found = own(interface, name, default)
    return functools.partial(_attention, found, found is default)


def _attention(
    own: Attention,
    is_models_own: bool,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if _open_watches and (watcher := _watcher_of(module)):
        return watcher(own, module, query, key, value, attention_mask, *args, **kwargs)
    if isinstance(key, CachedStates):
        return _attention_over_handle(own, is_models_own, module, query, key, value, attention_mask, *args, **kwargs)
    return own(module, query, key, value, attention_mask, *args, **kwargs)


compat.wrap(AttentionInterface, "get_interface", _find_attention)


@uncompiled
def _attention_over_handle(
    own: Attention,
    is_models_own: bool,
    module: torch.nn.Module,
    query: Tensor,
    key: CachedStates,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """On codes where they give all that is asked for, by the model's own function otherwise."""
    layer = key.handed.layer
    if key.handed.is_open and key.is_key_of(value) and not args and _codes_give_all(own, is_models_own, module, kwargs):
        mask = attention_mask
        if mask is not None or query.shape[2] > 1:
            mask = _mask_for_codes(is_models_own, module, query, key, mask, kwargs)
        if mask is not _OF_ANOTHER_KIND:
            return attention_over(module, query, key, value, mask, **kwargs)
    if not layer.knows_padding and _tells_padding(attention_mask):
        layer.observe_mask(attention_mask, kwargs.get("position_ids"))
    states = (x.decoded() if isinstance(x, CachedStates) else x for x in (key, value))
    out, weights = own(module, query, *states, attention_mask, *args, **kwargs)
    if layer.store.source.waits:
        layer.observe(query, out.transpose(1, 2))
    return out, weights


def _codes_give_all(own: Attention, is_models_own: bool, module: torch.nn.Module, asked: dict[str, Any]) -> bool:
    """Whether the numbers that the function is called with tell all that it computes, and no weights are wanted."""
    if asked.get("dropout") or asked.get("position_bias") is not None or _wants_weights(module, asked):
        return False
    tells_more = asked.get("softcap") is not None or asked.get("s_aux") is not None
    if own is compat.sdpa_attention_forward and tells_more:  # of which it takes no notice, or which it refuses
        return False
    if own is compat.flash_attention_forward and asked.get("sliding_window") is not None:  # which its mask leaves out
        return False
    if not is_models_own:
        return compat.is_sdpa_or_flash(own)
    return tells_more or compat.supports_sdpa(type(module).__module__)


def _wants_weights(module: torch.nn.Module, asked: dict[str, Any]) -> bool:
    return bool(asked.get("output_attentions")) or compat.are_weights_collected() or compat.wants_weights(module)


_OF_ANOTHER_KIND = object()


def _mask_for_codes(
    is_models_own: bool, module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, asked: dict[str, Any]
) -> Any:
    """The mask as ``Scoring`` takes it; ``_OF_ANOTHER_KIND`` for one of another kind, such as flex attention's."""
    if mask is not None and not isinstance(mask, Tensor):
        return _OF_ANOTHER_KIND
    if mask is None or mask.dim() == 2:
        is_causal = not is_models_own and _is_causal(module, asked)
        return _mask_of_columns(mask, query, key, is_causal)
    if mask.dim() != 4:
        return _OF_ANOTHER_KIND
    return None if query.shape[2] == 1 and mask.is_floating_point() and not mask.any() else mask


def _mask_of_columns(real: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    """From the tokens that count, ``[B, columns]``, as flash attention is told; None where none is needed."""
    if real is not None and bool(real.all()):
        real = None
    queries, columns = query.shape[2], key.shape[2]
    if real is None and (is_causal or queries == 1):
        return None
    shape = (1, 1, queries, columns)
    seen = torch.ones(shape, dtype=torch.bool, device=query.device)
    seen = seen.tril(columns - queries) if is_causal else seen
    return seen if real is None else seen & real[:, None, None, -columns:].bool()


@outside_modes
def attention_over(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by what sdpa, soft caps and learned sinks are: over packed codes where ``key`` is a handle.

    ``query [B, Hq, Q, D]``; returns ``[B, Q, Hq, D]``. Without a mask it is causal, unless the module says otherwise.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    is_special = isinstance(key, CachedStates) or softcap is not None or sinks is not None
    if dropout or kwargs.get("position_bias") is not None or not is_special:
        return compat.sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None and query.shape[2] > 1 and not _is_causal(module, kwargs):
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    scaling = scaling or query.shape[-1] ** -0.5
    if not isinstance(key, CachedStates):
        scoring = Scoring(scaling, attention_mask, softcap, sinks)
        return attend_dense(query, key, value, scoring).transpose(1, 2).contiguous(), None
    layer = key.handed.layer
    if not layer.knows_padding and _tells_padding(attention_mask):
        layer.observe_mask(attention_mask, kwargs.get("position_ids"))
    return layer.attend(query, layer.scoring(scaling, attention_mask, softcap, sinks), key.handed), None


def _is_causal(module: torch.nn.Module, asked: dict[str, Any]) -> bool:
    is_causal = asked.get("is_causal")
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _tells_padding(mask: Any) -> TypeGuard[Tensor]:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] > 1


# Watching


_open_watches = 0  # in all threads; none keeps the variable below out of graphs that others compile
_counting = threading.Lock()
_watch: ContextVar[tuple[frozenset[int], Attention] | None] = ContextVar("qjl-watch", default=None)


def _watcher_of(module: torch.nn.Module) -> Attention | None:
    watch = _watch.get()
    return watch[1] if watch is not None and id(module) in watch[0] else None


@contextmanager
def attention_watched(model: PreTrainedModel, watcher: Attention) -> Iterator[None]:
    """While it lasts, in this thread, ``watcher(own, module, query, key, value, mask, **kwargs)`` is called.

    It takes the place of ``own`` in all of the decoder's layers; the model itself stays as it is.

    Raises:
        QJLError: if the model's layers do not call the attention that its configuration names.
    """
    if not compat.uses_attention_interface(model):
        raise QJLError(
            f"{model.config.model_type} does not use transformers' attention interface, so its attention cannot be "
            "watched: take a preset in place of bits, or another model."
        )
    modules = frozenset(map(id, compat.decoder_of(model).modules()))
    token = _watch.set((modules, watcher))
    _count_watches(1)
    try:
        yield
    finally:
        _count_watches(-1)
        _watch.reset(token)


def _count_watches(more: int) -> None:
    global _open_watches
    with _counting:
        _open_watches += more
