"""`pgd_step` in Triton: linf is elementwise, without fused multiply-add; l2 and l1 use one program per sample.

If a sample fits into the registers of a program, it is read once (by the kernels named ``_whole``). A larger sample is
read in every pass: four passes for l2, and about fifty for l1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, cdiv, limited, next_power_of_2, sum_tile, tile
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
def _clamp(x, lo, hi):
    x = tl.maximum(x, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _linf_moved(x, g, nat, alpha, eps, lo, hi):
    # A gradient that is NaN or infinite moves x neither up nor down.
    up, down = (g > 0) & (g < float("inf")), (g < 0) & (g > float("-inf"))
    x += alpha * (up.to(tl.float32) - down.to(tl.float32))
    return _clamp(_clamp(x, nat - eps, nat + eps), lo, hi)


@triton.jit
def _l2_direction(grad_ptr, row, lane, size, WIDTH: tl.constexpr):
    # grad_ptr: [B, size]
    # Return max |g|, the norm of g / max |g|, and whether the gradient has a direction.
    highest = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        g = _load(grad_ptr, row * size + first + lane, first + lane < size)
        # tl.max would lose a NaN, so infinity replaces NaN.
        highest = tl.maximum(highest, tl.where(g == g, tl.abs(g), float("inf")))
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
def _l2_moved(x_ptr, grad_ptr, at, inside, direction):
    # x_ptr, grad_ptr: [B, size]
    peak, step, usable = direction
    x, g = _load(x_ptr, at, inside), _load(grad_ptr, at, inside)
    return x + tl.where(usable, step * (g / peak), 0.0)


@triton.jit(do_not_specialize=["blocks"])
def _linf(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, blocks, lo, hi, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    pid = tl.program_id(0).to(tl.int64)
    row, element = pid // blocks, pid % blocks * WIDTH + tl.arange(0, WIDTH)
    at, inside = row * size + element, element < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    x, g, nat = _load(x_ptr, at, inside), _load(grad_ptr, at, inside), _load(nat_ptr, at, inside)
    x = _linf_moved(x, g, nat, alpha=alpha, eps=eps, lo=tl.cast(lo, tl.float32), hi=tl.cast(hi, tl.float32))
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _l2(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, lo, hi, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    peak, length, usable = _l2_direction(grad_ptr, row, lane, size, WIDTH)
    direction = peak, alpha / length, usable

    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - _load(nat_ptr, at, inside)
        squares += d * d
    shrink = _l2_shrink(squares, eps)

    for first in range(0, size, WIDTH):
        at, inside = row * size + first + lane, first + lane < size
        nat = _load(nat_ptr, at, inside)
        d = _l2_moved(x_ptr, grad_ptr, at, inside, direction) - nat
        x = _clamp(nat + d * shrink, tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _l2_whole(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, lo, hi, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    at, inside = row * size + lane, lane < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    x, g, nat = _load(x_ptr, at, inside), _load(grad_ptr, at, inside), _load(nat_ptr, at, inside)
    # tl.max would lose a NaN, so infinity replaces NaN.
    peak = tl.max(tl.where(g == g, tl.abs(g), float("inf")), 0)
    usable = (peak > 0) & (peak < float("inf"))
    g = g / tl.where(usable, peak, 1.0)
    step = alpha / tl.where(usable, tl.sqrt_rn(tl.sum(g * g, 0)), 1.0)
    d = (x + tl.where(usable, step * g, 0.0)) - nat
    x = _clamp(nat + d * _l2_shrink(d * d, eps), tl.cast(lo, tl.float32), tl.cast(hi, tl.float32))
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
    return _clamp(tl.where(d != d, d, x), lo, hi)


@triton.jit(do_not_specialize=["chosen"])
def _l1_whole(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, chosen, lo, hi, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    at, inside = row * size + lane, lane < size
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)
    x, g, nat = _load(x_ptr, at, inside), _load(grad_ptr, at, inside), _load(nat_ptr, at, inside)

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
    moves = tl.sum(_clamp(span, 0.0, room), 0) > eps
    outer = 0.0
    if moves:
        inner, outer = 0.0, tl.max(span, 0)
        for _ in range(HALVINGS):
            middle = (inner + outer) * 0.5
            outside = tl.sum(_clamp(span - middle, 0.0, room), 0) > eps
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
        count += (_candidates(_load(x_ptr, at, inside), _load(grad_ptr, at, inside), lo, hi) >= least).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _again(x_ptr, grad_ptr, at, inside, least, length, lo, hi):
    # x_ptr, grad_ptr: [B, size]
    x, g = _load(x_ptr, at, inside), _load(grad_ptr, at, inside)
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
        nat = _load(nat_ptr, at, inside)
        d = _again(x_ptr, grad_ptr, at, inside=inside, least=least, length=length, lo=lo, hi=hi) - nat
        left += _clamp(tl.abs(d) - shift, 0.0, _room(d, nat, lo, hi))
        largest = tl.maximum(largest, tl.abs(d))
    return tl.sum(left, 0), tl.max(largest, 0)


@triton.jit(do_not_specialize=["chosen"])
def _l1(x_ptr, grad_ptr, nat_ptr, alpha_ptr, eps_ptr, out_ptr, size, chosen, lo, hi, WIDTH: tl.constexpr):
    # x_ptr, grad_ptr, nat_ptr, out_ptr: [B, size]; alpha_ptr, eps_ptr: [B]
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    alpha, eps = tl.load(alpha_ptr + row).to(tl.float32), tl.load(eps_ptr + row).to(tl.float32)
    lo, hi = tl.cast(lo, tl.float32), tl.cast(hi, tl.float32)

    bits = tl.zeros((WIDTH,), tl.int32)
    for first in range(0, size, WIDTH):
        bits = tl.maximum(bits, _bits(_load(grad_ptr, row * size + first + lane, first + lane < size)))
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
        x = _l1_projected(x, _load(nat_ptr, at, inside), outer, moves=moves, lo=lo, hi=hi)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def layout(x: Tensor, norm: int) -> tuple[int, int, dict]:
    """Return the number of elements and of programs per sample, and the tile. ``norm`` is as in `forward`."""
    size = x.numel() // x.shape[0]
    width, warps = tile(size, x) if norm == 0 else sum_tile(size, 2 * BLOCK)
    return size, cdiv(size, width) if norm == 0 else 1, {"WIDTH": width, "num_warps": warps}


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
    size, blocks, block = layout(x, norm)
    fitting, chosen = max(32, next_power_of_2(size)), max(1, int(density * size + 0.5))
    whole = fitting <= WHOLE.get(norm, 0)
    if whole:
        block = {"WIDTH": fitting, "num_warps": whole_warps(fitting)}
    if norm == 2:
        block |= limited(L1_REGISTERS)
    kernel = (_linf, _l2_whole if whole else _l2, _l1_whole if whole else _l1)[norm]
    own = ((blocks,), (), (chosen,))[norm]
    tensors = [one.contiguous() for one in (x, grad, x_nat, alpha, eps)]
    given = *tensors, out, size, *own, float(lo), float(hi)
    launch(kernel, (x.shape[0] * blocks,), *given, **block, enable_fp_fusion=False)
    return out
