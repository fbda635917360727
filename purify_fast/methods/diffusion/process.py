"""The settings of a purification by diffusion, and the table of its steps.

A step takes its numbers from a row of a table (`Table`), so that no value is read by the host. A round begins with a
row that adds noise up to its t*; a row for each step of the solver follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._validation import AtLeast0, Share, check_counts, check_types
from ...ops.diffusion_step import STEPS
from .guidance import Guidance
from .schedule import Schedule, Times
from .solvers import Prediction, Solver, Variance, denoising, noising


class Table(NamedTuple):
    """The numbers of n rows, float64 unless noted otherwise."""

    #: The coefficients of `purify_fast.ops.diffusion_step`, ``[n, 8]``.
    coefficients: Tensor
    #: The coefficients that noise an image up to the row's time, for guidance, ``[n, 8]``.
    targets: Tensor
    #: The times in the denoiser's units, ``[n]``.
    times: Tensor
    #: w, the factor of guidance, ``[n]``; for learned variances without the variance.
    weights: Tensor


@dataclass(frozen=True)
class Process:
    """The settings by which images are noised and denoised.

    Args:
        schedule: the noise that the denoiser was trained on.
        prediction: quantity that the denoiser predicts: ``noise``, ``x0``, or ``v`` = alpha noise - sigma x0.
        times: units of the denoiser's time (`Schedule.told`); None: the training step's index, or with the schedule
            ``vp`` score-SDE's continuous time.
        solver: ``ddpm``, ``ddim``, ``vp_sde`` (Euler-Maruyama steps of the reverse SDE), ``ode`` (Euler steps of the
            probability flow) or ``one_shot`` (the image that is predicted at t*).
        t_star: the time up to which noise is added, as a share of the process; several times for as many rounds, each
            of which purifies the result of the round before.
        steps: number of the solver's steps, for all rounds or for each round. None: every training step.
        eta: parameter of ddim: 0 adds no noise, 1 as much as ddpm.
        variance: variance of ddpm's noise: ``small`` or ``large``, the two bounds of Ho et al., or ``learned``.
        clip: whether each step's estimate of the image is clipped to [-1, 1], and the purified image to [0, 1].
            Without it purified images may leave [0, 1] a little.
        denoise_last: whether the last step of vp_sde adds no noise, like score-SDE's sampler when it returns its mean
            (``denoise`` in sampling.py of yang-song/score_sde_pytorch). The other solvers always end like this.
        guidance: None, or the distance to the noised input whose gradient moves each step: ``mse`` or ``ssim``.
        guidance_scale: g, a factor of that gradient, besides the step's variance and sigma / alpha.

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
        check_types(self)
        counts = [n for _, n in self.rounds if n is not None]
        for count in counts:
            check_counts(steps=count)
        if self.solver == "one_shot" and set(counts) - {1}:
            raise ValueError(f"steps must be 1 or None for one_shot, which takes one step, got {self.steps}")
        if self.eta and self.solver != "ddim":
            raise ValueError(f"eta needs ddim: it must be 0 for {self.solver}, got {self.eta}")
        noiseless = self.solver in ("ode", "one_shot") or (self.solver == "ddim" and not self.eta)
        if self.guidance is not None and noiseless:
            raise ValueError(
                "guidance moves a step by the variance of its noise: it needs ddpm, ddim with eta above 0, or "
                f"vp_sde, got solver {self.solver!r} with eta {self.eta}"
            )
        # Making the table refuses settings that the schedule lacks. Guidance draws noise besides that of the steps.
        rows = len(self.table()[1])
        if 2 * rows > STEPS:
            raise ValueError(f"steps must be fewer in all rounds, {STEPS // 2} with one more for each, got {rows}")

    @classmethod
    def of(cls, given: Process | Mapping[str, Any]) -> Process:
        """Make a process from its fields, as stored with a model.

        Args:
            given: a process, which is returned unchanged, or its fields by name; the schedule as `Schedule.of` takes
                it.
        """
        if isinstance(given, Process):
            return given
        return cls(**{**given, "schedule": Schedule.of(given.get("schedule", "linear"))})

    @property
    def rounds(self) -> list[tuple[float, int | None]]:
        """The t* and number of steps of each round."""
        starts = self.t_star if isinstance(self.t_star, tuple) else (self.t_star,)
        counts = self.steps if isinstance(self.steps, tuple) else (self.steps,) * len(starts)
        if not starts or len(counts) != len(starts):
            raise ValueError(f"steps must be one number, or one for each t_star, got {self.steps} for {self.t_star}")
        return list(zip(starts, counts, strict=True))

    @property
    def learns_variances(self) -> bool:
        """Tell whether the denoiser's second half of channels is the noise's variance."""
        return self.solver == "ddpm" and self.variance == "learned"

    @property
    def told(self) -> Times:
        """The units of the denoiser's time."""
        return self.times or ("continuous" if self.schedule.is_continuous else "index")

    def table(self) -> tuple[Table, list[bool]]:
        """The rows of all rounds, and a mask of those that begin a round: these noise an image without a denoiser."""
        rows, begins = [], []
        for start, count in self.rounds:
            t = self.schedule.times(start, 1 if self.solver == "one_shot" else count)
            steps, variances = denoising(
                self.schedule,
                t,
                solver=self.solver,
                prediction=self.prediction,
                variance=self.variance,
                eta=self.eta,
                clip=self.clip,
                denoise_last=self.denoise_last,
            )
            forward, told = noising(self.schedule, t[:-1]), self.schedule.told(t[:-1], self.told)
            if self.learns_variances:
                # Each step multiplies it by the variance that the denoiser chooses.
                variances = torch.ones_like(variances)
            weights = variances * self.guidance_scale * forward[:, 5] / forward[:, 4]
            blank = torch.zeros(1, dtype=torch.float64)
            rows.append(Table(forward[:1], forward[:1], blank, blank))
            rows.append(Table(steps, forward, told, weights))
            begins += [True] + [False] * len(steps)
        return Table(*(torch.cat(column) for column in zip(*rows, strict=True))), begins
