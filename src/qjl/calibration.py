"""Statistics of a model from a text, kept on disk for all later runs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl import statistics
from qjl.architecture import context_length
from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.fingerprints import fingerprint
from qjl.hf import KVCache, forget_statistics, own_codecs
from qjl.methods.balanced import Balanced
from qjl.presets import CacheConfig
from qjl.statistics import MIN_TOKENS, LayerStatistics

ROWS, ROW_TOKENS = 4, 1024
_KEEP_ALL_EXACT = CacheConfig(Balanced(), Balanced(2, metric=False), recent=1 << 30, name="calibration")


@torch.no_grad()
def model_statistics(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[int, LayerStatistics]:
    """Statistics of every quantized layer from ``input_ids [B, T]``, in one forward pass."""
    cache = KVCache(model, _KEEP_ALL_EXACT, codecs=own_codecs(model, _KEEP_ALL_EXACT))
    model(input_ids=input_ids.to(model.device), logits_to_keep=1, **cache_argument(cache))
    stores = zip(cache.sources, cache.stores, strict=True)
    return {core.number: source.measure(core, store) for source, store in stores for core in store.layers.values()}


def calibrate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Path:
    """Measure a model on a text and save its statistics under its fingerprint; returns the file.

    Caches made from now on use them; caches that exist keep the codecs they were fitted with.

    Raises:
        QJLError: if the text is shorter than 256 tokens, the model has no fingerprint, or the cache folder is not
            writable.
    """
    path = statistics.path_of(fingerprint(model))
    statistics.save(path, model_statistics(model, rows_of(model, tokenizer, text)), path.stem)
    forget_statistics(model)
    return path


def rows_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """The beginning of a text as a model is measured on it: ``int64 [at most 4, T]``, T at most 1,024.

    Raises:
        QJLError: if the text is shorter than 256 tokens.
    """
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, : ROWS * ROW_TOKENS]
    row = min(ROW_TOKENS, context_length(model.config) or ROW_TOKENS, len(tokens))
    if row < MIN_TOKENS:
        raise QJLError(f"calibration needs a text of at least {MIN_TOKENS} tokens, this one has {row}.")
    return tokens[: len(tokens) // row * row].view(-1, row)
