"""What tells one model from another: its weights, structure and plain attributes."""

from __future__ import annotations

import contextlib
import functools
from types import CodeType
from typing import Any

import torch
from torch import nn

from .._fingerprint import digest, text_hash


def fingerprint(model: object) -> str | None:
    """A hash of a module's weights, structure and attributes; None for everything that is no module.

    What a class computes is not part of it: a module whose ``forward`` was rewritten has the same fingerprint. A
    function that is kept as an attribute, such as an activation, is part of it with its code, its defaults and the
    variables around it, since nothing else tells two of them apart; its docstring and its place in the file do not
    count. Whether a defence's noise is fresh, fixed or off is part of it too.
    """
    if not isinstance(model, nn.Module):
        return None
    plain = [
        (path, type(module).__qualname__, sorted((k, _plain(v)) for k, v in vars(module).items() if _counts(k)))
        for path, module in model.named_modules()
    ]
    # with the buffers that state_dict leaves out
    state = dict((*model.named_parameters(), *model.named_buffers()))
    text = f"{plain}{list(state)}{model!r}"
    return text_hash(text).hexdigest() + digest(*state.values())


def _counts(name: str) -> bool:
    # the state of a defence's noise decides its predictions; the seed beside it is a buffer, and counts as one
    return name == "_noise" or (name != "training" and not name.startswith("_"))


def _plain(value: Any, inside: frozenset[int] = frozenset()) -> str:
    """What stands for an attribute in a fingerprint.

    Functions count with their code and the values they hold, other objects by their type.

    Args:
        value: of the attribute.
        inside: ids of the functions that hold the value. What a function holds is found nowhere else, so that tensors
            and modules count there with their contents.
    """
    if id(value) in inside:
        # a function that calls itself by a name around it
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        held = [value.func, value.args, value.keywords]
        return f"partial {_plain(held, inside | {id(value)})}"
    code = getattr(value, "__code__", None)
    if isinstance(code, CodeType):
        return f"{value.__qualname__} {_code(code, value.__doc__)} {_plain(_held(value), inside | {id(value)})}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(item, inside) for item in value)}]"
    if isinstance(value, dict):
        return _plain([[key, item] for key, item in value.items()], inside)
    if value is None or isinstance(value, (bool, int, float, str, torch.Size, torch.dtype)):
        return repr(value)
    if inside and isinstance(value, torch.Tensor):
        return digest(value)
    if inside and isinstance(value, nn.Module):
        return f"{value!r} {digest(*value.parameters(), *value.buffers())}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _held(function: Any) -> list[Any]:
    """The values a function holds: its defaults, and the variables around it that it uses."""
    around = []
    for cell in function.__closure__ or ():
        # a variable that has no value yet
        with contextlib.suppress(ValueError):
            around.append(cell.cell_contents)
    return [function.__defaults__, function.__kwdefaults__, around]


def _code(code: CodeType, doc: str | None) -> str:
    """What a function does: its instructions, constants and names, without the docstring."""
    constants = [c for i, c in enumerate(code.co_consts) if i > 0 or c is None or c != doc]
    # the text of a nested function's code would have its address in memory
    text = [_code(c, None) if isinstance(c, CodeType) else repr(c) for c in constants]
    return f"{code.co_code.hex()} {text} {code.co_names}"
