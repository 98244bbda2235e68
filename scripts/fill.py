"""Fill README.md and docs/*.md with the numbers of committed rows, and draw the frontier: no number is typed by hand.

What stands between `<!-- FORM of FILE... -->` and `<!-- end -->` is made anew from the rows of these files, paths from
the project's root; FORM is a function of this module, or `table N` for one of the report's. Run after `--out FILE`; a
test fails where a page and its rows differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qjl.lab import plots, report
from qjl.lab.bench.timing import exponent
from qjl.lab.report.groups import groups
from qjl.lab.report.numbers import NOTHING, with_error
from qjl.lab.report.parts import Cell, Table
from qjl.lab.report.quality import lose_alike
from qjl.lab.rows import Decode, Fidelity, Generate, Row, Timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FILLED = re.compile(r"<!-- (?:table (?P<table>\d+)|(?P<form>\w+)) of (?P<files>[^>]+) -->\n.*?<!-- end -->", re.DOTALL)
LOSSES = ("preset", "bits, keys / values", "average", "KL", "ΔPPL", "top-1")
BUDGETS = (1.5, 2, 2.5, 3, 3.5, 4.25, 5, 8.25)  # true bits
GROWING = {  # of benchmarks, a case and a field
    ("decode", "ms"): "a step over one layer",
    ("encode", "ms"): "encoding in one layer",
    ("memory", "prefill_ms"): "a prompt, whole model",
    ("memory", "ms"): "a token, whole model",
    ("memory", "cache_bytes"): "bytes of the cache",
}


def models(rows: list[Fidelity]) -> dict[str, list[Fidelity]]:
    """Rows of each model by true bits, then by KL; of several measurements of a preset the last counts."""
    latest = {(row.model, row.preset): row for row in rows}.values()
    ordered = sorted(latest, key=lambda row: (row.bits, row.kl))
    return {row.model: [one for one in ordered if one.model == row.model] for row in rows}


def ours(rows: list[Fidelity]) -> str:
    """Our presets on the frontier, a table per model."""
    own = ([row for row in part if row.is_ours] for part in models(rows).values())
    return "\n\n".join(f"{_protocol(part[0])}\n\n{grid(LOSSES, map(_losses, part))}" for part in own)


def frontier(rows: list[Fidelity]) -> str:
    """Every preset, and which of ours needs no more bits and loses less: a picture and a table per model."""
    return "\n\n".join(
        f"{_protocol(part[0])}\n\n![KL against true bits](results/frontier-{name}.svg)\n\n"
        + grid((*LOSSES, "ours within these bits"), ((*_losses(row), _rival(row, part)) for row in part))
        for name, part in models(rows).items()
    )


def _protocol(row: Fidelity) -> str:
    return (
        f"`{row.model}`, {row.chunks} x {row.decode} tokens decoded after {row.prefix}, "
        f"{row.protocol['seeds']} seeds where a method has them, {row.recent} exact tokens; perplexity at full "
        f"precision {row.ppl_full:.1f}."
    )


def _losses(row: Fidelity) -> tuple[str, ...]:
    return (
        _name(row),
        f"{row.bits_keys:.2f} / {row.bits_values:.2f}",
        f"{row.bits:.2f}",
        f"{row.kl:.4f} ± {row.kl_se:.4f}",
        f"{row.dppl_percent:+.1f} %",
        f"{row.top1:.3f}",
    )


def _name(row: Fidelity) -> str:
    return f"**{row.preset}**" if row.is_ours else str(row.preset)


def _rival(row: Fidelity, rows: list[Fidelity]) -> str:
    """The best of ours with no more bits, and whether the two can be told apart."""
    if row.is_ours:
        return ""
    best = _best(own for own in rows if own.is_ours and own.bits <= row.bits)
    if best is None:
        return "none is so small"
    if lose_alike(row, best):
        return f"{best.preset} {best.kl:.4f}: not told apart"
    return f"{best.preset} {best.kl:.4f}: {'better' if best.kl < row.kl else '**worse**'}"


def _best(rows: Iterable[Fidelity]) -> Fidelity | None:
    return min(rows, key=lambda row: row.kl, default=None)


def step(rows: list[Decode]) -> str:
    """One token's attention over one layer, beside its baselines."""
    return grid(
        ("preset", "tokens", "head_dim", "ms", "x torch bf16", "x torch fp32", "x fp16 AVX2", "error"),
        (
            (
                f"`{row.preset}`",
                f"{row.tokens:,}",
                f"{row.head_dim}",
                f"{row.ms:.1f}",
                *(_ratio(row, name) for name in ("torch_bf16", "torch_fp32", "fp16_avx2")),
                f"{row.max_error:.1e}",
            )
            for row in rows
        ),
    )


def whole(rows: list[Generate]) -> str:
    """Tokens per second of a whole model with `b3`, beside transformers' own caches."""
    return grid(
        ("cache", "tokens", "tokens/s", "x bf16", "x fp32"),
        (
            (
                f"`b3`, model in {row.preset.removeprefix('b3 ')}",
                f"{row.tokens:,}",
                f"{row.tokens_per_second:.1f}",
                *(_ratio(row, name) for name in ("dynamic_bf16", "dynamic_fp32")),
            )
            for row in rows
            if row.preset.startswith("b3 ")
        ),
    )


def _ratio(row: Timed, baseline: str) -> str:
    low, high = row.spreads[baseline]
    return f"{row.ratios[baseline]:.1f} ({low:.1f} to {high:.1f})"


def across(rows: list[Fidelity]) -> str:
    """KL of the presets that all models were measured with, a column per model."""
    by_model = {name: {row.preset: row for row in part} for name, part in models(rows).items()}
    first, *others = by_model.values()
    shared = [[of[preset] for of in by_model.values()] for preset in first if all(preset in of for of in others)]
    return grid(
        ("preset", *(f"{name}: KL" for name in by_model)),
        ((_name(found[0]), *(with_error(row.kl, row.kl_se) for row in found)) for found in shared),
    )


def budgets(rows: list[Fidelity]) -> str:
    """The best of ours and of all others within so many bits, on each model."""
    return grid(
        ("model", "true bits, at most", "ours", "KL", "published", "KL"),
        (
            (name, f"{bits:g}", *_best_within(part, bits, ours=True), *_best_within(part, bits, ours=False))
            for name, part in models(rows).items()
            for bits in BUDGETS
        ),
    )


def _best_within(rows: list[Fidelity], bits: float, *, ours: bool) -> tuple[str, str]:
    best = _best(row for row in rows if row.is_ours is ours and row.bits <= bits)
    return (best.preset, with_error(best.kl, best.kl_se)) if best else (NOTHING, NOTHING)


def widths(rows: list[Fidelity]) -> str:
    """KL of every method at every width, and its true bits."""
    (part,) = models(rows).values()
    found = {(f"{name}{suffix}", float(width)): row for row in part for name, width, suffix in [_width(row.preset)]}
    columns = sorted({width for _, width in found})
    return grid(
        ("method", *(f"{width:g}" for width in columns)),
        (
            (method, *(_kl_and_bits(found.get((method, width))) for width in columns))
            for method in sorted({method for method, _ in found})
        ),
    )


def _width(preset: str) -> tuple[str, str, str]:
    """``b-1.5-pre`` is of b-pre, 1.5."""
    found = re.fullmatch(r"(.+?)-([\d.]+)(-pre)?", preset)
    assert found is not None, preset
    return found[1], found[2], found[3] or ""


def _kl_and_bits(row: Fidelity | None) -> str:
    return f"{with_error(row.kl, row.kl_se)} ({row.bits:.2f})" if row else NOTHING


def growth(rows: list[Timed]) -> str:
    """The power of n by which times and sizes grow, over all lengths and over the longer half of them."""
    lines = []
    for (case, field), what in GROWING.items():
        for of in groups([row for row in rows if row.case == case and row.backend], "preset"):
            by_length = sorted(of, key=lambda row: row.tokens)
            powers = (_power(part, field) for part in (by_length, by_length[len(of) // 2 :]))
            lines.append((what, of[0].preset, f"{by_length[0].tokens:,} to {by_length[-1].tokens:,}", *powers))
    return grid(("measured", "preset", "tokens", "grows as", "the longer half as"), lines)


def _power(rows: list[Timed], field: str) -> str:
    return f"n^{exponent([row.tokens for row in rows], [getattr(row, field) for row in rows]):.2f}"


def counted(rows: list[Fidelity]) -> str:
    """True bits of each published preset, on the first model."""
    first, *_ = models(rows).values()
    return grid(
        ("preset", "keys", "values", "average"),
        (
            (_name(row), *(f"{getattr(row, name):.2f}" for name in ("bits_keys", "bits_values", "bits")))
            for row in first
            if not row.is_ours
        ),
    )


def tables(rows: list[Row], which: slice = slice(None)) -> str:
    """The report's tables of these rows, or some of each part's, with the command that measures them."""
    return "\n\n".join(
        "\n\n".join(
            [
                f"*{part.title}.* {part.facts.get('Machine', '')}".strip(),
                *map(_table, part.tables[which]),
                f"```text\n{part.command}\n```",
            ]
        )
        for section in report.sections(rows)
        for part in section.parts
    )


def _table(table: Table) -> str:
    return f"{table.caption}\n\n{grid(table.columns, (map(_text, line) for line in table.lines))}"


def _text(cell: Cell) -> str:
    text = {"best": f"**{cell.text}**", "ours": f"**{cell.text}**", "near": f"≈ {cell.text}"}.get(cell.mark, cell.text)
    return f"{text} ({cell.note})" if cell.note else text


def grid(columns: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table of markdown."""
    head = f"| {' | '.join(columns)} |"
    return "\n".join([head, "|---" * (head.count(" | ") + 1) + "|", *(f"| {' | '.join(line)} |" for line in lines)])


FORMS = {
    form.__name__: form for form in (ours, frontier, step, whole, across, budgets, widths, growth, counted, tables)
}


def filled(text: str) -> str:
    """The text with all its tables made anew."""

    def made(found: re.Match[str]) -> str:
        rows = [row for run in report.read(ROOT / file for file in found["files"].split()) for row in run.rows]
        which = found["table"] and slice(int(found["table"]), int(found["table"]) + 1)
        content = tables(rows, which) if which else FORMS[found["form"]](rows)
        return f"{found[0].splitlines()[0]}\n{content}\n<!-- end -->"

    return FILLED.sub(made, text)


def main() -> None:
    (frontiers,) = report.read([RESULTS / "frontier.jsonl"])
    for name, part in models(frontiers.rows).items():
        (RESULTS / f"frontier-{name}.svg").write_bytes(plots.frontier(part))
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
