"""A model of one quarter of a GPU's multiprocessor, which replays a kernel's main loop: a prediction, never calibrated.

Each warp issues its instructions in order, as the assembler's stall counts and scoreboards tell, and as units are free.
Loads of four bytes are taken for look-ups that lie in L1, all others for streams from memory; no lane is taken to be
switched off, and asynchronous copies arrive in time. All four quarters do the same, so that the memory pipe, which they
share, is busy four times as long. What these guesses leave open is given as three predictions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qjl.errors import QJLError
from qjl.lab.bench.static_counts import Instruction

QUARTERS = 4
PASSES = 6  # of the loop, that are timed
WARP = 32
BARRIER = 25  # cycles
L1 = 35
QUEUE = 64  # cycles of work that may wait for the memory pipe
REGISTERS = 65536  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that each block loses
SHARE = 0.9  # of its bandwidth that a kernel reaches
MEMORY = "memory"
_BYTES = re.compile(r"\.(128|64|[US]8|[US]16)(?:\.|$)")
_MATRICES = re.compile(r"MT?88\.(\d)")
_WIDTHS = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True)
class Gpu:
    """A GPU of one compute capability, as datasheets have it.

    - ``processors``: multiprocessors, at ``ghz``; ``gbs``: of memory, GB/s.
    - ``shared_kib``, ``warps``, ``blocks``: what a multiprocessor holds at most.
    - ``busy``: for how many cycles an instruction of a warp takes the units of a quarter, by kind.
    - ``unknown``: why the model does not know its machine code.
    """

    name: str
    processors: int
    gbs: float
    ghz: float
    shared_kib: int
    warps: int
    blocks: int
    busy: Mapping[str, int] = field(default_factory=dict)
    unknown: str = ""

    @property
    def bytes_per_cycle(self) -> float:
        """Of one multiprocessor, where all read."""
        return self.gbs / self.ghz / self.processors

    def cycles_to_read(self, nbytes: float) -> float:
        """Cycles of one multiprocessor, at the share of its bandwidth that kernels reach."""
        return nbytes / self.bytes_per_cycle / SHARE

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at once, of so many warps, registers of a thread and bytes."""
        of_a_warp = -(-registers // 8) * 8 * WARP
        limits = (
            self.blocks,
            self.warps // warps,
            REGISTERS // of_a_warp // QUARTERS * QUARTERS // warps,
            self.shared_kib * 1024 // (shared + RESERVED),
        )
        return max(1, min(limits))


GPUS = {
    80: Gpu("A100", 108, 2039, 1.41, 164, 64, 32, {"FMA": 2, "MMA": 8, "FP64": 4}),
    89: Gpu("L40S", 142, 864, 2.52, 100, 48, 24, {"FMA": 1, "MMA": 16, "FP64": 64}),
    90: Gpu("H100", 132, 3350, 1.7, 228, 64, 32, {"FMA": 1, "MMA": 8, "FP64": 2}),
    100: Gpu(
        *("B200", 148, 8000, 1.85, 228, 64, 32),
        unknown="The machine code of 10.0 has units and ways to issue that the model does not know.",
    ),
}


def gpu(capability: int) -> Gpu:
    """The one of a compute capability, 90 for 9.0.

    Raises:
        QJLError: if none is known.
    """
    if capability not in GPUS:
        raise QJLError(f"no GPU of capability {capability} is known: choose from {', '.join(map(str, GPUS))}.")
    return GPUS[capability]


@dataclass(frozen=True)
class MemoryGuess:
    """What is guessed: 128-byte wavefronts of a look-up by all lanes, and cycles until memory answers."""

    wavefronts: float
    latency: float


GUESSES = {"opt": MemoryGuess(2.0, 300), "mid": MemoryGuess(3.6, 500), "pes": MemoryGuess(4.5, 800)}


def quarter(blocks: int, warps: int) -> int:
    """Warps of the fullest quarter, where so many blocks of ``warps`` share a multiprocessor."""
    return math.ceil(blocks * warps / QUARTERS)


def why_unknown(loop: Sequence[Instruction], of: Gpu) -> str:
    """In a sentence, what keeps the model from replaying the loop; empty if nothing does."""
    if not of.unknown and any("GMMA" in one.op for one in loop):
        return "The loop multiplies by groups of warps (wgmma), which the model does not know."
    return of.unknown


def cycles(loop: Sequence[Instruction], warps: int, of: Gpu, memory: MemoryGuess) -> float:
    """Predicted cycles of one pass of all ``warps`` of a quarter, the same each.

    Warps begin apart, so that they do not stand at the same barriers; time counts once all have passed.
    """
    costs, units = _costs(of), _Units()
    steps = [_Step.of(one, costs, memory) for one in loop]
    running = [_Warp(steps, start=97.0 * number) for number in range(warps)]
    now = _replay(running, units, 0, 1)
    for warp in running:
        warp.ends.clear()
    _replay(running, units, now, PASSES + 1)
    return sum((warp.ends[-1] - warp.ends[0]) / (len(warp.ends) - 1) for warp in running) / warps


def _replay(running: Sequence[_Warp], units: _Units, now: float, passes: int) -> float:
    """From ``now`` until each warp has ended so many; returns when that is. Warps take turns."""
    turn = 0
    while min(len(warp.ends) for warp in running) < passes:
        order = [*running[turn:], *running[:turn]]
        ready = next((warp for warp in order if warp.ready(units) <= now), None)
        if ready is None:
            now = max(now + 1, min(warp.ready(units) for warp in running))
            continue
        turn = (running.index(ready) + 1) % len(running)
        ready.issue(units, now)
        now += 1
    return now


@dataclass(frozen=True)
class _Cost:
    """The units an instruction takes, how long they are busy with it, and cycles until its result is there."""

    unit: str
    busy: float
    latency: float


def _costs(of: Gpu) -> dict[str, _Cost]:
    """By kind, but for what moves bytes of the instruction's own width."""
    all_multiply_integers = of.busy["FMA"] > 1  # else half of the lanes do, and the others go on
    return {
        "ALU": _Cost("ALU", 2, 0),
        "FMA": _Cost("FMA", of.busy["FMA"], 0),
        "HALF": _Cost("FMA", 1, 0),
        "IMAD": _Cost("FMA" if all_multiply_integers else "IMAD", 2, 0),
        "FP64": _Cost("FP64", of.busy["FP64"], 16),
        "XU": _Cost("XU", 8, 25),
        "MMA": _Cost("MMA", of.busy["MMA"], 33),
        "SHUFFLE": _Cost(MEMORY, QUARTERS, 25),
        "CONSTANT": _Cost(MEMORY, QUARTERS, 25),
        "UNIFORM": _Cost("UNIFORM", 2, 12),
    }


@dataclass(frozen=True)
class _Step:
    """An instruction as it is replayed; ``pause``: before the warp's next one."""

    cost: _Cost
    waits: tuple[int, ...]
    sets: tuple[int, int]
    pause: int

    @classmethod
    def of(cls, one: Instruction, costs: Mapping[str, _Cost], memory: MemoryGuess) -> _Step:
        is_memory = one.kind in ("GLOBAL", "STORE", "SHARED", "SPILL")
        cost = _of_memory(one, memory) if is_memory else costs.get(one.kind, _Cost("", 0, 0))
        return cls(cost, one.waits, one.sets, BARRIER if one.kind == "BARRIER" else max(1, one.stall))

    @property
    def released(self) -> tuple[float, float]:
        """Cycles from its start until its result is there, and until its operands are read."""
        busy = self.cost.busy
        if self.cost.unit == MEMORY:
            return self.cost.latency + busy, 8 + busy
        return self.cost.latency + (busy if self.cost.unit == "XU" else 0), 6


class _Units:
    """Until when the units of a quarter are busy."""

    def __init__(self) -> None:
        self._free: dict[str, float] = {}

    def accept(self, cost: _Cost) -> float:
        """From when on they take another instruction."""
        if not cost.busy:
            return 0
        return self._free.get(cost.unit, 0) - (QUEUE if cost.unit == MEMORY else 0)

    def take(self, cost: _Cost, now: float) -> float:
        """When they begin with it."""
        if not cost.busy:
            return now
        start = max(now, self._free.get(cost.unit, 0))
        self._free[cost.unit] = start + cost.busy
        return start


class _Warp:
    """A warp that goes around the loop; ``ends``: when each pass was over."""

    def __init__(self, steps: Sequence[_Step], start: float) -> None:
        self._steps, self._at, self._next = steps, 0, start
        self._boards = [0.0] * 8
        self.ends: list[float] = []

    def ready(self, units: _Units) -> float:
        """When its next instruction may be issued."""
        step = self._steps[self._at]
        latest = max(self._next, units.accept(step.cost))
        for board in step.waits:
            latest = max(latest, self._boards[board])
        return latest

    def issue(self, units: _Units, now: float) -> None:
        step = self._steps[self._at]
        start = units.take(step.cost, now)
        for board, after in zip(step.sets, step.released, strict=True):
            self._boards[board] = max(self._boards[board], start + after)
        self._next = now + step.pause
        self._at += 1
        if self._at == len(self._steps):
            self._at = 0
            self.ends.append(now)


def _of_memory(one: Instruction, memory: MemoryGuess) -> _Cost:
    if one.kind == "GLOBAL" and one.op == "LDG.E":
        busy = QUARTERS * memory.wavefronts
        return _Cost(MEMORY, busy, L1 + busy)
    busy = QUARTERS * max(1, width(one) * WARP / 128)
    latency = {"GLOBAL": memory.latency, "STORE": 20, "SPILL": L1}.get(one.kind, 25 if one.op[:2] == "LD" else 15)
    return _Cost(MEMORY, busy, latency)


def width(one: Instruction) -> int:
    """Bytes of a lane."""
    if matrices := _MATRICES.search(one.op):
        return 4 * int(matrices[1])
    found = _BYTES.search(one.op)
    return _WIDTHS[found[1]] if found else 4
