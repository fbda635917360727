"""The settings of a purification by diffusion, and the table of its steps (`StepTable`).

In each round, the first row adds noise up to t*, and each further row is a step of the solver. A step from the time t
to the earlier time s is

    x0 = clip(P x + Q m, -c, c),   x_s = A x0 + B x + d z          (`purify_fast.ops.diffusion_step`)

Here x is x_t, m is the denoiser's prediction at t, and z ~ N(0, I). c is 1, or infinite if `Process.clip` is False. P
and Q depend on the predicted quantity, and A, B and d on the solver. alpha and sigma are those of t, alpha' and sigma'
of s:

    noise   P = 1 / alpha,  Q = -sigma / alpha
    x0      P = 0,          Q = 1
    v       P = alpha,      Q = -sigma                      Salimans & Ho, ICLR 2022, arXiv 2202.00512, section 4

    ddpm      with b = 1 - alpha^2 / alpha'^2:              Ho et al., arXiv 2006.11239, equation 7
              A = b alpha' / sigma^2,  B = (1 - b)^(1/2) sigma'^2 / sigma^2,
              d^2 = b sigma'^2 / sigma^2 (small), b (large), or predicted by the denoiser between the two (learned)
    ddim      d = eta b^(1/2) sigma' / sigma,  e = (sigma'^2 - d^2)^(1/2),    Song et al., arXiv 2010.02502, equation 12
              A = alpha' - e alpha / sigma,  B = e / sigma
    vp_sde    with r = beta(t) (t - s):                     Song et al., arXiv 2011.13456, equation 6, by Euler-Maruyama
              A = r alpha / sigma^2,  B = 1 + r / 2 - r / sigma^2,  d^2 = r
    ode       A = r alpha / (2 sigma^2),  B = 1 + r / 2 - r / (2 sigma^2),  d = 0       ibid., equation 13, by Euler
    one_shot  A = 1,  B = 0,  d = 0                         Carlini et al., arXiv 2206.10550, section 3

The score of x_t is (alpha x0 - x) / sigma^2. beta(t) is `Schedule.rate`. DDPM's last step adds no noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._validation import AtLeast0, Share, check_counts, check_types
from ...ops.diffusion_step import STEPS
from .config import Solver
from .guidance import Guidance
from .schedule import Schedule, Times

Prediction = Literal["noise", "x0", "v"]
Variance = Literal["small", "large", "learned"]


class StepTable(NamedTuple):
    """The table of a process, with a row for each of n steps, float64."""

    #: The coefficients of `purify_fast.ops.diffusion_step`, ``[n, 8]``.
    coefficients: Tensor
    #: The coefficients with which guidance adds noise to the input image, up to the time of the row, ``[n, 8]``.
    targets: Tensor
    #: The times in the denoiser's units, ``[n]``.
    times: Tensor
    #: The factor w of the guidance, ``[n]``. With learned variances, this is w divided by the variance.
    weights: Tensor


@dataclass(frozen=True)
class Process:
    """The settings by which images are noised and denoised.

    Args:
        schedule: noise schedule for which the denoiser was trained: an object, or the name ``linear``, ``cosine`` or
            ``vp``, which is replaced by the schedule of this kind.
        prediction: quantity that the denoiser predicts: ``noise``, ``x0``, or ``v`` = alpha noise - sigma x0.
        times: units of the denoiser's time (`Schedule.to_denoiser_units`). None means the training step's index, or
            score-SDE's continuous time for the schedule ``vp``.
        solver: ``ddpm``, ``ddim``, ``vp_sde`` (Euler-Maruyama steps of the reverse SDE), ``ode`` (Euler steps of the
            probability flow) or ``one_shot`` (the image that is predicted at t*).
        t_star: time up to which noise is added, as a share of the process. Several times define several rounds; each
            round purifies the result of the previous round.
        steps: number of the solver's steps: one number for all rounds, or a number for each round. None means a step
            for each training step.
        eta: parameter of ddim: with 0 it adds no noise, and with 1 the same noise as ddpm.
        variance: variance of ddpm's noise: ``small`` or ``large``, the two bounds of Ho et al., or ``learned``.
        clip: whether each step's estimate of the image is clipped to [-1, 1], and the purified image to [0, 1]. If
            False, purified images may have values slightly outside [0, 1].
        denoise_last: whether the last step of vp_sde adds no noise (``denoise`` in sampling.py of
            yang-song/score_sde_pytorch). The last step of other solvers never adds noise.
        guidance: distance from the noised input, ``mse`` or ``ssim``, whose gradient guides each step. None means no
            guidance.
        guidance_scale: g, a factor of the guidance, in addition to the step's variance and sigma / alpha.

    Raises:
        ValueError: a setting is out of range, or settings contradict each other; the message names them.
    """

    schedule: Schedule = Schedule()
    prediction: Prediction = "noise"
    times: Times | None = None
    solver: Solver = "ddpm"
    t_star: float | tuple[float, ...] = 0.1
    steps: int | tuple[int, ...] | None = None
    eta: Share = 0.0
    variance: Variance = "small"
    clip: bool = True
    denoise_last: bool = False
    guidance: Guidance | None = None
    guidance_scale: AtLeast0 = 0.0

    def __post_init__(self) -> None:
        for name in ("t_star", "steps"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        schedule: Any = self.schedule
        schedule = {"kind": schedule} if isinstance(schedule, str) else schedule
        object.__setattr__(self, "schedule", schedule if isinstance(schedule, Schedule) else Schedule(**schedule))
        check_types(self)
        counts = [n for _, n in self.rounds if n is not None]
        for count in counts:
            check_counts(steps=count)
        if self.solver == "one_shot" and set(counts) - {1}:
            raise ValueError(f"steps must be 1 or None for the solver one_shot, got {self.steps}")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta must be 0 for the solver {self.solver}, because only ddim uses it, got {self.eta}")
        noiseless = self.solver in ("ode", "one_shot") or (self.solver == "ddim" and not self.eta)
        if self.guidance is not None and noiseless:
            raise ValueError(f"guidance needs a solver that adds noise, got {self.solver!r} with eta {self.eta}")
        # `table` refuses settings that the schedule does not support. Guidance draws noise of its own, so each row has
        # two step numbers.
        rows = len(self.table()[1])
        if 2 * rows > STEPS:
            raise ValueError(f"the sum of steps + 1 over all rounds must be at most {STEPS // 2}, got {rows}")

    @property
    def rounds(self) -> list[tuple[float, int | None]]:
        """The time t* and the number of steps of each round."""
        starts = self.t_star if isinstance(self.t_star, tuple) else (self.t_star,)
        counts = self.steps if isinstance(self.steps, tuple) else (self.steps,) * len(starts)
        if not starts or len(counts) != len(starts):
            raise ValueError(f"steps must be one number, or as many as t_star has, got {self.steps} for {self.t_star}")
        return list(zip(starts, counts, strict=True))

    @property
    def learns_variances(self) -> bool:
        """True if the second half of the denoiser's output channels determines the variance of the noise."""
        return self.solver == "ddpm" and self.variance == "learned"

    @property
    def time_units(self) -> Times:
        """The units of the denoiser's time."""
        return self.times or ("continuous" if self.schedule.is_continuous else "index")

    def table(self) -> tuple[StepTable, list[bool]]:
        """Return the table of all rounds, and a bool for each row: True if the row begins a round by adding noise."""
        rows, begins = [], []
        for start, count in self.rounds:
            t = self.schedule.times(start, 1 if self.solver == "one_shot" else count)
            steps, variances = self.denoising(t)
            forward = self.schedule.noising(t[:-1])
            units = self.schedule.to_denoiser_units(t[:-1], self.time_units)
            if self.learns_variances:
                # Each step multiplies the weight by the variance that the denoiser predicts.
                variances = torch.ones_like(variances)
            weights = variances * self.guidance_scale * forward[:, 5] / forward[:, 4]
            blank = torch.zeros(1, dtype=torch.float64, device="cpu")
            rows.append(StepTable(forward[:1], forward[:1], blank, blank))
            rows.append(StepTable(steps, forward, units, weights))
            begins += [True] + [False] * len(steps)
        return StepTable(*(torch.cat(column) for column in zip(*rows, strict=True))), begins

    def denoising(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step for each interval of the descending ``times``, and the variances of the steps for the guidance.

        The steps are coefficients of `purify_fast.ops.diffusion_step`, float64 ``[n, 8]``. The last step of ddpm adds
        no noise; its variance is the small variance of the step before, as in DDPM's code.
        """
        t, s = times[:-1], times[1:]
        kept, kept_s = self.schedule.alpha_bar(t), self.schedule.alpha_bar(s)
        alpha, sigma, alpha_s = kept.sqrt(), (1 - kept).sqrt(), kept_s.sqrt()
        zero, one = torch.zeros_like(t), torch.ones_like(t)
        p, q = {"noise": (1 / alpha, -sigma / alpha), "x0": (zero, one), "v": (alpha, -sigma)}[self.prediction]
        b, r = 1 - kept / kept_s, self.schedule.rate(t) * (t - s)
        small = b * (1 - kept_s) / (1 - kept)
        low = high = noise = zero
        if self.solver == "ddpm":
            image, state = b * alpha_s / sigma.square(), (1 - b).sqrt() * (1 - kept_s) / sigma.square()
            small[-1] = small[-2] if len(t) > 1 else b[-1]
            large = torch.cat([b[:-1], small[-1:]])
            noise = large if self.variance == "large" else small
            if self.variance == "learned":
                low, high = small.log(), b.log()
        elif self.solver == "ddim":
            noise = self.eta**2 * small
            rest = (1 - kept_s - noise).clamp(min=0).sqrt()
            image, state = alpha_s - rest * alpha / sigma, rest / sigma
        elif self.solver == "one_shot":
            image, state = one, zero
        else:
            share = 1.0 if self.solver == "vp_sde" else 0.5
            image, state = share * r * alpha / sigma.square(), 1 + r / 2 - share * r / sigma.square()
            noise = r if self.solver == "vp_sde" else noise
        deviation = one.clone() if self.learns_variances else noise.sqrt()
        if self.solver == "ddpm" or self.denoise_last:
            deviation[-1] = 0
        columns = [p, q, torch.full_like(t, 1.0 if self.clip else inf), image, state, deviation, low, high]
        return torch.stack(columns, -1), noise
