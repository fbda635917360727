"""Lists the objects that models hold, tells whether these are other ones now, and copies a model with all of them."""

from __future__ import annotations

import copy
import enum
import functools
import itertools
import operator
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._modules import left_out, slots
from ..model_state import SHARED, SIMPLE, hidden_modules
from .draws import own_generators
from .watch import Watch, copy_all, tensors_of

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
def is_plain(kind: Any) -> bool:
    """Return True if `held_by` lists all that the objects of a class hold, and PyTorch or Python alone copies them."""
    if kind in SIMPLE or kind in _CONTAINERS or issubclass(kind, (np.generic, enum.Enum, *SHARED)):
        return True
    # An object of C, or with slots, may hold what no attribute shows.
    in_python = all(base is object or base.__flags__ & _OF_PYTHON for base in kind.__mro__)
    if _inside(kind) != _ATTRIBUTES or not in_python or slots(kind):
        return False
    base: Any = nn.Module if issubclass(kind, nn.Module) else object
    # Objects of this package leave out only what belongs to a call. Layers of PyTorch complete the state of those that
    # were saved by earlier versions.
    owner = "torch.nn." if base is nn.Module else "purify_fast."
    methods = [
        getattr(kind, name, None) for name in COPYING if getattr(kind, name, None) is not getattr(base, name, None)
    ]
    return all(str(getattr(method, "__module__", "")).startswith(owner) for method in methods)


@functools.lru_cache(maxsize=4096)
def _without(kind: Any) -> dict[str, None]:
    """The attributes of a class's objects that do not count: the modes, and those that `left_out` names."""
    return dict.fromkeys({"training", *(left_out(kind) - _REGISTERED), *getattr(kind, "noise_modes", ())})


def held_by(*roots: Any) -> tuple[list[str], list[Any]]:
    """List all that objects hold: the names of attributes, and all objects, those inside others after them."""
    names, items, seen = list[str](), list(roots), set[int]()
    # This loop runs for each reading, so it must be fast.
    for item in items:
        kind: Any = type(item)
        inside = _inside(kind)
        if inside == _LEAF or (inside != _ATTRIBUTES and not item) or id(item) in seen:
            continue
        seen.add(id(item))
        if inside == _ATTRIBUTES:
            state = vars(item) | _without(kind)
            names += state
            items.append(kind)
            items += state.values()
            continue
        items += item
        if inside == _ITEMS:
            items += item.values()
        # A subclass of a container may have attributes, too.
        items.append(getattr(item, "__dict__", None))
    return names, items


def _alike(item: Any, other: Any) -> bool:
    """Return True if two objects at the same place are one, or are equal numbers or texts, or equally long containers.

    1, True and 1.0 are different.
    """
    kind: Any = type(item)
    if item is other or kind is not type(other):
        return item is other
    return repr(item) == repr(other) if kind in SIMPLE else kind in _CONTAINERS and len(item) == len(other)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Snapshot(Watch):
    """The objects that modules hold, except modes. They are kept alive, so an equal identity is the same object."""

    def __init__(self, *roots: nn.Module):
        super().__init__(*roots)
        self._names, self.held = held_by(*roots)
        self._all = [item for item in self.held if isinstance(item, Tensor)]
        self._kept = [item.detach() for item in self._all]
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


# -- copies of a model with all that it holds --------------------------------------------------------------------------

#: The types of tensors that this module copies itself. A tensor of another type knows how to copy itself.
PLAIN = (Tensor, nn.Parameter)


def memo_of(parts: Iterable[nn.Module]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` with copies of the tensors of modules, and with their random generators themselves.

    Tensors with a history, such as the outputs of layers that hooks keep, lose it: PyTorch cannot copy them with it.
    Tensors that share memory are left to `copy.deepcopy`.
    """
    held, parts = dict[int, Tensor](), list(parts)
    memo: dict[int, Any] = {id(item): item for item in own_generators(parts)}
    for part in parts:
        for value in itertools.chain(part._parameters.values(), part._buffers.values(), vars(part).values()):
            if type(value) in PLAIN and value.layout == torch.strided:
                held[id(value)] = value
    memories = Counter(value.untyped_storage().data_ptr() for value in held.values() if value.numel())
    alone = [item for item in held.values() if not item.is_leaf or memories[item.untyped_storage().data_ptr()] == 1]
    new = [torch.empty_like(item) for item in alone]
    copy_all(zip(new, alone, strict=True))
    for old, copied in zip(alone, new, strict=True):
        memo[id(old)] = nn.Parameter(copied, old.requires_grad) if isinstance(old, nn.Parameter) else copied
    return memo


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a model with all that it holds, except its random generators, which the copy shares."""
    try:
        return copy.deepcopy(model, memo_of(model.modules()) if memo is None else memo)
    except (RuntimeError, TypeError) as error:
        reason = f"an object that cannot be copied: {error}"
        if "deepcopy protocol" in str(error):
            reason = "a tensor with a history in a list or an object: keep value.detach() there"
        raise TypeError(f"{type(model).__name__} holds {reason}") from error


def computes_in_modes(part: nn.Module) -> bool:
    """Return True if a module does more in ``train()`` or ``eval()`` than to set its mode and those of its parts."""
    kind = type(part)
    sets_modes_only = getattr(kind.train, "sets_modes_only", kind.train is nn.Module.train)
    return not sets_modes_only or kind.eval is not nn.Module.eval or bool({"train", "eval"} & vars(part).keys())


def only_registered(*models: nn.Module) -> bool:
    """Return True if copies of models in the same modes can differ in the values of parameters and buffers only.

    This is so if PyTorch, Python's containers and functions alone decide what a copy is.
    """
    registered = {id(tensor) for model in models for _, tensor in tensors_of(model)}
    held: list[Any] = held_by(*models)[1]
    # A copy has the present modes of the noise, which `held_by` leaves out.
    parts: list[Any] = [item for item in held if isinstance(item, nn.Module)]
    odd = any(computes_in_modes(part) or getattr(part, "noise_modes", ()) for part in parts)
    return not odd and all(
        id(item) in registered if isinstance(item, Tensor) else is_plain(item.__class__) for item in held
    )


def freeze(copied: nn.Module) -> nn.Module:
    """Put a copied model into evaluation mode, in place, without gradients of its weights; hidden networks too."""
    for network in (copied, *(module for _, module in hidden_modules(copied))):
        network.requires_grad_(False).eval()
    return copied
