"""Describes a model by a key that tells whether it has changed, from addresses in memory and values of attributes."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import types
import weakref
from collections import deque
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .model_state import GENERATORS, attributes

#: The dictionaries of hooks that run in a forward or a backward pass.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_IN_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, *_IN_TORCH)
#: The kinds of objects that a frozen copy shares with its model.
SHARED = (type, types.ModuleType, FunctionType, types.BuiltinFunctionType, weakref.ReferenceType, *GENERATORS)
SIMPLE = frozenset(_PLAIN)


def identity_key(model: nn.Module) -> tuple[Any, list[Any], list[Tensor]]:
    """Make a key from the addresses of a model's tensors, its modes and its attributes.

    The objects and tensors whose addresses are in the key follow it: an address is unique only while its object exists.
    """
    description = _Description()
    return description.of(model), description.objects, description.tensors


class _Description:
    """Describes a value by nested tuples, with the addresses of tensors, functions and objects."""

    def __init__(self) -> None:
        self.objects = list[Any]()
        self.tensors = list[Tensor]()
        #: The numbers of the values so far, by id, and the values, which must not be freed meanwhile.
        self.seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> Any:
        kind: Any = type(value)
        # Most values pass the first test, which is the fastest.
        if kind in SIMPLE or (kind is tuple and SIMPLE.issuperset(map(type, value))) or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            return (kind.__name__, *map(self.of, value))
        if id(value) in self.seen:
            return ("seen", self.seen[id(value)][0])
        self.seen[id(value)] = len(self.seen), value
        if isinstance(value, Tensor):
            if kind not in (Tensor, nn.Parameter, nn.Buffer):
                raise TypeError(f"a tensor of type {kind.__name__} does not say where its memory is")
            self.tensors.append(value)
            return (value.data_ptr(), value.shape, value.dtype, value.device)
        if isinstance(value, nn.Module):
            held = [item for group in ("_parameters", "_buffers", "_modules") for item in vars(value)[group].items()]
            hooks = [("a hook", hook) for group in _HOOKS for hook in getattr(value, group).values()]
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
        settings = issubclass(kind, (SimpleNamespace, argparse.Namespace)) or dataclasses.is_dataclass(kind)
        if ours or settings:
            return (kind.__qualname__, self.of(attributes(value)))
        self.objects.append(value)
        return id(value)
