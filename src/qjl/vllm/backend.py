"""The attention backend that vLLM sees: how large pages are, a plan per step, and attention by ``PagedLayer``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from qjl.attention import Scoring
from qjl.codecs import TokenShape
from qjl.errors import QJLError
from qjl.packed import BLOCK
from qjl.vllm import compat
from qjl.vllm.block_planner import PoolShape
from qjl.vllm.compat import (
    ATTENTION,
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    EngineSettings,
    KVCacheLayout,
    PageShape,
    extract_layer_index,
    overriding,
)
from qjl.vllm.paged_layer import PagedLayer
from qjl.vllm.prefill import PromptKernel, Prompts
from qjl.vllm.served_model import ServedModel, bytes_per_token, chosen_config
from qjl.vllm.steps import LayerStep, Steps

DRAFT_ROWS = 31  # query rows per KV head of a sequence with fresh tokens that reads with those of one, at most

logger = logging.getLogger("vllm.qjl")


@overriding
class QuantizedBackend(AttentionBackend):
    """Pages of packed codes beside a pool of exact tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return ATTENTION

    @staticmethod
    def get_impl_cls() -> type[QuantizedAttention]:
        return QuantizedAttention

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, BLOCK]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Pages are as large as the widest layer's codes."""
        return compat.packed(spec, bytes_per_token)


@dataclass(frozen=True, eq=False)
class StepMetadata(AttentionMetadata):
    """What all layers do in a step; ``prompts`` where vLLM's kernel takes them."""

    step: LayerStep
    prompts: Prompts | None


@overriding
class StepBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Plans each step, and gives the layers their codecs and pools when vLLM has made their pages."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings, pages = compat.settings(vllm_config), compat.pages(kv_cache_spec)
        _require_served(settings)
        config = chosen_config()
        most_queries = max(1, DRAFT_ROWS // (settings.heads // pages.heads))
        shape = PoolShape.of(pages.tokens, config.sinks, config.recent, settings.sequences, most_queries)
        self._steps = Steps(shape, config.recent, most_queries, settings.sequences, device)
        layers = [_paged_layer(settings, name, pages, shape, device) for name in layer_names]
        for name, layer in zip(layer_names, layers, strict=True):
            compat.attention_of(vllm_config, name).paged = layer
        self._kernel = _prompt_kernel(settings, pages, device)
        self._has_told_of_sinks = False
        logger.info(
            "qjl: preset %s, %d bytes per token in pages of %d tokens, beside a pool of %d exact tokens of %.2f GiB.",
            config.name,
            sum(layer.token_bytes for layer in layers),
            pages.tokens,
            shape.slots,
            sum(layer.nbytes for layer in layers) / 2**30,
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None: layers encode pages where these fill, which a graph of other steps would not do."""
        return AttentionCGSupport.NEVER

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        batch = compat.batch(common_attn_metadata)
        step = self._steps.next(batch.totals, batch.starts, batch.table, batch.pages)
        if self._steps.planner.missed_sinks and not self._has_told_of_sinks:
            logger.warning("qjl: first tokens of a sequence are read from their codes: more prompts than sink lines.")
            self._has_told_of_sinks = True
        return StepMetadata(step, self._kernel.prepare(step.alone) if self._kernel and step.alone else None)


@overriding
class QuantizedAttention(AttentionImpl[StepMetadata]):
    """Attention of one layer; ``paged`` is there once vLLM has made the pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        not_served = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "layers that share keys and values": kv_sharing_target_layer_name is not None,
            **{name.replace("_", " "): value is not None for name, value in others.items()},
        }
        found = [name for name, is_asked in not_served.items() if is_asked]
        if found:
            raise QJLError(f"quantized pages do not serve {', '.join(found)}: unset QJL_VLLM_PRESET for this model.")
        chosen_config()
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = scale
        self.kv_cache_dtype = kv_cache_dtype
        self.scoring = Scoring(scale, softcap=logits_soft_cap or None)
        self.paged: PagedLayer | None = None
        self.steps = 0

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """``query``, ``output [tokens, Hq, D]``; ``key``, ``value [tokens, H, D]``; ``kv_cache`` as in ``bind``."""
        if attn_metadata is None:
            return output.zero_()  # vLLM measures its memory
        if output_scale is not None or output_block_scale is not None:
            raise QJLError("outputs of quantized attention are not quantized: switch that fusion off.")
        assert self.paged is not None
        step, prompts, paged = attn_metadata.step, attn_metadata.prompts, self.paged
        paged.bind(kv_cache)
        paged.attend(step, query, key, value, self.scoring, output, prompts)
        self.steps += 1
        return output


def _prompt_kernel(settings: EngineSettings, pages: PageShape, device: torch.device) -> PromptKernel | None:
    if not PromptKernel.serves(pages.head_dim, device):
        return None
    return PromptKernel(settings.heads, pages.heads, pages.head_dim, settings.dtype)


def _paged_layer(
    settings: EngineSettings, name: str, pages: PageShape, shape: PoolShape, device: torch.device
) -> PagedLayer:
    heads = slice(settings.first_head, settings.first_head + pages.heads)
    tokens = TokenShape(pages.heads, pages.head_dim, pages.head_dim, device, settings.dtype)
    model = _served_model(settings.model, settings.revision)
    return PagedLayer(model.codecs(extract_layer_index(layer_name=name), heads, tokens), shape, tokens)


@cache
def _served_model(name: str, revision: str | None) -> ServedModel:
    return ServedModel(name, revision)


def _require_served(settings: EngineSettings) -> None:
    if settings.is_split:
        raise QJLError("quantized pages serve neither micro-batches nor context parallelism: switch them off.")
    if settings.sees_ahead:
        raise QJLError("quantized pages serve no model whose prompts see ahead: unset QJL_VLLM_PRESET for this model.")
    if settings.drafts not in (None, "ngram"):
        raise QJLError(f"quantized pages take drafts of ngram, and not of {settings.drafts}: choose that, or none.")
