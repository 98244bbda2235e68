"""Prompts on a CPU: vLLM's own attention, several times as fast there as torch's.

It reads pages of exact tokens, so those in codes are decoded into such pages, one layer at a time. The pages hold the
prompts that are being read, and are gone after each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from qjl.attention import Scoring
from qjl.packed import BLOCK
from qjl.vllm.layer import Alone, PagedLayer


@dataclass(frozen=True, eq=False)
class Prompts:
    """Sequences that attend by themselves, as vLLM's kernel takes them; made once for all layers.

    ``slots``: of all their tokens in ``pages`` pages, one sequence behind the other, which ``table [n, most]`` names;
    ``starts [n + 1]`` of their fresh tokens among themselves; ``lengths [n]`` with those before.
    """

    alone: Sequence[Alone]
    slots: Tensor
    pages: int
    table: Tensor
    starts: Tensor
    lengths: Tensor
    schedule: Tensor
    isa: str

    def attend(
        self, layer: PagedLayer, query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring, out: Tensor
    ) -> None:
        """Attention of their fresh tokens: the same tensors as in ``PagedLayer.attend``."""
        fresh = [slice(one.begin, one.stop) for one in self.alone]
        cached = self._filled(layer, [(keys[own], values[own]) for own in fresh])
        asked = torch.cat([query[own] for own in fresh])
        found = torch.empty_like(asked)
        ops.cpu_attention_with_kv_cache(
            query=asked,
            key_cache=cached[0],
            value_cache=cached[1],
            output=found,
            query_start_loc=self.starts,
            seq_lens=self.lengths,
            scale=scoring.scaling,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.table,
            softcap=scoring.softcap or 0.0,
            scheduler_metadata=self.schedule,
            s_aux=None,
        )
        for own, part in zip(fresh, found.split([own.stop - own.start for own in fresh]), strict=True):
            out[own] = part

    def _filled(self, layer: PagedLayer, fresh: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Pages of keys and of values, with all tokens."""
        keys = fresh[0][0]
        # zeros: slots behind a sequence are masked, and must be finite
        pages = torch.zeros(self.pages, keys.shape[1], 2 * BLOCK, keys.shape[2], dtype=keys.dtype)
        cached = pages[:, :, :BLOCK], pages[:, :, BLOCK:]
        begin = 0
        for one, own in zip(self.alone, fresh, strict=True):
            for tokens in (*layer.before(one), own):
                slots = self.slots[begin : begin + len(tokens[0])]
                ops.cpu_attn_reshape_and_cache(*tokens, *cached, slots, self.isa)
                begin += len(slots)
        return cached


class PromptKernel:
    """vLLM's kernel for heads of one shape."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._heads, self._kv_heads, self._head_dim, self._dtype = heads, kv_heads, head_dim, dtype
        self._isa = _get_attn_isa(dtype, BLOCK, head_dim)

    @staticmethod
    def serves(head_dim: int, device: torch.device) -> bool:
        return device.type == "cpu" and head_dim in CPUAttentionBackend.get_supported_head_sizes()

    def prepare(self, alone: Sequence[Alone]) -> Prompts:
        fresh = [one.stop - one.begin for one in alone]
        totals = [one.context + count for one, count in zip(alone, fresh, strict=True)]
        counts = [-(-total // BLOCK) for total in totals]
        *firsts, pages = accumulate(counts, initial=0)
        slots = [torch.arange(total) + first * BLOCK for total, first in zip(totals, firsts, strict=True)]
        table = torch.tensor(firsts, dtype=torch.int64)[:, None] + torch.arange(max(counts))
        starts = torch.tensor(list(accumulate(fresh, initial=0)), dtype=torch.int32)
        lengths = torch.tensor(totals, dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(alone),
            num_heads=self._heads,
            num_kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            seq_lens=lengths,
            dtype=self._dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        table = table.clamp(max=pages - 1).int()
        return Prompts(alone, torch.cat(slots), pages, table, starts, lengths, schedule, self._isa)
