"""Cases of the op fused_convolution: layers that end a residual block of a ResNet-18 (32 x 32 px) or a WRN-28-10."""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import fused_convolution

from . import Case, normal

#: A shape has the number of images, their channels and side, and the number of output channels, taps and stride.
SHAPES = ((2, 16, 8, 24, 3, 1), (32, 64, 32, 64, 3, 1), (32, 64, 32, 128, 3, 2), (32, 64, 32, 128, 1, 2))
LARGE = (
    *((256, *layer, 3, 1) for layer in ((64, 32, 64), (128, 16, 128), (256, 8, 256), (512, 4, 512), (160, 32, 160))),
    (256, 640, 8, 640, 3, 1),
    (256, 64, 32, 128, 3, 2),
    (256, 64, 32, 128, 1, 2),
)
LAYOUT = "channels_last"


def case(shape: tuple[int, ...], dtype: torch.dtype, _: str = "") -> Case:
    batch, channels, side, outputs, taps, stride = shape
    after = -(-side // stride)

    def inputs() -> tuple[Tensor, ...]:
        weight = normal(outputs, channels, taps, taps, dtype=dtype, scale=(taps * taps * channels) ** -0.5)
        return (
            normal(batch, channels, side, side, dtype=dtype, layout=LAYOUT),
            weight.contiguous(memory_format=torch.channels_last),
            normal(outputs, dtype=dtype),
            normal(batch, outputs, after, after, dtype=dtype, layout=LAYOUT),
        )

    images, results = batch * channels * side**2, batch * outputs * after**2
    weights = outputs * channels * taps**2
    return Case(
        inputs,
        lambda x, weight, bias, added: fused_convolution(
            x, weight, bias, added, "relu", stride=stride, padding=taps // 2
        ),
        {"forward": f"({images} + {weights} + 2*{results})*s", "backward": f"({images} + {weights} + 3*{results})*s"},
        (0, 3),
    )


def chosen(shapes: tuple) -> list[tuple]:
    return [(shape, torch.bfloat16) for shape in shapes]
