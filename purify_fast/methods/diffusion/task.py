"""Trains a denoiser on clean images. The loss of an image x in [-1, 1] is

    x_t = alpha x + sigma z,   L = mean (D(x_t, t) - target)^2,   target = z, x or alpha z - sigma x

Here t is uniform over the schedule's times, z ~ N(0, I), and the denoiser D predicts the noise (Ho et al., NeurIPS
2020, arXiv 2006.11239, equation 14), the image, or v (Salimans & Ho, ICLR 2022, arXiv 2202.00512, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..._hashes import structure_fingerprint
from ..._settings import first_tensor
from ..._validation import Precision
from ...models.representation import evaluation_mode
from ...ops.philox import Stream, philox, philox_key
from ...speed.layout import autocast_to
from ...training.method_task import MethodTask
from ...training.task import Batch, Metrics, as_written
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


def error_of(
    denoiser: nn.Module, noisy: Tensor, units: Tensor, target: Tensor, precision: Precision = "float32"
) -> Tensor:
    """Return the mean squared error of a denoiser's prediction."""
    with autocast_to(noisy.device, torch.bfloat16 if precision == "bfloat16" else torch.float32):
        predicted = denoiser(noisy, units)
    return (predicted.to(noisy.dtype) - target).square().mean()


def denoising_loss(
    denoiser: nn.Module,
    batch: Batch,
    process: Process,
    config: DiffusionConfig,
    compiled: Callable[[Any], Any] = as_written,
) -> Tensor:
    """Return the loss of one batch of clean images, float32."""
    clean, schedule = 2 * batch.x - 1, process.schedule
    noise, uniform = drawn_for(batch)
    times = training_times(schedule, uniform, config.last_time)
    kept = schedule.alpha_bar(times).view(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt().to(clean.dtype), (1 - kept).sqrt().to(clean.dtype)
    if process.prediction == "noise":
        target = noise
    else:
        target = clean if process.prediction == "x0" else alpha * noise - sigma * clean
    units = schedule.to_denoiser_units(times, process.time_units).to(clean.dtype)
    return compiled(error_of)(denoiser, alpha * clean + sigma * noise, units, target, config.precision)


class DiffusionTask(MethodTask):
    """The training of a denoiser on clean images, for `purify_fast.training.fit`.

    Args:
        denoiser: `purify_fast.models.UNet`, or any module from x_t ``[B, C, H, W]`` and times ``[B]`` to a prediction
            with the shape of x_t. It is trained in place. The times are indices of training steps, 0 to 999; with the
            schedule "vp" they are 999 t.
        config: settings of the training.
    """

    name = "diffusion"
    origin = "scratch"

    def __init__(self, denoiser: nn.Module, config: DiffusionConfig):
        super().__init__(config, denoiser)
        self.denoiser = denoiser
        self.process = Process(Schedule(config.noise_schedule), config.prediction)
        self.optimizer = self.adamw(denoiser.parameters())
        self.keep_average("denoiser", config.ema_decay, warm_up=True)

    def loss(self, denoiser: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch, float32, of the denoiser or of the moving average of its weights."""
        return denoising_loss(denoiser, batch, self.process, self.config, self.compiled)

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
