"""The attention branch of AToP's generator: 96 channels at a quarter of the image, for 256, 128 and 32 px.

The whole function is timed, products included: they are PyTorch's in every contestant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import contextual_attention

from . import Case, normal, uniform

SHAPES = ((4, 96, 64, 64), (4, 96, 32, 32), (64, 96, 8, 8))
LARGE = ((32, 96, 64, 64), (256, 96, 8, 8))
#: Each case takes minutes of compilation.
KINDS = ((torch.float32, ""), (torch.bfloat16, "channels_last"))


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    batch, channels, height, width = shape
    cells = height * width // 4

    def inputs() -> tuple[Tensor, ...]:
        values = normal(*shape, dtype=dtype, scale=0.05, layout=variant)
        return values, uniform(batch, cells, dtype=torch.float32) > 0.25

    return Case(
        shape,
        dtype,
        inputs,
        contextual_attention,
        # These are the products of pixels (one) and with the weights (four), then of their gradients.
        {"forward": ("8*B*C*L*s", "10*B*C*L*L"), "backward": ("12*B*C*L*s", "20*B*C*L*L")},
        variant,
        (0,),
        {"B": batch, "C": channels, "L": cells},
    )
