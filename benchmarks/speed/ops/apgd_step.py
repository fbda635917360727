"""Cases of the op apgd_step: current images, their gradient, clean images, and images of the previous step."""

from __future__ import annotations

import torch

from purify_fast.ops import apgd_step

from . import Case, kinds, normal, uniform
from .pgd_step import LARGE, SHAPES

__all__ = ["LARGE", "SHAPES", "case"]
KINDS = kinds("linf", "l2")


def case(shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> Case:
    alpha, eps = (2 / 255, 8 / 255) if norm == "linf" else (0.1, 0.5)
    return Case(
        lambda: (
            uniform(*shape, dtype=dtype),
            normal(*shape, dtype=dtype, scale=1e-3),
            uniform(*shape, dtype=dtype, seed=1),
            uniform(*shape, dtype=dtype, seed=2),
        ),
        lambda x, grad, nat, previous: apgd_step(x, grad, nat, previous, alpha, eps, 0.75, norm),
        {"forward": "5*n*s"},
    )
