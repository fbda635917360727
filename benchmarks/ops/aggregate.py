"""B images, K samples, C classes."""

from __future__ import annotations

import torch

from purify_fast.ops import aggregate

from . import Case, normal

SHAPES = ((32, 8, 10), (256, 8, 10), (256, 8, 100), (64, 64, 10), (512, 8, 200))


def case(shape: tuple[int, ...], dtype: torch.dtype, method: str) -> Case:
    b, k, c = shape
    read, result = b * k * c * dtype.itemsize, b * c * 4
    work = {"lse": 4, "peel": 4, "mean": 1, "probability": 14, "vote": 2}[method] * b * k * c
    return Case(
        shape,
        dtype,
        lambda: (normal(b, k, c, dtype=dtype, scale=3.0),),
        lambda logits: aggregate(logits, method),
        {"forward": read + result, "backward": 2 * read + result},
        {"forward": work, "backward": 2 * work},
        method,
        (0,) if method != "vote" else (),
    )


def cases() -> list[Case]:
    every = [case(shape, torch.float32, "lse") for shape in SHAPES]
    every += [case(shape, torch.bfloat16, "lse") for shape in SHAPES]
    every += [case(SHAPES[i], torch.float32, m) for m in ("peel", "mean", "probability", "vote") for i in (1, 4)]
    return every
