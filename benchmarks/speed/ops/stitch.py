"""Cases of the op stitch: images that are assembled from the blocks of four passes.

On a CPU there are 8 images of 256 x 256 pixels with blocks of 32, and 64 images of 32 x 32 pixels with blocks of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import random_transform, stitch

from . import Case, normal

PASSES = 4
#: Each entry has the shape of the stitched images, and the side of a block in pixels.
SHAPES = (((8, 3, 256, 256), 32), ((64, 3, 32, 32), 4))
LARGE = (((128, 3, 256, 256), 32), ((1024, 3, 32, 32), 4))
KINDS = ((torch.float32, "contiguous_format"), (torch.bfloat16, "channels_last"))


def case(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, layout: str) -> Case:
    shape, block = sizes

    def inputs() -> tuple[Tensor, ...]:
        b, *image = shape
        images = normal(b * PASSES, *image, dtype=dtype, layout=layout)
        x, seed, ids = torch.zeros(shape), torch.tensor([1234567890123]), torch.arange(b)
        return images, random_transform(x, seed, ids, sigma=0.0, block=block, num_passes=PASSES)[1]

    return Case(
        shape,
        dtype,
        inputs,
        stitch,
        {"forward": ("2*n*s", "0"), "backward": ("(1 + N)*n*s", "0")},
        layout,
        differentiable=(0,),
        symbols={"N": PASSES},
    )
