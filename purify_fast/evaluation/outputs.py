"""The outputs of a user's model as logits ``[B, classes]``; a clear answer where that cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols import Classifier
from .images import looks_channels_last

#: What is to be done about a model that returns probabilities.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which decides the same"
)


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
        ValueError: another shape than ``[B, classes]`` with two classes at least, or the model fails on images whose
            channels come last.
    """
    output = _first_output(model, some)
    if isinstance(output, Tensor):
        logits = output
    else:
        model, logits = LogitsOf(model), _logits_in(output)
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        raise ValueError(
            f"the model returns a single number for each image, {list(logits.shape)}: an evaluation needs logits "
            "[B, classes] of two classes at least. For one logit z of the second class give "
            "lambda x: torch.cat([-model(x), model(x)], 1) / 2, whose softmax is sigmoid(z)"
        )
    if logits.dim() != 2 or len(logits) != len(some):
        raise ValueError(f"the model must return logits [B, classes], got {list(logits.shape)} for {len(some)} images")
    return model, logits.shape[1]


def _first_output(model: Classifier, some: Tensor) -> Any:
    """What the model returns for a few images."""
    try:
        return model(some)
    except Exception as error:
        if not looks_channels_last(some):
            raise
        raise ValueError(
            f"x must be [N, C, H, W], got [N, {', '.join(map(str, some.shape[1:]))}], and the model fails on it "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): the channels seem to come last; "
            "x.permute(0, 3, 1, 2) puts them first"
        ) from error


def are_probabilities(logits: Tensor) -> bool:
    """Whether every line is one of probabilities: numbers in [0, 1] whose sum is 1.

    Args:
        logits: what a model returned, ``[B, classes]``.
    """
    # a sum of many rounded numbers; half precision rounds to three or four digits
    room = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + room)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= room).all())


def _logits_in(output: Any) -> Tensor:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits, or an object or mapping with them as logits, got "
            f"{type(output).__name__}"
        )
    return logits
