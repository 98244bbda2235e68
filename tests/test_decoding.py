"""The fused decode step, under every instruction set, against the reference's parts on the same packed bytes."""

import pytest
import torch

from conftest import Model
from method_cases import every_quantizer
from qjl import ops
from qjl.attention import Scoring, attend
from qjl.cache import CacheLayer, LayerSource
from qjl.methods.balanced import Balanced
from qjl.methods.grid import RotatedGridCodec
from qjl.methods.nibble import NibbleCodec
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.ops.cpu import decoding, library

pytestmark = pytest.mark.skipif("cpu" not in ops.backends(), reason="the cpu backend was not compiled")
TOLERANCE = 1e-4


@pytest.fixture(params=library.instruction_sets() if library.is_installed() else [])
def instruction_set(request):
    before = library.instruction_set()
    library.use_instruction_set(request.param)
    yield request.param
    library.use_instruction_set(before)


@pytest.fixture(autouse=True)
def cpu_backend():
    before = ops.active_backend()
    ops.use_backend("cpu")
    yield
    ops.use_backend(before)


def _layer(key, value, tokens, batch=1, heads=2, head_dim=64, group=3, **kwargs):
    """A layer that holds what ``Model`` makes; the queries of all its tokens."""
    model = Model(heads=heads, head_dim=head_dim, group=group)
    layer = CacheLayer(key, value, source=LayerSource(rope=model.rope), **kwargs)
    made = model.tokens(torch.arange(tokens).expand(batch, -1))
    layer.append(made.keys, made.values)
    if layer.wants_queries:
        layer.observe(made.queries, made.queries)
    layer.settle()
    return layer, made.queries


def _error(layer, query, scoring):
    """Largest error of a row relative to its norm, and whether the fused step was taken at all."""
    calls = []
    fused = decoding.attend
    try:
        ops.cpu.attend = lambda *args: calls.append(1) or fused(*args)
        out = attend(query, layer, scoring)
    finally:
        ops.cpu.attend = fused
    ops.use_backend("reference")
    expected = attend(query, layer, scoring)
    ops.use_backend("cpu")
    assert calls
    assert torch.isfinite(out).all()
    return ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max()


def _with(role, quantizer, tokens=460, **kwargs):
    key, value = (quantizer, Balanced(2, metric=False)) if role == "key" else (Transform(2), quantizer)
    return _layer(key, value, tokens, **kwargs)


@every_quantizer
def test_every_method_with_a_nibble_form(role, quantizer, instruction_set):
    layer, queries = _with(role, quantizer)
    segment = layer.segments()[1]
    codec = segment.key_codec if role == "key" else segment.value_codec
    if codec.form is None or not (role == "key" or codec.form.has_shared_code):
        assert role == "value" or not isinstance(codec, (NibbleCodec, RotatedGridCodec))
        return
    assert _error(layer, queries[:, :, -1:], Scoring(0.125 / 4)) < TOLERANCE


@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256, 512])
def test_every_head_dim(head_dim, instruction_set):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 460, head_dim=head_dim)
    assert _error(layer, queries[:, :, -1:], Scoring(head_dim**-0.5)) < TOLERANCE


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_any_number_of_rows(group, tokens, instruction_set):
    """Rows are taken four at a time; several query tokens are causal among themselves."""
    layer, queries = _layer(Transform(2), Balanced(2, "trellis", metric=False), 460, group=group)
    assert _error(layer, queries[:, :, -tokens:], Scoring(0.125)) < TOLERANCE


@pytest.mark.parametrize("num_bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_values_in_groups(num_bits, group_size, instruction_set):
    layer, queries = _with("value", TokenUniform(num_bits, group_size))
    assert _error(layer, queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_tokens_of_every_type(dtype, instruction_set):
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(torch.arange(460)[None])
    layer.append(made.keys.to(dtype), made.values.to(dtype))
    layer.observe(made.queries, made.queries)
    layer.settle()
    assert _error(layer, made.queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


def test_soft_caps(instruction_set):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460)
    assert _error(layer, queries[:, :, -1:], Scoring(0.125, softcap=5.0)) < TOLERANCE


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_by_row_head_and_query(heads, kind, instruction_set):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460, batch=2)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(2, heads, 2, 460, generator=generator)
    mask = mask < 0.6 if kind == "bool" else mask.log()
    assert _error(layer, queries[:, :, -2:], Scoring(0.125, mask)) < TOLERANCE


def test_rows_of_different_lengths(instruction_set):
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(torch.arange(460).expand(2, -1))
    layer.append(made.keys, made.values)
    layer.set_padding([0, 150])
    layer.observe(made.queries, made.queries)
    layer.settle()
    mask = torch.ones(2, 1, 1, 460, dtype=torch.bool)
    mask[1, :, :, :150] = False
    assert _error(layer, made.queries[:, :, -1:], Scoring(0.125, mask)) < TOLERANCE


def test_a_cropped_block_does_not_count_what_was_cut(instruction_set):
    layer, queries = _layer(Transform(2), Balanced(2, metric=False), 460)
    layer.crop(300)
    assert _error(layer, queries[:, :, 299:300], Scoring(0.125)) < TOLERANCE


def test_blocks_that_do_not_follow_each_other(instruction_set):
    """A token mask leaves gaps: positions jump from block to block."""
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    mask = torch.ones(1, 600, dtype=torch.bool)
    mask[:, 100:130] = mask[:, 301:400] = False
    layer.mark(mask)
    made = model.tokens(torch.arange(600)[None])
    layer.append(made.keys, made.values)
    layer.observe(made.queries, made.queries)
    layer.settle()
    assert _error(layer, made.queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


def test_one_token_that_takes_all_weight(instruction_set):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 460)
    assert _error(layer, 20 * queries[:, :, -1:], Scoring(0.125)) < 20 * TOLERANCE


def test_far_positions_turn_the_mean_as_the_model_does(instruction_set):
    """Angles of 100,000 radians are rounded to float32 by models, and the mean must be turned by the same ones."""
    model = Model(group=2)
    layer = CacheLayer(Transform(2), Balanced(2, metric=False), source=LayerSource(rope=model.rope))
    made = model.tokens(100_000 + torch.arange(460)[None])
    layer.append(made.keys, made.values)
    layer.set_padding([0], [100_000])
    layer.observe(made.queries, made.queries)
    layer.settle()
    assert _error(layer, made.queries[:, :, -1:], Scoring(0.125)) < TOLERANCE


def test_the_number_of_threads_changes_nothing(instruction_set):
    layer, queries = _layer(Transform(3), Balanced(2, "trellis", metric=False), 3000, batch=2)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append(attend(queries[:, :, -1:], layer, Scoring(0.125)))
    torch.set_num_threads(1)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_memory_of_a_step_does_not_grow_with_the_context():
    sizes = []
    for tokens in (500, 3000):
        layer, queries = _layer(Transform(2), Balanced(2, metric=False), tokens, batch=8)
        decoding.release()
        attend(queries[:, :, -1:], layer, Scoring(0.125))
        sizes.append(decoding.held_bytes())
    assert sizes[0] == sizes[1]


def test_scores_alone(instruction_set):
    layer, queries = _layer(Transform(3), Balanced(2, metric=False), 460)
    segment = layer.segments()[1]
    rows = queries[:, :, -1:].reshape(1, 2, 3, 64).contiguous()
    scores = decoding.score(rows, segment.as_operand)
    ops.use_backend("reference")
    expected = segment.key_codec.score(rows, segment.keys, segment.first)
    ops.use_backend("cpu")
    assert (scores - expected).abs().max() < TOLERANCE * expected.std()
