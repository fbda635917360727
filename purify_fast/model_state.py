"""Lists what a model holds, and makes a key from addresses in memory, which tells whether the model has changed."""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CellType, FunctionType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

#: The attributes that every ``nn.Module`` has, and those that PyTorch adds to a module that it compiled or traced.
BARE = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
#: Those of a module that `torch.fx` has traced.
TRACED = frozenset({"_graph", "_tracer_cls", "meta"})
#: The dictionaries of hooks that run in a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, *_IN_TORCH)
#: The classes whose objects are settings.
NAMESPACES = (SimpleNamespace, argparse.Namespace)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
#: The kinds of objects that a frozen copy shares with its model.
SHARED = (type, types.ModuleType, FunctionType, types.BuiltinFunctionType, weakref.ReferenceType, *GENERATORS)
#: The cell of a variable of a closure that has no value yet.
EMPTY = CellType()
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
SIMPLE = frozenset(PLAIN)
Inside = Callable[[Any], Any]


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object by name, without those that PyTorch registers and those in ``not_dependencies``."""
    kind: Any = type(value)
    named = {name: getattr(value, name, EMPTY) for name in _slots(kind)} | getattr(value, "__dict__", {})
    return sorted(item for item in named.items() if item[0] not in left_out(kind) and item[1] is not EMPTY)


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> list[str]:
    """The names of the attributes that the objects of a class keep outside of their dictionary."""
    members = [item for base in kind.__mro__ for item in vars(base).items()]
    return [name for name, of in members if isinstance(of, MemberDescriptorType) and not name.startswith("__")]


@functools.lru_cache(maxsize=4096)
def left_out(kind: type) -> frozenset[str]:
    """The names of the attributes of a class's objects that do not count."""
    named = frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))
    named |= TRACED if issubclass(kind, fx.GraphModule) else frozenset()
    return named | BARE if issubclass(kind, nn.Module) else named


class Description:
    """Describes a value by nested tuples. ``leaf`` describes tensors, functions and objects.

    ``hooks`` and ``modes``: whether hooks of modules, and their modes and those of their noise, are described.
    """

    def __init__(self, leaf: Callable[[Any, Inside], Any], *, hooks: bool = True, modes: bool = True):
        self.leaf, self.hooks, self.modes = leaf, hooks, modes
        #: The values so far, and their numbers by id. An id is unique only while its object exists.
        self.values: list[Any] = []
        self.seen: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        # Most values pass the first test, which is the fastest.
        if kind in SIMPLE or (kind is tuple and SIMPLE.issuperset(map(type, value))) or isinstance(value, PLAIN):
            return value
        if isinstance(value, tuple):
            return (kind.__name__, *map(self.of, value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)])
        self.seen[id(value)] = len(self.values)
        self.values.append(value)
        if isinstance(value, nn.Module):
            held = [item for group in ("_parameters", "_buffers", "_modules") for item in vars(value)[group].items()]
            groups = HOOKS if self.hooks else ()
            hooks = [("a hook", hook) for group in groups for hook in getattr(value, group).values()]
            own = attributes(value)
            if not self.modes:
                own = [(name, part) for name, part in own if name not in getattr(kind, "noise_modes", ())]
            inside = [(name, self.of(part)) for name, part in (*held, *hooks, *own)]
            return (self.of(kind), value.training and self.modes, *inside)
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
        if ours or issubclass(kind, NAMESPACES) or dataclasses.is_dataclass(kind):
            return (kind.__qualname__, self.of(attributes(value)))
        return self.leaf(value, self.of)


def identity_key(model: nn.Module) -> tuple[Any, list[Any], list[Tensor]]:
    """Make a key from the addresses of a model's tensors, its modes and its attributes."""
    objects: list[Any] = []
    tensors: list[Tensor] = []

    def leaf(value: Any, inside: Inside) -> Any:
        if not isinstance(value, Tensor):
            objects.append(value)
            return id(value)
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise TypeError(f"a tensor of type {type(value).__name__} does not say where its memory is")
        tensors.append(value)
        return (value.data_ptr(), value.shape, value.dtype, value.device)

    return Description(leaf).of(model), objects, tensors


def structure_key(model: nn.Module, *, hooks: bool = True, modes: bool = True) -> tuple[Any, list[Any], list[Tensor]]:
    """Describe a model without the values of its tensors, and return the objects and the tensors in the description.

    Two models with equal descriptions differ in the values of these tensors only. An object that cannot be described is
    equal to itself alone, as long as it is kept alive.
    """
    objects: list[Any] = []
    tensors: list[Tensor] = []

    def leaf(value: Any, inside: Inside) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            strided = value.layout == torch.strided
            return type(value), value.shape, value.dtype, value.device, value.stride() if strided else value.layout
        if not isinstance(value, SHARED):
            # Describe what a deep copy is made from. Some objects of C cannot be taken apart.
            with contextlib.suppress(Exception):
                made_from = value.__reduce_ex__(4)
                if not isinstance(made_from, str):
                    return inside(tuple(list(one) if isinstance(one, Iterator) else one for one in made_from))
        objects.append(value)
        return id(value)

    return Description(leaf, hooks=hooks, modes=modes).of(model), objects, tensors


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
    named = [
        (f"{path}.{name}".lstrip("."), part)
        for path, whole in model.named_modules()
        for name, part in attributes(whole)
    ]
    known = set(map(id, model.modules()))
    return [(name, part) for name, part in _modules(named) if id(part) not in known]


def used_modules(function: Any) -> list[tuple[str, nn.Module]]:
    """Find the modules among the variables that a function reads, or in the attributes of a callable object."""
    if isinstance(function, functools.partial):
        given = [*function.keywords.items(), ("args", function.args)]
        return [*_modules(given), *used_modules(function.func)]
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
