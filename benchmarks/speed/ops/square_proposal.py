"""Cases of the op square_proposal: the current images of the Square attack, and the clean images."""

from __future__ import annotations

import math

import torch

from purify_fast.attacks.square import pattern
from purify_fast.ops import square_proposal

from . import Case, kinds, uniform

#: A shape has the number of images, the number of proposals for each image, and the size of the images.
SHAPES = ((128, 1, 3, 32, 32), (128, 8, 3, 32, 32), (16, 1, 3, 224, 224))
LARGE = ((64, 8, 3, 224, 224), (1024, 8, 3, 32, 32), (1024, 1, 3, 32, 32))
KINDS = kinds("linf", "l2", "l1")


def case(shape: tuple[int, ...], dtype: torch.dtype, norm: str) -> Case:
    count, draws, *size = shape
    eps, edge = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}[norm], size[1] // 8 + 1

    def inputs() -> tuple[torch.Tensor, ...]:
        numbers = uniform(count, draws, 5 + size[0], dtype=torch.float32, seed=2)
        images = uniform(count, *size, dtype=dtype), uniform(count, *size, dtype=dtype, seed=1)
        # Make the pattern on the measured device, which need not be the default device.
        return (*images, numbers, *([] if norm == "linf" else [pattern(edge, norm, numbers.device)]))

    return Case(
        inputs,
        lambda x, nat, numbers, *shapes: square_proposal(x, nat, eps, numbers, edge, norm, 0.0, 1.0, *shapes),
        {"forward": "(2 + T)*n*s"},
        symbols={"n": math.prod(shape) // draws, "T": draws},
    )
