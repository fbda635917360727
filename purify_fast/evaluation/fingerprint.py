"""The fingerprint of a model: all that it holds, by value, and the code of its classes and functions.

Two models get the same fingerprint only if nothing that can be seen of them differs. A model that holds something that
cannot be compared by value, such as an open connection, has no fingerprint. A fingerprint depends on nothing that
differs from process to process: no address in memory, no order of a set, no state of a generator.

Code of libraries counts by their version. Code of the user counts for the classes and functions that a model holds, and
for what these call in their own files. Functions that they import from other files count by name: after editing those,
give another ``revision``.
"""

from __future__ import annotations

import copyreg
import functools
import json
import logging
import random
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._compiler import is_compiled
from .._tensors import digest, text_hash
from ..contents import HOOKS, PLAIN, attributes, not_dependencies, variables
from .inputs import LogitsOf

#: Values that are told apart by their text.
_PLAIN = (*PLAIN, torch.layout, torch.memory_format)
#: Types told apart by name: descriptors and functions in C, and objects on which no prediction depends.
_DESCRIPTORS = (types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType)
_MEMBERS = (types.GetSetDescriptorType, types.MemberDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NO_VALUES = (logging.Logger, logging.LoggerAdapter, type(threading.Lock()), type(threading.RLock()), types.ModuleType)
_NAMED = (*_DESCRIPTORS, *_MEMBERS, *_NO_VALUES)
#: Types with a state that no value shows.
_DRAWS = (random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)
_INCOMPARABLE = (*_DRAWS, torch.jit.ScriptModule, torch.jit.ScriptFunction)
#: Attributes of a class that it does not compute with.
_NOT_CODE = frozenset({"_abc_impl", "__annotate__", "__annotate_func__", "not_dependencies"})
#: Attributes that PyTorch adds to a module that it compiled or traced.
_ADDED = frozenset({"_compiled_call_impl", "_graph", "_tracer_cls", "meta"})
#: Packages whose code counts by their version, or by this package's own.
_LIBRARIES = {"torch", "torchvision", "numpy", "purify_fast", *sys.stdlib_module_names} - {"__main__"}
#: Variables of PyTorch that hold hooks of all modules.
_HOOKS_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")

Path = tuple[str, ...]


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash all that a module computes with: its weights, attributes, hooks and parts, and the code of its classes.

    An edited defence must not be given the rows of the defence before. Comments,
    docstrings and the place in the file do not count. Attributes count by value, private ones too: tensors and arrays
    with their contents, and modules, functions and objects that are held anywhere inside them with all that these hold.
    A class names in ``not_dependencies`` the attributes that its predictions do not depend on. The seed of a
    torch.Generator counts, its state does not.

    A generator of NumPy or of Python's ``random`` does not show its seed, and `evaluate` sets neither its seed nor its
    state: a kept row could come from other draws unnoticed. A model that holds such a generator has no fingerprint.
    Draw from PyTorch's own generator, which `evaluate` seeds, or give a revision.

    Args:
        model: the judged model.
        revision: the user's name for what the model computes. It identifies a model that cannot be compared, together
            with the model's name and weights.

    Returns:
        The hash. Without a revision, None if the model is not a module or holds something that cannot be compared.
    """
    return fingerprint_or_reason(model, revision)[0]


def fingerprint_or_reason(model: object, revision: str | None = None) -> tuple[str | None, str]:
    """The `fingerprint` of a model, or None and the reason, as the end of a sentence that begins with its name."""
    inner = model.model if isinstance(model, LogitsOf) else model
    reason = "is a function, of which no weights can be compared"
    if isinstance(inner, nn.Module):
        marks = _Marks()
        try:
            hooks = [hook for name in _HOOKS_OF_ALL for hook in getattr(nn.modules.module, name).values()]
            of_all = [marks.of(hook, ("hooks of all modules",)) for hook in hooks]
            return _hash("model", [marks.of(model, ()), *of_all]), ""
        except _CannotCompareError as error:
            reason = f"holds {error}, which cannot be compared by its value"
        except RecursionError:
            reason = "holds objects in one another, too deep to be compared"
    if revision is None:
        return None, reason
    named: Any = inner if isinstance(inner, types.FunctionType) else type(inner)
    weights = digest(*inner.parameters(), *inner.buffers()) if isinstance(inner, nn.Module) else ""
    return _hash("revision", [revision, named.__module__, named.__qualname__, weights]), ""


class _CannotCompareError(Exception):
    """An error whose message names the place and the type of a value."""

    def __init__(self, value: Any, path: Path):
        place = ".".join(path).replace(".[", "[") or "itself"
        super().__init__(f"{place} ({type(value).__qualname__})")


def _hash(kind: str, marks: Iterable[str]) -> str:
    return text_hash(json.dumps([kind, *marks])).hexdigest()


@functools.cache
def _is_library(package: str) -> bool:
    if package in _LIBRARIES:
        return True
    module = sys.modules.get(package)
    places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", ()))]
    return any("site-packages" in place or "dist-packages" in place for place in places)


def _package(value: Any) -> str:
    """The package of a class or function."""
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0]


def _name(value: Any) -> str:
    """The name of a class or function; without the file if it is the user's, since that may be run or imported."""
    package = _package(value)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    version = "" if package in _LIBRARIES else getattr(sys.modules.get(package), "__version__", "")
    return f"{package} {version}: {name}" if _is_library(package) else str(name)


class _Marks:
    """The marks of values in a fingerprint: each value is read once, and a value inside itself counts by its depth."""

    def __init__(self) -> None:
        self.marks: dict[int, str] = {}
        # Values that are being visited, with their depth.
        self.open: dict[int, int] = {}
        # The id of a value is unique only while the value exists.
        self.alive: list[Any] = []

    def of(self, value: Any, path: Path) -> str:
        """The mark of a value, which is found along the path; raises _CannotCompareError if it has none."""
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if id(value) in self.open:
            return f"number {self.open[id(value)]} around this"
        if id(value) not in self.marks:
            self.alive.append(value)
            self.open[id(value)] = len(self.open)
            try:
                self.marks[id(value)] = _hash(*self._inside(value, path))
            finally:
                del self.open[id(value)]
        return self.marks[id(value)]

    def _inside(self, value: Any, path: Path) -> tuple[str, Iterable[str]]:
        """The kind of a value, and the marks of its parts."""
        if isinstance(value, _INCOMPARABLE):
            raise _CannotCompareError(value, path)
        if isinstance(value, nn.Module):
            return "module", self._module(value, path)
        if isinstance(value, Tensor):
            return "tensor", self._tensor(value, path)
        if isinstance(value, type):
            return "class", self._class(value, path)
        if isinstance(value, types.MethodType):
            return "method", [self.of(value.__func__, path), self.of(value.__self__, (*path, "self"))]
        if isinstance(value, types.FunctionType):
            return "function", self._function(value, path)
        if isinstance(value, (set, frozenset)):
            return "set", [self.of(type(value), path), *sorted(self.of(part, path) for part in value)]
        if type(value) in (list, tuple, dict, types.MappingProxyType):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            return type(value).__name__, self._items(items, path)
        if isinstance(value, (types.BuiltinFunctionType, types.MethodWrapperType)):
            owner = getattr(value, "__self__", None)
            return "builtin", [_name(value), "" if isinstance(owner, types.ModuleType) else self.of(owner, path)]
        if isinstance(value, _NAMED):
            return "named", [_name(value)]
        if isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            names = ("fget", "fset", "fdel", "__func__", "func")
            return type(value).__name__, [self.of(getattr(value, name, None), path) for name in names]
        if isinstance(value, torch.Generator):
            return "generator", [str(value.device), str(value.initial_seed())]
        return "object", self._object(value, path)

    def _items(self, items: Iterable[tuple[Any, Any]], path: Path) -> Iterator[str]:
        for key, part in items:
            yield self.of(key, (*path, "a key"))
            yield self.of(part, (*path, f"[{key!r}]" if type(key) in (str, int) else "[...]"))

    def _named(self, named: Iterable[tuple[str, Any]], path: Path) -> Iterator[str]:
        """Attributes sorted by name, since the order in which an object got them does not matter."""
        for name, part in sorted(named, key=lambda pair: str(pair[0])):
            yield str(name)
            yield self.of(part, (*path, str(name)))

    def _module(self, module: nn.Module, path: Path) -> Iterator[str]:
        if is_compiled(module):
            yield self.of(module._orig_mod, path)
        else:
            yield from (self.of(type(module), path), str(module.training))
            for group in ("_parameters", "_buffers", "_modules"):
                for name, part in vars(module)[group].items():
                    yield from (group, name, self.of(part, (*path, name)))
            left_out = _ADDED | _computed_once(type(module))
            yield from self._named(((name, part) for name, part in attributes(module) if name not in left_out), path)
        for group in HOOKS:
            # A hook's number counts all hooks of the process.
            yield from (group, *(self.of(hook, (*path, "a hook")) for hook in getattr(module, group).values()))

    def _tensor(self, tensor: Tensor, path: Path) -> Iterator[str]:
        if is_traceable_wrapper_subclass(tensor):
            raise _CannotCompareError(tensor, path)
        try:
            yield digest(tensor)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise _CannotCompareError(tensor, path) from error
        if type(tensor) not in (Tensor, nn.Parameter):
            yield self.of(type(tensor), path)
            yield from self._named(vars(tensor).items(), path)

    def _class(self, kind: type, path: Path) -> Iterator[str]:
        """The marks of a user's class: its methods and attributes, and those of its bases."""
        for base in kind.__mro__:
            yield _name(base)
            if not _is_library(_package(base)):
                here = (*path, f"class {base.__qualname__}")
                code = {n: v for n, v in vars(base).items() if callable(v) or not n.startswith("__")}
                left_out = _NOT_CODE | not_dependencies(kind)
                yield from self._named(((n, v) for n, v in code.items() if n not in left_out), here)

    def _function(self, function: types.FunctionType, path: Path) -> Iterator[str]:
        yield _name(function)
        library, here = _is_library(_package(function)), (*path, f"{function.__name__}()")
        if library and _is_found_by_name(function):
            return
        yield from self._code(function.__code__, function.__doc__, here)
        yield from (self.of(default, here) for default in (function.__defaults__, function.__kwdefaults__))
        for name, part in variables(function):
            foreign = isinstance(part, (types.FunctionType, type)) and part.__module__ != function.__module__
            if name in function.__code__.co_freevars or not (library or foreign):
                yield from (name, self.of(part, (*here, name)))
            elif foreign:
                yield from (name, _name(part))
        yield from self._named(vars(function).items(), here)

    def _code(self, code: types.CodeType, doc: str | None, path: Path) -> Iterator[str]:
        """The marks of a function: its instructions, constants and names, without the docstring."""
        yield from (code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), str(code.co_names))
        for i, constant in enumerate(code.co_consts):
            if isinstance(constant, types.CodeType):
                yield from self._code(constant, None, path)
            elif i > 0 or constant is None or constant != doc:
                yield self.of(constant, path)

    def _object(self, value: Any, path: Path) -> Iterator[str]:
        """The marks of any other object: its class, its state for a copy or a pickle, and all its attributes."""
        kind = type(value)
        try:
            reduced: Any = (copyreg.dispatch_table.get(kind) or (lambda value: value.__reduce_ex__(4)))(value)
        # An object's own code may raise anything.
        except Exception as error:
            raise _CannotCompareError(value, path) from error
        if isinstance(reduced, str):
            # The name of a global; a wrapper around a function has that name too.
            reduced = reduced, getattr(value, "__wrapped__", None)
        make, arguments, state, *members = (*cast(tuple[Any, ...], reduced), None)
        yield from (self.of(part, path) for part in (kind, make, arguments))
        left_out = not_dependencies(kind) | _computed_once(kind)
        # Objects with slots have two dictionaries of state.
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict) and all(isinstance(name, str) for name in part):
                yield from self._named(((name, inner) for name, inner in part.items() if name not in left_out), path)
            else:
                yield self.of(part, path)
        # The parts are elements of a list, and entries of a dictionary.
        yield from (self.of(None if each is None else list(each), path) for each in members[:2])
        if not _is_library(_package(kind)):
            yield from self._named(((name, part) for name, part in attributes(value) if name not in left_out), path)


def _computed_once(kind: type) -> frozenset[str]:
    """Properties whose value is computed from the other attributes and kept with the object."""
    once = functools.cached_property
    return frozenset(name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, once))


def _is_found_by_name(function: types.FunctionType) -> bool:
    """Tell whether a library's function counts by its name: not a lambda, and not made by another function."""
    place: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is function
