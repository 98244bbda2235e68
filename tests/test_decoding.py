"""The fused decode step of every backend that has one against the reference's parts on the same packed bytes."""

from dataclasses import replace

import pytest
import torch

from conftest import Model, using_backend
from method_cases import every_quantizer
from qjl import ops
from qjl.attention import Scoring, attend
from qjl.cache import CacheLayer, LayerSource
from qjl.methods.balanced import Balanced
from qjl.methods.grid import RotatedGridCodec
from qjl.methods.nibble import NibbleCodec
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.ops.cpu import decoding
from qjl.ops.triton import runtime

pytestmark = pytest.mark.usefixtures("kernels")
TOLERANCE = 1e-4
IN_HALF_PRECISION = 2e-3  # where that is what a GPU multiplies in


def _layer(key, value, tokens, batch=1, heads=2, head_dim=64, group=3, **kwargs):
    """A layer that holds what ``Model`` makes; the queries of all its tokens."""
    model = Model(heads=heads, head_dim=head_dim, group=group)
    layer = CacheLayer(key, value, source=LayerSource(rope=model.rope), **kwargs)
    made = model.tokens(torch.arange(tokens).expand(batch, -1))
    return _filled(layer, made), made.queries


def _filled(layer, made):
    """Quantized by the reference, so that only the decode step is tested."""
    with using_backend("reference"):
        layer.append(made.keys, made.values)
        if layer.wants_queries:
            layer.observe(made.queries, made.queries)
        layer.settle()
    return layer


def _error(layer, query, scoring, monkeypatch):
    """Largest error of a row relative to its norm, and whether the fused step was taken at all."""
    calls = []
    fused = ops.attend_packed
    monkeypatch.setattr(ops, "attend_packed", lambda *args: calls.append(1) or fused(*args))
    out = attend(query, layer, scoring)
    assert calls
    with using_backend("reference"):
        expected = attend(query, layer, scoring)
    assert len(calls) == 1
    assert torch.isfinite(out).all()
    return ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max()


@pytest.fixture
def error(monkeypatch):
    return lambda *args: _error(*args, monkeypatch)


def _with(role, quantizer, tokens=460, **kwargs):
    key, value = (quantizer, Balanced(2, metric=False)) if role == "key" else (Transform(2), quantizer)
    return _layer(key, value, tokens, **kwargs)


@every_quantizer
def test_every_method_with_a_nibble_form(role, quantizer, error):
    layer, queries = _with(role, quantizer)
    segment = layer.segments()[1]
    codec = segment.key_codec if role == "key" else segment.value_codec
    if codec.form is None or not (role == "key" or codec.form.has_shared_code):
        assert role == "value" or not isinstance(codec, (NibbleCodec, RotatedGridCodec))
        return
    assert error(layer, queries[:, :, -1:], Scoring(0.125 / 4)) < TOLERANCE


@pytest.mark.parametrize("head_dim", [8, 80, 256] if runtime.is_interpreted() else [8, 64, 80, 96, 128, 256, 512])
def test_every_head_dim(head_dim, error):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 460, head_dim=head_dim)
    assert error(layer, queries[:, :, -1:], Scoring(head_dim**-0.5)) < TOLERANCE


@pytest.mark.parametrize("group", [1, 7] if runtime.is_interpreted() else [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_any_number_of_rows(group, tokens, error):
    """Rows are taken four at a time; several query tokens are causal among themselves."""
    layer, queries = _layer(Transform(2), Balanced(2, "trellis", metric=False), 460, group=group)
    assert error(layer, queries[:, :, -tokens:], Scoring(0.125)) < TOLERANCE


@pytest.mark.parametrize("num_bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_values_in_groups(num_bits, group_size, error):
    layer, queries = _with("value", TokenUniform(num_bits, group_size))
    assert error(layer, queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_tokens_of_every_type(dtype, kernels, error):
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(torch.arange(460)[None])
    _filled(layer, replace(made, keys=made.keys.to(dtype), values=made.values.to(dtype)))
    tolerance = IN_HALF_PRECISION if kernels == "triton" and dtype != torch.float32 else TOLERANCE
    assert error(layer, made.queries[:, :, -1:], Scoring(0.125)) < tolerance


def test_soft_caps(error):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460)
    assert error(layer, queries[:, :, -1:], Scoring(0.125, softcap=5.0)) < TOLERANCE


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_by_row_head_and_query(heads, kind, error):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460, batch=2)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, heads, 2, 460, generator=generator)
    mask = mask < 0.6 if kind == "bool" else mask.log()
    assert error(layer, queries[:, :, -2:], Scoring(0.125, mask)) < TOLERANCE


def test_rows_of_different_lengths(error):
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(torch.arange(460).expand(2, -1))
    layer.set_padding([0, 150])
    _filled(layer, made)
    mask = torch.ones(2, 1, 1, 460, dtype=torch.bool)
    mask[1, :, :, :150] = False
    assert error(layer, made.queries[:, :, -1:], Scoring(0.125, mask)) < TOLERANCE


def test_a_cropped_block_does_not_count_what_was_cut(error):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460)
    layer.crop(300)
    assert error(layer, queries[:, :, 299:300], Scoring(0.125)) < TOLERANCE


def test_blocks_that_do_not_follow_each_other(error):
    """A token mask leaves gaps: positions jump from block to block."""
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    mask = torch.ones(1, 600, dtype=torch.bool)
    mask[:, 100:130] = mask[:, 301:400] = False
    layer.mark(mask)
    made = model.tokens(torch.arange(600)[None])
    _filled(layer, made)
    assert error(layer, made.queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


def test_one_token_that_takes_all_weight(error):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 460)
    assert error(layer, 20 * queries[:, :, -1:], Scoring(0.125)) < 20 * TOLERANCE


def test_far_positions_turn_the_mean_exactly(error):
    """Angles of 100,000 radians lose three digits in float32."""
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(100_000 + torch.arange(460)[None])
    layer.set_padding([0], [100_000])
    _filled(layer, made)
    assert error(layer, made.queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


def test_the_number_of_threads_changes_nothing(cpu_kernels):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 3000, batch=2)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(attend(queries[:, :, -1:], layer, Scoring(0.125)))
    torch.set_num_threads(1)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_memory_of_a_step_does_not_grow_with_the_context(cpu_kernels):
    sizes = []
    for tokens in (500, 3000):
        layer, queries = _layer(Transform(2), Balanced(2, metric=False), tokens, batch=8)
        decoding.release()
        attend(queries[:, :, -1:], layer, Scoring(0.125))
        sizes.append(decoding.held_bytes())
    assert sizes[0] == sizes[1]


def test_scores_alone(cpu_kernels):
    layer, queries = _layer(Transform(3), Balanced(2, metric=False), 460)
    segment = layer.segments()[1]
    rows = queries[:, :, -1:].reshape(1, 2, 3, 64).contiguous()
    scores = decoding.score(rows, segment.as_operand)
    with using_backend("reference"):
        expected = segment.key_codec.score(rows, segment.keys, segment.first)
    assert (scores - expected).abs().max() < TOLERANCE * expected.std()
