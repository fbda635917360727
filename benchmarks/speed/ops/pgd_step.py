"""Cases of the op pgd_step: current images, their gradient, and clean images."""

from __future__ import annotations

import torch

from purify_fast.ops import pgd_step

from . import Case, kinds, normal, uniform

SHAPES = ((128, 1, 16, 16), (640, 3, 32, 32), (128, 3, 64, 64))
LARGE = ((256, 3, 224, 224), (1024, 3, 32, 32))
KINDS = kinds("linf", "l2", "l1")


def case(shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> Case:
    alpha, eps = {"linf": (2 / 255, 8 / 255), "l2": (0.1, 0.5), "l1": (1.0, 12.0)}[norm]
    return Case(
        lambda: (
            uniform(*shape, dtype=dtype),
            normal(*shape, dtype=dtype, scale=1e-3),
            uniform(*shape, dtype=dtype, seed=1),
        ),
        lambda x, grad, nat: pgd_step(x, grad, nat, alpha, eps, norm),
        {"forward": "4*n*s"},
    )
