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
from math import inf, pi
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._validation import Range, Share, check_counts, check_types
from ...ops.diffusion_step import STEPS
from .method import Solver

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


# -- the settings of a purification by diffusion, and the table of its steps (`StepTable`) -----------------------------

Prediction = Literal["noise", "x0", "v"]
Variance = Literal["small", "large", "learned"]


class StepTable(NamedTuple):
    """The table of a process, with a row for each of n steps, float64."""

    #: The coefficients of `purify_fast.ops.diffusion_step`, ``[n, 8]``.
    coefficients: Tensor
    #: The times in the denoiser's units, ``[n]``.
    times: Tensor


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
        # `table` refuses settings that the schedule does not support.
        rows = len(self.table()[1])
        if rows > STEPS:
            raise ValueError(f"the sum of steps + 1 over all rounds must be at most {STEPS}, got {rows}")

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
            steps = self.denoising(t)
            blank = torch.zeros(1, dtype=torch.float64, device="cpu")
            rows.append(StepTable(self.schedule.noising(t[:1]), blank))
            rows.append(StepTable(steps, self.schedule.to_denoiser_units(t[:-1], self.time_units)))
            begins += [True] + [False] * len(steps)
        return StepTable(*(torch.cat(column) for column in zip(*rows, strict=True))), begins

    def denoising(self, times: Tensor) -> Tensor:
        """Return a step for each interval of the descending ``times``.

        The steps are coefficients of `purify_fast.ops.diffusion_step`, float64 ``[n, 8]``. The last step of ddpm adds
        no noise.
        """
        t, s = times[:-1], times[1:]
        kept, kept_s = self.schedule.alpha_bar(t), self.schedule.alpha_bar(s)
        alpha, sigma, alpha_s = kept.sqrt(), (1 - kept).sqrt(), kept_s.sqrt()
        zero, unit = torch.zeros_like(t), torch.ones_like(t)
        p, q = {"noise": (1 / alpha, -sigma / alpha), "x0": (zero, unit), "v": (alpha, -sigma)}[self.prediction]
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
            image, state = unit, zero
        else:
            share = 1.0 if self.solver == "vp_sde" else 0.5
            image, state = share * r * alpha / sigma.square(), 1 + r / 2 - share * r / sigma.square()
            noise = r if self.solver == "vp_sde" else noise
        deviation = unit.clone() if self.learns_variances else noise.sqrt()
        if self.solver == "ddpm" or self.denoise_last:
            deviation[-1] = 0
        columns = [p, q, torch.full_like(t, 1.0 if self.clip else inf), image, state, deviation, low, high]
        return torch.stack(columns, -1)
