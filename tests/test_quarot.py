"""QuaRot against the paper, and the parts of a rotated grid that SAW-INT4 and OSCAR share."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import bit_stream, float64, of_type, scores_of, sized, sums_of_entries, token_major
from qjl.codebook import uniform_code
from qjl.methods.base import LayerContext
from qjl.methods.bitpacking import repack
from qjl.methods.grid import block_hadamard, block_size
from qjl.methods.quarot import QuaRot
from qjl.presets import PRESETS

CPU = torch.device("cpu")


@sized(of_type(QuaRot))
def test_codes_are_the_papers(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    group = quantizer.group_size if head_dim % quantizer.group_size == 0 else head_dim
    rotation = oracles.Hadamard.blocks(head_dim)
    grid = oracles.TokenUniform(quantizer.num_bits, head_dim // group)
    y = float64(case.x) @ rotation
    step, middle = (token_major(case.blocks[name]).astype(np.float64) for name in ("step", "middle"))
    for stored, exact in zip((step, middle), grid.constants(quantizer.clip_ratio * y), strict=True):
        np.testing.assert_allclose(stored, exact, rtol=1e-3, atol=1e-5)
    levels = grid.levels(y, step, middle)
    clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
    assert clear.mean() > 0.97
    codes = bit_stream(case.blocks["codes"], quantizer.num_bits).reshape(levels.shape)
    assert (codes == grid.codes(levels))[clear].all()
    decoded = grid.decode(codes, step, middle) @ rotation.T
    np.testing.assert_allclose(case.codec.dequantize(case.blocks, case.first), decoded, atol=2e-5 * np.abs(y).max())
    scores = float64(case.query[:, :, :3]) @ decoded.swapaxes(2, 3)
    tolerance = 2e-5 * np.abs(scores).max()
    np.testing.assert_allclose(
        scores_of(case.codec, case.query[:, :, :3], case.blocks, case.first), scores, atol=tolerance
    )


@pytest.mark.parametrize("clip_ratio", [0.5, 0.95])
def test_a_grid_ends_at_the_clipped_extremes(clip_ratio, fitted):
    case = fitted("key", QuaRot(4, clip_ratio=clip_ratio), 128)
    decoded = float64(case.codec.dequantize(case.blocks, case.first)) @ oracles.Hadamard.blocks(128)
    y = float64(case.x) @ oracles.Hadamard.blocks(128)
    for extreme in (np.min, np.max):
        np.testing.assert_allclose(extreme(decoded, -1), clip_ratio * extreme(y, -1), rtol=1e-2)


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (80, 16), (96, 32), (128, 128), (256, 256)])
def test_the_rotation_is_of_hadamard_blocks(head_dim, size):
    assert block_size(head_dim) == size
    rotation = block_hadamard(head_dim, size, CPU)
    np.testing.assert_allclose(rotation, oracles.Hadamard.blocks(head_dim), atol=1e-7)
    torch.testing.assert_close(rotation @ rotation, torch.eye(head_dim))


@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_a_stream_of_codes_wastes_no_bit_and_decodes_to_the_levels_of_the_grid(num_bits, generator):
    codes = torch.randint(0, 2**num_bits, (5, 24), generator=generator, dtype=torch.uint8)
    nibbles = repack(codes, num_bits, 4)
    assert nibbles.shape == (5, 24 * num_bits // 4)
    code = uniform_code(24, num_bits)
    decoded = sums_of_entries(code, nibbles[None, None])[0, 0]
    assert torch.equal(decoded, codes - (2**num_bits - 1) / 2)


@pytest.mark.parametrize(("num_bits", "bits"), [(2, (2.5, 2.25)), (3, (3.5, 3.25)), (4, (4.5, 4.25))])
def test_true_bits_are_those_of_the_docstring(num_bits, bits):
    config = PRESETS[f"quarot-{num_bits}"]
    assert (config.bits(64)[0], config.bits(128)[0]) == bits
    assert config.bits(128) == (bits[1], bits[1])
    assert (config.sinks, config.recent) == (0, 0)
    assert QuaRot(num_bits).bits(256) == num_bits + 32 / 128
    assert QuaRot(num_bits, group_size=32).bits(64) == num_bits + 1


def test_layers_share_the_rotation():
    one, other = (QuaRot().fit(LayerContext("key", heads, 64, CPU, torch.float32)) for heads in (2, 3))
    assert one.tensors[0].untyped_storage().data_ptr() == other.tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuaRot(1), "QuaRot takes 2, 3 or 4 bits, not 1"),
        (lambda: QuaRot(8), "QuaRot takes 2, 3 or 4 bits, not 8"),
        (lambda: QuaRot(group_size=0), "group_size must be a positive multiple of 8, not 0"),
        (lambda: QuaRot(group_size=12), "group_size must be a positive multiple of 8, not 12"),
        (lambda: QuaRot(clip_ratio=0.0), "clip_ratio must lie above 0 and be at most 1, not 0.0"),
        (lambda: QuaRot(clip_ratio=1.1), "clip_ratio must lie above 0 and be at most 1, not 1.1"),
        (lambda: QuaRot().layout(100), "head_dim 100 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
