"""Blocks in which the weights of models need no gradients, or in which the parts of a model are not compiled."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

#: By attribute and object: the values that blocks which have not ended yet will restore, the latest block last.
_SAVED = dict[tuple[str, int], list[list[Any]]]()
_LOCK = threading.RLock()


@contextlib.contextmanager
def restored(name: str, objects: Iterable[Any], change: Callable[[], Any]) -> Iterator[None]:
    """A block that begins with a call of ``change``, and restores an attribute of objects at its end.

    Blocks in several threads may overlap. One that ends before a later one leaves its values for the later to restore.
    """
    mine = list[list[Any]]()
    try:
        with _LOCK:
            mine += [[one, getattr(one, name)] for one in objects]
            for saved in mine:
                _SAVED.setdefault((name, id(saved[0])), []).append(saved)
            change()
        yield
    finally:
        with _LOCK:
            for saved in mine:
                one, value = saved
                stack = _SAVED[name, id(one)]
                at = next(at for at, other in enumerate(stack) if other is saved)
                del stack[at]
                if at < len(stack):
                    stack[at][1] = value
                elif getattr(one, name) != value:
                    setattr(one, name, value)
                if not stack:
                    del _SAVED[name, id(one)]


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    weights = {one: None for model in models for one in model.parameters() if not one.is_inference()}

    def freeze() -> None:
        for weight in weights:
            if weight.requires_grad:
                weight.requires_grad_(False)

    with restored("requires_grad", weights, freeze):
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
