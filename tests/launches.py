"""Kernels of Triton that ops would launch, recorded where there is no GPU and compiled for any."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

WARP = 32


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with its arguments, and how many programs of it there are."""

    kernel: JITFunction
    args: tuple
    kwargs: dict
    grid: tuple | Callable

    @property
    def name(self):
        return self.kernel.__name__

    def compiled(self, capability):
        """As a GPU of that compute capability would get it."""
        target = GPUTarget("cuda", capability, WARP)
        backend = make_backend(target)
        bound, specialization, options = self._bound(backend)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)

    def _bound(self, backend):
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        return bind(*self.args, **self.kwargs)

    def _by_name(self):
        return self._bound(make_backend(GPUTarget("cuda", 80, WARP)))[0]

    def arguments(self, signature):
        """Name, type and value of those that a compiled kernel takes, in its order."""
        bound = self._by_name()
        return [x for name, kind in signature.items() for x in _flat(name, kind, bound[name])]

    def sizes(self):
        """Of the grid, three."""
        grid = self.grid(self._by_name()) if callable(self.grid) else self.grid
        return (*grid, 1, 1)[:3]


def _flat(name, kind, value):
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", range(len(kind)))
        parts = zip(names, kind, value, strict=True)
        return [x for part, of_part, held in parts for x in _flat(f"{name}.{part}", of_part, held)]
    return [] if kind == "constexpr" else [(name, kind, value)]


@contextmanager
def recorded(monkeypatch):
    """The launches made within, none of which runs."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs, grid))

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", record)
        yield launches
