"""Cases of the op group_norm_silu: feature maps of a U-Net of width 32, for 32 x 32 images in patches of 2 x 2."""

from __future__ import annotations

import torch

from purify_fast.ops import group_norm_silu

from . import Case, normal

SHAPES = ((32, 32, 16, 16), (32, 96, 16, 16), (32, 192, 8, 8), (32, 128, 4, 4))
LARGE = ((512, 96, 16, 16), (512, 128, 4, 4))
KINDS = ((torch.bfloat16, "channels_last"),)
#: The number of channels in a group.
WIDTH = 16


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    channels = shape[1]
    return Case(
        lambda: (
            normal(*shape, dtype=dtype, layout=variant),
            *(normal(channels, dtype=torch.float32) for _ in range(2)),
            normal(1, channels, dtype=torch.float32),
        ),
        lambda x, weight, bias, shift: group_norm_silu(x, channels // WIDTH, weight, bias, shift),
        {"forward": "2*n*s", "backward": "3*n*s"},
        (0,),
    )
