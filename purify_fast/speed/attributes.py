"""Describe the modules and attributes of a model, so that a change of them is noticed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

#: Attributes of these types are compared by their values.
_PLAIN = (bool, int, float, str, type(None))
#: The attributes that every module has, such as its hooks.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class _Same:
    """Equal only for the same object, and for a tensor only if PyTorch has counted no write to it since."""

    def __init__(self, value: object):
        self.value, self.version = value, value._version if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value and self.version == other.version


def facts_of(model: nn.Module) -> list[Any]:
    """The modules of a model, and their attributes, such as strides and temperatures."""
    facts: list[Any] = []
    for part in model.modules():
        # A weak reference lets the model go, and is equal to another one only for the same object.
        facts.append(weakref.ref(part))
        facts += [(name, _fact(value)) for name, value in vars(part).items() if name not in _OF_EVERY_MODULE]
    return facts


def _fact(value: Any) -> Any:
    """Return something that is equal for an equal value of an attribute. It does not look into other objects."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [_fact(each) for each in value]
    if isinstance(value, dict):
        return [(_fact(key), _fact(each)) for key, each in value.items()]
    return weakref.ref(value) if isinstance(value, nn.Module) else _Same(value)
