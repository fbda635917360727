"""Images as AToP transforms them: 8 of 256 pixels with blocks of 32, and 64 of 32 pixels with blocks of 4."""

from __future__ import annotations

import torch

from purify_fast.ops import random_transform

from . import Case, uniform

#: shape, side of a block
SHAPES = (((8, 3, 256, 256), 32), ((64, 3, 32, 32), 4))
LARGE = (((128, 3, 256, 256), 32), ((1024, 3, 32, 32), 4))


def case(shape: tuple[int, ...], block: int, variant: str, dtype: torch.dtype) -> Case:
    b, c, h, w = shape
    num_passes = 4 if variant == "rt3" else None
    sigma = 0.0 if variant == "rt1" else 0.25
    noise = 0 if variant == "rt1" else 45  # as `philox` counts a normal
    return Case(
        shape,
        dtype,
        lambda: (uniform(*shape, dtype=torch.float32), torch.tensor([1234567890123]), torch.arange(b)),
        # bfloat16 is for the generator, which takes it in channels_last
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
        {"forward": "4*B*C*P + N*B*(C + 2)*P*s", "backward": "8*B*C*P + N*B*C*P*s"},
        {"forward": f"{noise + 6}*B*C*P", "backward": f"({noise + 4} + N)*B*C*P"},
        variant,
        differentiable=(0,),
        symbols={"B": b, "C": c, "P": h * w, "N": num_passes or 1, "s": dtype.itemsize},
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [case(*shape, variant, dtype) for variant in ("rt2", "rt3", "rt1") for dtype in dtypes for shape in shapes]
