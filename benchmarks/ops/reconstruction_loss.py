"""Image logits and target images."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import reconstruction_loss

from . import Case, normal, uniform

SHAPES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))
LARGE = ((4096, 3, 64, 64), (1024, 3, 32, 32))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    return Case(
        shape,
        dtype,
        lambda: (normal(*shape, dtype=dtype, scale=3.0), uniform(*shape, dtype=dtype)),
        reconstruction_loss,
        {"forward": "2*n*s", "backward": "3*n*s"},
        {"forward": "8*n", "backward": "5*n"},
        differentiable=(0,),
        symbols={"n": math.prod(shape), "s": dtype.itemsize},
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    return [case(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in shapes]
