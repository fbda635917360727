"""The holes of DeepFillv2's own training: a box and brush strokes in each image, and no noise.

AToP starts from a DeepFillv2 generator that was trained so on Places2. The numbers are those of the authors'
repository for images of 256 x 256 (code: `configs/train.yaml`, `utils/misc.py`), and scale with the image here. The box
is 128 high and wide and loses up to 16 pixels at each side. 1 to 3 strokes of 4 to 11 segments turn back and forth, and
are 12 to 40 pixels wide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.philox import Stream, philox

#: At most so many strokes, of so many segments; each stroke takes 6 random numbers, each segment 3, the box 4.
STROKES, SEGMENTS = 3, 11
_PER_STROKE = 6 + 3 * SEGMENTS
_NUMBERS = 4 + 1 + STROKES * _PER_STROKE
_ANGLE, _ANGLE_RANGE = 2 * math.pi / 5, 2 * math.pi / 15


def free_form_masks(size: tuple[int, int], seed: Tensor, ids: Tensor) -> Tensor:
    """A hole for each image, drawn from the stream of masks.

    Args:
        size: (H, W) of the images.
        seed: int64 ``[1]``.
        ids: of the images, int64 ``[B]``; equal ones have equal holes.

    Returns:
        float32 ``[B, 1, H, W]``: 1 where the image is hidden, 0 elsewhere.
    """
    u = philox(seed, ids, _NUMBERS, stream=Stream.MASK)[:, 0]
    hidden = _box(size, u[:, :4]) | _strokes(size, u[:, 4], u[:, 5:].unflatten(1, (STROKES, _PER_STROKE)))
    return hidden[:, None].float()


def _grid(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the column of each pixel, ``[1, H, 1]`` and ``[1, 1, W]``."""
    rows, cols = (torch.arange(n, device=device, dtype=torch.float32) for n in size)
    return rows[None, :, None], cols[None, None, :]


def _box(size: tuple[int, int], u: Tensor) -> Tensor:
    """A rectangle in each image, bool ``[B, H, W]``; u: uniform numbers, ``[B, 4]``."""
    inside = torch.ones((1, 1, 1), dtype=torch.bool, device=u.device)
    for axis, place in enumerate(_grid(size, u.device)):
        side, most = size[axis] // 2, size[axis] // 16
        margin = (u[:, 2 + axis] * (most + 1)).floor()
        first = (u[:, axis] * (size[axis] - side)).floor() + margin
        last = first + side - 2 * margin
        inside = inside & (place >= first[:, None, None]) & (place < last[:, None, None])
    return inside


def _strokes(size: tuple[int, int], number: Tensor, u: Tensor) -> Tensor:
    """Brush strokes in each image, bool ``[B, H, W]``.

    Args:
        size: (H, W).
        number: uniform numbers, ``[B]``, which say how many strokes there are.
        u: uniform numbers, ``[B, STROKES, _PER_STROKE]``.
    """
    rows, cols = _grid(size, u.device)
    height, width = size
    radius = math.hypot(height, width) / 8
    hidden = torch.zeros((len(u), height, width), dtype=torch.bool, device=u.device)
    strokes = (number * STROKES).floor() + 1
    for k in range(STROKES):
        head, tail = u[:, k, :6], u[:, k, 6:].unflatten(1, (SEGMENTS, 3))
        segments = 4 + (head[:, 0] * (SEGMENTS - 3)).floor()
        row, col = head[:, 1] * height, head[:, 2] * width
        # widths of 12 to 40 pixels at 256
        half = (12 + 28 * head[:, 3]) * height / 512
        low, high = _ANGLE - head[:, 4] * _ANGLE_RANGE, _ANGLE + head[:, 5] * _ANGLE_RANGE
        for i in range(SEGMENTS):
            angle = low + (high - low) * tail[:, i, 0]
            if i % 2 == 0:
                angle = 2 * math.pi - angle
            normal = torch.sqrt(-2 * torch.log1p(-tail[:, i, 1])) * torch.cos(2 * math.pi * tail[:, i, 2])
            length = (radius + radius / 2 * normal).clamp(0, 2 * radius)
            next_row = (row + length * angle.sin()).clamp(0, height)
            next_col = (col + length * angle.cos()).clamp(0, width)
            drawn = (k < strokes) & (i < segments)
            near = _distance(rows, cols, (row, col), (next_row, next_col)) <= half[:, None, None]
            hidden |= near & drawn[:, None, None]
            row, col = next_row, next_col
    return hidden


def _distance(rows: Tensor, cols: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
    """How far each pixel is from a segment of its image, ``[B, H, W]``; start and end: rows and columns, ``[B]``."""
    first_row, first_col = (value[:, None, None] for value in start)
    across, along = (end[0] - start[0])[:, None, None], (end[1] - start[1])[:, None, None]
    square = (across**2 + along**2).clamp(min=1e-6)
    share = (((rows - first_row) * across + (cols - first_col) * along) / square).clamp(0, 1)
    return torch.hypot(rows - first_row - share * across, cols - first_col - share * along)


def hide_free_form(x: Tensor, seed: Tensor, ids: Tensor, shared: bool = False) -> tuple[Tensor, Tensor]:
    """What a purifier gets to see of images with holes, in the form of `Atop.draw`.

    Args:
        x: images ``[B, C, H, W]`` in [0, 1].
        seed: int64 ``[1]``.
        ids: of the images, int64 ``[B]``.
        shared: whether all images have the hole of the first one, as in the released code.

    Returns:
        The images in [-1, 1] with 0 in the hole, a plane of ones and the mask, ``[B, C + 2, H, W]``; and that every
        pixel is of one pass, int64 ``[1, B, 1, 1]``.
    """
    height, width = x.shape[2:]
    mask = free_form_masks((height, width), seed, ids[:1].expand(len(x)) if shared else ids).to(x.dtype)
    packed = torch.cat([(2 * x - 1) * (1 - mask), torch.ones_like(mask), mask], 1)
    return packed, torch.zeros((1, len(x), 1, 1), dtype=torch.int64, device=x.device)
