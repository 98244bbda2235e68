"""The fused step on random forms and shapes, in memory whose neighbours must not be touched."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qjl import ops
from qjl.ops.cpu import decoding
from qjl.ops.forms import ExactTokens, PackedTokens
from qjl.ops.triton import runtime
from qjl.packed import BLOCK
from random_forms import DTYPES, Maker, Side, decoded, mean_at, sides

pytest_plugins = "guarded"
pytestmark = pytest.mark.usefixtures("compiled")
TOLERANCE = 1e-3
IN_HALF_PRECISION = 4e-3  # where a GPU multiplies in it
EXAMPLES = 12 if runtime.is_interpreted() else 60


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


def _bias(make, case, tokens):
    """Half of the tokens are masked; None for nothing."""
    if case.bias == "none":
        return None
    heads = 1 if case.bias == "one head" else case.heads * case.group
    bias = torch.randn(case.batch, heads, case.queries, tokens, generator=make.generator)
    bias[:, :, : int(case.hides_all)] = -torch.inf
    return make.guarded(bias.masked_fill(bias < 0, -torch.inf))


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
    bias = _bias(make, case, case.blocks * BLOCK)
    exact = []
    for tokens in case.exact:
        shape = (case.batch, case.heads, tokens)
        pair = (make.normal(*shape, side.head_dim).to(case.dtype) for side in (case.keys, case.values))
        exact.append(ExactTokens(*(make.part(x, 2) for x in pair), _bias(make, case, tokens)))

    packed = PackedTokens(keys, values, key_form, value_form, first)
    out, lse = ops.attend_packed(query, packed, bias, exact, case.queries, scaling, case.softcap)
    decoding.release()

    every_key = [decoded(key_form, keys) + mean_at(key_form, first), *(x.keys.double() for x in exact)]
    every_value = [decoded(value_form, values) + mean_at(value_form, first), *(x.values.double() for x in exact)]
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
