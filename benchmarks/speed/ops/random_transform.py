"""Cases of the op random_transform: images that AToP transforms."""

from __future__ import annotations

import torch

from purify_fast.ops import random_transform

from . import Case, kinds, uniform

SHAPES = ((8, 3, 256, 256), (64, 3, 32, 32))
LARGE = ((128, 3, 256, 256), (1024, 3, 32, 32))
KINDS = kinds("rt2", "rt3", "rt1")


def case(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Case:
    b, c, h, w = shape
    num_passes = 4 if variant == "rt3" else None
    sigma = 0.0 if variant == "rt1" else 0.25
    return Case(
        lambda: (uniform(*shape, dtype=torch.float32), torch.tensor([1234567890123]), torch.arange(b)),
        # Use channels_last for bfloat16, as AToP's generator does.
        lambda x, seed, ids: random_transform(
            x,
            seed,
            ids,
            sigma=sigma,
            block=h // 8,
            num_passes=num_passes,
            dtype=dtype,
            channels_last=dtype == torch.bfloat16,
        )[0],
        {"forward": "4*B*C*P + N*B*(C + 2)*P*s", "backward": "8*B*C*P + N*B*C*P*s"},
        differentiable=(0,),
        symbols={"B": b, "C": c, "P": h * w, "N": num_passes or 1},
    )
