"""Moments of keys, queries and values per layer and KV head: per model, nothing per sequence.

They come from ``qjl calibrate`` (a safetensors file under the model's fingerprint) or from the first prompt of
at least ``MIN_TOKENS`` tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qjl.errors import QJLError
from qjl.rope import Rope

MIN_TOKENS = 256
FORMAT = "qjl-statistics-1"
_TENSORS = ("key_mean", "key_covariance", "query_moment", "value_mean", "value_rms")


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Moments of one layer. H KV heads, D head_dim.

    - ``count``: tokens behind them.
    - ``key_mean`` [H, D]: mean of the keys before RoPE (``is_rotary``) or as cached.
    - ``key_covariance`` [H, D, D]: second moment of the cached key minus the mean as rotated to its position.
    - ``query_moment`` [H, D, D]: second moment of the rotated queries, pooled over the group.
    - ``value_mean`` [H, D]; ``value_rms`` [H]: root mean square of the centred values' coordinates.
    """

    count: int
    is_rotary: bool
    key_mean: Tensor
    key_covariance: Tensor
    query_moment: Tensor
    value_mean: Tensor
    value_rms: Tensor

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _TENSORS)


class QueryMoment:
    """Streaming second moment of the queries of one layer, pooled over the query heads of each KV head."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, query: Tensor) -> None:
        """``query [B, H, R, D]``: all query rows that share KV head h; rows of zeros are padding."""
        x = query.float()
        total = torch.einsum("bhri,bhrj->hij", x, x)
        self._sum = total if self._sum is None else self._sum + total
        self.count += int((x[:, 0] != 0).any(-1).sum())

    @property
    def moment(self) -> Tensor:
        """``float32 [H, D, D]``.

        Raises:
            QJLError: if no query was seen.
        """
        if self._sum is None or not self.count:
            raise QJLError(
                "the statistics need the queries of the first prompt: build the cache with the model "
                "(qjl.KVCache(model, ...)), use attn_implementation='qjl', or run `qjl calibrate`."
            )
        return self._sum / self.count


def measure(
    keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor, query_moment: Tensor | None, rope: Rope | None
) -> LayerStatistics:
    """Statistics of one layer from exact tokens.

    Args:
        keys, values: ``[B, H, T, D]`` as cached (keys after RoPE).
        positions: ``int64 [B, T]``, the RoPE position of each token.
        valid: ``bool [B, T]``, False for padding and for sinks.
        query_moment: ``[H, D, D]``, or None where no method looks at it (stored as the identity).
        rope: the layer's RoPE. A mean before RoPE is kept only where it explains more of the keys than a mean
            after it, so a layer without RoPE inside a model with it is found by itself.
    """
    candidates = [_key_moments(keys, positions, valid, rope)] if rope is not None else []
    candidates.append(_key_moments(keys, positions, valid, None))
    value_mean = _mean(values.float(), valid)
    mean, covariance, used = min(candidates, key=lambda moments: float(_traces(moments[1]).sum()))
    return LayerStatistics(
        count=int(valid.sum()),
        is_rotary=used is not None,
        key_mean=mean,
        key_covariance=covariance,
        query_moment=torch.eye(keys.shape[3]).expand_as(covariance) if query_moment is None else query_moment,
        value_mean=value_mean,
        value_rms=_rms(values.float() - value_mean[None, :, None, :], valid),
    )


def _key_moments(
    keys: Tensor, positions: Tensor, valid: Tensor, rope: Rope | None
) -> tuple[Tensor, Tensor, Rope | None]:
    keys = keys.float()
    mean = _mean(rope.unrotate(keys, positions) if rope else keys, valid)
    centre = mean[None, :, None, :].expand(keys.shape)
    residual = (keys - (rope.rotate(centre, positions) if rope else centre)) * valid[:, None, :, None]
    return mean, torch.einsum("bhti,bhtj->hij", residual, residual) / valid.sum(), rope


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return torch.einsum("bhtd,bt->hd", x, valid.float()) / valid.sum()


def _rms(x: Tensor, valid: Tensor) -> Tensor:
    squares = torch.einsum("bhtd,bt->h", x.square(), valid.float()) / (valid.sum() * x.shape[-1])
    return squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


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
