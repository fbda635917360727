"""Time every convolution of AToP's generator at 128 px, ours and PyTorch's: ``python -m benchmarks convolutions``.

The convolutions run in bfloat16 and channels_last, on 4 images and one thread. Our convolution and PyTorch's run in
turn. The CPU time of each is measured. The forward pass and the two gradients are timed separately.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from purify_fast.methods.atop import DeepFillGenerator
from purify_fast.ops import REGISTRY

from .. import options
from ..options import Unfit
from . import sheets, timing

IMAGES, SIDE = 4, 128
DIRECTIONS = ("convolution", "convolution_input_gradient", "convolution_weight_gradient")


@dataclass(frozen=True)
class Layer:
    """A convolution with a square kernel, on square images. ``side`` is the side of these images in pixels."""

    inputs: int
    outputs: int
    side: int
    stride: int = 1
    dilation: int = 1
    kernel: int = 3

    @property
    def name(self) -> str:
        words = [f"{self.inputs} to {self.outputs} channels, {self.side} x {self.side}"]
        words += [f"{self.kernel} x {self.kernel}"] if self.kernel != 3 else []
        words += [f"stride {self.stride}"] if self.stride != 1 else []
        words += [f"dilation {self.dilation}"] if self.dilation != 1 else []
        return ", ".join(words)

    @property
    def flop(self) -> int:
        """The FLOP of the convolution by its formula, including products with the zeros of the padding."""
        pixels = IMAGES * (self.side // self.stride) ** 2
        return 2 * pixels * self.inputs * self.outputs * self.kernel**2

    def arguments(self) -> dict[str, tuple]:
        """Return the arguments for each op in `DIRECTIONS`."""
        padding = self.dilation * (self.kernel // 2)
        settings = [[one, one] for one in (self.stride, padding, self.dilation)]
        small = self.side // self.stride
        x, grad, weight = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            for shape in (
                (IMAGES, self.side, self.side, self.inputs),
                (IMAGES, small, small, self.outputs),
                (self.outputs, self.kernel, self.kernel, self.inputs),
            )
        )
        bias = torch.zeros(self.outputs)
        given = (x, weight, bias), (grad, weight, self.side, self.side), (grad, x, [self.kernel, self.kernel])
        return {op: (*one, *settings) for op, one in zip(DIRECTIONS, given, strict=True)}


def layers_of_generator() -> dict[Layer, int]:
    """Return the shapes of the convolutions in AToP's generator at 128 px, each with its number of occurrences."""
    counts: Counter[Layer] = Counter()

    def count(layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        sizes = layer.in_channels, layer.out_channels, inputs[0].shape[2]
        counts[Layer(*sizes, layer.stride[0], layer.dilation[0], layer.kernel_size[0])] += 1

    generator = DeepFillGenerator(5, 48)
    for layer in generator.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        generator(torch.zeros(1, 5, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE))
    return counts


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call in seconds."""
    began = time.process_time()
    call()
    return time.process_time() - began


def table(layers: dict[Layer, int], runs: int) -> list[str]:
    """Return the table of all layers: milliseconds of PyTorch's convolution and of ours, and the GFLOP/s of ours.

    The last line has the milliseconds of all layers of the generator together.
    """
    total = {name: [0.0, 0.0] for name in DIRECTIONS}
    body = []
    for layer, count in layers.items():
        cells = []
        for name, given in layer.arguments().items():
            op = REGISTRY[name]
            clocks = {
                "theirs": partial(cpu_seconds, partial(op.reference, *given)),
                "ours": partial(cpu_seconds, partial(op.handle, *given)),
            }
            timing.alternated(clocks, 1)
            both = [statistics.median(times) for times in timing.alternated(clocks, runs).values()]
            total[name] = [before + count * one for before, one in zip(total[name], both, strict=True)]
            cells.append(f"{1e3 * both[0]:.2f} to {1e3 * both[1]:.2f} ms, {layer.flop / both[1] / 1e9:.0f}")
        body.append([layer.name, count, *cells])
    sums = [f"{1e3 * before:.0f} to {1e3 * after:.0f} ms" for before, after in total.values()]
    body.append([f"all {sum(layers.values())}", "", *sums])
    what = "convolution (3 x 3 if no size is given)"
    return sheets.table([what, "how often", "forward", "gradient of the input", "of the weights"], body)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m benchmarks convolutions``."""
    parser.add_argument(
        "--runs", type=options.at_least_one, default=15, help="number of runs of each convolution; default: 15"
    )


def main(chosen: argparse.Namespace) -> str:
    """Limit PyTorch to one thread in the whole process, and return the table of all layers in Markdown.

    Raises:
        Unfit: the package has no kernel for convolutions on this machine.
    """
    if REGISTRY[DIRECTIONS[0]].kernel("cpu") == "reference":
        raise Unfit(
            "this machine has no kernel for the package's convolutions. They need the compiled extension, and a "
            "processor with AVX512-BF16 and without AMX."
        )
    torch.set_num_threads(1)
    with torch.no_grad():
        return "\n".join(table(layers_of_generator(), chosen.runs))
