"""What all commands share: options, errors, and where output goes.

Results go to stdout; progress, notes and errors to stderr. Progress is shown to a terminal only.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from qjl.errors import QJLError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qjl.generation import Generation
    from qjl.presets import CacheConfig

EXAMPLES = "Example: [cyan]{}[/cyan]"
DEFAULT_PRESET = "b3"  # as in qjl.presets, which takes seconds to import
EMBEDDED = "smollm2"  # as in qjl.models
EXTRAS = {"matplotlib": "lab", "jinja2": "lab", "accelerate": "lab", "lm_eval": "lab", "wonderwords": "lab"}

_words: ContextVar[tuple[str, ...]] = ContextVar("words of the command line")

out = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a folder, a .gguf file, or a name on the hub.")
]
ModelArgument = Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a name on the hub.")]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", "-p", show_default=DEFAULT_PRESET, help="One of `qjl presets`, or a .json file."),
]
BitsOption = Annotated[
    float | None,
    typer.Option("--bits", help="In place of a preset: the best one for this model with so many true bits per number."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if not given.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="A UTF-8 text file; Paul Graham's essays if not given.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
SeedOption = Annotated[int, typer.Option(help="Of the random choice of tokens.")]


class Commands(TyperGroup):
    """Ends a command that the user can put right with one sentence and exit code 2."""

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if parent is None:
            _words.set(tuple(args))
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        try:
            return _asking_for_extras(super().invoke, ctx)
        except QJLError as error:
            notes.print(sentence(error), markup=False, soft_wrap=True)
            raise typer.Exit(2) from error


def _asking_for_extras(invoke: Callable[[Any], Any], ctx: Any) -> Any:
    try:
        return invoke(ctx)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise QJLError(f"{error.name} is not installed: run `pip install 'qjl[{extra}]'`.") from error


def sentence(error: QJLError) -> str:
    """The message, from its capital letter to its full stop."""
    message = str(error).rstrip(".")
    return f"Error: {message}."


def require_writable(path: Path) -> None:
    """Before minutes of work, not after; leaves no empty file behind.

    Raises:
        QJLError: if the file cannot be written.
    """
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise QJLError(f"cannot write to {path} ({error.strerror}): give another file.") from error
    if is_new:
        path.unlink()


def print_json(fields: dict[str, Any]) -> None:
    """One object on one line."""
    typer.echo(json.dumps(fields, ensure_ascii=False))


def load(
    name: str, device: str, dtype: Any, *, json_output: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, with progress for a terminal."""
    from qjl import models

    is_shown = notes.is_terminal and not json_output
    return models.load(name, device=device, dtype=dtype, progress=is_shown)


def asked(preset: str | None, bits: float | None) -> CacheConfig | float:
    """The configuration that was asked for, or the bits of one that only the model can tell.

    Raises:
        QJLError: for an unknown preset, or if both were given.
    """
    from qjl.presets import resolve

    if bits is None:
        return resolve(preset or DEFAULT_PRESET)
    if preset is not None:
        raise QJLError("--preset and --bits were both given: give one of them.")
    return bits


def configuration(
    asked: CacheConfig | float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> CacheConfig:
    """What was asked for; where that is bits, a choice for this model, explained on stderr."""
    from qjl.bit_allocation import choose
    from qjl.presets import CacheConfig

    if isinstance(asked, CacheConfig):
        return asked
    with waiting(f"Choosing a configuration of {asked:g} bits") as show:
        config = choose(model, tokenizer, asked, on_stage=show)
    notes.print(f"{config.name}: {config.summary}", style="dim", markup=False, soft_wrap=True)
    return config


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner beside ``what``; yields the function that shows another text there."""
    if not notes.is_terminal:
        yield lambda text: None
        return
    with notes.status(what) as status:
        yield status.update


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar up to ``total``; yields the function that moves it on."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=notes, transient=True, disable=quiet or not notes.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def results_table(name: str, *numbers: str) -> Table:
    """A table with a column of names and columns of numbers."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, caption_justify="left")
    table.add_column(name)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def read_data(data: Path | None) -> str:
    """The text of a file, or else the essays."""
    from qjl import corpora

    return corpora.essays() if data is None else corpora.read_text(data)


def megabytes(nbytes: int) -> str:
    """In millions of bytes, which is how models and memory are compared here."""
    return f"{nbytes / 1e6:.1f} MB"


def times(ratio: float) -> str:
    return f"{ratio:.1f}x"


def command() -> str:
    """The command line that is running."""
    return shlex.join(["qjl", *_words.get()])


def generation_fields(
    model: str, preset: str, prompt_tokens: int, generation: Generation, held: int, full: int
) -> dict[str, Any]:
    """What --json tells of a text; ``held`` and ``full`` are bytes of its cache, and at 16 bits per number."""
    return {
        "model": model,
        "preset": preset,
        "text": generation.text,
        "prompt_tokens": prompt_tokens,
        "new_tokens": generation.tokens,
        "cache_bytes": held,
        "cache_bytes_full": full,
        "compression": full / held,
        "tokens_per_second": generation.tokens_per_second,
    }


def speed(generation: Generation) -> str:
    """Tokens per second of decoding."""
    rate = generation.tokens_per_second
    return "-" if rate is None else f"{rate:.1f}"
