"""Ways of asking a model through ``generate``: a prompt, a padded batch, a prompt in parts, beams.

``generate`` is made to write given tokens. So each model gets its inputs as it wants them, and logits can be compared
token by token, whatever cache they come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qjl.lab.evals import tiny
from qjl.teacher_forcing import log_probabilities

PROMPT, SHORTER, ANSWER, SHORT_ANSWER = 300, 210, 24, 8  # tokens
CUTS = (100, 190)  # of a prompt that comes in parts
REPLACED = 200  # tokens at the beginning of another prompt
SILENT = [*range(tiny.WORDS.start), *range(tiny.WORDS.stop, tiny.VOCABULARY)]


@dataclass(frozen=True, eq=False)
class Written:
    """Logits ``[B, T, V]`` before each token ``[B, T]`` that was written, and the cache behind them."""

    logits: Tensor
    tokens: Tensor
    cache: Any

    def error(self, own: Written) -> float:
        """The largest of all tokens, of the norm of the model's own logits."""
        away = (self.logits - own.logits).norm(dim=-1) / own.logits.norm(dim=-1)
        return float(away.nan_to_num(torch.inf).max())

    def kl(self, own: Written) -> float:
        """KL(own || this) in nats, on average over the tokens of this."""
        ours, theirs = (log_probabilities(one.logits[:, : self.tokens.shape[1]]) for one in (self, own))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


class Pen(LogitsProcessor):
    """Leaves ``generate`` no choice but some tokens ``[B, T]``, if there are any; counts what was written."""

    def __init__(self, tokens: Tensor | None = None) -> None:
        self._tokens = tokens
        self.written = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.written += 1
        if self._tokens is None:
            return scores
        return torch.full_like(scores, -torch.inf).scatter(1, self._tokens[:, self.written - 1, None], 0.0)


@dataclass(frozen=True, eq=False)
class Way:
    """Prompts ``[B, T]`` of which ``mask`` tells what is no padding, and how they are put to a model."""

    name: str
    ids: Tensor
    mask: Tensor
    cuts: tuple[int, ...] = ()
    beams: int = 1
    answer: int = SHORT_ANSWER

    def ask(self, model: PreTrainedModel, cache: Any = None, pen: Pen | None = None) -> Written:
        """With this cache, or with the model's own."""
        for cut in self.cuts:
            cache = self._generate(model, cut, cache, Pen(), 1).past_key_values
        stop = self.ids.shape[1]
        found = self._generate(model, stop, cache, pen or Pen(), self.answer)
        return Written(torch.stack(found.logits, dim=1).float(), found.sequences[:, stop:], found.past_key_values)

    @property
    def has_padding(self) -> bool:
        return not bool(self.mask.all())

    def with_other_padding(self) -> Way:
        """The same to a model that does not read padding."""
        return replace(self, ids=torch.where(self.mask.bool(), self.ids, self.ids + 1))

    def _generate(self, model: PreTrainedModel, stop: int, cache: Any, pen: Pen, count: int) -> Any:
        given = {} if cache is None else {"past_key_values": cache}
        return model.generate(  # type: ignore[operator]
            self.ids[:, :stop],
            attention_mask=self.mask[:, :stop],
            do_sample=False,
            num_beams=self.beams,
            max_new_tokens=count,
            min_new_tokens=count,
            suppress_tokens=SILENT,
            logits_processor=LogitsProcessorList([pen]),
            output_logits=True,
            return_dict_in_generate=True,
            **given,
        )


def plain() -> Way:
    return _way("a prompt", _words(PROMPT), answer=ANSWER)


def another() -> Way:
    """Ends as ``plain`` does."""
    return _way("another prompt", torch.cat([_words(REPLACED, seed=1), _words(PROMPT)[:, REPLACED:]], dim=1))


def padded() -> Way:
    """Two prompts of different lengths."""
    padding = torch.full((1, PROMPT - SHORTER), tiny.WORDS.start)
    ids = torch.cat([_words(PROMPT), torch.cat([padding, _words(SHORTER, seed=2)], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, : PROMPT - SHORTER] = 0
    return Way("a left-padded batch", ids, mask)


def in_parts() -> Way:
    return _way("a prompt in parts", _words(PROMPT), cuts=CUTS)


def beams() -> Way:
    return _way("beams", _words(PROMPT), beams=2)


def _way(name: str, ids: Tensor, **settings: Any) -> Way:
    return Way(name, ids, torch.ones_like(ids), **settings)


def _words(count: int, seed: int = 0) -> Tensor:
    """``[1, T]``"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.WORDS.start, tiny.WORDS.stop, (1, count), generator=generator)
