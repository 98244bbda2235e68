"""Text from a model and a cache, word by word, and the time that decoding took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qjl.architecture import context_length
from qjl.compat import cache_argument
from qjl.errors import QJLError
from qjl.hf import KVCache
from qjl.presets import DEFAULT_PRESET, CacheConfig, resolve

BF16_BYTES = 2
PREFILL_TOKENS = 2048  # read at once: as fast as all together, in less memory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a ``temperature`` of 0 always takes the likeliest."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise QJLError(f"temperature must be 0 or more, not {self.temperature}.")

    def settings(self) -> dict[str, Any]:
        """Arguments of ``model.generate``."""
        if not self.temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature}


GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """What ``generate`` wrote: ``tokens`` are the new ones, ``ids`` all of them with the prompt's.

    ``tokens_per_second`` is of decoding alone, from the first new token to the last; None for fewer than two.
    """

    text: str
    ids: list[int]
    tokens: int
    tokens_per_second: float | None


def make_cache(model: PreTrainedModel, preset: str | Path | CacheConfig = DEFAULT_PRESET) -> Cache:
    """A quantized cache; for a preset that quantizes nothing, transformers' own."""
    if resolve(preset).is_exact:
        return DynamicCache(config=model.config)
    return KVCache(model, preset)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all that a cache holds."""
    if isinstance(cache, KVCache):
        return cache.nbytes
    states = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(state.nbytes for state in states if isinstance(state, Tensor))


def bf16_cache_bytes(cache: Cache, dtype: torch.dtype) -> int:
    """Bytes that the same tokens take at 16 bits per number, whatever ``dtype`` the model runs in."""
    held = cache.full_nbytes if isinstance(cache, KVCache) else cache_bytes(cache)
    return held * BF16_BYTES // dtype.itemsize


def require_context(model: PreTrainedModel, tokens: int, what: str = "the prompt") -> int | None:
    """Room for new tokens after ``tokens``; None if there is no limit.

    Raises:
        QJLError: if there is none left.
    """
    context = context_length(model.config)
    if context is None:
        return None
    if tokens >= context:
        raise QJLError(f"{what} has {tokens} tokens and the model's context is {context}: make it shorter.")
    return context - tokens


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Those that end a text."""
    end = model.generation_config.eos_token_id if model.generation_config else None
    return set() if end is None else {end} if isinstance(end, int) else set(end)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: list[int], cache: Cache, on_tokens: Callable[[int], None] = lambda count: None
) -> None:
    """Read a prompt into a cache, some tokens at a time; ``on_tokens`` hears how many were read."""
    for part in torch.tensor([ids], device=model.device, dtype=torch.int64).split(PREFILL_TOKENS, dim=1):
        model(input_ids=part, logits_to_keep=1, **cache_argument(cache))
        on_tokens(part.shape[1])


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    cache: Cache,
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue ``ids``; only those that the cache does not hold yet go through the model.

    ``on_text`` hears the words as they come. The text ends at ``max_new_tokens``, with the model's context, or where
    the model ends it.

    Raises:
        QJLError: if the prompt is empty or does not fit the model's context.
    """
    if not ids:
        raise QJLError("the prompt is empty: give some text.")
    room = require_context(model, len(ids))
    limit = max_new_tokens if room is None else min(max_new_tokens, room)
    streamer = _TimedStreamer(tokenizer, on_text)
    torch.manual_seed(sampling.seed)
    prompt = torch.tensor([ids], device=model.device, dtype=torch.int64)
    output = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        **cache_argument(cache),
        max_new_tokens=limit,
        streamer=streamer,
        pad_token_id=_padding_token(tokenizer),
        **sampling.settings(),
    )
    return Generation(streamer.text, output[0].tolist(), streamer.tokens, streamer.tokens_per_second)


def _padding_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _TimedStreamer(TextStreamer):
    """Passes whole words on, and keeps the time of the first and the last token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self.tokens = 0
        self._on_text = on_text
        self._first = self._last = 0.0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            self._last = time.perf_counter()
            self._first = self._first or self._last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self._on_text(text)

    @property
    def tokens_per_second(self) -> float | None:
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else None
