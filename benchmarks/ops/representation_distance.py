"""Features of a student and of its teacher: pooled, and maps before pooling, of ResNet-18, WRN-34-10 and a small CNN.

Called from Python without a kernel, ``eager`` is what users write, with ``F.cosine_similarity``; compiled, it is the
formula of the op.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.ops import REGISTRY, representation_distance

from . import Case, normal

NHWC = torch.channels_last
SHAPES = ((128, 512), (128, 512, 4, 4), (128, 640, 8, 8), (64, 128, 7, 7))
LARGE = ((1024, 640, 8, 8), (1024, 512))


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not REGISTRY["representation_distance"].plain(
        student.device, student.dtype, student.numel()
    ):
        return representation_distance(student, teacher)
    return 1 - F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float()).abs()


def case(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        teacher = normal(*shape, dtype=torch.float32)
        student = teacher + 0.5 * teacher.flip(0)
        return tuple(x.to(dtype).contiguous(memory_format=memory_format) for x in (student, teacher))

    return Case(
        shape,
        dtype,
        inputs,
        distance,
        {"forward": "2*n*s", "backward": "3*n*s"},
        {"forward": "6*n", "backward": "3*n"},
        "channels_last" if memory_format == NHWC else "",
        differentiable=(0,),
        symbols={"n": math.prod(shape), "s": dtype.itemsize},
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    kinds = [(dtype, layout) for layout in (torch.contiguous_format, NHWC) for dtype in (torch.float32, torch.bfloat16)]
    return [case(shape, *kind) for kind in kinds for shape in shapes if kind[1] != NHWC or len(shape) == 4]
