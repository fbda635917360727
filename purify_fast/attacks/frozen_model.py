"""A model as attacks use it: in evaluation mode, without gradients to its weights, restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..contents import hidden_modules
from ..protocols import Classifier


@contextlib.contextmanager
def frozen(model: Classifier) -> Iterator[None]:
    """Within the block, ``model`` is in evaluation mode and no parameter asks for a gradient.

    A compiled backward computes weight gradients for every parameter that asks for one, needed or not: about a third of
    an attack's work. Modules that the model holds in a plain list, in an object or in a hook are treated as its
    registered ones (`purify_fast.contents.hidden_modules`).

    Args:
        model: an ``nn.Module``; any other callable is left as it is. Who attacks a module's method freezes the module.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    wholes = [model, *(module for _, module in hidden_modules(model))]
    modes = [(module, module.training) for whole in wholes for module in whole.modules()]
    trainable = [p for whole in wholes for p in whole.parameters() if p.requires_grad]
    try:
        for whole in wholes:
            whole.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
