"""`representation_distance` in Triton, layer by layer: a program sums one chunk of one sample; a second one adds the
chunks, in order, and measures. The chunk is fixed, so that a sample has the same bits in any batch. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import BLOCK, CHUNK, on, warps
from .pgd_step import _clamp, _load

#: `purify_fast.ops.representation_distance`'s kind by index, and its limits.
ABS_COSINE, COSINE, ANGULAR, L2 = (tl.constexpr(i) for i in range(4))
LEAST_NORMS = tl.constexpr(1e-30)
LEAST_SQUARE_SINE = tl.constexpr(1e-4)
PI = tl.constexpr(3.141592653589793)
#: Chunks that are added at once.
PARTS = 128


@triton.jit
def _arccos(x):
    # Abramowitz and Stegun 4.4.46, within 2e-8; exactly 0 at 1
    a = tl.abs(x)
    p = -0.0012624911 * a + 0.0066700901
    p = p * a - 0.0170881256
    p = p * a + 0.0308918810
    p = p * a - 0.0501743046
    p = p * a + 0.0889789874
    p = p * a - 0.2145988016
    p = p * a + 1.5707963050
    angle = tl.sqrt_rn(1.0 - a) * p
    return tl.where(x < 0, -angle + PI, angle)


@triton.jit
def _sums(
    student_ptr, teacher_ptr, out_ptr, size, chunks, DIFFERENCE: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr
):
    """u . v, |u|^2 and |v|^2 of a chunk; |u - v|^2 and two zeros if DIFFERENCE."""
    pid = tl.program_id(0).to(tl.int64)
    row, chunk = pid // chunks, pid % chunks
    dot, uu, vv = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, LENGTH, WIDTH):
        element = chunk * LENGTH + first + tl.arange(0, WIDTH)
        u = _load(student_ptr + row * size, element, element < size)
        v = _load(teacher_ptr + row * size, element, element < size)
        if DIFFERENCE:
            dot += (u - v) * (u - v)
        else:
            dot += u * v
            uu += u * u
            vv += v * v
    tl.store(out_ptr + pid * 3, tl.sum(dot, 0))
    tl.store(out_ptr + pid * 3 + 1, tl.sum(uu, 0))
    tl.store(out_ptr + pid * 3 + 2, tl.sum(vv, 0))


@triton.jit
def _angle(dot, uu, vv, KIND: tl.constexpr):
    """(distance, scale, along)."""
    norms = tl.sqrt_rn(uu) * tl.sqrt_rn(vv)
    nothing = norms < LEAST_NORMS
    uu, vv = tl.where(nothing, 1.0, uu), tl.where(nothing, 1.0, vv)
    along = tl.div_rn(dot, uu)
    c = along * tl.sqrt_rn(tl.div_rn(uu, vv))  # in this order exactly 1 at u = v
    c = tl.where(norms < float("inf"), _clamp(c, -1.0, 1.0), float("nan"))
    c = tl.where(nothing, 0.0, c)
    if KIND == ABS_COSINE:
        distance = tl.maximum(1.0 - tl.abs(c), 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.where(c > 0, -1.0, tl.where(c < 0, 1.0, 0.0 * c))  # NaN stays
    elif KIND == COSINE:
        distance = tl.maximum(1.0 - c, 0.0, propagate_nan=tl.PropagateNan.ALL)
        slope = 0.0 * c - 1.0
    else:
        distance = _arccos(c) * 0.3183098861837907  # 1 / pi
        square = tl.maximum(1.0 - c * c, LEAST_SQUARE_SINE, propagate_nan=tl.PropagateNan.ALL)
        slope = tl.div_rn(-1.0, tl.sqrt_rn(square) * PI)
    scale = tl.where(nothing, 0.0, tl.div_rn(slope, tl.where(nothing, 1.0, norms)))
    return distance, scale, tl.where(nothing, 0.0, along)


@triton.jit
def _measure(parts_ptr, out_ptr, slopes_ptr, chunks, layers, layer, KIND: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dot, uu, vv = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, chunks, WIDTH):
        chunk = first + tl.arange(0, WIDTH)
        at, inside = (row * chunks + chunk) * 3, chunk < chunks
        dot += _load(parts_ptr, at, inside)
        uu += _load(parts_ptr, at + 1, inside)
        vv += _load(parts_ptr, at + 2, inside)
    dot, uu, vv = tl.sum(dot, 0), tl.sum(uu, 0), tl.sum(vv, 0)
    if KIND == L2:
        distance = tl.sqrt_rn(dot)
        moved = distance > 0
        scale = tl.where(moved, tl.div_rn(-1.0, tl.where(moved, distance, 1.0)), 0.0 * distance)
        along = 0.0 * uu + 1.0
    else:
        distance, scale, along = _angle(dot, uu, vv, KIND)
    at = row * layers + layer
    tl.store(out_ptr + at, distance)
    tl.store(slopes_ptr + 2 * at, scale)
    tl.store(slopes_ptr + 2 * at + 1, along)


@triton.jit
def _backward(
    grad_ptr, student_ptr, teacher_ptr, slopes_ptr, out_ptr, size, blocks, layers, layer, WIDTH: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    row, element = pid // blocks, pid % blocks * WIDTH + tl.arange(0, WIDTH)
    at, inside, of_row = row * size + element, element < size, row * layers + layer
    weight = tl.load(grad_ptr + of_row).to(tl.float32) * tl.load(slopes_ptr + 2 * of_row)
    along = tl.load(slopes_ptr + 2 * of_row + 1)
    u, v = _load(student_ptr, at, inside), _load(teacher_ptr, at, inside)
    tl.store(out_ptr + at, (weight * (v - along * u)).to(out_ptr.dtype.element_ty), mask=inside)


def _width(size: int) -> int:
    return min(BLOCK, max(32, triton.next_power_of_2(size)))


def forward(student: list[Tensor], teacher: list[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    """Layers [B, ...] -> distance [B, L] and slopes [B, L, 2], float32; ``kind`` by index."""
    batch, layers, device = student[0].shape[0], len(student), student[0].device
    out = torch.empty((batch, layers), dtype=torch.float32, device=device)
    slopes = torch.empty((batch, layers, 2), dtype=torch.float32, device=device)
    if batch == 0:
        return out, slopes
    with on(out):
        for layer, (u, v) in enumerate(zip(student, teacher, strict=True)):
            size = u.numel() // batch
            width, chunks = _width(size), max(1, triton.cdiv(size, CHUNK))
            length = CHUNK if chunks > 1 else max(1, triton.cdiv(size, width)) * width
            parts = torch.empty((batch, chunks, 3), dtype=torch.float32, device=device)
            _sums[(batch * chunks,)](
                u.contiguous(), v.contiguous(), parts, size, chunks,
                DIFFERENCE=kind == L2.value, LENGTH=length, WIDTH=width, num_warps=warps(width),
            )  # fmt: skip
            _measure[(batch,)](parts, out, slopes, chunks, layers, layer, KIND=kind, WIDTH=PARTS, num_warps=1)
    return out, slopes


def backward(grad: Tensor, student: list[Tensor], teacher: list[Tensor], slopes: Tensor) -> list[Tensor]:
    """grad [B, L] times dd/dstudent, each layer in its dtype and shape, contiguous."""
    outs = [torch.empty(u.shape, dtype=u.dtype, device=u.device) for u in student]
    grad, slopes, layers = grad.contiguous(), slopes.contiguous(), len(student)
    with on(slopes):
        for layer, (u, v, out) in enumerate(zip(student, teacher, outs, strict=True)):
            if out.numel() == 0:
                continue
            size = u.numel() // u.shape[0]
            width = _width(size)
            blocks = triton.cdiv(size, width)
            _backward[(u.shape[0] * blocks,)](
                grad, u.contiguous(), v.contiguous(), slopes, out, size, blocks, layers, layer,
                WIDTH=width, num_warps=warps(width),
            )  # fmt: skip
    return outs
