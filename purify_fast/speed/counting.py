"""Count the operators, the bytes and the FLOP of a call, and estimate its time on a GPU.

The time on a GPU is not measured. It is the longest of three times: that of the host to launch the operators, that of
the memory to move their bytes, and that of the tensor cores to compute their products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# This import registers the ops that are counted below.
import purify_fast.ops.convolution  # noqa: F401

from ..ops.dispatch.racing import Launches


class Gpu(NamedTuple):
    """The assumed speed of a GPU: four fifths to nine tenths of the numbers in its data sheet.

    Args:
        bytes_per_second: bytes that its memory moves per second.
        bfloat16: largest number of FLOP per second in bfloat16.
        tf32: largest number of FLOP per second in TF32.
    """

    bytes_per_second: float
    bfloat16: float
    tf32: float


GPUS = {
    "h100": Gpu(3.0e12, 790e12, 395e12),
    "h200": Gpu(4.3e12, 790e12, 395e12),
    "a100": Gpu(1.8e12, 250e12, 125e12),
}
#: The share of a GPU's rate of FLOP that convolutions are assumed to reach.
SHARE = 0.6
#: Seconds in which the host launches an operator and its backward pass.
EAGER = 9e-6


class _NoModules(SimpleNamespace):
    """Replaces the part of PyTorch's counter that tracks modules, so that all operators count for a single module."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _forward(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # For a weight [O, K, L, C] and a result [B, H, W, O], there are a multiplication and an addition for each weight
    # and each pixel of the result.
    return 2 * math.prod(weight) * math.prod(out_shape[:3])


def _input_gradient(grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight) * math.prod(grad[:3])


def _weight_gradient(grad: Any, input: Any, kernel: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * math.prod(kernel) * input[3]


class Flops(FlopCounterMode):
    """PyTorch's counter of FLOP without its hooks on modules, which count for each module separately.

    These hooks raise an error in an attack, where `torch.autograd.grad` computes the gradient of a module's input.
    """

    def __init__(self) -> None:
        # This package's convolutions have tensors with the channels last.
        ops = torch.ops.purify_fast
        formulas = {
            ops.convolution: _forward,
            ops.convolution_input_gradient: _input_gradient,
            ops.convolution_weight_gradient: _weight_gradient,
        }
        super().__init__(display=False, custom_mapping=formulas)
        self.mod_tracker = _NoModules(parents={"Global"})  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """The number of FLOP."""
        return self.get_total_flops()


class Moved(Launches):
    """Counts launches, and the bytes that they read and write.

    Attributes:
        bytes: number of bytes, without the effect of caches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.count
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self.count > before:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        return result


class Cost(NamedTuple):
    """The cost of a call.

    Args:
        launches: number of operators that the host launches.
        bytes: number of bytes that are read and written.
        flop: number of FLOP in products.
    """

    launches: float
    bytes: float
    flop: float

    def line(self, other: Cost, share: float) -> Cost:
        """Interpolate bytes and FLOP linearly between this cost (share 0) and another (share 1)."""
        moved, flop = (a + (b - a) * share for a, b in ((self.bytes, other.bytes), (self.flop, other.flop)))
        return Cost(other.launches, moved, flop)

    def plus(self, other: Cost) -> Cost:
        """The cost of both calls, one after the other."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Cost:
        """The cost of ``factor`` calls."""
        return Cost(*(factor * value for value in self))

    def limit(self, gpu: Gpu, rate: float) -> tuple[str, float]:
        """The name and the seconds of the slowest part of the work on a GPU.

        Args:
            gpu: the GPU.
            rate: FLOP per second in the precision of the products.
        """
        times = {
            "launching": self.launches * EAGER,
            "moving bytes": self.bytes / gpu.bytes_per_second,
            "products": self.flop / (SHARE * rate),
        }
        return max(times.items(), key=lambda item: item[1])


def counted(run: Callable[[], object]) -> Cost:
    """Run a function, and return its cost.

    Args:
        run: the function.
    """
    with Flops() as flops, Moved() as moved:
        run()
    return Cost(moved.count, moved.bytes, flops.total)
