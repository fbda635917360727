"""What tells one model from another: all that it holds, by value, and the code of its classes and functions.

Two models get the same fingerprint only if nothing that can be seen of them differs. What cannot be compared by its
value, such as an open connection, is never told by its type alone: the model has no fingerprint then. Nothing that
differs from process to process is part of it: no address in memory, no order of a set, no state of a generator.
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
import weakref
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._fingerprint import digest, text_hash
from ..attacks.held_modules import code_and_inner, global_names
from ..speed.dependencies import BARE, HOOKS
from .outputs import LogitsOf

#: Values that their text tells apart.
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
#: Objects on which no prediction depends.
_IDLE = (logging.Logger, logging.LoggerAdapter, type(threading.Lock()), type(threading.RLock()))
#: What a class has besides what it computes with.
_NOT_CODE = frozenset({
    "__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__annotate__", "__annotations_cache__",
    "__qualname__", "__hash__", "__firstlineno__", "__static_attributes__", "__abstractmethods__", "_abc_impl",
    "__orig_bases__", "__parameters__", "__slots__", "__dataclass_fields__", "__dataclass_params__", "__match_args__",
    "__protocol_attrs__", "__signature__", "__non_callable_proto_members__", "not_dependencies",
})  # fmt: skip
#: What PyTorch adds to a module that it compiles, and to one that it traced, whose code is an attribute too.
_COMPILED, _TRACED = frozenset({"_compiled_call_impl"}), frozenset({"_graph", "_tracer_cls", "meta"})
#: Packages whose code is told by their version, or by this package's own.
_KNOWN = {"torch", "torchvision", "numpy", "purify_fast", *sys.stdlib_module_names} - {"__main__"}
#: Elements of a constant of a library; what has more is a table of something else.
_FEW = 1000
#: Variables of PyTorch with hooks of all modules.
_HOOKS_OF_ALL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


def fingerprint(model: object) -> str | None:
    """A hash of what a module computes with: its weights, attributes, hooks and parts, and the code of its classes.

    The code is that of a user's own classes, of the functions that they call, and of the variables that they read:
    whoever edits a defence and evaluates it again must not be given the rows of the defence before. Comments,
    docstrings and the place in the file do not count. The code of PyTorch and of this package is not part of it.
    Attributes count by value, private ones too: tensors and arrays with their contents, and modules, functions and
    objects that are held anywhere inside them with all that these hold. A class names in ``not_dependencies`` the
    attributes that its predictions do not depend on. Of a random generator the seed counts and not the state.

    Args:
        model: what is judged.

    Returns:
        The hash; None for what is no module, and for a module that holds what cannot be compared by its value.
    """
    return fingerprint_or_reason(model)[0]


def fingerprint_or_reason(model: object) -> tuple[str | None, str]:
    """The `fingerprint` of a model, or None and why it has none, as the end of a sentence that begins with its name.

    Args:
        model: what is judged.
    """
    asked = model.model if isinstance(model, LogitsOf) else model
    if not isinstance(asked, nn.Module):
        return None, "is a function, of which no weights can be compared"
    marks = _Marks()
    try:
        found = [marks.of(model, ()), *(marks.of(hook, ("hooks of all modules",)) for hook in _hooks_of_all())]
    except _CannotCompareError as error:
        return None, f"holds {error}, which cannot be compared by its value"
    except RecursionError:
        return None, "holds objects in one another, too deep to be compared"
    return _hash("model", found), ""


class _CannotCompareError(Exception):
    """The message says where a value is, and of which type."""


def _hooks_of_all() -> list[Any]:
    found = [getattr(nn.modules.module, name, {}) for name in _HOOKS_OF_ALL]
    return [hook for hooks in found for hook in hooks.values()]


def _hash(kind: str, parts: list[str]) -> str:
    return text_hash(json.dumps([kind, *parts])).hexdigest()


def _origin(value: Any) -> Literal["known", "installed", "own"]:
    """Where the code of a class or function is from: a library of known version, another one, or the user."""
    return _origin_of_package(str(getattr(value, "__module__", None) or "builtins").partition(".")[0])


@functools.cache
def _origin_of_package(name: str) -> Literal["known", "installed", "own"]:
    if name in _KNOWN:
        return "known"
    package = sys.modules.get(name)
    places = [getattr(package, "__file__", None) or "", *map(str, getattr(package, "__path__", ()))]
    return "installed" if any("site-packages" in place or "dist-packages" in place for place in places) else "own"


def _name(value: Any) -> str:
    """What a class or function is called; of a user's own without the file, which may be run or imported."""
    package = str(getattr(value, "__module__", None) or "builtins").partition(".")[0]
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None) or type(value).__qualname__
    origin = _origin_of_package(package)
    version = getattr(sys.modules.get(package), "__version__", "") if origin == "installed" else ""
    return str(name) if origin == "own" else f"{package} {version}: {name}"


def _left_out(kind: type) -> frozenset[str]:
    """Attributes of objects of a class that tell no object from another."""
    return frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))


def _computed_once(kind: type) -> frozenset[str]:
    """Properties whose value, made of the other attributes, is kept with the object."""
    kept = functools.cached_property
    return frozenset(name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, kept))


class _Marks:
    """What stands for values in a fingerprint: each once, of those inside each other the outer ones as such."""

    def __init__(self) -> None:
        self.made: dict[int, str] = {}
        # values that are being looked through, with how many these are inside
        self.open: dict[int, int] = {}
        # an id is that of one value only as long as this is there
        self.alive: list[Any] = []

    def of(self, value: Any, path: tuple[str, ...]) -> str:
        """What stands for a value.

        Args:
            value: anything.
            path: the names that lead to it, for the message of an error.

        Raises:
            _CannotCompareError: it cannot be compared by its value.
        """
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if id(value) in self.open:
            return f"number {self.open[id(value)]} around this"
        if id(value) not in self.made:
            self.alive.append(value)
            self.open[id(value)] = len(self.open)
            try:
                self.made[id(value)] = _hash(*self._parts(value, path))
            finally:
                del self.open[id(value)]
        return self.made[id(value)]

    def _parts(self, value: Any, path: tuple[str, ...]) -> tuple[str, list[str]]:
        """The kind of a value, and what stands for its parts."""
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
            attributes = self._variables(getattr(value, "__dict__", {}), frozenset(), path)
            return "set", [self.of(type(value), path), *sorted(self.of(part, path) for part in value), *attributes]
        if type(value) in (list, tuple):
            return type(value).__name__, [self.of(part, (*path, f"[{i}]")) for i, part in enumerate(value)]
        if type(value) in (dict, types.MappingProxyType):
            return "dict", list(self._items(value, path))
        for kinds, parts in self._RULES:
            if isinstance(value, kinds):
                return kinds[0].__name__, parts(self, value, path)
        return "object", self._object(value, path)

    def _items(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[str]:
        for key, part in value.items():
            yield self.of(key, (*path, "a key"))
            yield self.of(part, (*path, f"[{key!r}]" if type(key) in (str, int) else "[...]"))

    def _variables(self, held: Mapping[str, Any], left_out: frozenset[str], path: tuple[str, ...]) -> Iterator[str]:
        """Attributes by name; their order is that in which the object got them, which is no part of what it is."""
        for name in sorted(map(str, held.keys() - left_out)):
            yield name
            yield self.of(held[name], (*path, name))

    # -- modules and tensors ------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module, path: tuple[str, ...]) -> list[str]:
        # not imported for this: nothing is compiled then
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
            return ["compiled", self.of(module._orig_mod, path), *self._hooks(module, path)]
        if isinstance(module, torch.jit.ScriptModule):
            return self._script(module, path)
        parts = [self.of(type(module), path), str(module.training)]
        for group in ("_parameters", "_buffers", "_modules"):
            parts += [group, *(text for n, v in vars(module)[group].items() for text in (n, self.of(v, (*path, n))))]
        parts += self._hooks(module, path)
        left_out = BARE | _left_out(type(module)) | _computed_once(type(module)) | _COMPILED
        if isinstance(module, torch.fx.GraphModule):
            left_out |= _TRACED
            # its class is made by PyTorch, and calls what was called when it was traced
            parts += self._globals(cast(types.FunctionType, type(module).forward), "own", path)
        return [*parts, "attributes", *self._variables(vars(module), left_out, path)]

    def _hooks(self, module: nn.Module, path: tuple[str, ...]) -> Iterator[str]:
        flags = [getattr(module, name, {}) for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")]
        flags.append(getattr(module, "_forward_hooks_always_called", {}))
        for group in HOOKS:
            # a hook's number counts those of the whole process
            for number, hook in getattr(module, group).items():
                yield from (group, self.of(hook, (*path, "a hook")), str([number in flag for flag in flags]))

    def _script(self, module: torch.jit.ScriptModule, path: tuple[str, ...]) -> list[str]:
        """A module of TorchScript, whose code and attributes only its file has."""
        try:
            saved = bytearray(module.save_to_buffer())
        except RuntimeError as error:
            raise _cannot(module, path) from error
        return ["script", digest(torch.frombuffer(saved, dtype=torch.uint8)), *self._hooks(module, path)]

    def _tensor(self, tensor: Tensor, path: tuple[str, ...]) -> list[str]:
        if is_traceable_wrapper_subclass(tensor):
            raise _cannot(tensor, path)
        try:
            content = digest(tensor)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise _cannot(tensor, path) from error
        if type(tensor) in (Tensor, nn.Parameter):
            return [content]
        return [content, self.of(type(tensor), path), *self._variables(vars(tensor), frozenset(), path)]

    # -- code ---------------------------------------------------------------------------------------------------------

    def _class(self, kind: type, path: tuple[str, ...]) -> list[str]:
        """A class of a user by what it computes: its methods and attributes, and those of its bases."""
        parts, left_out = [], _NOT_CODE | _left_out(kind)
        for base in kind.__mro__:
            origin = _origin(base)
            parts.append(_name(base))
            if origin == "known":
                continue
            for name, value in sorted(vars(base).items()):
                if name not in left_out and not _is_library_state(origin, value):
                    parts += [name, self.of(value, (*path, f"class {base.__qualname__}", name))]
        return parts

    def _function(self, function: types.FunctionType, path: tuple[str, ...]) -> list[str]:
        # compiled or not, a function computes the same
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:
            return [self.of(original, path)]
        origin, name = _origin(function), _name(function)
        if origin == "known" and _is_found_by_name(function):
            return [name]
        here = (*path, f"{function.__name__}()")
        parts = [name, *self._code(function.__code__, function.__doc__, here)]
        parts += [self.of(held, here) for held in (function.__defaults__, function.__kwdefaults__)]
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            # a variable may have no value yet
            parts.append(self.of(cell.cell_contents, (*here, variable)) if _has_value(cell) else "nothing")
        if origin != "known":
            parts += self._globals(function, origin, here)
            parts += self._variables(vars(function), frozenset(), here)
        return parts

    def _code(self, code: types.CodeType, doc: str | None, path: tuple[str, ...]) -> list[str]:
        """What a function does: its instructions, constants and names, without the docstring."""
        parts = [code.co_code.hex(), getattr(code, "co_exceptiontable", b"").hex(), str(code.co_names)]
        for i, constant in enumerate(code.co_consts):
            if isinstance(constant, types.CodeType):
                parts += self._code(constant, None, path)
            elif i > 0 or constant is None or constant != doc:
                parts.append(self.of(constant, path))
        return parts

    def _globals(self, function: types.FunctionType, origin: str, path: tuple[str, ...]) -> Iterator[str]:
        """The variables of its file that a function reads: constants, other objects, and code of the user."""
        codes = list(code_and_inner(function.__code__))
        attributes = {name for code in codes for name in code.co_names}
        for name in sorted(set(global_names(function.__code__)) & function.__globals__.keys()):
            value = function.__globals__[name]
            if _is_library_state(origin, value):
                continue
            yield name
            if isinstance(value, types.ModuleType):
                yield from self._used_of(value, attributes, (*path, name), {id(value)})
            else:
                yield self.of(value, (*path, name))

    def _used_of(self, module: types.ModuleType, names: set[str], path: tuple[str, ...], seen: set[int]) -> list[str]:
        """What a function that names these attributes may use of a file."""
        parts = [module.__name__]
        if _origin_of_package(module.__name__.partition(".")[0]) != "own":
            return parts
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            if not isinstance(value, types.ModuleType):
                parts += [name, self.of(value, (*path, name))]
            elif id(value) not in seen:
                seen.add(id(value))
                parts += [name, *self._used_of(value, names, (*path, name), seen)]
        return parts

    # -- other values -------------------------------------------------------------------------------------------------

    def _by_name(self, value: Any, path: tuple[str, ...]) -> list[str]:
        return [_name(value)]

    def _builtin(self, value: Any, path: tuple[str, ...]) -> list[str]:
        """A function in C, and the object that it is a method of."""
        owner = getattr(value, "__self__", None)
        return [_name(value), "" if owner is None or isinstance(owner, types.ModuleType) else self.of(owner, path)]

    def _file(self, value: types.ModuleType, path: tuple[str, ...]) -> list[str]:
        if _origin_of_package(value.__name__.partition(".")[0]) == "own":
            raise _cannot(value, path)
        return [value.__name__]

    def _in_class(self, value: Any, path: tuple[str, ...]) -> list[str]:
        """A method that is looked up in another way."""
        names = ("fget", "fset", "fdel") if isinstance(value, property) else ("__func__", "func")
        return [self.of(getattr(value, name, None), path) for name in names]

    def _member(self, value: Enum, path: tuple[str, ...]) -> list[str]:
        return [self.of(type(value), path), str(value.name), self.of(value.value, path)]

    def _reference(self, value: weakref.ref[Any], path: tuple[str, ...]) -> list[str]:
        return [self.of(value(), path)]

    def _generator(self, value: torch.Generator, path: tuple[str, ...]) -> list[str]:
        return [str(value.device), str(value.initial_seed())]

    def _numpy_generator(self, value: Any, path: tuple[str, ...]) -> list[str]:
        source = value.bit_generator if isinstance(value, np.random.Generator) else value
        seed = getattr(source, "seed_seq", None)
        if not isinstance(seed, np.random.SeedSequence):
            raise _cannot(value, path)
        return [type(value).__name__, type(source).__name__, str(seed.entropy), str(seed.spawn_key)]

    def _refused(self, value: Any, path: tuple[str, ...]) -> list[str]:
        raise _cannot(value, path)

    def _object(self, value: Any, path: tuple[str, ...]) -> list[str]:
        """Any other object: its class, and its state as a copy or a pickle would have it.

        An object of a user counts with all its attributes, also those that its pickles leave out.
        """
        kind = type(value)
        reduce: Callable[[Any], Any] | None = copyreg.dispatch_table.get(kind)
        try:
            found: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        # whatever an object's own code raises
        except Exception as error:
            raise _cannot(value, path) from error
        parts, left_out = [self.of(kind, path)], _left_out(kind) | _computed_once(kind)
        if isinstance(found, str):
            # the name of a variable; what is around a function is an object of that name too
            found = found, getattr(value, "__wrapped__", None)
        make, arguments, state, *members = (*cast(tuple[Any, ...], found), None)
        parts += [self.of(make, path), self.of(arguments, path)]
        # objects with slots have two
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict) and all(isinstance(name, str) for name in part):
                parts += self._variables(part, left_out, path)
            else:
                parts.append(self.of(part, path))
        # elements of a list, and entries of a dictionary
        parts += [self.of(None if each is None else list(each), path) for each in members[:2]]
        if _origin(kind) != "known":
            parts += self._variables(getattr(value, "__dict__", {}), left_out, path)
        return parts

    _RULES: tuple[tuple[tuple[type, ...], Callable[[_Marks, Any, tuple[str, ...]], list[str]]], ...] = (
        ((types.BuiltinFunctionType, types.MethodWrapperType), _builtin),
        (
            (
                types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
                types.GetSetDescriptorType, types.MemberDescriptorType, torch._ops.OpOverload,
                torch._ops.OpOverloadPacket, *_IDLE,
            ),
            _by_name,
        ),
        ((types.ModuleType,), _file),
        ((property, staticmethod, classmethod, functools.cached_property), _in_class),
        ((Enum,), _member),
        ((weakref.ref,), _reference),
        ((torch.Generator,), _generator),
        ((np.random.Generator, np.random.BitGenerator), _numpy_generator),
        ((torch.jit.ScriptFunction, random.Random, np.random.RandomState), _refused),
    )  # fmt: skip


def _cannot(value: Any, path: tuple[str, ...]) -> _CannotCompareError:
    where = ".".join(path).replace(".[", "[") or "itself"
    return _CannotCompareError(f"{where} ({type(value).__qualname__})")


def _has_value(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False


def _is_found_by_name(function: types.FunctionType) -> bool:
    """Whether a library's function is told by its name: it is no lambda and was not made by another function."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _is_library_state(origin: str, value: Any) -> bool:
    """Whether it is a variable of an installed library, told by its version, and neither code nor a constant."""
    code = (types.FunctionType, types.BuiltinFunctionType, type, property, staticmethod, classmethod, types.ModuleType)
    return origin == "installed" and not isinstance(value, code) and not _is_constant(value, 3)


def _is_constant(value: Any, depth: int) -> bool:
    """Whether a value is plain, or a tensor or an array, or a collection of a few such, in so many of one another."""
    if type(value) in (list, tuple, set, frozenset, dict):
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return depth > 0 and len(parts) < _FEW and all(_is_constant(part, depth - 1) for part in parts)
    return type(value) in (*_PLAIN, Tensor, np.ndarray)
