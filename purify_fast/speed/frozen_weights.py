"""A block in which the weights of models need no gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
