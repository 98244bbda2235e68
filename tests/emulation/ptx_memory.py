"""Memory of a launch: tensors at addresses of their own, with room between, and what programs have for themselves."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from emulation.ptx_numbers import raw
from emulation.ptx_text import Fault

ROOM = 40  # bits of an address within a range
OWN = 1 << (ROOM + 20)  # is added to addresses of what a thread has for itself, where they stand among global ones
PAGE = 256  # bytes within which addresses are aligned as those of the tensor
POISON = 0xFF
WORD = 4


class Buffer:
    """Bytes, seen as numbers of any size; and by which warp, before which barrier, each word was last written."""

    def __init__(self, data):
        self.data = data
        self.numbers = cache(self._numbers)
        self._writers = self._turns = None

    def _numbers(self, size):
        return self.data[: len(self.data) // size * size].view(raw(size))

    def note(self, machine, offsets, threads, size):
        """That threads have written."""
        if self._writers is None:
            words = len(self.data) // WORD + 1
            self._writers, self._turns = np.full(words, -1), np.zeros(words, np.int64)
        for word in _words(offsets, size):
            self._writers[word], self._turns[word] = machine.warps[threads], machine.turns[threads]

    def require_settled(self, machine, offsets, threads, size):
        """No barrier may be missing between threads that read, and those of other warps that wrote."""
        if self._writers is None:
            return
        for word in _words(offsets, size):
            writers, own = self._writers[word], machine.warps[threads]
            is_far = writers // machine.warps_of_program != own // machine.warps_of_program
            is_fresh = np.where(
                is_far,
                ~machine.told.is_met(writers, self._turns[word], own),
                self._turns[word] == machine.turns[threads],
            )
            races = (writers >= 0) & (writers != own) & is_fresh
            if races.any():
                raise Fault(
                    f"{machine.where(threads[races.argmax()])} reads what another warp wrote, without a barrier"
                )


def _words(offsets, size):
    return [(offsets + start) // WORD for start in range(0, size, WORD)]


@dataclass(frozen=True, eq=False)
class Range:
    """Bytes of a buffer that an argument gives, and the address of the first."""

    name: str
    address: int
    buffer: Buffer
    begin: int
    size: int


class Told:
    """What programs tell each other by atomic operations: up to which barrier others may read what a warp wrote."""

    def __init__(self, warps):
        self._released = np.full(warps, -1, np.int64)
        self._has_acquired = np.zeros(warps, bool)

    def release(self, machine, threads):
        """What their programs wrote before the last barrier, and their own warps until now."""
        for warp, turn in set(zip(machine.warps[threads].tolist(), machine.turns[threads].tolist(), strict=True)):
            first = warp // machine.warps_of_program * machine.warps_of_program
            self._released[first : first + machine.warps_of_program] = turn - 1
            self._released[warp] = turn

    def acquire(self, machine, threads):
        for warp in set(machine.warps[threads].tolist()):
            first = warp // machine.warps_of_program * machine.warps_of_program
            self._has_acquired[first : first + machine.warps_of_program] = True

    def is_met(self, writers, turns, readers):
        return (self._released[writers] >= turns) & self._has_acquired[readers]


class Global:
    """What the arguments of a launch point to."""

    def __init__(self):
        self._ranges = []
        self._buffers = {}

    def add_tensor(self, name, tensor):
        """The address of a tensor, from whose first to last element bytes may be read and written."""
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        size = (steps + 1) * tensor.itemsize if tensor.numel() else 0
        begin = tensor.storage_offset() * tensor.itemsize
        data = storage.numpy()
        return self._add(name, self._buffers.setdefault(data.ctypes.data, Buffer(data)), begin, size)

    def add_bytes(self, name, data):
        return self._add(name, Buffer(np.frombuffer(bytearray(data), np.uint8)), 0, len(data))

    def _add(self, name, buffer, begin, size):
        within = (buffer.data.ctypes.data + begin) % PAGE
        address = ((len(self._ranges) + 1) << ROOM) + within
        self._ranges.append(Range(name, address, buffer, begin, size))
        return address

    def places(self, machine, addresses, threads, size):
        """Of accesses of ``size`` bytes: which they are, the buffer, and the bytes where they begin."""
        if (addresses >= OWN).all():
            yield from machine.spaces["local"].places(machine, addresses - OWN, threads, size)
            return
        owners = addresses >> ROOM
        first = owners[0]
        if (owners == first).all():
            yield self._in_range(first, slice(None), addresses, threads, size, machine)
        else:
            for owner in np.unique(owners):
                chosen = np.flatnonzero(owners == owner)
                yield self._in_range(owner, chosen, addresses[chosen], threads[chosen], size, machine)

    def _in_range(self, owner, chosen, addresses, threads, size, machine):
        if not 1 <= owner <= len(self._ranges):
            raise Fault(f"{machine.where(threads[0])} uses address {int(addresses[0]):#x}, which no argument has")
        own = self._ranges[owner - 1]
        offsets = addresses - own.address
        outside = (offsets < 0) | (offsets > own.size - size)
        if outside.any():
            bad = int(outside.argmax())
            raise Fault(
                f"{machine.where(threads[bad])} is outside of {own.name}, {own.size} bytes:"
                f" {size} at {int(offsets[bad])}"
            )
        return chosen, own.buffer, offsets + own.begin


class Own:
    """As many bytes for each program, or for each thread."""

    def __init__(self, name, owner, size):
        self._name, self._owner, self._size = name, owner, size
        self._stride = -(-size // 16) * 16
        self._buffer = Buffer(np.full((int(owner[-1]) + 1) * self._stride, POISON, np.uint8))

    def places(self, machine, addresses, threads, size):
        outside = (addresses < 0) | (addresses > self._size - size)
        if outside.any():
            bad = int(outside.argmax())
            raise Fault(
                f"{machine.where(threads[bad])} is outside of {self._name} memory, {self._size} bytes:"
                f" {size} at {int(addresses[bad])}"
            )
        yield slice(None), self._buffer, addresses + self._owner[threads] * self._stride


def active(machine):
    """Numbers of the threads that take part."""
    return machine.everyone if machine.mask is None else np.flatnonzero(machine.mask)


def _aligned(machine, addresses, threads, size):
    wrong = addresses % size != 0
    if wrong.any():
        bad = int(wrong.argmax())
        raise Fault(f"{machine.where(threads[bad])} uses {int(addresses[bad]):#x}, not a multiple of {size}")


def load(machine, space, addresses, size, count=1, threads=None):
    """``count`` numbers of ``size`` bytes at the address of each thread, zero for those that take no part."""
    threads = active(machine) if threads is None else threads
    out = np.zeros((count, machine.threads), raw(size))
    if len(threads):
        addresses = np.broadcast_to(addresses, machine.threads)[threads]
        _aligned(machine, addresses, threads, size * count)
        for chosen, buffer, offsets in machine.spaces[space].places(machine, addresses, threads, size * count):
            buffer.require_settled(machine, offsets, threads[chosen], size * count)
            numbers, at = buffer.numbers(size), offsets // size
            for i in range(count):
                out[i, threads[chosen]] = numbers[at + i]
    return out


def store(machine, space, addresses, numbers, threads=None):
    """Numbers of each thread, one after another; of two threads at one address the later one's stay."""
    threads = active(machine) if threads is None else threads
    size, count = numbers[0].itemsize, len(numbers)
    if len(threads):
        addresses = np.broadcast_to(addresses, machine.threads)[threads]
        _aligned(machine, addresses, threads, size * count)
        for chosen, buffer, offsets in machine.spaces[space].places(machine, addresses, threads, size * count):
            held, at = buffer.numbers(size), offsets // size
            for i, number in enumerate(numbers):
                held[at + i] = np.broadcast_to(number, machine.threads)[threads[chosen]]
            buffer.note(machine, offsets, threads[chosen], size * count)


def update(machine, space, addresses, size, change):
    """Of one thread after another: ``change(thread, old)`` is what stands there then; returns what stood before."""
    threads = active(machine)
    before = np.zeros(machine.threads, raw(size))
    addresses = np.broadcast_to(addresses, machine.threads)[threads]
    _aligned(machine, addresses, threads, size)
    for chosen, buffer, offsets in machine.spaces[space].places(machine, addresses, threads, size):
        held = buffer.numbers(size)
        for thread, at in zip(threads[chosen], offsets // size, strict=True):
            before[thread] = held[at]
            held[at] = change(thread, held[at : at + 1])[0]
    return before
