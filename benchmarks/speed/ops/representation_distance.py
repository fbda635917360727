"""Cases of the op representation_distance: features of a student and of its teacher.

The features are those of ResNet-18, WRN-34-10 and a small CNN, after pooling or before it. For eager calls the
reference is ``F.cosine_similarity``, which users would write. In compiled code the reference is the formula of the op.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from purify_fast.ops import REGISTRY, representation_distance

from . import Case, arranged, kinds, normal

SHAPES = ((128, 512), (128, 512, 4, 4), (128, 640, 8, 8), (64, 128, 7, 7))
LARGE = ((1024, 640, 8, 8), (1024, 512))


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not REGISTRY["representation_distance"].uses_reference(
        student.device, student.dtype, student.numel()
    ):
        return representation_distance(student, teacher)
    return 1 - F.cosine_similarity(student.flatten(1).float(), teacher.flatten(1).float()).abs()


def case(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Case:
    def inputs() -> tuple[Tensor, ...]:
        teacher = normal(*shape, dtype=torch.float32)
        student = teacher + 0.5 * teacher.flip(0)
        return tuple(arranged(x.to(dtype), layout) for x in (student, teacher))

    return Case(inputs, distance, {"forward": "2*n*s", "backward": "3*n*s"}, differentiable=(0,))


def chosen(shapes: tuple) -> list[tuple]:
    every = kinds("", "channels_last")
    return [(shape, *kind) for kind in every for shape in shapes if kind[1] == "" or len(shape) == 4]
