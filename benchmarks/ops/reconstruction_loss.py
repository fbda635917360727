"""Image logits and target images."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import reconstruction_loss

from . import Case, normal, uniform

SHAPES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    pixels = math.prod(shape)
    return Case(
        shape,
        dtype,
        lambda: (normal(*shape, dtype=dtype, scale=3.0), uniform(*shape, dtype=dtype)),
        reconstruction_loss,
        {"forward": 2 * pixels * dtype.itemsize, "backward": 3 * pixels * dtype.itemsize},
        {"forward": 8 * pixels, "backward": 5 * pixels},
        differentiable=(0,),
    )


def cases() -> list[Case]:
    return [case(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
