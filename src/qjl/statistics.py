"""Moments of keys, queries, values and attention outputs per layer and KV head: per model, nothing per sequence.

They come from ``qjl calibrate`` (a safetensors file under the model's fingerprint) or from the first prompt of
at least ``MIN_TOKENS`` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qjl.download import cache_dir
from qjl.errors import QJLError
from qjl.modes import for_keeps
from qjl.rope import Rope

StatisticsOf = Callable[[int], "LayerStatistics | None"]  # of a layer, by its number
MIN_TOKENS = 256
FORMAT = "qjl-statistics-2"
QUANTILES = 129
_MOST_SORTED = 4096  # tokens that quantiles are taken from
_SUMS = ("cached", "unrotated", "output")  # of queries as they met the cache and before RoPE, and of outputs
_TENSORS = (
    "key_mean",
    "key_covariance",
    "query_moment",
    "key_quantiles",
    "value_mean",
    "value_covariance",
    "output_moment",
    "value_quantiles",
)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Moments of one layer. H KV heads, D head_dim; keys and queries before RoPE (``is_rotary``) or as cached.

    - ``count``: tokens behind them.
    - ``key_mean`` [H, D], ``key_covariance`` [H, D, D].
    - ``query_moment`` [H, D, D]: second moment of the queries, pooled over the group.
    - ``value_mean`` [H, D], ``value_covariance`` [H, D, D].
    - ``output_moment`` [H, D, D]: second moment of the attention outputs, that is of the values as weighted.
    - ``key_quantiles``, ``value_quantiles`` [H, D, 129]: of each channel, at (i + 1/2) / 129.
    """

    count: int
    is_rotary: bool
    key_mean: Tensor
    key_covariance: Tensor
    query_moment: Tensor
    key_quantiles: Tensor
    value_mean: Tensor
    value_covariance: Tensor
    output_moment: Tensor
    value_quantiles: Tensor

    @property
    def value_rms(self) -> Tensor:
        """Root mean square of the centred values' coordinates, ``[H]``."""
        mean_square = self.value_covariance.diagonal(dim1=1, dim2=2).mean(-1)
        return mean_square.sqrt().clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _TENSORS)

    def of_heads(self, heads: slice | Tensor) -> LayerStatistics:
        """Those of some of the layer's KV heads, by their numbers (int64) or a slice."""
        return replace(self, **{name: getattr(self, name)[heads] for name in _TENSORS})


def none(layer: int) -> None:
    """Statistics of no layer."""


class AttentionMoments:
    """Streaming second moments of one layer's queries and of its attention's outputs, per KV head."""

    def __init__(self) -> None:
        self._count: Tensor | int = 0
        self._sums: dict[str, Tensor] = {}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> AttentionMoments:
        """The inverse of ``arrays``, from copies.

        Raises:
            QJLError: if they are not such arrays.
        """
        sums = {name: array.clone() for name, array in arrays.items() if name != "count"}
        kinds = {(array.dim(), array.dtype) for array in sums.values()}
        count = arrays.get("count")
        if sums.keys() != set(_SUMS) or kinds != {(3, torch.float32)} or count is None or count.dtype != torch.int64:
            raise QJLError("what was seen of attention is a count and sums of queries and outputs: save it again.")
        moments = cls()
        moments._count, moments._sums = int(count), sums
        return moments

    def arrays(self) -> dict[str, Tensor]:
        """The sums so far, float32 [H, D, D], and their ``count``, int64 []; nothing before there are any."""
        return {"count": torch.tensor(self.count, dtype=torch.int64), **self._sums} if self._sums else {}

    def copy(self) -> AttentionMoments:
        """As of now."""
        moments = AttentionMoments()
        moments._count, moments._sums = self._count, dict(self._sums)
        return moments

    @property
    def count(self) -> int:
        """Queries of each KV head so far."""
        return int(self._count)

    @for_keeps
    def add(self, query: Tensor, out: Tensor, positions: Tensor, real: Tensor, rope: Rope | None, heads: int) -> None:
        """``query``, ``out [B, Hq, Q, D]`` at ``positions [B, Q]``; only ``real`` (bool [B, Q]) tokens count."""
        unrotated = query.float() if rope is None else rope.unrotate(query.float(), positions)
        for name, x in zip(_SUMS, (query, unrotated, out), strict=True):
            rows = (x.float() * real[:, None, :, None]).unflatten(1, (heads, -1))
            total = torch.einsum("bhgqi,bhgqj->hij", rows, rows)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._count = self._count + real.sum() * (query.shape[1] // heads)

    def queries(self, is_rotary: bool) -> Tensor:
        """Second moment of the queries before RoPE, or as they met the cache: ``float32 [H, D, D]``.

        Raises:
            QJLError: if no query was seen.
        """
        return self._moment("unrotated" if is_rotary else "cached")

    def outputs(self) -> Tensor:
        """Second moment of the outputs, ``float32 [H, D, D]``."""
        return self._moment("output")

    def _moment(self, name: str) -> Tensor:
        if not self.count:
            raise QJLError(
                "the statistics need the queries of the first prompt, and this model's attention does not show them: "
                "choose a preset that needs none, such as kivi-2."
            )
        return self._sums[name] / self.count


@for_keeps
def layer_statistics(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    valid: Tensor,
    attention: AttentionMoments | None,
    rope: Rope | None,
) -> LayerStatistics:
    """Statistics of one layer from exact tokens.

    Args:
        keys, values: ``[B, H, T, D]`` as cached (keys after RoPE).
        positions: ``int64 [B, T]``, the RoPE position of each token.
        valid: ``bool [B, T]``, False for padding and for sinks.
        attention: of the same tokens, or None where no method looks at it (stored as the identity).
        rope: the layer's RoPE. Keys are looked at before it only where a mean there explains more of them than a
            mean after it, so a layer without RoPE inside a model with it is found by itself.
    """
    frames = [keys.float()] if rope is None else [rope.unrotate(keys.float(), positions), keys.float()]
    tokens = [_valid_tokens(frame, valid) for frame in frames]
    moments = [_mean_and_covariance(x) for x in tokens]
    best = min(range(len(frames)), key=lambda i: float(_traces(moments[i][1]).sum()))
    is_rotary = rope is not None and best == 0
    value_tokens = _valid_tokens(values.float(), valid)
    value_mean, value_covariance = _mean_and_covariance(value_tokens)
    key_mean, key_covariance = moments[best]
    return LayerStatistics(
        count=int(valid.sum()),
        is_rotary=is_rotary,
        key_mean=key_mean,
        key_covariance=key_covariance,
        query_moment=attention.queries(is_rotary) if attention else _identity_like(key_covariance),
        key_quantiles=_quantiles(tokens[best]),
        value_mean=value_mean,
        value_covariance=value_covariance,
        output_moment=attention.outputs() if attention else _identity_like(value_covariance),
        value_quantiles=_quantiles(value_tokens),
    )


def _valid_tokens(x: Tensor, valid: Tensor) -> Tensor:
    """``[B, H, T, D] -> [H, tokens, D]``."""
    return x.transpose(1, 2)[valid].transpose(0, 1)


def _mean_and_covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(1)
    residual = x - mean[:, None]
    return mean, residual.transpose(1, 2) @ residual / x.shape[1]


def _quantiles(x: Tensor) -> Tensor:
    """``[H, tokens, D] -> [H, D, 129]``, from evenly spread tokens where there are many."""
    stride = -(-x.shape[1] // _MOST_SORTED)
    ascending = x[:, ::stride].sort(dim=1).values
    count = ascending.shape[1]
    ranks = (torch.arange(QUANTILES, device=x.device, dtype=torch.float32) + 0.5) / QUANTILES * count - 0.5
    low = ranks.floor().long().clamp(0, count - 1)
    high, share = (low + 1).clamp(max=count - 1), (ranks - low).clamp(0, 1)[:, None]
    return torch.lerp(ascending[:, low], ascending[:, high], share).transpose(1, 2).contiguous()


def _identity_like(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], device=matrices.device, dtype=torch.float32).expand_as(matrices)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def path_of(fingerprint: str) -> Path:
    """Where ``qjl calibrate`` keeps a model's statistics."""
    return cache_dir() / "statistics" / f"{fingerprint}.safetensors"


def save(path: Path, layers: Mapping[int, LayerStatistics], fingerprint: str) -> None:
    """Write statistics of a model; the file appears whole or not at all."""
    tensors, scalars = {}, {}
    for index, layer in layers.items():
        scalars[str(index)] = {"count": layer.count, "is_rotary": layer.is_rotary}
        for name in _TENSORS:
            tensors[f"{index}.{name}"] = getattr(layer, name).cpu().contiguous()
    metadata = {"format": FORMAT, "fingerprint": fingerprint, "layers": json.dumps(scalars)}
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or error
        raise QJLError(
            f"statistics cannot be written to {path} ({reason}): free some space or set QJL_CACHE to a writable folder."
        ) from error


class StatisticsFile:
    """The statistics of one model on disk; layers are read when asked for, so that none stay in memory.

    Raises:
        QJLError: if the file is damaged or belongs to another model.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self._damaged() from error
        if metadata.get("format") != FORMAT:
            raise QJLError(f"{path} is not a statistics file of this version: delete it and run `qjl calibrate` again.")
        if metadata.get("fingerprint") != fingerprint:
            raise QJLError(f"statistics file {path} belongs to another model: delete it and run `qjl calibrate`.")
        try:
            self._scalars = json.loads(metadata["layers"])
        except (KeyError, ValueError) as error:
            raise self._damaged() from error

    def layer(self, index: int) -> LayerStatistics | None:
        """Statistics of one layer; None if it was not calibrated."""
        scalars = self._scalars.get(str(index))
        if scalars is None:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(f"{index}.{name}") for name in _TENSORS}
            return LayerStatistics(int(scalars["count"]), bool(scalars["is_rotary"]), **tensors)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise self._damaged() from error

    def _damaged(self) -> QJLError:
        return QJLError(f"statistics file {self.path} is damaged: delete it and run `qjl calibrate` again.")
