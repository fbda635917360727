"""Blocks in which the weights of models need no gradients, and at whose end models are as before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

#: By attribute and object: the values that blocks which have not ended yet will restore, the latest block last.
_HELD: dict[str, dict[int, list[list[Any]]]] = {"training": {}, "requires_grad": {}}
_LOCK = threading.Lock()


def hold(name: str, objects: Iterable[Any]) -> list[list[Any]]:
    """Remember the values of an attribute of objects until `release`.

    Blocks in several threads may overlap. One that ends before a later one leaves its values for the later to restore.
    """
    known = _HELD[name]
    with _LOCK:
        saved = [[one, getattr(one, name)] for one in objects]
        for entry in saved:
            known.setdefault(id(entry[0]), []).append(entry)
    return saved


def release(name: str, saved: list[list[Any]]) -> None:
    """Restore the values that `hold` has returned."""
    known = _HELD[name]
    with _LOCK:
        for entry in saved:
            one, value = entry
            later = known[id(one)]
            if later[-1] is entry:
                later.pop()
                if getattr(one, name) != value:
                    setattr(one, name, value)
            else:
                at = next(at for at, other in enumerate(later) if other is entry)
                del later[at]
                later[at][1] = value
            if not later:
                del known[id(one)]


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = [one for model in models for one in model.parameters() if not one.is_inference()]
    saved = hold("requires_grad", weights)
    try:
        for weight in weights:
            if weight.requires_grad:
                weight.requires_grad_(False)
        yield
    finally:
        release("requires_grad", saved)
