"""What quantization does to the scores and outputs of each layer, on real keys, beside what theory says of it.

A text goes through the model exactly; each layer's keys, values and queries are kept. Its tokens are then quantized,
and the last queries of each row ask for them:

- ``score``: root mean square of (<q, k_hat> - <q, k>) / (||q|| ||k||) over the tokens that are codes (QJL, Lemma 3.5).
- ``output``: ||o_hat - o|| / ||o||, o being what attention gives over all tokens, exact ones included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qjl.attention import Scoring, attend_dense
from qjl.cache.paged import Fitted, PagedCache
from qjl.codebook import scalar_distortion
from qjl.errors import QJLError
from qjl.fingerprints import digest
from qjl.hf import KVCache, attention_watched
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.results import Journal, Row
from qjl.methods.base import Quantizer
from qjl.methods.qjl import QJL
from qjl.methods.turboquant import TurboQuant
from qjl.presets import CacheConfig, resolve

QUERIES = 64  # that ask, the last of each row


@dataclass(frozen=True)
class DistortionProtocol:
    """How much text: ``rows`` of ``tokens``; ``recent`` is the exact window of every preset, None its own."""

    tokens: int = 1024
    rows: int = 4
    recent: int | None = 32

    def __post_init__(self) -> None:
        if self.tokens <= 2 * QUERIES or self.rows < 1:
            raise QJLError(f"distortion needs rows of more than {2 * QUERIES} tokens, and at least one.")


@dataclass(frozen=True, eq=False)
class States:
    """What one layer's attention takes: ``query [B, Hq, T, D]``, ``keys, values [B, H, T, D]``."""

    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


def measure_distortion(
    subject: EvalModel,
    presets: Iterable[str | Path | CacheConfig],
    text: str,
    protocol: DistortionProtocol = DistortionProtocol(),
    answers: Path | None = None,
    on_preset: Callable[[int], None] = lambda count: None,
) -> Iterator[Row]:
    """A row per preset, layer and role; ``error`` with its standard error over rows and heads.

    ``theory``: what to expect of scores for directions at random; None where no formula is known. ``answers`` is a JSON
    lines file in which each preset's rows are kept at once, and found by a run that goes on.

    Raises:
        QJLError: if the text is too short, a preset packs none of it, or the model's attention cannot be watched.
    """
    configs = [resolve(preset).with_window(protocol.recent) for preset in presets]
    input_ids = _rows(subject, text, protocol)
    layers = functools.cache(lambda: states(subject.model, input_ids))
    for config in configs:
        cache = subject.cache(config)
        run = subject.identity(config) | {"case": "distortion", "text": digest(text)} | dataclasses.asdict(protocol)
        found = Journal(answers, run).answer("layers", functools.partial(_by_layer, config, cache, layers))
        for row in found:
            yield run | row | subject.facts(config, cache)
        on_preset(1)


def _by_layer(config: CacheConfig, cache: KVCache, layers: Callable[[], dict[int, States]]) -> list[Row]:
    rows = []
    for core in cache.cores:
        store = PagedCache([core.number], config.sinks, config.recent, Fitted(cache.codecs))
        for role, error, theory in _errors(store, layers()[core.number], config.for_layer(core.number)[0]):
            deviation = float(error.std() / math.sqrt(error.numel())) if error.numel() > 1 else None
            found = {"error": float(error.mean()), "error_se": deviation, "theory": theory}
            rows.append({"layer": core.number, "role": role} | found)
    return rows


@torch.inference_mode()
def states(model: PreTrainedModel, input_ids: Tensor) -> dict[int, States]:
    """Of each layer, in one exact forward pass over ``input_ids [B, T]``."""
    kept: dict[int, States] = {}
    token = _kept.set(kept)
    try:
        with attention_watched(model, _attention):
            model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        _kept.reset(token)
    return kept


_kept: ContextVar[dict[int, States]] = ContextVar("qjl-states")


def _attention(
    own: Any,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own, keeping what it is given."""
    layer = cast(int, module.layer_idx)
    _kept.get()[layer] = States(query[:, :, -QUERIES:], key, value, scaling or query.shape[-1] ** -0.5)
    return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


@torch.inference_mode()
def _errors(store: PagedCache, layer: States, key: Quantizer) -> Iterator[tuple[str, Tensor, float | None]]:
    """By role: the errors of each row and head, ``[B, H]``, and theory's."""
    (core,) = store.layers.values()
    store.append(core, layer.keys, layer.values)
    store.settle()
    packed = store.index.packed_tokens[0]
    if not packed:
        raise QJLError(f"no token of {store.index.columns} is a code: take more tokens, or a smaller window.")
    columns = slice(store.index.sinks, store.index.sinks + packed)
    decoded, values = store.dense(core)
    keys = layer.keys.float()[:, :, columns]
    query = layer.query.float().unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    lengths = query.norm(dim=-1)[..., None] * keys.norm(dim=-1)[:, :, None]
    exact = query @ keys.transpose(2, 3)
    error = (query @ decoded.float()[:, :, columns].transpose(2, 3) - exact) / lengths
    cosine = float((exact / lengths).square().mean())
    yield "score", error.square().mean((2, 3)).sqrt(), expected_error(key, keys.shape[3], cosine)
    scoring = Scoring(layer.scaling)
    truth = attend_dense(layer.query.float(), layer.keys, layer.values, scoring)
    error = attend_dense(layer.query.float(), decoded, values, scoring) - truth
    by_head = (error.norm(dim=-1) / truth.norm(dim=-1)).unflatten(1, (keys.shape[1], -1))
    yield "output", by_head.mean((2, 3)), None


def expected_error(quantizer: Quantizer, head_dim: int, cosine: float) -> float | None:
    """Root mean square of a score's error over ||q|| ||k||, for directions with this mean square of their cosine.

    - QJL of m rows: (pi/2 - cosine) / m with Gaussian ones; (pi/2 - 1)(1 - cosine) / m with orthogonal blocks of d.
    - TurboQuant-mse of distortion D: the code is shorter by D along the key, and the rest of its error is at random.
    """
    if isinstance(quantizer, QJL) and not quantizer.outliers:
        sketch = quantizer.sketch_for(head_dim)
        if sketch.kind == "gaussian":
            return math.sqrt((math.pi / 2 - cosine) / sketch.m)
        if sketch.kind == "orthogonal" and sketch.m % head_dim == 0:
            return math.sqrt((math.pi / 2 - 1) * (1 - cosine) / sketch.m)
    if isinstance(quantizer, TurboQuant) and quantizer.variant == "mse" and not quantizer.needs_statistics:
        lost = scalar_distortion(int(quantizer.num_bits))
        return math.sqrt(cosine * lost**2 + (1 - cosine) * lost * (1 - lost) / (head_dim - 1))
    return None


def _rows(subject: EvalModel, text: str, protocol: DistortionProtocol) -> Tensor:
    """Stretches spread evenly over the text, ``int64 [rows, tokens]``."""
    tokens = subject.unseen(text)
    if len(tokens) < protocol.tokens:
        raise QJLError(f"the text has {len(tokens)} tokens, fewer than {protocol.tokens}: give a longer one.")
    starts = torch.linspace(0, len(tokens) - protocol.tokens, protocol.rows).long()
    return torch.stack([tokens[start : start + protocol.tokens] for start in starts])
