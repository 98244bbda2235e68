"""A GPU where there is none: tensors that say they lie on one, while their numbers lie on the CPU.

Everything runs and gives its true results. Operations on tensors of several devices raise, as CUDA's do; what makes the
host wait for the device is noted with the function of qjl that asked for it, and so are new bytes on the device. What
goes on inside one operation of torch is not seen. Launches of Triton are noted, and run under its interpreter alone.
"""

import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import qjl
from qjl import ops
from qjl.ops.triton import runtime

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PROCESSORS = 2  # so few that even short contexts are split for all of them
PACKAGE = str(Path(qjl.__file__).parent)

aten = torch.ops.aten
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "repeat_interleave", "unique_consecutive",
    "_unique2", "bincount", "_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_inv_ex", "_linalg_solve_ex",
}  # fmt: skip


@dataclass(eq=False)
class Watch:
    """Where the host waited for the device, new bytes there, and the kernels of Triton.

    ``grids``: of each launch its name, its grid, and what its tensors look like; ``places``: where these lie.
    ``copies``: from the host, whether what was copied is pinned.
    """

    waits: list[str] = field(default_factory=list)
    nbytes: int = 0
    copies: list[bool] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    grids: list[tuple] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)


_watches = []
_pinned = {}  # places of the host's memory that is, and what keeps it there


@contextmanager
def watched():
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """A torch without CUDA cannot do some methods for a CUDA device: those are done here."""
        kwargs = kwargs or {}
        if func in _METHODS:
            return _METHODS[func](*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _operation(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device come from no other tensor there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(kind not in _KNOWN for kind in types):
            return NotImplemented  # of another subclass, which knows better
        if OnGpu in types or kwargs.get("device") is not None:
            return _operation(func, args, kwargs)
        return func(*args, **kwargs)


_KNOWN = {torch.Tensor, torch.nn.Parameter, OnGpu}


def on_gpu(tree):
    return tree_map(lambda x: OnGpu(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGpu) else x, tree)


def on_host(tree):
    return tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, tree)


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _operation(func, args, kwargs):
    given = _tensors((args, kwargs))
    goes_to_gpu = _goes_to_gpu(func, args, kwargs, given)
    if func in (aten._to_copy.default, aten.copy_.default):
        is_in_place = func is aten.copy_.default
        is_free = any(args[2:]) if is_in_place else kwargs.get("non_blocking", False)
        _note_copy(args[1] if is_in_place else args[0], goes_to_gpu, is_free)
    elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        _note_indexing(args[0], args[1], args[2:3])
    else:
        _check_devices(func, given)
        if func.overloadpacket.__name__ in WAITING and any(isinstance(x, OnGpu) for x in given):
            _note_wait(func.overloadpacket.__name__)
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": CPU}
    is_pinned = kwargs.get("pin_memory")
    result = func(*on_host(args), **on_host(kwargs | {"pin_memory": False} if is_pinned else kwargs))
    if is_pinned:
        _pinned[result.data_ptr()] = result
    return _on_gpu_again(result, given) if goes_to_gpu else result


def _goes_to_gpu(func, args, kwargs, given):
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == GPU.type
    return isinstance(args[0], OnGpu) if func is aten.copy_.default else any(isinstance(x, OnGpu) for x in given)


def _on_gpu_again(result, given):
    """With new bytes counted; what an operation in place returns is the tensor that it was given."""
    held = {id(x.held): x for x in given if isinstance(x, OnGpu)}
    storages = {x.held.untyped_storage().data_ptr() for x in held.values()}
    fresh = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(result)}
    for watch in _watches:
        watch.nbytes += sum(nbytes for place, nbytes in fresh.items() if place not in storages)
    return tree_map(lambda x: held.get(id(x), OnGpu(x)) if isinstance(x, torch.Tensor) else x, result)


def _check_devices(what, given):
    """A number of no dimension may lie on the host: it goes along with the launch."""
    is_mixed = any(isinstance(x, OnGpu) for x in given) and any(not isinstance(x, OnGpu) and x.dim() for x in given)
    if is_mixed:
        raise RuntimeError(f"{what} was given tensors of several devices: {[(x.device, list(x.shape)) for x in given]}")


# Where the host waits


def _note_wait(why):
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    where = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "elsewhere"
    for watch in _watches:
        watch.waits.append(f"{where}: {why}")


def _note_copy(source, goes_to_gpu, is_free):
    """One to the device need not be waited for; one back has to be."""
    if isinstance(source, OnGpu) and not goes_to_gpu:
        _note_wait("a copy to the host")
    if not isinstance(source, OnGpu) and goes_to_gpu and source.dim():
        for watch in _watches:
            watch.copies.append(source.untyped_storage().data_ptr() in _pinned)
        if not is_free:
            _note_wait("a copy to the device")


def _note_indexing(indexed, index, values=()):
    indices = _tensors(index)
    if not isinstance(indexed, OnGpu):
        if any(isinstance(x, OnGpu) for x in (*indices, *_tensors(values))):
            raise RuntimeError("a tensor on the host was indexed by, or given, one on the device.")
        return
    for x in indices:
        if x.dtype in (torch.bool, torch.uint8):
            _note_wait("true ones are counted")
    if any(isinstance(x, list) for x in (index if isinstance(index, tuple) else (index,))) and not indices:
        _note_wait("a list of indices")
    if any(not isinstance(x, OnGpu) and x.dim() for x in (*indices, *_tensors(values))):
        _note_wait("a copy to the device")


def _get_item(x, index):
    _note_indexing(x, index)
    result = on_host(x)[on_host(index)]
    return _on_gpu_again(result, _tensors((x, index))) if isinstance(x, OnGpu) else result


def _set_item(x, index, value):
    _note_indexing(x, index, (value,))
    on_host(x)[on_host(index)] = on_host(value)


def _to_list(x):
    _note_wait("tolist")
    return x.held.tolist()


def _nonzero(x, **kwargs):
    _note_wait("nonzero")
    return on_gpu(x.held.nonzero(**kwargs))


_METHODS = {
    torch.Tensor.__getitem__: _get_item,
    torch.Tensor.__setitem__: _set_item,
    torch.Tensor.tolist: _to_list,
    torch.Tensor.nonzero: _nonzero,
    torch.Tensor.copy_: lambda x, source, non_blocking=False: aten.copy_.default(x, source, non_blocking),
    torch.Tensor.contiguous: lambda x: x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format),
    torch.Tensor.__invert__: lambda x: x.bitwise_not(),
    torch.Tensor.__int__: lambda x: int(x.item()),
    torch.Tensor.__float__: lambda x: float(x.item()),
    torch.Tensor.__index__: lambda x: int(x.item()),
    torch.Tensor.__repr__: lambda x, **kwargs: f"OnGpu({x.held!r})",
    torch.Tensor.data_ptr: lambda x: x.held.data_ptr(),
    torch.Tensor.untyped_storage: lambda x: x.held.untyped_storage(),
}


class _Event:
    """The device is a step behind: an event of the step that is watched has not happened, all others have."""

    def __init__(self, device):
        self.device, self._recorded_in = device, []

    def record(self):
        self._recorded_in = [*_watches]

    def synchronize(self):
        if any(watch is one for watch in _watches for one in self._recorded_in):
            _note_wait("an event")


# The device and its kernels


@contextmanager
def pretended_gpu(monkeypatch):
    """Within, tensors can be made on, or moved to, ``GPU``."""
    before = torch._C._only_lift_cpu_tensors()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "_lazy_init", lambda: None)
        patched.setattr(torch.cuda, "_exchange_device", lambda index: index)
        patched.setattr(torch.cuda, "_maybe_exchange_device", lambda index: index)
        patched.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=PROCESSORS)
        )
        patched.setattr(torch, "Event", _Event)
        patched.setattr(runtime, "is_usable", lambda: True)
        _catch_launches(patched)
        caches = ops._automatic_on_gpu, runtime.processors
        for cache in caches:
            cache.cache_clear()
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with _Factories():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
            _pinned.clear()
            for cache in caches:
                cache.cache_clear()


def _catch_launches(patched):
    if runtime.is_interpreted():
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def interpret(executor, *args, **kwargs):
            _note_launch(executor.fn.__name__, args, executor.grid)
            run(executor, *on_host(args), **kwargs)

        patched.setattr(GridExecutor, "__call__", interpret)
    else:
        from triton.runtime.jit import JITFunction

        def note(kernel, *args, grid, **kwargs):
            _note_launch(kernel.__name__, args, grid)

        patched.setattr(JITFunction, "run", note)


def _note_launch(name, args, grid):
    tensors = _tensors(args)
    if not all(isinstance(x, OnGpu) for x in tensors):
        raise RuntimeError(f"the kernel {name} was given a tensor of the host.")
    looks = tuple((tuple(x.shape), x.stride(), x.dtype) for x in tensors)
    for watch in _watches:
        watch.launches.append(name)
        watch.grids.append((name, grid, looks))
        watch.places.append([x.data_ptr() for x in tensors])
