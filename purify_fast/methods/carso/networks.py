"""Defines the networks of CARSO's conditional variational autoencoder (arXiv 2306.06081, section 4.2).

``runs_in_order`` states that a class calls every nn.Sequential as a whole, as the folding of BatchNorm requires.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU

Shape = tuple[int, int, int]
#: The shape (C, h, w) of a decoder's first map, and its transposed convolutions.
Plan = tuple[Shape, list["Deconvolution"]]


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """Return Conv2d without bias, BatchNorm2d and LeakyReLU(0.2)."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, BatchNorm2d(outputs), LeakyReLU())


def linear_block(inputs: int, outputs: int) -> nn.Sequential:
    """Return Linear without bias, BatchNorm1d and LeakyReLU(0.2)."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), BatchNorm1d(outputs), LeakyReLU())


def pre_encoder(shape: tuple[int, ...], depth: int = 3) -> tuple[nn.Module, int]:
    """Return the pre-encoder for a layer of the classifier, and its number of output features."""
    if len(shape) == 1:
        return nn.Identity(), shape[0]
    if len(shape) == 2:
        tokens, dim = shape
        sizes = [ceil(dim / 2**i) for i in range(depth + 1)]
        linear = [linear_block(a, b) for a, b in pairwise(sizes)]
        parts = [nn.Flatten(0, 1), *linear, nn.Unflatten(0, (-1, tokens)), nn.Flatten()]
        return nn.Sequential(*parts), tokens * sizes[-1]
    channels, h, w = shape
    blocks: list[nn.Module] = []
    for i in range(depth):
        kernel = 3 if min(h, w) > 2 else 1
        before, after = ceil(channels / 2**i), ceil(channels / 2 ** (i + 1))
        blocks.append(conv_block(before, after, kernel))
        h, w, last = h - kernel + 1, w - kernel + 1, after
    return nn.Sequential(*blocks, nn.Flatten()), last * h * w


class ConditionEncoder(nn.Module):
    """Maps the representation's tensors to the condition ``c [B, cond_dim]``."""

    runs_in_order = True

    def __init__(self, shapes: Sequence[tuple[int, ...]], cond_dim: int, depth: int = 3):
        super().__init__()
        parts, sizes = zip(*(pre_encoder(shape, depth) for shape in shapes), strict=True)
        self.layers = nn.ModuleList(parts)
        self.joint = linear_block(sum(sizes), cond_dim)

    def forward(self, representation: Sequence[Tensor]) -> Tensor:
        parts = [layer(x) for layer, x in zip(self.layers, representation, strict=True)]
        return self.joint(torch.cat(parts, 1))


class PosteriorEncoder(nn.Module):
    """Maps an image and the condition c to mean and log-variance of q(z | x, c), each ``[B, latent_dim]``."""

    runs_in_order = True

    def __init__(self, image_shape: Shape, cond_dim: int, latent_dim: int):
        super().__init__()
        channels, h, w = image_shape
        first, second = conv_block(channels, 2 * channels, 3, 2, 1), conv_block(2 * channels, 4 * channels, 3, 2, 1)
        size = 4 * channels * ceil(ceil(h / 2) / 2) * ceil(ceil(w / 2) / 2)
        self.image = nn.Sequential(first, second, nn.Flatten())
        self.joint = linear_block(size + cond_dim, latent_dim)
        self.mean = nn.Linear(latent_dim, latent_dim)
        self.log_variance = nn.Linear(latent_dim, latent_dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        h = self.joint(torch.cat([self.image(x), condition], 1))
        return self.mean(h), self.log_variance(h)


@dataclass(frozen=True)
class Deconvolution:
    """A transposed convolution with square kernel, stride and padding, and ``channels`` channels of its output.

    ``output_padding`` is (h, w): rows and columns that are added at the bottom and the right of the output.
    """

    channels: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    output_padding: tuple[int, int] = (0, 0)

    def size(self, h: int, w: int) -> tuple[int, int]:
        return (
            (h - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[0],
            (w - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[1],
        )


def decoder_plan(image_shape: Shape, width: int = 32) -> Plan:
    """Return the shape of the first map and the layers of a decoder that is similar to the paper's two decoders.

    From the image back to the first map, each layer halves height and width (rounded up) until both are at most 4, and
    doubles the channels, to at most ``8 width``. The last layer is 3 x 3 with stride 1.

    Args:
        image_shape: (C, H, W).
        width: channels of the last hidden layer.
    """
    channels, h, w = image_shape
    layers: list[Deconvolution] = [Deconvolution(channels, stride=1)]
    depth = 0
    while max(h, w) > 4:
        layers.insert(0, Deconvolution(min(width << depth, 8 * width), output_padding=(1 - h % 2, 1 - w % 2)))
        h, w, depth = ceil(h / 2), ceil(w / 2), depth + 1
    return (min(width << depth, 8 * width), h, w), layers


#: By the image shape of a published decoder: the side of the first map, the output padding of all layers except the
#: last, and the kernel of the last. Sides of maps: 3 - 5 - 9 - 17 - 33 - 32, and 4 - 8 - 16 - 32 - 64 - 64.
PUBLISHED: dict[Shape, tuple[int, int, int]] = {(3, 32, 32): (3, 0, 2), (3, 64, 64): (4, 1, 3)}


def published_decoder(image_shape: Shape) -> Plan:
    """Return the first map's shape and the layers of the paper's decoder for CIFAR or TinyImageNet.

    ``image_shape`` is (C, H, W). Other shapes raise a ValueError; use `decoder_plan` for them.
    """
    channels, h, w = image_shape
    if (channels, h, w) not in PUBLISHED:
        raise ValueError(f"image_shape must be one of {', '.join(map(str, PUBLISHED))}, got {tuple(image_shape)}")
    side, padding, kernel = PUBLISHED[channels, h, w]
    hidden = [Deconvolution(width, output_padding=(padding, padding)) for width in (256, 128, 64, 32)]
    return (256, side, side), [*hidden, Deconvolution(channels, kernel, stride=1)]


def deconvolution_stack(start: Shape, layers: Sequence[Deconvolution], image_shape: Shape) -> nn.Sequential:
    """Return the transposed convolutions of a decoder, from a map of shape ``start`` to ``image_shape``."""
    stack: list[nn.Module] = []
    channels, h, w = start
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        form = (layer.kernel, layer.stride, layer.padding, layer.output_padding)
        stack.append(nn.ConvTranspose2d(channels, layer.channels, *form, bias=last))
        if not last:
            stack += [BatchNorm2d(layer.channels), LeakyReLU()]
        channels, (h, w) = layer.channels, layer.size(h, w)
    if (channels, h, w) != tuple(image_shape):
        raise ValueError(f"the decoder must return images {tuple(image_shape)}, got {(channels, h, w)}")
    return nn.Sequential(*stack)


class Decoder(nn.Module):
    """Maps latents and the condition to images before the sigmoid, by a linear adapter and transposed convolutions.

    ``forward(z [B, K, latent_dim] or [B, latent_dim], c [B, cond_dim]) -> [B * K, C, H, W]``

    Args:
        latent_dim: size of a latent.
        cond_dim: size of the condition.
        image_shape: (C, H, W) of the images.
        start: (C, h, w) of the adapter's output.
        layers: the transposed convolutions, in order. Their output must have image_shape.
    """

    runs_in_order = True

    def __init__(
        self, latent_dim: int, cond_dim: int, image_shape: Shape, start: Shape, layers: Sequence[Deconvolution]
    ):
        super().__init__()
        self.latent_dim, self.start = latent_dim, tuple(start)
        self.adapter = nn.Linear(latent_dim + cond_dim, prod(start))
        self.stack = deconvolution_stack(start, layers, image_shape)

    def in_order(self) -> list[nn.Module]:
        """Return the layers in order, from a linear layer whose inputs are latent and condition."""
        return [self.adapter, LeakyReLU(), nn.Unflatten(1, self.start), *self.stack]

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        z = z[:, None] if z.dim() == 2 else z
        # The product with the condition is the same for all samples of an image, so it is computed once per image.
        weight_z, weight_c = self.adapter.weight.split([self.latent_dim, condition.shape[1]], 1)
        h = F.linear(z, weight_z) + F.linear(condition, weight_c, self.adapter.bias)[:, None]
        return self.stack(F.leaky_relu(h, 0.2).flatten(0, 1).unflatten(1, self.start))
