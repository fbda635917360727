"""The parts of CARSO's first version, with the interfaces of those in `purify_fast.methods.carso.networks`.

arXiv 2306.06081, versions 1 and 2 (2023), as its code has them for MNIST and FashionMNIST: a flat representation,
linear encoders with LeakyReLU(0.01) before BatchNorm, a decoder that starts at one pixel and has no BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.layers import BatchNorm1d
from .networks import Deconvolution, Plan, Shape, deconvolution_stack


class _LeakyReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.01)  # a literal, for the reason given in purify_fast/models/layers.py


def _linear_blocks(*sizes: int) -> list[nn.Module]:
    """Linear with bias, LeakyReLU(0.01), BatchNorm1d, for each pair of sizes."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), _LeakyReLU(), BatchNorm1d(after)]
    return layers


class ConditionEncoderV1(nn.Module):
    """Representation tensors -> condition ``c [B, cond_dim]`` in (0, 1): all flattened, two linear blocks, a sigmoid.

    The hidden size is ``2 cond_dim`` (published: 290 -> 260 -> 130).
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True

    def __init__(self, shapes: Sequence[tuple[int, ...]], cond_dim: int):
        super().__init__()
        size = sum(prod(shape) for shape in shapes)
        self.joint = nn.Sequential(*_linear_blocks(size, 2 * cond_dim, cond_dim), nn.Sigmoid())

    def forward(self, representation: Sequence[Tensor]) -> Tensor:
        return self.joint(torch.cat([x.flatten(1) for x in representation], 1))


class PosteriorEncoderV1(nn.Module):
    """Image and condition -> mean and log-variance of q(z | x, c), each ``[B, latent_dim]``.

    A 4 x 4 convolution with just enough channels to lose no numbers, flattened beside c, two linear blocks and a tanh
    down to ``1.5 latent_dim`` (published: 96 for 64), two linear heads.
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True

    def __init__(self, image_shape: Shape, cond_dim: int, latent_dim: int):
        super().__init__()
        channels, h, w = image_shape
        if min(h, w) < 4:
            raise ValueError(f"version v1 needs images of at least 4 x 4, got {h} x {w}")
        positions = (h - 3) * (w - 3)
        detail = ceil(channels * h * w / positions)
        self.image = nn.Sequential(nn.Conv2d(channels, detail, 4), nn.Flatten())
        size, shared = detail * positions + cond_dim, 3 * latent_dim // 2
        self.joint = nn.Sequential(*_linear_blocks(size, (size + shared) // 2, shared), nn.Tanh())
        self.mean = nn.Linear(shared, latent_dim)
        self.log_variance = nn.Linear(shared, latent_dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        h = self.joint(torch.cat([self.image(x), condition], 1))
        return self.mean(h), self.log_variance(h)


def decoder_plan_v1(channels: int, inputs: int) -> Plan:
    """Start shape and layers of the first version's decoder, from ``inputs`` numbers to ``channels`` x 28 x 28."""
    return (inputs, 1, 1), [
        Deconvolution(inputs // 2, 4, 1, 0),
        Deconvolution(inputs // 4, 4, 2, 1),
        Deconvolution(inputs // 8, 4, 2, 2),
        Deconvolution(channels, 4, 2, 1),
    ]


class DecoderV1(nn.Module):
    """Latent and condition, side by side at one pixel -> image logits, by transposed convolutions with bias.

    ``forward(z [B, K, latent_dim], c [B, cond_dim]) -> [B * K, C, H, W]``, before the sigmoid. LeakyReLU(0.01) between
    the layers, no BatchNorm, no adapter.

    Raises:
        ValueError: at construction, a start that is not latent_dim + cond_dim numbers, or layers that do not end at
            image_shape.
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True
    slope = 0.01  # of its LeakyReLU

    def __init__(
        self, latent_dim: int, cond_dim: int, image_shape: Shape, start: Shape, layers: Sequence[Deconvolution]
    ):
        super().__init__()
        if prod(start) != latent_dim + cond_dim:
            raise ValueError(f"the decoder starts with {latent_dim + cond_dim} numbers, its start is {tuple(start)}")
        self.latent_dim, self.start = latent_dim, tuple(start)
        self.stack = deconvolution_stack(start, layers, image_shape, lambda channels: [_LeakyReLU()], bias=True)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        h = torch.cat([z, condition[:, None].expand(-1, z.shape[1], -1)], 2)
        return self.stack(h.flatten(0, 1).unflatten(1, self.start))
