"""Cases of the op reconstruction_loss: image logits and target images."""

from __future__ import annotations

import torch

from purify_fast.ops import reconstruction_loss

from . import Case, normal, uniform

SHAPES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))
LARGE = ((4096, 3, 64, 64), (1024, 3, 32, 32))


def case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    return Case(
        lambda: (normal(*shape, dtype=dtype, scale=3.0), uniform(*shape, dtype=dtype)),
        reconstruction_loss,
        {"forward": "2*n*s", "backward": "3*n*s"},
        differentiable=(0,),
    )
