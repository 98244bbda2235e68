"""The fused step on random forms and shapes, in memory whose neighbours must not be touched."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qjl import ops
from qjl.ops import reference
from qjl.ops.cpu import decoding
from qjl.ops.forms import ExactTokens, NibbleForm, PackedTokens, Turn
from qjl.ops.triton import runtime
from qjl.packed import BLOCK

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("compiled")
TOLERANCE = 1e-3
IN_HALF_PRECISION = 4e-3  # where a GPU multiplies in it
EXAMPLES = 12 if runtime.is_interpreted() else 60
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


@dataclass(frozen=True)
class Case:
    keys: Side
    values: Side
    batch: int
    heads: int
    blocks: int
    blocks_per_split: int
    group: int
    queries: int
    exact: list[int]
    dtype: torch.dtype
    has_turn: bool
    bias: str
    hides_all: bool  # from the first query
    softcap: float
    seed: int


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
cases = st.builds(
    Case,
    keys=sides,
    values=sides,
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    blocks=st.one_of(st.just(1), st.integers(0, 12)),
    blocks_per_split=st.integers(1, 13),
    group=st.integers(1, 9),
    queries=st.sampled_from([1, 1, 2, 3]),
    exact=st.lists(st.integers(1, 70), max_size=2),
    dtype=st.sampled_from(DTYPES),
    has_turn=st.booleans(),
    bias=st.sampled_from(["none", "one head", "all heads"]),
    hides_all=st.booleans(),
    softcap=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**32),
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
        size = (batch, heads, blocks, side.groups, BLOCK)
        codes = self.integers(256, batch, heads, blocks, side.groups * side.half_nibbles, BLOCK, dtype=torch.uint8)
        half_scale = self.normal(*size).mul(0.5).exp().half()
        scale = self.integers(24, *size, dtype=torch.uint8) if side.has_unit else half_scale
        fields = {"codes": codes, "scale": scale + 116 if side.has_unit else scale}
        if side.has_middle:
            fields["middle"] = self.normal(*size).half()
        return {name: self.part(field, 2) for name, field in fields.items()}

    def bias(self, case, tokens):
        """Half of the tokens are masked; None for nothing."""
        if case.bias == "none":
            return None
        heads = 1 if case.bias == "one head" else case.heads * case.group
        bias = torch.randn(case.batch, heads, case.queries, tokens, generator=self.generator)
        bias[:, :, : int(case.hides_all)] = -torch.inf
        return self.guarded(bias.masked_fill(bias < 0, -torch.inf))


# The same in double precision


def _decoded(form, blocks):
    """``map^T (scale * code + middle)``: ``[B, H, T, D]``."""
    nibbles = reference.unpack(blocks["codes"]).long()
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


def _mean(form, first):
    """``[B, H, T, D]``, turned where it is."""
    positions = (first[:, :, None] + torch.arange(BLOCK)).flatten(1)
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


def _biased(scores, bias, case):
    if bias is None:
        return scores
    by_head = scores.unflatten(2, (case.group, case.queries))
    bias = bias.double().unflatten(1, (-1, case.group) if bias.shape[1] > 1 else (1, 1))
    return (by_head + bias).flatten(2, 3)


def _split(case, monkeypatch):
    """Tokens as the case says, on every backend."""
    if runtime.is_interpreted():
        from qjl.ops.triton import decoding as on_gpus

        monkeypatch.setattr(on_gpus, "_processors", lambda device: case.blocks_per_split)
    monkeypatch.setattr(decoding, "SPLIT_BLOCKS", case.blocks_per_split)


@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
@given(cases)
def test_the_fused_step(guarded, monkeypatch, case):
    _split(case, monkeypatch)
    decoding.release()
    make = Maker(guarded, case.seed)
    has_turn = case.has_turn and case.keys.head_dim > 1
    key_form = make.form(case.keys, case.heads, 1 if case.keys.heads_share else case.heads, has_turn)
    value_form = make.form(case.values, case.heads, 1, False)
    keys = make.blocks(case.keys, case.batch, case.heads, case.blocks)
    values = make.blocks(case.values, case.batch, case.heads, case.blocks)
    first = make.integers(5000, case.batch, case.blocks, dtype=torch.int64)
    query = make.normal(case.batch, case.heads, case.group * case.queries, case.keys.head_dim)
    scaling = 0.5 * case.keys.head_dim**-0.5
    bias = make.bias(case, case.blocks * BLOCK)
    exact = []
    for tokens in case.exact:
        shape = (case.batch, case.heads, tokens)
        pair = (make.normal(*shape, side.head_dim).to(case.dtype) for side in (case.keys, case.values))
        exact.append(ExactTokens(*(make.part(x, 2) for x in pair), make.bias(case, tokens)))

    packed = PackedTokens(keys, values, key_form, value_form, first)
    out, lse = ops.attend(query, packed, bias, exact, case.queries, scaling, case.softcap)
    decoding.release()

    every_key = [_decoded(key_form, keys) + _mean(key_form, first), *(x.keys.double() for x in exact)]
    every_value = [_decoded(value_form, values) + _mean(value_form, first), *(x.values.double() for x in exact)]
    scores = []
    for part, of_part in zip(every_key, [bias, *(x.bias for x in exact)], strict=True):
        raw = query.double() @ part.transpose(2, 3) * scaling
        scores.append(_biased(case.softcap * (raw / case.softcap).tanh() if case.softcap else raw, of_part, case))
    scores, value = torch.cat(scores, 3), torch.cat(every_value, 2)
    expected_lse = scores.logsumexp(-1)
    weights = (scores - torch.where(expected_lse.isinf(), 0, expected_lse)[..., None]).exp()
    error = (out - weights @ value).norm(dim=-1)
    size = (weights.square() @ value.square()).sum(-1, keepdim=True).sqrt()[..., 0]
    is_half = runtime.is_interpreted() and exact and case.dtype != torch.float32
    tolerance = IN_HALF_PRECISION if is_half else TOLERANCE
    assert (error <= tolerance * size).all()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=tolerance)
