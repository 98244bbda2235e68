"""What is kept: the sections of evaluations."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

from qjl.lab import plots
from qjl.lab.plots.answers import FULL, by_metric
from qjl.lab.plots.losses import ROLES
from qjl.lab.plots.pareto import LEAST_KL, Family, families
from qjl.lab.report.groups import commands, facts, groups, latest, names, settings
from qjl.lab.report.numbers import (
    NOTHING,
    Measured,
    are_apart,
    column,
    is_near,
    marks,
    mean_and_error,
    number,
    percent,
    signed,
    with_error,
)
from qjl.lab.report.parts import Cell, Figure, Part, Table
from qjl.lab.rows import (
    Distortion,
    Fidelity,
    HarnessMetric,
    Haystack,
    ModelFamily,
    OfPreset,
    Perplexity,
    Problems,
    Seed,
    pareto_front,
)

_FEW = 20  # families, which are all shown
SIZES = (1.75, 2.25, 2.75, 3.25, 4.25, 8.5)  # true bits: a nominal size, and its constants
_LOWER_IS_BETTER = re.compile(r"(?:^|_)(?:perplexity|bits_per_byte|bits_per_character|brier|loss|mse|mae)(?:_|$)")


def frontier(rows: Sequence[Fidelity]) -> Part:
    rows = sorted(latest(rows, "preset"), key=lambda row: (row.bits, row.kl))
    lossy = [row for row in rows if row.kl > LEAST_KL]
    caption = (
        "KL of the next token to full precision against true bits per number; a line per method, bars are standard "
        "errors, the band is the least KL to be had for so many bits. Full precision would lie at 16 bits."
    )
    return Part(
        rows[0].model,
        figures=(Figure(partial(plots.frontier, lossy), caption),) if lossy else (),
        tables=(*_headline(lossy), _every_preset(rows)),
        facts=facts(rows),
        command=commands(rows),
        settings=settings(rows),
    )


def _headline(rows: Sequence[Fidelity]) -> tuple[Table, ...]:
    """The best of each family within so many bits; no table if no size has any."""
    sizes = [
        size
        for smaller, size in zip((0.0, *SIZES), SIZES, strict=False)
        if any(smaller < row.bits <= size for row in rows)
    ]
    methods = sorted(families(rows), key=lambda family: (not family.is_ours, family.name))
    columns = [_within(methods, size) for size in sizes]
    if not columns:
        return ()
    caption = (
        "KL to full precision in nats per token (lower is better), of each method's best preset with no more true bits "
        "than the column says; its name stands below. What is not told apart from the best is judged by the ratios on "
        "each stretch of the text. Methods of this project come first."
    )
    named = [Cell(family.name, "ours" if family.is_ours else "") for family in methods]
    return (
        Table(caption, ("method", *(f"≤ {size:g} bits" for size in sizes)), tuple(zip(named, *columns, strict=True))),
    )


def _within(methods: Sequence[Family], size: float) -> list[Cell]:
    """A column of the headline."""
    fitting = [[row for row in family.rows if row.bits <= size] for family in methods]
    best = [min(rows, key=lambda row: row.kl) if rows else None for rows in fitting]

    def near(one: int, other: int) -> bool:
        first, second = best[one], best[other]
        return first is not None and second is not None and lose_alike(first, second)

    return column(
        [(row.kl, row.kl_se) if row else None for row in best],
        [with_error(row.kl, row.kl_se) if row else NOTHING for row in best],
        higher=False,
        notes=[row.preset if row else "" for row in best],
        near=near,
    )


def lose_alike(one: Fidelity, other: Fidelity) -> bool:
    """Whether the KL of two rows cannot be told apart: by their ratio on each stretch of the text, if both tell it."""
    of_one, of_other = one.kl_of_chunks, other.kl_of_chunks
    if not of_one or not of_other or len(of_one) != len(of_other):
        return is_near((one.kl, one.kl_se), (other.kl, other.kl_se))
    return not are_apart([math.log(a / b) for a, b in zip(of_one, of_other, strict=True) if a > 0 and b > 0])


def _every_preset(rows: Sequence[Fidelity]) -> Table:
    front = [row.preset for row in pareto_front(rows)]
    columns = (
        "preset",
        "true bits",
        "keys",
        "values",
        "with window",
        "KL, nats",
        "ΔPPL, %",
        "top-1, %",
        "codes found, %",
    )
    lines = tuple(
        (
            name,
            Cell(f"{row.bits:.2f}"),
            Cell(f"{row.bits_keys:.2f}"),
            Cell(f"{row.bits_values:.2f}"),
            Cell(f"{row.bits_with_window:.2f}"),
            Cell(with_error(row.kl, row.kl_se), "best" if row.preset in front else ""),
            Cell(signed(with_error(row.dppl_percent, row.dppl_percent_se))),
            Cell(f"{100 * row.top1:.1f}"),
            Cell(percent(row.retrieval)),
        )
        for name, row in zip(names(rows), rows, strict=True)
    )
    caption = (
        f"Every preset, smallest first; bold KL: no other preset loses less with as few bits. Perplexity at full "
        f"precision is {rows[0].ppl_full:.2f}. “With window” counts the exact tokens and the maps too."
    )
    return Table(caption, columns, lines)


def distortion(rows: Sequence[Distortion]) -> Part:
    rows = latest(rows, "preset", "layer", "role")
    caption = (
        "Error by layer on real keys and queries. Left: root mean square error of a score over ‖q‖ ‖k‖, with what "
        "theory says where there is a formula (dotted). Right: error of attention's output over its norm. "
        "Bars: standard errors over texts and heads."
    )
    presets = groups(rows, "preset")
    roles = [role for role in ROLES if any(row.role == role for row in rows)]
    by_role = [_mean_error(presets, role) for role in roles]
    theory = [Cell(number(_mean([row.theory for row in of if row.theory is not None]))) for of in presets]
    titles = {"score": "scores", "output": "outputs"}
    table = Table(
        "Means over layers, with standard errors over them; theory's expectation for scores where there is one.",
        ("preset", "true bits", *(titles[role] for role in roles), "theory, scores"),
        tuple(zip(names([of[0] for of in presets]), _bits(presets), *by_role, theory, strict=True)),
    )
    return Part(
        rows[0].model,
        (Figure(partial(plots.distortion, rows), caption),),
        (table,),
        facts(rows, "tokens", "rows", "recent", "text"),
        commands(rows),
        settings(rows),
    )


def _mean_error(presets: Sequence[Sequence[Distortion]], role: str) -> list[Cell]:
    errors = [[row.error for row in of if row.role == role] for of in presets]
    found: list[Measured | None] = [mean_and_error(one) if one else None for one in errors]
    return [Cell(with_error(*one) if one else NOTHING) for one in found]


def _mean(numbers: Sequence[float]) -> float | None:
    return mean(numbers) if numbers else None


def perplexity(rows: Sequence[Perplexity]) -> Part:
    rows = latest(rows, "preset", "context")
    presets, contexts = groups(rows, "preset"), sorted({row.context for row in rows})
    caption = (
        "Perplexity of the second half of each context, decoded over the codes of the first, and KL to full precision."
    )
    by_context = [_increases(presets, context) for context in contexts]
    table = Table(
        "Increase of the perplexity over full precision, percent, with its standard error; perplexities below.",
        ("preset", "true bits", *(f"{context:,} tokens" for context in contexts)),
        tuple(zip(names([of[0] for of in presets]), _bits(presets), *by_context, strict=True)),
    )
    return Part(
        rows[0].model,
        (Figure(partial(plots.perplexity, rows), caption),),
        (table,),
        facts(rows, "context", "chunks", "recent", "text"),
        commands(rows),
        settings(rows),
    )


def _increases(presets: Sequence[Sequence[Perplexity]], context: int) -> list[Cell]:
    """A column of the perplexities."""
    of = [next((row for row in rows if row.context == context), None) for rows in presets]
    shown = [_increase(row) if row else None for row in of]
    return column(
        [one if row and row.preset != FULL else None for row, one in zip(of, shown, strict=True)],
        [signed(with_error(*one)) if one else NOTHING for one in shown],
        higher=False,
        notes=[f"{row.ppl:.2f} / {row.ppl_full:.2f}" if row else "" for row in of],
    )


def _increase(row: Perplexity) -> Measured:
    """In percent."""
    error = row.dppl_percent_se
    if error is None and row.ppl_se is not None:
        error = 100 * row.ppl_se / row.ppl_full
    return 100 * (row.ppl / row.ppl_full - 1), error


def seeds(rows: Sequence[Seed]) -> Part:
    presets = groups(latest(rows, "preset", "seed"), "preset")
    caption = "KL to full precision of each seed; bars are the mean and the standard deviation over seeds."
    lines = []
    for name, bits, of in zip(names([of[0] for of in presets]), _bits(presets), presets, strict=True):
        kl = [row.kl for row in of]
        deviation = stdev(kl) if len(kl) > 1 else None
        numbers = (mean(kl), deviation, deviation and 100 * deviation / mean(kl), min(kl), max(kl))
        lines.append((name, bits, Cell(str(len(of))), *(Cell(number(one)) for one in numbers)))
    table = Table(
        "KL in nats per token over seeds, of projections and of the prompt that statistics come from. One seed: "
        "nothing in this preset is random.",
        ("preset", "true bits", "seeds", "mean", "deviation", "deviation, %", "least", "most"),
        tuple(lines),
    )
    rows = [row for of in presets for row in of]
    return Part(
        rows[0].model,
        (Figure(partial(plots.seeds, rows), caption),),
        (table,),
        facts(rows, "prefix", "decode", "chunks", "recent", "text"),
        commands(rows),
        settings(rows),
    )


def haystack(rows: Sequence[Haystack]) -> Part:
    rows = latest(rows, "preset", "task", "context", "depth", "seed")
    tasks = list(dict.fromkeys(row.task for row in rows))
    figures = tuple(
        Figure(
            partial(plots.heatmap, [row for row in rows if row.task == task]),
            f"{task}: share of what was hidden that was found, by context and depth, mean over seeds. Where full "
            "precision found another share of the same haystack, “of” names it.",
        )
        for task in tasks
    )
    presets = sorted(groups(rows, "preset"), key=lambda of: (of[0].preset != FULL, of[0].bits))
    by_task = [_found(presets, task) for task in tasks]
    codes = [Cell(percent(_mean([row.read_as_codes for row in of]))) for of in presets]
    table = Table(
        "Share found, percent, with its standard error over haystacks; below, the difference to full precision on the "
        "same haystacks. Full precision does not compete. What is not told apart from the best is judged haystack by "
        "haystack.",
        ("preset", "true bits", *(f"{task}, {_count(rows, task)} haystacks" for task in tasks), "read as codes, %"),
        tuple(zip(names([of[0] for of in presets]), _bits(presets), *by_task, codes, strict=True)),
    )
    return Part(
        rows[0].model,
        figures,
        (table,),
        facts(rows, "context", "depth", "seed", "recent"),
        commands(rows),
        settings(rows),
    )


def _count(rows: Sequence[Haystack], task: str) -> int:
    return len(groups([row for row in rows if row.task == task], "context", "depth", "seed"))


def _found(presets: Sequence[Sequence[Haystack]], task: str) -> list[Cell]:
    """A column of the shares found."""
    cells = [{(row.context, row.depth, row.seed): 100 * row.found for row in of if row.task == task} for of in presets]
    full = next((one for of, one in zip(presets, cells, strict=True) if of[0].preset == FULL), {})
    results = [mean_and_error(list(one.values())) if one else None for one in cells]
    is_full = [of[0].preset == FULL for of in presets]
    competing = [None if full_row else one for full_row, one in zip(is_full, results, strict=True)]
    found = marks(competing, higher=True, near=_alike_in(cells))
    shown = [with_error(*one) if one else NOTHING for one in results]
    notes = ["" if full_row else _difference(one, full) for full_row, one in zip(is_full, cells, strict=True)]
    return [Cell(*parts) for parts in zip(shown, found, notes, strict=True)]


def problems(rows: Sequence[Problems]) -> Part:
    rows = latest(rows, "preset")
    rows = sorted(rows, key=lambda row: (row.preset != FULL, row.bits, row.preset))
    answers = [{index: 100.0 * int(answer) for index, answer in enumerate(row.right)} for row in rows]
    is_full = [row.preset == FULL for row in rows]
    full = next((one for one, of_full in zip(answers, is_full, strict=True) if of_full), {})
    shares: list[Measured] = [(100 * row.accuracy, 100 * row.accuracy_se) for row in rows]
    competing = [None if of_full else one for one, of_full in zip(shares, is_full, strict=True)]
    found = marks(competing, higher=True, near=_alike_in(answers))
    solved = zip((with_error(*one) for one in shares), found, strict=True)
    table = Table(
        f"Percent of {rows[0].n} problems solved, with its standard error; the difference to full precision is "
        "taken problem by problem. What is not told apart from the best is judged problem by problem too. "
        "Unfinished: cut at the longest solution.",
        ("preset", "true bits", "solved, %", "difference to full", "tokens", "unfinished, %", "read as codes, %"),
        tuple(
            (
                name,
                Cell(f"{row.bits:.2f}"),
                Cell(*share),
                Cell("" if of_full else _difference(one, full)),
                Cell(f"{row.tokens:.0f}"),
                Cell(f"{100 * row.unfinished:.1f}"),
                Cell(percent(row.read_as_codes)),
            )
            for name, row, share, one, of_full in zip(names(rows), rows, solved, answers, is_full, strict=True)
        ),
    )
    caption = (
        "Problems solved by each preset with standard errors; dashed: full precision. Round: methods of this project."
    )
    return Part(
        f"{rows[0].task}, {rows[0].model}",
        (Figure(partial(plots.problems, rows), caption),),
        (table,),
        facts(rows),
        commands(rows),
        settings(rows),
    )


def _alike_in(answers: Sequence[dict[Any, float]]) -> Callable[[int, int], bool]:
    """Whether two presets' answers, by index, cannot be told apart question by question."""
    return lambda one, other: not are_apart(_paired(answers[one], answers[other]))


def _paired(one: dict[Any, float], other: dict[Any, float]) -> list[float]:
    """The differences over what both were asked."""
    return [one[asked] - other[asked] for asked in one if asked in other]


def _difference(one: dict[Any, float], full: dict[Any, float]) -> str:
    found = _paired(one, full)
    return signed(with_error(*mean_and_error(found))) if found else NOTHING


def harness(rows: Sequence[HarnessMetric]) -> Part:
    rows = latest(rows, "preset", "task", "metric", "filter")
    panels = by_metric(rows)
    presets = [of[0] for of in sorted(groups(rows, "preset"), key=lambda of: (of[0].preset != FULL, of[0].bits))]
    by_panel = [_values(panel, presets) for panel in panels.values()]
    codes = [Cell(percent(_mean([row.read_as_codes for row in rows if row.preset == of.preset]))) for of in presets]
    table = Table(
        "The harness's values with its standard errors. Full precision does not compete. Read as codes: the share of "
        "all tokens attended to; at 0 a task says nothing of a preset.",
        ("preset", "true bits", *map(", ".join, panels), "read as codes, %"),
        tuple(zip(names(presets), (Cell(f"{row.bits:.2f}") for row in presets), *by_panel, codes, strict=True)),
    )
    caption = "Each preset's value with its standard error; dashed: full precision. Round: methods of this project."
    return Part(
        rows[0].model,
        (Figure(partial(plots.tasks, rows), caption),),
        (table,),
        facts(rows, "shots", "limit", "n"),
        commands(rows),
        settings(rows),
    )


def _values(panel: Sequence[HarnessMetric], presets: Sequence[HarnessMetric]) -> list[Cell]:
    """A column of one task's metric."""
    of = {row.preset: row for row in panel}
    found = [of.get(row.preset) for row in presets]
    metric = panel[0].metric
    values = [(row.value, row.value_se) if row and row.preset != FULL else None for row in found]
    if metric.endswith("perplexity"):
        values = [one and _logarithm(*one) for one in values]
    return column(
        values,
        [with_error(row.value, row.value_se) if row else NOTHING for row in found],
        higher=not _LOWER_IS_BETTER.search(metric),
    )


def _logarithm(value: float, error: float | None) -> Measured:
    """Of a perplexity: the mean that it was made of."""
    return math.log(value), error and error / value


def _bits(presets: Sequence[Sequence[OfPreset]]) -> list[Cell]:
    return [Cell(f"{of[0].bits:.2f}") for of in presets]


def model_families(rows: Sequence[ModelFamily]) -> Part:
    rows = latest(rows, "family", "model_class")
    counts = Counter(row.verdict for row in rows)
    failing = [row for row in rows if row.verdict != "works"]
    shown = rows if len(rows) <= _FEW else failing
    table = Table(
        f"Of {len(rows)} models: {', '.join(f'{count} {verdict}' for verdict, count in counts.most_common())}. Errors "
        "of logits with exact codecs, relative; KL in nats, on the prompt that statistics came from and on another."
        + ("" if shown is rows else " Those that work are left out."),
        ("family", "verdict", "full: error", "KL", "KL of another prompt"),
        tuple(
            (
                Cell(row.family),
                Cell(": ".join(filter(None, (row.verdict, row.why)))),
                *(Cell(number(one, 2)) for one in (row.max_error_full, row.kl, row.kl_other)),
            )
            for row in shown
        ),
        words=2,
    )
    return Part(f"{rows[0].preset}", tables=(table,), facts=facts(rows), command=commands(rows))
