"""`representation_distance` in Triton: a program sums one chunk of one layer of one sample.

A launch has up to ``LAYERS`` layers. If each has a single chunk, the program also computes the distance. Otherwise a
second launch adds the chunks in order. The chunk has a fixed size and there are no atomics, so a sample has the same
bits in every batch.

The layers of a launch are passed as tuples of pointers and sizes. Each layer has its own copy of the kernel's code, so
dtypes and shapes may differ.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import CHUNK, cdiv, clamp, dense, load, sum_tile, tile
from ._launch import launch

#: The indices of the kinds in `purify_fast.ops.representation_distance`, and the two limits of the same file.
ABS_COSINE, COSINE, L2 = tl.constexpr(0), tl.constexpr(1), 3
LEAST_NORMS = tl.constexpr(1e-30)
LEAST_SQUARE_SINE = tl.constexpr(1e-4)
PI = tl.constexpr(3.141592653589793)
#: LAYERS is the largest number of layers in a launch. PARTS is the number of chunks that a program adds together.
LAYERS = 16
PARTS = 128


@triton.jit
def _arccos(x):
    # Abramowitz and Stegun 4.4.46, with an error of at most 2e-8. The result is exactly 0 at 1.
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
def _sums(u_ptr, v_ptr, start, end, DIFFERENCE: tl.constexpr, WIDTH: tl.constexpr):
    """Return u . v, |u|^2 and |v|^2 over the elements start .. end - 1, or, if DIFFERENCE, |u - v|^2 and two zeros."""
    # u_ptr, v_ptr: [end]
    dot, uu, vv = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(start, end, WIDTH):
        element = first + tl.arange(0, WIDTH)
        u, v = load(u_ptr, element, element < end), load(v_ptr, element, element < end)
        if DIFFERENCE:
            dot += (u - v) * (u - v)
        else:
            dot += u * v
            uu += u * u
            vv += v * v
    return tl.sum(dot, 0), tl.sum(uu, 0), tl.sum(vv, 0)


@triton.jit
def _angle(dot, uu, vv, kind):
    """Return (distance, scale, along). The gradient of the distance with respect to u is scale * (v - along * u)."""
    norms = tl.sqrt_rn(uu) * tl.sqrt_rn(vv)
    nothing = norms < LEAST_NORMS
    uu, vv = tl.where(nothing, 1.0, uu), tl.where(nothing, 1.0, vv)
    along = tl.div_rn(dot, uu)
    # c is the cosine. In this order of operations, it is exactly 1 at u = v.
    c = along * tl.sqrt_rn(tl.div_rn(uu, vv))
    c = tl.where(norms < float("inf"), clamp(c, -1.0, 1.0), float("nan"))
    c = tl.where(nothing, 0.0, c)
    near = tl.where(kind == ABS_COSINE, tl.abs(c), c)
    square = tl.maximum(1.0 - c * c, LEAST_SQUARE_SINE, propagate_nan=tl.PropagateNan.ALL)
    angular = kind > COSINE
    distance = tl.maximum(1.0 - near, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # The factor is 1 / pi.
    distance = tl.where(angular, _arccos(c) * 0.3183098861837907, distance)
    # A NaN in c gives a NaN slope.
    slope = tl.where((c > 0) | (kind == COSINE), 0.0 * c - 1.0, tl.where(c < 0, 1.0, 0.0 * c))
    slope = tl.where(angular, tl.div_rn(-1.0, tl.sqrt_rn(square) * PI), slope)
    scale = tl.where(nothing, 0.0, tl.div_rn(slope, tl.where(nothing, 1.0, norms)))
    return distance, scale, tl.where(nothing, 0.0, along)


@triton.jit
def _measure(sums, out_ptr, slopes_ptr, at, kind, DIFFERENCE: tl.constexpr):
    # out_ptr: [B, layers], float32; slopes_ptr: [B, layers, 2], float32
    dot, uu, vv = sums
    if DIFFERENCE:
        distance = tl.sqrt_rn(dot)
        moved = distance > 0
        scale = tl.where(moved, tl.div_rn(-1.0, tl.where(moved, distance, 1.0)), 0.0 * distance)
        along = 0.0 * uu + 1.0
    else:
        distance, scale, along = _angle(dot, uu, vv, kind)
    tl.store(out_ptr + at, distance)
    tl.store(slopes_ptr + 2 * at, scale)
    tl.store(slopes_ptr + 2 * at + 1, along)


@triton.jit(do_not_specialize=["chunks", "programs", "layers", "layer", "kind"])
def _forward(
    students,  # a pointer for each layer: [B, sizes[i]]
    teachers,  # a pointer for each layer: [B, sizes[i]]
    sizes,
    chunks,
    parts_ptr,  # [B, programs, 3], float32, or None
    out_ptr,  # [B, layers], float32
    slopes_ptr,  # [B, layers, 2], float32
    programs,
    layers,
    layer,
    kind,
    DIFFERENCE: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program sums one chunk of one sample, in one layer: u . v, |u|^2 and |v|^2, or |u - v|^2.

    A sample has ``programs`` programs. ``layer`` is the index of the launch's first layer among all ``layers`` layers.
    If there is no second launch, the distance is computed here.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, own = pid // programs, pid % programs
    before = 0
    for i in tl.static_range(len(sizes)):
        chunk = own - before
        if (chunk >= 0) & (chunk < chunks[i]):
            size, start = sizes[i], chunk * LENGTH
            u_ptr, v_ptr = students[i] + row * size, teachers[i] + row * size
            dot, uu, vv = _sums(
                u_ptr, v_ptr, start, end=tl.minimum(start + LENGTH, size), DIFFERENCE=DIFFERENCE, WIDTH=WIDTH
            )
            if parts_ptr is None:
                at = row * layers + layer + i
                _measure((dot, uu, vv), out_ptr, slopes_ptr, at, kind, DIFFERENCE=DIFFERENCE)
            else:
                tl.store(parts_ptr + pid * 3, dot)
                tl.store(parts_ptr + pid * 3 + 1, uu)
                tl.store(parts_ptr + pid * 3 + 2, vv)
        before += chunks[i]


@triton.jit(do_not_specialize=["chunks", "programs", "layers", "layer", "kind"])
def _add(
    parts_ptr, out_ptr, slopes_ptr, chunks, programs, layers, layer, kind, DIFFERENCE: tl.constexpr, WIDTH: tl.constexpr
):
    """A program adds the chunks of one sample and layer. ``programs`` is their number per sample in `_forward`."""
    # parts_ptr: [B, programs, 3], float32; out_ptr: [B, layers], float32; slopes_ptr: [B, layers, 2], float32
    pid = tl.program_id(0).to(tl.int64)
    row, own = pid // len(chunks), pid % len(chunks)
    start, count = row * programs, row * 0
    for i in tl.static_range(len(chunks)):
        start += tl.where(i < own, chunks[i], 0)
        count += tl.where(i == own, chunks[i], 0)
    dot, uu, vv = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for first in range(0, count, WIDTH):
        chunk = first + tl.arange(0, WIDTH)
        at, inside = (start + chunk) * 3, chunk < count
        dot += load(parts_ptr, at, inside)
        uu += load(parts_ptr, at + 1, inside)
        vv += load(parts_ptr, at + 2, inside)
    at, sums = row * layers + layer + own, (tl.sum(dot, 0), tl.sum(uu, 0), tl.sum(vv, 0))
    _measure(sums, out_ptr, slopes_ptr, at, kind, DIFFERENCE=DIFFERENCE)


@triton.jit(do_not_specialize=["blocks", "programs", "layers", "layer"])
def _backward(
    grad_ptr, students, teachers, slopes_ptr, outs, sizes, blocks, programs, layers, layer, WIDTH: tl.constexpr
):
    """A program writes some elements of the gradient of one sample, in one layer."""
    # g scale (v - along u), whose numbers scale and along are the slopes that the forward has returned.
    # grad_ptr: [B, layers]; slopes_ptr: [B, layers, 2], float32
    # students, teachers, outs: a pointer for each layer: [B, sizes[i]]
    pid = tl.program_id(0).to(tl.int64)
    row, own = pid // programs, pid % programs
    before = 0
    for i in tl.static_range(len(sizes)):
        block = own - before
        if (block >= 0) & (block < blocks[i]):
            element = block * WIDTH + tl.arange(0, WIDTH)
            at, inside, of_row = row * sizes[i] + element, element < sizes[i], row * layers + layer + i
            weight = tl.load(grad_ptr + of_row).to(tl.float32) * tl.load(slopes_ptr + 2 * of_row)
            along = tl.load(slopes_ptr + 2 * of_row + 1)
            u, v = load(students[i], at, inside), load(teachers[i], at, inside)
            tl.store(outs[i] + at, (weight * (v - along * u)).to(outs[i].dtype.element_ty), mask=inside)
        before += blocks[i]


def forward(student: list[Tensor], teacher: list[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    """Map layers [B, ...] to distances [B, L] and slopes [B, L, 2], float32. ``kind`` is the index of the distance.

    The slopes are (scale, along). The gradient of a distance with respect to u is scale (v - along u).
    """
    batch, layers, device = student[0].shape[0], len(student), student[0].device
    out = torch.empty((batch, layers), dtype=torch.float32, device=device)
    slopes = torch.empty((batch, layers, 2), dtype=torch.float32, device=device)
    if batch == 0:
        return out, slopes
    # A launch has a single tile size, so small layers use the tile of a whole chunk too.
    width, warps = sum_tile(CHUNK)
    for layer in range(0, layers, LAYERS):
        us, vs = (tuple(map(dense, side[layer : layer + LAYERS])) for side in (student, teacher))
        sizes = tuple(u.numel() // batch for u in us)
        chunks = tuple(max(1, cdiv(size, CHUNK)) for size in sizes)
        programs, parts = sum(chunks), None
        if programs > len(chunks):
            parts = torch.empty((batch, programs, 3), dtype=torch.float32, device=device)
        given, place = (us, vs, sizes, chunks, parts, out, slopes), (programs, layers, layer, kind)
        shape: dict[str, Any] = {"LENGTH": CHUNK, "WIDTH": width, "num_warps": warps}
        options: dict[str, Any] = {"DIFFERENCE": kind == L2, "enable_fp_fusion": True}
        launch(_forward, (batch * programs,), *given, *place, **shape, **options)
        if parts is not None:
            added = parts, out, slopes, chunks
            launch(_add, (batch * len(chunks),), *added, *place, WIDTH=PARTS, num_warps=1, **options)
    return out, slopes


def backward(grad: Tensor, student: list[Tensor], teacher: list[Tensor], slopes: Tensor) -> list[Tensor]:
    """Return grad [B, L] times the gradients of the distances, contiguous, in the dtype and shape of each layer."""
    outs = [torch.empty(u.shape, dtype=u.dtype, device=u.device) for u in student]
    batch, layers = slopes.shape[:2]
    if batch == 0:
        return outs
    grad, slopes = grad.contiguous(), slopes.contiguous()
    for layer in range(0, layers, LAYERS):
        us, vs = (tuple(x.contiguous() for x in side[layer : layer + LAYERS]) for side in (student, teacher))
        sizes = tuple(u.numel() // batch for u in us)
        width, warps = tile(max(sizes), *us, *vs)
        blocks = tuple(cdiv(size, width) for size in sizes)
        programs = sum(blocks)
        if programs > 0:
            given = grad, us, vs, slopes, tuple(outs[layer : layer + LAYERS]), sizes, blocks, programs, layers, layer
            launch(_backward, (batch * programs,), *given, WIDTH=width, num_warps=warps, enable_fp_fusion=True)
    return outs
