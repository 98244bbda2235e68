"""Instructions that touch memory: loads and stores, copies that complete later, and atomic ones."""

from functools import partial

import numpy as np

from emulation.ptx_memory import active, load, store, update
from emulation.ptx_numbers import decoded, encoded, is_float, raw, size_of
from emulation.ptx_steps import Makers, compute
from emulation.ptx_text import Unknown

MAKERS = Makers()

SPACES = ("global", "shared", "local")


def _space(operands):
    names = [x.split("::")[0] for x in operands.modifiers]
    return next((x for x in names if x in SPACES), "global")


@MAKERS.of("ld")
def _load(operands):
    if operands.has("param"):
        return _parameter(operands)
    kind, space, address = _bits(operands), _space(operands), operands.address(1)
    writes = [operands.write(text, kind) for text in operands.vector(0)]
    size, as_kind = size_of(kind), decoded(kind)

    def run(machine):
        for write, numbers in zip(writes, load(machine, space, address(machine), size, len(writes)), strict=True):
            write(machine, as_kind(numbers))

    return run


def _bits(operands):
    """Signed numbers are extended as such, all others are bits."""
    kind = operands.type
    return kind if kind[0] == "s" else f"b{8 * size_of(kind)}"


def _parameter(operands):
    kind = _bits(operands)
    write, name, as_kind = operands.write(0, kind), operands.texts[1].strip("[] "), decoded(kind)

    def run(machine):
        write(machine, as_kind(np.frombuffer(machine.parameters[name], raw(size_of(kind)), 1)))

    return run


@MAKERS.of("st")
def _store(operands):
    kind, space, address = f"b{8 * size_of(operands.type)}", _space(operands), operands.address(0)
    reads = [operands.read(text, kind) for text in operands.vector(1)]
    return lambda machine: store(machine, space, address(machine), [read(machine) for read in reads])


@MAKERS.of("createpolicy")
def _policy(operands):
    """Of caches, which there are none of."""
    return compute(operands, np.zeros_like, (0, "b64"), ("0", "b64"))


# Copies to shared memory that go on while a thread computes


@MAKERS.of("cp")
def _copy(operands):
    if operands.modifiers[0] != "async" or operands.has("bulk"):
        raise Unknown("this copy")
    if operands.has("commit_group"):
        return _commit
    if operands.has("wait_group"):
        return partial(_wait, int(operands.texts[0], 0))
    if operands.has("wait_all"):
        return lambda machine: (_commit(machine), _wait(0, machine))
    if operands.has("mbarrier"):
        raise Unknown("barriers in memory")
    to, source, size = operands.address(0), operands.address(1), int(operands.texts[2], 0)
    wanted = operands.read(3, "u32") if len(operands.texts) > 3 else None
    return partial(_start_copy, to, source, size, wanted)


def _start_copy(to, source, size, wanted, machine):
    """Reads now, and leaves what to write to a wait; a thread that wants nothing writes zeros."""
    threads = active(machine)
    readers = threads
    if wanted is not None:
        counts = np.broadcast_to(wanted(machine), machine.threads)[threads]
        if not np.isin(counts, (0, size)).all():
            raise Unknown("a copy of some bytes")
        readers = threads[counts > 0]
    numbers = load(machine, "global", source(machine), 4, size // 4, readers)
    addresses = np.broadcast_to(to(machine), machine.threads).copy()
    machine.copies.append((threads, addresses, numbers, machine.committed[threads]))


def _commit(machine):
    machine.committed[active(machine)] += 1


def _wait(allowed, machine):
    """Until no more than so many groups of a thread are under way."""
    waiting = np.zeros(machine.threads, bool)
    waiting[active(machine)] = True
    left = []
    for threads, addresses, numbers, group in machine.copies:
        done = waiting[threads] & (group < machine.committed[threads] - allowed)
        store(machine, "shared", addresses, list(numbers), threads[done])
        if not done.all():
            left.append((threads[~done], addresses, numbers, group[~done]))
    machine.copies[:] = left


# Atomic ones


_CHANGES = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}
_FLOAT_CHANGES = {"min": np.fmin, "max": np.fmax}


@MAKERS.of("atom", "red")
def _atomic(operands):
    has_result = operands.statement.opcode == "atom"
    kind, first = operands.type, int(has_result)
    name = next((x for x in operands.modifiers if x in _CHANGES or x == "cas"), None)
    if name is None:
        raise Unknown("this atomic operation")
    size, decode, encode = size_of(kind), decoded(kind), encoded(kind)
    writes = [operands.write(text, f"b{8 * size}") for text in operands.vector(0)] if has_result else []
    address, space = operands.address(first), _space(operands)
    reads = [operands.read(text, kind) for text in operands.vector(first + 1)]
    new = operands.read(first + 2, kind) if name == "cas" else None
    combine = _FLOAT_CHANGES.get(name) if is_float(kind) else None
    combine = combine or _CHANGES.get(name)

    def run(machine):
        swapped = np.broadcast_to(new(machine), machine.threads) if new else None
        for i, read in enumerate(reads):
            given = np.broadcast_to(read(machine), _shape(machine, kind))

            def change(thread, old, given=given):
                own = given[..., thread : thread + 1]
                if swapped is None:
                    return encode(combine(decode(old), own))
                return encode(np.where(decode(old) == own, swapped[thread], decode(old)))

            before = update(machine, space, address(machine) + i * size, size, change)
            if has_result:
                writes[i](machine, before)
        if operands.has("release", "acq_rel"):
            machine.told.release(machine, active(machine))
        if operands.has("acquire", "acq_rel"):
            machine.told.acquire(machine, active(machine))

    return run


def _shape(machine, kind):
    return (2, machine.threads) if kind.endswith("x2") else machine.threads
