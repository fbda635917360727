"""What a model computes with, as plain values: a captured step may be replayed while these are the same.

A captured step reads the memory that its model had when it was captured. What is written there in place, it sees:
an optimizer's step, a refreshed inference copy, new running statistics. What makes it wrong is anything else: a weight
that is another tensor now, another mode, another number of samples. `dependencies` lists all that it can see of a
model: its tensors by their addresses, its settings by their values, and any other object by its identity. So what a
class of the user's own, which is no module, changes inside itself is not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
#: Standard objects that hold settings.
_SETTINGS = (types.SimpleNamespace, argparse.Namespace)
_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
#: The attributes of a bare module; of these only the mode, the tensors, the parts and the hooks count.
BARE = frozenset(vars(nn.Module()))
#: Those of them that hold what is called with a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def dependencies(model: nn.Module) -> tuple[tuple[Any, ...], list[Any]]:
    """What ``model`` computes with now.

    Args:
        model: a module. The objects of this package that it holds are looked into, and so are dataclasses,
            ``types.SimpleNamespace`` and ``argparse.Namespace``. Any other object counts by its identity: what changes
            inside it is not seen. A class names in ``not_dependencies`` the attributes that its computation does not
            depend on.

    Returns:
        The values, which can be hashed, and the objects that stand among them by their identity: who keeps the values
        keeps these too, so that no other object is taken for one of them.

    Raises:
        TypeError: a tensor of a class of its own, such as the part of a sharded weight, whose memory is elsewhere.
    """
    values, objects, _ = dependencies_and_tensors(model)
    return values, objects


def dependencies_and_tensors(model: nn.Module) -> tuple[tuple[Any, ...], list[Any], list[Tensor]]:
    """The `dependencies` of a model, and the tensors that stand among the values by their addresses.

    Args:
        model: as `dependencies` takes it.

    Returns:
        The values and the objects of `dependencies`, and the tensors, each once, in the order of the values.

    Raises:
        TypeError: as `dependencies`.
    """
    walk = _Walk()
    walk.add(model)
    tensors = list({id(part): part for part in walk.objects if isinstance(part, Tensor)}.values())
    return tuple(walk.values), [part for part in walk.objects if not isinstance(part, Tensor)], tensors


class _Walk:
    """The values of a model, and the tensors and objects that stand among them by their addresses and identities."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self.values.append(value)
        elif isinstance(value, Tensor):
            if type(value) not in _TENSORS:
                raise TypeError(f"a tensor of type {type(value).__name__} does not say where its memory is")
            self.values.append((value.data_ptr(), value.shape, value.dtype, value.device))
            self.objects.append(value)
        elif isinstance(value, slice):
            # before Python 3.12 a slice cannot be hashed
            self.values.append("slice")
            self._add_all((value.start, value.stop, value.step))
        elif id(value) in self._numbers:
            # which of the parts it is matters: a model may change the one that it uses
            self.values.append(("seen", self._numbers[id(value)]))
        else:
            self._numbers[id(value)] = len(self._numbers)
            self._add_new(value)

    def _add_all(self, parts: Iterable[Any]) -> None:
        for part in parts:
            self.add(part)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.values.append((type(value).__qualname__, value.training))
            self._add_all((*value._parameters.values(), *value._buffers.values()))
            self._add_all(list(hooks.values()) for name in HOOKS if (hooks := getattr(value, name)))
            self._add_all(value._modules.values())
            self._add_attributes(value)
        elif isinstance(value, dict):
            for name, part in value.items():
                if isinstance(name, _PLAIN):
                    self.values.append(name)
                else:
                    self._add_identity(name)
                self.add(part)
        elif isinstance(value, (list, tuple, set, frozenset)):
            self.values.append(len(value))
            self._add_all(value)
        elif _looked_into(value):
            self.values.append(type(value).__qualname__)
            self._add_attributes(value)
        else:
            self._add_identity(value)

    def _add_identity(self, value: Any) -> None:
        self.values.append(id(value))
        self.objects.append(value)

    def _add_attributes(self, value: Any) -> None:
        left_out = BARE if isinstance(value, nn.Module) else frozenset()
        ignored: frozenset[str] = getattr(type(value), "not_dependencies", frozenset())
        for name, part in getattr(value, "__dict__", {}).items():
            if name not in left_out and name not in ignored:
                self.values.append(name)
                self.add(part)


def _looked_into(value: Any) -> bool:
    """Whether an object counts by its attributes: this package's own, and those that are made to hold settings."""
    if isinstance(value, type):
        return False
    # of one with slots the attributes are not to be found here, and its identity is what remains
    settings = isinstance(value, _SETTINGS) or (
        dataclasses.is_dataclass(value) and getattr(value, "__dict__", None) is not None
    )
    return settings or (type(value).__module__.startswith("purify_fast.") and not callable(value))
