"""What a function that is judged as a model has around it: modules in training mode, which nobody switches for it."""

from __future__ import annotations

import dis
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from ..protocols import Classifier

_CALLS = (FunctionType, MethodType, functools.partial)
_GROUPS = (list, tuple, set, frozenset, dict)
#: Members of a list that are looked at; one with more is no ensemble but data.
_MEMBERS = 1000
#: Objects, each inside the one before, that are looked through.
_OBJECTS = 2


def note_of_training_modes(model: Classifier, name: str) -> list[str]:
    """A note where a function uses modules that behave as in training; none for a module, whose mode is switched.

    Args:
        model: what is judged.
        name: how it is called in the report.
    """
    if isinstance(model, nn.Module):
        return []
    found = {
        f"{where} ({type(part).__name__})": None
        for where, module in _modules(model)
        for part in module.modules()
        if part.training and _asks_for_mode(part)
    }
    if not found:
        return []
    some = list(found)[:3]
    more = f" and {len(found) - len(some)} more" if len(found) > len(some) else ""
    return [
        f"{name} is a function, and what it uses is in training mode: {', '.join(some)}{more}. The numbers are of the "
        "model as it is in training. If that is not meant, call .eval() on these modules before, or give a module in "
        "place of the function"
    ]


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether a module computes something else in training, as dropout and batch normalization do."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return False
        codes = (getattr(value, "__code__", None) for value in vars(kind).values())
        if any(isinstance(code, CodeType) and "training" in code.co_names for code in codes):
            return True
    return False


def _modules(value: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a callable uses, once each, with the name by which it uses it.

    Everything is looked through once: the ways through functions that call each other are too many to walk.
    """
    seen = {id(value)}
    # each with its name, and how many objects the way to it leads through, itself included
    waiting = deque([("", value, int(_is_object(value)))])
    while waiting:
        name, value, objects = waiting.popleft()
        for inner, held in _held(name, value):
            if id(held) in seen:
                continue
            if isinstance(held, nn.Module):
                yield inner, held
            elif _is_object(held):
                # what a method belongs to is used; of other objects, one inside another is as far as a model reaches
                deep = 1 if isinstance(value, MethodType) else objects + 1
                if deep > _OBJECTS:
                    continue
                waiting.append((inner, held, deep))
            elif isinstance(held, _CALLS) or (isinstance(held, _GROUPS) and not isinstance(value, _GROUPS)):
                waiting.append((inner, held, objects))
            seen.add(id(held))


def _is_object(value: Any) -> bool:
    """Whether a value is an object with variables of its own that may be modules."""
    return getattr(value, "__dict__", None) is not None and not isinstance(
        value, (*_CALLS, *_GROUPS, nn.Module, ModuleType, type)
    )


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a callable, a list or an object has around it, each with its name.

    Args:
        name: what the value is called.
        value: a function, a method, a partial function, a list, tuple, set or dict, or an object.
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
    codes = list(_codes(function.__code__))
    names = {name for code in codes for name in code.co_names}
    for name, held in _variables(function, codes):
        if not _is_object(held) or callable(held):
            yield name, held
        elif any(isinstance(getattr(type(held), attribute, None), FunctionType) for attribute in names):
            # one of its methods is called, which may use any of its variables
            yield name, held
        else:
            yield from ((f"{name}.{a}", part) for a, part in list(vars(held).items()) if a in names)


def _variables(function: FunctionType, codes: Sequence[CodeType]) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            # a variable that has no value yet
            continue
    known = function.__globals__
    # PyTorch's own functions use no module of a user but what they are given
    if str(known.get("__name__")).partition(".")[0] != "torch":
        yield from ((name, known[name]) for name in dict.fromkeys(_global_names(codes)) if name in known)
    yield from (("a default", held) for held in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the functions, lambdas and comprehensions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _global_names(codes: Sequence[CodeType]) -> Iterator[str]:
    """The names of global variables that code reads; ``co_names`` has those of attributes too."""
    for code in codes:
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
