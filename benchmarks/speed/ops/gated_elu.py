"""Cases of the op gated_elu: outputs of gated convolutions in AToP's generator, for images of 256, 128 and 32 px."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import gated_elu

from . import Case, kinds, normal

# Pairs: the output of the generator's first convolution, and that of a convolution in its middle.
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
        lambda: (normal(*shape, dtype=dtype, scale=2.0, layout=variant),),
        gated_elu,
        {"forward": "3*n*s", "backward": "5*n*s"},
        (0,),
        {"n": math.prod(shape) // 2},
    )
