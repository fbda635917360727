"""Modules that are held where PyTorch does not look for them: in lists, objects, functions and hooks."""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..speed.dependencies import BARE, HOOKS

_CALLS = (FunctionType, MethodType, functools.partial)
_GROUPS = (list, tuple, set, frozenset, deque, dict)
#: Members of a list that are looked at; one with more is no ensemble but data.
_MEMBERS = 1000
#: Objects, each inside the one before, that are looked through; and lists inside lists.
_OBJECTS, _NESTED = 8, 3
#: Values with nothing inside.
_SIMPLE = frozenset({bool, int, float, str, bytes, type(None), Tensor, nn.Parameter, torch.Size, torch.dtype})


def used_modules(value: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a callable uses, once each, with the name by which it uses it.

    Args:
        value: a function, a method, a partial function, or an object, a list, tuple, set or dict with such inside.
    """
    return _inside("", value)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def hidden_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that a module holds without having registered them, the outermost ones, each with where it is held.

    ``model.modules()`` leaves them out, and so do ``eval()``, ``parameters()``, ``to()`` and ``state_dict()``. They are
    found in lists, tuples, sets and dicts, in objects, in functions that are attributes and in hooks, of the model and
    of all its parts.

    Args:
        model: any module.
    """
    hidden: list[tuple[str, nn.Module]] = []
    waiting, known = deque([("", model)]), {id(part) for part in model.modules()}
    while waiting:
        name, module = waiting.popleft()
        for path, part in module.named_modules():
            for where, value in _attributes(part):
                place = ".".join(filter(None, (name, path, where)))
                for inner, held in [(place, value)] if isinstance(value, nn.Module) else _inside(place, value):
                    if id(held) not in known:
                        hidden.append((inner, held))
                        waiting.append((inner, held))
                        known.update(id(each) for each in held.modules())
    return hidden


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
    # a method calls another by its name; a training step, which a prediction does not call, uses other things
    waiting = ["forward", "__call__"]
    while waiting:
        for method in methods.pop(waiting.pop(), ()):
            called.append(method)
            waiting += [name for code in code_and_inner(method.__code__) for name in code.co_names]
    return called


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes and hooks of a module in which modules may be, each with its name."""
    for name, value in list(vars(module).items()):
        if name in BARE or type(value) in _SIMPLE:
            continue
        # sizes, such as those of a kernel, are most of what there is
        if type(value) not in (list, tuple) or not _SIMPLE.issuperset(map(type, value)):
            yield name, value
    for group in HOOKS:
        for hook in list(getattr(module, group).values()):
            yield "a hook", hook


def _inside(name: str, value: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a value holds or uses, once each.

    Everything is looked through once: the ways through functions that call each other are too many to walk.
    """
    if not (isinstance(value, (*_CALLS, *_GROUPS)) or _is_object(value)):
        return
    seen = {id(value)}
    # each with its name, and how many objects and lists the way to it leads through, itself included
    waiting = deque([(name, value, int(_is_object(value)), int(isinstance(value, _GROUPS)))])
    while waiting:
        name, value, objects, groups = waiting.popleft()
        for inner, held in _held(name, value):
            if type(held) in _SIMPLE or id(held) in seen:
                continue
            if isinstance(held, nn.Module):
                yield inner, held
            elif _is_object(held):
                # what a method belongs to is used whatever it is in
                deep = 1 if isinstance(value, MethodType) else objects + 1
                if deep > _OBJECTS:
                    continue
                waiting.append((inner, held, deep, 0))
            elif isinstance(held, _CALLS):
                waiting.append((inner, held, objects, 0))
            elif isinstance(held, _GROUPS) and groups < _NESTED:
                waiting.append((inner, held, objects, groups + 1))
            else:
                continue
            seen.add(id(held))


def _is_object(value: Any) -> bool:
    """Whether a value is an object with variables of its own that may be modules.

    Those of this package are none: what they hold are copies that are as they should be, or parts of the model.
    """
    return (
        getattr(value, "__dict__", None) is not None
        and not isinstance(value, (*_CALLS, *_GROUPS, nn.Module, ModuleType, type, Tensor))
        and not type(value).__module__.startswith("purify_fast.")
    )


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a callable, a list or an object has around it, each with its name.

    Args:
        name: what the value is called.
        value: a function, a method, a partial function, a list, tuple, set, deque or dict, or an object.
    """
    if isinstance(value, functools.partial):
        yield "func", value.func
        yield from ((f"argument {i}", held) for i, held in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield "the method", value.__func__
    elif isinstance(value, FunctionType):
        yield from _used(value)
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", held) for key, held in islice(value.items(), _MEMBERS))
    elif isinstance(value, _GROUPS):
        yield from ((f"{name}[{i}]", held) for i, held in enumerate(islice(value, _MEMBERS)))
    else:
        # an object with a method of its own that is called
        yield from list(vars(value).items())


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables and defaults of a function; of an object that it does not call, the attributes that it names."""
    codes = list(code_and_inner(function.__code__))
    names = {name for code in codes for name in code.co_names}
    for name, held in _variables(function):
        if not _is_object(held) or callable(held):
            yield name, held
        elif any(isinstance(getattr(type(held), attribute, None), FunctionType) for attribute in names):
            # one of its methods is called, which may use any of its variables
            yield name, held
        else:
            yield from ((f"{name}.{a}", part) for a, part in list(vars(held).items()) if a in names)


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # a variable that has no value yet
            continue
    known = function.__globals__
    # PyTorch's own functions use no module of a user but what they are given
    if str(known.get("__name__")).partition(".")[0] != "torch":
        yield from ((name, known[name]) for name in global_names(function.__code__) if name in known)
    yield from (("a default", held) for held in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def code_and_inner(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions, lambdas and comprehensions inside it.

    Args:
        code: of the function.
    """
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from code_and_inner(inner)


@functools.lru_cache(maxsize=4096)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The names of global variables that a function reads; ``co_names`` has those of attributes too.

    Args:
        code: of the function.
    """
    read = (
        instruction.argval
        for inner in code_and_inner(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )
    return tuple(dict.fromkeys(read))
