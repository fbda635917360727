"""The losses that an attack maximizes.

Each loss returns a number per image, and has first-order gradients with respect to the logits. In the formulas, l_j is
the logit of class j, y is the true class, and l_(k) is the k-th largest logit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)_y, [B].

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} l_j - l_y, [B]; it is positive if the image is misclassified. Carlini & Wagner, S&P 2017.

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
    """
    true = logits.gather(1, y[:, None])[:, 0]
    # `one_hot` is avoided, because it checks the values of the labels and so waits for the GPU.
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def scaled_margin(logits: Tensor, y: Tensor) -> Tensor:
    """margin / std(logits), [B]. The division gives all draws the same weight when their gradients are averaged.

    The standard deviation over the classes is treated as a constant. So the gradient has the direction of the margin's
    gradient, and never saturates.

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
    """
    return margin(logits, y) / (logits.detach().std(1, correction=0) + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """l_t - l_y with the target t, [B]; it is defined for any number of classes.

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
        target: target classes t, int64 ``[B]``.
    """
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """margin / (l_(1) - l_(3)), [B]: the difference of logits ratio, Croce & Hein, ICML 2020. It needs 3 classes.

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
    """
    check_classes("dlr", logits.shape[1])
    top = logits.topk(3, 1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(l_t - l_y) / (l_(1) - (l_(3) + l_(4)) / 2) with the target t, [B]: Croce & Hein, ICML 2020. It needs 4 classes.

    Args:
        logits: floating point ``[B, classes]``.
        y: true labels, int64 ``[B]``.
        target: target classes t, int64 ``[B]``.
    """
    check_classes("dlr_targeted", logits.shape[1])
    top = logits.topk(4, 1).values
    return margin_targeted(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


#: Loss: the losses that need only the true labels. ApgdLoss: all losses, including the targeted losses, which also take
#: a target class for each image.
Loss = Literal["ce", "margin", "scaled_margin", "dlr"]
ApgdLoss = Literal["ce", "margin", "scaled_margin", "dlr", "dlr_targeted", "margin_targeted"]

LOSSES = {"ce": cross_entropy, "margin": margin, "scaled_margin": scaled_margin, "dlr": dlr}
TARGETED = {"dlr_targeted": dlr_targeted, "margin_targeted": margin_targeted}

#: The smallest number of classes for which a loss is defined. Losses that are not listed need two.
FEWEST_CLASSES = {"dlr": 3, "dlr_targeted": 4}


def check_classes(loss: str, classes: int) -> None:
    """Refuse a loss that needs more than ``classes`` classes, with ValueError."""
    least = FEWEST_CLASSES.get(loss, 2)
    if classes < least:
        instead = ": use the loss 'margin'" if classes > 1 else ""
        raise ValueError(f"the loss {loss!r} needs at least {least} classes, got a model with {classes}{instead}")


def usable_loss(loss: ApgdLoss, num_classes: int) -> ApgdLoss:
    """The loss itself, or "margin" if the loss needs more than ``num_classes`` classes.

    Args:
        loss: a name of `LOSSES` or `TARGETED`.
        num_classes: number of the model's classes; 0 if it is not known. With 0 the loss itself is returned.
    """
    return "margin" if 0 < num_classes < FEWEST_CLASSES.get(loss, 2) else loss
