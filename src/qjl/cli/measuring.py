"""Commands that measure a model on a text: eval fidelity, calibrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qjl.cli.common import (
    EMBEDDED,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    load,
    notes,
    out,
    print_json,
    progress,
    read_data,
    results_table,
    waiting,
)
from qjl.errors import QJLError

_COLUMNS = {
    "KL": lambda row: f"{row['kl']:.4f}" + (f" ± {row['kl_se']:.4f}" if row["kl_se"] is not None else ""),
    "ΔPPL": lambda row: f"{row['dppl_percent']:+.1f} %",
    "top-1": lambda row: f"{row['top1']:.3f}",
    "retrieval": lambda row: f"{row['retrieval']:.2f}",
    "bits": lambda row: f"{row['bits']:.2f}",
    "with window": lambda row: f"{row['bits_with_window']:.2f}",
}


def fidelity(
    model: ModelOption = EMBEDDED,
    preset: Annotated[
        list[str] | None, typer.Option("--preset", "-p", help="May be given several times; all if not given.")
    ] = None,
    data: DataOption = None,
    prefix: Annotated[int, typer.Option(help="Tokens that are prefilled.")] = 512,
    decode: Annotated[int, typer.Option(help="Tokens decoded over the packed codes.")] = 512,
    chunks: Annotated[int, typer.Option(help="Stretches of the text.")] = 4,
    seeds: Annotated[int, typer.Option(help="Of projections, statistics and the retrieval task.")] = 3,
    recent: Annotated[int, typer.Option(min=0, help="Exact tokens at the end.")] = 32,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: Annotated[Path | None, typer.Option("--out", help="Append JSON lines to this file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Compare presets with full precision, by teacher-forced decoding over the packed codes.

    With --json, one object per preset and line.
    """
    from qjl.evals.fidelity import Protocol, measure
    from qjl.presets import PRESETS, resolve

    protocol = Protocol(prefix, decode, chunks, seeds, recent)
    configs = [resolve(name) for name in preset or PRESETS]
    text = read_data(data)
    if output is not None:
        _require_writable(output)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    rows = []
    with progress("Decoding", len(configs) * protocol.tokens, quiet=json_output) as advance:
        for row in measure(network, tokenizer, configs, text, protocol, advance):
            rows.append({"model": model} | row)
            _report(rows[-1], output, json_output)
    if not json_output:
        out.print(_table(rows))


def _require_writable(path: Path) -> None:
    """Before minutes of measuring, not after."""
    try:
        path.open("a").close()
    except OSError as error:
        raise QJLError(f"cannot write to {path} ({error.strerror}): give another file.") from error


def _report(row: dict[str, Any], output: Path | None, json_output: bool) -> None:
    if json_output:
        print_json(row)
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _table(rows: list[dict[str, Any]]) -> Any:
    first = rows[0]
    table = results_table("preset", *_COLUMNS)
    for row in rows:
        table.add_row(row["preset"], *(show(row) for show in _COLUMNS.values()))
    table.caption = f"full precision: perplexity {first['ppl_full']:.2f}, retrieval {first['retrieval_full']:.2f}"
    return table


def calibrate(
    model: ModelArgument = EMBEDDED,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Measure a model once, and keep its statistics for all later runs."""
    from qjl import calibrate as calibration

    text = read_data(data)
    network, tokenizer = load(model, device, dtype)
    with waiting("Measuring"):
        path = calibration.calibrate(network, tokenizer, text)
    notes.print("Statistics are in")
    typer.echo(path)
