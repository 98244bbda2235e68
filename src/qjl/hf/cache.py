"""``KVCache``: a quantized cache as transformers takes one, with its memory told and its files."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qjl import compat, stored, trees
from qjl.architecture import LayerShape, layer_shapes, rope_is_used, text_config
from qjl.cache import CacheLayer, LayerSource
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.fingerprints import fingerprint
from qjl.hf.attention import QuantizedLayer, padding_of
from qjl.hf.promises import WatchedCache, attach
from qjl.hf.sources import shared_sources, sources_of
from qjl.methods.base import storage_bytes
from qjl.modes import for_keeps
from qjl.presets import DEFAULT_PRESET, CacheConfig, from_dict, resolve, to_dict


class KVCache(Copied, WatchedCache):
    """A quantized key-value cache for one call of ``generate``, or for a whole conversation.

    >>> cache = qjl.KVCache(model, "b3")
    >>> model.generate(**inputs, cache=cache)

    The model stays as it is, but for hooks that tell the cache of its forward passes, and shares its statistics among
    all of its caches. Made with a configuration, nothing is attached to any model, and the statistics are this cache's
    own. Iterating gives the decoded keys and values of each layer. No gradient flows through a cache.

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
        sources = shared_sources(model) if is_shared else sources_of(config)  # type: ignore[arg-type]
        if self.config.pre_rope:
            _require_fixed_rope(config, sources)
        layers = compat.DynamicCache(config=text_config(config)).layers
        for shape in self.shapes:
            if shape.is_quantized:
                layers[shape.index] = self._quantized_layer(shape, sources[shape.index])
        super().__init__(layers=layers)
        self.prompt_ids: Tensor | None = None
        self._unsettled: CacheLayer | None = None
        self._model: weakref.ref[PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self._model = weakref.ref(model)
            _require_cache_argument(model)
            self._require_queries(model)
            attach(model)

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
        return QuantizedLayer(core, has_text=not shape.is_cross_attention)

    def _require_queries(self, model: PreTrainedModel) -> None:
        if compat.uses_attention_interface(model):
            return
        if any(core.key.needs_queries or core.value.needs_queries for core in self.cores):
            raise QJLError(
                f"{model.config.model_type} does not use transformers' attention interface, so its queries "
                "cannot be seen: choose a preset that needs none, such as kivi-2."
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
        """Whether statistics are still awaited, for which the queries of a prompt must be seen."""
        return any(core.wants_queries for core in self.cores)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._unsettled is not None and not self._unsettled.is_settled:
            self.settle()
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.updates += 1
        layer = self.layers[layer_idx]
        if isinstance(layer, QuantizedLayer):
            self._unsettled = layer.core
        return states

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and window of each layer, as a ``DynamicCache`` gives them."""
        for layer in self.layers:
            keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
            yield keys, values, compat.window_of(layer)

    @for_keeps
    def before_forward(self, tokens: int | None, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Settle, and learn the padding of a pass that reads a prompt."""
        self.settle()
        if tokens is None or tokens > 1 or not self.get_seq_length():
            self.observe_padding(attention_mask, position_ids)

    def after_forward(self) -> None:
        self.settle()

    @for_keeps
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
        >>> model.generate(**inputs, cache=cache)

        Raises:
            QJLError: if the mask is of another kind, or for another number of rows.
        """
        on_host = token_mask.cpu()
        for core in self.cores:
            core.mark(on_host)

    def observe_padding(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Learn the left padding before a forward pass with this mask ``[B, T]`` and positions ``[B, Q]``."""
        cores = [layer.core for layer in self.quantized_layers if layer.has_text]
        for layer in self.quantized_layers:
            layer.knows_padding = True
        if attention_mask is None or attention_mask.dim() != 2 or not cores:
            return
        padding, origin = padding_of(attention_mask.bool(), position_ids, cores[0].length, cores[0])
        for core in cores:
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

    @for_keeps
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
    @for_keeps
    def load(cls, path: str | Path, model: PreTrainedModel) -> KVCache:
        """The cache that ``save`` wrote, with the codecs that its tokens were coded with.

        On the CPU its tokens stay memory-mapped until a layer grows.

        >>> cache = qjl.KVCache.load("prompt.qjl", model)
        >>> ids = torch.cat([cache.prompt_ids, question_ids], dim=1)
        >>> model.generate(ids, cache=cache)

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
        held = compat.tree_leaves([vars(layer) for layer in self.layers if not isinstance(layer, QuantizedLayer)])
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


def _require_cache_argument(model: PreTrainedModel) -> None:
    if compat.replaces_default_cache(model) or not compat.takes_cache_from_users(model):
        raise QJLError(
            f"{model.config.model_type} has a cache of its own, or takes none from its users, in "
            f"{compat.versions()}: it cannot be quantized."
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
