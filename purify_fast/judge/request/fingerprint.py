"""The fingerprint of a model: a hash of its values, and of the user's source files that define and help its code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._compiler import is_compiled
from ..._hashes import digest, text_hash
from ...model_description import NAMESPACES, PLAIN, SIMPLE, Description, Inside
from ...model_state import EMPTY, attributes, is_users, left_out

#: What decides the results of what calls a function.
_IN_METHODS = ("__func__", "__self__", "fget", "fset", "func", "args", "keywords")
_METHODS = (MethodType, staticmethod, classmethod, property, functools.partial)
#: What is code, or the constants beside it.
_CODE = (*PLAIN, tuple, type, ModuleType, FunctionType, *_METHODS, *NAMESPACES)


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash a model by value: its state, the source files of the user's code, and the user's name for its version.

    The result is None for a function, for a value that cannot be compared and for code without a source, unless there
    is such a name.
    """
    if revision is None and not isinstance(model, nn.Module):
        return None
    # A function may record what it did. So only its code counts, beside the user's name.
    values = _Values((Exception,) if revision is not None else (), only_code=not isinstance(model, nn.Module))
    try:
        described = [revision, torch.get_default_dtype(), values.of(_with_state(model)), _sources(values)]
    # A user's module may raise any error while its state is read.
    except Exception:
        return None
    return text_hash(repr(described)).hexdigest()


def state_hash(model: Any) -> str:
    """Hash the tensors, modes, hooks, attributes and classes of a module by value."""
    return text_hash(repr(_Values().of(_with_state(model)))).hexdigest()


def _with_state(model: Any) -> tuple[Any, Any]:
    model = model._orig_mod if is_compiled(model) else model
    # The state has what is in no attribute, such as the packed weights of quantized layers.
    return model, model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else None


class _Values(Description):
    """Describes values by their contents.

    Args:
        ignored: the errors after which a value that cannot be compared counts by its type.
        only_code: whether tensors, containers and objects count by their type.
    """

    def __init__(self, ignored: tuple[type[Exception], ...] = (), only_code: bool = False):
        super().__init__(_by_value)
        self.ignored, self.only_code = ignored, only_code

    def of(self, value: Any) -> Any:
        kind: Any = type(value)
        first = id(value) not in self.seen
        try:
            described = super().of(value)
        except self.ignored:
            described = kind.__qualname__
        # The code inside of containers is described, too.
        if self.only_code and not isinstance(value, _CODE):
            described = kind.__qualname__
        if kind in SIMPLE or not is_users(kind.__module__):
            return described
        return described, self.of(kind), self.of(attributes(value) if first else ())


def _by_value(value: Any, inside: Inside) -> Any:
    kind: Any = type(value)
    if isinstance(value, Tensor):
        return (kind.__qualname__, digest(value))
    if isinstance(value, np.ndarray):
        return inside(value.tolist() if value.dtype.hasobject else (value.dtype.str, value.shape, value.tobytes()))
    if isinstance(value, torch.Generator):
        return (str(value.device), value.initial_seed())
    if isinstance(value, _METHODS):
        return inside(tuple(getattr(value, name, None) for name in _IN_METHODS))
    if isinstance(value, FunctionType):
        code, users = value.__code__, _is_users_function(value)
        around = tuple(None if cell == EMPTY else cell.cell_contents for cell in value.__closure__ or ())
        given = (value.__defaults__, value.__kwdefaults__, around, attributes(value) if users else ())
        # Two functions may be in the same line.
        text = (code.co_code, code.co_names, tuple(part for part in code.co_consts if isinstance(part, PLAIN)))
        return (value.__qualname__, text, inside((sys.modules.get(_home(value)), *given)))
    if isinstance(value, type):
        if issubclass(value, torch.jit.ScriptModule):
            raise TypeError(f"{value.__name__} does not show its code")
        return [inside((sys.modules.get(base.__module__), base.__qualname__, _parts(base))) for base in value.__mro__]
    if isinstance(value, ModuleType):
        # Processes that a script starts know the script by another name.
        name = value.__name__
        return (not is_users(name) and name, getattr(sys.modules.get(name.partition(".")[0]), "__version__", ""))
    named = (inside(sys.modules.get(kind.__module__)), kind.__qualname__, getattr(value, "__name__", ""))
    return named if is_users(kind.__module__) else (*named, inside(_in_library(value)))


def _in_library(value: Any) -> tuple[str, Any]:
    """Return what an object of a library holds; for an object of Python or PyTorch, such as a lock, its functions."""
    kind: Any = type(value)
    # An object with a hash of its own is constant, and its text shows its value.
    text = "" if kind.__hash__ in (None, object.__hash__) else re.sub("0x[0-9a-f]+", "", repr(value))
    closed = text or kind.__module__.partition(".")[0] in ("torch", *sys.stdlib_module_names)
    opened = not closed or isinstance(value, torch.distributions.Distribution)
    return text, [item for item in attributes(value) if opened or isinstance(item[1], FunctionType)]


def _parts(kind: type) -> list[tuple[str, Any]]:
    """The parts of a user's class, and the functions that a user put into a library's class."""
    parts = [item for item in vars(kind).items() if item[0] not in left_out(kind)]
    called = (item for item in parts if callable(item[1]) or isinstance(item[1], _METHODS) or item[0][:2] != "__")
    return [item for item in called if is_users(kind.__module__) or _is_users_function(item[1])]


def _sources(values: _Values) -> list[Any]:
    """The source files of the user's modules that values reach, and the constants that their code reads.

    A module reaches every loaded module that its file mentions, and every file beside it that it may import later. A
    function without a file counts by its own text, as in a notebook. Raises an OSError if there is no text.
    """
    # What modules hold beside the model's code may be a value that cannot be compared.
    unneeded, values.ignored = values.ignored, (Exception,)
    users = {name: module for name, module in sorted(sys.modules.items()) if is_users(name)}
    found, files = list[Any](), set[Path]()
    # The list of values grows within the loop, until all that can be reached is described.
    for value in values.values:
        if isinstance(value, ModuleType) and (file := _file(value)).is_file() and is_users(value.__name__):
            words = set(re.findall(r"\w+", file.read_text(encoding="utf-8", errors="replace")))
            files |= {file, *(file.with_name(f"{word}.py") for word in words)}
            found.append(values.of(tuple(part for name, part in users.items() if name.rpartition(".")[2] in words)))
            # The results in a script's global values are no constants.
            held = [] if value is sys.modules["__main__"] else sorted(vars(value).items())
            found.append([(name, values.of(part)) for name, part in held if name[:2] != "__" and _is_constant(part)])
        elif _is_users_function(value):
            # A script may read a constant from its command line. A container may record what the code did.
            own, file = value.__globals__, Path(value.__code__.co_filename)
            read = ((name, own.get(name, own)) for name in sorted(_names(value.__code__)))
            found.append(values.of(tuple(item for item in read if isinstance(item[1], _CODE))))
            files.add(file)
            # A function that a module with a file has made, such as the `__init__` of a dataclass, shows in this file.
            if not file.is_file() and not _file(sys.modules.get(_home(value))).is_file():
                with contextlib.suppress(*unneeded):
                    found.append(inspect.getsource(value))
    return [*found, *sorted(text_hash(str(file.read_bytes())).hexdigest() for file in files if file.is_file())]


def _is_constant(value: Any) -> bool:
    """Return True if a value is a number, a text, a tuple of them, or a namespace, such as the options of a script."""
    return SIMPLE.issuperset(map(type, value if type(value) is tuple else [value])) or isinstance(value, NAMESPACES)


def _file(module: ModuleType | None) -> Path:
    return Path(getattr(module, "__file__", None) or "")


def _names(code: CodeType) -> set[str]:
    """The names in a code object, and in those of its inner functions."""
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _home(function: FunctionType) -> str:
    """The name of a function's module. The attribute ``__module__`` may be that of a wrapped function."""
    return str(function.__globals__.get("__name__", "unknown"))


def _is_users_function(value: Any) -> bool:
    return isinstance(value, FunctionType) and is_users(_home(value))
