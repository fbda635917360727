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

from .._modules import slots
from ..model_state import SHARED, SIMPLE, describe, hidden_modules
from .draws import own_generators
from .watch import Watch, copy_all, tensors_of

#: The methods by which a class may decide how its objects are copied.
COPYING = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs_ex__")
_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict)
#: The flag of a class that is written in Python (``Py_TPFLAGS_HEAPTYPE``).
_OF_PYTHON = 1 << 9


@functools.lru_cache(maxsize=4096)
def is_plain(kind: Any) -> bool:
    """Return True if `describe` lists all that the objects of a class hold, and PyTorch or Python alone copies them."""
    if kind in SIMPLE or kind in _CONTAINERS or issubclass(kind, (np.generic, enum.Enum, *SHARED)):
        return True
    # An object of C, or with slots, may hold what no attribute shows.
    in_python = all(base is object or base.__flags__ & _OF_PYTHON for base in kind.__mro__)
    if not getattr(kind, "__dictoffset__", 0) or not in_python or slots(kind):
        return False
    base: Any = nn.Module if issubclass(kind, nn.Module) else object
    # Objects of this package leave out only what belongs to a call. Layers of PyTorch complete the state of those that
    # were saved by earlier versions.
    owner = "torch.nn." if base is nn.Module else "purify_fast."
    methods = [
        getattr(kind, name, None) for name in COPYING if getattr(kind, name, None) is not getattr(base, name, None)
    ]
    return all(str(getattr(method, "__module__", "")).startswith(owner) for method in methods)


class Snapshot(Watch):
    """A description of modules without modes. All that they hold is kept alive, so that no address is used again."""

    def __init__(self, *roots: nn.Module):
        super().__init__(*roots)
        self.held = describe(*roots, modes=False)

    def same(self) -> bool:
        """Return True if the modules hold what they held at first, but for modes and the values of tensors."""
        now = describe(*self.roots, modes=False)
        return now.key == self.held.key and all(map(operator.is_, now.tensors, self.held.tensors))

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
    held = describe(*models).items
    # A copy has the present modes of the noise, which a snapshot leaves out.
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
