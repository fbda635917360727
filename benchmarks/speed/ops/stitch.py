"""Cases of the op stitch: images that are assembled from the blocks of four passes."""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import random_transform, stitch

from . import Case, normal

PASSES = 4
#: The shapes of the stitched images.
SHAPES = ((8, 3, 256, 256), (64, 3, 32, 32))
LARGE = ((128, 3, 256, 256), (1024, 3, 32, 32))
KINDS = ((torch.float32, "contiguous_format"), (torch.bfloat16, "channels_last"))


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        b, *image = shape
        images = normal(b * PASSES, *image, dtype=dtype, layout=layout)
        x, seed, ids = torch.zeros(shape), torch.tensor([1234567890123]), torch.arange(b)
        return images, random_transform(x, seed, ids, sigma=0.0, block=shape[2] // 8, num_passes=PASSES)[1]

    return Case(
        inputs, stitch, {"forward": "2*n*s", "backward": "(1 + N)*n*s"}, differentiable=(0,), symbols={"N": PASSES}
    )
