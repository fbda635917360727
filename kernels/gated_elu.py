"""`gated_elu` in Triton: a program computes adjacent elements of the result, which may belong to several rows.

A row of the features has ``size`` numbers a, followed by as many numbers b. A row of the result has ``size`` numbers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, expm1, first_of, load, tile
from ._launch import launch


@triton.jit
def _places(total, groups, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's elements of the result, the places of their a, the distance to their b, and which exist.

    The product tells the compiler that ``GROUP`` elements are in one row, so a thread reads and writes them at once.
    """
    element = first_of(tl.program_id(0), total, WIDTH) + tl.arange(0, WIDTH)
    size = tl.cast(groups, element.dtype) * GROUP
    return element, element + element // size * size, size, element < total


@triton.jit
def _elu(x):
    # x for x > 0, else exp(x) - 1.
    return tl.where(x > 0, x, expm1(x))


@triton.jit(do_not_specialize=["groups"])
def _forward(features_ptr, out_ptr, total, groups, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """A program writes adjacent elements of the result."""
    # y = ELU(a) s(b), s the sigmoid.
    # features_ptr: [rows, 2, size]; out_ptr: [rows, size]
    element, at, size, inside = _places(total, groups, GROUP, WIDTH)
    a, b = load(features_ptr, at, inside), load(features_ptr, at + size, inside)
    out = _elu(a) * tl.sigmoid(b)
    tl.store(out_ptr + element, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["groups"])
def _backward(grad_ptr, features_ptr, out_ptr, total, groups, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """A program writes the gradients of a and of b for adjacent elements of the result."""
    # da = g s(b) (1 for a > 0, else exp(a)), db = g ELU(a) s(b) s(-b), g the gradient of y.
    # grad_ptr: [rows, size]; features_ptr, out_ptr: [rows, 2, size]
    element, at, size, inside = _places(total, groups, GROUP, WIDTH)
    g = load(grad_ptr, element, inside)
    a, b = load(features_ptr, at, inside), load(features_ptr, at + size, inside)
    tail = tl.exp(-tl.abs(b))
    inverse = 1.0 / (1.0 + tail)
    to_a = g * (tl.where(b < 0, tail, 1.0) * inverse) * tl.exp(tl.where(a > 0, 0.0, a))
    # The slope of sigmoid(b) is computed as sigmoid(b) sigmoid(-b), because 1 - sigmoid(b) would lose digits.
    to_b = g * _elu(a) * (tail * inverse * inverse)
    tl.store(out_ptr + at, to_a.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + size, to_b.to(out_ptr.dtype.element_ty), mask=inside)


def _run(kernel, tensors: tuple[Tensor, ...], dim: int, out: Tensor) -> Tensor:
    """Launch a kernel that reads ``tensors``, of which the features are the last, and return ``out``."""
    if out.numel() == 0:
        return out
    features, total = tensors[-1], tensors[-1].numel() // 2
    size = total // math.prod(features.shape[:dim])
    group = math.gcd(size, 16 // features.element_size())
    width, warps = tile(total, features)
    given = *[one.contiguous() for one in tensors], out, total, size // group
    shape = {"GROUP": group, "WIDTH": width, "num_warps": warps}
    launch(kernel, (cdiv(total, width),), *given, **shape, enable_fp_fusion=True)
    return out


def forward(features: Tensor, dim: int) -> Tensor:
    """Combine the two halves along ``dim``. The result is contiguous, in the dtype of the features."""
    shape = [size // 2 if at == dim else size for at, size in enumerate(features.shape)]
    out = torch.empty(shape, dtype=features.dtype, device=features.device)
    return _run(_forward, (features,), dim, out)


def backward(grad: Tensor, features: Tensor, dim: int) -> Tensor:
    """Return grad times the slopes, contiguous, in the shape and dtype of the features."""
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    return _run(_backward, (grad, features), dim, out)
