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
    values: list[Any] = []
    objects: list[Any] = []
    _add(model, values, objects, {})
    tensors = list({id(part): part for part in objects if isinstance(part, Tensor)}.values())
    return tuple(values), [part for part in objects if not isinstance(part, Tensor)], tensors


def _add(value: Any, values: list[Any], objects: list[Any], seen: dict[int, int]) -> None:
    """Add a value; tensors, and what counts by its identity, are added to the objects too."""
    if isinstance(value, _PLAIN):
        values.append(value)
        return
    if isinstance(value, Tensor):
        if type(value) not in _TENSORS:
            raise TypeError(f"a tensor of type {type(value).__name__} does not say where its memory is")
        values.append((value.data_ptr(), value.shape, value.dtype, value.device))
        objects.append(value)
        return
    if isinstance(value, slice):
        # before Python 3.12 a slice cannot be hashed
        values.append("slice")
        for part in (value.start, value.stop, value.step):
            _add(part, values, objects, seen)
        return
    if id(value) in seen:
        # which of the parts it is matters: a model may change the one that it uses
        values.append(("seen", seen[id(value)]))
        return
    seen[id(value)] = len(seen)
    if isinstance(value, nn.Module):
        _add_module(value, values, objects, seen)
    elif isinstance(value, dict):
        for name, part in value.items():
            if isinstance(name, _PLAIN):
                values.append(name)
            else:
                values.append(id(name))
                objects.append(name)
            _add(part, values, objects, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        values.append(len(value))
        for part in value:
            _add(part, values, objects, seen)
    elif _looked_into(value):
        values.append(type(value).__qualname__)
        _add_attributes(value, values, objects, seen)
    else:
        values.append(id(value))
        objects.append(value)


def _looked_into(value: Any) -> bool:
    """Whether an object counts by its attributes: this package's own, and those that are made to hold settings."""
    if isinstance(value, type):
        return False
    # of one with slots the attributes are not to be found here, and its identity is what remains
    settings = isinstance(value, _SETTINGS) or (
        dataclasses.is_dataclass(value) and getattr(value, "__dict__", None) is not None
    )
    return settings or (type(value).__module__.startswith("purify_fast.") and not callable(value))


def _add_module(module: nn.Module, values: list[Any], objects: list[Any], seen: dict[int, int]) -> None:
    values.append((type(module).__qualname__, module.training))
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        _add(tensor, values, objects, seen)
    for name in HOOKS:
        if hooks := getattr(module, name):
            _add(list(hooks.values()), values, objects, seen)
    for part in module._modules.values():
        _add(part, values, objects, seen)
    _add_attributes(module, values, objects, seen)


def _add_attributes(value: Any, values: list[Any], objects: list[Any], seen: dict[int, int]) -> None:
    left_out = BARE if isinstance(value, nn.Module) else frozenset()
    ignored: frozenset[str] = getattr(type(value), "not_dependencies", frozenset())
    for name, part in getattr(value, "__dict__", {}).items():
        if name not in left_out and name not in ignored:
            values.append(name)
            _add(part, values, objects, seen)
