"""Trains a denoiser in one of two ways: on clean images, or by distillation.

On clean images, the loss of an image x in [-1, 1] is

    x_t = alpha x + sigma z,   L = mean (D(x_t, t) - target)^2,   target = z, x or alpha z - sigma x

Here t is uniform over the schedule's times, z ~ N(0, I), and the denoiser D predicts the noise (Ho et al., NeurIPS
2020, arXiv 2006.11239, equation 14), the image, or v (Salimans & Ho, ICLR 2022, arXiv 2202.00512, section 4).

Distillation trains a denoiser that predicts the result of the reverse process in one evaluation (Song, Dhariwal, Chen &
Sutskever, ICML 2023, arXiv 2303.01469, algorithm 2). For a random interval from the time t to the earlier time s, the
loss is

    x_t = alpha x + sigma z,   x_s = the teacher's DDIM step from x_t,
    L = mean (F(x_t, t) - G(x_s, s))^2,   G(x_s, s) = x_s if s is the end of the process

Here F is the image that the denoiser predicts. G is the image that the moving average of the denoiser's weights
predicts, without a gradient and clipped to [-1, 1].
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._tensors import first_tensor, structure_fingerprint
from ..._validation import Precision
from ...models.representation import evaluation_mode
from ...ops.philox import Stream, philox, philox_key
from ...speed.folding.inference_copy import autocast_to
from ...training.task import Batch, Metrics
from ..base import MethodTask
from .config import DiffusionConfig
from .process import Process
from .schedule import END, Schedule


def training_times(schedule: Schedule, uniform: Tensor, last: float = 1.0) -> Tensor:
    """Convert uniform numbers to times that are uniform over a process, float64 ``[B]``."""
    if schedule.is_continuous:
        return END + (last - END) * uniform.double()
    return ((uniform.double() * round(last * schedule.steps)).floor() + 1) / schedule.steps


def drawn_for(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return normal numbers in the shape of the images, and uniform numbers in [0, 1), ``[B]``."""
    seed = philox_key(batch.seed, batch.x.device)
    stream = Stream.DIFFUSION_TRAINING
    noise = philox(seed, batch.sample_ids, batch.x[0].numel(), stream=stream, distribution="normal")
    uniform = philox(seed, batch.sample_ids, 1, stream=stream, first_draw=1)
    return noise.view_as(batch.x), uniform.flatten()


def products_in(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within the block, compute matrix products in the precision of the training."""
    return autocast_to(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)


def denoising_loss(denoiser: nn.Module, batch: Batch, process: Process, config: DiffusionConfig) -> Tensor:
    """Return the loss of one batch of clean images, float32."""
    clean, schedule = 2 * batch.x - 1, process.schedule
    noise, uniform = drawn_for(batch)
    times = training_times(schedule, uniform, config.last_time)
    kept = schedule.alpha_bar(times).view(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt().to(clean.dtype), (1 - kept).sqrt().to(clean.dtype)
    with products_in(config.precision, clean.device):
        predicted = denoiser(alpha * clean + sigma * noise, schedule.told(times, process.told).to(clean.dtype))
    if process.prediction == "noise":
        target = noise
    else:
        target = clean if process.prediction == "x0" else alpha * noise - sigma * clean
    return (predicted.to(clean.dtype) - target).square().mean()


class DiffusionTask(MethodTask):
    """The training of a denoiser on clean images, for `purify_fast.training.fit`.

    Args:
        denoiser: `purify_fast.models.UNet`, or any module from x_t ``[B, C, H, W]`` and times ``[B]`` to a prediction
            with the shape of x_t. It is trained in place. The times are indices of training steps, 0 to 999; with the
            schedule "vp" they are 999 t.
        config: settings of the training, without intervals.
        origin: name of the denoiser's initial weights. A run is resumed only with the same name.
    """

    name = "diffusion"
    distills = False

    def __init__(self, denoiser: nn.Module, config: DiffusionConfig, origin: str = "scratch"):
        if bool(config.intervals) != self.distills:
            wanted = "above 0 for a distillation" if self.distills else "0 for a training on clean images"
            raise ValueError(f"intervals must be {wanted}, got {config.intervals}")
        super().__init__(config, denoiser)
        self.denoiser, self.origin = denoiser, origin
        self.process = Process(Schedule(config.noise_schedule), config.prediction)
        self.optimizer = self.adamw(denoiser.parameters())
        self.model: nn.Module = denoiser
        self.keep_average("denoiser", config.ema_decay, warm_up=True)

    def loss(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch, float32, of the denoiser or of the moving average of its weights."""
        return denoising_loss(denoiser, batch, self.process, self.config)

    def captures(self, batch: Batch) -> Hashable:
        return ()

    def training_step(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return self.loss(self.denoiser, batch), {}

    def validate(self, batch: Batch) -> Metrics:
        """Return the loss of the result, which is the moving average, if any."""
        with torch.no_grad():
            return {"loss": self.loss(self.result, batch)}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "structure": structure_fingerprint(self.denoiser)}

    def answer(self, images: Tensor) -> Tensor:
        return self.denoiser(2 * images - 1, images.new_zeros(len(images)))

    def check(self, shape: tuple[int, ...], classes: int) -> None:
        weight = first_tensor(self.denoiser)
        image = torch.zeros((1, *shape), device=weight.device, dtype=weight.dtype)
        with evaluation_mode(self.denoiser), torch.no_grad():
            predicted = self.denoiser(image, image.new_zeros(1))
        if predicted.shape != image.shape:
            raise ValueError(f"the denoiser must return images {list(image.shape)}, got {list(predicted.shape)}")


class ConsistencyTask(DiffusionTask):
    """The distillation of a denoiser into a denoiser that needs one evaluation, for `purify_fast.training.fit`.

    Use the result with the solver ``one_shot`` of `purify_fast.methods.diffusion.Process`.

    Args:
        denoiser: trained denoiser, as in `DiffusionTask`. It is trained in place, and a copy with its initial weights
            is the teacher.
        config: settings of the training, with intervals, but not more than the schedule has steps.
        origin: name of the denoiser's initial weights. A run is resumed only with the same name.
        process: process for which the denoiser was trained, or its fields. Its schedule, predicted quantity and units
            of time are used. None means those of ``config``.
    """

    name = "consistency"
    distills = True

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
        #: What `_table` has made, by device, dtype and settings. Captured steps read this memory.
        self._tables: dict[Hashable, tuple[Tensor, Tensor, Tensor]] = {}

    def captures(self, batch: Batch) -> Hashable:
        return ()

    def _table(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coefficients, the denoiser's times and alpha_bar of all intervals, on the images' device."""
        last, intervals = self.config.last_time, self.config.intervals
        key = images.device, images.dtype, last, intervals
        if key not in self._tables:
            with torch.inference_mode(False):
                schedule = self.process.schedule
                times = schedule.times(last, intervals)
                told = schedule.told(times[:-1], self.process.told).to(images)
                kept = schedule.alpha_bar(times[:-1]).to(images.device)
                self._tables[key] = self.process.denoising(times)[0].to(images), told, kept
        return self._tables[key]

    def loss(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch, float32, of the denoiser or of the moving average of its weights."""
        clean, intervals = 2 * batch.x - 1, self.config.intervals
        noise, uniform = drawn_for(batch)
        rows, told, kept = self._table(clean)
        chosen = (uniform.double() * intervals).long()
        kept = kept[chosen].view(-1, 1, 1, 1)
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
            # In the last interval, the target is x_s (``following``) itself. The prediction is not used there, but it
            # is computed for all images, so clamp its time to a valid time.
            target = image(self.result, following, (chosen + 1).clamp(max=intervals - 1)).clamp(-1, 1)
            target = torch.where(last.view(-1, 1, 1, 1), following, target)
        return (image(denoiser, noised, chosen) - target).square().mean()
