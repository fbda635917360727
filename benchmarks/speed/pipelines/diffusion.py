"""Measure a prediction of a diffusion purifier with 100 steps of DDPM and K = 8 samples of each image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from purify_fast import frozen_copy
from purify_fast.methods.diffusion import DiffusionPurifier
from purify_fast.models.classifiers import SmallCNN
from purify_fast.models.unet import UNet
from purify_fast.ops import use_backend
from purify_fast.ops.diffusion_step import diffusion_step

from . import Case, Job, columns, expert
from .carso_inference import classifier

IMAGES, SAMPLES, STEPS, T_STAR = 4, 8, 100, 0.1
SEED = 3
#: The largest allowed relative distance between results. It is large because bfloat16 rounds every step.
TOLERANCE = 0.05


def denoiser(width: int) -> UNet:
    """Return a denoiser with random weights.

    The last layers of a new U-Net have weights of 0, so the U-Net would always predict 0. These layers get random
    weights too.
    """
    torch.manual_seed(0)
    made = UNet(3, width, patch=2)
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=0.5 / layer.weight[0].numel() ** 0.5)
    return made


def defence(device: torch.device, quick: bool) -> DiffusionPurifier:
    """Return a purifier for images of 32 x 32, with a U-Net as denoiser and a ResNet-18 as classifier."""
    side, width, samples, steps = (8, 4, 2, 3) if quick else (32, 32, SAMPLES, STEPS)
    network = denoiser(width)
    judge = SmallCNN(3, 10, (side, side), 4) if quick else classifier()
    process = {"t_star": T_STAR, "steps": steps}
    return DiffusionPurifier(network, judge, (3, side, side), process, samples=samples).to(device)


def images(made: DiffusionPurifier, device: torch.device) -> Tensor:
    return torch.rand(IMAGES, *made.image_shape, generator=torch.Generator().manual_seed(1)).to(device)


class Plain:
    """The defence in plain PyTorch: a loop over the steps of the process, followed by the classifier."""

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        self.made = defence(device, quick)
        self.x = images(self.made, device)
        table, noises = self.made.process.table()
        self.numbers, self.times, self.count = table.coefficients.tolist(), table.times.tolist(), len(noises) - 1
        compile = partial(torch.compile, dynamic=False, disable=not compiled)
        self.denoise, self.classify = compile(self.made.denoiser.module), compile(self.made.classifier)

    def step(self, x: Tensor, z: Tensor, i: int) -> Tensor:
        """Return the state after step ``i``."""
        p, q, limit, image, state, noise, _, _ = self.numbers[i]
        predicted = self.denoise(x, torch.full((len(x),), self.times[i], device=x.device))
        return image * (p * x + q * predicted).clamp(-limit, limit) + state * x + noise * z

    def __call__(self, x: Tensor, noise: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Return the mean of the logits over the K samples."""
        x = (2 * x - 1).repeat_interleave(self.made.samples, 0)
        x = self.numbers[0][4] * x + self.numbers[0][5] * noise(x, 0)
        for i in range(1, self.count + 1):
            x = self.step(x, noise(x, i), i)
        return self.classify((x + 1) / 2).unflatten(0, (-1, self.made.samples)).mean(1)

    def fixed(self, x: Tensor, i: int) -> Tensor:
        """Return the noise that our implementation draws under `fixed_noise`, so that the results can be compared."""
        names = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        draws = torch.arange(len(x), device=x.device) % self.made.samples
        only_noise = torch.tensor([0.0, 0, 1, 0, 0, 1, 0, 0], device=x.device)
        at = {"seed": names[:1] + SEED, "sample_ids": names, "draws": draws, "step": names[:1] + i}
        return diffusion_step(torch.zeros_like(x), torch.zeros_like(x), only_noise, **at)


class Expert(Plain):
    """The defence as an expert writes it (see `expert`). The state of the process remains in float32."""

    def __init__(self, device: torch.device, quick: bool, compiled: bool):
        super().__init__(device, quick, False)
        self.network = copy.deepcopy(self.made.denoiser.module).requires_grad_(False).to(memory_format=expert.LAST)
        for layer in self.network.modules():
            # The layers that embed the time stay in float32. They compute a single row.
            if isinstance(layer, (nn.Conv2d, nn.GroupNorm)):
                layer.to(expert.DTYPES[device.type])
        judge = expert.FrozenCopy(self.made.classifier).model
        self.table = self.made.process.table()[0].coefficients.to(device)
        self.moments = torch.tensor(self.times, device=device)
        self.advance = expert.compiled(self.moved, device, compiled, "inference")
        self.classify = expert.compiled(lambda x: judge(expert.entering(x)).float(), device, compiled, "inference")

    def moved(self, x: Tensor, z: Tensor, row: Tensor, t: Tensor) -> Tensor:
        """Return the state after a step with the coefficients ``row`` at the time ``t``."""
        p, q, limit, image, state, noise, _, _ = row.unbind()
        predicted = self.network(expert.entering(x), t).float()
        return image * (p * x + q * predicted).clamp(-limit, limit) + state * x + noise * z

    def step(self, x: Tensor, z: Tensor, i: int) -> Tensor:
        return self.advance(x, z, self.table[i], self.moments[i])


def fresh(x: Tensor, i: int) -> Tensor:
    return torch.randn_like(x)


def _job(form: type[Plain], device: torch.device, quick: bool, compiled: bool = False) -> Job:
    plain = form(device, quick, compiled)
    # Use only PyTorch's operators. Otherwise the denoiser, which is a network of this package, would use our kernels.
    call = use_backend("reference")(torch.no_grad()(lambda noise: plain(plain.x, noise)))
    return Job(lambda: call(fresh), lambda: call(plain.fixed))


def _ours(device: torch.device, quick: bool, compiled: bool = False) -> Job:
    made = defence(device, quick)
    x = images(made, device)
    copied = frozen_copy(made, x, compile=compiled)
    run = torch.no_grad()(lambda: copied(x))

    def result() -> Tensor:
        with copied.fixed_noise(SEED):
            return run()

    return Job(run, result)


def cases(quick: bool) -> dict[str, Case]:
    shape = f"{IMAGES} images, K = {2 if quick else SAMPLES}, {3 if quick else STEPS} steps of DDPM"
    contestants = columns(partial(_job, Plain), partial(_job, Expert), _ours, captured=False)
    return {"prediction": Case(shape, TOLERANCE, contestants)}
