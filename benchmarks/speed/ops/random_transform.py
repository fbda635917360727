"""Images as AToP transforms them: 8 of 256 pixels with blocks of 32, and 64 of 32 pixels with blocks of 4."""

from __future__ import annotations

import torch

from purify_fast.ops import random_transform

from . import Case, kinds, uniform

#: Shape, and side of a block.
SHAPES = (((8, 3, 256, 256), 32), ((64, 3, 32, 32), 4))
LARGE = (((128, 3, 256, 256), 32), ((1024, 3, 32, 32), 4))
KINDS = kinds("rt2", "rt3", "rt1")


def case(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, variant: str) -> Case:
    shape, block = sizes
    b, c, h, w = shape
    num_passes = 4 if variant == "rt3" else None
    sigma = 0.0 if variant == "rt1" else 0.25
    # `philox` counts a normal as 45 operations.
    noise = 0 if variant == "rt1" else 45
    return Case(
        shape,
        dtype,
        lambda: (uniform(*shape, dtype=torch.float32), torch.tensor([1234567890123]), torch.arange(b)),
        # The generator takes bfloat16 in channels_last.
        lambda x, seed, ids: random_transform(
            x,
            seed,
            ids,
            sigma=sigma,
            block=block,
            num_passes=num_passes,
            dtype=dtype,
            channels_last=dtype == torch.bfloat16,
        )[0],
        {
            "forward": ("4*B*C*P + N*B*(C + 2)*P*s", f"{noise + 6}*B*C*P"),
            "backward": ("8*B*C*P + N*B*C*P*s", f"({noise + 4} + N)*B*C*P"),
        },
        variant,
        differentiable=(0,),
        symbols={"B": b, "C": c, "P": h * w, "N": num_passes or 1},
    )
