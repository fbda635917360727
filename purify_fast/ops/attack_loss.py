"""Computes the loss that an attack maximizes, its gradient with respect to the logits, and which images are wrong.

l_j is the logit of class j, y is the true class, t a target class, and l_(k) the k-th largest logit.

    ce                -log softmax(l)_y
    margin            m = max_{j != y} l_j - l_y                            (Carlini & Wagner, S&P 2017)
    scaled_margin     m / std(l), with a constant std
    dlr               m / (l_(1) - l_(3))                                   (Croce & Hein, ICML 2020)
    margin_targeted   l_t - l_y
    dlr_targeted      (l_t - l_y) / (l_(1) - (l_(3) + l_(4)) / 2)           (Croce & Hein, ICML 2020)

Each loss grows as the image is misclassified more clearly. ``toward`` negates the loss and the gradient, for an attack
that approaches the class in place of y.

The cross-entropy also has a gradient where the model is sure. There the usual formula rounds p_y to 1, and its gradient
lacks the true class. Let z be the logsumexp of the other logits minus l_y, and s = sigmoid(z). Where both the usual
loss and z are below `SURE`, the loss is log(1 + exp z), and the gradient is s times the softmax over the other classes,
and -s for the true class. Elsewhere losses and gradients are those of PyTorch's cross-entropy. Where s underflows
(float32: z < -61), the loss continues along its tangent in z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import check_floating, check_form
from .dispatch.examples import ROWS, examples, normal
from .dispatch.registry import define_op, wide

KINDS = ("ce", "margin", "scaled_margin", "dlr", "margin_targeted", "dlr_targeted")
#: The smallest number of classes for which a loss is defined. Losses that are not listed need two.
FEWEST_CLASSES = {"dlr": 3, "dlr_targeted": 4}
#: The usual formula of the cross-entropy in float32 is replaced where its result is below SURE. In float64 the limit is
#: smaller by the ratio of the two precisions.
SURE = 2.0**-8
#: The smallest slope of the cross-entropy is the smallest number of the logits' dtype, raised to this power. In float32
#: this slope is 3e-27, so its products with the derivatives of a network are not zero.
LEAST_SLOPE = 0.7
#: This is added to the denominators of the scaled losses.
TINY = 1e-12


def least_exponent(dtype: torch.dtype) -> float:
    """Return the z below which the cross-entropy of logits in a dtype continues along its tangent."""
    return min(math.log(SURE), LEAST_SLOPE * math.log(torch.finfo(dtype).tiny))


def _cross_entropy(logits: Tensor, true: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    log_shares = F.log_softmax(logits, 1)
    usual = -log_shares.gather(1, true)[:, 0]
    # The operator that computes PyTorch's gradient gives its bits.
    weights = torch.zeros_like(logits).scatter(1, true, -1.0)
    slopes = torch.ops.aten._log_softmax_backward_data(weights, log_shares, 1, logits.dtype)
    others = logits.scatter(1, true, -torch.inf)
    shares = others.softmax(1)
    # The largest share is exp(top - logsumexp). The two logits are subtracted first, because both may be large.
    z = (others.amax(1) - logits.gather(1, true)[:, 0]) - shares.amax(1).log()
    # With NaN or infinite logits, one of these two numbers is NaN, and the usual loss is kept.
    exact = torch.maximum(usual, z) < SURE * torch.finfo(logits.dtype).eps / torch.finfo(torch.float32).eps
    bounded = z.clamp_min(least_exponent(dtype))
    slope = bounded.sigmoid()
    loss = torch.addcmul(F.softplus(bounded), slope, z - bounded)
    gradient = shares.scatter(1, true, -1.0) * slope[:, None]
    return torch.where(exact[:, None], gradient, slopes), torch.where(exact, loss, usual)


def _margin(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    others = logits.scatter(1, true, -torch.inf)
    top = others.amax(1, keepdim=True)
    # Equal logits share the gradient. If one is NaN, no logit equals the largest, and the gradient is NaN.
    largest = (others == top).to(logits.dtype)
    gradient = (largest / largest.sum(1, keepdim=True)).scatter(1, true, -1.0)
    return gradient, (top - logits.gather(1, true))[:, 0]


def _margin_targeted(logits: Tensor, true: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    ones = torch.ones_like(target, dtype=logits.dtype)
    gradient = torch.zeros_like(logits).scatter_add(1, target, ones).scatter_add(1, true, -ones)
    return gradient, (logits.gather(1, target) - logits.gather(1, true))[:, 0]


def _divided(gradient: Tensor, loss: Tensor, logits: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """Divide a loss by the largest logit minus the third, or minus the mean of third and fourth (``below`` = 2)."""
    # A stable order takes the first of several equal logits first, so that every backend takes the same.
    values, order = logits.sort(dim=1, descending=True, stable=True)
    width = values[:, 0] - (values[:, 2] + values[:, 3]) / 2 if below == 2 else values[:, 0] - values[:, 2]
    width = (width + TINY)[:, None]
    ones = torch.ones_like(width)
    of_width = torch.zeros_like(logits).scatter_add(1, order[:, :1], ones)
    of_width = of_width.scatter_add(1, order[:, 2 : 2 + below], (-ones / below).expand(-1, below))
    return (gradient - (loss[:, None] / width) * of_width) / width, loss / width[:, 0]


def reference(logits: Tensor, labels: Tensor, kind: int, toward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the op by PyTorch in float32 (float64 for float64): the gradient ``[B, C]``, the loss and wrong, ``[B]``.

    ``labels`` are the true classes ``[B]``, or ``[B, 2]`` with the target classes in the second column.
    """
    name, z = KINDS[kind], wide(logits)
    true, *targets = (labels[:, None] if labels.dim() == 1 else labels).split(1, 1)
    top, decided = z.max(1)
    if name == "ce":
        gradient, loss = _cross_entropy(z, true, logits.dtype)
    elif name in ("margin", "scaled_margin", "dlr"):
        gradient, loss = _margin(z, true)
    else:
        gradient, loss = _margin_targeted(z, true, targets[0])
    if name == "scaled_margin":
        width = z.std(1, correction=0) + TINY
        gradient, loss = gradient / width[:, None], loss / width
    elif name == "dlr":
        gradient, loss = _divided(gradient, loss, z, below=1)
    elif name == "dlr_targeted":
        gradient, loss = _divided(gradient, loss, z, below=2)
    # With NaN among the logits there is no decision. With the margin, neither is there one between several infinite
    # logits, of which the true class has one: the margin is then NaN.
    undecided = (loss if name == "margin" else top).isnan()
    wrong = ((decided != true[:, 0]) | undecided).to(torch.float32)
    sign = -1.0 if toward else 1.0
    return (sign * gradient).to(logits.dtype), sign * loss, wrong


#: By kind and number of classes; for the values see `Example.gpu`. A program has several rows of 10 classes, one row of
#: 1000, and a part of a row of 5001. The half precision of the cross-entropy has a tangent of its own.
EXAMPLES = {(kind, 10): "f" for kind in KINDS} | {(kind, 1000): "" for kind in KINDS}
EXAMPLES |= {("ce", 10): "fh", ("ce", 1000): "b", ("dlr", 1000): "b"}
EXAMPLES |= {("ce", 5001): "", ("scaled_margin", 5001): "b", ("dlr_targeted", 5001): "f"}


def _arguments(kind: str, classes: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, int, bool]:
    logits = normal(seed, ROWS, classes, scale=3.0)
    # The model is sure of a row, but not so sure that float16 needs the tangent, which float64 does not.
    logits[1, 1] = logits[1].logsumexp(0) + (6.0 if dtype == torch.float16 else 40.0)
    labels = torch.tensor([0, 1, classes - 1])
    if kind.endswith("_targeted"):
        labels = torch.stack([labels, (labels + 1) % classes], 1)
    return logits.to(dtype), labels, KINDS.index(kind), False


OP = define_op(
    "attack_loss",
    "(Tensor logits, Tensor labels, int kind, bool toward) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=lambda logits, labels, kind, toward: (
        logits.new_empty(logits.shape),
        wide(logits).new_empty(logits.shape[0]),
        logits.new_empty(logits.shape[0], dtype=torch.float32),
    ),
    examples=examples(_arguments, EXAMPLES),
)


def attack_loss(
    logits: Tensor, labels: Tensor, kind: str = "ce", *, targets: Tensor | None = None, toward: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute an attack's loss, its gradient with respect to the logits, and which images are misclassified.

    ``torch.autograd.grad(logits, images, gradient)`` is then the gradient of the loss of each image.

    Args:
        logits: ``[B, C]``, float16, bfloat16, float32 or float64.
        labels: true classes, int64 ``[B]``, from 0 to C - 1.
        kind: "ce", "margin", "scaled_margin", "dlr" (with at least 3 classes), "margin_targeted" or "dlr_targeted"
            (with at least 4 classes).
        targets: target classes of the targeted kinds, int64 ``[B]``; None for the others.
        toward: whether loss and gradient are negated, for an attack that approaches the class ``labels``.

    Returns:
        The gradient ``[B, C]`` in the dtype of the logits; the loss ``[B]``, float32 (float64 for float64); and 1 for
        each image that is misclassified, 0 for the others, float32 ``[B]``. A row with NaN counts as misclassified.
        Nothing has a gradient.

    Raises:
        ValueError: a shape, dtype, device, kind or number of classes is wrong.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_floating(logits=logits)
    targeted = kind.endswith("_targeted")
    if targeted != (targets is not None):
        needs = "given" if targeted else "None"
        raise ValueError(f"targets must be {needs} for kind={kind!r}, got {'None' if targets is None else 'a tensor'}")
    least = FEWEST_CLASSES.get(kind, 2)
    if logits.dim() != 2 or logits.shape[1] < least:
        raise ValueError(f"logits must be [B, C] with C of at least {least} for {kind!r}, got {list(logits.shape)}")
    check_form("labels", labels, torch.int64, "[B]", logits.shape[:1], logits=logits)
    if targets is not None:
        check_form("targets", targets, torch.int64, "[B]", logits.shape[:1], logits=logits)
    with torch.no_grad():
        both = labels if targets is None else torch.stack([labels, targets], 1)
        return OP(logits.detach(), both, KINDS.index(kind), toward)
