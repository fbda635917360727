"""Cases of the op sample_latent. A shape has the batch size and the dimension of the latent."""

from __future__ import annotations

import torch

from purify_fast.ops import sample_latent

from . import Case, normal

SHAPES = ((256, 64), (640, 128), (4096, 192))
LARGE = ((262144, 192), (4096, 128))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    b, d = shape
    return Case(
        lambda: (
            normal(b, d, dtype=dtype),
            normal(b, d, dtype=dtype, scale=0.5),
            torch.tensor([1234567890123]),
            torch.arange(b),
        ),
        sample_latent,
        {"forward": "3*B*D*s + 12*B", "backward": "5*B*D*s + 12*B"},
        differentiable=(0, 1),
        symbols={"B": b, "D": d},
    )
