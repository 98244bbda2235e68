"""The measuring commands of ``qjl``: demo, report, eval and bench. `qjl.cli` shows them beside its own."""

from __future__ import annotations

import typer

from qjl.cli.common import EXAMPLES, Commands
from qjl.lab.cli import (
    bench_kernels,
    bench_models,
    bench_servers,
    demo,
    eval,
    eval_fidelity,
    eval_harness,
    eval_models,
    report,
)

app = typer.Typer(cls=Commands)
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
app.add_typer(evaluations, name="eval")
app.add_typer(benchmarks, name="bench")

for group, command, example in (
    (app, demo.demo, "qjl demo --preset b2"),
    (app, report.report, "qjl report results/ -o report.html"),
    (evaluations, eval_fidelity.fidelity, "qjl eval fidelity --preset b3 --chunks 2 --seeds 1"),
    (evaluations, eval_fidelity.frontier, "qjl eval frontier --bits 2..4 --plot frontier.svg"),
    (evaluations, eval_harness.harness, "qjl eval harness --task olmes/piqa/rc_5shot --limit 100"),
    (evaluations, eval.distortion, "qjl eval distortion --preset b3 --preset turboquant-3"),
    (evaluations, eval.perplexity, "qjl eval perplexity --preset b3 --context 1024"),
    (evaluations, eval.seeds, "qjl eval seeds --preset qjl-2 --seeds 10"),
    (evaluations, eval.retrieval, "qjl eval retrieval --preset b3 --task multikey"),
    (evaluations, eval.generate, "qjl eval generate gsm8k.test.jsonl --preset b3 --limit 50"),
    (evaluations, eval_models.models, "qjl eval models --family llama --family bloom"),
    (evaluations, eval.smoke, "qjl eval smoke"),
    (benchmarks, bench_kernels.decode, "qjl bench decode --sweep --plot decode.svg"),
    (benchmarks, bench_kernels.encode, "qjl bench encode --preset b3 --tokens 8192"),
    (benchmarks, bench_kernels.kernels, "qjl bench kernels --signs 256"),
    (benchmarks, bench_kernels.overhead, "qjl bench overhead --json"),
    (benchmarks, bench_models.generate, "qjl bench generate --tokens 8192 --against dynamic"),
    (benchmarks, bench_models.memory, "qjl bench memory --tokens 4096 --plot memory.svg"),
    (benchmarks, bench_models.throughput, "qjl bench throughput --tokens 4096 --memory 2G"),
    (benchmarks, bench_servers.serving, "qjl bench serving --preset b3 --preset full --requests 200"),
    (benchmarks, bench_servers.vllm, "qjl bench vllm --preset b3 --context 4032 --rounds 3"),
):
    group.command(command.__name__, epilog=EXAMPLES.format(example))(command)
