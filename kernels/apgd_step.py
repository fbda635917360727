"""`apgd_step` in Triton: linf is elementwise, with the bits of the reference; l2 uses one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, clamp, load, places, sum_tile
from ._launch import launch
from .pgd_step import _l2_direction, _l2_moved, _l2_shrink, _linf_moved, launch_linf


@triton.jit(do_not_specialize=["rows"])
def _linf(
    x_ptr,  # [rows, size]
    grad_ptr,  # [rows, channels, plane], channels last if LAST
    nat_ptr,  # [rows, size]
    previous_ptr,  # [rows, size]
    alpha_ptr,  # [rows]
    eps_ptr,  # [rows]
    out_ptr,  # [rows, size]
    rows,
    sizes,
    momentum,
    rest,
    lo,
    hi,
    LAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program moves some elements of one sample."""
    # z = P(x + alpha sign(g)), x <- P(x + a (z - x) + (1 - a) (x - previous)); P clamps to the ball, then the box.
    row, at, in_gradient, inside = places(rows, sizes, LAST=LAST, WIDTH=WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    x, g, nat = load(x_ptr, at, inside), load(grad_ptr, in_gradient, inside), load(nat_ptr, at, inside)
    z, past = _linf_moved(x, g, nat, alpha=alpha, eps=eps, lo=lo, hi=hi), load(previous_ptr, at, inside)
    moved = x + tl.cast(momentum, tl.float32) * (z - x) + tl.cast(rest, tl.float32) * (x - past)
    moved = clamp(clamp(moved, nat - eps, nat + eps), lo, hi)
    tl.store(out_ptr + at, moved.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _offset(pointers, at, inside, direction, factors):
    # Return the offset from the natural image, with momentum and before the second projection.
    x_ptr, grad_ptr, nat_ptr, previous_ptr = pointers
    shrink, momentum, rest, lo, hi = factors
    x, nat = load(x_ptr, at, inside), load(nat_ptr, at, inside)
    d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - nat
    z = clamp(nat + d * shrink, lo, hi)
    return (x + momentum * (z - x) + rest * (x - load(previous_ptr, at, inside))) - nat


@triton.jit
def _l2(
    x_ptr,  # [B, size]
    grad_ptr,  # [B, size]
    nat_ptr,  # [B, size]
    previous_ptr,  # [B, size]
    alpha_ptr,  # [B]
    eps_ptr,  # [B]
    out_ptr,  # [B, size]
    size,
    momentum,
    rest,
    lo,
    hi,
    WIDTH: tl.constexpr,
):
    """A program moves one sample, in four passes over it."""
    # As in `_linf`, with g / |g|, and P(x) = clamp(x_nat + d min(1, eps / |d|), lo, hi), d = x - x_nat.
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    momentum, rest = tl.cast(momentum, tl.float32), tl.cast(rest, tl.float32)
    peak, length, usable = _l2_direction(grad_ptr, row, lane, size, WIDTH)
    direction = peak, alpha / length, usable

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - load(nat_ptr, at, inside)
        squares += d * d
    pointers, factors = (x_ptr, grad_ptr, nat_ptr, previous_ptr), (_l2_shrink(squares, eps), momentum, rest, lo, hi)

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _offset(pointers, at, inside, direction, factors)
        # Masked lanes can be nonzero if the box does not contain 0.
        squares += tl.where(inside, d * d, 0.0)
    outer = _l2_shrink(squares, eps)

    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _offset(pointers, at, inside, direction, factors)
        moved = clamp(load(nat_ptr, at, inside) + d * outer, lo, hi)
        tl.store(out_ptr + at, moved.to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    previous: Tensor,
    alpha: Tensor,
    eps: Tensor,
    momentum: float,
    norm: int,
    lo: float,
    hi: float,
) -> Tensor:
    """Return the new x, contiguous. ``norm`` is 0 for linf and 1 for l2."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    images, numbers = (x, grad, x_nat, previous), (momentum, 1 - momentum, lo, hi)
    if norm == 0:
        return launch_linf(_linf, images, (alpha, eps), *numbers)
    size = x.numel() // x.shape[0]
    width, warps = sum_tile(size, 2 * BLOCK)
    given = *(one.contiguous() for one in (*images, alpha, eps)), out, size, *map(float, numbers)
    launch(_l2, (x.shape[0],), *given, WIDTH=width, num_warps=warps, enable_fp_fusion=False)
    return out
