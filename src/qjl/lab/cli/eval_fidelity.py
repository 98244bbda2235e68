"""Commands that compare presets on a text: eval fidelity, eval frontier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qjl.cli.common import (
    EMBEDDED,
    BitsOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    asked,
    configuration,
    notes,
    progress,
    read_data,
)
from qjl.errors import QJLError
from qjl.lab.cli.shared import (
    ChunksOption,
    DecodeOption,
    FoundRows,
    PrefixOption,
    RecentOption,
    load,
    parse_recent,
    place,
    resolved,
)

if TYPE_CHECKING:
    from qjl.lab.evals.frontier import Frontier
    from qjl.presets import CacheConfig

_PresetsOption = Annotated[
    list[str] | None, typer.Option("--preset", "-p", help="May be given several times; all if not given.")
]
_SeedsOption = Annotated[int, typer.Option(help="Of projections, statistics and the retrieval task.")]
_RetrievalOption = Annotated[bool, typer.Option(help="Whether codes hidden in the text are asked for too.")]
_Output = Annotated[
    Path | None, typer.Option("--out", help="Append JSON lines to this file; what is there is not measured again.")
]


def fidelity(
    model: ModelOption = EMBEDDED,
    preset: _PresetsOption = None,
    bits: BitsOption = None,
    data: DataOption = None,
    prefix: PrefixOption = 512,
    decode: DecodeOption = 512,
    chunks: ChunksOption = 4,
    seeds: _SeedsOption = 3,
    recent: Annotated[int, typer.Option(min=0, help="Exact tokens at the end.")] = 32,
    retrieval: _RetrievalOption = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: _Output = None,
    json_output: JsonOption = False,
) -> None:
    """Compare presets with full precision, by teacher-forced decoding over the packed codes.

    With --json, one object per preset and line.
    """
    from qjl.lab.evals.fidelity import FidelityProtocol
    from qjl.lab.evals.frontier import Frontier
    from qjl.presets import PRESETS

    protocol = FidelityProtocol(prefix, decode, chunks, seeds, recent, retrieval)
    if bits is None:
        wanted: list[CacheConfig | float] = [*resolved(preset, PRESETS)]
    else:
        wanted = [asked(preset[0] if preset else None, bits)]
    text = read_data(data)
    found = FoundRows(output, json_output)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    configs = [configuration(one, network, tokenizer) for one in wanted]
    _measure(Frontier(model, network, tokenizer, text, protocol), configs, found, json_output)
    found.show()


def frontier(
    model: ModelOption = EMBEDDED,
    bits: Annotated[str, typer.Option(help="Range of true bits per number, keys and values averaged.")] = "1..8",
    preset: _PresetsOption = None,
    widths: Annotated[
        bool, typer.Option("--widths", help="Each method at 1, 1.5, 2, 2.5, 3, 4, 5 and 8 bits, in place of presets.")
    ] = False,
    data: DataOption = None,
    prefix: PrefixOption = 512,
    decode: DecodeOption = 512,
    chunks: ChunksOption = 4,
    seeds: _SeedsOption = 3,
    recent: RecentOption = "32",
    retrieval: _RetrievalOption = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    output: _Output = None,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against true bits: a .svg or .png file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Measure every preset (or every method at every width) in a range of true bits, and show the best at their size.

    With --json, one object per preset and line.
    """
    from qjl import models
    from qjl.lab import plots
    from qjl.lab.evals.fidelity import FidelityProtocol
    from qjl.lab.evals.frontier import Frontier, parse_bits, within
    from qjl.lab.evals.widths import every_width
    from qjl.presets import PRESETS

    protocol = FidelityProtocol(prefix, decode, chunks, seeds, parse_recent(recent), retrieval)
    interval, text = parse_bits(bits), read_data(data)
    found = FoundRows(output, json_output, plot)
    if widths and preset:
        raise QJLError("--widths chooses the presets: leave --preset out.")
    chosen = every_width() if widths else resolved(preset, PRESETS)
    bars = not json_output
    shape = models.load_config(place(model, progress=bars), progress=bars)
    presets = within(shape, chosen, interval, _tell_refusal)
    network, tokenizer = load(model, device, dtype, json_output=json_output)
    _measure(Frontier(model, network, tokenizer, text, protocol), presets, found, json_output)
    found.show(plots.frontier)


def _measure(trial: Frontier, presets: list[CacheConfig], found: FoundRows, json_output: bool) -> None:
    known = sum(trial.known(preset, found.kept) is not None for preset in presets)
    if known:
        notes.print(f"{known} of {len(presets)} presets are in {found.output} already.")
    with progress("Decoding", len(presets) * trial.protocol.tokens, quiet=json_output) as advance:
        for row in trial.measure(presets, advance, found.kept):
            found.add(row)


def _tell_refusal(name: str, error: QJLError) -> None:
    notes.print(f"Left out: {name}, for {error}", markup=False, soft_wrap=True)
