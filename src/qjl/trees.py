"""Values as JSON and tensors, and back: plain values, tensors as they lie in memory, and objects of our own classes.

In place of pickle: nothing is imported and no constructor is called; an object is one of the classes that methods and
their codes are made of, and its attributes. Memory that tensors share is kept once, and shared again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from qjl.errors import QJLError
from qjl.methods import METHODS

Tree = Any  # what JSON knows
Tensors = dict[str, Tensor]
_HOMES = ("qjl.methods", "qjl.ops.recipe", "qjl.codebook", "qjl.trellis", "qjl.sketch", "qjl.rope", "qjl.packed")


def dump(value: Any, name: str = "") -> tuple[Tree, Tensors]:
    """A value as JSON, and its tensors by names that begin with ``name``; they are not copied.

    Raises:
        QJLError: if it holds an object of a class that is not one of our methods' and codes'.
    """
    dumping = _Dumping()
    return dumping.tree(value, name), dumping.tensors


def build(tree: Tree, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value again, on a device.

    Raises:
        QJLError: if the tree names a class, an attribute or a tensor that there is not.
    """
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        return _Building(on_device, device).value(tree)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        if isinstance(error, QJLError):
            raise
        raise QJLError(f"a stored value cannot be built ({type(error).__name__}): store it again.") from error


def digest(value: Any) -> str:
    """The same for equal values, wherever they lie: SHA-256 in hexadecimal digits."""
    tree, tensors = dump(value)
    sha = hashlib.sha256(json.dumps(tree).encode())
    for tensor in tensors.values():
        sha.update(raw(tensor))
    return sha.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.detach().cpu().flatten().view(torch.uint8).numpy().data


class _Dumping:
    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self._names: dict[tuple[int, torch.dtype, int], str] = {}

    def tree(self, value: Any, name: str) -> Tree:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return [self.tree(one, f"{name}.{index}") for index, one in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": self.tree(list(value), name)}
        if isinstance(value, dict):
            return {"dict": [[self.tree(key, name), self.tree(one, f"{name}.{key}")] for key, one in value.items()]}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, name)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": "of all"}
        if isinstance(value, FunctionType):
            return {"function": _path(value)}
        if isinstance(value, partial):
            return {"partial": [self.tree(part, name) for part in (value.func, value.args, value.keywords)]}
        return {"object": _path(type(value)), "attributes": self.tree(_attributes(value), name)}

    def _tensor(self, tensor: Tensor, name: str) -> list[Any]:
        """Name of the memory, and how the tensor lies in it: shape, strides and offset."""
        memory, offset = tensor, 0
        if not tensor.is_contiguous():
            memory, offset = tensor.new_empty(0).set_(tensor.untyped_storage()), int(tensor.storage_offset())
        key = (memory.data_ptr(), memory.dtype, memory.numel())
        if key not in self._names:
            self._names[key] = name.removeprefix(".")
            self.tensors[self._names[key]] = memory
        return [self._names[key], list(tensor.shape), list(tensor.stride()), offset]


class _Building:
    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.tensors = tensors
        self.device = device

    def value(self, tree: Tree) -> Any:
        if isinstance(tree, list):
            return [self.value(one) for one in tree]
        if not isinstance(tree, dict):
            return tree
        kind, content = next(iter(tree.items()))
        if kind == "object":
            return _object(content, self.value(tree["attributes"]))
        return getattr(self, f"_{kind}")(content)

    def _tuple(self, content: list[Tree]) -> tuple[Any, ...]:
        return tuple(self.value(content))

    def _dict(self, content: list[list[Tree]]) -> dict[Any, Any]:
        return {self.value(key): self.value(one) for key, one in content}

    def _tensor(self, content: list[Any]) -> Tensor:
        name, shape, strides, offset = content
        memory = self.tensors[name]
        return torch.as_strided(memory, shape, strides, memory.storage_offset() + offset)

    def _dtype(self, content: str) -> torch.dtype:
        return _of_type(getattr(torch, content), torch.dtype, content)

    def _device(self, content: str) -> torch.device:
        return self.device

    def _function(self, content: str) -> Any:
        return _of_type(_named(content), FunctionType, content)

    def _partial(self, content: list[Tree]) -> Any:
        function, arguments, keywords = (self.value(part) for part in content)
        return partial(function, *arguments, **keywords)


def _attributes(value: Any) -> dict[str, Any]:
    """Without those that are derived from the others at first use."""
    derived = {name for name in vars(value) if isinstance(getattr(type(value), name, None), cached_property)}
    return {name: one for name, one in vars(value).items() if name not in derived}


def _object(path: str, attributes: dict[str, Any]) -> Any:
    cls: type = _of_type(_named(path), type, path)
    if dataclasses.is_dataclass(cls) and attributes.keys() != {field.name for field in dataclasses.fields(cls)}:
        raise QJLError(f"a stored {path} has other attributes than this version's: store it again.")
    instance: object = object.__new__(cls)
    vars(instance).update(attributes)
    return instance


def _path(definition: Any) -> str:
    """Where a class or a function is defined, as ``_named`` finds it."""
    path = f"{definition.__module__}:{definition.__qualname__}"
    if not _is_ours(definition.__module__) or "." in definition.__qualname__:
        raise QJLError(f"{path} cannot be stored: only what methods and their codes are made of can.")
    return path


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    if not _is_ours(module) or module not in sys.modules:
        raise QJLError(f"a stored value is made of {path}, which is no part of this version: store it again.")
    definition = vars(sys.modules[module]).get(name)
    if getattr(definition, "__module__", None) != module:
        raise QJLError(f"a stored value is made of {path}, which is no part of this version: store it again.")
    return definition


def _is_ours(module: str) -> bool:
    is_home = any(module == home or module.startswith(f"{home}.") for home in _HOMES)
    return is_home or module in {method.__module__ for method in METHODS.values()}


def _of_type(value: Any, expected: type, name: str) -> Any:
    if not isinstance(value, expected):
        raise QJLError(f"a stored value takes {name} for a {expected.__name__}: store it again.")
    return value
