"""`pgd_step` in Triton: linf elementwise and bit-exact (no fused multiply-add); l2 one program per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, on, sum_tile, tile


@triton.jit
def _clamp(x, lo, hi):
    x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _linf_moved(x, g, nat, alpha, eps, lo, hi):
    up, down = (g > 0) & (g < float("inf")), (g < 0) & (g > float("-inf"))  # NaN is neither
    x += alpha * (up.to(tl.float32) - down.to(tl.float32))
    return _clamp(_clamp(x, nat - eps, nat + eps), lo, hi)


@triton.jit
def _l2_direction(grad_ptr, row, lane, size, WIDTH: tl.constexpr):
    # max |g|, |g| / max |g|, and whether there is a direction
    highest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        g = _load(grad_ptr, row * size + first + lane, first + lane < size)
        highest = tl.maximum(highest, tl.where(g == g, tl.abs(g), float("inf")))  # tl.max would drop a NaN
    peak = tl.max(highest, 0)
    usable = (peak > 0) & (peak < float("inf"))
    peak = tl.where(usable, peak, 1.0)

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        g = _load(grad_ptr, row * size + first + lane, first + lane < size) / peak
        squares += g * g
    return peak, tl.where(usable, tl.sqrt_rn(tl.sum(squares, 0)), 1.0), usable


@triton.jit
def _l2_shrink(squares, eps):
    radius = tl.sqrt_rn(tl.sum(squares, 0))
    return tl.where(radius > eps, eps / radius, 1.0)


@triton.jit
def _l2_moved(x_ptr, grad_ptr, at, inside, peak, step, usable):
    x, g = _load(x_ptr, at, inside), _load(grad_ptr, at, inside)
    return x + tl.where(usable, step * (g / peak), 0.0)


@triton.jit
def _linf(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, blocks, lo, hi, WIDTH: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    row, element = pid // blocks, pid % blocks * WIDTH + tl.arange(0, WIDTH)
    at, inside = row * size + element, element < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    x, g, nat = _load(x_ptr, at, inside), _load(grad_ptr, at, inside), _load(nat_ptr, at, inside)
    x = _linf_moved(x, g, nat, alpha, eps, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _l2(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, blocks, lo, hi, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) // blocks  # blocks is 1
    lane = tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    peak, length, usable = _l2_direction(grad_ptr, row, lane, size, WIDTH)
    step = alpha / length

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _l2_moved(x_ptr, grad_ptr, at, inside, peak, step, usable) - _load(nat_ptr, at, inside)
        squares += d * d
    shrink = _l2_shrink(squares, eps)

    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        nat = _load(nat_ptr, at, inside)
        d = _l2_moved(x_ptr, grad_ptr, at, inside, peak, step, usable) - nat
        x = _clamp(nat + d * shrink, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def layout(x: Tensor, norm: int) -> tuple[int, int, dict]:
    """Elements of a sample, programs per sample, elements a program sees at once and its warps; ``norm`` by index."""
    size = x.numel() // x.shape[0]
    width, warps = tile(size, x) if norm == 0 else sum_tile(size, 2 * BLOCK)
    return size, triton.cdiv(size, width) if norm == 0 else 1, {"WIDTH": width, "num_warps": warps}


def forward(
    x: Tensor, grad: Tensor, x_nat: Tensor, alpha: Tensor, eps: Tensor, norm: int, lo: float, hi: float
) -> Tensor:
    """The new x, contiguous; ``norm`` by index."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    size, blocks, block = layout(x, norm)
    kernel = _linf if norm == 0 else _l2
    with on(x):
        kernel[(x.shape[0] * blocks,)](
            x.contiguous(), grad.contiguous(), x_nat.contiguous(), alpha.contiguous(), eps.contiguous(), out,
            size, blocks, float(lo), float(hi), **block, enable_fp_fusion=False,
        )  # fmt: skip
    return out
