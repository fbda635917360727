"""Takes a step of Auto-PGD: a projected gradient step (ascent), then momentum, then a second projection.

    z      = P(x + alpha dir(g))
    x_new  = P(x + a (z - x) + (1 - a) (x - previous))

Source: Croce & Hein, ICML 2020, algorithm 1. a is 0.75, and 1 in the first step. P and dir are those of `pgd_step`. If
g is zero or not finite, dir is 0, and only the momentum moves the element (linf) or the sample (l2).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .._tensors import per_image, per_sample
from .dispatch.registry import define_op, wide
from .pgd_step import check, direction, project, step_arguments, step_examples

#: Auto-PGD has other steps in l1, which adapt the fraction of the coordinates that move. This op does not compute them.
NORMS = ("linf", "l2")


def reference(
    x: Tensor, grad: Tensor, x_nat: Tensor, previous: Tensor, alpha: Tensor, eps: Tensor, momentum: float, *space: Any
) -> Tensor:
    """Compute the op by PyTorch in float32 (float64 for float64). The result has x's dtype. alpha and eps are [B]."""
    norm, lo, hi = space
    start, center = wide(x), wide(x_nat)
    length, radius = per_image(alpha.to(start.dtype), x), per_image(eps.to(start.dtype), x)
    into_ball = functools.partial(project, x_nat=center, eps=radius, norm=norm, lo=lo, hi=hi)
    z = into_ball(start + length * direction(wide(grad), norm))
    moved = start + momentum * (z - start) + (1 - momentum) * (start - wide(previous))
    return into_ball(moved).to(x.dtype).contiguous()


#: By norm, `Example.gpu` for each shape of `IMAGES`.
ON_GPU = {"linf": ("", "h", "", "f"), "l2": ("", "", "", "fb")}

OP = define_op(
    "apgd_step",
    "(Tensor x, Tensor grad, Tensor x_nat, Tensor previous, Tensor alpha, Tensor eps, float momentum, int norm, "
    "float lo, float hi) -> Tensor",
    reference=reference,
    examples=step_examples(functools.partial(step_arguments, momentum=True), ON_GPU),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cuda": ("l2",)},
)


def apgd_step(
    x: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    previous: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float = 0.75,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Move ``x`` along ``grad`` and along x's last move, within the ball around ``x_nat`` and the box [lo, hi].

    Args:
        x: current images of the attack, ``[B, ...]``; float16, bfloat16, float32 or float64; image units.
        grad: gradient of the attacker's loss at x, with x's shape, dtype and device.
        x_nat: attacked images, the centers of the balls, in the same form.
        previous: value of x before its last step, in the same form.
        alpha: length of the step in image units, a number or ``[B]``.
        eps: radius of the ball in image units, a number or ``[B]``.
        momentum: weight a of the new step, in [0, 1]. The last move has the weight 1 - a.
        norm: ``linf`` or ``l2``.
        lo: lower end of the box of the images.
        hi: upper end of the box, at least lo.

    Returns:
        The new x, with the same shape and dtype, contiguous. There is no gradient. NaN in an image propagates.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.

    The op is deterministic, and ``linf`` is bit-exact across backends.
    """
    norm = check({"x": x, "grad": grad, "x_nat": x_nat, "previous": previous}, norm, lo, hi, NORMS)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    with torch.no_grad():
        alpha, eps = per_sample("alpha", alpha, x), per_sample("eps", eps, x)
        space = NORMS.index(norm), float(lo), float(hi)
        return OP(x, grad, x_nat, previous, alpha, eps, float(momentum), *space, variant=norm)
