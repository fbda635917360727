"""Computes the sizes of a packed decoder, for the op `decode_samples` and its kernels. Does not import Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: The number of channels of a feature map is padded to a multiple of CHANNEL_TILE. The matrix product that computes an
#: image has a column per channel of the image, and the number of columns is padded to a multiple of COLUMN_TILE.
CHANNEL_TILE, COLUMN_TILE = 32, 16


def padded(value: int, step: int) -> int:
    """Round ``value`` up to a multiple of ``step``."""
    return -(-value // step) * step


class Layer(NamedTuple):
    """A transposed convolution.

    Args:
        channels: channels of its output.
        kernel: side of the kernel.
        stride: stride in both directions.
        padding: padding in both directions.
        height: height of its output.
        width: width of its output.
    """

    channels: int
    kernel: int
    stride: int
    padding: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of a packed decoder.

    Args:
        latent_dim: number of elements of a latent.
        start: channels, height and width of the first feature map.
        layers: the transposed convolutions, in order.
    """

    latent_dim: int
    start: tuple[int, int, int]
    layers: tuple[Layer, ...]

    def numbers(self) -> list[int]:
        """Return the numbers of the geometry, in the order of the op's argument."""
        return [self.latent_dim, *self.start, *(number for layer in self.layers for number in layer)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """Make the geometry whose method `numbers` returns these numbers."""
        latent_dim, c, h, w, *rest = numbers
        return cls(latent_dim, (c, h, w), tuple(Layer(*six) for six in zip(*[iter(rest)] * 6, strict=True)))

    def products(self) -> list[tuple[int, int, int]]:
        """Return (taps, input channels, columns) of every matrix product, padded: for the latent, and for each
        convolution.
        """
        channels, h, w = self.start
        out = [(h * w, padded(self.latent_dim, CHANNEL_TILE), padded(channels, CHANNEL_TILE))]
        for i, layer in enumerate(self.layers):
            tile = COLUMN_TILE if i == len(self.layers) - 1 else CHANNEL_TILE
            out.append((layer.kernel**2, padded(channels, CHANNEL_TILE), padded(layer.channels, tile)))
            channels = layer.channels
        return out

    def inputs(self) -> list[tuple[int, int, int]]:
        """Return height, width and padded channels of the input of every convolution."""
        channels, h, w = self.start
        maps = [(h, w, channels), *((layer.height, layer.width, layer.channels) for layer in self.layers[:-1])]
        return [(h, w, padded(channels, CHANNEL_TILE)) for h, w, channels in maps]

    def sizes(self) -> tuple[int, int]:
        """Return the number of packed weights, including the weights for the gradient, and the number of biases."""
        first, *products = self.products()
        channels = [self.start[0], *(layer.channels for layer in self.layers)]
        backward = [
            taps * padded(outputs, CHANNEL_TILE) * padded(inputs, CHANNEL_TILE)
            for (taps, _, _), inputs, outputs in zip(products, channels, channels[1:], strict=False)
        ]
        forward = [taps * inputs * columns for taps, inputs, columns in (first, *products)]
        return sum(forward) + sum(backward), sum(columns for _, _, columns in products)
