"""What the kernels of a decode step on a GPU compile to, and how fast a model predicts them, where there is no GPU.

A step of ``BATCH`` sequences is recorded for each layer of a model's statistics, and every kernel that differs is
compiled and counted. A multiprocessor holds as many blocks as registers, shared memory and warps allow, and as the grid
has for each; it is taken to be full. What the last wave of a grid leaves idle lengthens the kernel by that share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qjl import calibration, corpora, models
from qjl.codecs import Codecs, Pair, TokenShape
from qjl.errors import QJLError
from qjl.lab import machine
from qjl.lab.bench import synthetic, warp_model
from qjl.lab.bench.launches import WARP, Launch, recorded
from qjl.lab.bench.static_counts import Listing, listing
from qjl.lab.bench.warp_model import GUESSES, Gpu
from qjl.lab.results import Row
from qjl.methods.base import Quantizer
from qjl.ops.forms import ExactPool, Pool, Rows
from qjl.ops.triton import ops as triton_ops
from qjl.packed import BLOCK, Blocks
from qjl.presets import CacheConfig
from qjl.rope import Rope
from qjl.statistics import LayerStatistics

BATCH = 8
EXACT = 128  # slots of a sequence
DTYPE = torch.bfloat16
CPU = torch.device("cpu")
SMOLLM2, SYNTHETIC = "smollm2", "synthetic"
SOURCES = (SMOLLM2, SYNTHETIC)


@dataclass(frozen=True)
class Attention:
    """Of a model: numbers of a key, KV heads, query heads of each, and the base of RoPE's frequencies."""

    head_dim: int
    kv_heads: int
    group: int
    theta: float

    @property
    def rope(self) -> Rope:
        return Rope(self.theta ** (-torch.arange(0, self.head_dim, 2) / self.head_dim))


SHAPES = {"llama-3.1-8b": Attention(128, 8, 4, 5e5), "smollm2": Attention(64, 3, 3, 1e5)}


def attention(name: str) -> Attention:
    """The shape of a model that is known by name.

    Raises:
        QJLError: for another name.
    """
    if name not in SHAPES:
        raise QJLError(f"{name!r} is no shape: choose from {', '.join(SHAPES)}.")
    return SHAPES[name]


@dataclass(frozen=True, eq=False)
class Source:
    """Statistics of the layers of a model, and what they are called."""

    name: str
    layers: Sequence[LayerStatistics]

    @classmethod
    def of(cls, name: str, shape: Attention) -> Source:
        """SmolLM2's own, stretched to a shape that is not its own, or synthetic ones of one layer.

        Raises:
            QJLError: for another name, or if SmolLM2 cannot be had.
        """
        if name not in SOURCES:
            raise QJLError(f"there are no statistics {name!r}: choose from {', '.join(SOURCES)}.")
        if name == SYNTHETIC:
            maker = synthetic.Maker(synthetic.Shape(shape.head_dim, shape.kv_heads, shape.group))
            return cls(SYNTHETIC, [maker.statistics()])
        own = _of_smollm2()
        if own[0].key_mean.shape == (shape.kv_heads, shape.head_dim):
            return cls(SMOLLM2, own)
        return cls(f"{SMOLLM2}, stretched", [stretched(layer, shape) for layer in own])


def _of_smollm2() -> list[LayerStatistics]:
    model, tokenizer = models.load(models.EMBEDDED)
    rows = calibration.rows_of(model, tokenizer, corpora.essays())
    return [layer for _, layer in sorted(calibration.model_statistics(model, rows[:1]).items())]


def stretched(layer: LayerStatistics, shape: Attention) -> LayerStatistics:
    """With each coordinate several times, side by side, and heads in turn; RoPE's pairs stay pairs.

    Copies are not correlated, so that each direction's variance stands there as often.

    Raises:
        QJLError: if ``head_dim`` is no multiple of theirs.
    """
    heads, head_dim = layer.key_mean.shape
    times, rest = divmod(shape.head_dim, head_dim)
    if rest:
        raise QJLError(f"statistics of head_dim {head_dim} cannot be stretched to {shape.head_dim}: take a multiple.")
    x = layer.of_heads(torch.arange(shape.kv_heads) % heads)
    spread, repeated = torch.eye(times), partial(torch.repeat_interleave, repeats=times, dim=1)
    return replace(
        layer,
        key_mean=repeated(x.key_mean),
        key_covariance=torch.kron(x.key_covariance, spread),
        query_moment=torch.kron(x.query_moment, spread),
        key_quantiles=repeated(x.key_quantiles),
        value_mean=repeated(x.value_mean),
        value_covariance=torch.kron(x.value_covariance, spread),
        output_moment=torch.kron(x.output_moment, spread),
        value_quantiles=repeated(x.value_quantiles),
    )


@dataclass(frozen=True, eq=False)
class Case:
    """A preset over layers of one shape: what is recorded and compiled for each capability."""

    config: CacheConfig
    shape: Attention
    source: Source
    tokens: int
    codecs: Sequence[Pair]

    @classmethod
    def of(cls, config: CacheConfig, shape: Attention, source: Source, tokens: int) -> Case:
        """With codecs fitted to each layer; of ``tokens``, 64 or more, whole blocks count."""
        layers = dict(enumerate(source.layers))
        codecs = Codecs(config, dict.fromkeys(layers, shape.rope), layers.get)
        of = TokenShape(shape.kv_heads, shape.head_dim, shape.head_dim, CPU, DTYPE)
        fitted = [codecs.of(layer, of) for layer in layers]
        return cls(config, shape, source, tokens, [pair for pair in fitted if pair is not None])

    def rows(self, capability: int) -> Iterator[Row]:
        """One for each kernel that differs, in the order of the first step that launches it.

        Raises:
            QJLError: if no GPU of this capability is known, kernels do not read the preset's codes, or there is no
                Triton that compiles.
        """
        of = warp_model.gpu(capability)
        variants: dict[str, list[tuple[int, _Step, Launch]]] = {}
        for layer, pair in enumerate(self.codecs):
            step = _Step.of(self, layer, pair)
            for launch in step.launches(of.processors):
                variants.setdefault(launch.variant(capability), []).append((layer, step, launch))
        for found in variants.values():
            _, step, launch = found[0]
            kernel = launch.compiled(capability)
            counted = _Counted(
                launch=launch,
                reads=step.reads(launch),
                bytes_of_a_token=step.nbytes,
                gpu=of,
                code=listing(kernel.asm["cubin"], launch.name),
                warps=kernel.metadata.num_warps,
                shared=kernel.metadata.shared,
            )
            yield self._head(capability, of, len({layer for layer, *_ in found})) | counted.columns(self.shape)

    def _head(self, capability: int, of: Gpu, layers: int) -> Row:
        shape = self.shape
        return {
            "case": "static",
            "preset": self.config.name,
            "capability": capability,
            "gpu": of.name,
            "head_dim": shape.head_dim,
            "kv_heads": shape.kv_heads,
            "group": shape.group,
            "batch": BATCH,
            "tokens": self.tokens,
            "statistics": self.source.name,
            "layers": layers,
            "versions": machine.versions(),
        }


@dataclass(frozen=True, eq=False)
class _Step:
    """One token of each sequence in one layer, over pools that hold nothing."""

    shape: Attention
    pool: Pool
    exact: ExactPool
    of_rows: Rows
    fresh: tuple[Tensor, Tensor]  # keys and values

    @classmethod
    def of(cls, case: Case, layer: int, codecs: Pair) -> _Step:
        shape, pages = case.shape, case.tokens // BLOCK
        forms = [codec.form for codec in codecs]
        if forms[0] is None or forms[1] is None:
            raise QJLError(f"{case.config.name} has codes that no kernel on a GPU reads: choose another preset.")
        keys, values = (_fields(quantizer, pages, shape) for quantizer in case.config.for_layer(layer))
        exact = [torch.zeros(BATCH * EXACT, shape.kv_heads, shape.head_dim, dtype=DTYPE) for _ in range(2)]
        fresh = [torch.zeros(BATCH, shape.kv_heads, 1, shape.head_dim, dtype=DTYPE) for _ in range(2)]
        pool = Pool(keys, values, forms[0], forms[1])
        return cls(shape, pool, ExactPool(*exact), _rows(pages), (fresh[0], fresh[1]))

    def launches(self, processors: int) -> list[Launch]:
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        query = torch.zeros(BATCH, heads * self.shape.group, 1, dim, dtype=DTYPE)
        with recorded(processors) as launches:
            triton_ops.append_attend(query, *self.fresh, self.pool, self.exact, self.of_rows, dim**-0.5, 0.0)
        return launches

    def reads(self, launch: Launch) -> str:
        """Which tokens the kernel walks over: codes, exact ones, or none where it is not given keys and values.

        Nor does one that is given fresh tokens, which it stores.
        """
        given = {tensor.untyped_storage().data_ptr() for tensor in launch.tensors}
        if given & {tensor.untyped_storage().data_ptr() for tensor in self.fresh}:
            return ""
        sides = {
            "codes": (self.pool.keys.values(), self.pool.values.values()),
            "exact": ([self.exact.keys], [self.exact.values]),
        }
        for name, both in sides.items():
            if all(given & {field.untyped_storage().data_ptr() for field in side} for side in both):
                return name
        return ""

    @property
    def nbytes(self) -> Mapping[str, float]:
        """Of one token of one head, by what is read."""
        pages, heads = self.of_rows.table.shape[1], self.shape.kv_heads
        packed = sum(field.nbytes for side in (self.pool.keys, self.pool.values) for field in side.values())
        return {"codes": packed / (pages * heads * BLOCK), "exact": _exact_bytes(self.shape)}


def _exact_bytes(shape: Attention) -> int:
    return 2 * shape.head_dim * DTYPE.itemsize


def _fields(quantizer: Quantizer, pages: int, shape: Attention) -> Blocks:
    fields = quantizer.layout(shape.head_dim, DTYPE).items()
    return {name: torch.zeros(pages, shape.kv_heads, *field.shape, dtype=field.dtype) for name, field in fields}


def _rows(pages: int) -> Rows:
    """All sequences have the same pages, and half of their exact slots."""
    table = torch.arange(pages, dtype=torch.int32).repeat(BATCH, 1)
    lengths, skip, counts = (torch.full((BATCH,), x, dtype=torch.int32) for x in (pages * BLOCK, 0, EXACT // 2))
    slots = torch.arange(BATCH * EXACT, dtype=torch.int32).view(BATCH, EXACT)
    return Rows(table, lengths, skip, torch.zeros(BATCH, dtype=torch.int64), slots, counts, pages * BLOCK)


@dataclass(frozen=True, eq=False)
class _Counted:
    """A compiled kernel of one GPU, with its warps and bytes of shared memory."""

    launch: Launch
    reads: str
    bytes_of_a_token: Mapping[str, float]
    gpu: Gpu
    code: Listing
    warps: int
    shared: int

    def columns(self, shape: Attention) -> Row:
        why, cycles, instructions, bandwidth = self._why(), None, None, None
        if self._walks:
            instructions = len(self.code.loop) * WARP * self.warps / self.tile
            bandwidth = self.gpu.cycles_to_read(self.bytes_of_a_token[self.reads])
            cycles = None if why else self._cycles()
        return {
            "kernel": self.launch.name,
            "reads": self.reads or None,
            "tokens_per_tile": self.tile if self._walks else None,
            "warps": self.warps,
            "registers": self.code.registers,
            "spilled_bytes": self.code.spilled_bytes,
            "shared_bytes": self.shared,
            "programs": self.programs,
            "programs_per_processor": self.resident,
            "filled": self.filled,
            "loop_instructions": self.code.counts,
            "thread_instructions_per_token_head": instructions,
            "model_cycles_per_token_head": cycles,
            "bandwidth_cycles_per_token_head": bandwidth,
            **self._ratios(cycles, bandwidth, self.gpu.cycles_to_read(_exact_bytes(shape))),
            "why": why or None,
        }

    @property
    def tile(self) -> int:
        """Tokens of a pass of the main loop."""
        return int(self.launch.arguments.get("TILE", BLOCK))

    @property
    def programs(self) -> int:
        return math.prod(self.launch.grid)

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds, of those there are."""
        most = self.gpu.resident(self.warps, self.code.registers, self.shared)
        return min(most, -(-self.programs // self.gpu.processors))

    @property
    def filled(self) -> float:
        """The share of all waves' places that the grid takes."""
        places = self.gpu.processors * self.resident
        return self.programs / (-(-self.programs // places) * places)

    @property
    def _walks(self) -> bool:
        return bool(self.reads and self.code.loop)

    def _why(self) -> str:
        """Nothing, or why no cycles are predicted."""
        return warp_model.why_unknown(self.code.loop, self.gpu) if self._walks else "It has no loop over tokens."

    def _cycles(self) -> dict[str, float]:
        """By guess."""
        warps, tokens = warp_model.quarter(self.resident, self.warps), self.resident * self.tile
        found = {name: warp_model.cycles(self.code.loop, warps, self.gpu, guess) for name, guess in GUESSES.items()}
        return {name: one / tokens for name, one in found.items()}

    def _ratios(self, cycles: Mapping[str, float] | None, bandwidth: float | None, full: float) -> Row:
        """How many times as long reading bfloat16 takes; of codes alone."""
        names = "predicted_ratio_bf16", "predicted_ratio_bf16_range"
        if cycles is None or bandwidth is None or self.reads != "codes":
            return dict.fromkeys(names)
        ratios = {name: full * self.filled / max(one, bandwidth) for name, one in cycles.items()}
        return dict(zip(names, (ratios["mid"], [ratios["pes"], ratios["opt"]]), strict=True))
