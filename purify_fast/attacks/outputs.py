"""Checks the output of a model: logits ``[B, classes]``."""

from __future__ import annotations

import torch
from torch import Tensor

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


def checked_logits(logits: object, images: int) -> Tensor:
    """Return a model's output, ``[B, classes]``, if it may be logits by its type and shape, which takes no time."""
    if not isinstance(logits, Tensor):
        wanted = "the model must return a torch.Tensor of logits [B, classes]"
        raise TypeError(f"{wanted}, got {type(logits).__name__}: give a module whose forward returns the logits in it")
    good = logits.dim() == 2 and logits.shape[0] == images and logits.shape[1] > 1 and logits.is_floating_point()
    if not good:
        wanted = "floating-point logits [B, classes] of at least two classes for every batch size B"
        raise ValueError(f"the model must return {wanted}, got {logits.dtype} {list(logits.shape)} for B = {images}")
    return logits


def are_one_hot(logits: Tensor) -> bool:
    """Return True if every row is a single 1 among zeros."""
    return bool((((logits == 0) | (logits == 1)).all(1) & (logits.sum(1) == 1)).all())


def are_probabilities(logits: Tensor) -> bool:
    """Return True if every row of the output consists of probabilities: numbers in [0, 1] whose sum is 1."""
    # The tolerance is for rounding: the sum has many rounded terms, and half precision has only three or four digits.
    slack = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    values = logits.double()
    inside = (values >= 0) & (values <= 1 + slack)
    return bool(inside.all() and ((values.sum(1) - 1).abs() <= slack).all())
