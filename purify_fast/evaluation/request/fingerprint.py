"""The fingerprint of a model: a hash of its values, and of the user's code that it reaches."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._compiler import is_compiled
from ..._tensors import digest, text_hash
from ...model_state import EMPTY, NAMESPACES, PLAIN, SIMPLE, Description, Inside, attributes, is_users, left_out

#: What decides the results of code, and of what calls a function.
_IN_CODE = ("code", "names", "varnames", "consts", "argcount", "kwonlyargcount", "flags", "exceptiontable")
_IN_METHODS = ("__func__", "__self__", "fget", "fset", "func", "args", "keywords")
_METHODS = (MethodType, staticmethod, classmethod, property, functools.partial)
#: What is code, or the constants beside it.
_CODE = (*PLAIN, tuple, type, ModuleType, FunctionType, *_METHODS, *NAMESPACES)


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash a model by value: its state, the user's code that it reaches, and the user's name for the code's version.

    The result is None for a function or a value that cannot be compared, unless there is such a name.
    """
    if revision is None and not isinstance(model, nn.Module):
        return None
    # A function may record what it did. So only its code counts, beside the user's name.
    values = _Values((Exception,) if revision is not None else (), only_code=not isinstance(model, nn.Module))
    try:
        described = [revision, torch.get_default_dtype(), values.of(_with_state(model)), *_code(values)]
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
        only_code: whether tensors, containers and objects count by their type, except for the code in them.
    """

    def __init__(self, ignored: tuple[type[Exception], ...] = (), only_code: bool = False):
        super().__init__(_by_value)
        self.ignored, self.only_code = ignored, only_code

    def of(self, value: Any) -> Any:
        kind: Any = type(value)
        first = id(value) not in self.seen
        users = kind not in SIMPLE and _is_users_class(kind)
        if isinstance(value, CodeType):
            return tuple(self.of(getattr(value, f"co_{name}", None)) for name in _IN_CODE)
        try:
            described = super().of(value)
        except self.ignored:
            described = kind.__qualname__
        if self.only_code and not isinstance(value, _CODE):
            described = kind.__qualname__
        return (described, self.of(kind), self.of(attributes(value) if first else ())) if users else described


@functools.lru_cache(maxsize=4096)
def _is_users_class(kind: type) -> bool:
    return is_users(kind.__module__)


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
        around = tuple(None if cell == EMPTY else cell.cell_contents for cell in value.__closure__ or ())
        given = (value.__defaults__, value.__kwdefaults__, around, attributes(value) if _home(value) else ())
        return (value.__qualname__, inside((sys.modules.get(_home(value)), value.__code__, *given)))
    if isinstance(value, type):
        if issubclass(value, torch.jit.ScriptModule):
            raise TypeError(f"{value.__name__} does not show its code")
        return [inside(_class_code(base)) for base in value.__mro__]
    if isinstance(value, ModuleType):
        # Processes that a script starts know the script by another name.
        name = "" if value is sys.modules["__main__"] else value.__name__
        return (name, getattr(sys.modules.get(name.partition(".")[0]), "__version__", ""))
    named = (inside(sys.modules.get(kind.__module__)), kind.__qualname__, getattr(value, "__name__", ""))
    return named if _is_users_class(kind) else (*named, inside(_in_library(value)))


def _in_library(value: Any) -> tuple[str, Any]:
    """Return what an object of a library holds; for an object of Python or PyTorch, such as a lock, its functions."""
    kind: Any = type(value)
    # An object with a hash of its own is constant, and its text shows its value.
    text = "" if kind.__hash__ in (None, object.__hash__) else re.sub("0x[0-9a-f]+", "", repr(value))
    closed = text or kind.__module__.partition(".")[0] in ("torch", *sys.stdlib_module_names)
    opened = not closed or isinstance(value, torch.distributions.Distribution)
    return text, [item for item in attributes(value) if opened or isinstance(item[1], FunctionType)]


def _class_code(kind: type) -> tuple[Any, str, list[tuple[str, Any]]]:
    """The parts of a user's class, and the functions that a user put into a library's class."""
    parts = [item for item in vars(kind).items() if item[0] not in left_out(kind)]
    called = (item for item in parts if callable(item[1]) or isinstance(item[1], _METHODS) or item[0][:2] != "__")
    own = [item for item in called if is_users(kind.__module__) or _home(item[1])]
    return sys.modules.get(kind.__module__), kind.__qualname__, own


def _code(values: _Values) -> Iterator[Any]:
    """Describe the user's code that values reach.

    A module counts by its file and its global values. A function that is in no such file, as one of the user's script,
    counts by its code and the global values that the code names. Both reach every loaded module that they mention, and
    every file beside them that they may import later.
    """
    values.ignored = (Exception,)
    read = functools.partial(Path.read_text, encoding="utf-8", errors="backslashreplace")
    users = {key: part for key, part in sorted(sys.modules.items()) if isinstance(part, ModuleType) and is_users(key)}
    loaded = {name: module for name, module in users.items() if Path(getattr(module, "__file__", None) or "").is_file()}
    modules = {name: module for name, module in loaded.items() if module is not sys.modules["__main__"]}
    # The list of values grows within the loop, until all that can be reached is described.
    for value in values.values:
        if isinstance(value, ModuleType) and value.__name__ in modules:
            name, package, file = value.__name__, value.__name__.rpartition(".")[0], Path(str(value.__file__))
            text = read(file)
            # Python sets a package's modules as its attributes, even those that another module imports.
            held = sorted(item for item in vars(value).items() if item[1] is not users.get(f"{name}.{item[0]}"))
            yield text, values.of(tuple(item for item in held if item[0][:2] != "__")), values.of(modules.get(package))
        elif (home := _home(value)) and home not in modules:
            file, names = Path(value.__code__.co_filename), sorted(_names(value.__code__))
            text = f"import {' '.join(names)}"
            yield _by_value(value, values.of), [(name, values.of(value.__globals__.get(name))) for name in names]
        else:
            continue
        mentioned = set(re.findall(r"\w+", text))
        yield [values.of(module) for name, module in modules.items() if name.rpartition(".")[2] in mentioned]
        imported = re.findall(r"\w+", " ".join(re.findall(".*import.*", text)))
        yield [read(path) for path in sorted(file.parent.glob("*.py")) if path.stem in imported and path != file]


def _names(code: CodeType) -> set[str]:
    """The names in a code object, and in those of its inner functions."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return {part for name in code.co_names for part in name.split(".")}.union(*inner)


def _home(value: Any) -> str:
    """The module of a user's function, else nothing. The attribute ``__module__`` may be that of a wrapped function."""
    home = str(value.__globals__.get("__name__", "unknown")) if isinstance(value, FunctionType) else ""
    return home if home and is_users(home) else ""
