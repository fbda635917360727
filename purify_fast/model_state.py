"""Lists what a model holds: the attributes of its parts, and modules that PyTorch does not know."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

#: The attributes that every ``nn.Module`` has, and those that PyTorch adds to a module that it compiled or traced.
BARE = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
#: Those of a module that `torch.fx` has traced.
TRACED = frozenset({"_graph", "_tracer_cls", "meta"})
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
#: What may hold a module that PyTorch does not know.
CONTAINERS = (nn.Module, list, tuple, dict)
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


@functools.lru_cache(maxsize=4096)
def slots(kind: type) -> list[str]:
    """The names of the attributes that the objects of a class keep outside of their dictionary."""
    members = [item for base in kind.__mro__ for item in vars(base).items()]
    return [name for name, of in members if isinstance(of, MemberDescriptorType) and not name.startswith("__")]


@functools.lru_cache(maxsize=4096)
def left_out(kind: type) -> frozenset[str]:
    """The names of the attributes of a class's objects that do not count."""
    named = frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))
    named |= TRACED if issubclass(kind, fx.GraphModule) else frozenset()
    return named | BARE if issubclass(kind, nn.Module) else named


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


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, like `nn.Module.modules` in less time."""
    parts, known = [model], {id(model)}
    for part in parts:
        for child in part._modules.values():
            if child is not None and id(child) not in known:
                known.add(id(child))
                parts.append(child)
    return parts


def may_hide_modules(parts: Iterable[nn.Module]) -> bool:
    """Return True if a part has an attribute in which a module may be that PyTorch does not know."""
    for part in parts:
        kind: Any = type(part)
        if slots(kind):
            return True
        without = left_out(kind)
        for name, value in vars(part).items():
            if isinstance(value, CONTAINERS) and name not in without:
                return True
    return False


def hidden_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find modules in the attributes of a model, or in lists, tuples and dicts there, that PyTorch does not know."""
    parts = dict(model.named_modules())
    known = set(map(id, parts.values()))
    found = [(path, *item) for path, whole in parts.items() for item in _modules(attributes(whole))]
    return [(f"{path}.{name}".lstrip("."), part) for path, name, part in found if id(part) not in known]


def used_modules(function: Any) -> list[tuple[str, nn.Module]]:
    """Find the modules among the variables that a function reads, or in the attributes of a callable object.

    Of a module, they are those that the forward passes of its parts read, and that are no parts of it.
    """
    if isinstance(function, nn.Module):
        parts = {id(part): getattr(part, "forward", None) for part in function.modules()}
        functions = {getattr(forward, "__func__", forward) for forward in parts.values()}
        found = [one for forward in functions if isinstance(forward, FunctionType) for one in used_modules(forward)]
        return [(name, one) for name, one in found if id(one) not in parts]
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
