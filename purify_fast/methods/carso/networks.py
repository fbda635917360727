"""The parts of CARSO's conditional variational autoencoder, for any image size and any layers.

arXiv 2306.06081, section 4.2. Convolution block: conv (no bias), BatchNorm, LeakyReLU(0.2). The paper's CIFAR-10 and
TinyImageNet systems are instances; the sizes for other images are this package's own choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.layers import BatchNorm1d, BatchNorm2d, LeakyReLU

Shape = tuple[int, int, int]
#: The map that a decoder starts with, (C, h, w), and its transposed convolutions.
Plan = tuple[Shape, list["Deconvolution"]]


def conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Sequential:
    """Conv2d without bias, BatchNorm2d, LeakyReLU(0.2)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), BatchNorm2d(outputs), LeakyReLU()
    )


def linear_block(inputs: int, outputs: int) -> nn.Sequential:
    """Linear without bias, BatchNorm1d, LeakyReLU(0.2)."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), BatchNorm1d(outputs), LeakyReLU())


class TokenEncoder(nn.Module):
    """``depth`` linear blocks D -> D/2 -> ... on every token; ``[B, T, D] -> [B, T * features]``. Ours.

    The blocks are shared by the tokens, as a convolution's weights are by its positions; BatchNorm's statistics are
    taken over batch and tokens, and which token is which is left to the joint layer that follows.
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True

    def __init__(self, dim: int, depth: int):
        super().__init__()
        sizes = [ceil(dim / 2**i) for i in range(depth + 1)]
        self.features = sizes[-1]
        self.blocks = nn.Sequential(*(linear_block(a, b) for a, b in pairwise(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.flatten(0, 1)).reshape(x.shape[0], -1)


def pre_encoder(shape: tuple[int, ...], depth: int = 3) -> tuple[nn.Module, int]:
    """One layer's pre-encoder and the number of features it gives.

    A map (C, H, W) goes through ``depth`` convolution blocks that halve the channels (C/2, C/4, C/8, rounded up), 3 x 3
    without padding while the map is large enough, else 1 x 1; a vector (F,) passes unchanged. Tokens (T, D) go through
    ``depth`` linear blocks that halve D (rounded up), the same for every token; that is not in the paper.

    Args:
        shape: of the layer's output without the batch: (C, H, W), (T, D) or (F,).
        depth: blocks.
    """
    if len(shape) == 1:
        return nn.Identity(), shape[0]
    if len(shape) == 2:
        encoder = TokenEncoder(shape[1], depth)
        return encoder, shape[0] * encoder.features
    channels, h, w = shape
    blocks: list[nn.Module] = []
    for i in range(depth):
        kernel = 3 if min(h, w) > 2 else 1
        before, after = ceil(channels / 2**i), ceil(channels / 2 ** (i + 1))
        blocks.append(conv_block(before, after, kernel))
        h, w, last = h - kernel + 1, w - kernel + 1, after
    return nn.Sequential(*blocks, nn.Flatten()), last * h * w


class ConditionEncoder(nn.Module):
    """Representation tensors -> condition ``c [B, cond_dim]``: a pre-encoder per layer, then one joint linear block."""

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
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
    """Image and condition -> mean and log-variance of q(z | x, c), each ``[B, latent_dim]``.

    Two convolution blocks of stride 2 (C, 2 C, 4 C channels), flattened beside c, one linear block, two linear heads.
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True

    def __init__(self, image_shape: Shape, cond_dim: int, latent_dim: int):
        super().__init__()
        channels, h, w = image_shape
        self.image = nn.Sequential(
            conv_block(channels, 2 * channels, 3, 2, 1), conv_block(2 * channels, 4 * channels, 3, 2, 1), nn.Flatten()
        )
        size = 4 * channels * ceil(ceil(h / 2) / 2) * ceil(ceil(w / 2) / 2)
        self.joint = linear_block(size + cond_dim, latent_dim)
        self.mean = nn.Linear(latent_dim, latent_dim)
        self.log_variance = nn.Linear(latent_dim, latent_dim)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        h = self.joint(torch.cat([self.image(x), condition], 1))
        return self.mean(h), self.log_variance(h)


@dataclass(frozen=True)
class Deconvolution:
    """One transposed convolution.

    Args:
        channels: of its output.
        kernel: side of its kernel.
        stride: in both directions.
        padding: on all sides.
        output_padding: (h, w), added below and to the right.
    """

    channels: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    output_padding: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, layer: nn.ConvTranspose2d) -> Deconvolution:
        """What a square layer is.

        Args:
            layer: with equal kernel, stride and padding in both directions.
        """
        more_h, more_w = layer.output_padding
        kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
        return cls(layer.out_channels, kernel, stride, padding, (more_h, more_w))

    def size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width that this layer makes.

        Args:
            h: height of its input.
            w: width of its input.
        """
        return (
            (h - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[0],
            (w - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding[1],
        )


def decoder_plan(image_shape: Shape, width: int = 32) -> Plan:
    """Start shape and layers of a decoder that ends at ``image_shape``, after the pattern of the paper's two.

    The image is halved (rounded up) until it is at most 4 on its longer side; channels double inwards from ``width``,
    to at most ``8 width``; a last 3 x 3 layer of stride 1 makes the image.

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


def published_decoder(image_shape: Shape) -> Plan:
    """Start shape and layers of the paper's decoder for 3 x 32 x 32 (CIFAR) or 3 x 64 x 64 (TinyImageNet).

    Args:
        image_shape: (C, H, W).

    Raises:
        ValueError: another image_shape, for which nothing is published; `decoder_plan` makes a decoder for it.
    """
    widths = (256, 128, 64, 32)
    if tuple(image_shape) == (3, 32, 32):  # 3 - 5 - 9 - 17 - 33 - 32
        return (256, 3, 3), [*(Deconvolution(width) for width in widths), Deconvolution(3, kernel=2, stride=1)]
    if tuple(image_shape) == (3, 64, 64):  # 4 - 8 - 16 - 32 - 64 - 64
        doubling = [Deconvolution(width, output_padding=(1, 1)) for width in widths]
        return (256, 4, 4), [*doubling, Deconvolution(3, stride=1)]
    raise ValueError(f"decoders are published for 3 x 32 x 32 and 3 x 64 x 64, not for {tuple(image_shape)}")


def deconvolution_stack(
    start: Shape,
    layers: Sequence[Deconvolution],
    image_shape: Shape,
    after: Callable[[int], Sequence[nn.Module]],
    *,
    bias: bool,
) -> nn.Sequential:
    """The transposed convolutions of a decoder, from a map ``start`` to ``image_shape``.

    ``after`` gives the modules that follow each convolution but the last, by its number of channels. The last
    convolution has a bias, the others if ``bias`` says so.

    Raises:
        ValueError: the layers do not end at image_shape.
    """
    stack: list[nn.Module] = []
    channels, h, w = start
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        stack.append(
            nn.ConvTranspose2d(
                channels,
                layer.channels,
                layer.kernel,
                stride=layer.stride,
                padding=layer.padding,
                output_padding=layer.output_padding,
                bias=last or bias,
            )
        )
        if not last:
            stack += after(layer.channels)
        channels, (h, w) = layer.channels, layer.size(h, w)
    if (channels, h, w) != tuple(image_shape):
        raise ValueError(f"the decoder's layers end at {(channels, h, w)}, the images are {tuple(image_shape)}")
    return nn.Sequential(*stack)


class Decoder(nn.Module):
    """Latent and condition -> image logits: a linear adapter, then transposed convolutions.

    ``forward(z [B, K, latent_dim], c [B, cond_dim]) -> [B * K, C, H, W]``, before the sigmoid. All layers but the last
    are ConvTranspose2d without bias, BatchNorm2d, LeakyReLU(0.2); the last has a bias and nothing after it.

    Args:
        latent_dim: size of a latent.
        cond_dim: size of the condition.
        image_shape: (C, H, W) of the images it must end at.
        start: (C, h, w) of the map that the adapter makes.
        layers: the transposed convolutions, in order.

    Raises:
        ValueError: at construction, layers that do not end at image_shape.
    """

    #: Every nn.Sequential in it is called as a whole (`purify_fast.speed.folding.batchnorm.fold_sequential`).
    runs_in_order = True
    slope = 0.2  # of its LeakyReLU

    def __init__(
        self, latent_dim: int, cond_dim: int, image_shape: Shape, start: Shape, layers: Sequence[Deconvolution]
    ):
        super().__init__()
        self.latent_dim, self.start = latent_dim, start
        self.adapter = nn.Linear(latent_dim + cond_dim, prod(start))
        self.stack = deconvolution_stack(
            start, layers, image_shape, lambda channels: [BatchNorm2d(channels), LeakyReLU()], bias=False
        )

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        # the condition's half of the adapter once per image, not once per sample
        weight_z, weight_c = self.adapter.weight.split([self.latent_dim, condition.shape[1]], 1)
        h = F.linear(z, weight_z) + F.linear(condition, weight_c, self.adapter.bias)[:, None]
        return self.stack(F.leaky_relu(h, 0.2).flatten(0, 1).unflatten(1, self.start))
