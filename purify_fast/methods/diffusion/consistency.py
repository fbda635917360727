"""The distillation of a denoiser into a denoiser of one evaluation, which gives the end of the way back.

The process up to the last time is divided into intervals. For an image x in [-1, 1], z ~ N(0, I) and an interval from
the time t to the earlier s, each interval as often,

    x_t = alpha x + sigma z,   x_s = the teacher's DDIM step from x_t,
    L = mean (F(x_t, t) - G(x_s, s))^2,   G(x_s, s) = x_s where s ends the process

F is the image that the denoiser predicts, and G the image that the moving average of its weights predicts, without a
gradient and clipped to [-1, 1]. So all states on one way of the teacher's probability flow are led to the image at
its end. Song, Dhariwal, Chen & Sutskever, ICML 2023, arXiv 2303.01469, algorithm 2; there the intervals are those of
another schedule, and LPIPS is the distance for large images.

An ordinary denoiser has learned the mean of all images that may have become x_t. So has the velocity of a flow matched
along straight lines (Lipman et al., ICLR 2023, arXiv 2210.02747) after a single step. Here the result is one image.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...training.task import Batch
from .config import DiffusionConfig
from .process import Process
from .task import DiffusionTask, drawn_for, products_in


class ConsistencyTask(DiffusionTask):
    """Distills a denoiser into a denoiser of one evaluation in `purify_fast.training.fit`.

    The result is for the solver ``one_shot`` of `purify_fast.methods.diffusion.Process`.

    Args:
        denoiser: trained denoiser, as `DiffusionTask` takes it. It is trained in place, and a copy of its weights is
            the teacher.
        config: settings of the training, with intervals.
        origin: start of the denoiser; a run is resumed only with the same origin.
        process: process that the denoiser was trained on, or its fields, for its schedule, predicted quantity and units
            of time; None: config's.

    Raises:
        ValueError: config has no intervals, or too many for the schedule.
    """

    name = "consistency"

    def __init__(
        self,
        denoiser: nn.Module,
        config: DiffusionConfig,
        origin: str = "scratch",
        process: Process | Mapping[str, Any] | None = None,
    ):
        super().__init__(denoiser, config, origin)
        known = self.process if process is None else Process.of(process)
        self.process = Process(known.schedule, known.prediction, known.times, solver="ddim")
        self.process.schedule.times(config.last_time, config.intervals)
        self.teacher = copy.deepcopy(denoiser).eval().requires_grad_(False)

    def refuse(self, config: DiffusionConfig) -> None:
        """ValueError if settings select another training.

        Args:
            config: the settings.
        """
        if not config.intervals:
            raise ValueError("intervals must be at least 1 to distill a denoiser, got 0")

    def loss(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """The loss of one batch, float32.

        Args:
            denoiser: the denoiser, or the moving average of its weights.
            batch: the images.
        """
        clean, schedule, intervals = 2 * batch.x - 1, self.process.schedule, self.config.intervals
        noise, uniform = drawn_for(batch)
        times = schedule.times(self.config.last_time, intervals)
        rows, _ = self.process.denoising(times)
        rows, told = rows.to(clean), schedule.told(times[:-1], self.process.told).to(clean)
        chosen = (uniform.double() * intervals).long()
        kept = schedule.alpha_bar(times[:-1]).to(clean.device)[chosen].view(-1, 1, 1, 1)
        noised = kept.sqrt().to(clean.dtype) * clean + (1 - kept).sqrt().to(clean.dtype) * noise

        def coefficients(step: Tensor) -> tuple[Tensor, ...]:
            return rows[step].view(-1, 8, 1, 1, 1).unbind(1)

        def image(network: nn.Module, state: Tensor, step: Tensor) -> Tensor:
            of_state, of_prediction, *_ = coefficients(step)
            with products_in(self.config.precision, clean.device):
                predicted = network(state, told[step])
            return of_state * state + of_prediction * predicted.to(clean.dtype)

        with torch.no_grad():
            of_image, of_state = coefficients(chosen)[3:5]
            following = of_image * image(self.teacher, noised, chosen).clamp(-1, 1) + of_state * noised
            last = chosen == intervals - 1
            # The state at the end is the image, so that its prediction is not asked for and may be of any time.
            target = image(self.result, following, (chosen + 1).clamp(max=intervals - 1)).clamp(-1, 1)
            target = torch.where(last.view(-1, 1, 1, 1), following, target)
        return (image(denoiser, noised, chosen) - target).square().mean()
