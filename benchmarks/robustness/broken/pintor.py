"""The indicators of Pintor et al., "Indicators of attack failure", NeurIPS 2022 (arXiv 2106.09947).

The indicators look at a run of an attack on each image, as their authors' code computes them. The run is PGD on the
cross-entropy, whose last point is its result. "Transfer failure" is left out, because no attack here was made on
another model. An indicator fires if it is true for more than a tenth of the images. "Unstable predictions" is a number:
it fires if its mean is above a tenth, the paper's threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import frozen
from purify_fast.ops.pgd_step import pgd_step

#: Increase this number whenever a change here gives another result; kept results with an older number are then made
#: again.
REVISION = 1
#: IMAGES images are attacked by STEPS steps of PGD. The length of a step is LENGTH in radii, and UNCONSTRAINED in image
#: units for the attack without a ball.
IMAGES, STEPS, LENGTH, UNCONSTRAINED = 40, 100, 0.1, 8 / 255
#: The loss is compared at POINTS random points around each image, with uniform noise of width WIDTH in image units. An
#: indicator fires if its value is above PASSES.
POINTS, WIDTH, PASSES = 100, 8 / 255, 0.1
#: A loss still rises if it rose in the last LAST steps by more than FALLS times its range.
LAST, FALLS = 10, 0.05
#: The indicators in the order of the paper, without "transfer failure".
INDICATORS = (
    "unavailable gradients",
    "unstable predictions",
    "silent success",
    "incomplete optimization",
    "unconstrained attack failure",
)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each image ``[B]``, and a mask of misclassified images."""
    logits = model(x)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) != y


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient to the images, zero if PyTorch has none; the loss; and a mask of misclassified images."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss, wrong = losses(model, leaf, y)
        slope = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(x) if slope is None else slope, loss.detach(), wrong


def run(model: nn.Module, x: Tensor, y: Tensor, eps: float, length: float) -> tuple[Tensor, Tensor]:
    """One run of PGD.

    Args:
        model: images to logits.
        x: images ``[B, C, H, W]``.
        y: labels, int64 ``[B]``.
        eps: the L-inf radius.
        length: length of a step, in image units.

    Returns:
        The losses before and after each step, ``[STEPS + 1, B]``, and the masks of misclassified images.
    """
    point, every, fallen = x, [], []
    for _ in range(STEPS):
        slope, loss, wrong = gradient(model, point, y)
        every.append(loss)
        fallen.append(wrong)
        point = pgd_step(point, slope.nan_to_num(), x, length, eps)
    loss, wrong = losses(model, point, y)
    return torch.stack([*every, loss]), torch.stack([*fallen, wrong])


def still_rising(loss: Tensor) -> Tensor:
    """Tell for each image whether the best loss so far still rises in the last steps.

    Args:
        loss: loss after each step, ``[steps, B]``.
    """
    best = loss.nan_to_num().cummax(0).values
    least, most = loss.nan_to_num().amin(0), best[-1]
    return (most - best[-LAST]) > FALLS * (most - least).clamp_min(1e-12)


def unstable(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean relative change of the loss under small noise, at most 1."""
    generator = torch.Generator().manual_seed(0)
    before = losses(model, x, y)[0]
    scale = torch.where(before == 0, torch.ones_like(before), before.abs())
    noise = ((torch.rand(x.shape, generator=generator) - 0.5) * WIDTH for _ in range(POINTS))
    changes = [((losses(model, x + each.to(x), y)[0] - before).abs() / scale).mean() for each in noise]
    return min(1.0, float(torch.stack(changes).mean().nan_to_num(1.0)))


def indicators(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """The value of each indicator: the share of images for which it is true, or its mean.

    Args:
        model: images to logits.
        x: images ``[N, C, H, W]`` in [0, 1].
        y: labels, int64 ``[N]``.
        eps: the L-inf radius.
    """
    torch.manual_seed(0)
    with torch.no_grad(), frozen(model):
        missing = ~gradient(model, x, y)[0].flatten(1).any(1)
        loss, wrong = run(model, x, y, eps, LENGTH * eps)
        silent = wrong.any(0) & ~wrong[-1]
        never = ~run(model, x, y, 1.0, UNCONSTRAINED)[1].any(0)
        shares = [missing, silent, still_rising(loss), never]
        values = [float(each.float().mean()) for each in shares]
        values.insert(1, unstable(model, x, y))
    return dict(zip(INDICATORS, values, strict=True))


def fired(values: dict[str, float]) -> list[str]:
    """The indicators that say that an attack failed.

    Args:
        values: result of `indicators`.
    """
    return [name for name, value in values.items() if value > PASSES]
