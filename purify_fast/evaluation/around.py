"""What a function that is judged as a model has around it: modules in training mode, which nobody switches for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..protocols import Classifier


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
        for where, module in _modules(model, set())
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


def _modules(value: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a callable uses, each with the name by which it uses it.

    Args:
        value: the callable.
        seen: the ids of what was looked through, once each: the ways through functions that call each other are too
            many to walk. It grows.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    for name, held in _held(value):
        if isinstance(held, nn.Module):
            yield name, held
        elif isinstance(held, (FunctionType, MethodType, functools.partial)) or name == "self":
            yield from _modules(held, seen)


def _held(value: Any) -> Iterator[tuple[str, Any]]:
    """What a callable has around it: variables, arguments that were given before, the object that it belongs to."""
    if isinstance(value, functools.partial):
        yield "func", value.func
        yield from ((f"argument {i}", held) for i, held in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield "the method", value.__func__
    elif isinstance(value, FunctionType):
        code = value.__code__
        for name, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                # a variable that has no value yet
                continue
        yield from ((name, value.__globals__[name]) for name in code.co_names if name in value.__globals__)
        yield from (("a default", held) for held in value.__defaults__ or ())
        yield from (value.__kwdefaults__ or {}).items()
    else:
        # an object with a method of its own that is called
        yield from getattr(value, "__dict__", {}).items()
