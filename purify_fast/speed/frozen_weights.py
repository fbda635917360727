"""Blocks in which the weights of models need no gradients, or in which the parts of a model are not compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

#: By attribute: the objects that blocks hold now, by id, with the number of blocks and the value before the first.
_HELD: dict[str, dict[int, list[Any]]] = {"training": {}, "requires_grad": {}}
_LOCK = threading.Lock()


class held:
    """A block at whose end objects get back the value of an attribute, unless a block of another thread holds them too.

    The last of these blocks restores the value before the first. A class is faster than a generator.
    """

    def __init__(self, name: str, objects: Sequence[Any]):
        self.name, self.objects = name, objects

    def __enter__(self) -> None:
        known, name = _HELD[self.name], self.name
        with _LOCK:
            for one in self.objects:
                if id(one) in known:
                    known[id(one)][0] += 1
                else:
                    known[id(one)] = [1, getattr(one, name)]

    def __exit__(self, *error: object) -> None:
        known, name = _HELD[self.name], self.name
        with _LOCK:
            for one in self.objects:
                entry = known[id(one)]
                entry[0] -= 1
                if not entry[0]:
                    del known[id(one)]
                    if getattr(one, name) != entry[1]:
                        setattr(one, name, entry[1])


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = [one for model in models for one in model.parameters() if not one.is_inference()]
    with held("requires_grad", weights):
        for weight in weights:
            if weight.requires_grad:
                weight.requires_grad_(False)
        yield


@contextlib.contextmanager
def eager(model: Any) -> Iterator[None]:
    """A block in which the parts of a model run without the compiled calls of ``nn.Module.compile``."""
    compiled = [(part, call) for part in model.modules() if (call := part._compiled_call_impl) is not None]
    try:
        for part, _ in compiled:
            part._compiled_call_impl = None
        yield
    finally:
        for part, call in compiled:
            part._compiled_call_impl = call
