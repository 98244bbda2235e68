"""The kinds of rows there are, in the order of the page; a new evaluation is one entry here, its type, and its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qjl.lab import rows as lab
from qjl.lab.report import quality, speed
from qjl.lab.report.groups import by_window, groups
from qjl.lab.report.parts import Part, Section
from qjl.lab.rows import Row


@dataclass(frozen=True)
class RowKind:
    """Rows of one evaluation or benchmark; ``part`` makes a part of a page from such as may be compared."""

    type: type[Row]
    title: str
    text: str
    part: Callable[[Sequence[Any]], Part]

    def section(self, rows: Sequence[Row]) -> Section:
        parts = (part for alike in groups(rows, *self.type.alike) for part in by_window(alike))
        return Section(self.type.case, self.title, self.text, tuple(map(self.part, parts)))


KINDS: dict[str, RowKind] = {
    kind.type.case: kind
    for kind in (
        RowKind(
            lab.Fidelity,
            "The frontier: quality against size",
            "How far the next token's distribution is from that of full precision, with all tokens outside the exact "
            "window read from packed codes, teacher-forced on real text.",
            quality.frontier,
        ),
        RowKind(
            lab.Distortion,
            "Distortion of scores and outputs",
            "What quantization does to the scores and to the outputs of each layer's attention, on real keys, beside "
            "what theory says.",
            quality.distortion,
        ),
        RowKind(
            lab.Perplexity,
            "Perplexity against context",
            "Half of each context is prefilled and quantized, the other half decoded over the codes.",
            quality.perplexity,
        ),
        RowKind(
            lab.Seed,
            "Seeds: how much is luck",
            "The same measurement with other random projections, and with other prompts for the statistics.",
            quality.seeds,
        ),
        RowKind(
            lab.Haystack,
            "Retrieval: needles in haystacks",
            "Something is hidden in a long text, which is quantized; the question is asked and answered over codes. "
            "Answers count by exact match.",
            quality.haystack,
        ),
        RowKind(
            lab.Problems,
            "Problems with a final answer",
            "Problems worked out step by step over the codes of the question and of all that was written, the final "
            "answer compared.",
            quality.problems,
        ),
        RowKind(
            lab.HarnessMetric,
            "Tasks of lm-evaluation-harness",
            "Log-likelihoods and answers taken over the packed codes of each context.",
            quality.harness,
        ),
        RowKind(
            lab.Decode,
            "Decoding: one token's attention",
            "One token's attention over a packed layer with cold caches, everything included, beside attention in full "
            "precision. No speed is reported of what is not right.",
            speed.decode,
        ),
        RowKind(
            lab.Scan,
            "Scanning packed keys",
            "Scores of a group of queries with all keys, tables and scales included, and nothing else of attention.",
            speed.scan,
        ),
        RowKind(
            lab.Encode,
            "Encoding a prompt",
            "A prompt's keys and values to packed codes, beside the attention of the prefill that they come from.",
            speed.encode,
        ),
        RowKind(
            lab.StaticKernel,
            "Kernels on GPUs, predicted",
            "What Triton's kernels of a decode step compile to, counted in their machine code. No GPU ran them: cycles "
            "and ratios are predictions of a model that was never calibrated.",
            speed.static,
        ),
        RowKind(
            lab.Overhead,
            "Around the kernels",
            "What Python costs beside the kernels: per layer and token, per block that is coded, per turn of a server.",
            speed.overhead,
        ),
        RowKind(
            lab.Memory,
            "Whole models: time and memory against context",
            "Every cache reads the same prompt and decodes the same number of tokens after it.",
            speed.memory,
        ),
        RowKind(
            lab.Throughput,
            "Throughput: as many sequences as fit",
            "All sequences hold the same tokens; batches grow until weights, caches and all else exceed the memory.",
            speed.throughput,
        ),
        RowKind(
            lab.Generate,
            "Whole models: a token's time beside other engines",
            "Decoding with a whole model after a prompt, beside transformers' own caches and llama.cpp.",
            speed.generate,
        ),
        RowKind(
            lab.Serving,
            "A server under load",
            "qjl serve, asked by many clients at once: each conversation has a secret of its own that is asked for, "
            "and that no other may hear.",
            speed.serving,
        ),
        RowKind(
            lab.EngineTurn,
            "vLLM: pages of codes beside its own",
            "vLLM with the plugin and without: all sequences hold the same context and decode together.",
            speed.vllm,
        ),
        RowKind(
            lab.ModelFamily,
            "Families of models",
            "A tiny random model of each family that transformers has: whether it says the same on our caches as on "
            "its own.",
            quality.model_families,
        ),
    )
}


def sections(rows: Iterable[Row]) -> list[Section]:
    """Of the page, in its order."""
    found = list(rows)
    return [kind.section(of) for name, kind in KINDS.items() if (of := [row for row in found if row.case == name])]
