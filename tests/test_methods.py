"""Every quantizer of every preset, and more settings, through one suite."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import BUDGETS, every_head_dim, every_quantizer, every_quantizer_and_head_dim, float64, of_presets
from qjl.methods import METHODS
from qjl.methods.balanced import Balanced
from qjl.methods.base import LayerContext, require_finite, storage_bytes
from qjl.methods.identity import Identity
from qjl.methods.nibble import LogScale, Mean
from qjl.methods.qjl import QJL
from qjl.methods.transform import Transform
from qjl.methods.uniform import TokenUniform
from qjl.packed import BLOCK
from qjl.rope import Rope
from qjl.sketch import Sketch

CPU = torch.device("cpu")


# What holds for every quantizer


@every_quantizer_and_head_dim
def test_blocks_take_the_declared_bits_and_decode_within_the_budget(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    layout = quantizer.layout(head_dim, torch.float32)
    assert {name: (tuple(t.shape[3:]), t.dtype) for name, t in case.blocks.items()} == {
        name: (field.shape, field.dtype) for name, field in layout.items()
    }
    assert {name: (field.shape, field.dtype) for name, field in case.codec.layout.items()} == {
        name: (field.shape, field.dtype) for name, field in layout.items()
    }
    held = 8 * sum(tensor.nbytes for tensor in case.blocks.values()) / case.x.numel()
    assert held == quantizer.bits(head_dim) * (2 if isinstance(quantizer, Identity) else 1)
    decoded = case.codec.dequantize(case.blocks, case.first)
    assert decoded.dtype == torch.float32
    assert decoded.shape == case.x.shape
    error = _score_error(case, decoded) if role == "key" else _value_error(case, decoded)
    assert error <= BUDGETS[role, quantizer]


def _score_error(case, decoded):
    """Root mean square error of scores against their spread over tokens, which is what a softmax sees."""
    exact = case.query @ case.x.transpose(2, 3)
    error = case.query @ decoded.transpose(2, 3) - exact
    return float(error.square().mean().sqrt() / exact.std(-1).square().mean().sqrt())


def _value_error(case, decoded):
    return float((decoded - case.x).square().mean().sqrt() / case.x.std(2).square().mean().sqrt())


@every_quantizer
def test_a_token_is_coded_alike_in_any_company(role, quantizer, fitted):
    case = fitted(role, quantizer, 80)
    alone = case.codec.quantize(case.x[1:, :, BLOCK:], case.first[1:, 1:])
    for name, tensor in case.blocks.items():
        assert torch.equal(alone[name][0], tensor[1, :, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_quantizer
def test_half_precision_tokens_are_coded_as_their_float32_values(role, quantizer, dtype, fitted):
    case = fitted(role, quantizer, 64)
    half = case.x.to(dtype)
    low, high = (case.codec.quantize(x, case.first) for x in (half, half.float()))
    assert all(torch.equal(low[name], high[name]) for name in low)


@every_quantizer
def test_tokens_of_zeros_and_of_one_number_decode_to_finite_numbers(role, quantizer, fitted):
    case = fitted(role, quantizer, 64)
    for constant in (0.0, 1.0, 300.0):
        x = torch.full((1, 2, 64, 64), constant)
        first = case.first[:1, :1]
        decoded = case.codec.dequantize(case.codec.quantize(x, first), first)
        assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(
    "quantizer",
    [QJL(2), TokenUniform(2), *(Balanced(2, code, False, False) for code in ("levels", "trellis", "signs"))],
    ids=str,
)
def test_a_token_of_zeros_decodes_to_zeros(role, quantizer, fitted):
    case = fitted(role, quantizer, 64)
    zeros = torch.zeros(1, 2, 64, 64)
    first = case.first[:1, :1]
    assert not case.codec.dequantize(case.codec.quantize(zeros, first), first).any()


@every_head_dim
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_is_exact(head_dim, dtype, generator):
    codec = Identity().fit(LayerContext("key", 2, head_dim, CPU, dtype))
    x = torch.randn(2, 2, 128, head_dim, generator=generator).to(dtype)
    first = torch.zeros(2, 2, dtype=torch.int64)
    blocks = codec.quantize(x, first)
    assert torch.equal(codec.dequantize(blocks, first), x.float())


# Parts


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary", "scaling"), [(64, 64, 1.0), (80, 32, 1.0), (96, 96, 1.19)])
def test_a_mean_is_turned_to_each_position(dim, rotary, scaling, interleaved, generator):
    rope = Rope(10000.0 ** (-torch.arange(0, rotary, 2) / rotary), scaling, interleaved)
    mean = Mean(torch.randn(3, dim, generator=generator), rope)
    first = torch.tensor([[0, 64, 100], [4000, 4064, 31]])
    positions = (first[..., None] + torch.arange(64)).flatten(1)
    rotated = mean.at(positions)
    oracle = oracles.Rope(rope.inv_freq.numpy(), scaling, interleaved)
    for head in range(3):
        tiled = np.tile(float64(mean.vector[head]), (192, 1))
        np.testing.assert_allclose(rotated[0, head], oracle.rotate(tiled, positions[0].numpy()), atol=1e-3)


def test_keys_without_rope_are_centred_by_a_plain_mean(model_of, generator):
    """A layer without RoPE in a model that has it: the statistics say so, the codec follows."""
    model = model_of(head_dim=64)
    statistics = model.statistics()
    plain = type(statistics)(**(vars(statistics) | {"is_rotary": False}))
    codec = Balanced(2).fit(LayerContext("key", 2, 64, CPU, torch.float32, plain, model.rope))
    assert codec.mean.rope is None
    assert Balanced(2).fit(LayerContext("key", 2, 64, CPU, torch.float32, statistics, model.rope)).mean.rope is not None


@pytest.mark.parametrize("unit", [0.01, 1.0, 37.0])
def test_log_scales_match_the_oracle(unit, generator):
    scale = unit * torch.exp2(torch.rand(1, 1, 640, generator=generator) * 20 - 10)
    codec = LogScale(torch.tensor([unit]))
    codes = codec.encode(scale)
    levels = oracles.LogScale.levels(float64(scale), unit)
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-3
    assert (codes.numpy() == np.rint(levels))[clear].all()
    assert np.abs(oracles.LogScale.decode(float64(codes), unit) / float64(scale) - 1).max() < 0.0294


def test_log_scales_clip_at_both_ends_and_keep_zero():
    codec = LogScale(torch.ones(1))
    codes = codec.encode(torch.tensor([[[0.0, 1e-30, 1.0, 1e30]]]))
    assert codes.tolist() == [[[0, 1, 128, 255]]]


def test_seeds_change_the_codes_and_not_the_size(fitted):
    one, other = (fitted("key", QJL(2, seed=seed), 64).blocks for seed in (0, 1))
    assert not torch.equal(one["codes"], other["codes"])
    one, other = (fitted("key", Balanced(2, seed=seed), 64).blocks for seed in (0, 1))
    assert not torch.equal(one["codes"], other["codes"])


def test_tensors_shared_between_layers_count_once(fitted):
    contexts = [LayerContext("value", 2, 64, CPU, torch.float32, fitted("value", QJL(2), 64).statistics)] * 3
    one, *others = [QJL(2).fit(context) for context in contexts]
    matrix = Sketch(128, 64).nbytes
    alone = storage_bytes(one.tensors)
    assert matrix <= alone < 2 * matrix
    together = storage_bytes([tensor for codec in (one, *others) for tensor in codec.tensors])
    assert together - alone == 2 * (alone - matrix)


@pytest.mark.parametrize("case", list(of_presets()), ids=str)
def test_every_quantizer_of_a_preset_has_a_budget(case):
    assert case in BUDGETS


def test_every_method_has_a_budget():
    assert {quantizer.method for _, quantizer in BUDGETS} == set(METHODS)


def test_every_method_has_a_name_and_a_source():
    assert all(method.method == name and method.source for name, method in METHODS.items())


def test_full_precision_takes_its_own_bits():
    assert Identity().bits(64) == 16


# What is refused


@pytest.mark.parametrize("head_dim", [0, 4, 60, 63, 100])
@pytest.mark.parametrize("quantizer", [QJL(2), TokenUniform(2), Balanced(2), Transform(2)], ids=str)
def test_a_head_dim_that_does_not_pack_is_refused(quantizer, head_dim, refuses):
    with refuses(f"head_dim {head_dim} does not pack into bytes"):
        quantizer.layout(head_dim)


@pytest.mark.parametrize("quantizer", [Balanced(2), Balanced(2, metric=False), Transform(2)], ids=str)
def test_methods_that_need_statistics_say_so(quantizer, refuses):
    assert quantizer.needs_statistics
    with refuses("this method needs statistics"):
        quantizer.fit(LayerContext("key", 2, 64, CPU, torch.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad, refuses):
    x = torch.zeros(2, 3)
    require_finite(x, "keys")
    x[1, 2] = bad
    with refuses("keys of layer 3 contain NaN or Inf"):
        require_finite(x, "keys of layer 3")
