"""What tells one model from another: its weights, structure and plain attributes."""

from __future__ import annotations

import contextlib
import functools
import sys
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from .._fingerprint import digest, text_hash


def fingerprint(model: object) -> str | None:
    """A hash of a module's weights, structure, attributes and code; None for everything that is no module.

    The code is that of a user's own classes, of the functions that they call, and of the constants that they read:
    whoever edits a defence and evaluates it again must not be given the rows of the defence before. Comments,
    docstrings and the place in the file do not count. The code of PyTorch and of this package is not part of it. A
    function that is kept as an attribute, such as an activation, counts with its code, its defaults and the variables
    around it. Whether a defence's noise is fresh, fixed or off is part of it too.
    """
    if not isinstance(model, nn.Module):
        return None
    plain = [
        (path, type(module).__qualname__, sorted((k, _plain(v)) for k, v in vars(module).items() if _counts(k)))
        for path, module in model.named_modules()
    ]
    # with the buffers that state_dict leaves out
    state = dict((*model.named_parameters(), *model.named_buffers()))
    code = [_class(kind) for kind in dict.fromkeys(type(module) for module in model.modules())]
    text = f"{plain}{list(state)}{model!r}{code}"
    return text_hash(text).hexdigest() + digest(*state.values())


def _counts(name: str) -> bool:
    # the state of a defence's noise decides its predictions; the seed beside it is a buffer, and counts as one
    return name == "_noise" or (name != "training" and not name.startswith("_"))


#: Packages whose code is told by their version, or by this package's own.
_KNOWN = {"torch", "torchvision", "numpy", "purify_fast", *sys.stdlib_module_names} - {"__main__"}


def _is_own(value: Any) -> bool:
    """Whether a class or function is of a user, and not of a library whose version tells its code."""
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0] not in _KNOWN


def _class(kind: type, inside: frozenset[int] = frozenset()) -> str:
    """What a class of a user computes: the code of its methods and its plain attributes, and of its bases."""
    found = []
    for base in kind.__mro__:
        if not _is_own(base) or id(base) in inside:
            continue
        within = inside | {id(base)}
        for name, value in sorted(vars(base).items()):
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            # as of instances: what begins with an underscore is no setting
            if not name.startswith("_") or isinstance(value, FunctionType):
                found.append(f"{name} {_plain(value, within)}")
    return f"{kind.__qualname__} {found}"


def _plain(value: Any, inside: frozenset[int] = frozenset()) -> str:
    """What stands for an attribute in a fingerprint.

    Functions count with their code and the values they hold, a user's own objects with their class and attributes, and
    other objects by their type.

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
        within = inside | {id(value)}
        used = _used(value, code) if _is_own(value) else []
        return (
            f"{value.__qualname__} {_code(code, value.__doc__)} {_plain(_held(value), within)} {_plain(used, within)}"
        )
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
    if isinstance(value, type):
        return _class(value, inside) if _is_own(value) else value.__qualname__
    if isinstance(value, ModuleType):
        return value.__name__
    if _is_own(type(value)) and not isinstance(value, (torch.Tensor, nn.Module)):
        held = sorted(getattr(value, "__dict__", {}).items())
        return f"{_class(type(value), inside)} {_plain(held, inside | {id(value)})}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _used(function: Any, code: CodeType) -> list[Any]:
    """The module's variables that a function names, by name: constants, and functions and classes of the user."""
    names = {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= {*constant.co_names}
    around = getattr(function, "__globals__", {})
    return [[name, around[name]] for name in sorted(names & around.keys())]


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
