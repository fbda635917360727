"""Two keys that tell whether a model has changed: `fingerprint` by value, and `identity_key` by addresses in memory."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import inspect
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._compiler import is_compiled
from ._tensors import digest, text_hash

#: The attributes that every ``nn.Module`` has, and those that PyTorch adds to a module that it compiled or traced.
BARE = frozenset({*vars(nn.Module()), "_compiled_call_impl", "_graph", "_tracer_cls", "meta"})
#: The dictionaries of hooks that run in a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, *_IN_TORCH)
#: The cell of a variable of a closure that has no value yet.
EMPTY = CellType()
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple(_PATHS[name] for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts"))
_SIMPLE = frozenset(_PLAIN)

Inside = Callable[[Any], Any]


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object by name, without those that PyTorch registers and those in ``not_dependencies``."""
    left_out = _left_out(type(value))  # type: ignore[arg-type]
    return sorted(item for item in getattr(value, "__dict__", {}).items() if item[0] not in left_out)


@functools.lru_cache(maxsize=4096)
def _left_out(kind: type) -> frozenset[str]:
    named = frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))
    return named | BARE if issubclass(kind, nn.Module) else named


class _Description:
    """Describes a value by nested tuples. ``leaf`` describes tensors, functions and objects."""

    def __init__(self, leaf: Callable[[Any, Inside], Any]):
        self.leaf = leaf
        #: Numbers of the values so far by id, and these values, because an id is unique only while its object exists.
        self.seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        # Most values pass the first test, which is the fastest.
        if kind in _SIMPLE or (kind is tuple and _SIMPLE.issuperset(map(type, value))) or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            return (kind.__name__, *map(self.of, value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)][0])
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, nn.Module):
            groups = [vars(value)[group] for group in ("_parameters", "_buffers", "_modules")]
            held = [item for group in groups for item in group.items()]
            hooks = [("a hook", hook) for group in HOOKS for hook in getattr(value, group).values()]
            inside = [(name, self.of(part)) for name, part in (*held, *hooks, *attributes(value))]
            return (self.of(kind), value.training, *inside)
        if isinstance(value, (set, frozenset)):
            return (kind.__name__, *sorted(map(self.of, value), key=repr))
        if isinstance(value, (list, deque)):
            return (kind.__name__, *map(self.of, value))
        if isinstance(value, (dict, types.MappingProxyType)):
            return (kind.__name__, *[(self.of(key), self.of(part)) for key, part in value.items()])
        if isinstance(value, slice):
            return ("slice", value.start, value.stop, value.step)
        # Objects of this package that are not called are settings.
        ours = kind.__module__.startswith("purify_fast.") and not callable(value)
        if ours or issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind):
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

    return _Description(leaf).of(model), objects, tensors


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash a model by value: its state (`state_hash`), its code, and the user's name for the version of the code.

    The result is None for a function or a value that cannot be compared, unless there is such a name.
    """
    try:
        if isinstance(model, nn.Module):
            state = state_hash(model)
        elif revision is None:
            return None
        else:
            named: Any = model if isinstance(model, FunctionType) else type(model)
            state = f"{named.__module__} {named.__qualname__}"
        code = _code()
    # A user's module may raise any error while its state is read.
    except Exception:
        if revision is None:
            return None
        module: Any = model
        state, code = type(module).__qualname__, []
        state += digest(*module.parameters(), *module.buffers())
    return text_hash(repr([state, code, revision])).hexdigest()


def state_hash(model: Any) -> str:
    """Hash the tensors, modes, hooks and attributes of a module by value."""
    model = model._orig_mod if is_compiled(model) else model
    # The state has what is in no attribute, such as the packed weights of quantized layers.
    return text_hash(repr(_Description(_by_value).of((model, model.state_dict(keep_vars=True))))).hexdigest()


def _by_value(value: Any, inside: Inside) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return (kind.__qualname__, digest(value))
    if isinstance(value, np.ndarray):
        return inside(value.tolist() if value.dtype.hasobject else (value.dtype.str, value.shape, value.tobytes()))
    if isinstance(value, torch.Generator):
        return (str(value.device), value.initial_seed())
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return inside((value.__func__, getattr(value, "__self__", None)))
    if isinstance(value, property):
        return inside((value.fget, value.fset))
    if isinstance(value, functools.partial):
        return inside((value.func, value.args, value.keywords))
    if isinstance(value, CodeType):
        return inside((value.co_code, value.co_names, value.co_consts))
    if isinstance(value, FunctionType):
        around = tuple(None if cell == EMPTY else cell.cell_contents for cell in value.__closure__ or ())
        return (value.__qualname__, inside((value.__code__, value.__defaults__, value.__kwdefaults__, around)))
    if isinstance(value, type):
        if issubclass(value, torch.jit.ScriptModule):
            raise TypeError(f"{value.__name__} does not show its code")
        return [(_name(base), _class_code(base, inside) if is_users(base.__module__) else ()) for base in value.__mro__]
    return (_name(kind), inside(attributes(value)) if is_users(kind.__module__) else getattr(value, "__name__", ""))


def _class_code(kind: type, inside: Inside) -> Any:
    left_out = _left_out(kind)
    parts = ((name, part) for name, part in vars(kind).items() if name not in left_out)
    return inside({name: part for name, part in parts if callable(part) or not name.startswith("__")})


def _name(kind: type) -> str:
    """The name of a class with the version of its package. A script has another module name when it is imported."""
    package = sys.modules.get(kind.__module__.partition(".")[0])
    return f"{kind.__qualname__} {getattr(package, '__version__', '')}"


def _code() -> list[Any]:
    """The hashes of the source files of the user's loaded modules, and the arguments of the user's script."""
    users = [module for name, module in list(sys.modules.items()) if is_users(name)]
    files = {Path(str(module.__file__)) for module in users if getattr(module, "__file__", None)}
    script = getattr(sys.modules["__main__"], "__file__", None) and is_users("__main__")
    return [
        sorted(text_hash(file.read_bytes().hex()).hexdigest() for file in files if file.exists()),
        sys.argv[1:] if script else [],
    ]


def is_users(name: str) -> bool:
    """Tell whether a module belongs neither to this package, nor to an installed package, nor to Python."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return module is None or name == "__main__"
    not_users = ("<frozen ", str(Path(__file__).parent), *_LIBRARIES)
    installed = file.startswith(not_users) or "site-packages" in file or "dist-packages" in file
    return not installed and name.partition(".")[0] != "purify_fast"


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
