"""From statements to steps: what an instruction does to a machine, put together once for each statement."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emulation.ptx_numbers import decoded, encoded, literal, raw, size_of
from emulation.ptx_text import SPECIAL, Statement, Unknown, elements, unsigned


@dataclass(eq=False)
class Step:
    """One instruction: ``run(machine)``, and the registers that it writes."""

    run: Callable
    writes: tuple[int, ...]
    guard: tuple[int, bool] | None
    statement: Statement


class Makers(dict):
    """What makes the steps of an opcode: ``make(operands) -> run``."""

    def of(self, *opcodes):
        """Marks what makes those of these opcodes."""

        def mark(make):
            self.update(dict.fromkeys(opcodes, make))
            return make

        return mark


class Operands:
    """Of one statement, as functions that read and write registers of a machine."""

    def __init__(self, statement, entry, numbers):
        self.statement, self._entry, self._numbers = statement, entry, numbers
        self.modifiers, self.type = statement.modifiers, statement.modifiers[-1] if statement.modifiers else ""
        self.texts = statement.operands
        self.writes = []

    def has(self, *modifiers):
        return any(x in self.modifiers for x in modifiers)

    def number(self, name):
        """Of a register; special ones are 32 bits wide, addresses of constants 64."""
        if name not in self._numbers:
            if name in self._entry.arrays:
                kind = unsigned(64)
            elif name.startswith(SPECIAL) or name in ("%laneid", "%warpid"):
                kind = unsigned(32)
            else:
                raise Unknown(f"operand {name}")
            self._numbers[name] = len(self._numbers)
            self._entry.registers[name] = kind
        return self._numbers[name]

    def bits(self, text, size):
        """Raw bits of ``size`` bytes; one number where all threads have the same."""
        kind = {0: "pred"}.get(size, f"b{8 * size}")
        constant = np.zeros(1, raw(size)) if text in self._entry.symbols else literal(text, kind)
        if constant is not None:
            return lambda machine: constant
        number = self.number(text)
        held = self._entry.registers[text]
        if not size or held.itemsize == size:
            return lambda machine: machine.registers[number]
        return lambda machine: machine.registers[number].astype(raw(size))

    def read(self, place, kind):
        """A function of the machine: what an operand (its place, or its text) holds, as numbers of a type."""
        text = self.texts[place] if isinstance(place, int) else place
        bits, decode = self.bits(text, 0 if kind == "pred" else size_of(kind)), decoded(kind)
        if kind == "pred" or (kind[0] in "bu" and kind[1:].isdigit()):
            return bits
        return lambda machine: decode(bits(machine))

    def write(self, place, kind):
        """A function of the machine and numbers of a type; a register that is wider gets them extended."""
        text = self.texts[place] if isinstance(place, int) else place
        if text == "_":
            return lambda machine, number: None
        number, encode = self.number(text), encoded(kind)
        self.writes.append(number)
        held = self._entry.registers[text]
        if kind == "pred" or held.itemsize == size_of(kind):
            return _writer(number, encode)
        signed = kind[0] == "s"
        between = np.dtype(f"i{held.itemsize}") if signed else held
        return _writer(number, lambda value: encode(value).view(_of(kind, signed)).astype(between).view(held))

    def address(self, place):
        """Int64 addresses of ``[register + offset]``."""
        base, *offsets = self.texts[place].strip("[] \t").replace("+-", "+ -").split("+")
        base, offset = base.strip(), sum(int(x.replace(" ", ""), 0) for x in offsets)
        if base in self._entry.symbols:
            fixed = np.array([offset], np.int64)
            return lambda machine: fixed
        number = self.number(base)

        def address(machine):
            register = machine.registers[number]
            there = register.astype(np.int64) + offset
            return there & 0xFFFFFFFF if register.itemsize == 4 else there  # where 32 bits overflow

        return address

    def vector(self, place):
        """Texts of its elements."""
        return elements(self.texts[place])


def _of(kind, signed):
    return np.dtype(f"{'i' if signed else 'u'}{size_of(kind)}")


def _writer(number, encode):
    def write(machine, value):
        machine.registers[number] = encode(value)

    return write


def compute(operands, function, to, *sources):
    """A step that writes ``function(sources)``; operands are ``(place, type)``."""
    write = operands.write(*to)
    reads = [operands.read(*source) for source in sources]
    if len(reads) == 1:
        (a,) = reads
        return lambda machine: write(machine, function(a(machine)))
    if len(reads) == 2:
        a, b = reads
        return lambda machine: write(machine, function(a(machine), b(machine)))
    return lambda machine: write(machine, function(*(read(machine) for read in reads)))
