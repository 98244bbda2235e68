"""Kernels of Triton that ops would launch, recorded where there is no GPU and compiled for any."""

from contextlib import contextmanager
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

WARP = 32


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with its arguments."""

    kernel: JITFunction
    args: tuple
    kwargs: dict

    @property
    def name(self):
        return self.kernel.__name__

    def compiled(self, capability):
        """As a GPU of that compute capability would get it."""
        target = GPUTarget("cuda", capability, WARP)
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


@contextmanager
def recorded(monkeypatch):
    """The launches made within, none of which runs."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append(Launch(kernel, args, kwargs))

    with monkeypatch.context() as patched:
        patched.setattr(JITFunction, "run", record)
        yield launches
