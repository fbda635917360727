"""Describes a model by a key that tells whether it has changed, from addresses in memory or from its structure."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
import weakref
from collections import deque
from collections.abc import Callable
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
    """Describes a value by nested tuples. ``leaf`` describes tensors, functions and objects."""

    def __init__(self, leaf: Callable[[Any, Inside], Any]):
        self.leaf = leaf
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
            hooks = [("a hook", hook) for group in HOOKS for hook in getattr(value, group).values()]
            inside = [(name, self.of(part)) for name, part in (*held, *hooks, *attributes(value))]
            return (self.of(kind), value.training, *inside)
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
