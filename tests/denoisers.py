"""Denoisers of a few weights, and the defences around them that the tests of this folder take."""

import torch
from torch import nn

from purify_fast.methods.diffusion import DiffusionPurifier, Process
from purify_fast.models import UNet
from purify_fast.models.classifiers import SmallCNN


class Tiny(nn.Module):
    """Two convolutions and the time; ``outputs`` channels, those of the images if None."""

    def __init__(self, channels=3, outputs=None, width=6):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, outputs or channels, 3, padding=1)
        self.time = nn.Linear(1, width)

    def forward(self, x, t):
        told = self.time(t[:, None].to(self.time.weight.dtype) / 1000)
        return self.last(torch.tanh(self.first(x) + told[:, :, None, None]))


def defence(shape=(3, 8, 12), denoiser=None, process=None, **options):
    """A defence in float32 around fresh weights."""
    torch.manual_seed(0)
    channels = shape[0]
    learned = isinstance(process, Process) and process.learns_variances
    denoiser = Tiny(channels, 2 * channels if learned else None) if denoiser is None else denoiser
    classifier = SmallCNN(channels, image_size=shape[1:], width=4)
    return DiffusionPurifier(denoiser, classifier, shape, Process() if process is None else process, **options)


def trained_unet(*sizes, **options):
    """A U-Net whose last layers are no longer zero, as after some training."""
    torch.manual_seed(0)
    model = UNet(*sizes, **options)
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    return model


def logits_and_gradient(made, x, seed=1):
    """The logits of a random defence with fixed noise, and the gradient of the sum of their squares."""
    leaf = x.clone().requires_grad_()
    with made.fixed_noise(seed):
        logits = made(leaf)
    return logits.detach(), torch.autograd.grad(logits.square().sum(), leaf)[0]


def images(n=4, shape=(3, 8, 12), dtype=torch.float32):
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
