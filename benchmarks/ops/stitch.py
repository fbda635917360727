"""Images put together from four passes: 8 of 256 pixels with blocks of 32, and 64 of 32 pixels with blocks of 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from purify_fast.ops import random_transform, stitch

from . import Case, normal

PASSES = 4
#: shape of the stitched images, side of a block
SHAPES = (((8, 3, 256, 256), 32), ((64, 3, 32, 32), 4))
LARGE = (((128, 3, 256, 256), 32), ((1024, 3, 32, 32), 4))


def inputs(shape: tuple[int, ...], block: int, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple:
    b, *image = shape
    images = normal(b * PASSES, *image, dtype=dtype).contiguous(memory_format=memory_format)
    x, seed, ids = torch.zeros(shape), torch.tensor([1234567890123]), torch.arange(b)
    owners: Tensor = random_transform(x, seed, ids, sigma=0.0, block=block, num_passes=PASSES)[1]
    return images, owners


def case(shape: tuple[int, ...], block: int, dtype: torch.dtype, memory_format: torch.memory_format) -> Case:
    return Case(
        shape,
        dtype,
        lambda: inputs(shape, block, dtype, memory_format),
        stitch,
        {"forward": "2*n*s", "backward": "(1 + N)*n*s"},
        {"forward": "0", "backward": "0"},
        str(memory_format).removeprefix("torch."),
        differentiable=(0,),
        symbols={"n": math.prod(shape), "N": PASSES, "s": dtype.itemsize},
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    layouts = ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last))
    return [case(*shape, *layout) for layout in layouts for shape in shapes]
