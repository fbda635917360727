"""A defence in a file: random resizing and padding, coarse frequencies, and the mean of two networks.

Its three parts are usual in papers. The rounding has no gradient, and the noise hides the rest, so attacks along the
defence's own gradients find nothing. The evaluation tells so, and attacks along the gradients of its parts and of a
copy in which the rounding lets gradients pass:

    purify-fast evaluate examples/random_defence.py:make --data cifar10 --images 16 --protocol fast

The command asks for a radius (``--eps 8/255``). ``--minutes 5`` limits its time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purify_fast import zoo

#: The edge of the blocks whose frequencies are rounded.
BLOCK = 8


def cosines() -> Tensor:
    """The orthogonal matrix of the discrete cosine transform of BLOCK values, ``[BLOCK, BLOCK]``."""
    place, frequency = torch.arange(BLOCK) + 0.5, torch.arange(BLOCK)[:, None]
    matrix = torch.cos(math.pi / BLOCK * place * frequency) * math.sqrt(2 / BLOCK)
    matrix[0] /= math.sqrt(2)
    return matrix


class RandomDefence(nn.Module):
    """Random transforms before the mean of two networks.

    Args:
        first: images ``[B, 3, H, W]`` in [0, 1] to logits ``[B, classes]``; H and W are equal multiples of 8.
        second: the same.
        step: the frequencies of a block are rounded to multiples of this number.
        smallest: the smallest edge to which images are resized, in pixels.
    """

    def __init__(self, first: nn.Module, second: nn.Module, step: float = 0.15, smallest: int = 26):
        super().__init__()
        self.first, self.second, self.step, self.smallest = first, second, step, smallest
        self.register_buffer("matrix", cosines())

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(self.resized(x))
        return (self.first(x).log_softmax(1) + self.second(x).log_softmax(1)) / 2

    def resized(self, x: Tensor) -> Tensor:
        """Shrink all images to one random size, and pad them with zeros at random sides."""
        edge = x.shape[-1]
        size = int(torch.randint(self.smallest, edge + 1, ()))
        left, top = (int(torch.randint(0, edge - size + 1, ())) for _ in range(2))
        small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        return F.pad(small, (left, edge - size - left, top, edge - size - top))

    def rounded(self, x: Tensor) -> Tensor:
        """Round the frequencies of each block."""
        blocks = x.unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)
        frequencies = self.matrix @ blocks @ self.matrix.T
        blocks = self.matrix.T @ (self.step * (frequencies / self.step).round()) @ self.matrix
        return blocks.transpose(3, 4).reshape(x.shape).clamp(0, 1)


def make() -> nn.Module:
    """The defence with two networks of the zoo for CIFAR-10: a standard one, and one trained adversarially."""
    return RandomDefence(zoo.load("cifar10-standard"), zoo.load("cifar10-pgd-at-w16")).eval()
