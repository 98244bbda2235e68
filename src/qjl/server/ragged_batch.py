"""One forward pass for new tokens of many sequences, all of which lie in one cache.

The tokens lie one sequence behind the other in a batch of one. All of a model but its attention works token by token,
and attention reads each sequence's own rows: nothing is padded, sequences come and go without a copy, and none can see
another's tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qjl.architecture import LayerShape, layer_shapes, text_config
from qjl.attention import Scoring, causal_mask
from qjl.cache.layer import Layer
from qjl.cache.paged import Fitted, PagedCache
from qjl.cache.pool import page_bytes
from qjl.compat import CACHE, Cache
from qjl.errors import QJLError
from qjl.generation import BF16_BYTES, bf16_cache_bytes, cache_bytes
from qjl.hf import KVCache, attention_over, attention_watched
from qjl.packed import BLOCK
from qjl.presets import CacheConfig

_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False)
class _Coded:
    """What a quantized layer was given: attention asks the cache."""

    layer: Layer


@dataclass(frozen=True, eq=False)
class _Split:
    """Keys or values ``[1, H, T, D]`` of each sequence, in a layer that is not quantized."""

    rows: list[Tensor]
    counts: list[int]


class RaggedBatch(Cache):
    """The tokens of some sequences, each named by a number.

    Layers that are quantized lie in one ``PagedCache``, a row for each sequence; others, such as sliding windows, and
    all where the configuration quantizes nothing, are transformers' own, some for each sequence.

    Args:
        memory: bytes within which the tensors that hold tokens stay as long as these fit; None for no limit.

    Raises:
        QJLError: if a layer of the model is no attention, its cache cannot be quantized, or codecs wait for a prompt.
    """

    def __init__(self, model: PreTrainedModel, config: CacheConfig, memory: int | None = None) -> None:
        super().__init__(layers=[])
        _require_attention_layers(model)
        self.model, self.memory = model, memory
        self.store: PagedCache | None = None if config.is_exact else _store(model, config)
        self._sequences: list[int] = []  # in the order of the store's rows
        self._others: dict[int, DynamicCache] = {}
        self._next = 0
        self._fresh: list[tuple[int, int]] = []  # sequences of the pass at hand, and how many tokens each is given

    # Sequences

    def add(self) -> int:
        """An empty sequence."""
        self._next += 1
        self._sequences.append(self._next)
        self._others[self._next] = DynamicCache(config=text_config(self.model.config))
        if self.store is not None:
            self.store.settle()
            self.store.index.add_rows(1)
        return self._next

    def share(self, sequence: int, tokens: int) -> int | None:
        """A sequence that begins with the first tokens of another one, whose pages it shares; None if it cannot.

        Layers that are transformers' own are copied, and not cropped.
        """
        if tokens < self.length(sequence) and not self._is_quantized_whole:
            return None
        row = self._sequences.index(sequence)
        self._next += 1
        self._sequences.append(self._next)
        self._others[self._next] = copy.deepcopy(self._others[sequence])
        if self.store is not None:
            self.store.select([*range(len(self._sequences) - 1), row])
            self.store.index.crop_row(len(self._sequences) - 1, tokens)
        return self._next

    @property
    def _is_quantized_whole(self) -> bool:
        return self.store is not None and len(self.store.layers) == len(layer_shapes(self.model.config))

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        row = self._sequences.index(sequence)
        if self.store is not None:
            self.store.select([other for other in range(len(self._sequences)) if other != row])
        del self._sequences[row], self._others[sequence]

    def clear(self) -> None:
        """Forget all sequences, and give back what they took."""
        if self.store is not None:
            self.store.reset()
        self._sequences, self._others = [], {}

    def length(self, sequence: int) -> int:
        """Its tokens."""
        if self.store is not None:
            return self.store.index.lengths[self._sequences.index(sequence)]
        return self._others[sequence].get_seq_length()

    # A pass

    def read(self, tokens: Mapping[int, Sequence[int]]) -> Tensor:
        """Give sequences their next tokens; logits behind the last token of each, ``float32 [sequences, vocabulary]``,
        in the order of the cache's rows (``order``).

        A pass that fails leaves quantized layers as they were.
        """
        self._fresh = [(one, len(tokens[one])) for one in self.order(tokens)]
        counts = [count for _, count in self._fresh]
        ids = torch.tensor([token for one, _ in self._fresh for token in tokens[one]], dtype=torch.int64)
        positions = [torch.arange(start, start + count) for start, count in zip(self._starts(), counts, strict=True)]
        last = torch.tensor(counts, dtype=torch.int64).cumsum(0) - 1
        device = self.model.device
        try:
            if self.store is not None:
                self._make_room({one: len(given) for one, given in tokens.items()})
                self.store.begin([len(tokens.get(sequence, ())) for sequence in self._sequences])
            output = self.model(
                input_ids=ids[None].to(device),
                position_ids=torch.cat(positions)[None].to(device),
                logits_to_keep=last.to(device),
                **{CACHE: self},
            )
            if self.store is not None:
                self.store.settle()
        finally:
            if self.store is not None:
                self.store.roll_back()  # where the pass has failed
        return output.logits[0].float()

    def order(self, sequences: Mapping[int, Any]) -> list[int]:
        """Sequences in the order in which a pass over them lays their tokens."""
        return [one for one in self._sequences if one in sequences]

    def _starts(self) -> list[int]:
        return [self.length(one) for one, _ in self._fresh]

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[_Coded | _Split, _Coded | _Split]:
        if self.store is not None and layer_idx in self.store.layers:
            layer = self.store.layers[layer_idx]
            self.store.append(layer, key_states.detach(), value_states.detach())
            return _Coded(layer), _Coded(layer)
        counts = [count for _, count in self._fresh]
        pairs = [
            self._others[one].update(keys, values, layer_idx, *args, **kwargs)
            for (one, _), keys, values in zip(
                self._fresh, key_states.split(counts, 2), value_states.split(counts, 2), strict=True
            )
        ]
        return _Split([keys for keys, _ in pairs], counts), _Split([values for _, values in pairs], counts)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """As long as it lasts, in this thread, the model can ``read`` with this cache.

        Raises:
            QJLError: if a layer of the model does not call the attention that the configuration names.
        """
        with attention_watched(self.model, self._attention):
            yield

    def _attention(
        self, own: Any, module: torch.nn.Module, query: Tensor, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Each sequence by itself; for other caches what the model's own function computes."""
        if isinstance(key, _Coded):
            assert self.store is not None
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            scoring = Scoring(scaling, None, kwargs.get("softcap"), kwargs.get("s_aux"))
            return self.store.attend_ragged(key.layer, query, scoring), None
        if not isinstance(key, _Split) or not isinstance(value, _Split):
            return own(module, query, key, value, mask, **kwargs)
        window = kwargs.get("sliding_window")
        outputs = [
            attention_over(module, queries, keys, values, _mask(queries, keys, window), **kwargs)[0]
            for queries, keys, values in zip(query.split(key.counts, 2), key.rows, value.rows, strict=True)
        ]
        return torch.cat(outputs, 1), None

    # Memory

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens; what sequences share counts once, and codecs, which all caches share, do not."""
        store = 0 if self.store is None else self.store.nbytes
        return store + self._bytes_of_others(self._sequences)

    def nbytes_of(self, sequences: Sequence[int]) -> int:
        """The same of some sequences."""
        rows = [self._sequences.index(one) for one in sequences]
        store = 0 if self.store is None else self._bytes_of(*map(len, self.store.index.held(rows)))
        return store + self._bytes_of_others(sequences)

    def _bytes_of_others(self, sequences: Sequence[int]) -> int:
        """Of layers that are not quantized."""
        return sum(cache_bytes(self._others[one]) for one in sequences)

    @property
    def allocated_nbytes(self) -> int:
        """The same with the room that is free."""
        store = 0 if self.store is None else self.store.allocated_nbytes
        return store + self._bytes_of_others(self._sequences)

    @property
    def is_loose(self) -> bool:
        """Whether more than half of the room for slots or for pages is free."""
        if self.store is None:
            return False
        return any(2 * of.in_use < of.capacity for of in (self.store.index.slots, self.store.index.pages))

    def shrink(self) -> None:
        """Give back the room that is free."""
        if self.store is not None:
            self.store.shrink()

    def bf16_bytes(self, sequences: Sequence[int]) -> int:
        """Bytes that the tokens of these sequences take at 16 bits per number."""
        dtype = self.model.dtype
        others = sum(bf16_cache_bytes(self._others[one], dtype) for one in sequences)
        return others + BF16_BYTES * self._numbers_per_token * sum(map(self.length, sequences))

    def bytes_for(self, tokens: int) -> int:
        """At most so many bytes do this many tokens of a sequence take that is new, or shares what another has read."""
        if self.store is None:
            return self._other_bytes(tokens)
        index = self.store.index
        slots = min(tokens, index.sinks + index.recent + 2 * BLOCK)
        return self._bytes_of(slots, -(-tokens // BLOCK) + 1) + self._other_bytes(tokens)

    def bytes_for_pass(self, counts: Mapping[int, int]) -> int:
        """At most so many bytes do the next tokens of these sequences take, until they are read."""
        others = sum(map(self._other_bytes, counts.values()))
        return others if self.store is None else others + self._bytes_of(*self._need(counts))

    def _need(self, counts: Mapping[int, int]) -> tuple[int, int]:
        assert self.store is not None
        return self.store.index.need([counts.get(one, 0) for one in self._sequences])

    def _make_room(self, counts: Mapping[int, int]) -> None:
        """Before a pass: pools grow within the memory, and if they must exceed it, by no more than the pass needs."""
        if self.memory is None or self.store is None:
            return
        index, need = self.store.index, self._need(counts)
        others = self._bytes_of_others(self._sequences) + sum(map(self._other_bytes, counts.values()))
        room = self.memory - others
        if self._bytes_with(need) > room:
            self.store.shrink()
        spare = max(room - self._bytes_with(need), 0) // 2
        index.slots.ample = index.slots.room_with(need[0]) + spare // self._bytes_of(1, 0)
        index.pages.ample = index.pages.room_with(need[1]) + spare // self._bytes_of(0, 1)

    def _bytes_with(self, need: tuple[int, int]) -> int:
        """Bytes of the pools once there is room for so many more slots and pages."""
        assert self.store is not None
        index = self.store.index
        return self._bytes_of(index.slots.room_with(need[0]), index.pages.room_with(need[1]))

    def _bytes_of(self, slots: int, pages: int) -> int:
        return slots * self._numbers_per_token * self.model.dtype.itemsize + pages * self._page_bytes

    def _other_bytes(self, tokens: int) -> int:
        """At most, of layers that are not quantized."""
        numbers = sum(_numbers(shape) * min(tokens, shape.window or tokens) for shape in self._own_shapes)
        return numbers * self.model.dtype.itemsize

    @cached_property
    def _page_bytes(self) -> int:
        """Of all quantized layers."""
        if self.store is None:
            return 0
        quantizers = self.store.source.codecs.quantizers
        return sum(
            shape.num_key_value_heads * page_bytes([one.layout(shape.head_dim) for one in quantizers(shape.index)])
            for shape in self._quantized_shapes
        )

    @cached_property
    def _numbers_per_token(self) -> int:
        """Of keys and values in quantized layers."""
        return sum(map(_numbers, self._quantized_shapes))

    @property
    def _quantized_shapes(self) -> list[LayerShape]:
        return [shape for shape in layer_shapes(self.model.config) if self.store and shape.index in self.store.layers]

    @cached_property
    def _own_shapes(self) -> list[LayerShape]:
        """Layers that are transformers' own."""
        quantized = {shape.index for shape in self._quantized_shapes}
        return [shape for shape in layer_shapes(self.model.config) if shape.index not in quantized]


def _numbers(shape: LayerShape) -> int:
    """Of a token's key and value."""
    return 2 * shape.num_key_value_heads * shape.head_dim


def _store(model: PreTrainedModel, config: CacheConfig) -> PagedCache:
    cache = KVCache(model, config)  # which asks whether the model is one that can be quantized
    if not cache.has_codecs:
        raise QJLError(
            f"{config.name} is fitted to statistics that are not there: call fit_codecs, or `qjl calibrate`."
        )
    numbers = [shape.index for shape in cache.shapes if shape.is_quantized]
    return PagedCache(numbers, config.sinks, config.recent, Fitted(cache.codecs))


def _require_attention_layers(model: PreTrainedModel) -> None:
    others = sorted({shape.kind for shape in layer_shapes(model.config)} - _KINDS)
    if others:
        raise QJLError(
            f"{model.config.model_type} has layers of {others[0]}, which cannot read several sequences in one pass: "
            "serve a model with attention layers alone."
        )


def _mask(query: Tensor, keys: Tensor, window: int | None) -> Tensor | None:
    """Causal with the queries last, within a window if there is one; None where attention sees to that itself."""
    queries, columns = query.shape[2], keys.shape[2]
    is_cut = window is not None and columns > window
    if not is_cut and not 1 < queries < columns:
        return None
    mask = causal_mask(queries, columns, query.device)
    return mask.triu(columns - queries - window + 1) if window is not None and is_cut else mask
