"""Find the values and modules that a model contains, and make two keys that tell whether the model has changed.

The two keys are made from all values inside a model:

- `identity_key` identifies tensors by their addresses, and other objects by their identity. A captured step (a CUDA
  graph) reads the memory of its model, so it may be replayed while this key is unchanged, also after a write into that
  memory, such as an optimizer's step.
- `fingerprint` compares models in different processes by value. Equal fingerprints mean that no difference was found.
  Values that vary between processes are left out: addresses in memory, the order of a set, and the state of a random
  generator.
"""

from __future__ import annotations

import argparse
import copyreg
import dataclasses
import dis
import enum
import functools
import linecache
import logging
import random
import sys
import threading
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

#: The attributes that every ``nn.Module`` has. `identity_key` and `fingerprint` include only some of them: the module's
#: mode (training or evaluation), tensors, submodules and hooks.
BARE = frozenset(vars(nn.Module()))
#: The dictionaries of hooks that run in a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Types of values that contain no other values.
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), *_IN_TORCH)
_SIMPLE = frozenset(_PLAIN)
_CALLS = (FunctionType, MethodType, functools.partial)
_GROUPS = (list, tuple, set, frozenset, deque, dict)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: Only this many members of a list or dict are searched for modules. A longer list usually contains data.
_MEMBERS = 1000
#: Nested objects and lists are searched for modules down to this depth.
_DEPTH = 8

Children = Iterable[tuple[Any, Any]]

# -- the values inside a value ----------------------------------------------------------------------------------------


def children(value: Any) -> Children:
    """The values directly inside a value, each with its name. A plain value contains none.

    A class lists in ``not_dependencies`` the names of attributes to leave out.

    Args:
        value: any object. The result has, for a module, its tensors, hooks, submodules and attributes; for a list,
            tuple, set, deque or dict, its members by index or key; for a function, its default values and the variables
            outside it that it uses; for a method or a partial function, its parts; for another object, its attributes.
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
    """The parameters, buffers and submodules that are registered with PyTorch."""
    return [item for group in ("_parameters", "_buffers", "_modules") for item in vars(module)[group].items()]


def hooks(module: nn.Module) -> list[tuple[str, Any]]:
    """The hooks of a module's forward and backward passes."""
    return [("a hook", hook) for group in HOOKS for hook in getattr(module, group).values()]


def attributes(value: Any) -> list[tuple[str, Any]]:
    """The attributes of an object. For a module, only attributes that PyTorch does not register."""
    # mypy does not accept a class as hashable.
    left_out = _left_out(type(value))  # type: ignore[arg-type]
    return [item for item in (getattr(value, "__dict__", None) or {}).items() if item[0] not in left_out]


@functools.lru_cache(maxsize=4096)
def _left_out(kind: type) -> frozenset[str]:
    return not_dependencies(kind) | (BARE if issubclass(kind, nn.Module) else frozenset())


def not_dependencies(kind: type) -> frozenset[str]:
    """The attributes that a class and its bases list in ``not_dependencies``."""
    return frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))


def around(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables of enclosing functions that a function uses. Variables without a value yet are left out."""
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
    """The global variables that a function reads. For a function of PyTorch there are none."""
    known = function.__globals__
    if str(known.get("__name__")).partition(".")[0] != "torch":
        names = dict.fromkeys(name for name, *_ in _names_read(function.__code__))
        yield from ((name, known[name]) for name in names if name in known)


def code_and_inner(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions, lambdas and comprehensions that are defined in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from code_and_inner(inner)


@functools.lru_cache(maxsize=4096)
def _names_read(code: CodeType) -> tuple[tuple[str, ...], ...]:
    """The global variables that a function reads, each with the attributes that it reads of it: ("config", "SIGMA").

    ``co_names`` does not tell variables from attributes.
    """
    read, going_on = list[tuple[str, ...]](), False
    for inner in code_and_inner(code):
        for instruction in dis.get_instructions(inner):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.append((instruction.argval,))
                going_on = True
            elif going_on and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                read[-1] += (instruction.argval,)
            else:
                going_on = False
    return tuple(dict.fromkeys(read))


# -- the walk ---------------------------------------------------------------------------------------------------------


class _Walk:
    """Visits everything inside a value, recursively.

    If two models differ, the lists ``values`` of their walks differ.

    Attributes:
        values: the plain values, the names, and the marks that `open` returns, in the order of the visit.
        path: the values that are being visited, outermost first. Each value is paired with the name of its child that
            is being visited.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.path: list[tuple[Any, Any]] = []
        # A number for each visited value, by its id. It is recorded when the value is visited again, so that a shared
        # object and two equal objects give different keys.
        self._numbers: dict[int, int] = {}
        # Keep every visited value alive, because an id is unique only while its object exists.
        self._alive: list[Any] = []

    def open(self, value: Any) -> tuple[Any, Children]:
        """Return a mark that identifies a value, and the values inside it. `add` handles plain values itself."""
        raise NotImplementedError

    def add(self, value: Any) -> None:
        """Visit a value and everything inside it."""
        kind = type(value)
        # A tuple of plain values, such as the sizes of a kernel, is plain too.
        if kind in _SIMPLE or (kind is tuple and _SIMPLE.issuperset(map(type, value))):
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
                self.add(name)
                self.add(part)
                self.path.pop()


# -- the key by identity ----------------------------------------------------------------------------------------------


def identity_key(model: nn.Module) -> tuple[tuple[Any, ...], list[Any], list[Tensor]]:
    """Make a key from the tensors, settings and objects of a model: equal keys mean equal computations.

    Tensors are identified by their addresses. Objects of this package, dataclasses, ``types.SimpleNamespace`` and
    ``argparse.Namespace`` are compared by their attributes. Any other object is identified by its id, so a change
    inside it is not noticed. A class lists in ``not_dependencies`` the attributes that do not affect its computation.

    Args:
        model: a module.

    Returns:
        Three values: the key, which can be hashed; the objects that are identified by their ids; and the model's
        tensors, without repetition. Keep these objects alive as long as the key. Otherwise a new object could get the
        same id.

    Raises:
        TypeError: a tensor has a special class, such as a part of a sharded weight, whose memory is elsewhere.
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
                    f"a tensor of type {kind.__name__} does not say where its memory is: only torch.Tensor, "
                    "nn.Parameter and nn.Buffer are allowed"
                )
            self.tensors.append(value)
            return (value.data_ptr(), value.shape, value.dtype, value.device), ()
        # mypy does not accept a class as hashable.
        if isinstance(value, nn.Module) or _is_settings(kind):  # type: ignore[arg-type]
            return (kind.__qualname__, getattr(value, "training", None)), children(value)
        if isinstance(value, (dict, list, tuple, set, frozenset)):
            return kind.__qualname__, children(value)
        if isinstance(value, (*_PLAIN, enum.Enum)):
            return value, ()
        if isinstance(value, slice):
            # A slice cannot be hashed before Python 3.12.
            return ("slice", value.start, value.stop, value.step), ()
        self.objects.append(value)
        return id(value), ()


@functools.lru_cache(maxsize=4096)
def _is_settings(kind: type) -> bool:
    """Tell whether `identity_key` compares the objects of a class by their attributes.

    These are objects of this package that are not callable, and objects that were made to contain settings. Objects
    with slots are identified by their ids, because `attributes` does not find the attributes in slots.
    """
    if issubclass(kind, type) or not kind.__dictoffset__:
        return False
    if issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind):
        return True
    return kind.__module__.startswith("purify_fast.") and not any("__call__" in vars(base) for base in kind.__mro__)


# -- the key by value -------------------------------------------------------------------------------------------------

#: Types whose values are compared by name: in C, or without an effect on predictions.
_IN_C = (types.GetSetDescriptorType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)
_NAMED = (*_IN_C, ModuleType, logging.Logger, type(threading.Lock()), type(threading.RLock()))
#: Types that wrap a function, and their attributes that refer to the function and its object.
_AROUND = (MethodType, property, staticmethod, classmethod, functools.cached_property)
_INNER = ("__func__", "__self__", "fget", "fset", "fdel", "func")
#: Random generators that do not show their seed, and compiled scripts. These cannot be compared.
_DRAWS = (random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator)
_INCOMPARABLE = (*_DRAWS, torch.jit.ScriptModule, torch.jit.ScriptFunction)
#: Attributes of a class that do not affect its computation.
_NOT_CODE = frozenset({"_abc_impl", "__annotate__", "__annotate_func__", "not_dependencies"})
#: Attributes that PyTorch adds to a module that it compiled or traced.
_ADDED = frozenset({"_compiled_call_impl", "_graph", "_tracer_cls", "meta"})
#: Packages whose functions and classes are compared only by their name, not by their code.
_LIBRARIES = {"torch", "torchvision", "numpy", "purify_fast", *sys.stdlib_module_names} - {"__main__"}


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash everything that affects a module's computation: weights, attributes, hooks, submodules and code.

    With ``out``, `evaluate` uses the stored result of an attack only if the fingerprint of the model is unchanged.

    Attributes, also private ones, are hashed by value, with everything inside them: contents of tensors and arrays,
    modules, functions and objects. A class lists in ``not_dependencies`` the attributes that do not affect its
    predictions. The seed of a torch.Generator is hashed, but not its state.

    The whole source file, comments included, is hashed for the user's functions, for the methods of the user's classes,
    and for the functions that this code reads as global variables or from the user's imported modules. In a notebook,
    the cell is hashed. Global variables, and values that this code reads from the user's imported modules, are hashed
    too. Installed packages are hashed by name and version, and PyTorch, NumPy and Python's own modules by name;
    `evaluate` stores PyTorch's version. Environment variables and files are not hashed: pass another ``revision`` after
    a change there. A function without source text cannot be compared.

    A model with a generator of NumPy or of Python's ``random``, whose seed neither shows nor is set by `evaluate`, has
    no fingerprint. Use PyTorch's default generator, which `evaluate` seeds, or pass a revision.

    Args:
        model: the evaluated model.
        revision: the user's name for this version of the model. A model that cannot be compared is identified by its
            revision, name and weights.

    Returns:
        The hash. Without a revision, None if the model is not a module or contains something that cannot be compared.
    """
    return fingerprint_or_reason(model, revision)[0]


def fingerprint_or_reason(model: object, revision: str | None = None) -> tuple[str | None, str]:
    """The `fingerprint` and "", or None and the reason why there is none.

    The reason, such as "is a function ...", completes a sentence whose subject is the model.
    """
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
    """Raised for a value that cannot be compared. The message names the value's place and type."""


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
        """A text for a value, used to sort the members of a set."""
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
        """The names of a class and its bases. For the user's classes, also their methods and attributes."""
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
        inside = [*around(function), *defaults(function), *_by_name(vars(function).items())]
        library = _is_library(_package(function))
        if library and _is_found_by_name(function):
            return _name(function), ()
        code = function.__code__
        linecache.checkcache(code.co_filename)
        source = "".join(linecache.getlines(code.co_filename, function.__globals__))
        # Python's methods of dataclasses and named tuples have no source file, but the fields of the class decide them.
        if not source and not (code.co_filename == "<string>" and function.__name__ in vars(object)):
            raise self._cannot_compare(function)
        # The positions distinguish functions of the same name in a file. Python 3.10 knows only the lines, not the
        # columns, so all lambdas of a line look the same.
        places = list(getattr(code, "co_positions", code.co_lines)())
        mark = _name(function), text_hash(source).hexdigest(), places
        read = list(read_globals(function))
        return mark, [*inside, *read, *_read_from_modules(function, read)]

    def _object(self, value: Any) -> Children:
        """The class of an object, its state as for a copy or a pickle, and its attributes."""
        kind = type(value)
        try:
            reduced: Any = (copyreg.dispatch_table.get(kind) or (lambda value: value.__reduce_ex__(4)))(value)
        # Catch every error, because the code of a user's class may raise any.
        except Exception as error:
            raise self._cannot_compare(value) from error
        if isinstance(reduced, str):
            # `__reduce_ex__` returns a string if the value is the global variable of this name. A wrapper around a
            # function has the function's name, so add the wrapped function.
            reduced = _name(value), getattr(value, "__wrapped__", None)
        make, arguments, state, *members = (*cast(tuple[Any, ...], reduced), None)
        inside = [("class", kind), ("maker", make), ("arguments", arguments)]
        left_out = not_dependencies(kind) | _computed_once(kind)
        # The state of an object with slots is a pair of dictionaries.
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            inside += _by_name(part.items(), left_out) if isinstance(part, dict) else [("state", part)]
        # The remaining elements of ``reduced`` are the members of a subclass of list, and the entries of one of dict.
        inside += [("members", None if each is None else list(each)) for each in members[:2]]
        return inside if _is_library(_package(kind)) else [*inside, *_by_name(attributes(value), left_out)]


def _read_from_modules(function: FunctionType, read: Children) -> Iterator[tuple[str, Any]]:
    """Yield what a function reads from the user's modules among its global variables, such as ``config.SIGMA``."""
    known = dict(read)
    found: dict[str, Any] = {}
    for place, *names in _names_read(function.__code__):
        value = known.get(place)
        for name in names:
            if not _is_users_module(value):
                break
            place, value = f"{place}.{name}", vars(value).get(name)
            if value is not None and not isinstance(value, ModuleType):
                found[place] = value
    yield from found.items()


def _is_users_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and not _is_library(value.__name__.partition(".")[0])


def _by_name(named: Children, left_out: Iterable[str] = ()) -> list[tuple[Any, Any]]:
    """Sort attributes by name. The order in which an object got its attributes does not affect its computation."""
    return sorted((item for item in named if item[0] not in left_out), key=lambda item: str(item[0]))


def _computed_once(kind: type) -> frozenset[str]:
    """The names of cached properties, whose values follow from the other attributes."""
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
    """The name of a class or function, with package and version if it belongs to a library.

    The name of the user's module is left out, because a file that is run as a script has another module name than the
    same file when it is imported.
    """
    package = _package(value)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    version = "" if package in _LIBRARIES else getattr(sys.modules.get(package), "__version__", "")
    return f"{package} {version}: {name}" if _is_library(package) else str(name)


def _is_found_by_name(function: FunctionType) -> bool:
    """Tell whether a library's function can be imported by its name, unlike a lambda or a user's wrapper around it."""
    place: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        place = getattr(place, name, None)
    return place is function


# -- modules among the parts ------------------------------------------------------------------------------------------


@outside_graphs
def switch_to_evaluation(module: nn.Module) -> None:
    """Put a module into evaluation mode, also if it refuses ``eval()``, as a module from ``torch.export`` does."""
    try:
        module.eval()
    except NotImplementedError:
        for part in module.modules():
            part.training = False


def hidden_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find modules that a model contains without having registered them, such as modules in a plain list.

    PyTorch does not find such modules: ``modules()``, ``eval()``, ``parameters()``, ``to()`` and ``state_dict()`` leave
    them out. This function searches the attributes and hooks of the model and of all its submodules. It also looks
    inside the lists, tuples, sets, dicts, objects and functions that it finds there.

    Args:
        model: any module.

    Returns:
        Pairs of a name, such as ``encoder.parts[0]``, and a module. Submodules of these modules are not listed.
    """
    hidden: list[tuple[str, nn.Module]] = []
    waiting, known = deque([("", model)]), {id(part) for part in model.modules()}
    while waiting:
        outer, whole = waiting.popleft()
        for path, module in whole.named_modules():
            for name, value in (*attributes(module), *hooks(module)):
                # Skip plain values and tuples of them to save time: every step of a training calls this function.
                if type(value) in _SIMPLE or (type(value) is tuple and _SIMPLE.issuperset(map(type, value))):
                    continue
                place = ".".join(filter(None, (outer, path, name)))
                for inner, part in [(place, value)] if isinstance(value, nn.Module) else used_modules(value, place):
                    if id(part) not in known:
                        hidden.append((inner, part))
                        waiting.append((inner, part))
                        known.update(id(each) for each in part.modules())
    return hidden


def used_modules(value: Any, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that a value contains or uses, each once, with a name that says where it was found.

    Every value is visited once, because functions that call each other could be reached by too many paths.

    Args:
        value: a function, a method, a partial function, an object, or a list, tuple, set or dict.
        place: name of the value, with which the names of the modules begin.
    """
    if not (isinstance(value, (*_CALLS, *_GROUPS)) or _is_object(value)):
        return
    seen = {id(value)}
    # Each entry is a name, a value, and the depth of the value in nested objects and lists.
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
                # A method uses its object. So the object is always searched, and the depth is counted from the object.
                inside = 1 if isinstance(value, MethodType) else depth + 1
                if inside <= _DEPTH:
                    waiting.append((name, part, inside))


def _used_parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values inside a value that it may use when it is called, each with its name for messages."""
    if isinstance(value, _GROUPS):
        yield from ((f"{place}[{name!r}]", part) for name, part in islice(children(value), _MEMBERS))
    elif not isinstance(value, FunctionType):
        yield from children(value)
    else:
        attributes_read = {name for code in code_and_inner(value.__code__) for name in code.co_names}
        for name, part in children(value):
            calls = (getattr(type(part), attribute, None) for attribute in attributes_read)
            # A function that calls an object, or a method of the object, may use all attributes of this object. If not,
            # it uses only the attributes that its code names.
            if not _is_object(part) or callable(part) or any(isinstance(call, FunctionType) for call in calls):
                yield name, part
            else:
                yield from ((f"{name}.{a}", inner) for a, inner in attributes(part) if a in attributes_read)


def _is_object(value: Any) -> bool:
    """Tell whether a value is an object whose attributes must be searched for modules.

    Objects of this package are not searched, because their modules are parts of the model, or copies that this package
    itself keeps up to date.
    """
    return (
        getattr(value, "__dict__", None) is not None
        and not isinstance(value, (*_CALLS, *_GROUPS, nn.Module, ModuleType, type, Tensor))
        and not type(value).__module__.startswith("purify_fast.")
    )


def class_functions(model: nn.Module) -> list[FunctionType]:
    """The methods that the forward pass of a module and its submodules may call. Methods of PyTorch are left out.

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
    # Beginning with `forward`, collect the methods whose names occur in the code of a collected method. This leaves out
    # methods that only a training calls, which may use other modules.
    waiting = ["forward", "__call__"]
    while waiting:
        for method in methods.pop(waiting.pop(), ()):
            called.append(method)
            waiting += [name for code in code_and_inner(method.__code__) for name in code.co_names]
    return called
