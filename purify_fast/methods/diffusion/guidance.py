"""Guidance of a reverse process toward the input image: GDMP (Wang et al., arXiv 2205.14969).

    x_s = step(x_t) - w dD(x_t, y_t) / dx_t,   y_t = alpha y + sigma z',   w = variance g sigma / alpha

Here y is the input image, y_t is the input with fresh noise z' up to the time t, g is `Process.guidance_scale`, and
"variance" is the variance of the step's noise, which may differ from pixel to pixel.

D is the mean squared difference, or 1 - SSIM (Wang, Bovik, Sheikh & Simoncelli, IEEE TIP 2004, equation 13). With the
local means E under a Gaussian window, m = E[x] and n = E[y]:

    SSIM = mean of S,  S = [(2 m n + C1) / (m^2 + n^2 + C1)] [(2 cov + C2) / (var + C2)],
    cov = E[x y] - m n,   var = E[x^2] - m^2 + E[y^2] - n^2

The gradients are explicit formulas, so autograd can differentiate the guided process. In the authors' code
(JinyiW/GuidedDiffusionPur, commit 6ee8b1a), D is a mean over the batch; here each image has its own D.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._settings import without_autocast

Guidance = Literal["mse", "ssim"]
#: Constants of SSIM: the window's side, its standard deviation in pixels, and two terms that avoid a division by 0.
WINDOW, DEVIATION, C1, C2 = 11, 1.5, 0.01**2, 0.03**2


def mse_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each image's mean squared difference with respect to x, in the shape of x."""
    return 2 * (x - y) / prod(x.shape[1:])


def ssim_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each image's 1 - SSIM with respect to x, in the shape of x."""
    offsets = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    line = torch.softmax(-offsets.square() / (2 * DEVIATION**2), 0)
    window = (line[:, None] * line).expand(x.shape[1], 1, WINDOW, WINDOW)

    def local(image: Tensor) -> Tensor:
        with without_autocast(image.device):
            return F.conv2d(image, window, padding=WINDOW // 2, groups=image.shape[1])

    m, n = local(x), local(y)
    means, squares = 2 * m * n + C1, m.square() + n.square() + C1
    covariance = 2 * (local(x * y) - m * n) + C2
    variances = local(x.square() + y.square()) - m.square() - n.square() + C2
    similarity = means * covariance / (squares * variances)
    # `by_product`, `by_square` and `by_mean` are the derivatives of S with respect to E[x y], E[x^2] and m. The window
    # is symmetric, so the operator `local` is its own adjoint.
    by_product = 2 * means / (squares * variances)
    by_square = -similarity / variances
    by_mean = 2 * n * covariance / (squares * variances) - 2 * m * similarity / squares
    by_mean = by_mean - n * by_product - 2 * m * by_square
    return -(local(by_mean) + 2 * x * local(by_square) + y * local(by_product)) / prod(x.shape[1:])


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse_gradient, "ssim": ssim_gradient}
