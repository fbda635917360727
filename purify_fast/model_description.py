"""Describes a model by a key that tells whether it has changed, from addresses in memory or from its structure."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .model_state import GENERATORS, attributes

#: The dictionaries of hooks that run in a forward or a backward pass.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, *_IN_TORCH)
#: The classes whose objects are settings.
NAMESPACES = (SimpleNamespace, argparse.Namespace)
#: The kinds of objects that a frozen copy shares with its model.
SHARED = (type, types.ModuleType, FunctionType, types.BuiltinFunctionType, weakref.ReferenceType, *GENERATORS)
SIMPLE = frozenset(PLAIN)
Inside = Callable[[Any], Any]


class Description:
    """Describes a value by nested tuples. ``leaf`` describes tensors, functions and objects.

    ``hooks`` and ``modes``: whether hooks of modules, and their modes and those of their noise, are described.
    """

    def __init__(self, leaf: Callable[[Any, Inside], Any], *, hooks: bool = True, modes: bool = True):
        self.leaf, self.hooks, self.modes = leaf, hooks, modes
        #: The values so far, and their numbers by id. An id is unique only while its object exists.
        self.values: list[Any] = []
        self.seen: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        kind: Any = type(value)
        # Most values pass the first test, which is the fastest.
        if kind in SIMPLE or (kind is tuple and SIMPLE.issuperset(map(type, value))) or isinstance(value, PLAIN):
            return value
        if isinstance(value, tuple):
            return (kind.__name__, *map(self.of, value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)])
        self.seen[id(value)] = len(self.values)
        self.values.append(value)
        if isinstance(value, Tensor):
            return self.leaf(value, self.of)
        if isinstance(value, nn.Module):
            held = [item for group in ("_parameters", "_buffers", "_modules") for item in vars(value)[group].items()]
            groups = HOOKS if self.hooks else ()
            hooks = [("a hook", hook) for group in groups for hook in getattr(value, group).values()]
            own = attributes(value)
            if not self.modes:
                own = [(name, part) for name, part in own if name not in getattr(kind, "noise_modes", ())]
            inside = [(name, self.of(part)) for name, part in (*held, *hooks, *own)]
            return (self.of(kind), value.training and self.modes, *inside)
        if isinstance(value, (set, frozenset)):
            return (kind.__name__, *sorted(map(self.of, value), key=repr))
        if isinstance(value, (list, deque, dict, types.MappingProxyType)):
            # A subclass of a container may have attributes, too.
            own = self.of(getattr(value, "__dict__", None))
            items = value if isinstance(value, (list, deque)) else list(value.items())
            return (kind.__name__, own, *map(self.of, items))
        if isinstance(value, slice):
            return ("slice", value.start, value.stop, value.step)
        # Objects of this package that are not called are settings.
        ours = kind.__module__.startswith("purify_fast.") and not callable(value)
        if ours or issubclass(kind, NAMESPACES) or dataclasses.is_dataclass(kind):
            return (kind.__qualname__, self.of(attributes(value)))
        return self.leaf(value, self.of)


def identity_key(model: nn.Module) -> tuple[Any, list[Any], list[Tensor]]:
    """Make a key from the addresses of a model's tensors, its modes and its attributes."""
    objects: list[Any] = []
    tensors: list[Tensor] = []

    def leaf(value: Any, inside: Inside) -> Any:
        if not isinstance(value, Tensor):
            objects.append(value)
            return id(value)
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise TypeError(f"a tensor of type {type(value).__name__} does not say where its memory is")
        tensors.append(value)
        return (value.data_ptr(), value.shape, value.dtype, value.device)

    return Description(leaf).of(model), objects, tensors


def structure_key(model: nn.Module, *, hooks: bool = True, modes: bool = True) -> tuple[Any, list[Any], list[Any]]:
    """Describe a model without the values of its tensors.

    Two models with equal descriptions differ in the values of these tensors only. An object that cannot be described is
    equal to itself alone, as long as it is kept alive.

    Returns:
        The description, the objects that must be kept alive beside it, and all that it describes except numbers, texts
        and tuples.
    """
    objects: list[Any] = []

    def leaf(value: Any, inside: Inside) -> Any:
        if isinstance(value, Tensor):
            strided = value.layout == torch.strided
            return type(value), value.shape, value.dtype, value.device, value.stride() if strided else value.layout
        if not isinstance(value, SHARED):
            # Describe what a deep copy is made from. Some objects of C cannot be taken apart.
            with contextlib.suppress(Exception):
                made_from = value.__reduce_ex__(4)
                if not isinstance(made_from, str):
                    return inside(tuple(list(one) if isinstance(one, Iterator) else one for one in made_from))
        objects.append(value)
        return id(value)

    description = Description(leaf, hooks=hooks, modes=modes)
    return description.of(model), objects, description.values
