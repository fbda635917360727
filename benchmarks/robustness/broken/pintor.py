"""Compute the indicators of Pintor et al., "Indicators of attack failure", NeurIPS 2022 (arXiv 2106.09947).

They are computed as in the authors' code, by PGD on the cross-entropy. "Transfer failure" is left out, because no
attack here comes from another model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast.attacks import frozen
from purify_fast.ops.pgd_step import pgd_step

#: Increase this number if a change in this file changes results: older saved results are then computed again.
REVISION = 1
#: PGD attacks IMAGES images with STEPS steps. The length of a step is LENGTH times eps. The last indicator uses a PGD
#: that may change images by any amount. Its steps have the length UNCONSTRAINED, in image units.
IMAGES, STEPS, LENGTH, UNCONSTRAINED = 40, 100, 0.1, 8 / 255
#: Losses at POINTS points of uniform noise in a range of WIDTH are compared; an indicator fires above PASSES.
POINTS, WIDTH, PASSES = 100, 8 / 255, 0.1
#: A loss is still rising if its running maximum grows over the last LAST values by more than FALLS times the range of
#: all values.
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
    """Return the cross-entropy of each image ``[B]``, and the mask of misclassified images ``[B]``."""
    logits = model(x)
    return F.cross_entropy(logits, y, reduction="none"), logits.argmax(1) != y


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses' gradient (0 if there is none), the losses, and the mask of misclassified images."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        loss, wrong = losses(model, leaf, y)
        slope = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(x) if slope is None else slope, loss.detach(), wrong


def run(model: nn.Module, x: Tensor, y: Tensor, eps: float, length: float) -> tuple[Tensor, Tensor]:
    """Run PGD once."""
    point, every, fallen = x, [], []
    for _ in range(STEPS):
        slope, loss, wrong = gradient(model, point, y)
        every.append(loss)
        fallen.append(wrong)
        point = pgd_step(point, slope.nan_to_num(), x, length, eps)
    loss, wrong = losses(model, point, y)
    return torch.stack([*every, loss]), torch.stack([*fallen, wrong])


def still_rising(loss: Tensor) -> Tensor:
    """Tell for each image whether the loss is still rising in the last steps."""
    best = loss.nan_to_num().cummax(0).values
    least, most = loss.nan_to_num().amin(0), best[-1]
    return (most - best[-LAST]) > FALLS * (most - least).clamp_min(1e-12)


def unstable(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean relative change of the loss under small noise, limited to 1."""
    generator = torch.Generator().manual_seed(0)
    before = losses(model, x, y)[0]
    scale = torch.where(before == 0, torch.ones_like(before), before.abs())
    noise = ((torch.rand(x.shape, generator=generator) - 0.5) * WIDTH for _ in range(POINTS))
    changes = [((losses(model, x + each.to(x), y)[0] - before).abs() / scale).mean() for each in noise]
    return min(1.0, float(torch.stack(changes).mean().nan_to_num(1.0)))


def indicators(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Return the value of each indicator: the share of images for which it is true, or the mean of a number."""
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
    """Return the names of the indicators that fired."""
    return [name for name, value in values.items() if value > PASSES]
