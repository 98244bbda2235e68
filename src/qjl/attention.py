"""Attention over exact tokens and codes that are decoded a tile at a time: any number of queries, any mask.

Tokens come in segments. Scores, masks and outputs of each are computed by themselves, and merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl import compat
from qjl.packed import BLOCK

TILE_NUMBERS = 1 << 24  # scores or decoded numbers in flight at once
FUSE_FROM_TOKENS = 256  # with so many query tokens torch's kernel is 4 times as fast on a CPU


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


@dataclass(frozen=True, eq=False)
class Seen:
    """Where tokens stand in an attention mask: columns ``int64 [B, t]``, or the first of a run that all rows share.

    ``valid bool [B, t]``: which tokens there are; None for all.
    """

    columns: Tensor | int
    valid: Tensor | None

    @cached_property
    def bias(self) -> Tensor | None:
        """What is added to the scores so that only tokens that there are count, ``float32 [B, 1, 1, t]``."""
        if self.valid is None:
            return None
        nothing = torch.zeros(1, 1, 1, 1, device=self.valid.device, dtype=torch.float32)
        return nothing.masked_fill(~self.valid[:, None, None], -torch.inf)

    def of(self, mask: Tensor, length: int = 0) -> Tensor:
        """What a mask, and validity, add to the scores: ``float32 [B, 1 or Hq, Q, t]``; a run has ``length`` tokens."""
        if isinstance(self.columns, int):
            mask = mask[..., self.columns : self.columns + length]
        else:
            index = self.columns.to(mask.device)[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
            mask = mask.expand(self.columns.shape[0], -1, -1, -1).gather(3, index)
        is_bool = mask.dtype == torch.bool
        bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf) if is_bool else mask.float()
        return bias if self.bias is None else bias + self.bias

    def part(self, start: int, stop: int) -> Seen:
        """Of tokens ``start`` to ``stop``."""
        columns = self.columns + start if isinstance(self.columns, int) else self.columns[:, start:stop]
        return Seen(columns, None if self.valid is None else self.valid[:, start:stop])


@dataclass(frozen=True, eq=False)
class Segment:
    """Some tokens of all rows ``[B, H, t, D]``."""

    keys: Tensor
    values: Tensor
    seen: Seen

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def bias(self, scoring: Scoring) -> Tensor | None:
        """``float32 [B, 1 or Hq, Q, t]``; None for nothing."""
        if scoring.mask is None:
            return self.seen.bias
        return self.seen.of(scoring.mask.to(self.keys.device), self.tokens)


class Coded(Protocol):
    """Codes of some blocks of all rows, and where their tokens stand."""

    @property
    def seen(self) -> Seen: ...

    @property
    def blocks(self) -> int: ...

    def decode(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``float32 [B, H, t, D]`` of blocks ``start`` to ``stop``."""
        ...


@dataclass(frozen=True, eq=False)
class Known:
    """Outputs ``[B, H, group, Q, Dv]`` and their log-sum-exps over some tokens, float32."""

    out: Tensor
    lse: Tensor

    def of(self, rows: slice) -> Known:
        """Of some of the queries."""
        return Known(self.out[:, :, :, rows], self.lse[:, :, :, rows])

    @property
    def part(self) -> tuple[Tensor, Tensor]:
        """``[B, H, group * Q, Dv]`` and ``[B, H, group * Q]``."""
        return self.out.flatten(2, 3), self.lse.flatten(2, 3)


@dataclass(frozen=True, eq=False)
class _Asked:
    """All tokens that queries read."""

    exact: Sequence[Segment]
    coded: Coded | None
    known: Known | None = None

    @property
    def own(self) -> Segment:
        return self.exact[-1]

    @property
    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """What need not be computed."""
        return [] if self.known is None else [self.known.part]


def attend(
    query: Tensor, exact: Sequence[Segment], coded: Coded | None, scoring: Scoring, known: Known | None = None
) -> Tensor:
    """Attention of ``query [B, Hq, Q, D]`` over all segments; the last exact one ends with the queries' own tokens.

    ``known``: what is known of it over tokens that are in none of them.

    Returns ``[B, Hq, Q, Dv]`` in the query's dtype. Hq is a multiple of the KV heads (GQA, MQA).
    """
    own = exact[-1]
    is_alone = len(exact) == 1 and coded is known is None and own.seen.valid is None and own.seen.columns == 0
    if is_alone and scoring.softcap is None and scoring.sink_logits is None:
        return _fused(query, own, scoring)
    asked = _Asked(exact, coded, known)
    if not _takes_fused_parts(query, own, scoring):
        return _tiled(_by_parts, query, asked, scoring)
    if scoring.mask is None and _all_count(own, query.shape[2]):
        return _by_fused_parts(query, asked, scoring)
    return _tiled(_by_fused_parts, query, asked, scoring)


def attend_dense(query: Tensor, keys: Tensor, values: Tensor, scoring: Scoring) -> Tensor:
    """The same over plain ``keys, values [B, H, T, D]``, for layers that are not quantized."""
    return _tiled(_by_parts, query, _Asked([Segment(keys, values, Seen(0, None))], None), scoring)


def _takes_fused_parts(query: Tensor, exact: Segment, scoring: Scoring) -> bool:
    is_plain = scoring.softcap is None and exact.keys.shape[3] == exact.values.shape[3]
    return is_plain and query.device.type == "cpu" and query.shape[2] >= FUSE_FROM_TOKENS


def _all_count(own: Segment, tokens: int) -> bool:
    """Whether its last ``tokens`` are the queries' own, and none of it is padding."""
    return own.seen.valid is None and isinstance(own.seen.columns, int) and own.tokens >= tokens


def _tiled(
    attend_tile: Callable[[Tensor, _Asked, Scoring], Tensor], query: Tensor, asked: _Asked, scoring: Scoring
) -> Tensor:
    """Some query tokens at a time."""
    tokens = query.shape[2]
    if tokens == 1:
        return attend_tile(query, asked, scoring)
    columns = _columns(asked.own)
    outputs = []
    for rows in _query_tiles(query, columns):
        of_tile = asked if asked.known is None else replace(asked, known=asked.known.of(rows))
        outputs.append(attend_tile(query[:, :, rows], of_tile, _of_rows(scoring, rows, query, columns)))
    return torch.cat(outputs, dim=2)


def _columns(own: Segment) -> int:
    """Of all tokens: fresh ones are the last."""
    assert isinstance(own.seen.columns, int)
    return own.seen.columns + own.tokens


def _segments(exact: Sequence[Segment], coded: Coded | None, numbers: int) -> Iterator[Segment]:
    """One by one; of codes some blocks at a time, where a token takes so many numbers in flight."""
    yield from (segment for segment in exact if segment.tokens)
    if coded is None:
        return
    size = max(1, TILE_NUMBERS // (numbers * BLOCK))
    for start in range(0, coded.blocks, size):
        stop = min(start + size, coded.blocks)
        yield Segment(*coded.decode(start, stop), coded.seen.part(start * BLOCK, stop * BLOCK))


def _by_parts(query: Tensor, asked: _Asked, scoring: Scoring) -> Tensor:
    heads, tokens = asked.own.keys.shape[1], query.shape[2]
    rows = query.float().reshape(query.shape[0], heads, -1, query.shape[3])
    numbers = rows.shape[0] * heads * max(rows.shape[2], 2 * rows.shape[3])
    parts = [_part(rows, segment, scoring, tokens) for segment in _segments(asked.exact, asked.coded, numbers)]
    return _joined(asked.parts + parts, query, scoring)


def _by_fused_parts(query: Tensor, asked: _Asked, scoring: Scoring) -> Tensor:
    """By torch's kernel."""
    parts, own, exact = asked.parts, asked.own, asked.exact
    if scoring.mask is None:
        before, last = _split_before(own, query.shape[2])
        parts.append(_fused_part(query, last.keys, last.values, None, scoring, is_causal=True))
        exact = [*exact[:-1], before]
    numbers = 2 * query.shape[0] * own.keys.shape[1] * query.shape[3]
    for one in _segments(exact, asked.coded, numbers):
        parts.append(_fused_part(query, one.keys, one.values, one.bias(scoring), scoring))
    return _joined(parts, query, scoring)


def _split_before(own: Segment, tokens: int) -> tuple[Segment, Segment]:
    """A segment of tokens that all count, without its last ``tokens``; and these."""
    cut = own.tokens - tokens
    before = Segment(own.keys[:, :, :cut], own.values[:, :, :cut], own.seen.part(0, cut))
    return before, Segment(own.keys[:, :, cut:], own.values[:, :, cut:], own.seen.part(cut, own.tokens))


def _fused_part(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scoring: Scoring, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    batch, heads = keys.shape[:2]
    folded = query.float().reshape(batch * heads, -1, *query.shape[2:])
    keys, values = (_side_by_side(x.float()).flatten(0, 1)[:, None] for x in (keys, values))
    keys, values = (x.expand(-1, folded.shape[1], -1, -1) for x in (keys, values))
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


def _side_by_side(x: Tensor) -> Tensor:
    """Torch's kernel reads the numbers of a token as if they lay together, wherever they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _joined(parts: list[tuple[Tensor, Tensor]], query: Tensor, scoring: Scoring) -> Tensor:
    return joined(merge(parts), query, scoring.sink_logits)


def joined(part: tuple[Tensor, Tensor], query: Tensor, sink_logits: Tensor | None) -> Tensor:
    """``(out [B, H, R, Dv], log-sum-exp [B, H, R])`` with what learned sinks weigh, in the query's shape and dtype.

    Returns ``[B, Hq, Q, Dv]``.
    """
    batch, query_heads, tokens, _ = query.shape
    if sink_logits is not None:
        part = merge([part, _sink_part(part[0], sink_logits, tokens)])
    return part[0].reshape(batch, query_heads, tokens, -1).to(query.dtype)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join (out ``[..., D]``, log-sum-exp ``[...]``) of disjoint sets of tokens; a set of none has -inf."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    shift = torch.where(total.isinf(), 0, total)
    return sum(out * (lse - shift).exp()[..., None] for out, lse in parts), total  # type: ignore[return-value]


def _fused(query: Tensor, own: Segment, scoring: Scoring) -> Tensor:
    """Nothing packed yet: torch's own kernel. One query token folds its group, which is 10x faster on a CPU."""
    keys, values, mask, dtype = own.keys, own.values, scoring.mask, query.dtype
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


def _part(rows: Tensor, segment: Segment, scoring: Scoring, tokens: int) -> tuple[Tensor, Tensor]:
    """Outputs within a segment ``[B, H, R, Dv]`` and their log-sum-exps ``[B, H, R]``."""
    scores = rows @ segment.keys.float().transpose(2, 3) * scoring.scaling
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if (bias := segment.bias(scoring)) is not None:
        scores = _biased(scores, bias, tokens)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ segment.values.float(), lse


def _biased(scores: Tensor, bias: Tensor, tokens: int) -> Tensor:
    """``scores [B, H, group * Q, t]``, ``bias [B, 1 or Hq, Q, t]``."""
    batch, heads, rows, length = scores.shape
    by_head = scores.view(batch, heads, rows // tokens, tokens, length)
    bias = bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (heads, -1))
    return (by_head + bias).view(scores.shape)


def _sink_part(like: Tensor, logits: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    lse = logits.float().view(1, like.shape[1], -1, 1).expand(like.shape[0], -1, -1, tokens).flatten(2)
    return torch.zeros_like(like), lse
