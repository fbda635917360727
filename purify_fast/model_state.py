"""The state of a model: the values inside it, the modules among them, and two keys that are the same while they are.

`children` yields the values directly inside a value, with their names: every question about what a model depends on
uses it. Two keys are made by one walk through all of them:

- `identity_key` compares the tensors and objects themselves. A captured step reads the memory that its model had when
  it was captured, and may be replayed while this key is the same. Writing into that memory does not change the key: an
  optimizer's step, a refreshed inference copy, new running statistics.
- `fingerprint` compares values, for models in different processes. Two models get the same fingerprint only if nothing
  that can be seen of them differs. It depends on nothing that differs from process to process: no address in memory, no
  order of a set, no state of a generator.
"""

from __future__ import annotations

import argparse
import copyreg
import dataclasses
import dis
import enum
import functools
import inspect
import logging
import random
import sys
import threading
import tokenize
import types
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ._compiler import is_compiled, outside_graphs
from ._tensors import digest, text_hash

#: The attributes that every module has. Only the mode, the tensors, the submodules and the hooks among them count.
BARE = frozenset(vars(nn.Module()))
#: The dictionaries of hooks that run with a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Types of plain values, which contain no other values.
_NUMBERS = (bool, int, float, complex)
PLAIN = (*_NUMBERS, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_SIMPLE = frozenset(PLAIN)
_VALUES = (*PLAIN, enum.Enum)
_CALLS = (FunctionType, MethodType, functools.partial)
_GROUPS = (list, tuple, set, frozenset, deque, dict)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: Only this many members of a list or dict are searched for modules. A longer list usually holds data, not an ensemble.
_MEMBERS = 1000
#: Nested objects and lists are searched for modules down to this depth.
_DEPTH = 8

Children = Iterable[tuple[Any, Any]]

# -- the values inside a value ----------------------------------------------------------------------------------------


def children(value: Any) -> Children:
    """Yield the values directly inside a value, each with its name; a plain value has none.

    Args:
        value: a module (its tensors, hooks, modules and attributes), a list, tuple, set, deque or dict (by index or by
            key), a function (its variables and defaults), a method, a partial function, or any object (its attributes).
            A class names in ``not_dependencies`` the attributes that do not count.
    """
    if isinstance(value, nn.Module):
        return [*registered(value), *hooks(value), *attributes(value)]
    if isinstance(value, (dict, MappingProxyType)):
        return value.items()
    if isinstance(value, _GROUPS):
        return enumerate(value)
    if isinstance(value, functools.partial):
        arguments = [(f"argument {i}", argument) for i, argument in enumerate(value.args)]
        return [("func", value.func), *arguments, *value.keywords.items()]
    if isinstance(value, MethodType):
        return [("self", value.__self__), ("the method", value.__func__)]
    if isinstance(value, FunctionType):
        return [*around(value), *defaults(value), *read_globals(value)]
    return attributes(value)


def registered(module: nn.Module) -> Children:
    """The tensors and modules that PyTorch knows of."""
    return [item for group in ("_parameters", "_buffers", "_modules") for item in vars(module)[group].items()]


def hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """The functions that a module calls with a forward or a backward pass."""
    return [("a hook", hook) for group in HOOKS for hook in getattr(module, group).values()]


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object; for a module, those that PyTorch does not register."""
    left_out = _left_out(type(value))  # type: ignore[arg-type]  # mypy takes no class for hashable
    return [item for item in (getattr(value, "__dict__", None) or {}).items() if item[0] not in left_out]


@functools.lru_cache(maxsize=4096)
def _left_out(kind: type) -> frozenset[str]:
    return not_dependencies(kind) | (BARE if issubclass(kind, nn.Module) else frozenset())


def not_dependencies(kind: type) -> frozenset[str]:
    """The attributes that a class and its bases list in ``not_dependencies``."""
    return frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))


def around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables around a function that have a value already."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue


def defaults(function: FunctionType) -> Children:
    """The default values of a function's arguments."""
    by_place = [("a default", default) for default in function.__defaults__ or ()]
    return [*by_place, *(function.__kwdefaults__ or {}).items()]


def read_globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global variables that a function reads; none for PyTorch's functions."""
    known = function.__globals__
    if str(known.get("__name__")).partition(".")[0] != "torch":
        yield from ((name, known[name]) for name in _global_names(function.__code__) if name in known)


def code_and_inner(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions, lambdas and comprehensions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from code_and_inner(inner)


@functools.lru_cache(maxsize=4096)
def _global_names(code: CodeType) -> tuple[str, ...]:
    """The names of global variables that a function reads; ``co_names`` has those of attributes too."""
    read = (
        instruction.argval
        for inner in code_and_inner(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return tuple(dict.fromkeys(read))


# -- the walk ---------------------------------------------------------------------------------------------------------


class _Walk:
    """A walk through everything inside a value. Two walks have equal ``values`` only if the values walked are alike.

    Attributes:
        values: plain values, the marks that `open` gives, and names.
        path: the values that are open, each with the name of its child that is visited.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.path: list[tuple[Any, Any]] = []
        # The number of each visited value, by its id. A value that is met again counts by this number, since it matters
        # whether two places hold the same object or two equal objects.
        self._numbers: dict[int, int] = {}
        # Keep every visited value alive, since an id is unique only while its value exists.
        self._alive: list[Any] = []

    def open(self, value: Any) -> tuple[Any, Children]:
        """The mark of a value that is not plain, and what it has inside."""
        raise NotImplementedError

    def add(self, value: Any) -> None:
        """Visit a value and everything inside it."""
        kind = type(value)
        if kind in _SIMPLE or (kind is tuple and _is_simple(value)):
            self.values.append(value)
        elif id(value) in self._numbers:
            self.values.append(("seen", self._numbers[id(value)]))
        else:
            self._numbers[id(value)] = len(self._numbers)
            self._alive.append(value)
            mark, inside = self.open(value)
            inside = list(inside)
            self.values.append((mark, len(inside)))
            for name, part in inside:
                self.path.append((value, name))
                for each in (name, part):
                    # Most values are plain: skip the call for them, to save time.
                    if type(each) in _SIMPLE:
                        self.values.append(each)
                    else:
                        self.add(each)
                self.path.pop()


def _is_simple(value: tuple[Any, ...]) -> bool:
    """Tell whether a tuple contains only plain values, such as the sizes of a kernel."""
    # Use a loop, which is faster than a generator: most values of a model are such tuples.
    for part in value:  # noqa: SIM110
        if type(part) not in _SIMPLE:
            return False
    return True


# -- the key by identity ----------------------------------------------------------------------------------------------


def identity_key(model: nn.Module) -> tuple[tuple[Any, ...], list[Any], list[Tensor]]:
    """The tensors, settings and objects that ``model`` computes with now: equal values mean equal computations.

    Args:
        model: a module. The objects of this package that it holds are looked into, and so are dataclasses,
            ``types.SimpleNamespace`` and ``argparse.Namespace``. Any other object counts by its identity: what changes
            inside it is not seen. A class names in ``not_dependencies`` the attributes that its computation does not
            depend on.

    Returns:
        The values, which can be hashed; tensors count by their addresses. Then the objects that count by their
        identity: keep them as long as the values, so that no new object gets the same identity. Then the tensors, each
        once, in the order of the values.

    Raises:
        TypeError: a tensor of a special class, such as the part of a sharded weight, whose memory is elsewhere.
    """
    walk = _Identities()
    walk.add(model)
    return tuple(walk.values), walk.objects, walk.tensors


class _Identities(_Walk):
    def __init__(self) -> None:
        super().__init__()
        self.objects: list[Any] = []
        self.tensors: list[Tensor] = []

    def open(self, value: Any) -> tuple[Any, Children]:
        kind = type(value)
        if isinstance(value, Tensor):
            if kind not in _TENSORS:
                raise TypeError(
                    f"a tensor of type {kind.__name__} does not say where its memory is: only tensors, parameters and "
                    "buffers of PyTorch's own classes are allowed"
                )
            self.tensors.append(value)
            return (value.data_ptr(), value.shape, value.dtype, value.device), ()
        if isinstance(value, nn.Module) or _is_settings(kind):  # type: ignore[arg-type]  # mypy takes no class for hashable
            return (kind.__qualname__, getattr(value, "training", None)), children(value)
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return kind.__qualname__, children(value)
        if isinstance(value, _VALUES):
            return value, ()
        if isinstance(value, slice):
            # Take a slice apart, since a slice cannot be hashed before Python 3.12.
            return ("slice", value.start, value.stop, value.step), ()
        self.objects.append(value)
        return id(value), ()


@functools.lru_cache(maxsize=4096)
def _is_settings(kind: type) -> bool:
    """Tell whether objects of a class count by their attributes: this package's own, and those made to hold settings.

    An object with slots counts by its identity, because its attributes are not found here.
    """
    if issubclass(kind, type) or not kind.__dictoffset__:
        return False
    if issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind):
        return True
    return kind.__module__.startswith("purify_fast.") and not any("__call__" in vars(base) for base in kind.__mro__)


# -- the key by value -------------------------------------------------------------------------------------------------

#: Types whose values count by their name: descriptors and operators written in C, and objects on which no prediction
#: depends.
_IN_C = (types.GetSetDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NAMED = (*_IN_C, ModuleType, logging.Logger, type(threading.Lock()), type(threading.RLock()))
#: Types that wrap a function, and the attributes in which they keep the function and its object.
_AROUND = (MethodType, property, staticmethod, classmethod, functools.cached_property)
_INNER = ("__func__", "__self__", "fget", "fset", "fdel", "func")
#: Generators of random numbers that do not show their seed, and compiled scripts. Neither can be compared.
_DRAWS = (random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)
_INCOMPARABLE = (*_DRAWS, torch.jit.ScriptModule, torch.jit.ScriptFunction)
#: Attributes of a class that do not change what the class computes.
_NOT_CODE = frozenset({"_abc_impl", "__annotate__", "__annotate_func__", "not_dependencies"})
#: Attributes that PyTorch adds to a module that it compiled or traced.
_ADDED = frozenset({"_compiled_call_impl", "_graph", "_tracer_cls", "meta"})
#: Packages whose functions and classes count only by their name, without their code.
_LIBRARIES = {"torch", "torchvision", "numpy", "purify_fast", *sys.stdlib_module_names} - {"__main__"}


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash all that a module computes with: its weights, attributes, hooks and parts, and the code of its classes.

    An edited defence must not get kept rows of the earlier defence. Attributes count by value, private ones too:
    tensors and arrays with their contents, and modules, functions and objects that are held anywhere inside them with
    all that these hold. A class names in ``not_dependencies`` the attributes that its predictions do not depend on. The
    seed of a torch.Generator counts, its state does not.

    The user's functions count by their source text, with comments, and so do the methods of the user's classes and
    the functions that these read as global variables. Code that they reach in another way, such as an attribute of an
    imported module, counts by its name: after editing that, give another ``revision``. Installed packages count by
    their name and version, and PyTorch, NumPy and Python's own modules by their name alone: a kept row names PyTorch's
    release besides. A function without source text cannot be compared.

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
    inner: Any = getattr(model, "fingerprinted", model)
    reason = "is a function, whose weights cannot be compared"
    if isinstance(inner, nn.Module):
        walk = _Values()
        try:
            walk.add(model)
            return text_hash(repr(walk.values)).hexdigest(), ""
        except _CannotCompareError as error:
            reason = f"holds {error}, which cannot be compared by its value"
        except RecursionError:
            reason = "holds objects that are nested too deep to be compared"
    if revision is None:
        return None, reason
    named = inner if isinstance(inner, FunctionType) else type(inner)
    weights = digest(*inner.parameters(), *inner.buffers()) if isinstance(inner, nn.Module) else ""
    return text_hash(repr([revision, named.__module__, named.__qualname__, weights])).hexdigest(), ""


class _CannotCompareError(Exception):
    """An error whose message names the place and the type of a value."""


class _Values(_Walk):
    def open(self, value: Any) -> tuple[Any, Children]:
        kind = type(value)
        if isinstance(value, _INCOMPARABLE):
            raise self._cannot_compare(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return "module", self._module(value)
        if isinstance(value, type):
            return "class", self._class(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, (set, frozenset)):
            return "set", [("class", kind), *enumerate(sorted(self._text(part) for part in value))]
        if kind in (list, tuple, dict, MappingProxyType):
            return kind.__name__, children(value)
        if isinstance(value, _AROUND):
            return _name(value), [(name, getattr(value, name, None)) for name in _INNER]
        if isinstance(value, _NAMED):
            return _name(value), ()
        if isinstance(value, torch.Generator):
            return ("generator", str(value.device), value.initial_seed()), ()
        return "object", self._object(value)

    def _cannot_compare(self, value: Any) -> _CannotCompareError:
        steps = (f"[{name!r}]" if isinstance(whole, _GROUPS) else f".{name}" for whole, name in self.path)
        return _CannotCompareError(f"{''.join(steps).lstrip('.') or 'itself'} ({type(value).__qualname__})")

    def _text(self, value: Any) -> str:
        """A text for a value by itself, by which members of a set are sorted."""
        walk = _Values()
        walk.path = self.path
        walk.add(value)
        return repr(walk.values)

    def _tensor(self, tensor: Tensor) -> tuple[Any, Children]:
        kind = type(tensor)
        if is_traceable_wrapper_subclass(tensor):
            raise self._cannot_compare(tensor)
        try:
            mark = digest(tensor)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise self._cannot_compare(tensor) from error
        return mark, [] if kind in (Tensor, nn.Parameter) else [("class", kind), *_by_name(vars(tensor).items())]

    def _module(self, module: nn.Module) -> Children:
        if is_compiled(module):
            return [("compiled", module._orig_mod), *hooks(module)]
        kind = type(module)
        held = _by_name(attributes(module), _ADDED | _computed_once(kind))
        return [("class", kind), ("training", module.training), *registered(module), *held, *hooks(module)]

    def _class(self, kind: type) -> Children:
        """The names of a class and its bases; for the user's classes also their methods and attributes."""
        inside: list[tuple[Any, Any]] = []
        for base in kind.__mro__:
            inside.append(("base", _name(base)))
            if not _is_library(_package(base)):
                held = [
                    (name, part) for name, part in vars(base).items() if callable(part) or not name.startswith("__")
                ]
                inside += _by_name(held, _NOT_CODE | not_dependencies(kind))
        return inside

    def _function(self, function: FunctionType) -> tuple[Any, Children]:
        library = _is_library(_package(function))
        if library and _is_found_by_name(function):
            return _name(function), ()
        inside = [*around(function), *defaults(function), *_by_name(vars(function).items())]
        # The methods that Python generates for dataclasses and named tuples have no source text. They follow from the
        # fields of the class, so their name is enough.
        made = function.__code__.co_filename == "<string>" and function.__name__ in vars(object)
        if library or made:
            return _name(function), inside
        try:
            text = inspect.getsource(function.__code__)
        except (OSError, TypeError, SyntaxError, tokenize.TokenError) as error:
            raise self._cannot_compare(function) from error
        # Tell several lambdas in one line apart by their columns, which are not known before Python 3.11.
        columns = [position[2:] for position in getattr(function.__code__, "co_positions", list)()]
        mark = _name(function), text, columns if function.__name__ == "<lambda>" else None
        return mark, [*inside, *read_globals(function)]

    def _object(self, value: Any) -> Children:
        """The class of any other object, its state for a copy or a pickle, and its attributes."""
        kind = type(value)
        try:
            reduced: Any = (copyreg.dispatch_table.get(kind) or (lambda value: value.__reduce_ex__(4)))(value)
        # Catch every error, since an object's own code may raise anything.
        except Exception as error:
            raise self._cannot_compare(value) from error
        if isinstance(reduced, str):
            # A text means that the value is a global variable of this name. Add what it wraps, since a wrapper around a
            # function has the same name.
            reduced = _name(value), getattr(value, "__wrapped__", None)
        make, arguments, state, *members = (*cast(tuple[Any, ...], reduced), None)
        inside = [("class", kind), ("maker", make), ("arguments", arguments)]
        left_out = not_dependencies(kind) | _computed_once(kind)
        # The state of an object with slots is a pair of dictionaries.
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            inside += _by_name(part.items(), left_out) if isinstance(part, dict) else [("state", part)]
        # The remaining parts are the elements of a kind of list, and the entries of a kind of dictionary.
        inside += [("members", None if each is None else list(each)) for each in members[:2]]
        return inside if _is_library(_package(kind)) else [*inside, *_by_name(attributes(value), left_out)]


def _by_name(named: Children, left_out: Iterable[str] = ()) -> list[tuple[Any, Any]]:
    """Attributes sorted by name, since the order in which an object got them does not matter."""
    return sorted((item for item in named if item[0] not in left_out), key=lambda item: str(item[0]))


def _computed_once(kind: type) -> frozenset[str]:
    """Properties whose value is computed from the other attributes and kept with the object."""
    once = functools.cached_property
    return frozenset(name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, once))


@functools.cache
def _is_library(package: str) -> bool:
    if package in _LIBRARIES or package == "__main__":
        return package != "__main__"
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


def _is_found_by_name(function: FunctionType) -> bool:
    """Tell whether a library's function counts by its name: not a lambda, and not made by another function."""
    place: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is function


# -- modules among the parts ------------------------------------------------------------------------------------------


@outside_graphs
def hidden_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that a module holds without having registered them, the outermost ones, each with its place.

    ``model.modules()`` leaves them out, and so do ``eval()``, ``parameters()``, ``to()`` and ``state_dict()``. They are
    in lists, tuples, sets and dicts, in objects, in functions that are attributes and in hooks, of the model and of all
    its parts.

    Args:
        model: any module.
    """
    hidden: list[tuple[str, nn.Module]] = []
    waiting, known = deque([("", model)]), {id(part) for part in model.modules()}
    while waiting:
        outer, whole = waiting.popleft()
        for path, module in whole.named_modules():
            for name, value in (*attributes(module), *hooks(module)):
                # Skip plain values and tuples of them, such as the size of a kernel, to save time.
                if type(value) in _SIMPLE or (type(value) is tuple and _is_simple(value)):
                    continue
                place = ".".join(filter(None, (outer, path, name)))
                for inner, part in [(place, value)] if isinstance(value, nn.Module) else used_modules(value, place):
                    if id(part) not in known:
                        hidden.append((inner, part))
                        waiting.append((inner, part))
                        known.update(id(each) for each in part.modules())
    return hidden


def used_modules(value: Any, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that a value holds or uses, once each, with the name by which it uses them.

    Every value is visited once, because functions that call each other have too many paths to walk all of them.

    Args:
        value: a function, a method, a partial function, or an object, a list, tuple, set or dict with such inside.
        place: name of the value.
    """
    if not (isinstance(value, (*_CALLS, *_GROUPS)) or _is_object(value)):
        return
    seen = {id(value)}
    # Each entry is a name, a value, and how many nested objects and lists lead to the value.
    waiting = deque([(place, value, 1)])
    while waiting:
        outer, value, depth = waiting.popleft()
        for name, part in _used_parts(outer, value):
            if type(part) in _SIMPLE or isinstance(part, Tensor) or id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, nn.Module):
                yield name, part
            elif isinstance(part, _CALLS):
                waiting.append((name, part, depth))
            elif _is_object(part) or isinstance(part, _GROUPS):
                # A method uses its object, so the object is searched however deep it is, and the depth is counted from
                # there.
                inside = 1 if isinstance(value, MethodType) else depth + 1
                if inside <= _DEPTH:
                    waiting.append((name, part, inside))


def _used_parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value that it may use, by the name for the reader."""
    if isinstance(value, _GROUPS):
        yield from ((f"{place}[{name!r}]", part) for name, part in islice(children(value), _MEMBERS))
    elif not isinstance(value, FunctionType):
        yield from children(value)
    else:
        attributes_read = {name for code in code_and_inner(value.__code__) for name in code.co_names}
        for name, part in children(value):
            calls = (getattr(type(part), attribute, None) for attribute in attributes_read)
            # If the function calls the object or one of its methods, all attributes of the object count. Otherwise only
            # those attributes count that the function names.
            if not _is_object(part) or callable(part) or any(isinstance(call, FunctionType) for call in calls):
                yield name, part
            else:
                yield from ((f"{name}.{a}", inner) for a, inner in attributes(part) if a in attributes_read)


def _is_object(value: Any) -> bool:
    """Tell whether a value is an object with variables of its own that may be modules.

    Objects of this package do not count: they hold copies that are as they should be, or parts of the model.
    """
    return (
        getattr(value, "__dict__", None) is not None
        and not isinstance(value, (*_CALLS, *_GROUPS, nn.Module, ModuleType, type, Tensor))
        and not type(value).__module__.startswith("purify_fast.")
    )


def class_functions(model: nn.Module) -> list[FunctionType]:
    """The methods that a prediction of a module and of its parts may call, without those of PyTorch.

    Args:
        model: any module.
    """
    kinds = dict.fromkeys(kind for part in model.modules() for kind in type(part).__mro__)
    methods: dict[str, list[FunctionType]] = {}
    for kind in kinds:
        if kind.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(kind).items():
                if isinstance(value, FunctionType):
                    methods.setdefault(name, []).append(value)
    called: list[FunctionType] = []
    # Collect the methods that can be reached by name from forward. Methods that only training calls are left out, since
    # they may use other modules.
    waiting = ["forward", "__call__"]
    while waiting:
        for method in methods.pop(waiting.pop(), ()):
            called.append(method)
            waiting += [name for code in code_and_inner(method.__code__) for name in code.co_names]
    return called
