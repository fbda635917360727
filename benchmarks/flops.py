"""FLOP counted while a function runs, also through an attack on a model whose weights are trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import purify_fast.ops.convolution  # noqa: F401  (registers the ops that are counted below)


class _NoModules(SimpleNamespace):
    """Stands where PyTorch's counter watches modules; everything then counts as one."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _forward(input: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    # weight [O, K, L, C], result [B, H, W, O]: a product and a sum for each weight and pixel, as the definition has it
    return 2 * math.prod(weight) * math.prod(out_shape[:3])


def _input_gradient(grad: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight) * math.prod(grad[:3])


def _weight_gradient(grad: Any, input: Any, kernel: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad) * math.prod(kernel) * input[3]


def _formulas() -> dict[Any, Callable[..., int]]:
    """How this package's convolutions count, whose shapes have channels last."""
    ops = torch.ops.purify_fast
    return {
        ops.convolution: _forward,
        ops.convolution_input_gradient: _input_gradient,
        ops.convolution_weight_gradient: _weight_gradient,
    }


class Flops(FlopCounterMode):
    """PyTorch's counter without its hooks at the modules' inputs.

    Those hooks count by module. They refuse an attack: it differentiates to a leaf that a module reads, by
    `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_formulas())
        self.mod_tracker = _NoModules(parents={"Global"})  # type: ignore[assignment]

    @property
    def total(self) -> int:
        """How many there were."""
        return self.get_total_flops()
