"""Is a cache of ours right for a family of models? A tiny one answers with it, and with its own.

A row's ``verdict``:

- works: ``full`` gives the model's own logits, and the preset's are nearer to them than those of another prompt are.
- refused: one sentence says why this model has no such cache.
- wrong: other numbers, or full precision where a quantized cache was asked for.
- traceback: an error, or a crash, that the model's own cache does not have.
- not built: there is no such model here, or it does not answer with its own cache, or no context reaches its answers.
"""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from qjl.errors import QJLError
from qjl.hf import KVCache, disable, enable
from qjl.lab.evals import tiny, ways
from qjl.lab.evals.ways import Pen, Way, Written
from qjl.lab.results import Row

VERDICTS = ("wrong", "traceback", "refused", "works", "not built")  # of several the first counts
FULL = "full"
TOLERANCE = 1e-4  # of the logits' norm
LEAST_CONTEXT = 1e-4  # nats that another beginning of the prompt must change, so that answers tell of a cache


@dataclass(frozen=True)
class Finding:
    """What one way of asking has shown."""

    verdict: str
    why: str | None = None
    error: float | None = None
    kl: float | None = None


def check(family: str, task: str, preset: str, on_built: Callable[[], None] = lambda: None) -> Row:
    """The verdict on a family, and what it rests on; ``on_built`` is told that the model has answered alone."""
    try:
        model = tiny.build(family, task)
    except Exception as error:  # whatever a model's own code raises is its row
        return row("not built", told(error))
    return WaysTrial(model, preset).row(on_built)


def row(verdict: str, why: str | None = None, **numbers: float | None) -> Row:
    return {"verdict": verdict, "max_error_full": None, "kl": None, "kl_other": None} | numbers | {"why": why}


def told(error: BaseException) -> str:
    """An error on one line, and where it was raised."""
    text = textwrap.shorten(str(error), 300)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({'/'.join(place.filename.split('/')[-2:])}:{place.lineno})"


class WaysTrial:
    """A model that is asked in every way, with its own cache first."""

    def __init__(self, model: PreTrainedModel, preset: str) -> None:
        self._model, self._preset = model, preset
        self._own: dict[str, Written] = {}
        self._kl_other: float | None = None

    def row(self, on_built: Callable[[], None]) -> Row:
        reason = self._reason_not_to_ask()
        if reason is not None:
            refused = self._made(FULL) or self._made(self._preset)
            return row(refused.verdict, refused.why) if refused else row("not built", reason)
        on_built()
        full, coded = self._with_full(), self._with_codes()
        worst = min([*full, *coded], key=lambda one: (VERDICTS.index(one.verdict), one.why is None))
        return row(
            worst.verdict,
            worst.why,
            max_error_full=max((one.error for one in full if one.error is not None), default=None),
            kl=next((one.kl for one in coded if one.kl is not None), None),
            kl_other=self._kl_other,
        ) | {"asked": list(self._own)}

    def _reason_not_to_ask(self) -> str | None:
        """What is the matter with the model alone."""
        plain = ways.plain()
        try:
            own = self._own[plain.name] = plain.ask(self._model)
            self._kl_other = ways.another().ask(self._model, pen=Pen(own.tokens)).kl(own)
        except Exception as error:  # of the model's own code
            return told(error)
        for way in (ways.padded(), ways.in_parts(), ways.beams()):
            if (answer := self._answered_alone(way)) is not None:
                self._own[way.name] = answer
        is_deaf = self._kl_other < LEAST_CONTEXT
        return f"another prompt changes only {self._kl_other:.1e} nats" if is_deaf else None

    def _answered_alone(self, way: Way) -> Written | None:
        """None where the model's own cache does not know this way, or has no right answer since padding is read."""
        try:
            answer = way.ask(self._model)
            if not way.has_padding:
                return answer
            other = way.with_other_padding().ask(self._model, pen=Pen(answer.tokens))
        except Exception:  # of the model's own code
            return None
        return answer if other.error(answer) <= TOLERANCE else None

    def _with_full(self) -> list[Finding]:
        found = []
        for way in self._ways(ways.plain, ways.padded, ways.in_parts, ways.beams):
            answer = self._asked(way, FULL)
            found.append(self._compared(way, answer) if isinstance(answer, Written) else answer)
        return _with_lesser_refusals(found)

    def _with_codes(self) -> list[Finding]:
        found = []
        for way in self._ways(ways.plain, ways.padded, ways.in_parts):
            answer = self._asked(way, self._preset)
            found.append(self._judged(way, answer) if isinstance(answer, Written) else answer)
        return _with_lesser_refusals([*found, self._enabled()])

    def _ways(self, *made: Callable[[], Way]) -> list[Way]:
        return [way for make in made if (way := make()).name in self._own]

    def _made(self, preset: str) -> Finding | None:
        """What keeps a cache from being made."""
        try:
            KVCache(self._model, preset)
        except QJLError as error:
            return Finding("refused", str(error))
        except Exception as error:  # the kind of fault that is looked for
            return Finding("traceback", f"{preset}: {told(error)}")
        return None

    def _asked(self, way: Way, preset: str) -> Written | Finding:
        failure = self._made(preset)
        return failure or self._answered(way, KVCache(self._model, preset), preset)

    def _answered(self, way: Way, cache: KVCache | None, name: str) -> Written | Finding:
        pen = Pen(None if way.beams > 1 else self._own[way.name].tokens)
        try:
            return way.ask(self._model, cache, pen)
        except QJLError as error:
            when = f"after {pen.written} of {way.answer} tokens" if pen.written else "in the first forward pass"
            return Finding("refused", f"{when}: {error}")
        except Exception as error:  # the kind of fault that is looked for
            return Finding("traceback", f"{name}, {way.name}: {told(error)}")

    def _compared(self, way: Way, answer: Written) -> Finding:
        own = self._own[way.name]
        if way.beams > 1:
            is_same = answer.tokens.equal(own.tokens)
            return Finding("works") if is_same else Finding("wrong", "full finds other texts by beams")
        error = answer.error(own)
        if error > TOLERANCE:
            return Finding("wrong", f"full is off by {error:.1e} of the logits in {way.name}", error)
        return Finding("works", error=error)

    def _judged(self, way: Way, answer: Written) -> Finding:
        """With codes in place of numbers there must be a loss, and a small one."""
        kl = answer.kl(self._own[way.name])
        used = [store.index for store in answer.cache.stores if store.index.columns]
        if not used or not all(max(index.packed_tokens) for index in used):
            return Finding("wrong", f"{self._preset} quantizes nothing in {way.name}", kl=kl)
        if not 0 < kl < self._limit:
            return Finding("wrong", f"{self._preset} is {kl:.2g} nats off in {way.name}", kl=kl)
        return Finding("works", kl=kl)

    @property
    def _limit(self) -> float:
        assert self._kl_other is not None
        return self._kl_other / 2

    def _enabled(self) -> Finding:
        way = ways.plain()
        try:
            enable(self._model, self._preset)
        except QJLError as error:
            return Finding("refused", str(error))
        except Exception as error:  # the kind of fault that is looked for
            return Finding("traceback", f"enable: {told(error)}")
        try:
            answer = self._answered(way, None, "enable")
        finally:
            disable(self._model)
        if isinstance(answer, Finding):
            return answer
        if not isinstance(answer.cache, KVCache):
            return Finding("wrong", f"generate takes a {type(answer.cache).__name__} after enable, and says nothing")
        return self._judged(way, answer)


def _with_lesser_refusals(found: list[Finding]) -> list[Finding]:
    """A refusal counts as one where a single prompt is refused; of other ways it is only told."""
    first, *others = found
    if first.verdict == "refused":
        return [first]
    return [
        first,
        *(Finding("works", one.why) if one.verdict == "refused" else one for one in others),
    ]
