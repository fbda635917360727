"""Walks over the modules of a model, and holds values of their attributes until the end of a block."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from types import MemberDescriptorType
from typing import Any

from torch import fx, nn

#: The attributes that every ``nn.Module`` has, and those that PyTorch adds to a module that it compiled or traced.
BARE = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
#: Those of a module that `torch.fx` has traced.
TRACED = frozenset({"_graph", "_tracer_cls", "meta"})
#: What may hold a module that PyTorch does not know.
CONTAINERS = (nn.Module, list, tuple, dict)


@functools.lru_cache(maxsize=4096)
def slots(kind: type) -> list[str]:
    """The names of the attributes that the objects of a class keep outside of their dictionary."""
    members = [item for base in kind.__mro__ for item in vars(base).items()]
    return [name for name, of in members if isinstance(of, MemberDescriptorType) and not name.startswith("__")]


@functools.lru_cache(maxsize=4096)
def left_out(kind: type) -> frozenset[str]:
    """The names of the attributes of a class's objects that do not count."""
    named = frozenset(name for base in kind.__mro__ for name in vars(base).get("not_dependencies", ()))
    named |= TRACED if issubclass(kind, fx.GraphModule) else frozenset()
    return named | BARE if issubclass(kind, nn.Module) else named


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, like `nn.Module.modules` in less time."""
    parts, seen = [model], {id(model)}
    for part in parts:
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                parts.append(child)
    return parts


def may_hide_modules(parts: Iterable[nn.Module]) -> bool:
    """Return True if a part has an attribute in which a module may be that PyTorch does not know."""
    for part in parts:
        kind: Any = type(part)
        if slots(kind):
            return True
        values = vars(part)
        if any([isinstance(values[name], CONTAINERS) for name in values.keys() - left_out(kind)]):
            return True
    return False


#: By attribute and object: the values that blocks which have not ended yet will restore, the latest block last.
_HELD: dict[str, dict[int, list[list[Any]]]] = {"training": {}, "requires_grad": {}}
_LOCK = threading.Lock()


def hold(name: str, objects: Iterable[Any]) -> list[list[Any]]:
    """Remember the values of an attribute of objects until `release`.

    Blocks in several threads may overlap. One that ends before a later one leaves its values for the later to restore.
    """
    held = _HELD[name]
    with _LOCK:
        saved = [[item, getattr(item, name)] for item in objects]
        for entry in saved:
            held.setdefault(id(entry[0]), []).append(entry)
    return saved


def release(name: str, saved: list[list[Any]]) -> None:
    """Restore the values that `hold` has returned."""
    held = _HELD[name]
    with _LOCK:
        for entry in saved:
            item, value = entry
            later = held[id(item)]
            if later[-1] is entry:
                later.pop()
                if getattr(item, name) != value:
                    setattr(item, name, value)
            else:
                at = next(at for at, other in enumerate(later) if other is entry)
                del later[at]
                later[at][1] = value
            if not later:
                del held[id(item)]
