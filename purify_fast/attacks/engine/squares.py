"""What Square proposes: the next point of each row, made of a few random numbers of its own.

Andriushchenko et al., "Square Attack", ECCV 2020; the l1 ball as in AutoAttack.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from ..._tensors import per_image
from ...ops.pgd_step import pgd_step
from ..ball import Ball

#: The share of an image that the first squares cover, and after how many queries it is halved.
FIRST_SHARE = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Windows along an edge with which the l2 and l1 attacks begin.
TILES = 5
#: Random numbers of a proposal besides a sign for each channel: two places, and which way round a pattern lies.
PLACES = 5


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


def signs(numbers: Tensor) -> Tensor:
    """1 or -1 with equal chances.

    Args:
        numbers: uniform in [0, 1), of any shape.
    """
    return torch.where(numbers < 0.5, -1.0, 1.0)


def window(place: Tensor, edge: int, height: int, width: int) -> Tensor:
    """Which pixels lie in a random window, bool ``[R, 1, height, width]``.

    Args:
        place: uniform in [0, 1), ``[R, 2]``.
        edge: of the window, in pixels.
        height: of the images.
        width: of the images.
    """
    rows, columns = (_from_border(place[:, i], edge, size) for i, size in enumerate((height, width)))
    return ((rows >= 0) & (rows < edge))[:, None, :, None] & ((columns >= 0) & (columns < edge))[:, None, None, :]


def window_index(place: Tensor, edge: int, height: int, width: int) -> Tensor:
    """Where in a random window each pixel lies: its index read row by row, int64, 0 outside; as `window`.

    Args:
        place: uniform in [0, 1), ``[R, 2]``.
        edge: of the window, in pixels.
        height: of the images.
        width: of the images.
    """
    rows, columns = (_from_border(place[:, i], edge, size) for i, size in enumerate((height, width)))
    index = rows[:, None, :, None] * edge + columns[:, None, None, :]
    return torch.where(window(place, edge, height, width), index, 0)


def _from_border(place: Tensor, edge: int, size: int) -> Tensor:
    """How far every place along an axis is from the first border of a window, int64 ``[R, size]``."""
    first = (place * (size - edge + 1)).long()
    return torch.arange(size, device=place.device) - first[:, None]


@cache
def pattern(edge: int, power: int, decay: int) -> Tensor:
    """Two opposite pyramids side by side, of length 1, ``[2, edge * edge]``: upright and lying.

    Args:
        edge: of the window, in pixels.
        power: of the norm in which the length is measured, 1 or 2.
        decay: of the pyramids: a ring that is n pixels wide at the center weighs n to the minus ``decay``.
    """
    half = torch.zeros(edge, edge)
    for first, rows, sign in ((0, edge // 2, 1.0), (edge // 2, edge - edge // 2, -1.0)):
        middle = (rows // 2, edge // 2)
        for ring in range(max(rows // 2, edge // 2) + 1):
            top, left = max(middle[0] - ring, 0), max(middle[1] - ring, 0)
            part = half[first : first + rows]
            part[top : middle[0] + ring + 1, left : middle[1] + ring + 1] += sign / (ring + 1) ** decay
    both = torch.stack([half, half.T]).flatten(1)
    return both / both.abs().pow(power).sum(1, keepdim=True).pow(1 / power)


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
        delta = torch.zeros_like(x)
        turned, sign = numbers[:, : TILES**2], numbers[:, TILES**2 :].view(len(x), TILES**2, self.channels)
        top = (self.height - edge * TILES) // 2 if edge > 1 else 0
        left = (self.width - edge * TILES) // 2 if edge > 1 else 0
        for i in range(TILES**2):
            row, column = top + i // TILES * edge, left + i % TILES * edge
            shape = self._pattern(edge, turned[:, i]).view(-1, 1, edge, edge)
            tile = shape * signs(sign[:, i])[:, :, None, None]
            place = delta[:, :, row : row + edge, column : column + edge]
            place += tile[:, :, : place.shape[2], : place.shape[3]].to(x.dtype)
        return self._into_ball(x, delta, ball)

    def next(self, query: int, x: Tensor, point: Tensor, ball: Ball, numbers: Tensor) -> Tensor:
        """One proposal for each row.

        Args:
            query: how many came before.
            x: clean images, ``[R, C, H, W]``.
            point: the best points so far, likewise.
            ball: around the images.
            numbers: uniform in [0, 1), ``[R, numbers]``.
        """
        if self.norm == "linf":
            inside = window(numbers[:, :2], side(query, self.height, self.width), self.height, self.width)
            # twice the radius reaches a border of the ball from anywhere in it
            moved = x + per_image(ball.eps, x).to(x.dtype) * signs(numbers[:, PLACES:])[:, :, None, None].to(x.dtype)
            return torch.where(inside, moved.clamp(ball.clip_min, ball.clip_max), point)
        return self._into_ball(x, self._moved_mass(query, point - x, ball, numbers), ball)

    def _moved_mass(self, query: int, delta: Tensor, ball: Ball, numbers: Tensor) -> Tensor:
        """The change with the second window's mass moved into the first; l2 and l1."""
        power, dims = (2, (2, 3)) if self.norm == "l2" else (1, (2, 3))
        edge = side(query, self.height, self.width, least=3)
        sizes = edge, self.height, self.width
        one, two = window(numbers[:, :2], *sizes), window(numbers[:, 2:4], *sizes)

        def mass(part: Tensor) -> Tensor:
            return part.abs().pow(power).sum(dims, keepdim=True)

        old = torch.where(one, delta, 0.0)
        length = mass(old).pow(1 / power)
        index = window_index(numbers[:, :2], *sizes).flatten(1)
        shape = self._pattern(edge, numbers[:, 4]).gather(1, index).view_as(one) * one
        new = shape * signs(numbers[:, PLACES:])[:, :, None, None] + old / (1e-12 + length)
        new = new / (1e-12 + mass(new).pow(1 / power))
        unused = (per_image(ball.eps, delta).pow(power) - mass(delta).sum(1, keepdim=True)).clamp_min(0)
        both = mass(torch.where(one | two, delta, 0.0))
        size = (unused / self.channels + both).pow(1 / power)
        return torch.where(one, new * size, torch.where(two, 0.0, delta)).to(delta.dtype)

    def _pattern(self, edge: int, turned: Tensor) -> Tensor:
        """One of the two patterns for each row, ``[R, edge * edge]``."""
        both = pattern(edge, *((2, 2) if self.norm == "l2" else (1, 4))).to(turned)
        return both[(turned < 0.5).long()]

    def _into_ball(self, x: Tensor, delta: Tensor, ball: Ball) -> Tensor:
        """The point at the ball's border along a change; of l1 the nearest point of ball and box."""
        if self.norm == "l2":
            length = delta.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-12
            moved = x + delta / length * per_image(ball.eps, x)
            return moved.clamp(ball.clip_min, ball.clip_max).to(x.dtype)
        return pgd_step((x + delta).to(x.dtype), torch.zeros_like(x), x, 0.0, ball.eps, **ball.bounds)
