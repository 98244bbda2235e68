"""One prompt, two caches: transformers' own and a quantized one, with the numbers that tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qjl import corpora
from qjl.architecture import context_length
from qjl.compat import cache_argument
from qjl.conversation import MARK, chat_tokens
from qjl.errors import QJLError
from qjl.generation import Generation, bf16_cache_bytes, generate, require_context
from qjl.hf import KVCache
from qjl.plan import Planner
from qjl.presets import CacheConfig
from qjl.teacher_forcing import Agreement, compare, log_probabilities

ESSAY_OPENING = "A few days ago I finally figured out something I've wondered about"
QUESTION = "Explain the main argument of this essay to a friend."
CHECKED_TOKENS = 256
Stage = Literal["full", "quantized", "check"]
_CHARACTERS_PER_TOKEN = 8  # more than any essay has


@dataclass(frozen=True)
class Prompt:
    """A conversation about the beginning of an essay.

    ``ids[:essay_end]`` end where the essay is cut, and ``rest`` is how it goes on.
    """

    ids: list[int]
    essay_end: int
    rest: list[int]
    question: str


@dataclass(frozen=True)
class Comparison:
    """Both texts, and what the quantized cache costs and saves."""

    preset: str
    full: Generation
    quantized: Generation
    prompt_tokens: int
    cache_bytes: int
    cache_bytes_full: int
    bits_keys: float
    bits_values: float
    kl: float
    top1: float
    checked_tokens: int
    context: int | None
    compression_at_context: float | None

    @property
    def compression(self) -> float:
        """How many times smaller than the same tokens in bfloat16, everything counted."""
        return self.cache_bytes_full / self.cache_bytes

    @property
    def bits(self) -> float:
        """True bits per number of quantized tokens."""
        return (self.bits_keys + self.bits_values) / 2

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "preset": self.preset,
            "prompt_tokens": self.prompt_tokens,
            "cache_bytes": self.cache_bytes,
            "cache_bytes_full": self.cache_bytes_full,
            "compression": self.compression,
            "compression_at_context": self.compression_at_context,
            "context": self.context,
            "bits": self.bits,
            "bits_keys": self.bits_keys,
            "bits_values": self.bits_values,
            "bits_with_window": 16 / self.compression,
            "kl": self.kl,
            "top1": self.top1,
            "checked_tokens": self.checked_tokens,
            "tokens_per_second": self.quantized.tokens_per_second,
            "tokens_per_second_full": self.full.tokens_per_second,
            "text": self.quantized.text,
            "text_full": self.full.text,
        }


def essay_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int, question: str = QUESTION) -> Prompt:
    """A prompt of about ``tokens`` tokens: the beginning of an essay, and a question about it."""
    text = corpora.essays()
    start = text.index(ESSAY_OPENING)
    wanted = tokens + CHECKED_TOKENS + 1
    essay = tokenizer(text[start : start + wanted * _CHARACTERS_PER_TOKEN], verbose=False).input_ids
    head, tail = chat_tokens(tokenizer, [{"role": "user", "content": f"{MARK}\n\n{question}"}])
    cut = tokens - len(head) - len(tail)
    if cut < 1:
        raise QJLError(f"a prompt of {tokens} tokens has no room for an essay: ask for more.")
    return Prompt(head + essay[:cut] + tail, len(head) + cut, essay[cut : cut + CHECKED_TOKENS + 1], question)


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    preset: CacheConfig,
    max_new_tokens: int,
    *,
    on_stage: Callable[[Stage], None] = lambda stage: None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Generate with both caches, then let both read how the essay goes on, and compare their predictions.

    Raises:
        QJLError: if the prompt does not fit the model's context.
    """
    require_context(model, len(prompt.ids))
    full_cache, cache = DynamicCache(config=model.config), KVCache(model, preset)
    on_stage("full")
    full = generate(model, tokenizer, prompt.ids, full_cache, max_new_tokens, on_text=on_text)
    on_stage("quantized")
    quantized = generate(model, tokenizer, prompt.ids, cache, max_new_tokens, on_text=on_text)
    nbytes, full_nbytes = cache.nbytes, bf16_cache_bytes(cache, model.dtype)
    on_stage("check")
    agreement = _read_on(model, full_cache, cache, prompt)
    context = context_length(model.config)
    bits_keys, bits_values = cache.bits
    return Comparison(
        preset=preset.name,
        full=full,
        quantized=quantized,
        prompt_tokens=len(prompt.ids),
        cache_bytes=nbytes,
        cache_bytes_full=full_nbytes,
        bits_keys=bits_keys,
        bits_values=bits_values,
        kl=float(agreement.kl.mean()),
        top1=float(agreement.same_top.float().mean()),
        checked_tokens=agreement.kl.numel(),
        context=context,
        compression_at_context=_compression_at(model, preset, context),
    )


@torch.inference_mode()
def _read_on(model: PreTrainedModel, full_cache: DynamicCache, cache: KVCache, prompt: Prompt) -> Agreement:
    """Both caches go back to the essay's end and are fed its rest, the quantized one as in decoding.

    What was quantized stays so: the window is at most as long as it was.
    """
    for one in (full_cache, cache):
        one.crop(prompt.essay_end - one.get_seq_length())
    rest = torch.tensor([prompt.rest], device=model.device, dtype=torch.int64)
    reference = log_probabilities(model(input_ids=rest[:, :-1], **cache_argument(full_cache)).logits)
    return compare(model, cache, rest.cpu(), 0, reference)


def _compression_at(model: PreTrainedModel, preset: CacheConfig, context: int | None) -> float | None:
    if context is None:
        return None
    planner = Planner(model.config, torch.bfloat16)
    held = planner.cache_bytes(preset, context) + planner.codec_bytes(preset)
    return planner.full_bytes(context) / held
