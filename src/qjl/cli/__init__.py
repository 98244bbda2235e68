"""The ``qjl`` command: one file per group of commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import qjl
from qjl.cli import (
    benching,
    caching,
    demonstrating,
    evaluating,
    harnessing,
    loading,
    measuring,
    planning,
    racing,
    reporting,
    serving,
    sweeping,
    writing,
)
from qjl.cli.common import EXAMPLES, Commands

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait make a busy machine several times slower
}

app = typer.Typer(
    cls=Commands,
    help="A key-value cache in 2 to 4 true bits per number, on real language models.",
    epilog=EXAMPLES.format("qjl demo"),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluations = typer.Typer(
    cls=Commands,
    help="Measure a preset on a model.",
    epilog=EXAMPLES.format("qjl eval fidelity --preset b3 --preset b2"),
    no_args_is_help=True,
)

benchmarks = typer.Typer(
    cls=Commands,
    help="Time this machine: correctness first, then everything compared in turn.",
    epilog=EXAMPLES.format("qjl bench decode --preset b3 --tokens 32768 --head-dim 128 --json"),
    no_args_is_help=True,
)

prompt_caches = typer.Typer(
    cls=Commands,
    help="Prompts that are processed once and kept as files.",
    epilog=EXAMPLES.format("qjl cache build manual.txt -o manual.qjl"),
    no_args_is_help=True,
)

app.command("demo", epilog=EXAMPLES.format("qjl demo --preset b2"))(demonstrating.demo)
app.command("generate", epilog=EXAMPLES.format('qjl generate "The moon is" --max-new-tokens 40'))(writing.generate)
app.command("chat", epilog=EXAMPLES.format("qjl chat --preset b3"))(writing.chat)
app.command("serve", epilog=EXAMPLES.format("qjl serve smollm2 --preset b3 --port 8000"))(serving.serve)
app.command("presets", epilog=EXAMPLES.format("qjl presets --head-dim 64"))(planning.presets)
app.command("plan", epilog=EXAMPLES.format("qjl plan smollm2 --memory 2G --context 8192"))(planning.plan)
app.command("calibrate", epilog=EXAMPLES.format("qjl calibrate smollm2 --data my-text.txt"))(measuring.calibrate)
app.command("report", epilog=EXAMPLES.format("qjl report results/ -o report.html"))(reporting.report)
evaluations.command("fidelity", epilog=EXAMPLES.format("qjl eval fidelity --preset b3 --chunks 2 --seeds 1"))(
    measuring.fidelity
)
evaluations.command("frontier", epilog=EXAMPLES.format("qjl eval frontier --bits 2..4 --plot frontier.svg"))(
    measuring.frontier
)
evaluations.command("harness", epilog=EXAMPLES.format("qjl eval harness --task olmes/piqa/rc_5shot --limit 100"))(
    harnessing.harness
)
evaluations.command("distortion", epilog=EXAMPLES.format("qjl eval distortion --preset b3 --preset turboquant-3"))(
    evaluating.distortion
)
evaluations.command("perplexity", epilog=EXAMPLES.format("qjl eval perplexity --preset b3 --context 1024"))(
    evaluating.perplexity
)
evaluations.command("seeds", epilog=EXAMPLES.format("qjl eval seeds --preset qjl-2 --seeds 10"))(evaluating.seeds)
evaluations.command("retrieval", epilog=EXAMPLES.format("qjl eval retrieval --preset b3 --task multikey"))(
    evaluating.retrieval
)
evaluations.command("generate", epilog=EXAMPLES.format("qjl eval generate gsm8k.test.jsonl --preset b3 --limit 50"))(
    evaluating.generate
)
evaluations.command("models", epilog=EXAMPLES.format("qjl eval models --family llama --family bloom"))(sweeping.models)
evaluations.command("smoke", epilog=EXAMPLES.format("qjl eval smoke"))(evaluating.smoke)
app.add_typer(evaluations, name="eval")
benchmarks.command("decode", epilog=EXAMPLES.format("qjl bench decode --sweep --plot decode.svg"))(benching.decode)
benchmarks.command("encode", epilog=EXAMPLES.format("qjl bench encode --preset b3 --tokens 8192"))(benching.encode)
benchmarks.command("kernels", epilog=EXAMPLES.format("qjl bench kernels --signs 256"))(benching.kernels)
benchmarks.command("overhead", epilog=EXAMPLES.format("qjl bench overhead --json"))(benching.overhead)
benchmarks.command("generate", epilog=EXAMPLES.format("qjl bench generate --tokens 8192 --against dynamic"))(
    racing.generate
)
benchmarks.command("memory", epilog=EXAMPLES.format("qjl bench memory --tokens 4096 --plot memory.svg"))(racing.memory)
benchmarks.command("throughput", epilog=EXAMPLES.format("qjl bench throughput --tokens 4096 --memory 2G"))(
    racing.throughput
)
benchmarks.command("serving", epilog=EXAMPLES.format("qjl bench serving --preset b3 --preset full --requests 200"))(
    loading.serving
)
benchmarks.command("vllm", epilog=EXAMPLES.format("qjl bench vllm --preset b3 --context 4032 --rounds 3"))(loading.vllm)
app.add_typer(benchmarks, name="bench")
prompt_caches.command("build", epilog=EXAMPLES.format("qjl cache build manual.txt --preset b3 -o manual.qjl"))(
    caching.build
)
prompt_caches.command("show", epilog=EXAMPLES.format("qjl cache show manual.qjl"))(caching.show)
prompt_caches.command(
    "use", epilog=EXAMPLES.format('qjl cache use manual.qjl "How is it cleaned?" --max-new-tokens 40')
)(caching.use)
app.add_typer(prompt_caches, name="cache")


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
