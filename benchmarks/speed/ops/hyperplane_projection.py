"""Cases of the op hyperplane_projection: images, gradients of a margin, and offsets of planes."""

from __future__ import annotations

import torch

from purify_fast.ops import hyperplane_projection
from purify_fast.ops.pgd_step import NORMS

from . import Case, kinds, normal, uniform

SHAPES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))
LARGE = ((256, 3, 224, 224), (1024, 3, 32, 32))
KINDS = kinds(*NORMS)


def case(shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> Case:
    def inputs() -> tuple[torch.Tensor, ...]:
        x, w = uniform(*shape, dtype=dtype), normal(*shape, dtype=dtype, scale=1e-3)
        flat, size = x.flatten(1).float(), w.flatten(1).float()
        # These are the L-inf distances from the images to the planes, if the box [0, 1] is ignored.
        distance = torch.linspace(-0.05, 0.05, shape[0])
        return x, w, (flat * size).sum(1) + distance * size.abs().sum(1)

    return Case(
        inputs,
        lambda x, w, b: hyperplane_projection(x, w, b, norm),
        {"forward": "3*n*s"},
        # In l1 a single coordinate gets the rounding error of the sum over all coordinates.
        slack=300.0 if norm == "l1" and dtype == torch.float32 else 1.0,
    )
