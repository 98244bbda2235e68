"""Every quantizer that the suite runs, with the error that it may make; one row per setting.

The budget of keys is the root mean square error of scores against their spread over tokens; that of values the
error of the decoded tokens against theirs. Both on the tokens of ``conftest.Model``, at every head_dim.
"""

import numpy as np
import pytest
import torch

import oracles
from qjl.codebook import MAX_BITS, NIBBLE, lloyd_max, sign_sum
from qjl.methods.balanced import Balanced
from qjl.methods.base import POSITIONS, RIDGE, LayerContext
from qjl.methods.bitpacking import unpack_tokens
from qjl.methods.calibquant import CalibQuant
from qjl.methods.identity import Identity
from qjl.methods.int8_fp8 import Fp8, Int8
from qjl.methods.kivi import KIVI
from qjl.methods.kvquant import KVQuant
from qjl.methods.oscar import OSCAR
from qjl.methods.polarquant import PolarQuant
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.rabitq import RaBitQ
from qjl.methods.saw import SAW
from qjl.methods.transform import Transform
from qjl.methods.turboesm import TurboESM
from qjl.methods.turboquant import TurboQuant
from qjl.methods.uniform import TokenUniform
from qjl.methods.vidkv import VidKVKeys, VidKVValues
from qjl.ops.triton import runtime
from qjl.presets import PRESETS

BUDGETS = {
    ("key", Identity()): 1e-5,
    ("value", Identity()): 1e-6,
    ("key", QJL(0.5)): 2.6,
    ("key", QJL(2)): 0.97,
    ("key", QJL(2, "gaussian")): 1.6,
    ("key", QJL(2, "hadamard")): 1.05,
    ("key", QJL(2, outliers=8)): 0.88,
    ("key", QJL(4, outliers=8, outlier_ratio=1)): 0.62,
    ("key", QJL(1, outliers=4, outlier_ratio=0.5, group_size=16)): 1.3,
    ("value", QJL(2)): 0.62,
    ("value", TokenUniform(1)): 1.65,
    ("value", TokenUniform(2)): 0.47,
    ("value", TokenUniform(4)): 0.092,
    ("value", TokenUniform(4, 16)): 0.077,
    ("value", TokenUniform(8, 1000)): 0.0078,
    ("key", Balanced(1)): 0.203,
    ("key", Balanced(2)): 0.1,
    ("key", Balanced(1, "trellis")): 0.191,
    ("key", Balanced(2, "trellis")): 0.085,
    ("key", Balanced(4, "trellis")): 0.0225,
    ("key", Balanced(2.5)): 0.077,
    ("key", Balanced(2.5, "trellis")): 0.071,
    ("key", Balanced(3)): 0.049,
    ("key", Balanced(4)): 0.0241,
    ("key", Transform(0.5)): 0.213,
    ("key", Transform(1)): 0.161,
    ("key", Transform(1.5)): 0.114,
    ("key", Transform(2)): 0.087,
    ("key", Transform(2.5)): 0.061,
    ("key", Transform(3)): 0.0455,
    ("key", Transform(4)): 0.023,
    ("key", Transform(8)): 0.0054,
    ("key", Balanced(1, "signs")): 0.203,
    ("key", Balanced(2, "signs")): 0.094,
    ("key", Balanced(4, "signs")): 0.0415,
    ("key", Balanced(3, metric=False)): 0.054,
    ("key", Balanced(3, metric=False, centre=False)): 0.32,
    ("value", Balanced(1, metric=False)): 0.795,
    ("value", Balanced(2, metric=False)): 0.383,
    ("value", Balanced(1, "trellis", metric=False)): 0.73,
    ("value", Balanced(1.5, "trellis", metric=False)): 0.541,
    ("value", Balanced(2, "trellis", metric=False)): 0.324,
    ("value", Balanced(2.5, "trellis", metric=False)): 0.269,
    ("value", Balanced(3, "trellis", metric=False)): 0.198,
    ("value", Balanced(3.5, "trellis", metric=False)): 0.154,
    ("value", Balanced(3, metric=False)): 0.198,
    ("value", Balanced(4, "trellis", metric=False)): 0.087,
    ("value", Balanced(2.5, metric=False)): 0.3,
    ("value", Balanced(4, metric=False)): 0.1,
    ("value", Balanced(2, "signs", metric=False)): 0.358,
    ("key", QuaRot(2)): 0.83,
    ("value", QuaRot(2)): 0.555,
    ("key", QuaRot(3)): 0.35,
    ("value", QuaRot(3)): 0.24,
    ("key", QuaRot(4)): 0.17,
    ("value", QuaRot(4)): 0.113,
    ("key", QuaRot(3, group_size=32, clip_ratio=1.0)): 0.295,
    ("key", SAW()): 0.184,
    ("key", SAW(order=16)): 0.191,
    ("value", SAW(order=1)): 0.129,
    ("key", Int8()): 0.012,
    ("value", Int8()): 0.0082,
    ("key", Fp8()): 0.0452,
    ("value", Fp8()): 0.0313,
    ("key", OSCAR()): 0.68,
    ("value", OSCAR()): 0.42,
    ("key", OSCAR(3)): 0.325,
    ("value", OSCAR(4, value_clip=1.0)): 0.12,
    ("key", KVQuant(2, q_norm=True)): 0.095,
    ("key", KVQuant(3)): 0.049,
    ("key", KVQuant(4)): 0.026,
    ("value", KVQuant(2, "token", q_norm=True)): 0.37,
    ("value", KVQuant(3, "token")): 0.19,
    ("value", KVQuant(4, "token")): 0.095,
    ("key", KVQuant(3, "token")): 0.27,
    ("value", KVQuant(3, outliers=0.002)): 0.192,
    ("key", KIVI(1)): 0.77,
    ("key", KIVI(2)): 0.277,
    ("key", KIVI(4)): 0.056,
    ("key", KIVI(2, 64)): 0.33,
    ("key", KIVI(4, 16)): 0.045,
    ("key", VidKVKeys()): 0.33,
    ("key", VidKVKeys(0.25)): 0.42,
    ("key", VidKVKeys(0.75, 64)): 0.343,
    ("value", VidKVValues()): 0.49,
    ("value", VidKVValues(0.5, 64)): 0.525,
    ("value", VidKVValues(salient_share=0.2)): 0.475,
    ("key", CalibQuant()): 0.5,
    ("key", CalibQuant(1.0)): 0.92,
    ("value", CalibQuant(0.3)): 0.66,
    ("key", TurboQuant(1)): 1.08,
    ("value", TurboQuant(1)): 0.71,
    ("key", TurboQuant(2)): 0.6,
    ("value", TurboQuant(2)): 0.402,
    ("key", TurboQuant(2.5)): 0.445,
    ("value", TurboQuant(2.5)): 0.355,
    ("key", TurboQuant(3)): 0.322,
    ("value", TurboQuant(3)): 0.22,
    ("key", TurboQuant(3.5)): 0.238,
    ("value", TurboQuant(3.5)): 0.192,
    ("key", TurboQuant(4)): 0.174,
    ("value", TurboQuant(4)): 0.115,
    ("key", TurboQuant(1, "prod")): 2.15,
    ("key", TurboQuant(2, "prod")): 1.29,
    ("value", TurboQuant(2, "prod")): 0.89,
    ("key", TurboQuant(3, "prod")): 0.75,
    ("key", TurboQuant(4, "prod")): 0.4,
    ("key", PolarQuant()): 0.306,
    ("value", PolarQuant()): 0.211,
    ("key", PolarQuant(levels=3, first_bits=5, upper_bits=3)): 0.2,
    ("key", RaBitQ(1)): 0.228,
    ("value", RaBitQ(1)): 0.8,
    ("key", RaBitQ(2)): 0.112,
    ("value", RaBitQ(2)): 0.387,
    ("key", RaBitQ(3)): 0.056,
    ("value", RaBitQ(3)): 0.206,
    ("key", RaBitQ(4)): 0.0295,
    ("value", RaBitQ(4)): 0.111,
    ("key", RaBitQ(1, centre=False)): 1.28,
    ("key", RaBitQ(3, centre=False)): 0.337,
    ("key", TurboESM()): 0.345,
    ("value", TurboESM()): 0.133,
    ("key", TurboESM(residual=False)): 0.465,
    ("value", TurboESM(residual=False)): 0.22,
}
SHARE = 5 if runtime.is_interpreted() else 1  # Triton's interpreter takes a thousand times as long
QUANTIZERS = list(BUDGETS)[::SHARE]


def of_presets():
    """(role, quantizer) of every preset."""
    for config in PRESETS.values():
        for key, value in ((config.key, config.value), *((one.key, one.value) for one in config.overrides)):
            yield from ((role, one) for role, one in (("key", key), ("value", value)) if one is not None)


def one_of_each_codec():
    """Names of presets, of which no two differ in whole numbers alone; halves of bits mix two codes."""
    firsts = {}
    for name, config in PRESETS.items():
        sides = [config, *config.overrides]
        kinds = [_kind(quantizer) for side in sides for quantizer in (side.key, side.value) if quantizer is not None]
        firsts.setdefault((*kinds, config.pre_rope), name)
    return list(firsts.values())


def _kind(quantizer):
    settings = vars(quantizer).values()
    return quantizer.method, *(one if isinstance(one, str | bool) else type(one) for one in settings)


def _of_kinds():
    """The first of those that differ in whole numbers alone."""
    firsts = {(role, *_kind(quantizer)): (role, quantizer) for role, quantizer in reversed(QUANTIZERS)}
    return list(reversed(firsts.values()))


def label(role, quantizer):
    """``key-balanced-2-signs`` for ``Balanced(2, "signs")``: the settings that are not the default ones."""
    default = vars(type(quantizer)())
    return "-".join([role, quantizer.method, *(str(v) for k, v in vars(quantizer).items() if v != default[k])])


def named(cases):
    """As parameters of a test."""
    return [pytest.param(*case, id=label(*case)) for case in cases]


def of_type(kind, **settings):
    """Parameters (role, quantizer) of the quantizers of one class."""
    chosen = [case for case in QUANTIZERS if isinstance(case[1], kind)]
    return named([c for c in chosen if all(getattr(c[1], name) == value for name, value in settings.items())])


every_quantizer = pytest.mark.parametrize(("role", "quantizer"), named(QUANTIZERS))
every_kind = pytest.mark.parametrize(("role", "quantizer"), named(_of_kinds()))
HEAD_DIMS = [80] if runtime.is_interpreted() else [64, 80, 96, 128, 256]
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def sized(cases):
    """A usual head_dim and an odd one for each of the cases; all for the first of each method and role."""
    firsts = {(case.values[0], case.values[1].method): case for case in reversed(cases)}
    sizes = [
        pytest.param(*case.values, head_dim, id=f"{case.id}-{head_dim}")
        for case in cases
        for head_dim in HEAD_DIMS
        if case in firsts.values() or head_dim in (64, 80)
    ]
    return pytest.mark.parametrize(("role", "quantizer", "head_dim"), sizes)


every_quantizer_and_head_dim = sized(named(QUANTIZERS))


def scores_of(codec, query, blocks, first):
    """Estimates of <q, k>, ``float32 [B, H, R, T]``: linear in the query, so those of the decoded tokens."""
    return query @ codec.dequantize(blocks, first).transpose(2, 3)


def float64(tensor):
    return tensor.detach().double().numpy()


def token_major(field):
    """``[B, H, blocks, C, 64] -> [B, H, T, C]``."""
    return field.transpose(3, 4).flatten(2, 3).numpy()


def bit_stream(field, num_bits):
    """Codes of ``num_bits`` each from the bytes of each token, lowest bits first."""
    bits = np.unpackbits(token_major(field), axis=-1, bitorder="little")
    return bits.reshape(*bits.shape[:-1], -1, num_bits) @ 2 ** np.arange(num_bits)


def centred(case, role, head, row, centre=True):
    """Tokens ``[T, D]`` of one head and row without the mean that the statistics say, in float64."""
    x = float64(case.x[row, head])
    if not centre:
        return x
    if role == "value":
        return x - float64(case.statistics.value_mean[head])
    mean = np.tile(float64(case.statistics.key_mean[head]), (len(x), 1))
    return x - oracles.Rope(case.rope.inv_freq.numpy()).rotate(mean, case.positions[row].numpy())


def decoded_codes(case):
    """What the packed codes stand for, in the space of the codes."""
    return float64(sums_of_entries(case.codec.code, unpack_tokens(case.blocks["codes"], NIBBLE)))


def sums_of_entries(code, nibbles):
    """What nibbles ``[B, H, T, N]`` of a ``NibbleCode`` stand for, ``float32 [B, H, T, D]``."""
    heads, count = nibbles.shape[1], nibbles.shape[3]
    entries, coordinates = (x.expand(heads, *x.shape[1:]) for x in (code.entries.float(), code.coordinates.long()))
    terms = entries[torch.arange(heads)[:, None, None], torch.arange(count), nibbles.long()].flatten(3)
    index = coordinates.flatten(1)[:, None].expand(terms.shape)
    return torch.zeros(*nibbles.shape[:3], code.dim).scatter_add_(3, index, terms)


def without_statistics(quantizer, heads=1, head_dim=64):
    """The codec of keys of a method that learns nothing."""
    return quantizer.fit(LayerContext("key", heads, head_dim, torch.device("cpu"), torch.float32))


def moments(case, head):
    """Covariance of the keys and second moment of the queries that a codec of balanced keys is fitted to."""
    ridge = max(RIDGE, 0.05 * case.x.shape[3] / case.statistics.count)
    rope = oracles.Rope(case.rope.inv_freq.numpy())
    return [
        oracles.BalancedMetric.regularised(rope.averaged(float64(moment[head]), POSITIONS.numpy()), ridge)
        for moment in (case.statistics.key_covariance, case.statistics.query_moment)
    ]


def levels_of(kind):
    """Ascending levels of a coordinate by its kind in a ``ScalarCode``."""
    is_split, width = divmod(int(kind), MAX_BITS + 1)
    if not width:
        return np.zeros(1)
    return oracles.SignSum.levels(sign_sum(width)) if is_split else np.array(lloyd_max(width))
