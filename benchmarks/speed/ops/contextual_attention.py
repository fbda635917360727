"""Cases of the op contextual_attention: the attention branch of AToP's generator for images of 256, 128 and 32 px.

The timed function includes matrix products, which PyTorch computes in every compared implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import contextual_attention

from . import Case, normal, uniform

SHAPES = ((4, 96, 64, 64), (4, 96, 32, 32), (64, 96, 8, 8))
LARGE = ((32, 96, 64, 64), (256, 96, 8, 8))
#: Only two kinds are measured, because each case takes minutes to compile.
KINDS = ((torch.float32, ""), (torch.bfloat16, "channels_last"))


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    batch, channels, height, width = shape
    cells = height * width // 4

    def inputs() -> tuple[Tensor, ...]:
        values = normal(*shape, dtype=dtype, scale=0.05, layout=variant)
        return values, uniform(batch, cells, dtype=torch.float32) > 0.25

    return Case(
        inputs,
        contextual_attention,
        {"forward": "8*B*C*L*s", "backward": "12*B*C*L*s"},
        (0,),
        {"B": batch, "C": channels, "L": cells},
    )
