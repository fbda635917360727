"""Defines the noise schedules of diffusion models. The time t runs from 0 (the image) to 1 (only noise).

    x_t = alpha x_0 + sigma z,   alpha^2 = alpha_bar(t),   sigma^2 = 1 - alpha_bar(t),   z ~ N(0, I)

In the denoiser's training, the time is divided into N steps (*training steps*). Step i has the time t = i / N, and
alpha_bar(i / N) is the product of 1 - beta_j for j = 1 .. i:

    linear   beta_i from 1e-4 to 0.02, evenly        Ho, Jain & Abbeel, NeurIPS 2020, arXiv 2006.11239, section 4
    cosine   alpha_bar = f(t) / f(0),                Nichol & Dhariwal, ICML 2021, arXiv 2102.09672, section 3.2
             f(t) = cos^2(pi / 2 (t + 0.008) / 1.008), and no beta above 0.999
    vp       alpha_bar = exp(-b_0 t - (b_1 - b_0) t^2 / 2),  b_0 = 0.1, b_1 = 20, for any t in [0, 1]
             the variance preserving SDE of Song et al., ICLR 2021, arXiv 2011.13456, appendix C
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, pi
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..._validation import Range, check_types

ScheduleKind = Literal["linear", "cosine", "vp"]
#: The units of a denoiser's input t.
Times = Literal["index", "rescaled", "continuous"]
#: Number of steps for which ``first_beta`` and ``last_beta`` are stated. With fewer steps, the betas are larger.
USUAL_STEPS = 1000
#: Largest number of training steps, and of steps of a reverse process.
MOST_STEPS = 10_000
#: Upper bound for the betas of a cosine schedule.
LARGEST_BETA = 0.999
#: A continuous reverse process ends here: at 0 the score is infinite (DiffPure, runners/diffpure_sde.py:228).
END = 1e-5
Beta = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclass(frozen=True)
class Schedule:
    """The amount of noise that a diffusion process has added at the time t.

    Args:
        kind: ``linear``, ``cosine`` or ``vp``; the module's docstring has the formulas.
        steps: N, number of the denoiser's training steps. The times of vp are continuous; `to_denoiser_units` can round
            them to N indices.
        first_beta: variance that the first of 1,000 steps adds, for linear and vp; no effect on cosine.
        last_beta: variance that the last of 1,000 steps adds, for linear and vp; no effect on cosine.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    kind: ScheduleKind = "linear"
    steps: Annotated[int, Range(1, MOST_STEPS)] = USUAL_STEPS
    first_beta: Beta = 1e-4
    last_beta: Beta = 0.02

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind == "linear" and not float(self.betas.max()) < 1:
            raise ValueError(f"last_beta must be below {self.steps / USUAL_STEPS}, got {self.last_beta}")

    @property
    def least_time(self) -> float:
        """The smallest time of a step."""
        return END if self.is_continuous else 1 / self.steps

    @property
    def is_continuous(self) -> bool:
        """True if there are times between the training steps."""
        return self.kind == "vp"

    @property
    def betas(self) -> Tensor:
        """The variances that the training steps of linear and cosine add, float64 ``[N]``."""
        if self.kind == "cosine":
            t = torch.arange(self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
            kept = torch.cos(pi / 2 * (t + 0.008) / 1.008).square()
            return (1 - kept[1:] / kept[:-1]).clamp(max=LARGEST_BETA)
        scale = USUAL_STEPS / self.steps
        return scale * torch.linspace(self.first_beta, self.last_beta, self.steps, dtype=torch.float64, device="cpu")

    def alpha_bar(self, t: Tensor) -> Tensor:
        """Return alpha_bar at times in [0, 1], float64. linear and cosine round to the nearest training step."""
        t = t.double()
        if self.is_continuous:
            low, high = USUAL_STEPS * self.first_beta, USUAL_STEPS * self.last_beta
            return torch.exp(-low * t - 0.5 * (high - low) * t.square())
        products = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), (1 - self.betas).cumprod(0)])
        return products.to(t.device)[self._step(t)]

    def noising(self, t: Tensor) -> Tensor:
        """Return the coefficients with which `diffusion_step` computes alpha x + sigma z, float64 ``[..., 8]``."""
        kept = self.alpha_bar(t)
        zero = torch.zeros_like(kept)
        columns = [zero, zero, zero + inf, zero, kept.sqrt(), (1 - kept).sqrt(), zero, zero]
        return torch.stack(columns, -1)

    def rate(self, t: Tensor) -> Tensor:
        """Return beta(t) of dx = -beta x / 2 dt + sqrt(beta) dw, float64. Discrete steps have the length 1 / N."""
        t = t.double()
        if self.is_continuous:
            return USUAL_STEPS * (self.first_beta + t * (self.last_beta - self.first_beta))
        return self.steps * self.betas.to(t.device)[self._step(t) - 1]

    def _step(self, t: Tensor) -> Tensor:
        return (t * self.steps).round().long()

    def times(self, start: float, steps: int | None = None) -> Tensor:
        """Return evenly spaced times from ``start`` in (0, 1], float64 ``[steps + 1]``; None: every training step."""
        first = round(start * self.steps) if 0 < start <= 1 else 0
        if first < 1:
            raise ValueError(f"t_star must be in (0, 1] and at least 1 / {self.steps}, got {start}")
        steps = first if steps is None else steps
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps}")
        if self.is_continuous:
            times = torch.linspace(start, 0, steps + 1, dtype=torch.float64, device="cpu")
            times[-1] = END
            return times
        if steps > first:
            raise ValueError(f"steps must be at most {first}, the training step of t_star = {start}, got {steps}")
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64, device="cpu").round() / self.steps

    def to_denoiser_units(self, t: Tensor, times: Times) -> Tensor:
        """Convert times in (0, 1] to a denoiser's units, float64.

        ``index``: index of the training step, from 0 to N - 1. ``rescaled``: the index multiplied by 1,000 / N, as in
        guided-diffusion's ``rescale_timesteps``. ``continuous``: 999 t, as in score-SDE.
        """
        if times == "continuous":
            return 999 * t.double()
        # DiffPure rounds the times of its SDE down for denoisers with discrete times (runners/diffpure_sde.py:84)
        index = (t * self.steps).floor().clamp(max=self.steps - 1) if self.is_continuous else self._step(t) - 1
        return index.double() * (USUAL_STEPS / self.steps if times == "rescaled" else 1)

    def time_of(self, sigma: float) -> float:
        """Return the time of the first training step with at least this noise (arXiv 2206.10550, section 3).

        ``sigma`` is the standard deviation of noise for unscaled images in [0, 1]. In the process, images are in
        [-1, 1], and the noise is 2 sigma. A ValueError is raised if no time has so much noise.
        """
        t = torch.arange(1, self.steps + 1, dtype=torch.float64, device="cpu") / self.steps
        kept = self.alpha_bar(t)
        enough = ((1 - kept) / kept).sqrt() >= 2 * sigma
        if not sigma > 0 or not bool(enough.any()):
            most = float(((1 - kept[-1]) / kept[-1]).sqrt()) / 2
            raise ValueError(f"sigma must be above 0 and at most {most:.4g}, the noise at t = 1, got {sigma}")
        return float(t[enough.int().argmax()])
