"""VidKV against the paper's equations."""

import numpy as np
import pytest
import torch

import oracles
from method_cases import every_head_dim, float64, of_type, sized, token_major
from qjl.methods.vidkv import VidKVKeys, VidKVValues, from_spectrum, to_spectrum, trits_of_bytes, trits_to_bytes
from qjl.packed import BLOCK
from qjl.presets import PRESETS


def _blocks(case):
    """(row, head, block, tokens [64, d]) of every block."""
    for row in range(2):
        for head in range(2):
            for block in range(2):
                yield row, head, block, float64(case.x[row, head, block * BLOCK : (block + 1) * BLOCK])


def _wide(case, row, head, block, head_dim):
    bits = case.blocks["wide"][row, head, block].numpy()
    return np.unpackbits(bits, bitorder="little").astype(bool)[:head_dim]


# Keys


@sized(of_type(VidKVKeys))
def test_the_channels_of_widest_range_have_two_bits(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    count = quantizer.wide_channels(head_dim)
    assert count % 8 == 0
    assert quantizer.wide_share * head_dim - 8 < count <= quantizer.wide_share * head_dim
    for row, head, block, tokens in _blocks(case):
        widest = np.argsort(-np.ptp(tokens, axis=0))[:count]
        assert sorted(widest) == np.flatnonzero(_wide(case, row, head, block, head_dim)).tolist()


@sized(of_type(VidKVKeys))
def test_wide_channels_are_coded_as_kivis_keys(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle = oracles.ChannelUniform(2, quantizer.group_size)
    decoded = case.codec.dequantize(case.blocks, case.first)
    bytes_ = token_major(case.blocks["codes"])
    stored = np.stack([bytes_ >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(*bytes_.shape[:3], -1)
    for row, head, block, tokens in _blocks(case):
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        channels = _wide(case, row, head, block, head_dim)
        step, middle = (float64(case.blocks[name][row, head, block]) for name in ("step", "middle"))
        low = middle - 1.5 * step
        levels = oracle.levels(tokens[:, channels], low, step)
        clear = np.abs(levels - np.floor(levels) - 0.5) > 1e-4
        assert clear.mean() > 0.99
        assert (stored[row, head, own] == oracle.codes(levels))[clear].all()
        expected = oracle.decode(stored[row, head, own], low, step)
        np.testing.assert_allclose(decoded[row, head, own][:, channels], expected, atol=1e-4)


@sized(of_type(VidKVKeys))
def test_other_channels_decode_as_the_signs_of_their_whole_spectrum(role, quantizer, head_dim, fitted):
    """Half of a real signal's spectrum says all: the paper's code stores both halves."""
    case = fitted(role, quantizer, head_dim)
    oracle = oracles.VidKVSpectrum(quantizer.group_size)
    decoded = case.codec.dequantize(case.blocks, case.first)
    for row, head, block, tokens in _blocks(case):
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        channels = ~_wide(case, row, head, block, head_dim)
        clear = oracle.margin(tokens[:, channels]) > 1e-4
        assert clear.mean() > 0.9
        expected = oracle.decode(tokens[:, channels])[clear]
        np.testing.assert_allclose(decoded[row, head, own][:, channels][clear], expected, atol=5e-3)


@pytest.mark.parametrize("count", [8, 16, 24, 40, 128])
def test_half_a_spectrum_says_all(count, generator):
    x = torch.randn(3, 5, count, generator=generator)
    spectrum = to_spectrum(x)
    assert spectrum.shape == x.shape
    torch.testing.assert_close(from_spectrum(spectrum), x)
    half = np.fft.fft(float64(x), norm="ortho")[..., : count // 2 + 1]
    np.testing.assert_allclose(spectrum[..., : count // 2 + 1], half.real, atol=1e-5)
    np.testing.assert_allclose(spectrum[..., count // 2 + 1 :], half.imag[..., 1:-1], atol=1e-5)


def test_more_wide_channels_are_more_exact(fitted):
    errors = []
    for share in (0.25, 0.5):
        case = fitted("key", VidKVKeys(share), 64)
        errors.append(float((case.codec.dequantize(case.blocks, case.first) - case.x).square().mean()))
    assert errors[1] < 0.8 * errors[0]


# Values


@sized(of_type(VidKVValues, salient_share=0.0))
def test_trits_are_the_papers_and_five_fill_a_byte(role, quantizer, head_dim, fitted):
    case = fitted(role, quantizer, head_dim)
    oracle = oracles.VidKVTernary(quantizer.threshold, quantizer.group_size)
    decoded = case.codec.dequantize(case.blocks, case.first)
    for row, head, block, tokens in _blocks(case):
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        trits, scale, margin = oracle.encode(tokens)
        bytes_ = case.blocks["trits"][row, head, block].numpy().T.astype(int)
        stored = np.stack([bytes_ // 3**place % 3 for place in range(5)], -1).reshape(BLOCK, -1)[:, :head_dim] - 1
        clear = margin > 1e-5
        assert clear.mean() > 0.999
        assert (stored == trits)[clear].all()
        np.testing.assert_allclose(float64(case.blocks["scale"][row, head, block]), scale, rtol=1e-3)
        expected = stored * np.repeat(float64(case.blocks["scale"][row, head, block]), quantizer.group_size, axis=0)
        np.testing.assert_allclose(decoded[row, head, own], expected, atol=1e-5)


def test_the_scale_is_the_one_of_least_error(fitted):
    case = fitted("value", VidKVValues(), 64)
    decoded = case.codec.dequantize(case.blocks, case.first)
    error = [float((gain * decoded - case.x).square().sum()) for gain in (0.97, 1.0, 1.03)]
    assert error[1] < min(error[0], error[2])


@every_head_dim
def test_salient_tokens_have_two_bits_of_the_same_scale(head_dim, fitted):
    plain, case = (fitted("value", VidKVValues(salient_share=share), head_dim) for share in (0.0, 0.2))
    ternary, decoded = (one.codec.dequantize(one.blocks, one.first) for one in (plain, case))
    for row, head, block, tokens in _blocks(case):
        bits = np.unpackbits(case.blocks["salient"][row, head, block].numpy(), bitorder="little").astype(bool)
        largest = np.argsort(-np.linalg.norm(tokens, axis=1))[:12]
        assert sorted(largest) == np.flatnonzero(bits).tolist()
        own = slice(block * BLOCK, (block + 1) * BLOCK)
        assert torch.equal(decoded[row, head, own][~bits], ternary[row, head, own][~bits])
        scale = np.repeat(float64(case.blocks["scale"][row, head, block]), 32, axis=0)
        expected = np.clip(np.rint(tokens / scale + 1.5), 0, 3) * scale - 1.5 * scale
        off = np.abs(decoded[row, head, own].numpy() - expected)[bits] > 1e-4
        assert off.mean() < 0.002


@every_head_dim
def test_salient_tokens_are_more_exact(head_dim, fitted):
    plain, case = (fitted("value", VidKVValues(salient_share=share), head_dim) for share in (0.0, 0.2))
    errors = [float((one.codec.dequantize(one.blocks, one.first) - one.x).square().mean()) for one in (plain, case)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("count", [5, 8, 64, 128])
def test_trits_survive_bytes(count, generator):
    trits = torch.randint(0, 3, (3, 7, count), generator=generator, dtype=torch.uint8)
    packed = trits_to_bytes(trits)
    assert packed.shape[-1] == -(-count // 5)
    assert torch.equal(trits_of_bytes(packed, count), trits)


def test_the_largest_trits_fit_a_byte():
    assert trits_to_bytes(torch.full((1, 5), 2, dtype=torch.uint8)).item() == 242


# Settings


@pytest.mark.parametrize("head_dim", [64, 128])
def test_true_bits_are_those_of_the_docstrings(head_dim):
    assert VidKVKeys().bits(head_dim) == 1.5 + (16 + 8) / 32 + 1 / 64
    assert VidKVKeys(0.25, 64).bits(head_dim) == 1.25 + (8 + 12) / 64 + 1 / 64
    trits = 8 * -(-head_dim // 5) / head_dim
    assert VidKVValues().bits(head_dim) == trits + 0.5
    share = 12 / 64
    expected = (1 - share) * trits + 2 * share + 0.5 + 1 / head_dim
    assert VidKVValues(salient_share=0.2).bits(head_dim) == pytest.approx(expected)
    assert VidKVValues(group_size=64).bits(80) == 1.6 + 0.25


def test_the_preset_is_the_papers():
    config = PRESETS["vidkv"]
    assert config.key == VidKVKeys(wide_share=0.5, group_size=32)
    assert config.value == VidKVValues(threshold=0.7, group_size=32)
    assert (config.sinks, config.recent) == (0, 128)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VidKVKeys(0), "wide_share must lie between 0 and 1, not 0"),
        (lambda: VidKVKeys(1), "wide_share must lie between 0 and 1, not 1"),
        (lambda: VidKVKeys(0.5, 48), "a group_size of 48 tokens does not cut 64 evenly"),
        (lambda: VidKVKeys(0.1).layout(64), "a wide_share of 0.1 is less than 8 of 64 channels"),
        (lambda: VidKVKeys().layout(60), "head_dim 60 does not pack into bytes"),
        (lambda: VidKVValues().layout(60), "head_dim 60 does not pack into bytes"),
        (lambda: VidKVValues(threshold=-1), "threshold must be at least 0 and below 1"),
        (lambda: VidKVValues(threshold=1), "threshold must be at least 0 and below 1"),
        (lambda: VidKVValues(salient_share=1), "salient_share must be at least 0 and below 1"),
        (lambda: VidKVValues(salient_share=-0.1), "salient_share must be at least 0 and below 1"),
        (lambda: VidKVValues(group_size=3), "a group_size of 3 tokens does not cut 64 evenly"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message, refuses):
    with refuses(message):
        make()
