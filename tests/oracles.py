"""The papers in numpy float64, one class per section, written from their formulas and importing nothing of ours."""

import itertools
import math
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


class Hadamard:
    """Sylvester (1867): entry (i, j) is -1 to the number of binary digits that i and j share; orthonormal blocks."""

    @staticmethod
    def blocks(dim, largest=None):
        """Along the diagonal: as large as a power of two that divides dim can be, ``largest`` at most."""
        size = max(2**n for n in range(20) if dim % 2**n == 0 and (largest is None or 2**n <= largest))
        entries = [[(-1) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
        return np.kron(np.eye(dim // size), np.array(entries)) / np.sqrt(size)


class E4M3:
    """FP8 formats (arXiv 2209.05433) table 1: s eeee mmm, bias 7, no infinity, largest 448."""

    @staticmethod
    def decode(code):
        code = np.asarray(code, np.int64)
        sign, exponent, mantissa = 1 - 2 * (code >> 7), code >> 3 & 15, code & 7
        normal = 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        return sign * np.where(exponent > 0, normal, 2.0**-6 * mantissa / 8)

    @classmethod
    def nearest(cls, x):
        """Of the numbers up to 448; of two equally near ones that with an even mantissa."""
        magnitudes = cls.decode(np.arange(127))  # the code 127 is NaN
        above = np.searchsorted(magnitudes, np.abs(x)).clip(1, 126)
        low, high = magnitudes[above - 1], magnitudes[above]
        down = np.abs(x) - low
        up = high - np.abs(x)
        take_low = (down < up) | ((down == up) & (above % 2 == 1))
        return np.where(x < 0, -1, 1) * np.where(take_low, low, high)


class ChannelUniform:
    """KIVI (arXiv 2402.02750) equation 2 per channel of a head's keys ``[T, d]``, in groups of tokens.

    As printed: zero point min(K), scale (max - min) / (2^B - 1).
    """

    def __init__(self, bits, group_size):
        self.top = 2**bits - 1
        self.group_size = group_size

    def extremes(self, keys):
        """Minimum and maximum of each group and channel, ``[T / g, d]``."""
        groups = keys.reshape(-1, self.group_size, keys.shape[-1])
        return groups.min(1), groups.max(1)

    def levels(self, keys, low, step):
        """Unrounded codes; rounding and clipping gives the stored ones."""
        return (keys - self._per_token(low)) / self._per_token(step)

    def codes(self, levels):
        return np.clip(np.rint(levels), 0, self.top)

    def decode(self, codes, low, step):
        return codes * self._per_token(step) + self._per_token(low)

    def _per_token(self, constants):
        return np.repeat(constants, self.group_size, axis=0)


class CalibQuant:
    """CalibQuant (arXiv 2502.14882) on one block ``[n, d]`` of tokens: 1 bit per channel."""

    def __init__(self, spread):
        self.spread = spread

    def encode(self, tokens):
        """Bits, and the two numbers that 0 and 1 decode to in each channel: the extremes, drawn together."""
        alpha, beta = tokens.min(0), tokens.max(0)
        middle = (alpha + beta) / 2
        return tokens >= middle, middle + self.spread * (alpha - middle), middle + self.spread * (beta - middle)

    @staticmethod
    def decode(bits, alpha, beta):
        return np.where(bits, beta, alpha)

    @staticmethod
    def post_scaled(queries, bits, alpha, beta):
        """Scores ``[r, n]`` from queries ``[r, d]`` times the step, and a bias per query."""
        return (queries * (beta - alpha)) @ bits.T + (queries @ alpha)[:, None]


class VidKVSpectrum:
    """VidKV (arXiv 2503.16257) equation 5 on normal channels ``[T, C]``: signs of the whole complex spectrum."""

    def __init__(self, group_size):
        self.group_size = group_size

    def decode(self, channels):
        """IFFT of sign(FFT) times the mean magnitude of each real and imaginary part over a group of tokens."""
        spectrum = np.fft.fft(channels, axis=-1)
        return np.fft.ifft(self._part(spectrum.real) + 1j * self._part(spectrum.imag), axis=-1).real

    def margin(self, channels):
        """How far the least certain sign of each token's spectrum is from a flip; parts that are always 0 aside."""
        count = channels.shape[-1]
        spectrum = np.fft.fft(channels, axis=-1)
        imaginary = np.delete(np.abs(spectrum.imag), [0, count // 2], axis=-1)
        return np.minimum(np.abs(spectrum.real).min(-1), imaginary.min(-1))

    def _part(self, numbers):
        groups = numbers.reshape(-1, self.group_size, numbers.shape[-1])
        scale = np.abs(groups).mean(1, keepdims=True)
        return (np.where(groups >= 0, 1, -1) * scale).reshape(numbers.shape)


class VidKVTernary:
    """VidKV equation 6 on values ``[T, d]``, with the scale of Ternary Weight Networks (arXiv 1605.04711, eq. 5)."""

    def __init__(self, threshold, group_size):
        self.threshold, self.group_size = threshold, group_size

    def encode(self, values):
        """Trits in -1, 0, 1, the scale of each group and channel, and how far each |v| is from the threshold."""
        trits, scales, margins = [], [], []
        for group in values.reshape(-1, self.group_size, values.shape[-1]):
            magnitude = np.abs(group)
            alpha = self.threshold * magnitude.mean(0)
            kept = magnitude > alpha
            trits.append(np.sign(group) * kept)
            scales.append([magnitude[kept[:, i], i].mean() for i in range(values.shape[-1])])
            margins.append(np.abs(magnitude - alpha))
        return np.concatenate(trits), np.array(scales), np.concatenate(margins)


class OSCAR:
    """OSCAR (arXiv 2605.17757) section 3: y = x U H P, clipped at a quantile of |y| of its group of channels."""

    @staticmethod
    def directions(rotation):
        """U of ``U H P``, undone from the right; its columns dealt to Hadamard blocks in turn are put in order."""
        dim = len(rotation)
        width = (dim - 1).bit_length()
        ranks = [int(np.binary_repr(i, width)[::-1], 2) for i in range(dim)]
        mixed = np.empty_like(rotation)
        mixed[:, np.argsort(ranks)] = rotation
        hadamard = Hadamard.blocks(dim)
        dealt = mixed @ hadamard.T
        blocks = round(dim / np.count_nonzero(hadamard[0]))
        return dealt.reshape(dim, blocks, -1).swapaxes(1, 2).reshape(dim, dim)

    @staticmethod
    def clipped(y, quantile):
        """``y [..., channels of a group]``."""
        threshold = np.quantile(np.abs(y), quantile, axis=-1, keepdims=True)
        return np.clip(y, -threshold, threshold)


class KVQuant:
    """KVQuant (arXiv 2401.18079): x = middle + reach * level, with outliers set apart."""

    @staticmethod
    def thresholds(quantiles, share):
        """Middle and reach of each channel from its quantiles ``[D, n]``, at (i + 1/2) / n: section 3.1."""
        grid = (np.arange(quantiles.shape[1]) + 0.5) / quantiles.shape[1]
        low, high = (np.array([np.interp(p, grid, row) for row in quantiles]) for p in (share / 2, 1 - share / 2))
        return (high + low) / 2, (high - low) / 2

    @staticmethod
    def ranges(tokens, outlier):
        """Middle and reach of each token ``[T, D]`` from what is no outlier: section 3.4."""
        low = np.where(outlier, np.inf, tokens).min(-1, keepdims=True)
        high = np.where(outlier, -np.inf, tokens).max(-1, keepdims=True)
        return (high + low) / 2, (high - low) / 2

    @staticmethod
    def k_means(samples, count, rounds=500):
        """The paper's datatype, section 3.3 without Fisher weights."""
        levels, before = np.quantile(samples, (np.arange(count) + 0.5) / count), None
        for _ in range(rounds):
            cells = np.searchsorted((levels[1:] + levels[:-1]) / 2, samples)
            if before is not None and np.array_equal(cells, before):
                break
            levels, before = np.bincount(cells, samples, count) / np.bincount(cells, minlength=count), cells
        return levels


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


class SignSum:
    """Levels +-a_1 +- ... +- a_b of least distortion, found by trial from the halvings of a uniform quantizer."""

    def __init__(self, bits):
        halvings = 2.0 ** np.arange(bits)[::-1]
        best = min((scale * halvings for scale in np.geomspace(4, 0.5, 60) / 2**bits), key=self._cost)
        step = 0.02
        while step > 1e-4:
            moves = [best + change for change in np.vstack([np.eye(bits), -np.eye(bits)]) * step * best]
            moves += [best * (1 + step), best * (1 - step)]
            nearer = min(moves, key=self._cost)
            if self._cost(nearer) < self._cost(best):
                best = nearer
            else:
                step /= 2
        self.amplitudes, self.distortion = best, self._cost(best)

    @staticmethod
    def levels(amplitudes):
        return np.sort([np.dot(signs, amplitudes) for signs in itertools.product((-1, 1), repeat=len(amplitudes))])

    def _cost(self, amplitudes):
        """1 - 2 sum l E[z; cell] + sum l^2 P(cell), in closed form."""
        levels = self.levels(amplitudes)
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        mass = np.diff([(1 + math.erf(edge / math.sqrt(2))) / 2 for edge in edges])
        first = -np.diff(np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi))
        return float(1 - 2 * (levels * first).sum() + (levels**2 * mass).sum())


class Trellis:
    """Trellis coded quantization (Marcellin and Fischer 1990): ``y_hat_j = own[n_j] + next[n_(j - 1)]``, 16 states.

    Viterbi's algorithm, forward with a back pointer for each state.
    """

    def __init__(self, own, following):
        self.own, self.following = own, following  # [16, w]

    def decode(self, nibbles):
        """``[T, L] -> [T, L * w]``."""
        decoded = self.own[nibbles]
        decoded[:, 1:] += self.following[nibbles[:, :-1]]
        return decoded.reshape(len(nibbles), -1)

    def encode(self, z):
        """``[T, L * w] -> int [T, L]``."""
        groups = z.reshape(len(z), -1, self.own.shape[1])
        outputs = self.own[:, None] + self.following[None]  # [current, previous, w]
        cost = ((groups[:, 0, None] - self.own) ** 2).sum(-1)
        pointers = []
        for group in groups[:, 1:].swapaxes(0, 1):
            total = cost[:, None] + ((group[:, None, None] - outputs) ** 2).sum(-1)
            pointers.append(total.argmin(-1))
            cost = total.min(-1)
        path = [cost.argmin(-1)]
        for pointer in pointers[::-1]:
            path.append(pointer[np.arange(len(z)), path[-1]])
        return np.stack(path[::-1], axis=1)


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


class TurboQuant:
    """TurboQuant (arXiv 2504.19874) Algorithms 1 and 2: unit norm, rotation, levels; QJL of what they leave."""

    def __init__(self, rotation, levels):
        """``levels``: for each coordinate, ascending, of N(0, 1)."""
        self.rotation, self.levels = np.asarray(rotation, np.float64), levels

    def coordinates(self, x):
        """sqrt(d) Pi x / ||x||."""
        return x @ self.rotation.T / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])

    def encode(self, x):
        """The level of each coordinate, and how far it is from another one."""
        y = self.coordinates(x)
        return tuple(
            np.stack([function(y[..., i], self.levels[i]) for i in range(y.shape[-1])], -1)
            for function in (nearest, edge_margin)
        )

    def decode(self, chosen, norms):
        return norms[..., None] * (chosen / np.sqrt(chosen.shape[-1])) @ self.rotation

    def estimate(self, query, chosen, norms, matrix, signs, residual_norms):
        """<q, x_mse> + sqrt(pi/2)/d gamma <S q, sign(S r)>, times the norm of x."""
        mse = (query * self.decode(chosen, norms)).sum(-1)
        inner = ((query @ matrix.T) * (2.0 * signs - 1)).sum(-1)
        return mse + norms * np.sqrt(np.pi / 2) / len(matrix) * residual_norms * inner


class PolarQuant:
    """PolarQuant (arXiv 2502.02617) Definition 1 and Lemma 2, each angle from the norms of the halves that it is of."""

    @staticmethod
    def angles(x, level):
        """psi_1, psi_2, ... of a level, ``[..., d] -> [..., d / 2**level]``."""
        halves = x.reshape(*x.shape[:-1], -1, 2, 2 ** (level - 1))
        if level == 1:
            return np.arctan2(halves[..., 1, 0], halves[..., 0, 0]) % (2 * np.pi)
        norms = np.linalg.norm(halves, axis=-1)
        return np.arctan(norms[..., 1] / norms[..., 0])

    @staticmethod
    def radii(x, levels):
        return np.linalg.norm(x.reshape(*x.shape[:-1], -1, 2**levels), axis=-1)

    @staticmethod
    def decode(angles, radii):
        """``angles[l - 1]`` are those of level l; x_i is the radius times a cosine or a sine of each level."""
        index = np.arange(radii.shape[-1] << len(angles))
        x = radii[..., index >> len(angles)]
        for level, psi in enumerate(angles, 1):
            of_second_half = index >> (level - 1) & 1
            own = psi[..., index >> level]
            x = x * np.where(of_second_half, np.sin(own), np.cos(own))
        return x

    @staticmethod
    @cache
    def codebook(level, bits):
        """Lloyd's iteration with the integrals of each cell by quadrature."""
        span, power = (2 * np.pi, 0) if level == 1 else (np.pi / 2, 2 ** (level - 1) - 1)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        levels = (np.arange(2**bits) + 0.5) / 2**bits * span
        for _ in range(3000):
            edges = np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [span]])
            low, high = edges[:-1, None], edges[1:, None]
            psi = (low + high) / 2 + (high - low) / 2 * nodes
            density = weights * np.sin(2 * psi) ** power if power else np.broadcast_to(weights, psi.shape)
            levels = (density * psi).sum(1) / density.sum(1)
        return levels


class RaBitQ:
    """RaBitQ (arXiv 2405.12497) section 3.2, extended RaBitQ (arXiv 2409.09913) section 3: a token at a time."""

    def __init__(self, bits):
        self.levels = np.arange(2**bits) - (2**bits - 1) / 2

    def best(self, y):
        """The grid point at the least angle to ``y [d]``: the nearest one to t y for some t > 0."""
        edges = np.arange(1, len(self.levels) // 2)
        crossings = np.unique(edges[:, None] / np.abs(y))
        middles = np.concatenate([[crossings[0] / 2], (crossings[1:] + crossings[:-1]) / 2, [2 * crossings[-1]]])
        return max((self.nearest(t * y) for t in middles), key=lambda point: self.cosine(y, point))

    def nearest(self, y):
        return np.where(y >= 0, 1, -1) * (np.floor(np.abs(y)).clip(max=self.levels[-1] - 0.5) + 0.5)

    @staticmethod
    def cosine(y, point):
        return (y * point).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(point, axis=-1)

    @classmethod
    def estimate(cls, query, y, point):
        """||y|| <o_bar, q> / <o_bar, o>, all after the rotation."""
        o_bar = point / np.linalg.norm(point, axis=-1, keepdims=True)
        return np.linalg.norm(y, axis=-1) * (o_bar * query).sum(-1) / cls.cosine(y, point)


class KMeans:
    """Lloyd (1982) on samples of the line, as TurboESM (arXiv 2603.26110) calibrates its tables."""

    @staticmethod
    def levels(samples, levels, rounds):
        for _ in range(rounds):
            own = np.abs(samples[:, None] - levels).argmin(1)
            levels = np.array([samples[own == i].mean() for i in range(len(levels))])
        return levels


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
    def water_fill(variances, bits, cap=8):
        """Greedy, on the distortions of codes of 0 to ``cap`` bits."""
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
    def distortions(cap, nibble=4):
        """Lloyd-Max levels where a coordinate fits a nibble, sums of signs beyond."""
        return [1.0, *((LloydMax if bits <= nibble else SignSum)(bits).distortion for bits in range(1, cap + 1))]


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

    def averaged(self, moment, positions):
        """The mean of R_n C R_n^T: in the coordinates x +- iy of each pair, R_n is diagonal."""
        dim, pairs = len(moment), len(self.inv_freq)
        frequencies, basis = np.zeros(dim), np.eye(dim, dtype=complex)
        for pair, theta in enumerate(self.inv_freq):
            x, y = (2 * pair, 2 * pair + 1) if self.interleaved else (pair, pair + pairs)
            basis[[x, y]] = 0
            basis[x, [x, y]], basis[y, [x, y]] = (1, 1j), (1, -1j)
            frequencies[[x, y]] = theta, -theta
        phases = np.exp(1j * np.outer(positions, frequencies)) * np.where(frequencies, self.scaling, 1)
        turned = basis @ moment @ basis.conj().T * (phases.T @ phases.conj() / len(positions))
        inverse = np.linalg.inv(basis)
        return (inverse @ turned @ inverse.conj().T).real

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
