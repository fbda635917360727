"""Noise schedules of diffusion models, over a time t from 0, the image, to 1, noise alone.

    x_t = alpha x_0 + sigma z,   alpha^2 = alpha_bar(t),   sigma^2 = 1 - alpha_bar(t),   z ~ N(0, I)

With N training steps, i is the step at t = i / N, and alpha_bar(i / N) the product of 1 - beta_j over j = 1 .. i:

    linear   beta_i from 1e-4 to 0.02, evenly        Ho, Jain & Abbeel, NeurIPS 2020, arXiv 2006.11239, section 4
    cosine   alpha_bar = f(t) / f(0),                Nichol & Dhariwal, ICML 2021, arXiv 2102.09672, section 3.2
             f(t) = cos^2(pi / 2 (t + 0.008) / 1.008), and no beta above 0.999
    vp       alpha_bar = exp(-b_0 t - (b_1 - b_0) t^2 / 2),  b = 0.1 and 20, at any t in between
             the variance preserving SDE of Song et al., ICLR 2021, arXiv 2011.13456, appendix C
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, pi
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..._validation import Range, check_types

ScheduleKind = Literal["linear", "cosine", "vp"]
#: The units in which a denoiser takes the time.
Times = Literal["index", "rescaled", "continuous"]
#: Number of steps for which betas are given: a schedule with fewer steps has larger betas.
USUAL_STEPS = 1000
#: The most training steps, and steps of a reverse process.
MOST_STEPS = 10_000
#: The largest beta of a cosine schedule.
LARGEST_BETA = 0.999
#: The end of a process in continuous time: at 0 the score is infinite. NVlabs/DiffPure, runners/diffpure_sde.py:228.
END = 1e-5
Beta = Annotated[float, Range(0, 1, above=True, below=True)]


# It is cached: a training needs it in every step, and would copy it to the device each time.
@functools.lru_cache(maxsize=16)
def _products(schedule: Schedule, device: torch.device) -> Tensor:
    """alpha_bar of all training steps and of the image before them, float64 ``[N + 1]``."""
    with torch.inference_mode(False):
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - schedule.betas).cumprod(0)]).to(device)


@dataclass(frozen=True)
class Schedule:
    """The noise that a diffusion process has added by the time t.

    Args:
        kind: ``linear``, ``cosine`` or ``vp``; the module's docstring has the formulas.
        steps: N, the number of training steps of the denoiser; for vp, the number of indices that count its times.
        first_beta: for linear and vp, the variance that the first of 1,000 steps adds; no effect on cosine.
        last_beta: the same for the last step.

    Raises:
        ValueError: a setting out of range; the message names it.
    """

    kind: ScheduleKind = "linear"
    steps: Annotated[int, Range(1, MOST_STEPS)] = USUAL_STEPS
    first_beta: Beta = 1e-4
    last_beta: Beta = 0.02

    def __post_init__(self) -> None:
        check_types(self)
        if self.kind == "linear" and not float(self.betas.max()) < 1:
            raise ValueError(
                f"last_beta must be below {self.steps / USUAL_STEPS} for {self.steps} steps, got {self.last_beta}"
            )

    @classmethod
    def of(cls, given: Schedule | Mapping[str, Any] | str) -> Schedule:
        """Make a schedule from its kind or its fields, as stored with a model.

        Args:
            given: a schedule, which is returned unchanged; its fields by name; or its kind.
        """
        if isinstance(given, Schedule):
            return given
        return cls(given) if isinstance(given, str) else cls(**given)  # type: ignore[arg-type]

    @property
    def is_continuous(self) -> bool:
        """Tell whether times between the training steps exist."""
        return self.kind == "vp"

    @property
    def betas(self) -> Tensor:
        """The variances that the training steps add, float64 ``[N]``; for linear and cosine."""
        if self.kind == "cosine":
            t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            kept = torch.cos(pi / 2 * (t + 0.008) / 1.008).square()
            return (1 - kept[1:] / kept[:-1]).clamp(max=LARGEST_BETA)
        scale = USUAL_STEPS / self.steps
        return scale * torch.linspace(self.first_beta, self.last_beta, self.steps, dtype=torch.float64)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """The share of the image in the variance, float64.

        Args:
            t: times in [0, 1], any shape; linear and cosine take the nearest training step.
        """
        t = t.double()
        if self.is_continuous:
            low, high = USUAL_STEPS * self.first_beta, USUAL_STEPS * self.last_beta
            return torch.exp(-low * t - 0.5 * (high - low) * t.square())
        return _products(self, t.device)[self._step(t)]

    def noising(self, t: Tensor) -> Tensor:
        """The coefficients of the forward process, alpha x + sigma z, float64 ``[..., 8]``.

        Args:
            t: times, any shape.
        """
        kept = self.alpha_bar(t)
        zero = torch.zeros_like(kept)
        columns = [zero, zero, zero + inf, zero, kept.sqrt(), (1 - kept).sqrt(), zero, zero]
        return torch.stack(columns, -1)

    def rate(self, t: Tensor) -> Tensor:
        """beta(t) of the SDE dx = -beta x / 2 dt + sqrt(beta) dw, whose discrete form has steps of 1 / N; float64.

        Args:
            t: times in (0, 1], any shape.
        """
        t = t.double()
        if self.is_continuous:
            return USUAL_STEPS * (self.first_beta + t * (self.last_beta - self.first_beta))
        return self.steps * self.betas.to(t.device)[self._step(t) - 1]

    def _step(self, t: Tensor) -> Tensor:
        return (t * self.steps).round().long()

    def times(self, start: float, steps: int | None = None) -> Tensor:
        """The times of a reverse process, from ``start`` to the end, evenly; float64 ``[steps + 1]``.

        Args:
            start: t*, in (0, 1].
            steps: number of steps, at least 1; None: every training step.

        Raises:
            ValueError: start is outside (0, 1], or there are fewer training steps.
        """
        first = round(start * self.steps) if 0 < start <= 1 else 0
        if first < 1:
            raise ValueError(f"t_star must be in (0, 1], and at least one of {self.steps} steps, got {start}")
        steps = first if steps is None else steps
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, got {steps}")
        if self.is_continuous:
            times = torch.linspace(start, 0, steps + 1, dtype=torch.float64)
            times[-1] = END
            return times
        if steps > first:
            raise ValueError(f"steps must be at most {first}, the training steps up to t_star = {start}, got {steps}")
        return torch.linspace(first, 0, steps + 1, dtype=torch.float64).round() / self.steps

    def told(self, t: Tensor, times: Times) -> Tensor:
        """Convert times of this schedule to a denoiser's units, float64.

        Args:
            t: times in (0, 1].
            times: ``index``: index of the training step, from 0 to N - 1. ``rescaled``: that index rescaled to 1,000,
                as in guided-diffusion's ``rescale_timesteps``. ``continuous``: 999 t, as in score-SDE.
        """
        if times == "continuous":
            return 999 * t.double()
        # DiffPure rounds the times of its SDE down for denoisers of discrete times (runners/diffpure_sde.py:84).
        index = (t * self.steps).floor().clamp(max=self.steps - 1) if self.is_continuous else self._step(t) - 1
        return index.double() * (USUAL_STEPS / self.steps if times == "rescaled" else 1)

    def time_of(self, sigma: float) -> float:
        """The time of the first training step at which images in [0, 1] have at least this noise.

        Args:
            sigma: standard deviation of the noise in image units, relative to the image: Carlini et al., arXiv
                2206.10550, section 3, whose process is in [-1, 1], where it is 2 sigma.

        Raises:
            ValueError: no time has so much noise.
        """
        t = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        kept = self.alpha_bar(t)
        enough = ((1 - kept) / kept).sqrt() >= 2 * sigma
        if not sigma > 0 or not bool(enough.any()):
            raise ValueError(f"sigma must be above 0 and at most the noise at t = 1, got {sigma}")
        return float(t[enough.int().argmax()])
