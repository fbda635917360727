"""Every convolution of AToP's generator at 128 px, ours against PyTorch's: ``python -m benchmarks convolutions``.

Both are in bfloat16 and channels_last, on 4 images, in turn, by CPU time on one thread. Each direction is on its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from purify_fast.ops import REGISTRY

IMAGES = 4
DIRECTIONS = ("convolution", "convolution_input_gradient", "convolution_weight_gradient")


@dataclass(frozen=True)
class Layer:
    """A convolution, and how many of its shape the generator has."""

    inputs: int
    outputs: int
    side: int  # of the images that come in
    count: int
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
        """As written, products with the zeros of the border among them."""
        pixels = IMAGES * (self.side // self.stride) ** 2
        return 2 * pixels * self.inputs * self.outputs * self.kernel**2

    def arguments(self) -> dict[str, tuple]:
        """Of each direction's op."""
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


LAYERS = (
    Layer(96, 192, 32, 10),
    Layer(96, 192, 32, 2, dilation=2),
    Layer(96, 192, 32, 2, dilation=4),
    Layer(96, 192, 32, 2, dilation=8),
    Layer(96, 192, 32, 2, dilation=16),
    Layer(48, 192, 32, 1),
    Layer(192, 192, 32, 1),
    Layer(96, 96, 64, 2),
    Layer(48, 96, 64, 3),
    Layer(24, 96, 64, 2),
    Layer(48, 48, 128, 2),
    Layer(24, 24, 128, 2),
    Layer(48, 192, 64, 2, stride=2),
    Layer(48, 96, 64, 1, stride=2),
    Layer(24, 96, 128, 1, stride=2),
    Layer(24, 48, 128, 2, stride=2),
    Layer(3, 48, 128, 2, kernel=5),
    Layer(5, 48, 128, 1, kernel=5),
    Layer(12, 3, 128, 2),
)


def seconds(calls: list[Callable[[], object]], runs: int) -> list[float]:
    """The median CPU time of each, called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(runs):
        for call, own in zip(calls, times, strict=True):
            began = time.process_time()
            call()
            own.append(time.process_time() - began)
    return [statistics.median(own) for own in times]


def table(layers: tuple[Layer, ...], runs: int) -> list[str]:
    """Milliseconds of both, and GFLOP/s of ours, layer by layer; then all layers of the generator together."""
    total = {name: [0.0, 0.0] for name in DIRECTIONS}
    lines = [
        "| convolution, 3 x 3 unless it says more | how often | forward | gradient of the input | of the weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for layer in layers:
        cells = []
        for name, arguments in layer.arguments().items():
            op = REGISTRY[name]
            both = seconds([partial(op.reference, *arguments), partial(op.handle, *arguments)], runs)
            total[name] = [before + layer.count * one for before, one in zip(total[name], both, strict=True)]
            cells.append(f"{1e3 * both[0]:.2f} to {1e3 * both[1]:.2f} ms, {layer.flop / both[1] / 1e9:.0f}")
        lines.append(f"| {layer.name} | {layer.count} | {' | '.join(cells)} |")
    sums = [f"{1e3 * total[name][0]:.0f} to {1e3 * total[name][1]:.0f} ms" for name in DIRECTIONS]
    count = sum(layer.count for layer in layers)
    return [*lines, f"| all {count} | | {' | '.join(sums)} |"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks convolutions``."""
    parser.add_argument("--runs", type=int, default=15, help="how often every contestant runs; 15 by default")


def check(chosen: argparse.Namespace) -> None:
    """ValueError if there is nothing to measure: no runs, or no kernel."""
    if chosen.runs < 1:
        raise ValueError(f"--runs must be at least 1, got {chosen.runs}")
    if REGISTRY[DIRECTIONS[0]].kernel("cpu") == "reference":
        raise ValueError(
            "this package's convolutions have no kernel here: they need the compiled extension, and a processor with "
            "AVX512-BF16 and without AMX"
        )


def main(chosen: argparse.Namespace) -> str:
    """The table of all layers, in Markdown. The process has one thread from then on."""
    torch.set_num_threads(1)
    with torch.no_grad():
        return "\n".join(table(LAYERS, chosen.runs))
