"""Prompts on a CPU: vLLM's own attention, several times as fast there as torch's.

It reads pages of exact tokens, so those in codes are decoded into such pages, one layer at a time. The pages hold the
prompts that are being read, and are gone after each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from qjl.attention import Scoring
from qjl.packed import BLOCK
from qjl.vllm.compat import (
    VLLM_CPU_ATTN_SPLIT_KV,
    CPUAttentionBackend,
    _get_attn_isa,
    cpu_attention_with_kv_cache,
    cpu_attn_get_scheduler_metadata,
    cpu_attn_reshape_and_cache,
)
from qjl.vllm.paged_layer import PagedLayer
from qjl.vllm.steps import Alone, on

_CPU = torch.device("cpu")


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
        cpu_attention_with_kv_cache(
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
        shape = (self.pages, keys.shape[1], 2 * BLOCK, keys.shape[2])
        pages = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
        cached = pages[:, :, :BLOCK], pages[:, :, BLOCK:]
        begin = 0
        for one, own in zip(self.alone, fresh, strict=True):
            for key, value in (*layer.before(one), own):
                slots = self.slots[begin : begin + len(key)]
                cpu_attn_reshape_and_cache(
                    key=key,
                    value=value,
                    key_cache=cached[0],
                    value_cache=cached[1],
                    slot_mapping=slots,
                    isa=self.isa,
                )
                begin += len(slots)
        return cached


class PromptKernel:
    """vLLM's kernel for heads of one shape."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._heads, self._kv_heads, self._head_dim, self._dtype = heads, kv_heads, head_dim, dtype
        self._isa = _get_attn_isa(dtype=dtype, block_size=BLOCK, head_size=head_dim)

    @staticmethod
    def serves(head_dim: int, device: torch.device) -> bool:
        return device.type == "cpu" and head_dim in CPUAttentionBackend.get_supported_head_sizes()

    def prepare(self, alone: Sequence[Alone]) -> Prompts:
        fresh = [one.stop - one.begin for one in alone]
        totals = [one.context + count for one, count in zip(alone, fresh, strict=True)]
        counts = [-(-total // BLOCK) for total in totals]
        *firsts, pages = accumulate(counts, initial=0)
        slots = np.concatenate([first * BLOCK + np.arange(total) for total, first in zip(totals, firsts, strict=True)])
        table = (np.array(firsts)[:, None] + np.arange(max(counts))).clip(max=pages - 1)
        starts, lengths = (on(_CPU, np.array(x)).int() for x in ([*accumulate(fresh, initial=0)], totals))
        schedule = cpu_attn_get_scheduler_metadata(
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
            enable_kv_split=VLLM_CPU_ATTN_SPLIT_KV,
        )
        return Prompts(alone, on(_CPU, slots), pages, on(_CPU, table).int(), starts, lengths, schedule, self._isa)
