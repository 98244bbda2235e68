"""Attention over a cache layer: every segment gives (out, log-sum-exp), and segments merge exactly.

Fresh tokens of a prefill attend exactly; tokens that were quantized before are scored on their packed codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl import compat, ops
from qjl.cache import CacheLayer, ExactSegment, PackedSegment
from qjl.methods.nibble import EXPAND_FROM_ROWS
from qjl.ops.forms import ExactTokens
from qjl.packed import BLOCK

TILE_NUMBERS = 1 << 24  # scores or decoded numbers in flight at once
FUSE_FROM_TOKENS = 256  # with so many query tokens, decoding and torch's kernel are 4 times as fast on a CPU


@dataclass(frozen=True, eq=False)
class Scoring:
    """What turns scores into weights: ``scaling * <q, k>``, soft-capped, masked.

    ``mask``: bool (True attends) or additive ``[B or 1, 1 or Hq, Q, columns]``; None is causal with the queries last,
    so an encoder, whose tokens see each other both ways, gives ``torch.ones(1, 1, 1, columns).bool().expand(-1, -1, Q,
    -1)``, which takes no room.
    ``sink_logits [Hq]``: a learned logit per head that takes weight and gives nothing (attention sinks of gpt-oss).
    """

    scaling: float
    mask: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None


def attend(query: Tensor, layer: CacheLayer, scoring: Scoring) -> Tensor:
    """Attention of ``query [B, Hq, Q, D]`` over all tokens of the layer, the last Q of which are the query's own.

    Returns ``[B, Hq, Q, Dv]`` in the query's dtype. Hq is a multiple of the layer's KV heads (GQA, MQA).
    """
    return attend_segments(query, *layer.segments(), scoring, layer.length)


def attend_segments(
    query: Tensor, exact: list[ExactSegment], packed: PackedSegment | None, scoring: Scoring, columns: int
) -> Tensor:
    """The same over segments with ``columns`` tokens in all."""
    plain = packed is None and len(exact) == 1 and exact[0].valid is None and exact[0].columns == 0
    if plain and scoring.softcap is None and scoring.sink_logits is None:
        return _fused(query, exact[0], scoring)
    if packed is not None and _takes_one_step(query, exact[0], packed):
        return _tiled(_one_step, query, exact, packed, scoring, columns)
    if not _takes_fused_parts(query, exact[0], scoring):
        return _tiled(_by_parts, query, exact, packed, scoring, columns)
    if scoring.mask is None and _all_count(exact[-1], query.shape[2]):
        return _by_fused_parts(query, exact, packed, scoring)
    return _tiled(_by_fused_parts, query, exact, packed, scoring, columns)


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """The same over plain ``keys, values [B, H, T, D]``, for layers that are not quantized."""
    return _tiled(_by_parts, query, [ExactSegment(keys, values, 0, None)], None, scoring, keys.shape[2])


def _takes_one_step(query: Tensor, exact: ExactSegment, packed: PackedSegment) -> bool:
    """Whether the backend takes all tokens at once: on a CPU for few rows, where looking up beats decoding."""
    rows = query.shape[1] // exact.keys.shape[1] * query.shape[2]
    is_worth_it = rows < EXPAND_FROM_ROWS or ops.backend_of(query.device) != "cpu"
    return is_worth_it and ops.offers("attend", query) and packed.as_operand is not None


def _takes_fused_parts(query: Tensor, exact: ExactSegment, scoring: Scoring) -> bool:
    is_plain = scoring.softcap is None and exact.keys.shape[3] == exact.values.shape[3]
    return is_plain and query.device.type == "cpu" and query.shape[2] >= FUSE_FROM_TOKENS


def _all_count(segment: ExactSegment, tokens: int) -> bool:
    """Whether its last ``tokens`` are the queries' own, and none of it is padding."""
    return segment.valid is None and isinstance(segment.columns, int) and segment.keys.shape[2] >= tokens


def _tiled(
    attend_tile: Callable[[Tensor, list[ExactSegment], PackedSegment | None, Scoring], Tensor],
    query: Tensor,
    exact: list[ExactSegment],
    packed: PackedSegment | None,
    scoring: Scoring,
    columns: int,
) -> Tensor:
    """Some query tokens at a time."""
    tokens = query.shape[2]
    if tokens == 1:
        return attend_tile(query, exact, packed, scoring)
    outputs = [
        attend_tile(query[:, :, rows], exact, packed, _of_rows(scoring, rows, query, columns))
        for rows in _query_tiles(query, columns)
    ]
    return torch.cat(outputs, dim=2)


def _one_step(query: Tensor, exact: list[ExactSegment], packed: PackedSegment | None, scoring: Scoring) -> Tensor:
    assert packed is not None
    assert packed.as_operand is not None
    rows = _grouped(query, exact[0]).contiguous()
    exact_tokens = [
        ExactTokens(segment.keys, segment.values, _bias(segment, scoring, segment.keys.shape[2]))
        for segment in exact
        if segment.keys.shape[2]
    ]
    bias = _bias(packed, scoring, packed.blocks * BLOCK)
    softcap = scoring.softcap or 0.0
    part = ops.attend(rows, packed.as_operand, bias, exact_tokens, query.shape[2], scoring.scaling, softcap)
    return _joined([part], query, scoring)


def _by_parts(query: Tensor, exact: list[ExactSegment], packed: PackedSegment | None, scoring: Scoring) -> Tensor:
    rows = _grouped(query, exact[0])
    return _joined(list(_parts(rows, exact, packed, scoring, query.shape[2])), query, scoring)


def _by_fused_parts(query: Tensor, exact: list[ExactSegment], packed: PackedSegment | None, scoring: Scoring) -> Tensor:
    """By torch's kernel, over packed tokens that are decoded a tile at a time."""
    parts = []
    if scoring.mask is None:
        before, own = _split_before(exact[-1], query.shape[2])
        parts.append(_fused_part(query, own.keys, own.values, None, scoring, is_causal=True))
        exact = [*exact[:-1], before]
    for segment in exact:
        if length := segment.keys.shape[2]:
            parts.append(_fused_part(query, segment.keys, segment.values, _bias(segment, scoring, length), scoring))
    for tile in [] if packed is None else _tiles(packed, 2 * query.shape[0] * exact[0].keys.shape[1] * query.shape[3]):
        keys = tile.key_codec.dequantize(tile.keys, tile.first)
        values = tile.value_codec.dequantize(tile.values, tile.first)
        parts.append(_fused_part(query, keys, values, _bias(tile, scoring, tile.blocks * BLOCK), scoring))
    return _joined(parts, query, scoring)


def _split_before(segment: ExactSegment, tokens: int) -> tuple[ExactSegment, ExactSegment]:
    """A segment of tokens that all count, without its last ``tokens``; and these."""
    assert isinstance(segment.columns, int)
    cut = segment.keys.shape[2] - tokens
    before = ExactSegment(segment.keys[:, :, :cut], segment.values[:, :, :cut], segment.columns, None)
    return before, ExactSegment(segment.keys[:, :, cut:], segment.values[:, :, cut:], segment.columns + cut, None)


def _fused_part(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scoring: Scoring, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    batch, heads = keys.shape[:2]
    folded = query.float().reshape(batch * heads, -1, *query.shape[2:])
    keys, values = (x.float().flatten(0, 1)[:, None].expand(-1, folded.shape[1], -1, -1) for x in (keys, values))
    if bias is not None and bias.shape[1] > 1:
        bias = bias.expand(batch, -1, -1, -1).reshape(*folded.shape[:2], *bias.shape[2:])
    elif bias is not None and bias.shape[0] > 1:
        bias = bias.repeat_interleave(heads, dim=0)
    out, lse = compat.flash_attention_for_cpu(
        folded, keys, values, is_causal=is_causal, attn_mask=bias, scale=scoring.scaling
    )
    if bias is not None:
        lse = lse.masked_fill(bias.amax(-1).isneginf(), -torch.inf)
    return out.reshape(batch, heads, -1, values.shape[3]), lse.reshape(batch, heads, -1)


def _grouped(query: Tensor, exact: ExactSegment) -> Tensor:
    """``float32 [B, H, group * Q, D]``."""
    return query.float().reshape(query.shape[0], exact.keys.shape[1], -1, query.shape[3])


def _joined(parts: list[tuple[Tensor, Tensor]], query: Tensor, scoring: Scoring) -> Tensor:
    """Merged, with what sinks weigh, in the shape and dtype of the query's."""
    batch, query_heads, tokens, _ = query.shape
    if scoring.sink_logits is not None:
        parts.append(_sink_part(parts[0][0], scoring.sink_logits, tokens))
    return merge(parts)[0].reshape(batch, query_heads, tokens, -1).to(query.dtype)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (out ``[..., D]``, log-sum-exp ``[...]``) of disjoint sets of tokens; a set of none has -inf."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    shift = torch.where(total.isinf(), 0, total)
    return sum(out * (lse - shift).exp()[..., None] for out, lse in parts), total  # type: ignore[return-value]


def _fused(query: Tensor, segment: ExactSegment, scoring: Scoring) -> Tensor:
    """Nothing packed yet: torch's own kernel. One query token folds its group, which is 10x faster on a CPU."""
    keys, values, mask, dtype = segment.keys, segment.values, scoring.mask, query.dtype
    query = query.to(keys.dtype)
    if mask is not None and mask.dtype not in (torch.bool, torch.float32):
        mask = mask.to(query.dtype)
    batch, query_heads, tokens, _ = query.shape
    group = query_heads // keys.shape[1]
    if tokens == 1:
        if mask is not None:
            mask = mask.expand(-1, query_heads, -1, -1).reshape(-1, keys.shape[1], group, mask.shape[3])
        folded = query.reshape(batch, keys.shape[1], group, -1)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scoring.scaling)
        return out.reshape(batch, query_heads, 1, -1).to(dtype)
    if mask is None and tokens < keys.shape[2]:
        mask = causal_mask(tokens, keys.shape[2], query.device)
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys, values))
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scoring.scaling
    ).to(dtype)


def causal_mask(queries: int, columns: int, device: torch.device, rows: slice = slice(None)) -> Tensor:
    """``bool [1, 1, queries, columns]`` for queries that are the last tokens, or for some ``rows`` of them."""
    last = torch.arange(columns - queries, columns, device=device)[rows]
    return (torch.arange(columns, device=device) <= last[:, None])[None, None]


def _of_rows(scoring: Scoring, rows: slice, query: Tensor, columns: int) -> Scoring:
    """Scoring of some of several query tokens, with the causal mask made explicit."""
    if scoring.mask is None:
        mask = causal_mask(query.shape[2], columns, query.device, rows)
    else:
        mask = scoring.mask[:, :, rows]
    return Scoring(scoring.scaling, mask, scoring.softcap, scoring.sink_logits)


def _query_tiles(query: Tensor, columns: int) -> Iterator[slice]:
    batch, heads, tokens, _ = query.shape
    size = max(1, TILE_NUMBERS // (batch * heads * min(columns, 64 * BLOCK)))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _parts(
    rows: Tensor, exact: list[ExactSegment], packed: PackedSegment | None, scoring: Scoring, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One by one, which holds the scores of a tile at a time."""
    for segment in exact:
        if segment.keys.shape[2]:
            yield _exact_part(rows, segment, scoring, tokens)
    if packed is not None:
        for tile in _tiles(packed, rows.shape[0] * rows.shape[1] * max(rows.shape[2], 2 * rows.shape[3])):
            yield _packed_part(rows, tile, scoring, tokens)


def _bias(segment: ExactSegment | PackedSegment, scoring: Scoring, length: int) -> Tensor | None:
    """What mask and validity add to the scores, ``float32 [B, 1 or Hq, Q, length]``; None for nothing."""
    if scoring.mask is None:
        return segment.bias
    mask = _segment_mask(scoring.mask, segment.columns, length).to(segment.device)
    is_bool = mask.dtype == torch.bool
    bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf) if is_bool else mask.float()
    return bias if segment.bias is None else bias + segment.bias


def _tiles(packed: PackedSegment, numbers: int) -> Iterator[PackedSegment]:
    """Some blocks at a time, where a token takes so many numbers in flight."""
    size = max(1, TILE_NUMBERS // (numbers * BLOCK))
    for start in range(0, packed.blocks, size):
        yield packed.tile(start, min(start + size, packed.blocks))


def _exact_part(rows: Tensor, segment: ExactSegment, scoring: Scoring, tokens: int) -> tuple[Tensor, Tensor]:
    scores = rows @ segment.keys.float().transpose(2, 3)
    weights, lse = _weigh(scores, segment.columns, segment.valid, scoring, tokens)
    return weights @ segment.values.float(), lse


def _packed_part(rows: Tensor, segment: PackedSegment, scoring: Scoring, tokens: int) -> tuple[Tensor, Tensor]:
    scores = rows @ segment.key_codec.dequantize(segment.keys, segment.first).transpose(2, 3)
    weights, lse = _weigh(scores, segment.columns, segment.valid, scoring, tokens)
    return weights @ segment.value_codec.dequantize(segment.values, segment.first), lse


def _sink_part(like: Tensor, logits: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    lse = logits.float().view(1, like.shape[1], -1, 1).expand(like.shape[0], -1, -1, tokens).flatten(2)
    return torch.zeros_like(like), lse


def _weigh(
    scores: Tensor, columns: Tensor | int, valid: Tensor | None, scoring: Scoring, tokens: int
) -> tuple[Tensor, Tensor]:
    """Softmax weights ``[B, H, R, t]`` within a segment and its log-sum-exp ``[B, H, R]``."""
    scores = scores * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.mask is not None:
        scores = _masked(scores, _segment_mask(scoring.mask, columns, scores.shape[3]).to(scores.device), tokens)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp(), lse


def _segment_mask(mask: Tensor, columns: Tensor | int, length: int) -> Tensor:
    """The columns of a segment: ``[B, h, Q, length]``."""
    if isinstance(columns, int):
        return mask[..., columns : columns + length]
    index = columns.to(mask.device)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
    return mask.expand(columns.shape[0], -1, -1, -1).gather(3, index)


def _masked(scores: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """``scores [B, H, group * Q, t]``, ``mask [B, 1 or Hq, Q, t]``."""
    batch, heads, rows, length = scores.shape
    by_head = scores.view(batch, heads, rows // tokens, tokens, length)
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (heads, -1))
    if mask.dtype == torch.bool:
        return by_head.masked_fill(~mask, -torch.inf).view(scores.shape)
    return (by_head + mask.float()).view(scores.shape)
