"""Random forms, codes and numbers for kernels, and what they decode to in double precision."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from qjl.methods.bitpacking import unpack_tokens
from qjl.ops.forms import NibbleForm, Turn
from qjl.packed import BLOCK

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Side:
    """Of which shape the keys or the values are."""

    groups: int
    group_dim: int
    half_nibbles: int  # of a group
    slots: int
    map_dim: int | None
    map_is_half: bool
    heads_share: bool  # the map, and the code of keys
    has_mean: bool
    has_unit: bool
    has_middle: bool

    @property
    def head_dim(self):
        return self.map_dim or self.groups * self.group_dim


narrow = st.tuples(
    st.sampled_from([1, 1, 2, 5]),
    st.one_of(st.integers(2, 40), st.sampled_from([64, 80, 96, 102])),
    st.one_of(st.integers(1, 8), st.integers(1, 40)),
)
wide = st.sampled_from([(128, 8, 2), (128, 2, 1), (65, 3, 1), (64, 16, 1), (1, 1024, 256), (2, 512, 64)])
shapes = st.one_of(*[narrow] * 7, wide)  # groups, coordinates and bytes of a group


def _side(shape, **parts):
    groups, group_dim, half_nibbles = shape
    return Side(groups, group_dim, half_nibbles, **parts)


sides = st.builds(
    _side,
    shape=shapes,
    slots=st.integers(1, 6),
    map_dim=st.one_of(st.none(), st.integers(8, 130), st.sampled_from([256, 512, 1024])),
    map_is_half=st.booleans(),
    heads_share=st.booleans(),
    has_mean=st.booleans(),
    has_unit=st.booleans(),
    has_middle=st.booleans(),
)


class Maker:
    """Random tensors in guarded memory."""

    def __init__(self, guarded, seed):
        self.guarded = guarded
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size):
        return self.guarded(torch.randn(size, generator=self.generator))

    def integers(self, end, *size, dtype):
        return self.guarded(torch.randint(end, size, generator=self.generator).to(dtype))

    def part(self, tensor, dim):
        """The same numbers behind others, as a cache with room to grow holds them."""
        return self.guarded(torch.cat([tensor, tensor], dim)).narrow(dim, tensor.shape[dim], tensor.shape[dim])

    def form(self, side, heads, code_heads, has_turn):
        dim, head_dim = side.groups * side.group_dim, side.head_dim
        of_map = (1 if side.heads_share else heads, dim, head_dim)
        maps = self.normal(*of_map) / max(dim, head_dim) ** 0.5
        nibbles = 2 * side.half_nibbles
        terms = max(1, nibbles * side.slots / side.group_dim)  # that a coordinate is the sum of
        entries = self.normal(code_heads, nibbles, 16, side.slots) / terms**0.5
        return NibbleForm(
            map=self.guarded(maps.half() if side.map_is_half else maps) if side.map_dim else None,
            coordinates=self.integers(side.group_dim, code_heads, nibbles, side.slots, dtype=torch.int16),
            entries=self.guarded(entries.half()),
            code_dim=dim,
            scale="scale",
            unit=self.normal(heads).exp() if side.has_unit else None,
            middle="middle" if side.has_middle else None,
            groups=side.groups,
            mean=self.normal(heads, head_dim) if side.has_mean or has_turn else None,
            turn=self.turn(head_dim) if has_turn else None,
        )

    def turn(self, head_dim):
        pairs = head_dim // 2
        order = torch.randperm(head_dim, generator=self.generator).int()
        return Turn(10000.0 ** (-torch.arange(pairs) / pairs), order[:pairs], order[pairs : 2 * pairs], 1.1)

    def blocks(self, side, batch, heads, blocks):
        return {name: self.part(field, 2) for name, field in self.fields(side, (batch, heads, blocks), BLOCK).items()}

    def pages(self, side, pages, heads, tokens):
        return self.fields(side, (pages, heads), tokens)

    def fields(self, side, outer, tokens):
        size = (*outer, side.groups, tokens)
        codes = self.integers(256, *outer, side.groups * side.half_nibbles, tokens, dtype=torch.uint8)
        half_scale = self.normal(*size).mul(0.5).exp().half()
        scale = self.integers(24, *size, dtype=torch.uint8) if side.has_unit else half_scale
        fields = {"codes": codes, "scale": scale + 116 if side.has_unit else scale}
        if side.has_middle:
            fields["middle"] = self.normal(*size).half()
        return fields


# The same in double precision


def decoded(form, blocks):
    """``map^T (scale * code + middle)``: ``[B, H, T, D]``."""
    nibbles = unpack_tokens(blocks["codes"], 4).long()
    batch, heads, tokens, _ = nibbles.shape
    nibbles = nibbles.unflatten(3, (form.groups, -1))
    code = torch.zeros(batch, heads, tokens, form.groups, form.code_dim // form.groups, dtype=torch.float64)
    for head in range(heads):
        of_head = head % form.entries.shape[0]
        for j, entries in enumerate(form.entries[of_head].double()):
            code[:, head].index_add_(3, form.coordinates[of_head, j].int(), entries[nibbles[:, head, :, :, j]])
    scale = _by_token(blocks["scale"])
    if form.unit is not None:
        scale = torch.where(scale == 0, 0, ((scale - 128) / 12).exp2()) * form.unit.double()[:, None, None]
    middle = _by_token(blocks["middle"]) if form.middle else 0
    decoded = (code * scale[..., None] + (middle[..., None] if form.middle else 0)).flatten(3)
    return decoded if form.map is None else decoded @ form.map.double()


def _by_token(field):
    """``[B, H, blocks, groups, 64] -> [B, H, T, groups]``."""
    return field.double().transpose(3, 4).flatten(2, 3)


def mean_at(form, first, tokens=BLOCK):
    """``[B, H, T, D]`` for blocks of so many tokens from ``first [B, blocks]``, turned where it is."""
    positions = (first.flatten(1)[:, :, None] + torch.arange(tokens)).flatten(1)
    if form.mean is None:
        return 0
    mean = form.mean.double()[:, None].expand(len(first), -1, positions.shape[1], -1).clone()
    if form.turn is not None:
        angles = (positions[:, None, :, None].float() * form.turn.inv_freq).double()
        one, other = form.turn.first.long(), form.turn.second.long()
        x, y = mean[..., one], mean[..., other]
        mean[..., one] = (x * angles.cos() - y * angles.sin()) * form.turn.scaling
        mean[..., other] = (y * angles.cos() + x * angles.sin()) * form.turn.scaling
    return mean
