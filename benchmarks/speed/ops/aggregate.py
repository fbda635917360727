"""Cases of the op aggregate: logits of B images, K samples of each image, and C classes."""

from __future__ import annotations

import torch

from purify_fast.ops import aggregate
from purify_fast.ops.aggregate import METHODS

from . import DTYPES, Case, normal

SHAPES = ((32, 8, 10), (256, 8, 10), (256, 8, 100), (64, 64, 10), (512, 8, 200))
LARGE = ((65536, 8, 100), (1024, 8, 10))


def case(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> Case:
    b, k, c = shape
    return Case(
        lambda: (normal(b, k, c, dtype=dtype, scale=3.0),),
        lambda logits: aggregate(logits, method),
        {"forward": "B*K*C*s + 4*B*C", "backward": "2*B*K*C*s + 4*B*C"},
        (0,) if method != "vote" else (),
        {"B": b, "K": k, "C": c},
    )


def chosen(shapes: tuple) -> list[tuple]:
    every = [(shape, dtype, "lse") for dtype in DTYPES for shape in shapes]
    two = sorted({shapes[1], max(shapes)})
    return every + [(shape, torch.float32, method) for method in METHODS if method != "lse" for shape in two]
