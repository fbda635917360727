"""`gated_elu` in Triton: a program computes a tile of rows. A row has n numbers a, followed by n numbers b."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, expm1, next_power_of_2, tile
from ._launch import launch


@triton.jit
def _places(rows, size, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the rows and the elements of this program's tile, and the mask of the elements that exist."""
    pid = tl.program_id(0).to(tl.int64)
    row = (pid // blocks * ROWS + tl.arange(0, ROWS))[:, None]
    element = (pid % blocks * WIDTH + tl.arange(0, WIDTH))[None, :]
    return row, element, (row < rows) & (element < size)


@triton.jit
def _elu(x):
    return tl.where(x > 0, x, expm1(x))


@triton.jit(do_not_specialize=["rows", "blocks"])
def _forward(features_ptr, out_ptr, rows, size, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # features_ptr: [rows, 2, size]; out_ptr: [rows, size]
    row, element, inside = _places(rows, size, blocks, ROWS, WIDTH)
    at = row * 2 * size + element
    a = tl.load(features_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(features_ptr + at + size, mask=inside, other=0.0).to(tl.float32)
    out = _elu(a) * tl.sigmoid(b)
    tl.store(out_ptr + row * size + element, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _backward(grad_ptr, features_ptr, out_ptr, rows, size, blocks, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # grad_ptr: [rows, size]; features_ptr, out_ptr: [rows, 2, size]
    row, element, inside = _places(rows, size, blocks, ROWS, WIDTH)
    at = row * 2 * size + element
    g = tl.load(grad_ptr + row * size + element, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(features_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(features_ptr + at + size, mask=inside, other=0.0).to(tl.float32)
    tail = tl.exp(-tl.abs(b))
    inverse = 1.0 / (1.0 + tail)
    to_a = g * (tl.where(b < 0, tail, 1.0) * inverse) * tl.exp(tl.where(a > 0, 0.0, a))
    # The slope of sigmoid(b) is computed as sigmoid(b) sigmoid(-b), because 1 - sigmoid(b) would lose digits.
    to_b = g * _elu(a) * (tail * inverse * inverse)
    tl.store(out_ptr + at, to_a.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + size, to_b.to(out_ptr.dtype.element_ty), mask=inside)


def _layout(features: Tensor, dim: int) -> tuple[tuple[int, int, int], dict]:
    """Return (rows, elements in half a row, programs per row), and the tile of a program as keyword arguments.

    The tensor must not be empty.
    """
    rows = math.prod(features.shape[:dim])
    size = features.numel() // rows // 2
    block, warps = tile(rows * size, features)
    width = min(block, next_power_of_2(size))
    return (rows, size, cdiv(size, width)), {"ROWS": block // width, "WIDTH": width, "num_warps": warps}


def forward(features: Tensor, dim: int) -> Tensor:
    """Combine the two halves along ``dim``. The result is contiguous, in the dtype of the features."""
    shape = list(features.shape)
    shape[dim] //= 2
    out = torch.empty(shape, dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    sizes, tile = _layout(features, dim)
    programs = (cdiv(sizes[0], tile["ROWS"]) * sizes[2],)
    launch(_forward, programs, features.contiguous(), out, *sizes, **tile, enable_fp_fusion=True)
    return out


def backward(grad: Tensor, features: Tensor, dim: int) -> Tensor:
    """Return grad times the slopes, contiguous, in the shape and dtype of the features."""
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    sizes, tile = _layout(features, dim)
    programs = (cdiv(sizes[0], tile["ROWS"]) * sizes[2],)
    launch(_backward, programs, grad.contiguous(), features.contiguous(), out, *sizes, **tile, enable_fp_fusion=True)
    return out
