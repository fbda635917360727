"""The names of the losses that an attack maximizes, and the numbers of classes that they need.

`purify_fast.ops.attack_loss` has their formulas, and computes their gradients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..ops.attack_loss import FEWEST_CLASSES as FEWEST_CLASSES

#: Loss: the losses that need only the true labels. ApgdLoss: all losses, including the targeted losses, which also take
#: a target class for each image.
Loss = Literal["ce", "margin", "scaled_margin", "dlr"]
ApgdLoss = Literal["ce", "margin", "scaled_margin", "dlr", "dlr_targeted", "margin_targeted"]

LOSSES = ("ce", "margin", "scaled_margin", "dlr")
TARGETED = ("dlr_targeted", "margin_targeted")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} l_j - l_y, [B]; it is positive if the image is misclassified. Carlini & Wagner, S&P 2017."""
    true = logits.gather(1, y[:, None])[:, 0]
    # `one_hot` is avoided, because it checks the values of the labels and so waits for the GPU.
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def check_classes(loss: str, classes: int) -> None:
    """Refuse a loss that needs more than ``classes`` classes, with ValueError."""
    least = FEWEST_CLASSES.get(loss, 2)
    if classes < least:
        instead = ": use the loss 'margin'" if classes > 1 else ""
        raise ValueError(f"the loss {loss!r} needs at least {least} classes, got a model with {classes}{instead}")


def usable_loss(loss: ApgdLoss, num_classes: int) -> ApgdLoss:
    """The loss itself, or "margin" if the loss needs more than ``num_classes`` classes."""
    return "margin" if 0 < num_classes < FEWEST_CLASSES.get(loss, 2) else loss
