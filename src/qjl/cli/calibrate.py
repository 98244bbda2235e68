"""The command that measures a model once for all later runs: calibrate."""

from __future__ import annotations

from pathlib import Path

import typer

from qjl.cli.common import (
    EMBEDDED,
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    load,
    notes,
    read_data,
    waiting,
)


def calibrate(
    model: ModelArgument = EMBEDDED,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Measure a model once, and keep its statistics for all later runs."""
    path = save_statistics(model, data, device, dtype)
    notes.print("Statistics are in")
    typer.echo(path)


def save_statistics(model: str, data: Path | None, device: str = "cpu", dtype: str | None = None) -> Path:
    """Measure a model, and tell the file."""
    from qjl import calibration

    text = read_data(data)
    network, tokenizer = load(model, device, dtype)
    with waiting("Measuring"):
        return calibration.calibrate(network, tokenizer, text)
