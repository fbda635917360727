"""The nearest point of a hyperplane that lies in the box, row by row, in the l-infinity, l2 or l1 norm.

In the direction that leads towards the plane, the shortest move has one free number: every coordinate moves by
min(s, room) (linf), by min(s |w|, room) (l2), or by its whole room where |w| is above a threshold (l1). How far the
move leads is a growing function of that number. For linf and l2 it is concave and made of straight pieces, so that
Newton's steps approach the solution from below and reach it; for l1 the threshold is halved in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ball import Ball

#: Newton's steps: each passes at least one of the places where a coordinate reaches the box, most pass many.
NEWTON = 16
#: Halvings of the interval that holds the threshold of l1.
HALVINGS = 40
TINY = 1e-12
#: On a CPU, where a look at the numbers costs nothing, Newton's steps end once this share of the way is left.
CLOSE = 1e-6


def move_to_plane(x: Tensor, w: Tensor, b: Tensor, ball: Ball) -> Tensor:
    """The shortest move of each point to its hyperplane ``<w, z> = b``, within the box.

    Args:
        x: points in the box, ``[R, D]``.
        w: normals, ``[R, D]``; elements that are not finite count as 0.
        b: offsets, ``[R]``.
        ball: tells the norm in which the move is shortest, and the box; its radii do not matter.

    Returns:
        The moves, ``[R, D]``; where the plane does not meet the box, the move to the corner of the box nearest to it.
    """
    w = torch.where(w.isfinite(), w, 0.0)
    gap = b - torch.linalg.vecdot(w, x)
    sign = torch.where(gap[:, None] < 0, -w.sign(), w.sign())
    slope, gap = w.abs(), gap.abs()
    room = torch.where(sign > 0, ball.clip_max - x, torch.where(sign < 0, x - ball.clip_min, 0.0)).clamp_min(0)
    if ball.norm == "l1":
        return sign * _by_threshold(slope, room, gap)
    return sign * _by_newton(slope, room, gap, ball.norm)


def _by_newton(slope: Tensor, room: Tensor, gap: Tensor, norm: str) -> Tensor:
    """How far each coordinate moves in linf and l2: as far as all others, or in proportion to its slope."""
    scale = torch.zeros_like(gap)
    for step in range(NEWTON):
        # in linf a coordinate without a slope would move too, which changes no sum
        wish = scale[:, None] if norm == "linf" else scale[:, None] * slope
        missing = gap - torch.linalg.vecdot(slope, torch.minimum(wish, room))
        free = slope * (wish < room)
        rate = free.sum(1) if norm == "linf" else torch.linalg.vecdot(free, slope)
        if step and gap.device.type == "cpu" and bool(((missing <= CLOSE * gap) | (rate <= 0)).all()):
            break
        # where nothing is left to move the plane is out of reach, and everything is at the border of the box
        ahead = torch.where(rate > 0, missing / rate.clamp_min(TINY), 0.0)
        scale = torch.where(missing > TINY, scale + ahead, scale)
    speed = (slope > 0).to(slope.dtype) if norm == "linf" else slope
    return (scale[:, None] * speed).minimum(room)


def _by_threshold(slope: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """How far each coordinate moves in l1: wholly where the slope is largest, in part at the threshold."""
    gain = slope * room
    low, high = torch.zeros_like(gap), slope.amax(1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = (gain * (slope > middle[:, None])).sum(1) >= gap
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    whole = slope > high[:, None]
    edge = (slope > low[:, None]) & ~whole
    missing = gap - (gain * whole).sum(1)
    part = (missing / (gain * edge).sum(1).clamp_min(TINY)).clamp(0, 1)
    return room * (whole + edge * part[:, None])
