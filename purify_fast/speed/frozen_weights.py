"""Blocks in which the weights of models need no gradients, and at whose end models are as before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .._modules import hold, release


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
