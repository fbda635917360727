"""What Square proposes: the next point of each row, made of a few random numbers of its own.

Andriushchenko et al., "Square Attack", ECCV 2020; the l1 ball as in AutoAttack.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..._tensors import per_image
from ...ops import pgd_step, square_proposal
from ...ops.square_proposal import PLACES, TINY, signs
from ..ball import Ball

#: The share of an image that the first squares cover, and after how many queries it is halved.
FIRST_SHARE = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Windows along an edge with which the l2 and l1 attacks begin.
TILES = 5
#: Of the patterns in l2 and in l1: the power of the norm, and the decay of the pyramids.
SHAPES = {"l2": (2, 2), "l1": (1, 4)}


def side(query: int, height: int, width: int, least: int = 1) -> int:
    """The edge of the squares at a query.

    Args:
        query: from 0.
        height: of the images.
        width: of the images.
        least: the smallest edge.
    """
    share = FIRST_SHARE / 2 ** sum(query > after for after in HALVED_AFTER)
    edge = max(round(math.sqrt(share * height * width)), least)
    if least > 1 and edge % 2 == 0:
        # the patterns of l2 and l1 have a middle
        edge += 1
    return min(edge, height, width)


@cache
def pattern(edge: int, norm: str, device: torch.device) -> Tensor:
    """Two opposite pyramids side by side, of length 1, float32 ``[2, edge, edge]``: upright and lying.

    Args:
        edge: of the window, in pixels.
        norm: in which the length is measured, "l2" or "l1".
        device: where the pattern is; a copy in every query would wait for a GPU.
    """
    power, decay = SHAPES[norm]
    half = torch.zeros(edge, edge)
    for first, rows, sign in ((0, edge // 2, 1.0), (edge // 2, edge - edge // 2, -1.0)):
        middle = (rows // 2, edge // 2)
        for ring in range(max(rows // 2, edge // 2) + 1):
            top, left = max(middle[0] - ring, 0), max(middle[1] - ring, 0)
            part = half[first : first + rows]
            part[top : middle[0] + ring + 1, left : middle[1] + ring + 1] += sign / (ring + 1) ** decay
    both = torch.stack([half, half.T]).flatten(1)
    return (both / both.abs().pow(power).sum(1, keepdim=True).pow(1 / power)).unflatten(1, (edge, edge)).to(device)


class Proposals:
    """Where Square begins, and where it tries to go.

    Args:
        shape: of an image, (C, H, W).
        norm: "linf", "l2" or "l1".
    """

    def __init__(self, shape: tuple[int, int, int], norm: str):
        self.channels, self.height, self.width = shape
        self.norm = norm
        #: Random numbers of a proposal, and of the beginning.
        self.numbers = PLACES + self.channels
        tiles = TILES**2 * (1 + self.channels)
        self.first_numbers = self.channels * self.width if norm == "linf" else tiles

    def begin(self, x: Tensor, ball: Ball, numbers: Tensor) -> Tensor:
        """Stripes (linf) or a grid of patterns.

        Args:
            x: clean images, ``[R, C, H, W]``.
            ball: around them.
            numbers: uniform in [0, 1), ``[R, first_numbers]``.
        """
        if self.norm == "linf":
            stripes = signs(numbers).view(len(x), self.channels, 1, self.width)
            return (x + per_image(ball.eps, x) * stripes).clamp(ball.clip_min, ball.clip_max).to(x.dtype)
        edge = max(1, min(self.height, self.width) // TILES)
        shapes = pattern(edge, self.norm, x.device).to(numbers)
        delta = torch.zeros_like(x)
        turned, sign = numbers[:, : TILES**2], numbers[:, TILES**2 :].view(len(x), TILES**2, self.channels)
        top = (self.height - edge * TILES) // 2 if edge > 1 else 0
        left = (self.width - edge * TILES) // 2 if edge > 1 else 0
        for i in range(TILES**2):
            row, column = top + i // TILES * edge, left + i % TILES * edge
            tile = shapes[(turned[:, i] < 0.5).long()][:, None] * signs(sign[:, i])[:, :, None, None]
            place = delta[:, :, row : row + edge, column : column + edge]
            place += tile[:, :, : place.shape[2], : place.shape[3]].to(x.dtype)
        if self.norm == "l1":
            # a step of length 0 is the projection alone
            return pgd_step((x + delta).to(x.dtype), torch.zeros_like(x), x, 0.0, ball.eps, **ball.bounds)
        length = delta.square().sum((1, 2, 3), keepdim=True).sqrt() + TINY
        return (x + delta / length * per_image(ball.eps, x)).clamp(ball.clip_min, ball.clip_max).to(x.dtype)

    def next(self, query: int, x: Tensor, point: Tensor, ball: Ball, numbers: Tensor) -> Tensor:
        """Several proposals for each row, ``[T * R, C, H, W]``: the first of every row, then the second of every row.

        Args:
            query: how many came before.
            x: clean images, ``[R, C, H, W]``.
            point: the best points so far, likewise.
            ball: around the images.
            numbers: uniform in [0, 1), ``[R, T, numbers]``.
        """
        edge = side(query, self.height, self.width, least=1 if self.norm == "linf" else 3)
        shapes = None if self.norm == "linf" else pattern(edge, self.norm, x.device)
        return square_proposal(point, x, ball.eps, numbers, edge, **ball.bounds, pattern=shapes)
