"""The contents of a model: the visitor of its parts, the modules among them, and a key that is the same while they are.

`parts` yields the values directly inside a value, with their names: every question about what a model depends on uses
it. There are two keys. `identity_key` compares the tensors and objects themselves: a captured step reads the memory
that its model had when it was captured, and may be replayed while this key is the same. Writing into that memory does
not change the key: an optimizer's step, a refreshed inference copy, new running statistics. The other key compares
values, for models in different processes: `purify_fast.evaluation.fingerprint`.
"""

from __future__ import annotations

import argparse
import dataclasses
import dis
import enum
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ._compiler import outside_graphs

#: The attributes of a bare module; of these only the mode, the tensors, the parts and the hooks count.
BARE = frozenset(vars(nn.Module()))
#: The dictionaries of hooks that run with a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: Plain values, which have nothing inside.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_SIMPLE = frozenset(PLAIN)
_VALUES = (*PLAIN, enum.Enum)
_CALLS = (FunctionType, MethodType, functools.partial)
_GROUPS = (list, tuple, set, frozenset, deque, dict)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: Lists with more members are taken for data and not for ensembles, and are not searched for modules.
_MEMBERS = 1000
#: The depth to which nested objects are searched for modules; and the depth of nested lists.
_OBJECTS, _NESTED = 8, 3


# -- the visitor ------------------------------------------------------------------------------------------------------


def parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """Yield the values directly inside a value, each with its name; a plain value has none.

    Args:
        value: a module (its tensors, hooks, modules and attributes), a list, tuple, set, deque or dict (by index or by
            key), a function (its variables and defaults), a method, a partial function, or any object (its attributes).
            A class names in ``not_dependencies`` the attributes that do not count.
    """
    if isinstance(value, nn.Module):
        registered = value._parameters, value._buffers, value._modules
        return [*(item for group in registered for item in group.items()), *hooks(value), *attributes(value)]
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, _GROUPS):
        return enumerate(value)
    if isinstance(value, functools.partial):
        arguments = [(f"argument {i}", argument) for i, argument in enumerate(value.args)]
        return [("func", value.func), *arguments, *value.keywords.items()]
    if isinstance(value, MethodType):
        return [("self", value.__self__), ("the method", value.__func__)]
    if isinstance(value, FunctionType):
        defaults = [("a default", default) for default in value.__defaults__ or ()]
        return [*variables(value), *defaults, *(value.__kwdefaults__ or {}).items()]
    return attributes(value)


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


def variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables around a function, and the globals that it reads; for PyTorch's functions only the former."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # a variable that has no value yet
            continue
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


# -- the key by identity ----------------------------------------------------------------------------------------------


def identity_key(model: nn.Module) -> tuple[tuple[Any, ...], list[Any], list[Tensor]]:
    """The tensors, settings and objects that ``model`` computes with now: equal values mean equal computations.

    Args:
        model: a module. The objects of this package that it holds are looked into, and so are dataclasses,
            ``types.SimpleNamespace`` and ``argparse.Namespace``. Any other object counts by its identity: what changes
            inside it is not seen. A class names in ``not_dependencies`` the attributes that its computation does not
            depend on.

    Returns:
        The values, which can be hashed: tensors by their addresses. The objects that stand among them by their
        identity: who keeps the values keeps these too, so that no other object is taken for one of them. The tensors,
        each once, in the order of the values.

    Raises:
        TypeError: a tensor of a special class, such as the part of a sharded weight, whose memory is elsewhere.
    """
    values: list[Any] = []
    objects: list[Any] = []
    _add(model, values, objects, {})
    tensors = list({id(part): part for part in objects if isinstance(part, Tensor)}.values())
    return tuple(values), [part for part in objects if not isinstance(part, Tensor)], tensors


def _add(value: Any, values: list[Any], objects: list[Any], seen: dict[int, int]) -> None:
    """Add a value to the values; add tensors, and objects that count by identity, to the objects too."""
    kind = type(value)
    if kind in _SIMPLE or (kind is tuple and _is_simple(value)):
        values.append(value)
    elif isinstance(value, Tensor):
        if kind not in _TENSORS:
            raise TypeError(f"a tensor of type {kind.__name__} does not say where its memory is")
        values.append((value.data_ptr(), value.shape, value.dtype, value.device))
        objects.append(value)
    elif id(value) in seen:
        # the position counts: a model may switch between equal parts
        values.append(("seen", seen[id(value)]))
    elif isinstance(value, nn.Module) or _is_settings(kind):  # type: ignore[arg-type]  # mypy takes no class for hashable
        seen[id(value)] = len(seen)
        values.append((kind.__qualname__, getattr(value, "training", None)))
        for name, part in parts(value):
            values.append(name)
            _add(part, values, objects, seen)
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        seen[id(value)] = len(seen)
        values.append((kind.__qualname__, len(value)))
        for part in value:
            _add(part, values, objects, seen)
            if isinstance(value, dict):
                _add(value[part], values, objects, seen)
    elif isinstance(value, _VALUES):
        values.append(value)
    elif isinstance(value, slice):
        # before Python 3.12 a slice cannot be hashed
        values.append(("slice", value.start, value.stop, value.step))
    else:
        seen[id(value)] = len(seen)
        values.append(id(value))
        objects.append(value)


def _is_simple(value: tuple[Any, ...]) -> bool:
    """Tell whether a tuple contains only plain values, such as the sizes of a kernel."""
    # a loop and not a generator: most values of a model are such tuples
    for part in value:  # noqa: SIM110
        if type(part) not in _SIMPLE:
            return False
    return True


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
                # most tuples are sizes, such as those of a kernel
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

    Everything is looked through once: the ways through functions that call each other are too many to walk.

    Args:
        value: a function, a method, a partial function, or an object, a list, tuple, set or dict with such inside.
        place: name of the value.
    """
    if not (isinstance(value, (*_CALLS, *_GROUPS)) or _is_object(value)):
        return
    seen = {id(value)}
    # each with its name, and how many objects and lists the way to it leads through, itself included
    waiting = deque([(place, value, int(_is_object(value)), int(isinstance(value, _GROUPS)))])
    while waiting:
        outer, value, objects, groups = waiting.popleft()
        for name, part in _used_parts(outer, value):
            if type(part) in _SIMPLE or isinstance(part, Tensor) or id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, nn.Module):
                yield name, part
            elif _is_object(part):
                # the object of a method is used, however deep it is
                depth = 1 if isinstance(value, MethodType) else objects + 1
                if depth <= _OBJECTS:
                    waiting.append((name, part, depth, 0))
            elif isinstance(part, _CALLS):
                waiting.append((name, part, objects, 0))
            elif isinstance(part, _GROUPS) and groups < _NESTED:
                waiting.append((name, part, objects, groups + 1))


def _used_parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value that it may use, by the name for the reader."""
    if isinstance(value, _GROUPS):
        yield from ((f"{place}[{name!r}]", part) for name, part in islice(parts(value), _MEMBERS))
    elif not isinstance(value, FunctionType):
        yield from parts(value)
    else:
        attributes_read = {name for code in code_and_inner(value.__code__) for name in code.co_names}
        for name, part in parts(value):
            calls = (getattr(type(part), attribute, None) for attribute in attributes_read)
            # If the function calls the object or one of its methods, all its attributes count; otherwise only those
            # that the function names.
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
    """The methods that a prediction of a module and of its parts may call, but for those of PyTorch.

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
    # methods call each other by name; a training step, which no prediction calls, uses other modules
    waiting = ["forward", "__call__"]
    while waiting:
        for method in methods.pop(waiting.pop(), ()):
            called.append(method)
            waiting += [name for code in code_and_inner(method.__code__) for name in code.co_names]
    return called
