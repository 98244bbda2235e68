"""Memory whose neighbours must not be touched: one byte too far ends the process."""

import ctypes
import mmap

import pytest
import torch

PAGE = mmap.PAGESIZE
NO_ACCESS = 0
POISON = 255  # NaN in any float, the largest unsigned integer


class Guarded:
    """Makes tensors whose first or last byte lies at the edge of memory that may be touched."""

    def __init__(self, edge):
        self.edge = edge

    def empty(self, *shape, dtype=torch.float32, **_):
        size = torch.Size(shape[0] if isinstance(shape[0], tuple | list) else shape)
        nbytes = size.numel() * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(size, dtype=dtype)
        room = -(-nbytes // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)
        _forbid(memory, 0)
        _forbid(memory, PAGE + room)
        start = PAGE if self.edge == "first" else PAGE + room - nbytes
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
        return raw.fill_(POISON).view(dtype).view(size)

    def copy(self, x):
        return self.empty(x.shape, dtype=x.dtype).copy_(x)


def _forbid(memory, offset):
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), NO_ACCESS) == 0


@pytest.fixture
def compiled(backend):
    """Every instruction set, as ``backend`` selects them."""
    if backend == "reference":
        pytest.skip("only kernels touch raw memory")


@pytest.fixture(params=["first", "last"])
def guarded(request, monkeypatch):
    """Copies a tensor to guarded memory; what the ops allocate for their results lies in such memory too."""
    memory = Guarded(request.param)
    monkeypatch.setattr(torch, "empty", memory.empty)
    return memory.copy
