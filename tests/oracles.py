"""The papers in numpy float64, one class per section, written from their formulas and importing nothing of ours."""

from functools import cache

import numpy as np


class SignConstant:
    """QJL (arXiv 2406.03482) Lemma 3.2: the c of ``c ||k|| <S q, sign(S k)>`` per row of S, so divided by m."""

    gaussian = np.sqrt(np.pi / 2)

    @staticmethod
    def orthogonal(d):
        """1 / (sqrt(d) E|u_1|), the mean by integration over the density (1 - x^2)^((d - 3) / 2) of a coordinate."""
        x, weight = np.polynomial.legendre.leggauss(400)
        x, weight = (x + 1) / 2, weight / 2  # the positive half
        density = weight * (1 - x * x) ** ((d - 3) / 2)
        return 1 / (np.sqrt(d) * (x * density).sum() / density.sum())


class QJLEstimator:
    """QJL Definition 3.1: a key is the signs of S k and its norm; a query is projected and not quantized."""

    def __init__(self, matrix, row_constant):
        self.matrix = np.asarray(matrix, dtype=np.float64)
        self.scale = row_constant / len(self.matrix)

    def encode(self, keys):
        """``[..., d]``: signs bool ``[..., m]`` and norms ``[...]``."""
        return keys @ self.matrix.T >= 0, np.linalg.norm(keys, axis=-1)

    def margin(self, keys):
        """How far each projection is from a sign flip, in units of its expected size."""
        return np.abs(keys @ self.matrix.T) / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-300)

    def estimate(self, query, signs, norms):
        return self.scale * norms * ((query @ self.matrix.T) * (2.0 * signs - 1)).sum(-1)

    def decode(self, signs, norms):
        return self.scale * norms[..., None] * ((2.0 * signs - 1) @ self.matrix)

    @staticmethod
    def packed_bytes(signs):
        """Eight signs to a byte, the first one lowest."""
        return np.packbits(signs, axis=-1, bitorder="little")


class OutlierQJL:
    """QJL section 4.1 and the public code: per group of tokens the channels of largest norm are sketched apart,
    with the first rows of the same S, and the query of each part keeps only that part's channels."""

    def __init__(self, matrix, row_constant, outliers, outlier_rows, group_size=32):
        self.inlier = QJLEstimator(matrix, row_constant)
        self.outlier = QJLEstimator(matrix[:outlier_rows], row_constant)
        self.outliers, self.group_size = outliers, group_size

    def channels(self, keys):
        """``[T, d] -> bool [T, d]``: the outlier channels of each token's group."""
        mask = np.zeros(keys.shape, dtype=bool)
        for start in range(0, len(keys), self.group_size):
            group = slice(start, start + self.group_size)
            norms = np.sqrt((keys[group] ** 2).sum(0))
            mask[group, np.argsort(-norms)[: self.outliers]] = True
        return mask

    def encode(self, keys):
        mask = self.channels(keys)
        return self.inlier.encode(np.where(mask, 0, keys)), self.outlier.encode(np.where(mask, keys, 0)), mask

    def estimate(self, query, code):
        """Scores of one query ``[d]`` with every token."""
        inlier, outlier, mask = code
        rest = self.inlier.estimate(np.where(mask, 0, query), *inlier)
        return rest + self.outlier.estimate(np.where(mask, query, 0), *outlier)


class TokenUniform:
    """KIVI (arXiv 2402.02750) equation 2 per token and group of channels, in mid-point form."""

    def __init__(self, bits, groups):
        self.top = 2**bits - 1
        self.groups = groups

    def constants(self, tokens):
        """Step and mid-point of each group ``[..., groups]``."""
        grouped = self._grouped(tokens)
        low, high = grouped.min(-1), grouped.max(-1)
        return (high - low) / self.top, (high + low) / 2

    def levels(self, tokens, step, middle):
        """Unrounded codes ``[..., groups, D / groups]``; rounding and clipping gives the stored ones."""
        return (self._grouped(tokens) - middle[..., None]) / step[..., None] + self.top / 2

    def codes(self, levels):
        return np.clip(np.rint(levels), 0, self.top)

    def decode(self, codes, step, middle):
        decoded = (codes - self.top / 2) * step[..., None] + middle[..., None]
        return decoded.reshape(*decoded.shape[:-2], -1)

    def _grouped(self, tokens):
        return tokens.reshape(*tokens.shape[:-1], self.groups, -1)


class LloydMax:
    """Max (1960), Lloyd (1982): levels that are the means of their cells, edges half-way between levels."""

    def __init__(self, bits, rounds=20000):
        grid = np.linspace(-9, 9, 360001)
        density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
        step = grid[1] - grid[0]
        mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * step)])
        slope = density * grid
        first = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * step)])
        levels = np.linspace(-1, 1, 2**bits) * (1 + bits / 2)
        for _ in range(rounds):
            edges = np.concatenate([[grid[0]], (levels[1:] + levels[:-1]) / 2, [grid[-1]]])
            updated = np.diff(np.interp(edges, grid, first)) / np.diff(np.interp(edges, grid, mass))
            moved = np.abs(updated - levels).max()
            levels = updated
            if moved < 1e-10:
                break
        self.levels = levels
        self.distortion = gaussian_distortion(levels)


def gaussian_distortion(levels):
    """Mean squared error of the nearest of ``levels`` to a standard normal number, by integration."""
    grid = np.linspace(-9, 9, 360001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    return float(((grid - nearest(grid, np.sort(levels))) ** 2 * density).sum() * (grid[1] - grid[0]))


def nearest(z, levels):
    """The nearest of ascending ``levels`` to each z."""
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, z)]


def edge_margin(z, levels):
    """Distance of each z to the nearest cell edge."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    above = np.searchsorted(edges, z)
    return np.minimum(edges[above] - z, z - edges[above - 1])


class BalancedMetric:
    """The metric in which an isotropic code costs least: A = C_k^-1 # C_q, the matrix geometric mean."""

    @staticmethod
    def power(matrix, exponent):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**exponent) @ vectors.T

    @classmethod
    def geometric_mean(cls, key_moment, query_moment):
        root, inverse = cls.power(key_moment, 0.5), cls.power(key_moment, -0.5)
        return inverse @ cls.power(root @ query_moment @ root, 0.5) @ inverse

    @staticmethod
    def cost(metric, key_moment, query_moment):
        """tr(A C_k) tr(A^-1 C_q)."""
        return np.trace(metric @ key_moment) * np.trace(np.linalg.solve(metric, query_moment))

    @staticmethod
    def regularised(moment, ridge):
        return moment + ridge * np.trace(moment) / len(moment) * np.eye(len(moment))


class TransformCode:
    """Huang and Schultheiss (1963): decorrelate, then give each bit to where it lowers the distortion most."""

    def __init__(self, key_moment, query_moment):
        root = BalancedMetric.power(query_moment, 0.5)
        values, vectors = np.linalg.eigh(root @ key_moment @ root)
        self.variances = values[::-1]
        self.key_map = (vectors[:, ::-1].T @ root) / np.sqrt(self.variances)[:, None]

    @staticmethod
    def water_fill(variances, bits, cap=6):
        """Greedy, on the distortions of Lloyd-Max codes of 0 to ``cap`` bits."""
        distortions = TransformCode.distortions(cap)
        widths = np.zeros(len(variances), dtype=int)
        for _ in range(bits):
            gains = [
                v * (distortions[w] - distortions[w + 1]) if w < cap else -1
                for v, w in zip(variances, widths, strict=True)
            ]
            widths[int(np.argmax(gains))] += 1
        return widths

    @staticmethod
    @cache
    def distortions(cap):
        return [1.0, *(LloydMax(bits).distortion for bits in range(1, cap + 1))]


class ExactRescale:
    """RaBitQ (arXiv 2405.12497) section 3.2 for any code: the scale with which y_hat is exact along y itself."""

    @staticmethod
    def scale(y, decoded):
        aligned = (y * decoded).sum(-1)
        return np.where(aligned > 0, (y * y).sum(-1) / np.where(aligned > 0, aligned, 1), 0)


class GainSearch:
    """Of the codes of gain * z, the one at the least angle to z where errors count ``root``."""

    def __init__(self, gains, root):
        self.gains, self.root = np.array(gains), root

    def judge(self, z, decoded, nearest, clear, atol):
        """Whether ``decoded [T, D]`` is the code of some gain, ``bool [T]``, and how much cosine it gives away.

        ``clear(gain * z)`` tells the coordinates that lie off the edges between codes.
        """
        codes = [(gain * z, nearest(gain * z)) for gain in self.gains]
        matches = [((np.abs(code - decoded) < atol) | ~clear(x)).all(-1) for x, code in codes]
        best = np.max([self._cosine(z, code) for _, code in codes], axis=0)
        return np.any(matches, axis=0), best - self._cosine(z, decoded)

    def _cosine(self, z, code):
        z, code = z * self.root, code * self.root
        return (z * code).sum(-1) / np.linalg.norm(code, axis=-1) / np.linalg.norm(z, axis=-1)


class RefinedSigns:
    """min over c and s of ||y - c S^T s||, alternating over c and the signs of one orthogonal block of S."""

    def __init__(self, matrix, rounds):
        self.unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
        self.rounds = rounds

    def encode(self, sketched):
        """``sketched`` is S y, ``[T, m]``; signs bool ``[T, m]``."""
        m, d = self.unit.shape
        y = sketched @ np.linalg.pinv(self.unit).T
        signs = np.where(sketched >= 0, 1.0, -1.0)
        for _ in range(self.rounds):
            decoded = signs @ self.unit
            c = (y * decoded).sum(-1, keepdims=True) / (decoded**2).sum(-1, keepdims=True)
            for block in (slice(first, first + d) for first in range(0, m, d)):
                rest = y / c - (signs @ self.unit - signs[:, block] @ self.unit[block])
                signs[:, block] = np.where(rest @ self.unit[block].T >= 0, 1.0, -1.0)
        return signs > 0


class LogScale:
    """A scale in 8 bits: twelve steps per octave around a unit at code 128; code 0 is zero."""

    @staticmethod
    def levels(scale, unit):
        """Unrounded codes."""
        return 128 + 12 * np.log2(scale / unit)

    @staticmethod
    def decode(codes, unit):
        return np.where(codes == 0, 0, unit * 2.0 ** ((codes - 128.0) / 12))


class Rope:
    """RoFormer (arXiv 2104.09864) section 3.2: each pair of coordinates is a complex number that turns by n theta."""

    def __init__(self, inv_freq, scaling=1.0, interleaved=False):
        self.inv_freq, self.scaling, self.interleaved = np.asarray(inv_freq, np.float64), scaling, interleaved

    def rotate(self, x, positions):
        """``x [..., T, D]``, ``positions [T]``; coordinates beyond the pairs stay."""
        pairs = len(self.inv_freq)
        out = np.array(x, dtype=np.float64)
        if self.interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        turned = (out[..., first] + 1j * out[..., second]) * np.exp(1j * np.outer(positions, self.inv_freq))
        out[..., first], out[..., second] = self.scaling * turned.real, self.scaling * turned.imag
        return out

    def unrotate(self, x, positions):
        inverse = Rope(-self.inv_freq, 1 / self.scaling, self.interleaved)
        return inverse.rotate(x, positions)

    def mean_before(self, keys, positions):
        """The mean of keys ``[T, D]`` before they were turned to their positions."""
        return self.unrotate(keys, positions).mean(0)


class Attention:
    """Attention Is All You Need (arXiv 1706.03762) equation 1, with grouped heads; soft caps as in Gemma 2, sink logits
    as in gpt-oss."""

    @staticmethod
    def out(query, keys, values, scaling, mask=None, softcap=None, sink_logits=None):
        """``[B, Hq, Q, D]``, ``[B, H, T, D]``; mask bool or additive, None for causal with the queries last."""
        batch, query_heads, queries, _ = query.shape
        tokens = keys.shape[2]
        keys, values = (np.repeat(x, query_heads // keys.shape[1], axis=1) for x in (keys, values))
        scores = np.einsum("bhqd,bhtd->bhqt", query, keys) * scaling
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if mask is None:
            mask = np.arange(tokens) <= np.arange(tokens - queries, tokens)[:, None]
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        if sink_logits is not None:
            sinks = np.broadcast_to(sink_logits[None, :, None, None], (batch, query_heads, queries, 1))
            scores = np.concatenate([scores, sinks], axis=-1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :tokens]
        return np.einsum("bhqt,bhtd->bhqd", weights, values)
