"""`hyperplane_projection` in Triton: one program per row. The program reads the row in every pass.

For linf and l2, Newton's method determines the number of passes, which is rarely above ten. l1 needs about thirty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, dense, sum_tile
from ._launch import launch


@triton.jit
def _normal(w_ptr, at, inside):
    # w_ptr: [B, size]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # The comparison is False for NaN.
    return tl.where(tl.abs(w) < float("inf"), w, 0.0)


@triton.jit
def _way(x_ptr, w_ptr, at, inside, scale, side, lo, hi):
    # x_ptr, w_ptr: [B, size]
    # Return, for each coordinate: its slope |w|, its distance to the border of the box in the direction of the move,
    # and a number whose sign is this direction. w is scaled.
    x, ahead = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), _normal(w_ptr, at, inside) * scale * side
    free = tl.where(ahead < 0, x - lo, hi - x)
    return tl.abs(ahead), tl.where((ahead != 0) & (free > 0), free, 0.0), ahead


@triton.jit
def _begun(x_ptr, w_ptr, b_ptr, row, lane, size, WIDTH: tl.constexpr):
    # x_ptr, w_ptr: [B, size]; b_ptr: [B]
    # The normal w is scaled by the power of two that brings the largest |w| into [1, 2). Return the largest |w| after
    # scaling, this power of two, the scaled |b - <w, x>|, and the sign of b - <w, x> (1 or -1).
    highest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        highest = tl.maximum(highest, tl.abs(_normal(w_ptr, row * size + first + lane, first + lane < size)))
    peak = tl.max(highest, 0)
    exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    product = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        product += _normal(w_ptr, at, inside) * scale * x
    gap = tl.load(b_ptr + row).to(tl.float32) * scale - tl.sum(product, 0)
    return peak * scale, scale, tl.where(gap == gap, tl.abs(gap), 0.0), tl.where(gap < 0, -1.0, 1.0)


@triton.jit
def _newton(x_ptr, w_ptr, b_ptr, out_ptr, size, lo, hi, ALIKE: tl.constexpr, WIDTH: tl.constexpr):
    """A program moves one row to its hyperplane, in linf or l2."""
    # d = sign(g w) min(t, room), or min(t |w|, room) for l2; Newton's method finds t with sum |w d| = |g|.
    # x_ptr, w_ptr, out_ptr: [B, size]; b_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    _largest, scale, gap, side = _begun(x_ptr, w_ptr, b_ptr, row=row, lane=lane, size=size, WIDTH=WIDTH)
    # A coordinate moves by t (linf) or by t times its slope (l2), and stops at the border of the box. Its progress to
    # the plane is slope * move. `filled` is the progress of the stopped coordinates. `rate` is the progress of the
    # moving coordinates per unit of t. Both give the next t. t grows until no further coordinate stops. t becomes
    # infinite if all coordinates stop before the plane.
    reached, ahead = -1.0, 0.0
    while ahead > reached:
        reached = ahead
        filled, rate = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
        for first in range(0, size, WIDTH):
            at, inside = row * size + first + lane, first + lane < size
            slope, room, way = _way(x_ptr, w_ptr, at, inside=inside, scale=scale, side=side, lo=lo, hi=hi)
            unit = 1.0 if ALIKE else slope
            short = reached * unit < room
            filled += tl.where(short, 0.0, slope * room)
            rate += tl.where(short, slope * unit, 0.0)
        ahead = tl.div_rn(gap - tl.sum(filled, 0), tl.sum(rate, 0))
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        slope, room, way = _way(x_ptr, w_ptr, at, inside=inside, scale=scale, side=side, lo=lo, hi=hi)
        wish = reached * (1.0 if ALIKE else slope)
        move = tl.where(wish < room, wish, room)
        tl.store(out_ptr + at, tl.where(way < 0, -move, move).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gains(x_ptr, w_ptr, row, lane, size, scale, side, lo, hi, least, WIDTH: tl.constexpr):
    # x_ptr, w_ptr: [B, size]
    # Return the progress to the plane by coordinates with a slope above ``least``, and by those of that slope.
    above, edge = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        slope, room, _ = _way(x_ptr, w_ptr, at, inside=inside, scale=scale, side=side, lo=lo, hi=hi)
        above += tl.where(slope > least, slope * room, 0.0)
        edge += tl.where(slope == least, slope * room, 0.0)
    return tl.sum(above, 0), tl.sum(edge, 0)


@triton.jit
def _threshold(x_ptr, w_ptr, b_ptr, out_ptr, size, lo, hi, WIDTH: tl.constexpr):
    """A program moves one row to its hyperplane, in l1."""
    # d = sign(g w) room where |w| > t, and a fraction of it where |w| = t; bisections of t's bits find t.
    # x_ptr, w_ptr, out_ptr: [B, size]; b_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    peak, scale, gap, side = _begun(x_ptr, w_ptr, b_ptr, row=row, lane=lane, size=size, WIDTH=WIDTH)
    # ``low`` and ``high`` are the bits of two slopes. If all coordinates with slopes above high move, the plane is not
    # reached. If all coordinates with slopes above low move, the plane is reached, or low is -1.
    low, high = -1, peak.to(tl.int32, bitcast=True)
    while high - low > 1:
        middle = low + (high - low) // 2
        above, _ = _gains(
            x_ptr,
            w_ptr,
            row,
            lane=lane,
            size=size,
            scale=scale,
            side=side,
            lo=lo,
            hi=hi,
            least=middle.to(tl.float32, bitcast=True),
            WIDTH=WIDTH,
        )
        low, high = tl.where(above >= gap, middle, low), tl.where(above >= gap, high, middle)
    least = high.to(tl.float32, bitcast=True)
    above, edge = _gains(
        x_ptr, w_ptr, row, lane=lane, size=size, scale=scale, side=side, lo=lo, hi=hi, least=least, WIDTH=WIDTH
    )
    share = tl.where(edge > 0, tl.div_rn(gap - above, edge), 0.0)
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        slope, room, way = _way(x_ptr, w_ptr, at, inside=inside, scale=scale, side=side, lo=lo, hi=hi)
        move = room * tl.where(slope > least, 1.0, tl.where(slope == least, share, 0.0))
        tl.store(out_ptr + at, tl.where(way < 0, -move, move).to(out_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, w: Tensor, b: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    """Return the moves, contiguous. ``norm`` is 0 for linf, 1 for l2 and 2 for l1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows, size = x.shape[0], x.numel() // x.shape[0]
    width, warps = sum_tile(size, 2 * BLOCK)
    kernel, own = (_threshold, {}) if norm == 2 else (_newton, {"ALIKE": norm == 0})
    given = dense(x), dense(w), b.contiguous(), out, size, float(lo), float(hi)
    launch(kernel, (rows,), *given, **own, WIDTH=width, num_warps=warps, enable_fp_fusion=False)
    return out
