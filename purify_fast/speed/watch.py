"""Tells whether what a model holds, or what its tensors hold, may have changed."""

from __future__ import annotations

import enum
import functools
import operator
from collections import OrderedDict
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..model_description import SHARED, SIMPLE
from ..model_state import left_out, slots
from .weights import copy_all

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
    methods = [(getattr(kind, name, None), getattr(base, name, None)) for name in COPYING]
    # Layers of PyTorch complete the state of those that were saved by earlier versions.
    in_torch = [base is nn.Module and str(getattr(own, "__module__", "")).startswith("torch.nn.") for own, _ in methods]
    return is_open(kind) and all(own is usual or ours for (own, usual), ours in zip(methods, in_torch, strict=True))


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
        if hasattr(one, "__dict__"):
            # A subclass of a container may have attributes, too.
            found.append(vars(one))
    return names, found


def _alike(one: Any, other: Any) -> bool:
    """Return True if two objects at the same place are one, or are equal numbers or texts, or equally long containers.

    1, True and 1.0 are different.
    """
    kind: Any = type(one)
    if one is other or kind is not type(other):
        return one is other
    return repr(one) == repr(other) if kind in SIMPLE else kind in _CONTAINERS and len(one) == len(other)


def _alike_copies(one: Any, other: Any) -> bool:
    """Return True if objects at the same place of two copies can differ in the values of tensors only."""
    if isinstance(one, Tensor):
        return type(one) is type(other) and _layout(one)[1:] == _layout(other)[1:] and one.device == other.device
    kind: Any = type(one)
    inside = _inside(kind) != _LEAF and kind is type(other) and (kind not in _CONTAINERS or len(one) == len(other))
    return _alike(one, other) or (inside and (is_open(kind) or issubclass(kind, _CONTAINERS)))


def _layout(one: Tensor) -> tuple[Any, ...]:
    return one.data_ptr(), one.shape, one.stride(), one.dtype


class _Steps:
    """The number of optimizers' steps in this process since the first watch."""

    count = 0
    counted = False


def _stepped(*given: Any) -> None:
    _Steps.count += 1


class Watch:
    """Tells whether modules hold other objects than when it was made, and whether values have changed since `note`.

    No value of a tensor is read. A change is seen by PyTorch's counts of writes. A fused optimizer does not count its
    writes, so any step of any optimizer in the process counts as a change too. The objects are kept alive, because a
    new object may get the id of one that is gone.
    """

    def __init__(self, *roots: nn.Module):
        if not _Steps.counted:
            register_optimizer_step_post_hook(_stepped)
            _Steps.counted = True
        self.roots = roots
        self._names, self.held = held_by(*roots)
        parts = [part for root in roots for part in root.modules()]
        self._groups = [held for part in parts for held in (part._parameters, part._buffers, part._modules) if held]
        named = [(vars(part), name) for part in parts for name in vars(part)]
        self._named = [(held, name) for held, name in named if isinstance(held[name], Tensor)]
        self._tensors = list({id(one): one for one in self.held if isinstance(one, Tensor)}.values())
        # A tensor that was made in inference mode has no count.
        self._counted = [one for one in self._tensors if not one.is_inference()]
        self.has_uncounted = len(self._counted) < len(self._tensors)
        #: The memory is kept alive too, because ``.data`` may be given other memory at the same address.
        self._memory = [one.detach() for one in self._tensors]
        self._layouts = self._laid_out()
        self.note()

    def note(self) -> None:
        """Remember the present counts of writes."""
        self._steps, self._seen = _Steps.count, self._now()

    def changed(self) -> bool:
        """Return True if a tensor may have been written to, or exchanged, since the last `note`."""
        return self.has_uncounted or self._steps != _Steps.count or self._now() != self._seen

    def same(self) -> bool:
        """Return True if the modules hold what they held at first, but for modes and the values of tensors."""
        names, held = held_by(*self.roots)
        if names != self._names or len(held) != len(self.held):
            return False
        same = all(map(operator.is_, held, self.held)) or all(map(_alike, held, self.held))
        return same and self._laid_out() == self._layouts

    def took(self, *copies: nn.Module) -> bool:
        """Write the values of other copies into the tensors of these modules, if they differ in nothing else.

        Captured and compiled steps read the tensors of the modules that were there first. Tensors that came from
        elsewhere, such as images that a forward pass has kept in an attribute, are never written to.
        """
        names, held = held_by(*copies)
        if names != self._names or len(held) != len(self.held) or not all(map(_alike_copies, self.held, held)):
            return False
        pairs = [(one, new) for one, new in zip(self.held, held, strict=True) if isinstance(one, Tensor)]
        both = {(id(one), id(new)): (one, new) for one, new in pairs}
        # Tensors are shared alike in both, if each has one partner.
        shared_alike = len(both) == len({id(one) for one, _ in pairs}) == len({id(new) for _, new in pairs})
        if not shared_alike or not self.same():
            return False
        copy_all(both.values())
        return True

    def swapped(self) -> bool:
        """Return True if a parameter is another one than at first, as in a call of ``torch.func.functional_call``."""
        at_first = set(map(id, self._tensors))
        return any(id(one) not in at_first for root in self.roots for one in root.parameters())

    def again(self) -> Watch:
        """Return this watch with the present counts if the modules are the same, or else a new one."""
        if not self.same():
            return Watch(*self.roots)
        self.note()
        return self

    def _laid_out(self) -> list[Any]:
        return [_layout(one) for one in self._tensors]

    def _now(self) -> list[int]:
        # Every call of a frozen copy runs this function, so it must be fast.
        now = [id(one) for held in self._groups for one in held.values()]
        now += [one._version for one in self._counted]
        now += [one.data_ptr() for one in self._tensors]
        now += [id(held.get(name)) for held, name in self._named]
        return now

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of what is watched must be watched anew, so a copy or pickle of this object is None.
        return type(None), ()
