"""Convolutions of AToP's generator at 128 px, of which the kernels are for bfloat16 on a CPU: nearly all of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from purify_fast.ops import conv2d

from . import Case, normal

DEVICES = ("cpu",)
#: images, channels, side, outputs, kernel, stride, dilation
SHAPES = (
    (4, 96, 32, 192, 3, 1, 1),
    (4, 96, 32, 192, 3, 1, 8),
    (4, 96, 64, 96, 3, 1, 1),
    (4, 48, 128, 48, 3, 1, 1),
    (4, 24, 128, 24, 3, 1, 1),
    (4, 48, 64, 192, 3, 2, 1),
    (4, 24, 128, 48, 3, 2, 1),
    (4, 3, 128, 48, 5, 1, 1),
)


def case(images: int, inputs: int, side: int, outputs: int, kernel: int, stride: int, dilation: int) -> Case:
    padding = dilation * (kernel // 2)

    def operands() -> tuple[Tensor, ...]:
        x = normal(images, inputs, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        weight = normal(outputs, inputs, kernel, kernel, dtype=torch.bfloat16)
        return x, weight.to(memory_format=torch.channels_last), normal(outputs, dtype=torch.bfloat16)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv2d(x, weight, bias, stride, padding, dilation)

    small = side // stride
    x, weight, out = images * inputs * side**2, outputs * inputs * kernel**2, images * outputs * small**2
    # products with the zeros of the border are counted, as everywhere
    flops = 2 * images * small**2 * weight
    return Case(
        (images, inputs, side, side),
        torch.bfloat16,
        operands,
        call,
        {"forward": 2 * (x + weight + out), "backward": 4 * (x + weight) + 2 * out},
        {"forward": flops, "backward": 2 * flops},
        f"{kernel}x{kernel} to {outputs} stride {stride} dilation {dilation}",
        differentiable=(0, 1, 2),
    )


def cases(shapes: tuple = SHAPES) -> list[Case]:
    return [case(*shape) for shape in shapes]
