"""``KVCache``: a quantized cache as transformers takes one, with its memory told and its files."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from qjl import compat, ops
from qjl.architecture import LayerShape, layer_shapes, rope_is_used, text_config
from qjl.cache import file as files
from qjl.cache.file import CacheFile, Header
from qjl.cache.index import Capacity, TokenIndex
from qjl.cache.layer import Layer
from qjl.cache.paged import PagedCache
from qjl.codecs import Codecs
from qjl.copies import Copied
from qjl.errors import QJLError
from qjl.fingerprints import fingerprint
from qjl.hf import own_layers as own
from qjl.hf.first_prompt import FirstPrompt
from qjl.hf.promises import WatchedCache, attach
from qjl.hf.sources import own_codecs, shared_codecs
from qjl.hf.wrapped_attention import QuantizedLayer, padding_of
from qjl.methods.base import storage_bytes
from qjl.modes import for_keeps, uncompiled
from qjl.presets import DEFAULT_PRESET, CacheConfig, resolve, to_dict


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
        codecs: what tokens are coded with; None for those that all caches of the model share, fitted to what
            ``qjl calibrate`` measured, or to the first prompt.
        max_cache_len, max_batch_size: tokens of a row, and rows, that room is made for at once; what comes beyond is
            refused, and tensors keep their places. None grows as needed. Codecs must be there before the first prompt.

    Raises:
        QJLError: for an unknown preset, a model whose cache cannot be quantized or whose queries cannot be
            seen, or a head_dim that does not pack.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        preset: str | Path | CacheConfig = DEFAULT_PRESET,
        *,
        codecs: Codecs | None = None,
        max_cache_len: int | None = None,
        max_batch_size: int = 1,
    ) -> None:
        config = _configuration(model)
        self.config = resolve(preset) if codecs is None else _config_of(codecs, preset)
        self.shapes = layer_shapes(config)
        if codecs is None:
            is_shared = isinstance(model, PreTrainedModel)
            codecs = shared_codecs(model, self.config) if is_shared else own_codecs(config, self.config)  # type: ignore[arg-type]
        if self.config.pre_rope:
            _require_fixed_rope(config, codecs)
        self.codecs = codecs
        self._capacity = None if max_cache_len is None else Capacity(max_batch_size, max_cache_len)
        kinds = [kind for kind in (False, True) if any(self._of_kind(kind))]
        self.sources = [FirstPrompt(codecs, config.model_type) for _ in kinds]
        self.stores = [self._store(kind, source) for kind, source in zip(kinds, self.sources, strict=True)]
        names = (files.CROSS if kind else files.TEXT for kind in kinds)
        self._groups = dict(zip(names, self.stores, strict=True))  # as files call them
        layers = compat.DynamicCache(config=text_config(config)).layers
        for store in self.stores:
            for number, core in store.layers.items():
                layers[number] = QuantizedLayer(store, core, has_text=not self.shapes[number].is_cross_attention)
        super().__init__(layers=layers)
        ops.active_backend()  # chosen now, so that a process that is forked knows of it
        self.prompt_ids: Tensor | None = None
        self._model: weakref.ref[PreTrainedModel] | None = None
        if isinstance(model, PreTrainedModel):
            self._model = weakref.ref(model)
            _require_cache_argument(model)
            self._require_queries(model)
            attach(model)

    def _of_kind(self, is_cross_attention: bool) -> Iterator[LayerShape]:
        """Quantized layers that hold the same tokens: those of the text, or what is attended to across."""
        for shape in self.shapes:
            if shape.is_quantized and shape.is_cross_attention == is_cross_attention:
                yield shape

    def _store(self, is_cross_attention: bool, source: FirstPrompt) -> PagedCache:
        shapes = list(self._of_kind(is_cross_attention))
        for shape in shapes:
            for quantizer in self.codecs.quantizers(shape.index):
                quantizer.layout(shape.head_dim)
        capacity = None if is_cross_attention else self._capacity
        numbers = [shape.index for shape in shapes]
        return PagedCache(numbers, self.config.sinks, self.config.recent, source, capacity)

    def _require_queries(self, model: PreTrainedModel) -> None:
        if compat.uses_attention_interface(model):
            return
        if any(self.codecs.needs_queries(core.number) for core in self.cores):
            raise QJLError(
                f"{model.config.model_type} does not use transformers' attention interface, so its queries "
                "cannot be seen: choose a preset that needs none, such as kivi-2."
            )

    @property
    def quantized_layers(self) -> list[QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]

    @property
    def cores(self) -> list[Layer]:
        """The quantized layers, without transformers around them."""
        return [layer.core for layer in self.quantized_layers]

    @property
    def index(self) -> TokenIndex:
        """Which tokens of the text there are, and where."""
        return self.stores[0].index

    @property
    def packed_tokens(self) -> list[int]:
        """Tokens of each row that are read as codes."""
        return self.index.packed_tokens

    @property
    def tokens_until_due(self) -> int:
        """How many tokens may be read at once with the result of one by one: until some are quantized."""
        return min(store.index.tokens_until_due for store in self.stores)

    @property
    def needs_statistics(self) -> bool:
        """Whether codecs are fitted to a model's statistics."""
        return any(self.codecs.needs_statistics(core.number) for core in self.cores)

    @property
    def has_codecs(self) -> bool:
        """Whether codecs are there, or need no prompt to be fitted to."""
        return all(self.codecs.is_ready(core.number) for core in self.cores)

    @property
    def wants_queries(self) -> bool:
        """Whether statistics are still awaited, for which the queries of a prompt must be seen."""
        return any(
            source.wants_queries(core)
            for source, store in zip(self.sources, self.stores, strict=True)
            for core in store.layers.values()
        )

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.updates += 1
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Keys, values and window of each layer, as a ``DynamicCache`` gives them."""
        for layer in self.layers:
            keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
            yield keys, values, compat.window_of(layer)

    @for_keeps
    def before_forward(self, tokens: int | None, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """End the pass before, and learn the padding of one that reads a prompt."""
        self.settle()
        if tokens is None or tokens > 1 or not self.get_seq_length():
            self.observe_padding(attention_mask, position_ids)

    def after_forward(self) -> None:
        try:
            self.settle()
        except QJLError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """A forward pass has failed: quantized layers are as they were before it."""
        for store in self.stores:
            store.abandon()

    @for_keeps
    def settle(self) -> None:
        """End the pass at hand: what left the window is quantized."""
        for store in self.stores:
            store.settle()

    def mark(self, token_mask: Tensor) -> None:
        """Say which of the next T tokens may be quantized, ``bool [B, T]``; the others stay exact.

        A block of 64 tokens is quantized if all of them may be. To be called before the forward pass (or ``generate``)
        that reads them, which may do so in chunks. Left padding has its columns too. Once a mask was given, tokens that
        none speaks of stay exact: those generated, for example. A mask replaces what an earlier one said of tokens yet
        to come.

        >>> cache.mark(inputs["input_ids"] == model.config.image_token_id)
        >>> model.generate(**inputs, cache=cache)

        Raises:
            QJLError: if the mask is of another kind, or for another number of rows.
        """
        if any(self._of_kind(False)):
            self.stores[0].mark(token_mask)

    def observe_padding(self, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Learn the left padding before a forward pass with this mask ``[B, T]`` and positions ``[B, Q]``."""
        for layer in self.quantized_layers:
            layer.knows_padding = True
        if attention_mask is None or attention_mask.dim() != 2 or not any(self._of_kind(False)):
            return
        index = self.index
        self.stores[0].set_padding(*padding_of(attention_mask.bool(), position_ids, index.columns, index))

    # Rows and lengths: what transformers asks of each layer is done once for all that are quantized

    def _others(self) -> dict[int, Any]:
        """Transformers' own layers by their numbers."""
        return {number: one for number, one in enumerate(self.layers) if not isinstance(one, QuantizedLayer)}

    @for_keeps
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, told as a negative number; or all but the first, where transformers allows that."""
        if tokens_to_remove > 0 and not compat.CROP_TAKES_LENGTHS:
            raise ValueError("crop takes a negative number: how many tokens to remove from the end.")
        self.settle()
        for store in self.stores:
            store.crop(tokens_to_remove if tokens_to_remove > 0 else store.index.columns + tokens_to_remove)
        for layer in self._others().values():
            layer.crop(tokens_to_remove)

    @for_keeps
    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = beam_idx.tolist()
        for store in self.stores:
            store.select(rows)
        for layer in self._others().values():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows: what a tensor of rows can be indexed with, or a tuple of numbers. An empty layer has none."""
        chosen = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        for store in self.stores:
            if store.index.batch:  # an empty one cannot be indexed
                store.select(torch.arange(store.index.batch)[chosen].reshape(-1).tolist())
        for layer in self._others().values():
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for store in self.stores:
            store.select([row for row in range(store.index.batch) for _ in range(repeats)])
        for layer in self._others().values():
            layer.batch_repeat_interleave(repeats)

    def reset(self) -> None:
        self.prompt_ids = None
        for store in self.stores:
            store.reset()
        for layer in self.quantized_layers:
            layer.knows_padding = not layer.has_text
        for layer in self._others().values():
            layer.reset()

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
        ids = None if token_ids is None else self._ids_held(torch.as_tensor(token_ids))
        more = {} if ids is None else {"token_ids": ids}
        own_layers = {}
        for number, layer in self._others().items():
            own_layers[str(number)], arrays = own.described(number, layer)
            more |= arrays
        for source in self.sources:
            more |= source.arrays()
        header = Header(
            configuration=to_dict(self.config),
            groups=files.groups_of(self._groups),
            rows=self.index.batch,
            tokens=self.get_seq_length(),
            codecs=self.codecs.digest(core.number for core in self.cores),
            cache_bytes=self.nbytes,
            bf16_bytes=self.full_nbytes * torch.bfloat16.itemsize // model.dtype.itemsize,
            model=model.config.model_type,
            fingerprint=fingerprint(model),
            dtype=str(model.dtype).removeprefix("torch."),
            token_sha256=None if ids is None else files.sha256_of_tokens(ids),
            own_layers=own_layers,
        )
        return files.write(Path(path), header, self._groups, self.codecs, more)

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
        file = CacheFile(Path(path))
        file.verify()
        _require_same_model(file, model)
        cache = cls(model, file.configuration)
        layers = [core.number for core in cache.cores]
        if file.header.codecs != cache.codecs.digest(layers):
            own_codecs = file.codecs(cache.codecs.ropes, cache.codecs.statistics)
            if any(own_codecs.has_learned(number) for number in layers):
                cache = cls(model, file.configuration, codecs=own_codecs)
        cache._restore(file, model.device)
        return cache

    def _restore(self, file: CacheFile, device: torch.device) -> None:
        file.restore(self._groups, device)
        arrays, header = file.arrays(), file.header
        with file.fitting():
            for source, store in zip(self.sources, self.stores, strict=True):
                source.restore(arrays, store, device)
            for number, layer in self._others().items():
                own.restore(number, layer, header.own_layers[str(number)], arrays, device)
        for layer in self.quantized_layers:
            layer.knows_padding = layer.knows_padding or bool(layer.store.index.batch)
        ids = file.token_ids
        self.prompt_ids = None if ids is None else ids.to(device, torch.int64)

    def _ids_held(self, token_ids: Tensor) -> Tensor:
        """Those that the cache holds, ``int32 [B, T]``."""
        ids, rows, tokens = token_ids.detach(), self.index.batch, self.get_seq_length()
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < tokens:
            raise QJLError(f"the cache holds {rows} x {tokens} tokens, and token_ids are {list(token_ids.shape)}.")
        return ids[:, :tokens].to("cpu", torch.int32)

    # Memory, everything counted

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens (packed, window, sinks, layers that are not quantized) and of fitted codecs."""
        return sum(store.nbytes for store in self.stores) + self.codec_nbytes + self._other_nbytes

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room that buffers keep for growth."""
        return sum(store.allocated_nbytes for store in self.stores) + self.codec_nbytes + self._other_nbytes

    @property
    def codec_nbytes(self) -> int:
        """Bytes of projections, maps and means: per model, shared by all its caches."""
        pairs = (core.codecs or self.codecs.known(core.number) or () for core in self.cores)
        return storage_bytes(tensor for pair in pairs for codec in pair for tensor in codec.tensors)

    @property
    def full_nbytes(self) -> int:
        """Bytes that transformers' own cache would take for the same tokens."""
        pairs = ((_numbers(layer), layer.dtype) for layer in self.quantized_layers)
        return sum(count * dtype.itemsize for count, dtype in pairs if dtype is not None) + self._other_nbytes

    @property
    def bits(self) -> tuple[float, float]:
        """True bits per number of quantized keys and values, averaged over the quantized layers."""
        pairs = [
            [quantizer.bits(shape.head_dim) for quantizer in self.codecs.quantizers(shape.index)]
            for shape in self.shapes
            if shape.is_quantized
        ]
        return sum(key for key, _ in pairs) / len(pairs), sum(value for _, value in pairs) / len(pairs)

    @property
    def bits_with_window(self) -> float:
        """Bits per number with the exact window, the sinks and the codecs counted in."""
        numbers = sum(_numbers(layer) for layer in self.quantized_layers)
        return 8 * (sum(store.nbytes for store in self.stores) + self.codec_nbytes) / max(numbers, 1)

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


def _config_of(codecs: Codecs, preset: str | Path | CacheConfig) -> CacheConfig:
    """Codecs say how to code; a configuration that codes alike may name other windows."""
    config = resolve(preset)
    if config.coding == codecs.config.coding:
        return config
    if preset == DEFAULT_PRESET:
        return codecs.config
    raise QJLError(f"the codecs are of {codecs.config.name}, not of {config.name}: give the one or the other.")


def _require_fixed_rope(config: PreTrainedConfig, codecs: Codecs) -> None:
    if rope_is_used(config) and all(rope is None for rope in codecs.ropes.values()):
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


def _require_same_model(file: CacheFile, model: PreTrainedModel) -> None:
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


def _numbers(layer: QuantizedLayer) -> int:
    """Of all keys and values of a layer, padding included, as transformers' own cache would hold them."""
    shape, index = layer.core.shape, layer.store.index
    if shape is None:
        return 0
    return index.batch * layer.get_seq_length() * shape.heads * (shape.key_dim + shape.value_dim)
