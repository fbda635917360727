"""`apgd_step` in Triton: linf is elementwise, with the bits of the reference; l2 uses one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch
from .pgd_step import _clamp, _l2_direction, _l2_moved, _l2_shrink, _linf_moved, _load, layout


@triton.jit(do_not_specialize=["blocks"])
def _linf(
    x_ptr,  # [B, size]
    grad_ptr,  # [B, size]
    nat_ptr,  # [B, size]
    previous_ptr,  # [B, size]
    alpha_ptr,  # [B]
    eps_ptr,  # [B]
    out_ptr,  # [B, size]
    size,
    blocks,
    momentum,
    rest,
    lo,
    hi,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row, element = pid // blocks, pid % blocks * WIDTH + tl.arange(0, WIDTH)
    at, inside = row * size + element, element < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    x, g, nat = _load(x_ptr, at, inside), _load(grad_ptr, at, inside), _load(nat_ptr, at, inside)
    z, past = _linf_moved(x, g, nat, alpha=alpha, eps=eps, lo=lo, hi=hi), _load(previous_ptr, at, inside)
    moved = x + tl.cast(momentum, tl.float32) * (z - x) + tl.cast(rest, tl.float32) * (x - past)
    moved = _clamp(_clamp(moved, nat - eps, nat + eps), lo, hi)
    tl.store(out_ptr + at, moved.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _offset(pointers, at, inside, direction, factors):
    # Return the offset from the natural image, with momentum and before the second projection.
    x_ptr, grad_ptr, nat_ptr, previous_ptr = pointers
    shrink, momentum, rest, lo, hi = factors
    x, nat = _load(x_ptr, at, inside), _load(nat_ptr, at, inside)
    d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - nat
    z = _clamp(nat + d * shrink, lo, hi)
    return (x + momentum * (z - x) + rest * (x - _load(previous_ptr, at, inside))) - nat


@triton.jit(do_not_specialize=["blocks"])
def _l2(
    x_ptr,  # [B, size]
    grad_ptr,  # [B, size]
    nat_ptr,  # [B, size]
    previous_ptr,  # [B, size]
    alpha_ptr,  # [B]
    eps_ptr,  # [B]
    out_ptr,  # [B, size]
    size,
    blocks,
    momentum,
    rest,
    lo,
    hi,
    WIDTH: tl.constexpr,
):
    # `blocks` is always 1 here. The argument exists because `_linf` and this kernel are launched in the same way.
    row = tl.program_id(0).to(tl.int64) // blocks
    lane = tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    momentum, rest = tl.cast(momentum, tl.float32), tl.cast(rest, tl.float32)
    peak, length, usable = _l2_direction(grad_ptr, row, lane, size, WIDTH)
    direction = peak, alpha / length, usable

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - _load(nat_ptr, at, inside)
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
        moved = _clamp(_load(nat_ptr, at, inside) + d * outer, lo, hi)
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
    size, blocks, block = layout(x, norm)
    kernel = _linf if norm == 0 else _l2
    tensors = [one.contiguous() for one in (x, grad, x_nat, previous, alpha, eps)]
    given = *tensors, out, size, blocks, float(momentum), float(1 - momentum), float(lo), float(hi)
    launch(kernel, (x.shape[0] * blocks,), *given, **block, enable_fp_fusion=False)
    return out
