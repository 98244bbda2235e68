"""Draw docs/results/fidelity.svg, and fill the README's table, from docs/results/fidelity.jsonl.

Run after `qjl eval fidelity … --out docs/results/fidelity.jsonl`: no number is typed by hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results/fidelity.jsonl"
PICTURE = ROOT / "docs/results/fidelity.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 70, 30, 30, 56
COLORS = {"qjl": "#c2410c", "balanced": "#1d4ed8"}
Row = dict[str, Any]


def read(path: Path = RESULTS) -> list[Row]:
    """One row per preset; of several measurements of a preset on a model the last counts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({(row["model"], row["preset"]): row for row in rows}.values())


def table(rows: list[Row]) -> str:
    """The README's table, in Markdown."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    return "\n\n".join(_model_table(model, [row for row in rows if row["model"] == model]) for model in models)


def _model_table(model: str, rows: list[Row]) -> str:
    first = rows[0]
    lines = [
        f"`{model}`, {first['chunks']} x {first['decode']} tokens decoded after {first['prefix']}, "
        f"{first['seeds']} seeds, {first['recent']} exact tokens; full precision: perplexity "
        f"{first['ppl_full']:.1f}, retrieval {first['retrieval_full']:.2f}.",
        "",
        "| preset | bits, keys / values | average | KL | ΔPPL | top-1 | retrieval |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [_line(row) for row in sorted(rows, key=lambda row: row["kl"])])


def _line(row: Row) -> str:
    error = "" if row["kl_se"] is None else f" ± {row['kl_se']:.4f}"
    cells = (
        row["preset"],
        f"{row['bits_keys']:.2f} / {row['bits_values']:.2f}",
        f"{row['bits']:.2f}",
        f"{row['kl']:.4f}{error}",
        f"{row['dppl_percent']:+.1f} %",
        f"{row['top1']:.3f}",
        f"{row['retrieval']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def picture(rows: list[Row]) -> str:
    """Bits against KL of the first model's presets, as SVG."""
    rows = [row for row in rows if row["model"] == rows[0]["model"] and row["kl"] > 1e-6]
    most_bits = math.ceil(max(row["bits"] for row in rows)) + 0.5
    low, high = (round_(math.log10(edge(row["kl"] for row in rows))) for edge, round_ in _EDGES)

    def x(bits: float) -> float:
        return LEFT + (bits - 1) / (most_bits - 1) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        return TOP + (high - math.log10(kl)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_line_svg(LEFT, y(10.0**power), WIDTH - RIGHT, y(10.0**power)) for power in range(low, high + 1)]
    for power in range(low, high + 1):
        parts.append(_text(LEFT - 8, y(10.0**power) + 4, f"{10.0**power:g}", anchor="end"))
    for bits in range(1, math.floor(most_bits) + 1):
        parts.append(_text(x(bits), HEIGHT - BOTTOM + 20, str(bits), anchor="middle"))
    for row in rows:
        color = COLORS["qjl" if row["preset"].startswith("qjl") else "balanced"]
        parts.append(f'<circle cx="{x(row["bits"]):.1f}" cy="{y(row["kl"]):.1f}" r="6" fill="{color}"/>')
        parts.append(_text(x(row["bits"]) + 11, y(row["kl"]) + 5, row["preset"], color=color, weight="bold"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 12, "true bits per number, 16 without a quantized cache", anchor="middle"))
    title = f"KL of the next token, quantized cache against full precision ({rows[0]['model']})"
    parts.append(_text(LEFT, 18, title))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


_EDGES = ((min, math.floor), (max, math.ceil))


def _line_svg(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d4d4d4"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = "#333333", weight: str = "normal") -> str:
    style = f'text-anchor="{anchor}" fill="{color}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'


def filled(readme: str, rows: list[Row]) -> str:
    """The README with its table made anew."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    rows = read()
    PICTURE.write_text(picture(rows), encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
