"""The losses that an attack maximizes: a number per image, with first-order gradients with respect to the logits.

l_j is the logit of class j, y is the true class, and l_(k) is the k-th largest logit.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.dispatch.gradient import first_order
from .context import LossFunction

#: The usual formula of the cross-entropy in float32 is replaced where its result is below SURE. In float64 the limit is
#: smaller by the ratio of the two precisions.
SURE = 2.0**-8
#: The smallest slope of the cross-entropy is the smallest number of the logits' dtype, raised to this power. In float32
#: this slope is 3e-27, so its products with the derivatives of a network are not zero.
LEAST_SLOPE = 0.7


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(logits)_y, [B], in float32 or float64, with a gradient also where the model is sure.

    There the usual formula rounds p_y to 1, and its gradient lacks the true class. Below a loss of 1/256 (float64:
    7e-12) this function uses log(1 + exp z), where z is the logsumexp of the other logits minus l_y. The gradient is s
    = sigmoid(z) times the softmax over the other classes, and -s for the true class. Elsewhere losses and gradients are
    those of PyTorch, to the bit. Where s underflows (float32: z < -61), the loss continues along its tangent in z.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    usual = F.cross_entropy(wide, y, reduction="none")
    with torch.no_grad():
        z, gradient = _against_others(wide, y[:, None])
        # With NaN or infinite logits, one of these two numbers is NaN, and the usual loss is kept.
        kept = ~(torch.maximum(usual, z) < SURE * torch.finfo(wide.dtype).eps / torch.finfo(torch.float32).eps)
        bounded = z.clamp_min(min(math.log(SURE), LEAST_SLOPE * math.log(torch.finfo(logits.dtype).tiny)))
        slope = bounded.sigmoid()
        exact = torch.addcmul(F.softplus(bounded), slope, z - bounded)
        gradient.mul_(slope[:, None]).masked_fill_(kept[:, None], 0.0)
    return _Mixed.apply(wide, usual, gradient, exact, kept)


def _against_others(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp of the other logits minus the true logit, ``[B]``, and its gradient ``[B, classes]``."""
    others = logits.scatter(1, true, -torch.inf)
    shares = others.softmax(1)
    # The largest share is exp(top - logsumexp). The two logits are subtracted first, because both may be large.
    z = (others.amax(1) - logits.gather(1, true)[:, 0]) - shares.amax(1).log()
    return z, shares.scatter_(1, true, -1.0)


class _Mixed(torch.autograd.Function):
    """``usual`` where ``kept`` is True, elsewhere ``exact`` with the given gradient ``[B, classes]``."""

    @staticmethod
    def forward(ctx: Any, _logits: Tensor, usual: Tensor, gradient: Tensor, exact: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, kept)
        return torch.where(kept, usual, exact)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, kept = ctx.saved_tensors
        return gradient * grad[:, None], grad * kept, None, None, None


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} l_j - l_y, [B]; it is positive if the image is misclassified. Carlini & Wagner, S&P 2017."""
    true = logits.gather(1, y[:, None])[:, 0]
    # `one_hot` is avoided, because it checks the values of the labels and so waits for the GPU.
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.amax(1) - true


def scaled_margin(logits: Tensor, y: Tensor) -> Tensor:
    """margin / std(logits), [B], with a constant std: all draws have the same weight in an average of gradients."""
    return margin(logits, y) / (logits.detach().std(1, correction=0) + 1e-12)


def margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """l_t - l_y with the target t, [B]; it is defined for any number of classes."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """margin / (l_(1) - l_(3)), [B]: the difference of logits ratio, Croce & Hein, ICML 2020. It needs 3 classes."""
    check_classes("dlr", logits.shape[1])
    top = logits.topk(3, 1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(l_t - l_y) / (l_(1) - (l_(3) + l_(4)) / 2), [B], Croce & Hein, ICML 2020. It needs 4 classes."""
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
    """The loss itself, or "margin" if the loss needs more than ``num_classes`` classes."""
    return "margin" if 0 < num_classes < FEWEST_CLASSES.get(loss, 2) else loss


@functools.cache
def towards(loss: str) -> LossFunction:
    """Return the loss that grows as the logits come nearer to a target class. ``loss`` is a name of `LOSSES`."""
    return lambda logits, target: -LOSSES[loss](logits, target)
