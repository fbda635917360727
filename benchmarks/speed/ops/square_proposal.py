"""Cases of the op square_proposal: the current images of the Square attack, and the clean images.

There is one proposal for each image. Late in the attack there are eight.
"""

from __future__ import annotations

import math

import torch

from purify_fast.attacks.square import pattern
from purify_fast.ops import square_proposal

from . import Case, kinds, uniform

#: Each entry has the shape of the images, and the number of proposals for each image.
SHAPES = (((128, 3, 32, 32), 1), ((128, 3, 32, 32), 8), ((16, 3, 224, 224), 1))
LARGE = (((64, 3, 224, 224), 8), ((1024, 3, 32, 32), 8), ((1024, 3, 32, 32), 1))
KINDS = kinds("linf", "l2", "l1")


def case(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, norm: str) -> Case:
    shape, draws = sizes
    eps, edge = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}[norm], shape[2] // 8 + 1

    def inputs() -> tuple[torch.Tensor, ...]:
        numbers = uniform(shape[0], draws, 5 + shape[1], dtype=torch.float32, seed=2)
        images = uniform(*shape, dtype=dtype), uniform(*shape, dtype=dtype, seed=1)
        # Make the pattern on the measured device, which need not be the default device.
        return (*images, numbers, *([] if norm == "linf" else [pattern(edge, norm, numbers.device)]))

    return Case(
        (shape[0], draws, *shape[1:]),
        dtype,
        inputs,
        lambda x, nat, numbers, *shapes: square_proposal(x, nat, eps, numbers, edge, norm, 0.0, 1.0, *shapes),
        # The formula of l1 omits the search for its shift.
        {"forward": ("(2 + T)*n*s", {"linf": "10*n*T", "l2": "30*n*T", "l1": "60*n*T"}[norm])},
        norm,
        symbols={"n": math.prod(shape), "T": draws},
    )
