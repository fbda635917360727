"""A view of a model that attacks may use: evaluation mode, no weight gradients, everything restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn


@contextlib.contextmanager
def frozen(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, ``model`` is in evaluation mode and no parameter asks for a gradient.

    A compiled backward computes weight gradients for every parameter that asks for one, needed or not: about a third of
    an attack's work. A bound method freezes its module; other plain callables are left as they are.
    """
    model = getattr(model, "__self__", model)
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
