"""One forward pass for new tokens of many sequences, each with a cache of its own.

The tokens lie one sequence behind the other in a batch of one. All of a model but its attention works token by token,
and attention takes each sequence's tokens to its own cache: nothing is padded, sequences come and go without a copy,
and none can see another's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qjl.architecture import layer_shapes
from qjl.attention import causal_mask
from qjl.compat import CACHE, Cache
from qjl.errors import QJLError
from qjl.hf import CachedStates, attention_over, attention_watched

_KINDS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class RowStates:
    """Keys or values ``[1, H, T, D]`` of each row, and how many of the new tokens are its own."""

    rows: list[Tensor]
    lengths: list[int]


class Rows(Cache):
    """The caches of some sequences during one forward pass, with how many new tokens each is given."""

    def __init__(self, caches: Sequence[Cache], lengths: list[int]) -> None:
        super().__init__(layers=[])
        self.caches = caches
        self.lengths = lengths

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[RowStates, RowStates]:
        pairs = [
            cache.update(keys, values, layer_idx, *args, **kwargs)
            for cache, keys, values in zip(
                self.caches, key_states.split(self.lengths, 2), value_states.split(self.lengths, 2), strict=True
            )
        ]
        return (
            RowStates([keys for keys, _ in pairs], self.lengths),
            RowStates([values for _, values in pairs], self.lengths),
        )


def read(model: PreTrainedModel, caches: Sequence[Cache], tokens: Sequence[Sequence[int]]) -> Tensor:
    """Give each cache its next tokens; logits behind the last token of each, ``float32 [rows, vocabulary]``."""
    lengths = [len(row) for row in tokens]
    held = [cache.get_seq_length() for cache in caches]
    positions = [torch.arange(start, start + length) for start, length in zip(held, lengths, strict=True)]
    ids = torch.tensor([token for row in tokens for token in row], dtype=torch.int64)
    last = torch.tensor(lengths, dtype=torch.int64).cumsum(0) - 1
    device = model.device
    output = model(
        input_ids=ids[None].to(device),
        position_ids=torch.cat(positions)[None].to(device),
        logits_to_keep=last.to(device),
        **{CACHE: Rows(caches, lengths)},
    )
    return output.logits[0].float()


@contextmanager
def rows_in(model: PreTrainedModel) -> Iterator[None]:
    """As long as it lasts, ``read`` can be called with the model.

    Raises:
        QJLError: if a layer of the model is no attention, or does not call the attention that the configuration names.
    """
    others = sorted({shape.kind for shape in layer_shapes(model.config)} - _KINDS)
    if others:
        raise QJLError(
            f"{model.config.model_type} has layers of {others[0]}, which cannot read several sequences in one pass: "
            "serve a model with attention layers alone."
        )
    with attention_watched(model, _rows_attention):
        yield


def _rows_attention(
    own: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | RowStates,
    value: Tensor | RowStates,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Each row by itself; for other caches what the model's own function computes."""
    if not isinstance(key, RowStates) or not isinstance(value, RowStates):
        return own(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    outputs = [
        attention_over(module, queries, keys, values, _mask(queries, keys, window), **kwargs)[0]
        for queries, keys, values in zip(query.split(key.lengths, 2), key.rows, value.rows, strict=True)
    ]
    return torch.cat(outputs, 1), None


def _mask(query: Tensor, keys: Tensor, window: int | None) -> Tensor | None:
    """Causal with the queries last, within a window if there is one; None where attention sees to that itself."""
    queries, columns = query.shape[2], keys.shape[2]
    is_cut = window is not None and columns > window
    if isinstance(keys, CachedStates) or not (is_cut or 1 < queries < columns):
        return None
    mask = causal_mask(queries, columns, query.device)
    return mask.triu(columns - queries - window + 1) if window is not None and is_cut else mask
