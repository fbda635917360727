"""Solvers of the reverse process, each as the coefficients of one step from the time t to the earlier s.

    x0 = clip(P x + Q m, -c, c),   x_s = A x0 + B x + d z          (`purify_fast.ops.diffusion_step`)

m is the denoiser's prediction at t. With alpha and sigma at t, alpha' and sigma' at s:

    noise   P = 1 / alpha,  Q = -sigma / alpha
    x0      P = 0,          Q = 1
    v       P = alpha,      Q = -sigma                      Salimans & Ho, ICLR 2022, arXiv 2202.00512, section 4

    ddpm      with b = 1 - alpha^2 / alpha'^2:              Ho et al., arXiv 2006.11239, equation 7
              A = b alpha' / sigma^2,  B = (1 - b)^(1/2) sigma'^2 / sigma^2,
              d^2 = b sigma'^2 / sigma^2 (small), b (large), or between them as the denoiser says (learned)
    ddim      d = eta sigma' / sigma b^(1/2),  e = (sigma'^2 - d^2)^(1/2),    Song et al., arXiv 2010.02502, equation 12
              A = alpha' - e alpha / sigma,  B = e / sigma
    vp_sde    with r = beta(t) (t - s):                     Song et al., arXiv 2011.13456, equation 6, by Euler-Maruyama
              A = r alpha / sigma^2,  B = 1 + r / 2 - r / sigma^2,  d^2 = r
    ode       A = r alpha / (2 sigma^2),  B = 1 + r / 2 - r / (2 sigma^2),  d = 0       equation 13 there, by Euler
    one_shot  A = 1,  B = 0,  d = 0                         Carlini et al., arXiv 2206.10550, section 3

The score of x_t is (alpha x0 - x) / sigma^2, which gives vp_sde and ode their A and B. DDPM's last step adds no noise.
"""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from torch import Tensor

from .schedule import Schedule

Solver = Literal["ddpm", "ddim", "vp_sde", "ode", "one_shot"]
Prediction = Literal["noise", "x0", "v"]
Variance = Literal["small", "large", "learned"]


def of_prediction(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """P and Q, by which x0 = P x + Q m.

    Args:
        kind: quantity that m predicts.
        alpha: factor of the image, any shape.
        sigma: factor of the noise, the same shape.
    """
    if kind == "noise":
        return 1 / alpha, -sigma / alpha
    if kind == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    return alpha, -sigma


def learned_variance(share: Tensor, log_low: Tensor, log_high: Tensor) -> Tensor:
    """The variance that a denoiser chooses between two, in the shape of its choice; differentiable.

    Args:
        share: from -1, the lower variance, to 1, the higher one, ``[B, C, H, W]``.
        log_low: the lower one's logarithm, ``[]``.
        log_high: the higher one's logarithm, ``[]``.
    """
    return torch.exp((1 + share) / 2 * log_high + (1 - share) / 2 * log_low)


def noising(schedule: Schedule, t: Tensor) -> Tensor:
    """The coefficients of the forward process, alpha x + sigma z, float64 ``[..., 8]``.

    Args:
        schedule: schedule of the process.
        t: times, any shape.
    """
    kept = schedule.alpha_bar(t)
    zero = torch.zeros_like(kept)
    columns = [zero, zero, zero + inf, zero, kept.sqrt(), (1 - kept).sqrt(), zero, zero]
    return torch.stack(columns, -1)


def denoising(
    schedule: Schedule,
    times: Tensor,
    *,
    solver: Solver,
    prediction: Prediction,
    variance: Variance,
    eta: float,
    clip: bool,
    denoise_last: bool = False,
) -> tuple[Tensor, Tensor]:
    """The coefficients of the steps of a reverse process, and the variances by which guidance moves their means.

    Args:
        schedule: schedule of the process.
        times: float64 ``[n + 1]``, falling.
        solver: name of the solver.
        prediction: quantity that the denoiser predicts.
        variance: variance of ddpm.
        eta: parameter of ddim.
        clip: whether x0 is clipped to [-1, 1].
        denoise_last: whether the last step adds no noise.

    Returns:
        Float64 ``[n, 8]``, as `purify_fast.ops.diffusion_step` takes them, and the variances ``[n]`` of the noise. The
        last step adds no noise; like DDPM's code, it takes the variance of the step before.
    """
    t, s = times[:-1], times[1:]
    kept, kept_s = schedule.alpha_bar(t), schedule.alpha_bar(s)
    alpha, sigma, alpha_s = kept.sqrt(), (1 - kept).sqrt(), kept_s.sqrt()
    p, q = of_prediction(prediction, alpha, sigma)
    b, r = 1 - kept / kept_s, schedule.rate(t) * (t - s)
    small = b * (1 - kept_s) / (1 - kept)
    low, high = torch.zeros_like(t), torch.zeros_like(t)
    noise = torch.zeros_like(t)
    if solver == "ddpm":
        image, state = b * alpha_s / sigma.square(), (1 - b).sqrt() * (1 - kept_s) / sigma.square()
        small[-1] = small[-2] if len(t) > 1 else b[-1]
        large = torch.cat([b[:-1], small[-1:]])
        noise = large if variance == "large" else small
        if variance == "learned":
            low, high = small.log(), b.log()
    elif solver == "ddim":
        noise = eta**2 * small
        rest = (1 - kept_s - noise).clamp(min=0).sqrt()
        image, state = alpha_s - rest * alpha / sigma, rest / sigma
    elif solver == "one_shot":
        image, state = torch.ones_like(t), torch.zeros_like(t)
    else:
        share = 1.0 if solver == "vp_sde" else 0.5
        image, state = share * r * alpha / sigma.square(), 1 + r / 2 - share * r / sigma.square()
        noise = r if solver == "vp_sde" else noise
    deviation = torch.ones_like(t) if solver == "ddpm" and variance == "learned" else noise.sqrt()
    if solver == "ddpm" or denoise_last:
        deviation[-1] = 0
    columns = [p, q, torch.full_like(t, 1.0 if clip else inf), image, state, deviation, low, high]
    return torch.stack(columns, -1), noise
