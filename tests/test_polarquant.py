"""PolarQuant against the paper: angles, their codebooks, and what a block of coordinates decodes to."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import float64, of_type, scores_of, sized
from qjl.methods.base import LayerContext, storage_bytes
from qjl.methods.polarquant import PolarQuant, angle_codebook
from qjl.packed import BLOCK
from qjl.presets import PRESETS
from qjl.sketch import haar_rotation

CPU = torch.device("cpu")


def _codes(field, width):
    """``[B, H, blocks, C, bytes] -> [B, H, T, C]``: the bits of 64 tokens after another, lowest first."""
    bits = np.unpackbits(field.numpy(), axis=-1, bitorder="little")
    codes = bits.reshape(*bits.shape[:-1], BLOCK, width) @ 2 ** np.arange(width)
    return np.moveaxis(codes, 4, 3).reshape(*codes.shape[:2], -1, codes.shape[3])


def _stored(case, quantizer):
    """Codes of every level, and the radii."""
    upper = _codes(case.blocks["upper_angles"], quantizer.upper_bits)
    sizes = [case.x.shape[3] >> level for level in range(2, quantizer.levels + 1)]
    codes = [_codes(case.blocks["angles"], quantizer.first_bits), *np.split(upper, np.cumsum(sizes)[:-1], axis=-1)]
    radii = case.blocks["radii"].transpose(3, 4).flatten(2, 3)
    return codes, float64(radii)


@sized(of_type(PolarQuant))
def test_codes_are_the_nearest_angles_of_the_papers_transform(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle, rotation = oracles.PolarQuant, float64(haar_rotation(head_dim))
    y = float64(case.x) @ rotation.T
    codes, radii = _stored(case, quantizer)
    np.testing.assert_allclose(radii, oracle.radii(y, quantizer.levels), rtol=1e-3)
    for level, stored in enumerate(codes, 1):
        codebook = oracle.codebook(level, quantizer.first_bits if level == 1 else quantizer.upper_bits)
        psi = oracle.angles(y, level)
        clear = oracles.edge_margin(psi, codebook) > 1e-4
        if level == 1:
            clear &= (psi > 1e-4) & (psi < 2 * np.pi - 1e-4)
        assert clear.mean() > 0.99
        assert (codebook[stored] == oracles.nearest(psi, codebook))[clear].all()


@sized(of_type(PolarQuant))
def test_angles_and_radii_decode_to_products_of_cosines_and_sines(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    codes, radii = _stored(case, quantizer)
    widths = [quantizer.first_bits, *[quantizer.upper_bits] * (quantizer.levels - 1)]
    angles = [oracles.PolarQuant.codebook(level, width)[codes[level - 1]] for level, width in enumerate(widths, 1)]
    decoded = oracles.PolarQuant.decode(angles, radii) @ float64(haar_rotation(head_dim))
    tolerance = 1e-4 * np.abs(decoded).max()
    np.testing.assert_allclose(case.codec.dequantize(case.blocks, case.first), decoded, atol=tolerance)
    query = case.query[:, :, :3]
    scores = float64(query) @ np.swapaxes(decoded, 2, 3)
    np.testing.assert_allclose(
        scores_of(case.codec, query, case.blocks, case.first), scores, atol=1e-4 * np.abs(scores).max()
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_codebooks_are_lloyds(level, bits):
    np.testing.assert_allclose(angle_codebook(level, bits), oracles.PolarQuant.codebook(level, bits), atol=1e-4)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_angles_of_rotated_tokens_have_the_density_of_the_codebook(level, fitted):
    """Lemma 2: Lloyd's levels are the means of their cells for the angles that occur."""
    y = float64(fitted("value", PolarQuant(), 256).x) @ float64(haar_rotation(256)).T
    psi, codebook = oracles.PolarQuant.angles(y, level).ravel(), np.array(angle_codebook(level, 2))
    chosen = oracles.nearest(psi, codebook)
    for angle in codebook:
        cell = psi[chosen == angle]
        assert abs(cell.mean() - angle) < 5 * cell.std() / np.sqrt(len(cell)) + 1e-3


def test_true_bits_are_those_of_the_docstring():
    assert PolarQuant().bits(64) == PolarQuant().bits(128) == (8 * 4 + 7 * 2 + 16) / 16 == 3.875
    assert PolarQuant(3, 5, 3).bits(80) == (4 * 5 + 3 * 3 + 16) / 8
    config = PRESETS["polarquant"]
    assert (config.bits(128), config.sinks, config.recent) == ((3.875, 3.875), 0, 0)


def test_layers_share_the_rotation():
    one, other = (PolarQuant().fit(LayerContext("key", 2, 64, CPU, torch.float32)) for _ in range(2))
    assert storage_bytes(one.tensors) > 64 * 64 * 4
    assert storage_bytes([*one.tensors, *other.tensors]) - storage_bytes(one.tensors) < 600


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PolarQuant(levels=1), "polarquant needs two levels or more, not 1"),
        (lambda: PolarQuant(first_bits=0), "polarquant takes 1 to 8 bits"),
        (lambda: PolarQuant(upper_bits=9), "polarquant takes 1 to 8 bits"),
        (lambda: PolarQuant().layout(72), "head_dim 72 must be a multiple of 16 for 4 levels"),
        (lambda: PolarQuant().layout(100), "head_dim 100 does not pack into bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
