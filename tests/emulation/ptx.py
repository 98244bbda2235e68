"""PTX of compiled kernels, run on a CPU: what the compiler makes of a kernel, where there is no GPU.

All threads of several programs go step by step together: registers are arrays over threads. Where branches part them,
those that are furthest behind go first, and wait where all must meet. Memory is that of the tensors, and every access
is checked. Copies of ``cp.async`` arrive no sooner than they are waited for, and what a warp writes is read by others
after a barrier alone, by other programs after an atomic operation that releases it and one that acquires it. What would
go wrong where a warp writes too early, over what others have yet to read, does not show.
"""

from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from emulation import ptx_access, ptx_arithmetic, ptx_warps
from emulation.ptx_memory import Global, Own, Told
from emulation.ptx_steps import Operands, Step
from emulation.ptx_text import WARP, Fault, Unknown, parsed
from qjl.lab.bench.launches import Launch

MOST_THREADS = 4096  # that go together
MAKERS = ptx_access.MAKERS | ptx_arithmetic.MAKERS | ptx_warps.MAKERS
MOST_BLOCKS = 200_000  # that are entered: a program that waits for another one that goes with it never ends
AXES = "xyz"
FLOATS = {"fp32": np.float32, "fp64": np.float64}


class Program:
    """An entry of PTX with the steps of its blocks."""

    def __init__(self, ptx):
        self.entry = parsed(ptx)
        self.numbers = {name: number for number, name in enumerate(self.entry.registers)}
        self.blocks = [[self._step(statement) for statement in block.statements] for block in self.entry.blocks]
        self.jumps = [self._jump(block.jump) for block in self.entry.blocks]

    def _step(self, statement):
        make = MAKERS.get(statement.opcode)
        try:
            if make is None:
                raise Unknown(f"instruction {statement.opcode}")
            operands = Operands(statement, self.entry, self.numbers)
            run = make(operands)
        except Unknown as unknown:
            raise Unknown(f"{statement.place}: {unknown} is not emulated: {statement.text}") from None
        return Step(run, tuple(operands.writes), self._guard(statement), statement)

    def _guard(self, statement):
        return statement.guard and (self.numbers[statement.guard[0]], statement.guard[1])

    def _jump(self, statement):
        """Where to, and whether: a guard or None."""
        if statement is None:
            return None
        if statement.opcode == "bra":
            return self.entry.labels[statement.operands[0]], self._guard(statement)
        return len(self.blocks), self._guard(statement)


program_of = lru_cache(maxsize=64)(Program)


class Machine:
    """Some programs of a grid, ``places [programs, 3]``, with all their threads."""

    def __init__(self, program, places, grid, parameters, memory, constants, shared, told):
        self.program, self.entry, self.parameters = program, program.entry, parameters
        per_program = self.entry.threads
        self.threads = len(places) * per_program
        self.everyone = np.arange(self.threads)
        self._places, self._owner = places, self.everyone // per_program
        self.spaces = {
            "global": memory,
            "shared": Own("shared", self._owner, shared),
            "local": Own("local", self.everyone, self.entry.local_bytes),
        }
        self.registers = [np.zeros(1, kind) for kind in self.entry.registers.values()]
        self._set_special(grid, constants)
        self.mask = None
        self.warps_of_program = per_program // WARP
        number = np.ravel_multi_index(places.T, grid, order="F")
        self.warps = number[self._owner] * self.warps_of_program + self.everyone % per_program // WARP
        self.turns = np.zeros(self.threads, np.int64)  # between barriers
        self.told = told
        self.copies, self.committed = [], np.zeros(self.threads, np.int64)
        self._at = np.zeros(self.threads, np.int64)

    def _set_special(self, grid, constants):
        thread = (self.everyone % self.entry.threads).astype(np.uint32)
        special = {"%tid.x": thread, "%ntid.x": self.entry.threads, "%laneid": thread % 32, "%warpid": thread // 32}
        for axis, name in enumerate(AXES):
            special[f"%ctaid.{name}"] = self._places[self._owner, axis]
            special[f"%nctaid.{name}"] = grid[axis]
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        for name, number in (special | constants).items():
            if name in self.program.numbers:
                kind = self.entry.registers[name]
                self.registers[self.program.numbers[name]] = np.atleast_1d(np.asarray(number)).astype(kind)

    def where(self, thread):
        """What a message says of a thread."""
        return f"thread {thread % self.entry.threads} of program {tuple(self._places[self._owner[thread]].tolist())}"

    def run(self):
        """Until all threads have left."""
        with np.errstate(all="ignore"):
            for _ in range(MOST_BLOCKS):
                block = self._next()
                if block is None:
                    return
                here = self._ready(block)
                mask = None if here.all() else here
                for step in self.program.blocks[block]:
                    self._run_step(step, mask)
                self._leave(block, here)
        raise Fault(f"{self.entry.name} does not end")

    def _next(self):
        """The first block that threads can enter."""
        end = len(self.program.blocks)
        first = self._at.min()
        if first == end:
            return None
        if self._ready(first).any():
            return first
        others = (block for block in np.unique(self._at)[1:] if block < end and self._ready(block).any())
        return next(others, None) or self._stuck(first)

    def _ready(self, block):
        """Threads that stand before a block, and need not wait for others to come there."""
        here = self._at == block
        together = self.entry.blocks[block].together
        if together == 1 or here.all():
            return here
        has_left = self._at == len(self.program.blocks)
        are_all = (here | has_left).reshape(-1, together).all(1)
        return here & are_all.repeat(together)

    def _stuck(self, block):
        statement = self.program.blocks[block][0].statement
        raise Fault(f"{statement.place}: some threads wait for others, which go elsewhere: {statement.text}")

    def _run_step(self, step, mask):
        try:
            self.mask = self._met(step.guard, mask)
            if self.mask is None:
                step.run(self)
            elif self.mask.any():
                before = [self.registers[number] for number in step.writes]
                step.run(self)
                for number, old in zip(step.writes, before, strict=True):
                    self.registers[number] = np.where(self.mask, self.registers[number], old)
        except (Fault, Unknown) as error:
            raise type(error)(f"{step.statement.place}: {error}: {step.statement.text}") from None

    def _met(self, guard, mask):
        """Those of a mask whose guard holds; None for all threads."""
        if guard is None:
            return mask
        held = self.registers[guard[0]] ^ guard[1]
        if held.all():
            return mask
        return np.broadcast_to(held, self.threads) if mask is None else held & mask

    def _leave(self, block, here):
        """For the next block, or for where a branch leads."""
        self._at[here] = block + 1
        jump = self.program.jumps[block]
        if jump is not None:
            target, guard = jump
            taken = self._met(guard, here)
            self._at[here & taken] = target


def run(launch, capability):
    """A launch over tensors on a CPU, compiled for a GPU of that compute capability."""
    compiled = launch.compiled(capability)
    program, metadata = program_of(compiled.asm["ptx"]), compiled.metadata
    grid, memory = _sizes(launch), Global()
    constants = {name: memory.add_bytes(name, data) for name, data in program.entry.arrays.items()}
    arguments = [_bits(name, kind, value, memory) for name, kind, value in _arguments(launch, compiled.src.signature)]
    for name in ("global_scratch", "profile_scratch"):
        size = getattr(metadata, f"{name}_size") * int(np.prod(grid))
        arguments.append(_address(memory.add_bytes(name, bytes(size)) if size else 0))
    names = [name for name, _ in program.entry.params]
    parameters = dict(zip(names, arguments, strict=True))
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid, order="F"), axis=1)
    together = max(1, MOST_THREADS // program.entry.threads)
    told = Told(len(places) * program.entry.threads // WARP)
    for first in range(0, len(places), together):
        some = places[first : first + together]
        Machine(program, some, grid, parameters, memory, constants, metadata.shared, told).run()


def _bound(launch):
    """Arguments by name, with defaults."""
    backend = make_backend(GPUTarget("cuda", 80, WARP))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    return bind(*launch.args, **launch.kwargs)[0]


def _sizes(launch):
    """Of the grid, three."""
    grid = launch.grid(_bound(launch)) if callable(launch.grid) else launch.grid
    return (*grid, 1, 1)[:3]


def _arguments(launch, signature):
    """Name, type and value of those that a compiled kernel takes, in its order."""
    bound = _bound(launch)
    return [x for name, kind in signature.items() for x in _flat(name, kind, bound[name])]


def _flat(name, kind, value):
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", range(len(kind)))
        parts = zip(names, kind, value, strict=True)
        return [x for part, of_part, held in parts for x in _flat(f"{name}.{part}", of_part, held)]
    return [] if kind == "constexpr" else [(name, kind, value)]


def _bits(name, kind, value, memory):
    """An argument as the driver hands it over."""
    if isinstance(value, torch.Tensor):
        return _address(memory.add_tensor(name, value))
    if kind in FLOATS:
        return np.array(value, FLOATS[kind]).tobytes()
    if kind[0] not in "iu":
        raise Unknown(f"an argument of type {kind}")
    return int(value).to_bytes(8, "little", signed=value < 0)


def _address(number):
    return number.to_bytes(8, "little")


@contextmanager
def emulated(monkeypatch, capability):
    """Kernels that are launched within run at once, over tensors on a CPU; gives the launches."""
    launches = []

    def launch(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs, grid))
        run(launches[-1], capability)

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", launch)
        yield launches
