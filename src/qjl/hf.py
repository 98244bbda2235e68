"""The transformers integration: a quantized cache for ``past_key_values``, and the attention that reads it.

``KVCache.update`` returns handles in place of tensors. The attention registered as ``"qjl"`` reads the packed
layer behind a handle; any other attention makes the handle decode itself: the same text, only slower.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AttentionInterface, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qjl import statistics, stored, trees
from qjl.architecture import LayerShape, find_rope, layer_shapes, rope_is_used, text_config
from qjl.attention import Scoring, attend, attend_dense
from qjl.cache import CacheLayer, LayerSource
from qjl.errors import QJLError
from qjl.fingerprints import fingerprint, fingerprint_or_none
from qjl.methods.base import storage_bytes
from qjl.presets import DEFAULT_PRESET, CacheConfig, from_dict, resolve, to_dict

logger = logging.getLogger("qjl")
ATTENTION = "qjl"
_REPLACED = "_qjl_replaced_attention"  # set on a model whose attention is ours: what it was before
_INTERRUPTED = "_qjl_interrupted_attention"  # set on a model during a forward pass that collects queries
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _without_autograd(function: _Function) -> _Function:
    """Its tensors are ordinary ones, also under ``inference_mode``: later calls may write to them outside."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(_Function, call)


class _Decoding:
    """Keys and values of a layer as of now, decoded at most once."""

    def __init__(self, core: CacheLayer) -> None:
        self.core = core

    @functools.cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        return self.core.dense()


class CachedStates(torch.Tensor):
    """A handle on one layer's keys or values; any torch operation on it sees the decoded tensor."""

    layer: QuantizedLayer
    _decoding: _Decoding
    _part: int

    @staticmethod
    def __new__(cls, layer: QuantizedLayer, decoding: _Decoding, part: int, like: Tensor) -> CachedStates:
        shape = (like.shape[0], like.shape[1], layer.core.length, like.shape[3])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, layer: QuantizedLayer, decoding: _Decoding, part: int, like: Tensor) -> None:
        self.layer = layer
        self._decoding = decoding
        self._part = part

    @_without_autograd
    def decoded(self) -> Tensor:
        """``[B, H, T, D]`` in the model's dtype."""
        return self._decoding.states[self._part]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(lambda x: x.decoded() if isinstance(x, CachedStates) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        part = ("keys", "values")[self._part]
        return f"CachedStates({part} of {self.layer.core.name}, {self.shape[2]} tokens)"


class QuantizedLayer(CacheLayerMixin):
    """A ``qjl.cache.CacheLayer`` as transformers wants a layer."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, core: CacheLayer) -> None:
        self.core = core
        self.is_initialized = False
        self.knows_padding = False

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """All keys, decoded: for inspection, not on the way of generation."""
        return self.core.dense()[0]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.core.dense()[1]

    @property
    def batch_size(self) -> int:
        return self.core.batch or -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.heads = key_states.dtype, key_states.device, key_states.shape[1]
        self.is_initialized = True

    @_without_autograd
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.core.append(key_states.detach(), value_states.detach())
        decoding = _Decoding(self.core)
        return CachedStates(self, decoding, 0, key_states), CachedStates(self, decoding, 1, value_states)

    @_without_autograd
    def attend(self, query: Tensor, scoring: Scoring) -> Tensor:
        """Attention of the tokens updated last, after which what left the window is quantized."""
        core = self.core
        out = attend(query, core, scoring)
        if core.wants_queries:
            core.observe(query, out)
        core.settle()
        return out

    def observe_mask(self, mask: Tensor, position_ids: Tensor | None) -> None:
        """Left padding from the boolean mask of a forward pass, for a cache that no hook tells it to."""
        seen = mask[:, 0, -1].expand(self.core.batch, -1)
        self.core.set_padding(*_padding(seen, position_ids, self.core.length - mask.shape[2], self.core))

    def get_seq_length(self) -> int:
        return self.core.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.core.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.core.reset()
        self.is_initialized = False
        self.knows_padding = False

    @_without_autograd
    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove from the end.")
        self.core.crop(self.core.length + tokens_to_remove)

    @_without_autograd
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.core.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(torch.arange(self.core.batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(self.core.batch).repeat_interleave(repeats))

    def state(self) -> dict[str, Any]:
        return {"core": self.core.state(), "knows_padding": self.knows_padding}

    def restore(self, state: dict[str, Any]) -> None:
        self.core.restore(state["core"])
        window = self.core.segments()[0][-1]
        self.lazy_initialization(window.keys, window.values)
        self.knows_padding = bool(state["knows_padding"])

    def offload(self) -> None:
        raise QJLError("a quantized cache is not offloaded: it is small enough to stay on its device.")

    prefetch = offload


class KVCache(Cache):
    """A quantized key-value cache for one call of ``generate``, or for a whole conversation.

    >>> cache = qjl.KVCache(model, "b3")
    >>> model.generate(**inputs, past_key_values=cache)

    With a model, its attention implementation is set to ``"qjl"`` (exactly sdpa for every other cache) and
    its statistics are shared by all of its caches. With a configuration, load the model with
    ``attn_implementation="qjl"``; the statistics are this cache's own. No gradient flows through a cache.

    Args:
        model: a decoder-only model, or its configuration.
        preset: a preset's name, a JSON file, or a ``CacheConfig``.
        share: whether to use, and add to, the statistics and codecs of the model's other caches.

    Raises:
        QJLError: for an unknown preset, a model whose cache cannot be quantized or whose queries cannot be
            seen, or a head_dim that does not pack.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        preset: str | Path | CacheConfig = DEFAULT_PRESET,
        *,
        share: bool = True,
    ) -> None:
        self.config = resolve(preset)
        config = _configuration(model)
        self.shapes = layer_shapes(config)
        is_shared = isinstance(model, PreTrainedModel) and share
        sources = _shared_sources(model) if is_shared else _sources(config)  # type: ignore[arg-type]
        if self.config.pre_rope:
            _require_fixed_rope(config, sources)
        layers = DynamicCache(config=text_config(config)).layers
        for shape in self.shapes:
            if shape.is_quantized:
                layers[shape.index] = self._quantized_layer(shape, sources[shape.index])
        super().__init__(layers=layers)
        self.prompt_ids: Tensor | None = None
        self._unsettled: CacheLayer | None = None
        self._model: weakref.ref[PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self._model = weakref.ref(model)
            self._require_queries(model)
            _attach(model)

    def _quantized_layer(self, shape: LayerShape, source: LayerSource) -> QuantizedLayer:
        key, value = self.config.for_layer(shape.index)
        for quantizer in (key, value):
            quantizer.layout(shape.head_dim)
        sinks, recent = self.config.sinks, self.config.recent
        core = CacheLayer(
            key,
            value,
            sinks=sinks,
            recent=recent,
            pre_rope=self.config.pre_rope,
            source=source,
            name=f"layer {shape.index}",
        )
        return QuantizedLayer(core)

    def _require_queries(self, model: PreTrainedModel) -> None:
        if _can_set_attention(model):
            return
        if any(core.key.needs_queries or core.value.needs_queries for core in self.cores):
            raise QJLError(
                f"{model.config.model_type} does not use transformers' attention interface, so its queries "
                "cannot be seen: choose a preset that needs none, such as qjl-paper."
            )

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def cores(self) -> list[CacheLayer]:
        """The quantized layers, without transformers around them."""
        return [layer.core for layer in self.quantized_layers]

    @property
    def wants_queries(self) -> bool:
        """Whether statistics are still awaited, which only the ``"qjl"`` attention can collect."""
        return any(core.wants_queries for core in self.cores)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._unsettled is not None and not self._unsettled.is_settled:
            self.settle()
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, QuantizedLayer):
            self._unsettled = layer.core
        return states

    @_without_autograd
    def settle(self) -> None:
        """Quantize what left the window in the layer updated last, if its attention has not done so."""
        if self._unsettled is not None:
            self._unsettled.settle()
            self._unsettled = None

    def mark(self, token_mask: Tensor) -> None:
        """Say which of the next T tokens may be quantized, ``bool [B, T]``; the others stay exact.

        To be called before the forward pass (or ``generate``) that reads them, which may do so in chunks. Left padding
        has its columns too. Once a mask was given, tokens that none speaks of stay exact: those generated, for example.

        >>> cache.mark(inputs["input_ids"] == model.config.image_token_id)
        >>> model.generate(**inputs, past_key_values=cache)

        Raises:
            QJLError: if the mask is of another kind, or for another number of rows.
        """
        on_host = token_mask.cpu()
        for core in self.cores:
            core.mark(on_host)

    def observe_padding(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Learn the left padding before a forward pass with this mask ``[B, T]`` and positions ``[B, Q]``."""
        for layer in self.quantized_layers:
            layer.knows_padding = True
        if attention_mask is None or attention_mask.dim() != 2:
            return
        core = self.cores[0]
        padding, origin = _padding(attention_mask.bool(), position_ids, core.length, core)
        for core in self.cores:
            core.set_padding(padding, origin)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx.cpu()))  # once, since all layers look at it

    def reset(self) -> None:
        self._unsettled = None
        self.prompt_ids = None
        super().reset()

    # Files

    @property
    def model(self) -> PreTrainedModel:
        """The model that the cache was made with.

        Raises:
            QJLError: if that is gone, or was only a configuration.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise QJLError(
                "a cache is saved under the fingerprint of its model: make it with the model, and keep that."
            )
        return model

    @_without_autograd
    def save(self, path: str | Path, token_ids: Tensor | Sequence[int] | None = None) -> int:
        """Write the cache to a file, which appears whole or not at all; ``load`` reads it. Returns its bytes.

        >>> cache.save("prompt.qjl", token_ids=inputs["input_ids"])

        Args:
            token_ids: of the prompt, ``[B, T]`` or one row; only those that the cache holds are kept. ``load`` gives
                them back as ``prompt_ids``.

        Raises:
            QJLError: if the cache is empty, was made with a configuration, belongs to a model that is sharded or
                offloaded, has other tokens than these, or if the file cannot be written.
        """
        self.settle()
        model = self.model
        state = [_layer_state(layer) for layer in self.layers]
        ids = None if token_ids is None else self._ids_held(torch.as_tensor(token_ids))
        header = stored.Header(
            model=model.config.model_type,
            fingerprint=fingerprint(model),
            dtype=str(model.dtype).removeprefix("torch."),
            preset=to_dict(self.config),
            statistics=trees.digest([core.codecs for core in self.cores]),
            rows=self.cores[0].batch,
            tokens=self.get_seq_length(),
            token_sha256=None if ids is None else stored.sha256_of_tokens(ids),
            cache_bytes=self.nbytes,
            bf16_bytes=self.full_nbytes * torch.bfloat16.itemsize // model.dtype.itemsize,
        )
        return stored.write(Path(path), header, state, ids)

    @classmethod
    @_without_autograd
    def load(cls, path: str | Path, model: PreTrainedModel) -> KVCache:
        """The cache that ``save`` wrote, with the codecs that its tokens were coded with.

        On the CPU its tokens stay memory-mapped until a layer grows.

        >>> cache = qjl.KVCache.load("prompt.qjl", model)
        >>> ids = torch.cat([cache.prompt_ids, question_ids], dim=1)
        >>> model.generate(ids, past_key_values=cache)

        Raises:
            QJLError: if the file is missing, damaged, no prompt cache, of another version, or of another model, dtype
                or preset than there is.
        """
        file = stored.StoredFile(Path(path))
        file.verify()
        _require_same_model(file, model)
        cache = cls(model, _preset_of(file))
        cache._restore(file, model.device)
        return cache

    def _restore(self, file: stored.StoredFile, device: torch.device) -> None:
        states = file.state(device)
        try:
            for layer, state in zip(self.layers, states, strict=True):
                _restore_layer(layer, state)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise QJLError(f"prompt cache {file.path} does not fit the model ({reason}): build it again.") from error
        ids = file.token_ids
        self.prompt_ids = None if ids is None else ids.to(device, torch.int64)

    def _ids_held(self, token_ids: Tensor) -> Tensor:
        """Those that the cache holds, ``int32 [B, T]``."""
        ids, rows, tokens = token_ids.detach(), self.cores[0].batch, self.get_seq_length()
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < tokens:
            raise QJLError(f"the cache holds {rows} x {tokens} tokens, and token_ids are {list(token_ids.shape)}.")
        return ids[:, :tokens].to("cpu", torch.int32)

    # Memory, everything counted

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens (packed, window, sinks, layers that are not quantized) and of fitted codecs."""
        return sum(core.nbytes for core in self.cores) + self.codec_nbytes + self._other_nbytes

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room that buffers keep for growth."""
        return sum(core.allocated_nbytes for core in self.cores) + self.codec_nbytes + self._other_nbytes

    @property
    def codec_nbytes(self) -> int:
        """Bytes of projections, maps and means: per model, shared by all its caches."""
        return storage_bytes(tensor for core in self.cores for tensor in core.codec_tensors)

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' own cache would take for the same tokens."""
        return sum(_full_nbytes(layer) for layer in self.quantized_layers) + self._other_nbytes

    @property
    def bits(self) -> tuple[float, float]:
        """True bits per number of quantized keys and values, averaged over the quantized layers."""
        pairs = [
            (core.key.bits(shape.head_dim), core.value.bits(shape.head_dim))
            for core, shape in zip(self.cores, (s for s in self.shapes if s.is_quantized), strict=True)
        ]
        return sum(key for key, _ in pairs) / len(pairs), sum(value for _, value in pairs) / len(pairs)

    @property
    def bits_with_window(self) -> float:
        """Bits per number with the exact window, the sinks and the codecs counted in."""
        layers = [layer for layer in self.quantized_layers if layer.is_initialized]
        numbers = sum(_full_nbytes(layer) // layer.dtype.itemsize for layer in layers)
        return 8 * (sum(core.nbytes for core in self.cores) + self.codec_nbytes) / max(numbers, 1)

    @property
    def _other_nbytes(self) -> int:
        """Of transformers' own layers: sliding windows, states of linear attention."""
        held = tree_leaves([vars(layer) for layer in self.layers if not isinstance(layer, QuantizedLayer)])
        return sum(x.nbytes for x in held if isinstance(x, Tensor) and x.is_floating_point())

    def __repr__(self) -> str:
        return f"KVCache({self.config.name!r}, {self.get_seq_length()} tokens, {self.nbytes} bytes)"


def _configuration(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(model, PreTrainedConfig):
        return model
    if isinstance(model, PreTrainedModel):
        return model.config
    kind = type(model).__name__
    raise QJLError(f"{kind} is no transformers model and no configuration: give the model inside a wrapper.")


def _require_fixed_rope(config: PreTrainedConfig, sources: list[LayerSource]) -> None:
    if rope_is_used(config) and all(source.rope is None for source in sources):
        raise QJLError(
            f"the RoPE of {config.model_type} is not known as a fixed rotation by position (M-RoPE and dynamic scaling "
            "are none), so it cannot be undone: choose a preset without pre_rope."
        )


def _layer_state(layer: object) -> dict[str, Any]:
    """Transformers' own layers are their attributes."""
    return layer.state() if isinstance(layer, QuantizedLayer) else dict(vars(layer))


def _restore_layer(layer: object, state: dict[str, Any]) -> None:
    if isinstance(layer, QuantizedLayer):
        layer.restore(state)
    elif vars(layer).keys() <= state.keys():
        vars(layer).update(state)
    else:
        raise QJLError(f"{type(layer).__name__} of this version of transformers holds other things.")


def _require_same_model(file: stored.StoredFile, model: PreTrainedModel) -> None:
    header, dtype = file.header, str(model.dtype).removeprefix("torch.")
    if header.fingerprint != fingerprint(model):
        raise QJLError(
            f"prompt cache {file.path} belongs to another model, of type {header.model}, or to this one with other "
            "settings or adapters: load it with what it was saved with, or build it again."
        )
    if header.dtype != dtype:
        raise QJLError(
            f"prompt cache {file.path} is of the model in {header.dtype}: load the model in it, not {dtype}."
        )
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise QJLError("a prompt cache is loaded for a model on one device: this one is spread over several.")


def _preset_of(file: stored.StoredFile) -> CacheConfig:
    try:
        return from_dict(file.header.preset)
    except QJLError as error:
        reason = str(error).rstrip(".")
        raise QJLError(f"prompt cache {file.path} has a preset that is not known here: {reason}.") from error


def _full_nbytes(layer: QuantizedLayer) -> int:
    if not layer.is_initialized:
        return 0
    window = layer.core.segments()[0][-1]
    numbers_per_token = window.keys.shape[1] * (window.keys.shape[3] + window.values.shape[3])
    return layer.core.batch * layer.core.length * numbers_per_token * layer.dtype.itemsize


def _padding(real: Tensor, position_ids: Tensor | None, past: int, core: CacheLayer) -> tuple[list[int], list[int]]:
    """Left padding of each row and the RoPE position of its first real token.

    ``real`` bool [B, past + Q] are the tokens that count; without ``position_ids [B or 1, Q]`` models number
    the columns. Rows that began in the past keep the origin they have in ``core``.
    """
    padding = (real.cumsum(1) == 0).sum(1)
    origin = padding
    if position_ids is not None and position_ids.dim() == 2:
        first = (padding - past).clamp(0, position_ids.shape[1] - 1)
        origin = position_ids.expand(real.shape[0], -1).gather(1, first[:, None].to(position_ids.device))[:, 0]
    before = core.origin if past else [0] * real.shape[0]
    rows = zip(padding.tolist(), origin.tolist(), before, strict=True)
    pairs = [(pad, now if pad >= past else then) for pad, now, then in rows]
    return [pad for pad, _ in pairs], [position for _, position in pairs]


def qjl_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for ``AttentionInterface``: over packed codes where ``key`` is a handle, sdpa otherwise."""
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    is_special = isinstance(key, CachedStates) or softcap is not None or sinks is not None
    if dropout or kwargs.get("position_bias") is not None or not is_special:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("output_attentions"):
        _warn_of_missing_weights()
    if attention_mask is None and not _is_causal(module, kwargs):
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    scoring = Scoring(scaling or query.shape[-1] ** -0.5, attention_mask, softcap, sinks)
    if not isinstance(key, CachedStates):
        return attend_dense(query, key, value, scoring).transpose(1, 2).contiguous(), None
    if not key.layer.knows_padding and _tells_padding(attention_mask):
        key.layer.observe_mask(attention_mask, kwargs.get("position_ids"))
    return key.layer.attend(query, scoring).transpose(1, 2).contiguous(), None


@functools.lru_cache(maxsize=1)
def _warn_of_missing_weights() -> None:
    logger.warning("attention over packed codes has no weights to return: set the attention to eager for them")


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    is_causal = kwargs.get("is_causal")
    return getattr(module, "is_causal", True) if is_causal is None else is_causal


def _tells_padding(mask: Tensor | None) -> TypeGuard[Tensor]:
    return mask is not None and mask.dtype == torch.bool and mask.shape[2] > 1


AttentionInterface.register(ATTENTION, qjl_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def enable(model: PreTrainedModel, preset: str | Path | CacheConfig = DEFAULT_PRESET) -> PreTrainedModel:
    """Make plain ``model.generate(...)`` use a fresh quantized cache for each call. Returns the model.

    A cache or a ``cache_implementation`` given to ``generate`` still wins.
    """
    config = resolve(preset)
    KVCache(model, config)  # raises now what would go wrong later
    vars(model)["_prepare_cache_for_generation"] = functools.partial(_prepare_fresh_cache, model, config)
    return model


def _prepare_fresh_cache(
    model: PreTrainedModel,
    config: CacheConfig,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    prepare = type(model)._prepare_cache_for_generation  # type: ignore[attr-defined]
    prepare(model, generation_config, model_kwargs, *args, **kwargs)
    cache = model_kwargs.get("past_key_values")
    is_chosen = generation_config.cache_implementation or getattr(cache, "_is_user_defined", False)
    if type(cache) is not DynamicCache or is_chosen:
        return
    model_kwargs["past_key_values"] = KVCache(model, config)
    if generation_config.is_assistant:
        model_kwargs["past_key_values"].activate_past_recording()


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable`` and what ``KVCache(model)`` set: generate and attention are transformers' own again."""
    vars(model).pop("_prepare_cache_for_generation", None)
    forget_statistics(model)
    _detach(model)
    return model


_sources_of: weakref.WeakKeyDictionary[PreTrainedModel, list[LayerSource]] = weakref.WeakKeyDictionary()


def _shared_sources(model: PreTrainedModel) -> list[LayerSource]:
    """What all caches of one model share: statistics on disk and fitted codecs."""
    if model not in _sources_of:
        _sources_of[model] = _sources(model.config, _calibrated_statistics(model))
    return _sources_of[model]


def forget_statistics(model: PreTrainedModel) -> None:
    """New caches of this model read its statistics again; caches that exist keep theirs."""
    _sources_of.pop(model, None)


def _sources(config: PreTrainedConfig, on_disk: statistics.StatisticsFile | None = None) -> list[LayerSource]:
    announce = _Announcement(config.model_type)
    return [
        LayerSource(
            find_rope(config, shape.kind) if shape.is_quantized else None,
            functools.partial(_layer_of, on_disk, shape.index),
            announce,
        )
        for shape in layer_shapes(config)
    ]


def _layer_of(file: statistics.StatisticsFile | None, index: int) -> statistics.LayerStatistics | None:
    return file.layer(index) if file is not None else None


class _Announcement:
    """Says where a model's statistics came from, once for all of its layers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_made = False

    def __call__(self, tokens: int) -> None:
        if not self.is_made:
            self.is_made = True
            logger.info("%s: statistics taken from the first prompt, %d tokens", self.name, tokens)


def _can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the model's layers call the attention that its configuration names."""
    return _attention_of(model) == ATTENTION or model._can_set_attn_implementation()


def _attention_of(model: PreTrainedModel) -> str:
    """Attention implementation of the decoder."""
    return text_config(model.config)._attn_implementation


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the decoder's attention; encoders of images or sound keep theirs."""
    decoder, parts = text_config(model.config), model.config.sub_configs
    own = [part for part in parts if getattr(model.config, part, None) is decoder]
    model.set_attn_implementation(dict.fromkeys(own or [""], name))


@contextmanager
def attention_set_to(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The decoder's attention is ``name`` for a while, and then what it was.

    Raises:
        QJLError: if the model's layers do not call the attention that its configuration names.
    """
    before = _attention_of(model)
    if not _can_set_attention(model):
        raise QJLError(
            f"{model.config.model_type} does not use transformers' attention interface, so its attention cannot be "
            "replaced: take a preset in place of bits, or another model."
        )
    try:
        _set_attention(model, name)
        yield
    finally:
        _set_attention(model, before)


def _attach(model: PreTrainedModel) -> None:
    if _REPLACED in vars(model):
        return
    vars(model)[_REPLACED] = _attention_of(model)
    if _can_set_attention(model):
        _set_attention(model, ATTENTION)
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)


def _detach(model: PreTrainedModel) -> None:
    before = vars(model).pop(_REPLACED, None)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in (_before_forward, _after_forward)]:
            del hooks[number]
    if before is not None and _attention_of(model) == ATTENTION:
        _set_attention(model, before)


def _before_forward(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> None:
    """Tell the cache its padding; collect statistics under our attention, whatever the model's own."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, KVCache):
        return
    cache.settle()
    inputs = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
    if inputs is None or inputs.shape[1] > 1 or not cache.get_seq_length():
        cache.observe_padding(kwargs.get("attention_mask"), kwargs.get("position_ids"))
    if _attention_of(model) != ATTENTION and cache.wants_queries:
        vars(model)[_INTERRUPTED] = _attention_of(model)
        _set_attention(model, ATTENTION)


def _after_forward(model: PreTrainedModel, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    before = vars(model).pop(_INTERRUPTED, None)
    if before is not None:
        _set_attention(model, before)
    cache = kwargs.get("past_key_values")
    if isinstance(cache, KVCache) and output is not None:
        cache.settle()


def statistics_path(model: PreTrainedModel) -> Path | None:
    """Where ``qjl calibrate`` keeps this model's statistics; None for a model without a fingerprint."""
    name = fingerprint_or_none(model)
    return None if name is None else statistics.path_of(name)


def _calibrated_statistics(model: PreTrainedModel) -> statistics.StatisticsFile | None:
    path = statistics_path(model)
    return statistics.StatisticsFile(path, path.stem) if path is not None and path.exists() else None
