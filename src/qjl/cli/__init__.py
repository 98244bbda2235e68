"""The ``qjl`` command: one file per group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

import qjl
from qjl.cli import cache, calibrate, generate, plan, serve
from qjl.cli.common import EXAMPLES, Commands

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait make a busy machine several times slower
}


class _WithTheLab(Commands):
    """Also finds the commands of the lab, which is imported only when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_of_the_lab()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or _of_the_lab().get(cmd_name)


@functools.cache
def _of_the_lab() -> Mapping[str, Any]:
    """The one door from the library to the lab, which imports the library and is not imported by it."""
    group: Any = typer.main.get_command(importlib.import_module("qjl.lab.cli").app)
    return group.commands


app = typer.Typer(
    cls=_WithTheLab,
    help="A key-value cache in 2 to 4 true bits per number, on real language models.",
    epilog=EXAMPLES.format("qjl demo"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
prompt_caches = typer.Typer(
    cls=Commands,
    help="Prompts that are processed once and kept as files.",
    epilog=EXAMPLES.format("qjl cache build manual.txt -o manual.qjl"),
    no_args_is_help=True,
)
app.add_typer(prompt_caches, name="cache")

for group, command, example in (
    (app, generate.generate, 'qjl generate "The moon is" --max-new-tokens 40'),
    (app, generate.chat, "qjl chat --preset b3"),
    (app, serve.serve, "qjl serve smollm2 --preset b3 --port 8000"),
    (app, plan.presets, "qjl presets --head-dim 64"),
    (app, plan.plan, "qjl plan smollm2 --memory 2G --context 8192"),
    (app, calibrate.calibrate, "qjl calibrate smollm2 --data my-text.txt"),
    (prompt_caches, cache.build, "qjl cache build manual.txt --preset b3 -o manual.qjl"),
    (prompt_caches, cache.show, "qjl cache show manual.qjl"),
    (prompt_caches, cache.use, 'qjl cache use manual.qjl "How is it cleaned?" --max-new-tokens 40'),
):
    group.command(command.__name__, epilog=EXAMPLES.format(example))(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"qjl {qjl.__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def main() -> None:
    """Entry point of the ``qjl`` command."""
    app()
