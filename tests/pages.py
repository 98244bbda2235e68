"""Packed tokens in pages of a pool, with poison wherever no row has a token, and attention over them in float64."""

from dataclasses import dataclass
from functools import cache

import torch

from conftest import Model, Tokens, using_backend
from one_layer import OneLayer, taken
from qjl.methods.base import Codec
from qjl.ops.forms import ExactTokens, PackedTokens, PagedTokens
from qjl.packed import BLOCK

NOWHERE = [-1, 2**30]  # what tables say where no row has a token
SPARE = 3  # pages that nobody uses
HEADS = 2


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Blocks ``[B, H, blocks, *shape]`` of keys and values with their codecs; positions ``first [B, blocks]``."""

    keys: dict
    values: dict
    key_codec: Codec
    value_codec: Codec
    first: torch.Tensor

    @property
    def blocks(self):
        return self.first.shape[1]

    @property
    def as_operand(self):
        """What the fused step takes; None where keys or values are no nibble codes."""
        key, value = self.key_codec.form, self.value_codec.form
        if key is None or value is None or not value.has_shared_code:
            return None
        return PackedTokens(self.keys, self.values, key, value, self.first)


@dataclass(frozen=True, eq=False)
class Operands:
    """Query rows of the last tokens, a packed segment, and exact tokens."""

    rows: torch.Tensor
    packed: object
    exact: list[ExactTokens]


@cache  # fitting takes longer than testing
def operands(
    key, value, tokens=460, batch=1, head_dim=64, group=2, queries=1, dtype=torch.float32, device="cpu"
) -> Operands:
    """Quantized by the reference, so that only the decode step is tested."""
    model = Model(HEADS, head_dim, group)
    made = model.tokens(torch.arange(tokens).expand(batch, -1))
    layer = OneLayer(key, value, rope=model.rope)
    held = Tokens(made.keys.to(dtype).to(device), made.values.to(dtype).to(device), made.queries.to(device), made.rope)
    with using_backend("reference"):
        layer.step(held, slice(None))
    rows = made.queries[:, :, -queries:].reshape(batch, HEADS, group * queries, head_dim).contiguous().to(device)
    return Operands(rows, packed_rows(layer), [exact_tokens(layer)])


def packed_rows(layer) -> PackedRows:
    """All pages of a layer whose rows have equally many; tokens that are exact too are among them."""
    index, pages = layer.index, layer.core.pages
    table = torch.from_numpy(index.table[:, : index.blocks[0]]).long()
    keys, values = (
        {name: x.unflatten(0, table.shape).transpose(1, 2).contiguous() for name, x in side.items()}
        for side in taken(pages, table.flatten())
    )
    device = next(iter(keys.values())).device
    first = (torch.arange(table.shape[1], device=device) * BLOCK).repeat(table.shape[0], 1)
    return PackedRows(keys, values, *pages.codecs, first)


def exact_tokens(layer) -> ExactTokens:
    """Those of a layer whose rows have equally many."""
    index = layer.index
    slots = torch.from_numpy(index.slot_of[:, : index.counts[0]]).long()
    keys, values = layer.core.exact.read(slots.to(layer.core.exact.keys.device))
    return ExactTokens(keys.contiguous(), values.contiguous(), None)


@dataclass(frozen=True, eq=False)
class Extent:
    """Which tokens each row has: those of the packed row ``source`` from ``skip`` to ``length``."""

    lengths: torch.Tensor
    skip: torch.Tensor
    source: torch.Tensor

    @classmethod
    def of(cls, lengths, skip=None, source=None, device="cpu"):
        skip = [0] * len(lengths) if skip is None else skip
        source = range(len(lengths)) if source is None else source
        return cls(*(torch.tensor(list(x), dtype=torch.int32, device=device) for x in (lengths, skip, source)))

    def counted(self, tokens):
        """``bool [B, tokens]``."""
        token = torch.arange(tokens, device=self.lengths.device)
        return (token >= self.skip[:, None]) & (token < self.lengths[:, None])


def paged(packed, page, extent, generator) -> PagedTokens:
    """The same tokens in pages that lie in no order in one buffer of bytes."""
    rows, blocks = packed.first.shape
    device, source = packed.first.device, extent.source.long()
    per_row = -(-blocks * BLOCK // page)
    places = torch.randperm(rows * per_row + SPARE, generator=generator)[: rows * per_row].view(rows, per_row)
    places = places.to(device)
    counted = extent.counted(per_row * page)
    used = torch.zeros(rows, per_row * page, dtype=torch.int32, device=device)
    used = used.index_add(0, source, counted.int()) > 0
    fields = {(side, name): x for side in ("keys", "values") for name, x in getattr(packed, side).items()}
    pools = _pools({name: _in_pages(x, used, page) for name, x in fields.items()}, places)
    table = places[source].int()
    has_any = counted.unflatten(1, (per_row, page)).any(2)
    nowhere = torch.tensor(NOWHERE, dtype=torch.int32, device=device).repeat(per_row)[:per_row].expand_as(table)
    operand = packed.as_operand
    return PagedTokens(
        {name: x for (side, name), x in pools.items() if side == "keys"},
        {name: x for (side, name), x in pools.items() if side == "values"},
        operand.key_form,
        operand.value_form,
        torch.where(has_any, table, nowhere),
        extent.lengths,
        extent.skip,
        packed.first[source, 0],
    )


def _in_pages(field, used, page):
    """``[B, H, blocks, ..., 64]`` as ``[B, pages, H, ..., P]``, with poison where no row has a token."""
    tokens = field.movedim(2, -2).flatten(-2)  # [B, H, ..., T]
    tokens = torch.nn.functional.pad(tokens, (0, used.shape[1] - tokens.shape[-1]))
    present = used.view(len(used), *[1] * (tokens.dim() - 2), used.shape[1])
    poison = torch.full((), torch.nan if field.is_floating_point() else 255, dtype=field.dtype, device=field.device)
    return torch.where(present, tokens, poison).unflatten(-1, (-1, page)).movedim(-2, 1)


def _pools(fields, places):
    """Views of one buffer ``uint8 [pages, bytes of a page]``."""
    sizes = {name: x[0, 0].numel() * x.itemsize for name, x in fields.items()}
    device = places.device
    pool = torch.full((places.numel() + SPARE, sum(sizes.values())), 255, dtype=torch.uint8, device=device)
    views, start = {}, 0
    for name, x in fields.items():
        views[name] = pool[:, start : start + sizes[name]].view(x.dtype).unflatten(1, x.shape[2:])
        views[name][places.flatten()] = x.flatten(0, 1)
        start += sizes[name]
    return views


def expected(rows, packed, exact, extent, scaling, bias=None, softcap=0.0):
    """Attention in double precision over the tokens that each row has, and the exact ones: out, log-sum-exp."""
    source = extent.source.long()
    with using_backend("reference"):
        keys = packed.key_codec.dequantize(packed.keys, packed.first)[source]
        values = packed.value_codec.dequantize(packed.values, packed.first)[source]
    counted = extent.counted(keys.shape[2])[:, None, None]
    parts = [(keys, values, bias, counted), *((part.keys, part.values, part.bias, None) for part in exact)]
    scores = torch.cat([_scores(rows, key, added, shown, scaling, softcap) for key, _, added, shown in parts], 3)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ torch.cat([value.double() for _, value, _, _ in parts], 2), lse


def _scores(rows, keys, bias, counted, scaling, softcap):
    scores = rows.double() @ keys.double().transpose(2, 3) * scaling
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        batch, heads, count, tokens = scores.shape
        bias = bias.double().expand(batch, heads * count // bias.shape[2], -1, -1)
        scores = scores + bias.reshape(batch, heads, count, -1)[..., :tokens]
    return scores if counted is None else scores.masked_fill(~counted, -torch.inf)


def error(out, truth):
    """Largest of a row relative to its norm; a row of nothing must be 0."""
    size = truth.norm(dim=-1)
    assert not out[size == 0].any()
    return ((out - truth).norm(dim=-1) / size.clamp(min=1e-30)).max()
