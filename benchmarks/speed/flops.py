"""Count the floating point operations (FLOP) of the matrix products and convolutions in a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# This import registers the ops that are counted below.
import purify_fast.ops.convolution  # noqa: F401


class _NoModules(SimpleNamespace):
    """Replaces the part of PyTorch's counter that tracks modules, so that all operators are counted together."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _forward(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # The arguments are shapes. The weight is [O, K, L, C] for O output channels, C input channels and kernels of K x L.
    # The result is [B, H, W, O]. Each pair of a number of the weight and a pixel of the result needs a multiplication
    # and an addition.
    return 2 * math.prod(weight) * math.prod(out_shape[:3])


def _input_gradient(grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight) * math.prod(grad[:3])


def _weight_gradient(grad: Any, input: Any, kernel: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * math.prod(kernel) * input[3]


def _by_onednn(images: Any, second: Any, third: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # The variant that adds a map has this map before the weight [O, C, K, L]. The result is [B, O, H, W].
    weight = third if third is not None and len(third) == 4 else second
    return 2 * math.prod(weight) * math.prod(out_shape) // out_shape[1]


class Flops(FlopCounterMode):
    """PyTorch's counter of FLOP without the hooks that count for each module separately.

    These hooks raise an error in an attack, where `torch.autograd.grad` computes the gradient of a module's input.
    """

    def __init__(self) -> None:
        # This package's convolutions have tensors with the channels last.
        ops = torch.ops.purify_fast
        formulas = {
            ops.convolution: _forward,
            ops.convolution_input_gradient: _input_gradient,
            ops.convolution_weight_gradient: _weight_gradient,
            torch.ops.mkldnn._convolution_pointwise: _by_onednn,
        }
        super().__init__(display=False, custom_mapping=formulas)
        self.mod_tracker = _NoModules(parents={"Global"})


def flop_of(run: Callable[[], object]) -> int:
    """Call a function, and return the FLOP of its matrix products and convolutions."""
    with Flops() as counter:
        run()
    return counter.get_total_flops()
