"""The attention backend that vLLM sees: how large pages are, a plan per step, and attention by ``PagedLayer``."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from qjl.attention import Scoring
from qjl.errors import QJLError
from qjl.methods.nibble import EXPAND_FROM_ROWS
from qjl.packed import BLOCK
from qjl.vllm.layer import PagedLayer, Step
from qjl.vllm.model import ServedModel, bytes_per_token, chosen_config
from qjl.vllm.planning import Planner, PoolShape, Request
from qjl.vllm.prompts import PromptKernel, Prompts

logger = logging.getLogger("vllm.qjl")


class QuantizedBackend(AttentionBackend):
    """Pages of packed codes beside a pool of exact tokens."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

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
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages are as large as the widest layer's codes."""
        if spec.state_content_bytes is not None:
            return spec
        if not isinstance(spec, FullAttentionSpec) or spec.head_size != spec.head_size_v:
            raise QJLError("only full attention with keys as wide as values is served: unset QJL_VLLM_PRESET.")
        return replace(spec, dtype=torch.uint8, state_content_bytes=bytes_per_token(spec.head_size))


@dataclass(frozen=True, eq=False)
class StepMetadata(AttentionMetadata):
    """What all layers do in a step; ``prompts`` where vLLM's kernel takes them."""

    step: Step
    prompts: Prompts | None


class StepBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Plans each step, and gives the layers their codecs and pools when vLLM has made their pages."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        _require_served(vllm_config)
        config = chosen_config()
        self.page_tokens = kv_cache_spec.block_size
        sequences = vllm_config.scheduler_config.max_num_seqs
        lines = sequences * (1 + -(-config.recent // self.page_tokens))
        shape = PoolShape(self.page_tokens, config.sinks, lines, 2 * sequences if config.sinks else 0)
        self.planner = Planner(shape, config.recent)
        self.layers = [_paged_layer(vllm_config, name, kv_cache_spec, shape, device) for name in layer_names]
        group = (
            vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config) // kv_cache_spec.num_kv_heads
        )
        self.most_queries = max(1, (EXPAND_FROM_ROWS - 1) // group)
        self.kernel = _prompt_kernel(group, kv_cache_spec, vllm_config.model_config.dtype, device)
        self._has_told_of_sinks = False
        logger.info(
            "qjl: preset %s, %d bytes per token in pages of %d tokens, beside a pool of %d exact tokens of %.2f GiB.",
            config.name,
            sum(layer.token_bytes for layer in self.layers),
            self.page_tokens,
            shape.slots,
            sum(layer.nbytes for layer in self.layers) / 2**30,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        requests = _requests(common_attn_metadata, self.page_tokens)
        plan = self.planner.plan(requests)
        if self.planner.missed_sinks and not self._has_told_of_sinks:
            logger.warning("qjl: first tokens of a sequence are read from their codes: more prompts than sink lines.")
            self._has_told_of_sinks = True
        step = Step.of(plan, requests, self.page_tokens, self.most_queries, self.device)
        return StepMetadata(step, self.kernel.prepare(step.alone) if self.kernel and step.alone else None)


def _requests(common: CommonAttentionMetadata, page_tokens: int) -> list[Request]:
    lengths = common.seq_lens_cpu_upper_bound if common.seq_lens_cpu_upper_bound is not None else common.seq_lens
    totals = lengths.tolist()
    starts = common.query_start_loc_cpu.tolist()
    tables = common.block_table_tensor.cpu().numpy()
    requests = []
    for row in range(common.num_reqs):
        fresh = starts[row + 1] - starts[row]
        pages = tables[row, : -(-totals[row] // page_tokens)].tolist()
        requests.append(Request(pages, totals[row] - fresh, fresh))
    return requests


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
        layer: AttentionLayer,
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
        paged.write(step, key, value)
        if prompts is None:
            paged.attend(step, query, key, value, self.scoring, output)
        else:
            paged.attend_together(step, query, key, value, self.scoring, output)
            prompts.attend(paged, query, key, value, self.scoring, output)
        self.steps += 1
        return output


def _prompt_kernel(group: int, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> PromptKernel | None:
    if not PromptKernel.serves(spec.head_size, device):
        return None
    return PromptKernel(group * spec.num_kv_heads, spec.num_kv_heads, spec.head_size, dtype)


def _paged_layer(
    vllm_config: VllmConfig, name: str, spec: AttentionSpec, shape: PoolShape, device: torch.device
) -> PagedLayer:
    attention = vllm_config.compilation_config.static_forward_context[name]
    config = vllm_config.model_config
    total, parallel = config.get_total_num_kv_heads(), vllm_config.parallel_config.tensor_parallel_size
    first = get_tensor_model_parallel_rank() * total // parallel
    heads = slice(first, first + spec.num_kv_heads)
    model = _served_model(config.model, config.revision)
    codecs = model.codecs(extract_layer_index(name), heads, spec.head_size, config.dtype, device)
    paged = PagedLayer(codecs, shape, spec.num_kv_heads, spec.head_size, config.dtype, device)
    attention.impl.paged = paged
    return paged


@cache
def _served_model(name: str, revision: str | None) -> ServedModel:
    return ServedModel(name, revision)


def _require_served(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.use_ubatching or parallel.decode_context_parallel_size > 1:
        raise QJLError("quantized pages serve neither micro-batches nor context parallelism: switch them off.")
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.method != "ngram":
        raise QJLError(f"quantized pages take drafts of ngram, and not of {drafts.method}: choose that, or none.")
