"""What a user's model returns, made logits ``[B, classes]``; a clear answer where that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols import Classifier


class LogitsOf(nn.Module):
    """A model that returns an object or a mapping with ``logits``, as its logits alone.

    Args:
        model: the model; any callable.
    """

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return _logits_in(self.model(x))


def as_classifier(model: Any) -> Classifier:
    """A model as the evaluation asks it: a callable that returns logits.

    Args:
        model: any callable; what it returns is looked at when it is asked for the first time.

    Raises:
        TypeError: no callable, or a class in place of an object of it.
    """
    if isinstance(model, type):
        raise TypeError(f"the model is the class {model.__name__}: give an object of it, such as {model.__name__}()")
    if not callable(model):
        raise TypeError(f"the model must be callable, images to logits, got {type(model).__name__}")
    return model


@torch.no_grad()
def returning_logits(model: Classifier, some: Tensor) -> tuple[Classifier, int]:
    """The model, or where it returns an object or a mapping with logits the model as these alone; and its classes.

    Args:
        model: any callable.
        some: a few images ``[B, C, H, W]``.

    Raises:
        TypeError: no tensor is returned, and nothing that has one as ``logits``.
        ValueError: another shape than ``[B, classes]`` with two classes at least.
    """
    found: Any = model(some)
    if not isinstance(found, Tensor):
        model, found = LogitsOf(model), _logits_in(found)
    if found.dim() == 1 or (found.dim() == 2 and found.shape[1] == 1):
        raise ValueError(
            f"the model returns a single number for each image, {list(found.shape)}: an evaluation needs logits "
            "[B, classes] of two classes at least. For one logit z of the second class give "
            "lambda x: torch.cat([-model(x), model(x)], 1) / 2, whose softmax is sigmoid(z)"
        )
    if found.dim() != 2 or len(found) != len(some):
        raise ValueError(f"the model must return logits [B, classes], got {list(found.shape)} for {len(some)} images")
    return model, found.shape[1]


def _logits_in(found: Any) -> Tensor:
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits, or an object or mapping with them as logits, got "
            f"{type(found).__name__}"
        )
    return logits
