"""Attention over rows of pools in Triton: exact tokens are gathered by slot, and the kernels for pages do the rest.

Nothing waits for the device, and shapes depend on those of the tables alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qjl.ops.forms import ExactPool, ExactTokens, PagedTokens, Pool, Rows
from qjl.ops.triton.decoding import attend_paged


def attend(
    query: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    queries: int,
    scaling: float,
    softcap: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    columns = rows.table.shape[1] * pool.page
    of_packed, of_exact = (None, None) if bias is None else (bias[..., :columns], bias[..., columns:])
    packed = PagedTokens(
        pool.keys,
        pool.values,
        pool.key_form,
        pool.value_form,
        rows.table,
        rows.lengths,
        rows.skip,
        rows.origins,
        pool.derived,
    )
    parts = [_gathered(exact, rows, queries, of_exact)] if rows.slots.shape[1] and exact.keys.shape[0] else []
    return attend_paged(query.float().contiguous(), packed, of_packed, parts, queries, scaling, softcap)


def append_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pool: Pool,
    exact: ExactPool,
    rows: Rows,
    scaling: float,
    softcap: float,
) -> Tensor:
    batch, query_heads, queries, dim = query.shape
    heads, value_dim = exact.values.shape[1:]
    for fresh, kept in ((keys, exact.keys), (values, exact.values)):
        _put(fresh, kept, rows)
    by_head = query.reshape(batch, heads, query_heads // heads * queries, dim)
    out, _ = attend(by_head, pool, exact, rows, queries, scaling, softcap, None)
    return out.view(batch, query_heads, queries, value_dim).transpose(1, 2).to(query.dtype).contiguous()


def _gathered(exact: ExactPool, rows: Rows, queries: int, bias: Tensor | None) -> ExactTokens:
    """``[B, H, E, D]``, zeros where a row has no token, and what hides these and what a query comes before."""
    place = torch.arange(rows.slots.shape[1], device=rows.slots.device)
    is_there = (place < rows.counts[:, None]) & (rows.slots >= 0)  # [B, E]
    slots = torch.where(is_there, rows.slots, 0).long()
    keys, values = (
        x[slots].masked_fill(~is_there[:, :, None, None], 0).transpose(1, 2) for x in (exact.keys, exact.values)
    )
    before = torch.arange(queries - 1, -1, -1, device=slots.device)  # how many tokens come after each query's own
    is_seen = is_there[:, None] & (place < rows.counts[:, None, None] - before[:, None])
    hidden = _hidden(~is_seen)[:, None]
    return ExactTokens(keys, values, hidden if bias is None else hidden + bias)


def _hidden(mask: Tensor) -> Tensor:
    """Minus infinity where it holds, otherwise 0."""
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)


def _put(fresh: Tensor, kept: Tensor, rows: Rows) -> None:
    batch, heads, count, dim = fresh.shape
    if batch * count:
        _put_tokens[(batch * count, heads)](
            fresh, fresh.stride(), kept, kept.stride(), rows.slots, rows.slots.stride(0), rows.counts, count, dim,
            DIM=triton.next_power_of_2(dim),
        )  # fmt: skip


@triton.jit
def _put_tokens(fresh, fresh_stride, kept, kept_stride, slots, slot_stride, counts, count, dim, DIM: tl.constexpr):
    """``grid (B * Q, H)``: a token to the slot of its place, where there is one."""
    row, token = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    head, i = tl.program_id(1).to(tl.int64), tl.arange(0, DIM)
    place = tl.load(counts + row) - count + token
    slot = tl.load(slots + row * slot_stride + place, mask=place >= 0, other=-1).to(tl.int64)
    at = fresh + row * fresh_stride[0] + head * fresh_stride[1] + token.to(tl.int64) * fresh_stride[2]
    numbers = tl.load(at + i * fresh_stride[3], mask=i < dim, other=0.0)
    to = kept + slot * kept_stride[0] + head * kept_stride[1] + i
    if slot >= 0:
        tl.store(to, numbers.to(kept.dtype.element_ty), mask=i < dim)
