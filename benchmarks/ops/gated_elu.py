"""Outputs of the gated convolutions of AToP's generator: 2C channels at the sizes of 256, 128 and 32 px inputs."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import gated_elu

from . import Case, normal

# the first convolution, then those of the middle; one image and four; 32 px with a training batch
SHAPES = (
    (1, 48, 256, 256),
    (1, 192, 64, 64),
    (4, 48, 256, 256),
    (4, 192, 64, 64),
    (1, 48, 128, 128),
    (4, 192, 32, 32),
    (64, 48, 32, 32),
    (64, 192, 8, 8),
)


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str = "") -> Case:
    pixels = math.prod(shape) // 2
    memory_format = torch.channels_last if variant else torch.contiguous_format
    return Case(
        shape,
        dtype,
        lambda: (normal(*shape, dtype=dtype, scale=2.0).to(memory_format=memory_format),),
        gated_elu,
        {"forward": 3 * pixels * dtype.itemsize, "backward": 5 * pixels * dtype.itemsize},
        {"forward": 10 * pixels, "backward": 20 * pixels},
        variant,
        (0,),
    )


def cases() -> list[Case]:
    every = [case(shape, torch.float32) for shape in SHAPES]
    return every + [
        case(shape, dtype, "channels_last") for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES
    ]
