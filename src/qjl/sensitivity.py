"""What errors in cached keys and values do to a model's predictions: the Fisher information of the cache.

Let a layer's cached tokens be read with errors d. To second order, the KL between the true and the disturbed
next-token distributions, summed over all positions, is

    1/2 E [(sum_n <g_n, d_n>)^2],    g_n the gradient of sum_t log p(y_t) by cached token n,  y_t drawn from p itself,

since score functions of different positions are uncorrelated. Errors of different heads are independent, and those of
different tokens too, unless they are the same word: early layers cache little else, and code it alike each time. So
<g_n, d_n> is summed over all places of a word before it is squared, and a few backward passes tell the damage of any
code in any layer.

A token counts where it is read from its code: by queries at least ``window`` positions further on, and not as a sink.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qjl.architecture import layer_shapes
from qjl.attention import causal_mask
from qjl.errors import QJLError
from qjl.hf import attention_watched

DRAWS = 2  # of y; more of them cost a backward pass each


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One layer's keys and values ``[B, H, T, D]`` as cached, and the gradients of each draw ``[draws, B, H, T, D]``.

    ``words [B, T]`` numbers the different words of each row; ``positions`` is how many next tokens the damage is spread
    over.
    """

    keys: Tensor
    values: Tensor
    key_gradients: Tensor
    value_gradients: Tensor
    words: Tensor
    positions: int

    def damage(self, keys: Tensor, values: Tensor) -> float:
        """Expected KL per position, in nats, if all tokens outside of the exact window were read so."""
        return self._of(self.key_gradients, keys - self.keys) + self._of(self.value_gradients, values - self.values)

    def _of(self, gradients: Tensor, error: Tensor) -> float:
        by_token = (gradients * error).sum(-1).transpose(1, 2).flatten(2)  # [draws, H, B * T]
        words = self.words.flatten().to(by_token.device)  # layers may lie on several devices
        by_word = by_token.new_zeros(*by_token.shape[:2], int(words.max()) + 1).index_add_(2, words, by_token)
        return float(by_word.square().sum((1, 2)).mean()) / (2 * self.positions)


@torch.inference_mode(False)
@torch.enable_grad()
def probe(
    model: PreTrainedModel, input_ids: Tensor, *, sinks: int, window: int, draws: int = DRAWS
) -> dict[int, Sensitivity]:
    """The sensitivity of every quantized layer on ``input_ids [B, T]``; rows go through the model one by one.

    Raises:
        QJLError: if the rows are not longer than the exact window, or the model's attention cannot be watched.
    """
    positions = input_ids.shape[1] - sinks - window
    if positions < 1:
        raise QJLError(f"a probe needs rows of more than {sinks + window} tokens, not {input_ids.shape[1]}.")
    generator = torch.Generator().manual_seed(0)
    layers = [shape.index for shape in layer_shapes(model.config) if shape.is_quantized]
    with attention_watched(model, _attention), _fixed_weights(model):
        rows = [_probe_row(model, row[None], _Reading(layers, sinks, window), draws, generator) for row in input_ids]
    words, count = _words(input_ids).to(model.device), positions * len(rows)
    return {layer: _joined([row[layer] for row in rows], words, count) for layer in layers}


def _words(input_ids: Tensor) -> Tensor:
    """A number for each different token of each row."""
    rows = torch.arange(len(input_ids))[:, None].expand_as(input_ids)
    return torch.stack([rows, input_ids.cpu()]).flatten(1).unique(dim=1, return_inverse=True)[1].view(input_ids.shape)


class _Reading:
    """What one forward pass caches in ``layers``, and errors of it, zero, that can be differentiated by."""

    def __init__(self, layers: Iterable[int], sinks: int, window: int) -> None:
        self.layers = frozenset(layers)
        self.sinks, self.window = sinks, window
        self.states: dict[int, tuple[Tensor, Tensor]] = {}
        self.errors: dict[int, tuple[Tensor, Tensor]] = {}
        self._first_seen: dict[int, tuple[Tensor, int]] = {}  # the tensor too: the id of a freed one is used again

    def errors_of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Float32 ``[B, H, T, D]`` for keys and values; None where they are not quantized.

        A layer that reads another one's cache is handed the same tensor, and its errors are those of that layer.
        """
        _, layer = self._first_seen.setdefault(id(key), (key, layer))
        if layer in self.layers and layer not in self.errors:
            key_error, value_error = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
            self.states[layer] = key, value
            self.errors[layer] = key_error.requires_grad_(), value_error.requires_grad_()
        return self.errors.get(layer)

    def is_coded(self, tokens: int, device: torch.device) -> Tensor:
        """Whether a query (row) reads a token (column) from its code."""
        positions = torch.arange(tokens, device=device)
        return (positions[:, None] - positions >= self.window) & (positions >= self.sinks)


_current: ContextVar[_Reading] = ContextVar("qjl-reading")


def _probe_row(
    model: PreTrainedModel, input_ids: Tensor, reading: _Reading, draws: int, generator: torch.Generator
) -> dict[int, tuple[Tensor, ...]]:
    """Keys, values and their gradients of each layer."""
    token = _current.set(reading)
    try:
        logits = model(input_ids=input_ids.clone().to(model.device), use_cache=False).logits
    finally:
        _current.reset(token)
    errors = [error for pair in reading.errors.values() for error in pair]
    scores = (_score_function(logits.detach(), generator) for _ in range(draws))
    gradients = [torch.autograd.grad(logits, errors, score, retain_graph=True) for score in scores]
    stacked = [torch.stack(one) for one in zip(*gradients, strict=True)]
    pairs = zip(stacked[::2], stacked[1::2], strict=True)
    return {
        layer: (*(state.detach().float() for state in reading.states[layer]), *pair)
        for layer, pair in zip(reading.errors, pairs, strict=True)
    }


def _score_function(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of log p(y) by the logits ``[1, T, V]``, y drawn from p at every position: one-hot(y) - p."""
    p = logits[0].float().softmax(-1)
    drawn = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
    return p.neg().scatter_add(1, drawn, torch.ones_like(p[:, :1]))[None].to(logits.dtype)


def _joined(rows: list[tuple[Tensor, ...]], words: Tensor, positions: int) -> Sensitivity:
    keys, values, key_gradients, value_gradients = zip(*rows, strict=True)
    gradients = torch.cat(key_gradients, dim=1), torch.cat(value_gradients, dim=1)
    return Sensitivity(torch.cat(keys), torch.cat(values), *gradients, words, positions)


@contextmanager
def _fixed_weights(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of weights: they would keep every activation."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


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
    """Reads coded tokens with errors, in the layers that are quantized; others compute as the model says.

    What is [Hq, T, T] is worked out again in the backward pass, in place of being kept for every layer.
    """
    reading = _current.get()
    errors = reading.errors_of(cast(int, module.layer_idx), key, value)
    if errors is None:
        return own(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    tokens = query.shape[2]
    mask = causal_mask(tokens, tokens, query.device) if attention_mask is None else attention_mask
    is_coded = reading.is_coded(tokens, query.device)
    settings = (scaling or query.shape[-1] ** -0.5, kwargs.get("softcap"), kwargs.get("s_aux"))
    out = checkpoint(
        _attend, query, key, value, *errors, mask, is_coded, *settings, use_reentrant=False, preserve_rng_state=False
    )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_error: Tensor,
    value_error: Tensor,
    mask: Tensor,
    is_coded: Tensor,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    query, key, value = query.float(), key.float(), value.float()
    key, value, key_error, value_error = (x.repeat_interleave(group, 1) for x in (key, value, key_error, value_error))
    scores = scaling * (query @ key.mT + is_coded * (query @ key_error.mT))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights @ value + (is_coded * weights) @ value_error
