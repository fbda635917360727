"""`pgd_step` in Triton: linf is elementwise, without fused multiply-add; l2 and l1 use one program per sample.

If a sample fits into the registers of a program, it is read once (by the kernels named ``_whole``). A larger sample is
read in every pass: four passes for l2, and about fifty for l1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, cdiv, clamp, grid, is_channels_last, limited, load, next_power_of_2, places, sum_tile, tile
from ._launch import launch

#: The largest tile in which a program can hold a whole sample without spilling registers, by the index of the norm.
WHOLE = {1: 16384, 2: 8192}
#: The largest number of registers that a thread of an l1 kernel may use. By default, the compiler of triton 3.6 limits
#: itself to 48 or 80 registers, so that more programs run on a multiprocessor, and then spills registers to memory.
L1_REGISTERS = 128
#: The bits of the first float32 number that is not finite. The bits of |x| have the same order as |x|, and NaN is last.
INFINITE = tl.constexpr(0x7F800000)
#: The number of bisections that find the shift of l1. The reference uses the same number for float32.
HALVINGS = tl.constexpr(24)


@triton.jit
def _linf_moved(x, g, nat, alpha, eps, lo, hi):
    # A gradient that is NaN or infinite moves x neither up nor down.
    up, down = (g > 0) & (g < float("inf")), (g < 0) & (g > float("-inf"))
    x += alpha * (up.to(tl.float32) - down.to(tl.float32))
    return clamp(clamp(x, nat - eps, nat + eps), lo, hi)


@triton.jit
def _l2_direction(grad_ptr, row, lane, size, WIDTH: tl.constexpr):
    # grad_ptr: [B, size]
    # Return max |g|, the norm of g / max |g|, and whether the gradient has a direction.
    highest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        g = load(grad_ptr, row * size + first + lane, first + lane < size)
        # tl.max would lose a NaN, so infinity replaces NaN.
        highest = tl.maximum(highest, tl.where(g == g, tl.abs(g), float("inf")))
    peak = tl.max(highest, 0)
    usable = (peak > 0) & (peak < float("inf"))
    peak = tl.where(usable, peak, 1.0)

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        g = load(grad_ptr, row * size + first + lane, first + lane < size) / peak
        squares += g * g
    return peak, tl.where(usable, tl.sqrt_rn(tl.sum(squares, 0)), 1.0), usable


@triton.jit
def _l2_shrink(squares, eps):
    radius = tl.sqrt_rn(tl.sum(squares, 0))
    return tl.where(radius > eps, eps / radius, 1.0)


@triton.jit
def _l2_moved(x_ptr, grad_ptr, at, inside, direction):
    # x_ptr, grad_ptr: [B, size]
    peak, step, usable = direction
    x, g = load(x_ptr, at, inside), load(grad_ptr, at, inside)
    return x + tl.where(usable, step * (g / peak), 0.0)


@triton.jit(do_not_specialize=["rows"])
def _linf(
    x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, rows, sizes, lo, hi, LAST: tl.constexpr, WIDTH: tl.constexpr
):
    """A program moves some elements of one sample. The gradient may be in channels_last."""
    # clamp(clamp(x + alpha sign(g), x_nat - eps, x_nat + eps), lo, hi).
    # x_ptr, nat_ptr, out_ptr: [rows, size]; grad_ptr: [rows, channels, plane]; alpha_ptr, eps_ptr: [rows]
    row, at, in_gradient, inside = places(rows, sizes, LAST=LAST, WIDTH=WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    x, g, nat = load(x_ptr, at, inside), load(grad_ptr, in_gradient, inside), load(nat_ptr, at, inside)
    x = _linf_moved(x, g, nat, alpha=alpha, eps=eps, lo=tl.cast(lo, tl.float32), hi=tl.cast(hi, tl.float32))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _l2(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, lo, hi, WIDTH: tl.constexpr):
    """A program moves one sample, in four passes over it."""
    # clamp(x_nat + d min(1, eps / |d|), lo, hi), d = x + alpha g / |g| - x_nat.
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    peak, length, usable = _l2_direction(grad_ptr, row, lane, size, WIDTH)
    direction = peak, alpha / length, usable

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - load(nat_ptr, at, inside)
        squares += d * d
    shrink = _l2_shrink(squares, eps)

    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        nat = load(nat_ptr, at, inside)
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - nat
        x = clamp(nat + d * shrink, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _l2_whole(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, lo, hi, WIDTH: tl.constexpr):
    """A program moves one sample, which it holds in registers. The formula is that of `_l2`."""
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    at, inside = row * size + lane, lane < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    x, g, nat = load(x_ptr, at, inside), load(grad_ptr, at, inside), load(nat_ptr, at, inside)
    # tl.max would lose a NaN, so infinity replaces NaN.
    peak = tl.max(tl.where(g == g, tl.abs(g), float("inf")), 0)
    usable = (peak > 0) & (peak < float("inf"))
    g = g / tl.where(usable, peak, 1.0)
    step = alpha / tl.where(usable, tl.sqrt_rn(tl.sum(g * g, 0)), 1.0)
    d = (x + tl.where(usable, step * g, 0.0)) - nat
    x = clamp(nat + d * _l2_shrink(d * d, eps), tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _candidates(x, g, lo, hi):
    # Return the bits of |g|, or 0 if the box prevents the step.
    return tl.where(((x >= hi) & (g > 0)) | ((x <= lo) & (g < 0)), 0, _bits(g))


@triton.jit
def _narrowed(low, high, count, chosen):
    # Bisect [low, high): at least ``chosen`` candidates are >= low, and fewer are >= high. ``count`` candidates are >=
    # middle. If these are exactly ``chosen`` candidates, the search ends.
    middle = low + (high - low) // 2
    end = tl.where(count == chosen, middle + 1, high)
    return tl.where(count >= chosen, middle, low), tl.where(count >= chosen, end, middle)


@triton.jit
def _length(alpha, count):
    return alpha * tl.div_rn(1.0, tl.maximum(count, 1).to(tl.float32))


@triton.jit
def _l1_moved(x, g, candidates, least, length):
    return x + tl.where(candidates >= least, tl.where(g > 0, length, -length), 0.0)


@triton.jit
def _room(d, nat, lo, hi):
    return tl.maximum(tl.where(d > 0, hi - nat, nat - lo), 0.0)


@triton.jit
def _l1_projected(x, nat, shift, moves, lo, hi):
    d = x - nat
    left = tl.maximum(tl.abs(d) - shift, 0.0)
    x = tl.where(moves, nat + tl.where(d < 0, -left, left), x)
    # If nat is NaN, the result must be NaN. Then d is NaN, but x can be finite.
    return clamp(tl.where(d != d, d, x), lo, hi)


@triton.jit(do_not_specialize=["chosen"])
def _l1_whole(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, chosen, lo, hi, WIDTH: tl.constexpr):
    """A program moves one sample, which it holds in registers."""
    # x_nat + sign(d) clamp(|d| - shift, 0, room), d = x + alpha s / |s|_1 - x_nat, with the least shift in the ball.
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    at, inside = row * size + lane, lane < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    x, g, nat = load(x_ptr, at, inside), load(grad_ptr, at, inside), load(nat_ptr, at, inside)

    peak = tl.max(_bits(g), 0)
    usable = peak < INFINITE
    candidates = tl.where(usable, _candidates(x, g, lo, hi), 0)
    low, high = 0, tl.where(usable, peak, 0) + 1
    while high - low > 1:
        count = tl.sum((candidates >= low + (high - low) // 2).to(tl.int32), 0)
        low, high = _narrowed(low, high, count, chosen)
    least = tl.maximum(low, 1)
    length = _length(alpha, tl.sum((candidates >= least).to(tl.int32), 0))
    x = _l1_moved(x, g, candidates, least, length)

    d = x - nat
    span, room = tl.abs(d), _room(d, nat, lo, hi)
    # The comparison is False for NaN.
    moves = tl.sum(clamp(span, 0.0, room), 0) > eps
    outer = 0.0
    if moves:
        inner, outer = 0.0, tl.max(span, 0)
        for _ in range(HALVINGS):
            middle = (inner + outer) * 0.5
            outside = tl.sum(clamp(span - middle, 0.0, room), 0) > eps
            inner, outer = tl.where(outside, middle, inner), tl.where(outside, outer, middle)
    x = _l1_projected(x, nat, outer, moves=moves, lo=lo, hi=hi)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reaching(x_ptr, grad_ptr, places, box, least, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr: [B, size]
    # Return how many candidates are >= ``least``. ``least`` must be at least 1, so that masked lanes do not count.
    row, lane, size = places
    lo, hi = box
    count = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        count += (_candidates(load(x_ptr, at, inside), load(grad_ptr, at, inside), lo, hi) >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _again(x_ptr, grad_ptr, at, inside, least, length, lo, hi):
    # x_ptr, grad_ptr: [B, size]
    x, g = load(x_ptr, at, inside), load(grad_ptr, at, inside)
    return _l1_moved(x, g, _candidates(x, g, lo, hi), least, length)


@triton.jit
def _l1_spread(pointers, places, step, shift, box, WIDTH: tl.constexpr):
    # Shorten the offset's elements by ``shift``. Return the l1 norm, and the largest |element| before that.
    x_ptr, grad_ptr, nat_ptr = pointers
    row, lane, size = places
    least, length = step
    lo, hi = box
    left, largest = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        nat = load(nat_ptr, at, inside)
        d = _again(x_ptr, grad_ptr, at, inside=inside, least=least, length=length, lo=lo, hi=hi) - nat
        left += clamp(tl.abs(d) - shift, 0.0, _room(d, nat, lo, hi))
        largest = tl.maximum(largest, tl.abs(d))
    return tl.sum(left, 0), tl.max(largest, 0)


@triton.jit(do_not_specialize=["chosen"])
def _l1(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, chosen, lo, hi, WIDTH: tl.constexpr):
    """A program moves one sample, in about fifty passes over it. The formula is that of `_l1_whole`."""
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)

    bits = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, size, WIDTH):
        bits = tl.maximum(bits, _bits(load(grad_ptr, row * size + first + lane, first + lane < size)))
    peak = tl.max(bits, 0)
    usable = peak < INFINITE
    places, low, high = (row, lane, size), 0, tl.where(usable, peak, 0) + 1
    while high - low > 1:
        count = _reaching(x_ptr, grad_ptr, places, (lo, hi), low + (high - low) // 2, WIDTH=WIDTH)
        low, high = _narrowed(low, high, count, chosen)
    least = tl.maximum(low, 1)
    length = _length(alpha, _reaching(x_ptr, grad_ptr, places, (lo, hi), least, WIDTH=WIDTH))
    length = tl.where(usable, length, 0.0)

    pointers, step = (x_ptr, grad_ptr, nat_ptr), (least, length)
    total, largest = _l1_spread(pointers, places, step, 0.0, (lo, hi), WIDTH=WIDTH)
    # The comparison is False for NaN.
    moves = total > eps
    outer = 0.0
    if moves:
        inner, outer = 0.0, largest
        for _ in range(HALVINGS):
            middle = (inner + outer) * 0.5
            total, largest = _l1_spread(pointers, places, step, middle, (lo, hi), WIDTH=WIDTH)
            outside = total > eps
            inner, outer = tl.where(outside, middle, inner), tl.where(outside, outer, middle)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        x = _again(x_ptr, grad_ptr, at, inside=inside, least=least, length=length, lo=lo, hi=hi)
        x = _l1_projected(x, load(nat_ptr, at, inside), outer, moves=moves, lo=lo, hi=hi)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def launch_linf(kernel, images: tuple[Tensor, ...], of_samples: tuple[Tensor, ...], *numbers: float) -> Tensor:
    """Launch an elementwise kernel, and return its result. ``images`` begin with x and the gradient."""
    x, grad, *others = images
    rows, last = x.shape[0], is_channels_last(grad)
    size, channels = x.numel() // rows, x.shape[1] if last else 1
    out, (width, warps) = torch.empty(x.shape, dtype=x.dtype, device=x.device), tile(size, x)
    tensors = x.contiguous(), grad if last else grad.contiguous(), *(one.contiguous() for one in (*others, *of_samples))
    given = *tensors, out, rows, (size, size // channels, channels), *map(float, numbers)
    shape = {"LAST": last, "WIDTH": width, "num_warps": warps}
    launch(kernel, grid(rows, cdiv(size, width)), *given, **shape, enable_fp_fusion=False)
    return out


def whole_warps(width: int) -> int:
    """Return the number of warps, 1 to 16, of a program that holds ``width`` elements, 16 in each thread."""
    return max(1, min(16, width // 512))


def forward(
    x: Tensor, grad: Tensor, x_nat: Tensor, alpha: Tensor, eps: Tensor, norm: int, lo: float, hi: float, density: float
) -> Tensor:
    """Return the new x, contiguous. ``norm`` is 0 for linf, 1 for l2 and 2 for l1."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    if norm == 0:
        return launch_linf(_linf, (x, grad, x_nat), (alpha, eps), lo, hi)
    size = x.numel() // x.shape[0]
    fitting, chosen = max(32, next_power_of_2(size)), max(1, int(density * size + 0.5))
    whole = fitting <= WHOLE[norm]
    width, warps = (fitting, whole_warps(fitting)) if whole else sum_tile(size, 2 * BLOCK)
    block = {"WIDTH": width, "num_warps": warps} | (limited(L1_REGISTERS) if norm == 2 else {})
    kernel, own = (_l2_whole if whole else _l2, ()) if norm == 1 else (_l1_whole if whole else _l1, (chosen,))
    tensors = [one.contiguous() for one in (x, grad, x_nat, alpha, eps)]
    launch(kernel, (x.shape[0],), *tensors, out, size, *own, float(lo), float(hi), **block, enable_fp_fusion=False)
    return out
