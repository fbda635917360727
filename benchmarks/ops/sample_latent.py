"""Batch and latent dimension."""

from __future__ import annotations

import torch

from purify_fast.ops import sample_latent

from . import Case, normal

SHAPES = ((256, 64), (640, 128), (4096, 192))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    b, d = shape
    matrix = b * d * dtype.itemsize
    return Case(
        shape,
        dtype,
        lambda: (
            normal(b, d, dtype=dtype),
            normal(b, d, dtype=dtype, scale=0.5),
            torch.tensor([1234567890123]),
            torch.arange(b),
        ),
        sample_latent,
        {"forward": 3 * matrix + 12 * b, "backward": 5 * matrix + 12 * b},
        {"forward": 60 * b * d, "backward": 60 * b * d},
        differentiable=(0, 1),
    )


def cases() -> list[Case]:
    return [case(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
