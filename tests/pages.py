"""Rows of pools, with poison wherever no row has a token, and attention over them in float64."""

from dataclasses import dataclass
from functools import cache

import torch

from conftest import Model, Tokens, using_backend
from one_layer import OneLayer
from qjl import ops
from qjl.methods.base import Codec
from qjl.ops.forms import ExactPool, Pool, Rows
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


@dataclass(frozen=True, eq=False)
class Operands:
    """Queries ``[B, H, R, D]`` of the last tokens, packed tokens, and exact ones ``[B, H, E, D]``."""

    queries: torch.Tensor
    packed: PackedRows
    exact: tuple[torch.Tensor, torch.Tensor]


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
    return Operands(rows, packed_rows(layer), exact_tokens(layer))


def packed_rows(layer) -> PackedRows:
    """All pages of a layer whose rows have equally many; tokens that are exact too are among them."""
    index, pages = layer.index, layer.core.pages
    table = torch.from_numpy(index.table[:, : index.blocks[0]]).long()
    keys, values = (
        {name: x[table.flatten()].unflatten(0, table.shape).transpose(1, 2).contiguous() for name, x in side.items()}
        for side in pages.fields
    )
    device = next(iter(keys.values())).device
    first = (torch.arange(table.shape[1], device=device) * BLOCK).repeat(table.shape[0], 1)
    return PackedRows(keys, values, *pages.codecs, first)


def exact_tokens(layer):
    """Keys and values ``[B, H, E, D]`` of a layer whose rows have equally many."""
    index = layer.index
    slots = torch.from_numpy(index.slot_of[:, : index.counts[0]]).long()
    return layer.core.exact.read(slots.to(layer.core.exact.keys.device))


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


@dataclass(frozen=True, eq=False)
class Step:
    """What ``ops.attend`` takes."""

    query: torch.Tensor
    pool: Pool
    exact: ExactPool
    rows: Rows

    def attend(self, queries=1, scaling=0.125, softcap=0.0, bias=None):
        return ops.attend(self.query, self.pool, self.exact, self.rows, queries, scaling, softcap, bias)


def paged(made, page, extent, generator, has_exact=True) -> Step:
    """The same tokens in pages and slots that lie in no order."""
    source = extent.source.long()
    pool, table = _pool(made.packed, page, extent, generator)
    exact, slots = _exact_pool(made.exact, generator)
    slots = slots[source][:, : slots.shape[1] if has_exact else 0].contiguous()
    counts = torch.full_like(extent.lengths, slots.shape[1])
    origins = made.packed.first[source, 0]
    longest = max(extent.lengths.tolist(), default=0)
    rows = Rows(table, extent.lengths, extent.skip, origins, slots, counts, longest, slots.shape[1])
    return Step(made.queries[source].contiguous(), pool, exact, rows)


def _exact_pool(exact, generator):
    """Pools with poison in the slots that nobody has, and who has which."""
    batch, _, tokens, _ = exact[0].shape
    slots = torch.randperm(batch * tokens + SPARE, generator=generator)[: batch * tokens].view(batch, tokens)
    slots = slots.to(exact[0].device)
    pools = [torch.full((batch * tokens + SPARE, HEADS, x.shape[3]), torch.nan).to(x) for x in exact]
    for pool, x in zip(pools, exact, strict=True):
        pool[slots] = x.transpose(1, 2)
    return ExactPool(*pools), slots.int()


def _pool(packed, page, extent, generator):
    """Pages in no order in one buffer of bytes, and the table of each row."""
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
    pool = Pool(
        {name: x for (side, name), x in pools.items() if side == "keys"},
        {name: x for (side, name), x in pools.items() if side == "values"},
        packed.key_codec.form,
        packed.value_codec.form,
    )
    return pool, torch.where(has_any, table, nowhere)


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


def expected(made, extent, queries=1, scaling=0.125, softcap=0.0, bias=None, has_exact=True):
    """Attention in double precision over the tokens that each row has: out, log-sum-exp.

    ``bias [B, Hq, Q, blocks * 64 + E]``. The last exact tokens are the queries' own.
    """
    source = extent.source.long()
    with using_backend("reference"):
        keys = made.packed.key_codec.dequantize(made.packed.keys, made.packed.first)[source]
        values = made.packed.value_codec.dequantize(made.packed.values, made.packed.first)[source]
    tokens = keys.shape[2]
    shown = extent.counted(tokens)[:, None, None]
    if has_exact:
        of_keys, of_values = (x[source].to(keys) for x in made.exact)
        keys, values = torch.cat([keys, of_keys], 2), torch.cat([values, of_values], 2)
        shown = torch.cat([shown.expand(-1, -1, queries, -1), _causal(len(shown), queries, of_keys)], 3)
        shown = shown.repeat(1, 1, made.queries.shape[2] // queries, 1)
    scores = _scores(made.queries[source], keys, bias, shown, scaling, softcap)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ values.double(), lse


def _causal(batch, queries, exact):
    tokens = exact.shape[2]
    place = torch.arange(tokens, device=exact.device)
    return (place <= place[tokens - queries :, None]).expand(batch, 1, -1, -1)


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
