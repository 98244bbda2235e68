"""What a kernel compiled to, read from its machine code (SASS): instructions, registers, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from triton import knobs

from qjl.errors import QJLError

SLOW_PATH = 90  # instructions that a forward branch jumps over, at most, where they are of rare cases
_LABEL = re.compile(r"^(\.L_x_\w+):")
_HELPER = re.compile(r"^\$")  # a function that the kernel calls
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_ENCODING = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\(([^)]*)\)")
_CONTROL = 41  # the lowest bit of the upper half of an encoding that tells how an instruction is issued
_KINDS = {
    "ALU": "IADD3 LOP3 SHF PRMT LEA ISETP SEL VIADD IABS IMNMX VIMNMX SGXT BMSK PLOP3 P2R R2P MOV CS2R VIADDMNMX LOP "
    "I2FP FSETP FSEL FMNMX FCHK F2FP HSET2 HSETP2 HMNMX2 VHMNMX",
    "FMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2",
    "HALF": "HADD2 HFMA2 HMUL2",
    "IMAD": "IMAD",
    "FP64": "DADD DMUL DFMA DSETP",
    "XU": "MUFU I2F F2I F2F FRND POPC BREV FLO",
    "MMA": "HMMA IMMA QMMA HGMMA IGMMA QGMMA",
    "GLOBAL": "LDG",
    "STORE": "STG RED ATOMG LDGSTS UBLKCP UTMALDG",
    "SHARED": "LDS LDSM STS STSM ATOMS",
    "SPILL": "LDL STL",
    "SHUFFLE": "SHFL",
    "CONSTANT": "LDC LDCU",
    "UNIFORM": "R2UR S2UR VOTEU",
    "BARRIER": "BAR",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction, ``control`` the 17 bits by which the assembler tells when it may be issued."""

    predicate: str
    op: str
    operands: str
    control: int

    @property
    def kind(self) -> str:
        """Which units it takes; CONTROL for those that take none."""
        base = self.op.partition(".")[0]
        return _KIND_OF.get(base) or ("UNIFORM" if base.startswith("U") else "CONTROL")

    @property
    def target(self) -> str:
        """The label that it branches to, if it is a branch."""
        found = _TARGET.search(self.operands) if self.op.startswith("BRA") else None
        return found[1] if found else ""

    @property
    def stall(self) -> int:
        """Cycles before the warp's next instruction."""
        return self.control & 15

    @property
    def sets(self) -> tuple[int, int]:
        """Scoreboards that are released when its result is there, and when its operands are read; 7 for none."""
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def waits(self) -> tuple[int, ...]:
        """Scoreboards that must be released before."""
        return tuple(board for board in range(6) if self.control >> 11 + board & 1)


def _holds(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether another loop, of instructions from the first to the last, begins later and ends no later."""
    return loop[0] < other[0] and other[1] <= loop[1]


@dataclass(frozen=True, eq=False)
class Listing:
    """A kernel's instructions without the functions it calls; ``spilled_bytes``: of local memory that a thread has."""

    instructions: Sequence[Instruction]
    labels: dict[str, int]
    registers: int
    spilled_bytes: int

    @classmethod
    def of(cls, text: str, kernel: str) -> Listing:
        """Of what nvdisasm prints with encodings.

        Raises:
            QJLError: if it is not told how many registers the kernel has.
        """
        instructions, labels = _body(text.partition(f".text.{kernel}:")[2])
        return cls(instructions, labels, _attribute(text, "REGCOUNT", kernel), _attribute(text, "FRAME_SIZE", kernel))

    @cached_property
    def loop(self) -> tuple[Instruction, ...]:
        """The main loop as it mostly runs, nothing where there is none.

        It is the longest of those that hold no other one. Short stretches that a condition jumps over are slow paths,
        as of sines, and are left out.
        """
        loops = [(start, at) for at, start in self._branches() if start < at]
        innermost = [own for own in loops if not any(_holds(own, other) for other in loops)]
        if not innermost:
            return ()
        at, end = max(innermost, key=lambda loop: loop[1] - loop[0])
        path = []
        while at <= end:
            path.append(self.instructions[at])
            at = self._next(at, end)
        return tuple(path)

    @property
    def counts(self) -> dict[str, int]:
        """Instructions of the main loop by kind, most first."""
        return dict(Counter(one.kind for one in self.loop).most_common())

    def _branches(self) -> list[tuple[int, int]]:
        """Places of branches, and where they lead."""
        found = ((at, self.labels.get(one.target)) for at, one in enumerate(self.instructions) if one.target)
        return [(at, start) for at, start in found if start is not None]

    def _next(self, at: int, end: int) -> int:
        one = self.instructions[at]
        to = self.labels.get(one.target, -1) if one.predicate else -1
        return to if at < to <= min(end + 1, at + SLOW_PATH) else at + 1


def listing(cubin: bytes, kernel: str) -> Listing:
    """A compiled kernel, taken apart by Triton's own nvdisasm.

    Raises:
        QJLError: if that cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-hex", str(file)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise QJLError(f"nvdisasm cannot read {kernel} ({run.stderr.strip()}): install another Triton.")
    return Listing.of(run.stdout, kernel)


def _body(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and the place of each label among them; encodings are of two lines."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if _HELPER.match(line) or line.lstrip().startswith(".section"):
            break
        encoding = _ENCODING.search(line)
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif one := _INSTRUCTION.search(line):
            instructions.append(Instruction((one[1] or "").strip(), one[2], one[3].strip(), 0))
        elif encoding and instructions:
            last = instructions[-1]
            control = int(encoding[1], 16) >> _CONTROL & 0x1FFFF
            instructions[-1] = Instruction(last.predicate, last.op, last.operands, control)
    return instructions, labels


def _attribute(text: str, name: str, kernel: str) -> int:
    """A number that the file's information gives for the kernel."""
    for part in text.split("//----- nvinfo : ")[1:]:
        found = re.search(rf"index@\({re.escape(kernel)}\)\s.*?\.word\s+0x([0-9a-f]+)", part, re.DOTALL)
        if part.startswith(f"EIATTR_{name}") and found:
            return int(found[1], 16)
    raise QJLError(f"the code of {kernel} does not tell its {name}: install another Triton.")
