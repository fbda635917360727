"""Lists the objects that models hold, and tells whether these are other ones now."""

from __future__ import annotations

import enum
import functools
import operator
from collections import OrderedDict
from typing import Any

import numpy as np
from torch import Tensor, nn

from .._modules import left_out, slots
from ..model_state import SHARED, SIMPLE
from .watch import Watch

#: The methods by which a class may decide how its objects are copied.
COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__")
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)
#: The flag of a class that is written in Python (``Py_TPFLAGS_HEAPTYPE``).
_OF_PYTHON = 1 << 9
#: How `held_by` looks into an object: not at all, at its members, or at its attributes.
_LEAF, _MEMBERS, _ITEMS, _ATTRIBUTES = range(4)
_REGISTERED = vars(nn.Module()).keys() - {"training"}


@functools.lru_cache(maxsize=4096)
def _inside(kind: Any) -> int:
    """How `held_by` looks into the objects of a class."""
    if kind in SIMPLE or issubclass(kind, (np.generic, enum.Enum, Tensor, *SHARED)):
        return _LEAF
    if issubclass(kind, _CONTAINERS):
        return _ITEMS if issubclass(kind, dict) else _MEMBERS
    return _ATTRIBUTES if getattr(kind, "__dictoffset__", 0) else _LEAF


@functools.lru_cache(maxsize=4096)
def is_open(kind: Any) -> bool:
    """Return True if `held_by` lists all that the objects of a class hold, such as none for numbers and functions."""
    if kind in SIMPLE or issubclass(kind, (np.generic, enum.Enum, *SHARED)):
        return True
    # An object of C, or with slots, may hold what no attribute shows.
    in_python = all(base is object or base.__flags__ & _OF_PYTHON for base in kind.__mro__)
    return kind in _CONTAINERS or (_inside(kind) == _ATTRIBUTES and in_python and not slots(kind))


@functools.lru_cache(maxsize=4096)
def is_plain(kind: Any) -> bool:
    """Return True if `is_open`, and PyTorch or Python alone decides how objects of the class are copied."""
    if _inside(kind) != _ATTRIBUTES:
        return is_open(kind)
    base: Any = nn.Module if issubclass(kind, nn.Module) else object
    # Objects of this package leave out only what belongs to a call. Layers of PyTorch complete the state of those that
    # were saved by earlier versions.
    known = "torch.nn." if base is nn.Module else "purify_fast."
    methods = [
        getattr(kind, name, None) for name in COPYING if getattr(kind, name, None) is not getattr(base, name, None)
    ]
    return is_open(kind) and all(str(getattr(method, "__module__", "")).startswith(known) for method in methods)


@functools.lru_cache(maxsize=4096)
def _without(kind: Any) -> dict[str, None]:
    """The attributes of a class's objects that do not count: the modes, and those that `left_out` names."""
    return dict.fromkeys({"training", *(left_out(kind) - _REGISTERED), *getattr(kind, "noise_modes", ())})


def held_by(*roots: Any) -> tuple[list[str], list[Any]]:
    """List all that objects hold: the names of attributes, and all objects, those inside others after them."""
    names, found, seen = list[str](), list(roots), set[int]()
    # This loop runs for each reading, so it must be fast.
    for one in found:
        kind: Any = type(one)
        inside = _inside(kind)
        if inside == _LEAF or (inside != _ATTRIBUTES and not one) or id(one) in seen:
            continue
        seen.add(id(one))
        if inside == _ATTRIBUTES:
            state = vars(one) | _without(kind)
            names += state
            found.append(kind)
            found += state.values()
            continue
        found += one
        if inside == _ITEMS:
            found += one.values()
        # A subclass of a container may have attributes, too.
        found.append(getattr(one, "__dict__", None))
    return names, found


def _alike(one: Any, other: Any) -> bool:
    """Return True if two objects at the same place are one, or are equal numbers or texts, or equally long containers.

    1, True and 1.0 are different.
    """
    kind: Any = type(one)
    if one is other or kind is not type(other):
        return one is other
    return repr(one) == repr(other) if kind in SIMPLE else kind in _CONTAINERS and len(one) == len(other)


def _layout(one: Tensor) -> tuple[Any, ...]:
    return one.data_ptr(), one.shape, one.stride(), one.dtype


class Snapshot(Watch):
    """The objects that modules hold, except modes. They are kept alive, so an equal identity is the same object."""

    def __init__(self, *roots: nn.Module):
        super().__init__(*roots)
        self._names, self.held = held_by(*roots)
        self._all = [one for one in self.held if isinstance(one, Tensor)]
        self._kept = [one.detach() for one in self._all]
        self._layouts = list(map(_layout, self._all))

    def same(self) -> bool:
        """Return True if the modules hold what they held at first, but for modes and the values of tensors."""
        names, held = held_by(*self.roots)
        if names != self._names or len(held) != len(self.held):
            return False
        same = all(map(operator.is_, held, self.held)) or all(map(_alike, held, self.held))
        return same and list(map(_layout, self._all)) == self._layouts

    def again(self) -> Snapshot:
        """Return this snapshot with the present counts if the modules are the same, or else a new one."""
        if not self.same():
            return Snapshot(*self.roots)
        self.note()
        return self
