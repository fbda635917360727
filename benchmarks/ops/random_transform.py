"""Images as AToP transforms them: 8 of 256 pixels with blocks of 32, and 64 of 32 pixels with blocks of 4."""

from __future__ import annotations

import math

import torch

from purify_fast.ops import random_transform

from . import Case, uniform

#: shape, side of a block
SHAPES = (((8, 3, 256, 256), 32), ((64, 3, 32, 32), 4))


def case(shape: tuple[int, ...], block: int, variant: str, dtype: torch.dtype) -> Case:
    b, c, h, w = shape
    pixels = math.prod(shape)
    parts = 4 if variant == "rt3" else None
    sigma = 0.0 if variant == "rt1" else 0.25
    packed = b * (parts or 1) * (c + 2) * h * w * dtype.itemsize
    noise = 0 if variant == "rt1" else 45  # as `philox` counts a normal
    return Case(
        shape,
        dtype,
        lambda: (uniform(*shape, dtype=torch.float32), torch.tensor([1234567890123]), torch.arange(b)),
        # bfloat16 is for the generator, which takes it in channels_last
        lambda x, seed, ids: random_transform(
            x, seed, ids, sigma=sigma, block=block, parts=parts, dtype=dtype, channels_last=dtype == torch.bfloat16
        )[0],
        {"forward": 4 * pixels + packed, "backward": 2 * 4 * pixels + packed * c // (c + 2)},
        {"forward": (noise + 6) * pixels, "backward": (noise + 4 + (parts or 1)) * pixels},
        variant,
        differentiable=(0,),
    )


def cases() -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [case(*shape, variant, dtype) for variant in ("rt2", "rt3", "rt1") for dtype in dtypes for shape in SHAPES]
