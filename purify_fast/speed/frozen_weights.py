"""Blocks in which the weights of models need no gradients, or in which the parts of a model are not compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def images_only(*models: nn.Module) -> Iterator[None]:
    """A block in which the parameters of modules need no gradients, for attacks on the images alone.

    Use it for attacks that keep the training mode, or that call ``loss.backward()``. Afterwards ``requires_grad`` is as
    before. Computations in the block give no gradients of weights later.
    """
    # The flag of a tensor that was made in inference mode could not be restored.
    learning = [one for model in models for one in model.parameters() if one.requires_grad and not one.is_inference()]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


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
