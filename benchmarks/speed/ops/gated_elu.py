"""Outputs of the gated convolutions of AToP's generator: 2C channels at the sizes of 256, 128 and 32 px inputs."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import gated_elu

from . import Case, kinds, normal

# The first convolution, then those of the middle; one image and four; 32 px with a training batch.
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
LARGE = ((32, 48, 256, 256), (64, 192, 32, 32))
KINDS = ((torch.float32, ""), *kinds("channels_last"))


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    return Case(
        shape,
        dtype,
        lambda: (normal(*shape, dtype=dtype, scale=2.0, layout=variant),),
        gated_elu,
        {"forward": ("3*n*s", "10*n"), "backward": ("5*n*s", "20*n")},
        variant,
        (0,),
        {"n": math.prod(shape) // 2},
    )
