"""The fingerprint of a model: a hash of its values, and of the code that it can reach."""

from __future__ import annotations

import dis
import functools
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import operator
import re
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._compiler import is_compiled
from ..._tensors import digest, text_hash
from ...model_state import EMPTY, PLAIN, SIMPLE, Description, Inside, attributes, is_users, left_out, slots

#: Values that may be instances of a user's class, beside which this class may keep attributes.
_PLAIN_OR_MANY = (*PLAIN, tuple, list, dict, set, frozenset, deque, Tensor, np.ndarray)
#: What is code, or the constants beside it.
_CODE = (
    *PLAIN,
    tuple,
    type,
    CodeType,
    FunctionType,
    MethodType,
    staticmethod,
    classmethod,
    property,
    functools.partial,
)
#: The modules whose objects hold nothing on which a prediction depends, or only a user's function that they wrap.
_INERT = re.compile(
    r"_?(abc|concurrent|io|logging|os|socket|thread|threading|weakref)\b"
    r"|torch\.(_|cuda\b|fx\.(graph|node)\b|utils\.hooks\b)|triton\b"
)
#: The attributes in which objects of libraries keep a function that they wrap.
_WRAPPED = ("__wrapped__", "fn", "func", "py_func", "_init_fn")
#: Objects whose text shows their content.
_SHOWN = (bytearray, operator.itemgetter, operator.attrgetter, operator.methodcaller)
#: Objects of `_INERT` modules that do hold values.
_CLOSED = (threading.local, torch.ScriptObject, io.BytesIO, io.StringIO)
#: Types whose objects have no content.
_EMPTY = (object, type(...), type(NotImplemented), MemberDescriptorType, GetSetDescriptorType)
#: Functions with which code reaches what it does not name.
_DYNAMIC = {("eval",), ("exec",), ("globals",), ("__import__",), ("import_module",), ("importlib", "import_module")}
_STARRED = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def fingerprint(model: object, revision: str | None = None) -> str | None:
    """Hash a model by value: its state, the code that it can reach, and the user's name for the version of the code.

    A model reaches the user's functions and classes that its own code names, and those that these name in turn, and the
    global values that all of them read. The result is None for a function or a value that cannot be compared, unless
    there is such a name.
    """
    if revision is None and not isinstance(model, nn.Module):
        return None
    # A function may record what it did. So only its code counts, beside the user's name.
    values = Values(deep=True, lenient=revision is not None, only_code=not isinstance(model, nn.Module))
    try:
        described = [revision, torch.get_default_dtype(), values.of(_with_state(model))]
        values.lenient = True
        # The list of values grows within the loop, until all that can be reached is described.
        for value in values.values:
            described += values.beyond(value)
            if values.only_code and isinstance(value, CodeType):
                described.append(values.by_value(value, values.of))
        if values.unseen and revision is None:
            described.append(_sources())
    # A user's module may raise any error while its state is read.
    except Exception:
        return None
    return text_hash(repr(described)).hexdigest()


def state_hash(model: Any) -> str:
    """Hash the tensors, modes, hooks, attributes and classes of a module by value."""
    return text_hash(repr(Values().of(_with_state(model)))).hexdigest()


def _with_state(model: Any) -> tuple[Any, Any]:
    model = model._orig_mod if is_compiled(model) else model
    # The state has what is in no attribute, such as the packed weights of quantized layers.
    return model, model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else None


class Values(Description):
    """Describes values by their contents.

    Args:
        deep: whether to look into objects of libraries.
        lenient: whether a value that cannot be compared is described by its type. Otherwise it is an error.
        only_code: whether the contents of tensors, containers and objects do not count, except for the code there.
    """

    def __init__(self, deep: bool = False, lenient: bool = False, only_code: bool = False):
        super().__init__(self.by_value)
        self.deep, self.lenient, self.only_code = deep, lenient, only_code
        #: Whether there is content that cannot be read.
        self.unseen = False

    def of(self, value: Any) -> Any:
        kind, first = type(value), id(value) not in self.seen
        if kind in SIMPLE:
            return value
        try:
            described = super().of(value)
        except Exception:
            if not self.lenient:
                raise
            self.unseen, described = True, kind.__qualname__
        if self.only_code and not isinstance(value, _CODE):
            described = kind.__qualname__
        if isinstance(value, defaultdict):
            described = (described, self.of(value.default_factory))
        if not is_users(kind.__module__):
            return described
        beside = attributes(value) if first and isinstance(value, _PLAIN_OR_MANY) else ()
        return (self.of(kind), self.of(beside), described)

    def by_value(self, value: Any, inside: Inside) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return (kind.__qualname__, digest(value))
        if isinstance(value, np.ndarray):
            return inside(value.tolist() if value.dtype.hasobject else (value.dtype.str, value.shape, value.tobytes()))
        if isinstance(value, torch.Generator):
            return (str(value.device), value.initial_seed())
        if isinstance(value, (MethodType, staticmethod, classmethod)):
            return inside((value.__func__, getattr(value, "__self__", None)))
        if isinstance(value, property):
            return inside((value.fget, value.fset))
        if isinstance(value, functools.partial):
            return inside((value.func, value.args, *value.keywords.items()))
        if isinstance(value, CodeType):
            counts = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags & _STARRED)
            names = (value.co_names, value.co_varnames)
            return inside((value.co_code, *names, value.co_consts, *counts, getattr(value, "co_exceptiontable", b"")))
        if isinstance(value, FunctionType):
            around = tuple(None if cell == EMPTY else cell.cell_contents for cell in value.__closure__ or ())
            set_later = attributes(value) if _is_own(value) else ()
            defaults = (value.__defaults__, *(value.__kwdefaults__ or {}).items())
            return (value.__qualname__, inside((value.__code__, defaults, around, set_later)))
        if isinstance(value, type):
            if issubclass(value, torch.jit.ScriptModule):
                raise TypeError(f"{value.__name__} does not show its code")
            return [(_name(base), inside(_class_code(base))) for base in value.__mro__]
        if isinstance(value, ModuleType):
            return "a module" if is_users(value.__name__) else (value.__name__, _version(value.__name__))
        if is_users(kind.__module__):
            self.unseen |= _hides(kind)
            return (_name(kind), inside(attributes(value)))
        name = getattr(value, "__name__", "")
        return (_name(kind), name, inside(self.inside_library(value, name)) if self.deep else ())

    def inside_library(self, value: Any, name: str) -> Any:
        """Return what an object of a library holds, as far as it can be read."""
        kind: Any = type(value)
        held = dict(attributes(value))
        if isinstance(value, torch.jit.ScriptFunction):
            graph: Any = value.inlined_graph
            return graph.str(False)
        if isinstance(value, re.Pattern):
            return (value.pattern, value.flags)
        if _INERT.match(kind.__module__) or (callable(value) and name):
            # Nothing tells which function of the user an operator calls.
            registered = kind.__module__ == "torch._ops" and not str(value).startswith(("aten.", "prims."))
            self.unseen |= registered or kind.__module__.startswith("triton") or isinstance(value, _CLOSED)
            owner = getattr(value, "__self__", None)
            owner = None if isinstance(owner, ModuleType) else owner
            return ([held.get(each) for each in _WRAPPED], owner, _compiled(str(getattr(value, "__module__", ""))))
        # Objects with a hash of their own are constant, and their text shows their value.
        constant = kind.__hash__ not in (None, object.__hash__) and kind.__repr__ != object.__repr__
        if constant or isinstance(value, _SHOWN):
            standard = kind.__module__.partition(".")[0] in sys.stdlib_module_names
            return (re.sub("0x[0-9a-f]+", "", repr(value)), None if standard else held)
        self.unseen |= (_hides(kind) or (not held and kind.__dictoffset__ == 0)) and kind not in _EMPTY
        return held

    def beyond(self, value: Any) -> list[tuple[str, Any]]:
        """Describe what a function or a module reaches."""
        try:
            return [(name, self.of(part)) for name, part in self._reached_from(value)]
        except Exception:
            self.unseen = True
            return []

    def _reached_from(self, value: Any) -> Iterator[tuple[str, Any]]:
        """The globals that a user's function reads, or the contents of a user's module that code does not look up."""
        if isinstance(value, FunctionType) and _is_own(value):
            yield from self._read_by(value.__code__, value.__globals__)
        elif isinstance(value, ModuleType) and is_users(value.__name__):
            yield "file", _hash_of(getattr(value, "__file__", None))
            yield from [item for item in vars(value).items() if not item[0].startswith("__")]

    def _read_by(self, code: CodeType, around: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for number, step in enumerate(steps):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                after = itertools.takewhile(
                    lambda each: each.opname in ("LOAD_ATTR", "LOAD_METHOD"), steps[number + 1 :]
                )
                path = (step.argval, *(each.argval for each in after))
                self.unseen |= path in _DYNAMIC or path[:2] == ("sys", "modules")
                if step.argval in around:
                    yield ".".join(path), _looked_up(around[step.argval], path[1:])
            elif step.opname == "IMPORT_NAME":
                level, names = (before.argval for before in steps[number - 2 : number])
                package = around.get("__package__") or around.get("__name__", "").rpartition(".")[0]
                yield from _imported("." * level + step.argval, names, package or "of a script")
        # The code of inner functions, comprehensions and classes is among the constants.
        for inner in filter(lambda constant: isinstance(constant, CodeType), code.co_consts):
            yield from self._read_by(inner, around)


def _hides(kind: type) -> bool:
    """Tell whether objects have more content than attributes, as those of a class in C may."""
    # An object of a class in Python has a header, two pointers for all attributes, and a pointer for each slot.
    return kind.__basicsize__ > 32 + 8 * len(slots(kind))


def _looked_up(value: Any, names: Iterable[str]) -> Any:
    """Follow attributes through modules; a library's own value is represented by its module."""
    for name in names:
        if not isinstance(value, ModuleType) or name not in vars(value) or _compiled(value.__name__, value):
            break
        module, value = value, vars(value)[name]
        own = _is_own(value) if isinstance(value, FunctionType) else is_users(getattr(value, "__module__", "") or "re")
        if not (own or is_users(module.__name__) or isinstance(value, (ModuleType, list, *PLAIN))):
            return module
    return value


def _imported(name: str, names: Sequence[str] | None, package: str) -> Iterator[tuple[str, Any]]:
    """The modules that an import inside a function names, or what it takes from a module."""
    name = importlib.util.resolve_name(name, package)
    for whole in [name] if names else itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}"):
        module, parent = sys.modules.get(whole), sys.modules.get(whole.rpartition(".")[0])
        if module is None and (parent is not None or "." not in whole):
            found = importlib.machinery.PathFinder.find_spec(whole, getattr(parent, "__path__", None))
            yield whole, _hash_of(None if found is None else found.origin)
        for each in names or [""] if module is not None else ():
            part = sys.modules.get(f"{whole}.{each}", module)
            yield f"{whole} {each}", _looked_up(module, [each]) if each in vars(module) else part


def _class_code(kind: type) -> tuple[tuple[str, Any], ...]:
    """The user's code in a class: all parts of a user's class, and functions that a user put into a library's class."""
    if not is_users(kind.__module__):
        return tuple(item for item in vars(kind).items() if isinstance(item[1], FunctionType) and _is_own(item[1]))
    parts = [item for item in vars(kind).items() if item[0] not in left_out(kind)]
    code = (classmethod, property)
    return tuple((name, part) for name, part in parts if callable(part) or isinstance(part, code) or name[:2] != "__")


def _name(kind: type) -> str:
    """The name of a class. A user's module has another name when it is a script."""
    if is_users(kind.__module__):
        return f"{kind.__qualname__} {_compiled(kind.__module__)}"
    return f"{kind.__module__} {kind.__qualname__} {_version(kind.__module__)}"


def _version(module: str) -> str:
    return str(getattr(sys.modules.get(module.partition(".")[0]), "__version__", ""))


def _is_own(function: FunctionType) -> bool:
    """Tell whether a function is the user's. The attribute ``__module__`` may be that of a wrapped function."""
    return is_users(function.__globals__.get("__name__", ""))


def _sources() -> list[Any]:
    """The hashes of the source files of the user's loaded modules, and the arguments of the user's script."""
    users = [module for name, module in list(sys.modules.items()) if is_users(name)]
    files = {str(module.__file__) for module in users if getattr(module, "__file__", None)}
    script = getattr(sys.modules["__main__"], "__file__", None) and is_users("__main__")
    return [sorted(filter(None, map(_hash_of, files))), sys.argv[1:] if script else []]


def _compiled(name: str, module: ModuleType | None = None) -> str | None:
    """The hash of the file of a user's module if it is no source file, as that of an extension in C++."""
    file = getattr(module or sys.modules.get(name), "__file__", None) or ""
    return None if file.endswith((".py", ".ipynb")) or not is_users(name) else _hash_of(file)


def _hash_of(file: str | None) -> str | None:
    path = Path(file or "")
    return text_hash(path.read_bytes().hex()).hexdigest() if path.is_file() else None
