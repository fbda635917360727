"""The weights of a decoder as the op `decode_samples` takes them, and the sizes that describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: Channels of maps, and columns of an image, are padded to a multiple of these: what one matrix product takes.
CHANNEL_TILE, COLUMN_TILE = 32, 16


@dataclass(frozen=True)
class Layer:
    """A transposed convolution.

    Args:
        channels: of its output.
        kernel: side of the kernel.
        stride: in both directions.
        padding: in both directions.
        height: of its output.
        width: of its output.
    """

    channels: int
    kernel: int
    stride: int
    padding: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """A packed decoder's sizes.

    Args:
        latent_dim: numbers of a latent.
        start: channels, height and width of the first map.
        layers: the transposed convolutions, in order.
    """

    latent_dim: int
    start: tuple[int, int, int]
    layers: tuple[Layer, ...]

    def numbers(self) -> list[int]:
        """As the op takes them."""
        sizes = [(x.channels, x.kernel, x.stride, x.padding, x.height, x.width) for x in self.layers]
        return [self.latent_dim, *self.start, *(n for size in sizes for n in size)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """The inverse of `numbers`."""
        latent_dim, c, h, w, *rest = numbers
        return cls(latent_dim, (c, h, w), tuple(Layer(*six) for six in zip(*[iter(rest)] * 6, strict=True)))

    def products(self) -> list[tuple[int, int, int]]:
        """(taps, channels in, columns) of every matrix product: the first layer's, then the convolutions', padded."""
        channels, h, w = self.start
        out = [(h * w, _up(self.latent_dim, CHANNEL_TILE), _up(channels, CHANNEL_TILE))]
        for i, layer in enumerate(self.layers):
            tile = COLUMN_TILE if i == len(self.layers) - 1 else CHANNEL_TILE
            out.append((layer.kernel**2, _up(channels, CHANNEL_TILE), _up(layer.channels, tile)))
            channels = layer.channels
        return out

    def sizes(self) -> tuple[int, int]:
        """Numbers of the packed weights, the gradient's among them, and of the biases."""
        first, *products = self.products()
        channels = [self.start[0], *(layer.channels for layer in self.layers)]
        backward = [
            taps * _up(outputs, CHANNEL_TILE) * _up(inputs, CHANNEL_TILE)
            for (taps, _, _), inputs, outputs in zip(products, channels, channels[1:], strict=False)
        ]
        forward = [taps * inputs * columns for taps, inputs, columns in (first, *products)]
        return sum(forward) + sum(backward), sum(columns for _, _, columns in products)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _pack(weight: Tensor, columns: int) -> Tensor:
    """[taps, channels, columns], padded, in that order."""
    inputs, outputs = weight.shape[1:]
    return F.pad(weight, (0, columns - outputs, 0, _up(inputs, CHANNEL_TILE) - inputs)).flatten()


def pack(first: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A decoder's weights as the op takes them.

    Args:
        first: ``[C, H, W, latent_dim]``, the latent's half of the linear layer that makes the first map.
        weights: ``[channels in, channels out, k, k]`` of every transposed convolution.
        biases: ``[channels out]`` of each.

    Returns:
        One vector of weights, those of the layers and then, transposed, those of their gradients from the last to the
        first; one of biases, without the first layer's; zeros where they are padded.
    """
    channels, h, w, dim = first.shape
    parts = [_pack(first.permute(1, 2, 3, 0).reshape(h * w, dim, channels), _up(channels, CHANNEL_TILE))]
    shifts, backward = [], []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs, outputs, k, _ = weight.shape
        columns = _up(outputs, COLUMN_TILE if i == len(weights) - 1 else CHANNEL_TILE)
        parts.append(_pack(weight.permute(2, 3, 0, 1).reshape(k * k, inputs, outputs), columns))
        shifts.append(F.pad(bias, (0, columns - outputs)))
        transposed = weight.permute(2, 3, 1, 0).reshape(k * k, outputs, inputs)
        backward.append(_pack(transposed, _up(inputs, CHANNEL_TILE)))
    return torch.cat([*parts, *reversed(backward)]), torch.cat(shifts)


@dataclass(frozen=True)
class Weights:
    """A packed decoder's weights, unpacked.

    Args:
        first: ``[pixels, latent_dim, channels]`` of the first map.
        layers: ``[channels in, channels out, k, k]`` of every transposed convolution.
        biases: ``[channels out]`` of each.
    """

    first: Tensor
    layers: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def unpack(packed: Tensor, biases: Tensor, geometry: Geometry) -> Weights:
    """What `pack` was given, in the packed weights' dtype.

    Args:
        packed: the vector of weights that `pack` returned, in any dtype.
        biases: the vector of biases that it returned.
        geometry: the decoder's sizes.

    Returns:
        The weights and biases of every layer, without padding.
    """
    products = geometry.products()
    sizes = [taps * inputs * columns for taps, inputs, columns in products]
    parts = packed[: sum(sizes)].split(sizes)
    first, *tiles = (part.view(product) for part, product in zip(parts, products, strict=True))
    shifts = biases.to(packed.dtype).split([columns for _, _, columns in products[1:]])
    inputs, weights = geometry.start[0], []
    for layer, tile in zip(geometry.layers, tiles, strict=True):
        kernel = tile[:, :inputs, : layer.channels].unflatten(0, (layer.kernel, layer.kernel))
        weights.append(kernel.permute(2, 3, 0, 1))
        inputs = layer.channels
    ends = tuple(shift[: layer.channels] for shift, layer in zip(shifts, geometry.layers, strict=True))
    return Weights(first[:, : geometry.latent_dim, : geometry.start[0]], tuple(weights), ends)
