"""What guides a reverse process to the image that it purifies: GDMP (Wang et al., arXiv 2205.14969).

    x_s = step(x_t) - w dD(x_t, y_t) / dx_t,   y_t = alpha y + sigma z' the noised input,   w = variance g sigma / alpha

The authors' code (JinyiW/GuidedDiffusionPur, commit 6ee8b1a) has this in purification/diff_purify.py:15-31 and
pytorch_diffusion/diffusion.py:80-82 and 269-271, and averages D over the images of a batch too. Here D is of each image
alone, so that no image changes another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Guidance = Literal["mse", "ssim"]
#: Of SSIM: the window's side and standard deviation in pixels, and what keeps its fractions finite.
WINDOW, DEVIATION, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


def mse(x: Tensor, y: Tensor) -> Tensor:
    """The mean square difference of each image, ``[B]``.

    Args:
        x: images ``[B, C, H, W]``.
        y: likewise.
    """
    return (x - y).square().flatten(1).mean(1)


def ssim_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 - SSIM of each image, ``[B]``: Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 2004, equation 13.

    Args:
        x: images ``[B, C, H, W]``; zeros are around them, and the range of the constants is 1.
        y: likewise.
    """
    offsets = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    line = torch.softmax(-offsets.square() / (2 * DEVIATION**2), 0)
    window = (line[:, None] * line).expand(x.shape[1], 1, WINDOW, WINDOW)

    def local(image: Tensor) -> Tensor:
        return F.conv2d(image, window, padding=WINDOW // 2, groups=image.shape[1])

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x.square() + local(y * y) - mean_y.square()
    covariance = local(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    return 1 - (means * (2 * covariance + C2) / (variances + C2)).flatten(1).mean(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "ssim": ssim_distance}


def distance_gradient(guidance: Guidance, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's distance to x, which is differentiable to x and y where gradients are recorded.

    Args:
        guidance: which distance.
        x: states ``[B, C, H, W]``.
        y: noised inputs, likewise.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        distance = DISTANCES[guidance](point, y).sum()
        return torch.autograd.grad(distance, point, create_graph=recorded)[0]
