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
from typing import Any, NamedTuple

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
#: The kinds of which equal values are the same.
_EXACT = frozenset({bool, int, str, bytes, type(None)})
_CONTAINERS = (list, tuple, set, frozenset, dict, deque, types.MappingProxyType)


class Description(NamedTuple):
    """All that modules hold.

    Attributes:
        key: a value that can be hashed. It is equal if the modules hold the same, except the values of tensors. It has
            addresses, and an address is unique only while its object exists.
        items: all that the modules hold, each object before those inside of it.
        objects: the objects whose addresses are in the key.
        tensors: the tensors, whose addresses are in the key too.
        unknown: what may change without another key; an empty text if nothing may.
    """

    key: tuple[Any, ...]
    items: list[Any]
    objects: list[Any]
    tensors: list[Tensor]
    unknown: str


#: How `describe` looks at an object of a class.
_PLAINLY, _TENSOR, _MODULE, _ITEMS, _MEMBERS, _ADDRESS, _OBJECT = range(7)


@functools.lru_cache(maxsize=4096)
def _nature(kind: Any) -> int:
    """How `describe` looks at the objects of a class."""
    if issubclass(kind, (*_PLAIN, slice)):
        return _PLAINLY
    if issubclass(kind, (Tensor, nn.Module)):
        return _TENSOR if issubclass(kind, Tensor) else _MODULE
    if issubclass(kind, (dict, types.MappingProxyType)):
        return _ITEMS
    return _MEMBERS if issubclass(kind, _CONTAINERS) else _ADDRESS if issubclass(kind, SHARED) else _OBJECT


def describe(*modules: nn.Module, modes: bool = True) -> Description:
    """Describe all that modules hold, in their attributes, hooks, containers and objects.

    Without ``modes``, it does not count which mode they are in, nor the noise modes of a defence.
    """
    key, items, objects, tensors, unknown = list[Any](), list[Any](modules), list[Any](), list[Tensor](), ""
    seen = dict[int, int]()
    # Each reading of a model runs this loop, so it must be fast.
    for item in items:
        kind: Any = type(item)
        nature = _nature(kind)
        if nature == _PLAINLY or (kind is tuple and SIMPLE.issuperset(map(type, item))):
            # A NaN is not equal to itself, 0.0 is equal to -0.0, and (1, 2) to (True, 2.0), but their texts tell.
            key.append((kind, item if kind in _EXACT else repr(item)))
            continue
        number = len(seen)
        if seen.setdefault(id(item), number) != number:
            key.append(seen[id(item)])
        elif nature == _TENSOR:
            tensors.append(item)
            if kind in (Tensor, nn.Parameter, nn.Buffer) and item.layout == torch.strided:
                key.append((item.data_ptr(), item.shape, item.stride(), item.dtype, item.device))
            else:
                key.append(id(item))
                unknown = f"a tensor of type {kind.__name__} does not say where its memory is"
        elif nature in (_ITEMS, _MEMBERS):
            key.append((kind, len(item)))
            items += item
            if nature == _ITEMS:
                items += item.values()
            # A subclass of a container may have attributes, too.
            items.append(getattr(item, "__dict__", None))
        elif nature == _MODULE:
            if (identity := getattr(kind, "known_identity", lambda part: None)(item)) is not None:
                objects.append(identity)
                key.append((id(identity), *(part.training for part in item.modules())))
                continue
            state = dict(attributes(item))
            for name in () if modes else getattr(kind, "noise_modes", ()):
                state.pop(name, None)
            own = vars(item)
            state |= {name: own[name] for name in ("_parameters", "_buffers", "_modules") if own[name]}
            state |= {name: tuple(own[name].values()) for name in _HOOKS if own.get(name)}
            key.append((kind, modes and item.training, *state))
            items += state.values()
        else:
            # Objects of this package that are not called are settings: others with the same values are equal.
            ours = kind.__module__.startswith("purify_fast.") and not callable(item)
            settings = ours or issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind)
            if not settings:
                objects.append(item)
            state = dict(attributes(item)) if nature == _OBJECT else {}
            key.append((kind if settings else id(item), *state))
            items += state.values()
    return Description(tuple(key), items, objects, tensors, unknown)
