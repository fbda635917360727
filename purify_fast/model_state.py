"""Lists what a model holds: the attributes of its parts, and modules that PyTorch does not know."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import inspect
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._modules import left_out, slots

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
#: The cell of a variable of a closure that has no value yet.
EMPTY = CellType()
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object by name, without those that PyTorch registers and those in ``not_dependencies``."""
    kind: Any = type(value)
    named, without = getattr(value, "__dict__", {}), left_out(kind)
    if own := slots(kind):
        named = {name: getattr(value, name, EMPTY) for name in own} | named
    return [(name, named[name]) for name in sorted(named.keys() - without) if named[name] is not EMPTY]


def is_users(name: str) -> bool:
    """Return True if a module belongs neither to this package, nor to an installed package, nor to Python."""
    module = sys.modules.get(name)
    # A folder without an __init__.py has no file.
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if file is None:
        return module is None or name == "__main__"
    return _is_outside(file) and name.partition(".")[0] != "purify_fast"


@functools.cache
def _is_outside(file: str) -> bool:
    """Return True if a file belongs neither to this package, nor to an installed package, nor to Python."""
    not_users = ("<frozen ", str(Path(__file__).parent), *_LIBRARIES)
    return not (file.startswith(not_users) or "site-packages" in file or "dist-packages" in file)


def hidden_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find modules in the attributes of a model, or in lists, tuples and dicts there, that PyTorch does not know."""
    parts = dict(model.named_modules())
    registered = set(map(id, parts.values()))
    modules = [(path, *item) for path, owner in parts.items() for item in _modules(attributes(owner))]
    return [(f"{path}.{name}".lstrip("."), part) for path, name, part in modules if id(part) not in registered]


def used_modules(function: Any) -> list[tuple[str, nn.Module]]:
    """Find the modules among the variables that a function reads, or in the attributes of a callable object.

    Of a module, they are those that the forward passes of its parts read, and that are no parts of it.
    """
    if isinstance(function, nn.Module):
        parts = {id(part): getattr(part, "forward", None) for part in function.modules()}
        functions = {getattr(forward, "__func__", forward) for forward in parts.values()}
        modules = [item for forward in functions if isinstance(forward, FunctionType) for item in used_modules(forward)]
        return [(name, item) for name, item in modules if id(item) not in parts]
    if isinstance(function, functools.partial):
        bound = [*function.keywords.items(), ("args", function.args)]
        return [*_modules(bound), *used_modules(function.func)]
    if isinstance(function, MethodType):
        return list(_modules([("self", function.__self__)])) or used_modules(function.__self__)
    if not isinstance(function, FunctionType):
        return list(_modules(attributes(function)))
    read = inspect.getclosurevars(function)
    return list(_modules({**read.globals, **read.nonlocals}.items()))


def _modules(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, nn.Module]]:
    for name, value in named:
        if isinstance(value, nn.Module):
            yield name, value
        elif isinstance(value, (list, tuple, dict)):
            members = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", part) for key, part in members if isinstance(part, nn.Module))


# -- model description -------------------------------------------------------------------------------------------------

#: The dictionaries of hooks that run in a forward or a backward pass.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, *_IN_TORCH)
#: The kinds of objects that a frozen copy shares with its model.
SHARED = (type, types.ModuleType, FunctionType, types.BuiltinFunctionType, weakref.ReferenceType, *GENERATORS)
SIMPLE = frozenset(_PLAIN)


def identity_key(model: nn.Module) -> tuple[Any, list[Any], list[Tensor]]:
    """Make a key from the addresses of a model's tensors, its modes and its attributes.

    The objects and tensors whose addresses are in the key follow it: an address is unique only while its object exists.
    """
    description = _Description()
    return description.of(model), description.objects, description.tensors


class _Description:
    """Describes a value by nested tuples, with the addresses of tensors, functions and objects."""

    def __init__(self) -> None:
        self.objects = list[Any]()
        self.tensors = list[Tensor]()
        #: The numbers of the values so far, by id, and the values, which must not be freed meanwhile.
        self.seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> Any:
        kind: Any = type(value)
        # Most values pass the first test, which is the fastest.
        if kind in SIMPLE or (kind is tuple and SIMPLE.issuperset(map(type, value))) or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            return (kind.__name__, *map(self.of, value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)][0])
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, Tensor):
            if kind not in (Tensor, nn.Parameter, nn.Buffer):
                raise TypeError(f"a tensor of type {kind.__name__} does not say where its memory is")
            self.tensors.append(value)
            return (value.data_ptr(), value.shape, value.dtype, value.device)
        if isinstance(value, nn.Module):
            if (identity := getattr(kind, "known_identity", lambda part: None)(value)) is not None:
                self.objects.append(identity)
                return (id(identity), *(part.training for part in value.modules()))
            held = [item for group in ("_parameters", "_buffers", "_modules") for item in vars(value)[group].items()]
            hooks = [("a hook", hook) for group in _HOOKS for hook in getattr(value, group).values()]
            inside = [(name, self.of(part)) for name, part in (*held, *hooks, *attributes(value))]
            return (self.of(kind), value.training, *inside)
        if isinstance(value, (set, frozenset)):
            return (kind.__name__, *sorted(map(self.of, value), key=repr))
        if isinstance(value, (list, deque, dict, types.MappingProxyType)):
            # A subclass of a container may have attributes, too.
            own = self.of(getattr(value, "__dict__", None))
            items = value if isinstance(value, (list, deque)) else list(value.items())
            return (kind.__name__, own, *map(self.of, items))
        if isinstance(value, slice):
            return ("slice", value.start, value.stop, value.step)
        # Objects of this package that are not called are settings.
        ours = kind.__module__.startswith("purify_fast.") and not callable(value)
        settings = issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind)
        if ours or settings:
            return (kind.__qualname__, self.of(attributes(value)))
        self.objects.append(value)
        return id(value)
