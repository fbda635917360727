"""Checks the output of a model: logits ``[B, classes]``, or an object or a mapping with such ``logits``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols import Classifier

#: Advice for a model that returns probabilities instead of logits.
INSTEAD_OF_PROBABILITIES = (
    "return the logits before the softmax, or give lambda x: model(x).clamp_min(1e-30).log(), which predicts the same "
    "classes"
)
#: The problem and the advice for a model that returns one-hot vectors, in the words of errors and reports.
ONE_HOT = (
    "returns one-hot rows (each has a single 1, and otherwise zeros). They name a class and have no gradient: return "
    "the logits [B, classes] from which the class is chosen"
)


class LogitsOf(nn.Module):
    """A wrapper that returns only the logits of a model."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.training = False

    @property
    def fingerprinted(self) -> Classifier:
        """The model whose weights `purify_fast.model_state.fingerprint` reads."""
        return self.model

    def forward(self, x: Tensor) -> Tensor:
        return logits_in(self.model(x))


def logits_in(output: Any) -> Tensor:
    """The output itself if it is a tensor, or else the tensor ``logits`` in an object or a mapping."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "the model must return a torch.Tensor of logits [B, classes], or an object or mapping that holds such a "
            f"tensor under the name logits, got {type(output).__name__}"
        )
    return logits


def checked_logits(output: Any, images: int) -> Tensor:
    """The logits in a model's output, ``[B, classes]``; only types and shapes are checked, which takes no time."""
    logits = logits_in(output)
    good = logits.dim() == 2 and logits.shape[0] == images and logits.shape[1] > 1 and logits.is_floating_point()
    if not good:
        raise ValueError(
            "the model must return floating-point logits [B, classes] of at least two classes for every batch size B, "
            f"got {logits.dtype} {list(logits.shape)} for B = {images}"
        )
    return logits


def are_one_hot(logits: Tensor) -> bool:
    """Tell whether every row is a single 1 among zeros."""
    return bool((((logits == 0) | (logits == 1)).all(1) & (logits.sum(1) == 1)).all())


def are_probabilities(logits: Tensor) -> bool:
    """Tell whether every row of the output consists of probabilities: numbers in [0, 1] whose sum is 1."""
    # The tolerance is for rounding: the sum has many rounded terms, and half precision has only three or four digits.
    room = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + room)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= room).all())
