"""`contextual_attention` in Triton: a program computes the rows of a few adjacent queries, which share neighbors.

The forward has three kernels: the sums over the nine offsets; both passes of "fuse", and the softmax; and the sums for
the four pixels of a cell (`purify_fast.ops.contextual_attention` has the formulas). The backward has three kernels in
the reverse order. The first includes the softmax, and the second the gradient of the norms, summed over a few queries.
There are no atomics.

Query and key are always shifted together. So a sum over the nine offsets is a sum over three lines of the grid: the
line of the query, the line before and the line after. A thread has ``VECTOR`` adjacent keys: four if the width of the
grid is a multiple of four, and one otherwise.

The input of "fuse" is stored with wings: ``width`` numbers of a row are stored again before the row, and ``width``
numbers after it. With the wings, the successor of key i in column-major order is always at i + width, and its
predecessor at i - width, even if they are in another column.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv, grid, next_power_of_2, program
from ._launch import launch
from ._windows import keys, load, moved_in, moved_out, next_pair, previous_pair, store_winged, window

#: The adjacent queries of a program, which read many of the same rows, if they divide the width of the grid.
TOGETHER = 4
#: The queries over which a program sums the gradients of the norms. Fixed, so that the batch does not change the sum.
QUERIES = 8


def warps(groups: int) -> int:
    """Return the number of warps of a program with one group of keys per thread."""
    return max(1, min(16, groups // 32))


@triton.jit
def _next(i, size, width):
    """Return the successor of key i in column-major order. Every key except the last has a successor."""
    return tl.where(i < size - width, i + width, i + width - size + 1)


@triton.jit
def _previous(i, size, width):
    """Return the predecessor of key i in column-major order. Every key except the first has a predecessor."""
    return tl.where(i < width, i - width + size - 1, i - width)


@triton.jit
def _fused_rows(matrix, n, groups, beside, exist, VECTOR: tl.constexpr):
    """Return row n of x, fused in row-major order, for the groups at ``at``. ``pointer`` is row n.

    ``before`` is the position of the number before a group, which exists where ``starts`` is True. ``after`` is the
    position of the number after a group, which exists where ``ends`` is True.
    """
    pointer, stride, size = matrix
    at, inside = groups
    before, after = beside
    starts, ends = exist
    lower, upper = inside & (n > 0), inside & (n < size - 1)
    total = load(pointer, at, inside, VECTOR)
    first = tl.load(pointer - stride + before, mask=lower & starts, other=0.0)
    total += moved_in(load(pointer - stride, at, lower, VECTOR), first, VECTOR)
    last = tl.load(pointer + stride + after, mask=upper & ends, other=0.0)
    return total + moved_out(load(pointer + stride, at, upper, VECTOR), last, VECTOR)


@triton.jit
def _fused(pointer, n, at, inside, size, width, VECTOR: tl.constexpr):
    """Return row n of x, fused in row-major and then in column-major order. ``pointer`` is number 0 of row 0."""
    stride = size + 2 * width
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    row = pointer + n.to(tl.int64) * stride, stride, size
    exist = at > 0, at + VECTOR < size
    total = _fused_rows(row, n, (at, inside), (at - 1, at + VECTOR), exist, VECTOR=VECTOR)
    m = _next(n, size, width)
    row = pointer + m.to(tl.int64) * stride, stride, size
    beside = tl.where(at == size - width, 0, at + width - 1), at + width + VECTOR
    # The last key has no successor, so `_next` gives no position for it.
    exist = at >= 0, (at + VECTOR < size) & (_next(at + VECTOR - 1, size, width) < size - 1)
    following = _fused_rows(row, m, (at + width, inside & (n < size - 1)), beside, exist, VECTOR=VECTOR)
    m = _previous(n, size, width)
    row = pointer + m.to(tl.int64) * stride, stride, size
    beside = at - width - 1, tl.where(at + VECTOR == width, size - 1, at - width + VECTOR)
    # Likewise, the first key has no predecessor.
    exist = (at > 0) & (_previous(at, size, width) > 0), at >= 0
    preceding = _fused_rows(row, m, (at - width, inside & (n > 0)), beside, exist, VECTOR=VECTOR)
    return total + tl.where(i < size - 1, following, 0.0) + tl.where(i > 0, preceding, 0.0)


@triton.jit
def _column(pointer, stride, n, i, inside, size, width):
    """Return x[n, i] fused in column-major order, or 0 if not ``inside``. ``i`` has single keys or groups of keys.

    If ``inside`` is a mask of groups, whole groups are loaded. The first key has no predecessor and the last key no
    successor, so the numbers that were loaded in place of these two are set to 0.
    """
    total = tl.load(pointer + n.to(tl.int64) * stride + i, mask=inside, other=0.0)
    following = pointer + _next(n, size, width).to(tl.int64) * stride + width
    total += tl.where(i < size - 1, tl.load(following + i, mask=inside & (n < size - 1), other=0.0), 0.0)
    preceding = pointer + _previous(n, size, width).to(tl.int64) * stride - width
    return total + tl.where(i > 0, tl.load(preceding + i, mask=inside & (n > 0), other=0.0), 0.0)


@triton.jit(do_not_specialize=["batch", "height"])
def _patches(
    x_ptr,  # [batch, size, size]
    inverse_ptr,  # [batch, size]
    out_ptr,  # [batch, size, size + 2 * width] if SCALED, else [batch, size, size]
    batch,
    size,
    height,
    width,
    SCALED: tl.constexpr,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program writes the rows of a few queries: sums over the nine offsets."""
    # R[q, p] = sum_o G[q + o, p + o], times 1 / |K_p| if SCALED.
    row, block = program(batch)
    sample, first = row.to(tl.int64), block * TOGETHER
    at, inside, own, column = keys(size, width, VECTOR=VECTOR, GROUPS=GROUPS)
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    y = first // width
    if SCALED:
        inverse = load(inverse_ptr + sample * size, at, inside, VECTOR)
    for query in range(TOGETHER):
        n = first + query
        pointer, sizes = x_ptr + (sample * size + n) * size, (size, height, width)
        total = window(pointer, (at, inside, own, column), (y, n - y * width), sizes, VECTOR)
        if SCALED:
            winged = out_ptr + (sample * size + n) * (size + 2 * width) + width
            store_winged(winged, at, total * inverse, inside=inside, size=size, width=width, VECTOR=VECTOR)
        else:
            tl.store(out_ptr + (sample * size + n) * size + i, total, mask=inside[:, None])


@triton.jit(do_not_specialize=["batch"])
def _attend(
    x_ptr,  # [batch, size, size + 2 * width]
    keep_ptr,  # [batch, size]
    out_ptr,  # [batch, size, size]
    batch,
    size,
    width,
    scale,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program writes the rows of a few queries: both passes of "fuse", and the softmax over the keys."""
    # A[q, p] = v_p softmax_p(scale v_p S[q, p]).
    row, block = program(batch)
    sample, first = row.to(tl.int64), block * TOGETHER
    at = tl.arange(0, GROUPS) * VECTOR
    inside = at < size
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    keep, scale = load(keep_ptr + sample * size, at, inside, VECTOR), tl.cast(scale, tl.float32)
    for query in range(TOGETHER):
        n = first + query
        pointer = x_ptr + sample * size * (size + 2 * width) + width
        total = _fused(pointer, n, at, inside=inside, size=size, width=width, VECTOR=VECTOR)
        logits = tl.where(inside[:, None], scale * keep * total, float("-inf"))
        # e is 0 outside. A NaN anywhere in the row makes the whole row NaN.
        e = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        share = 1.0 / tl.sum(tl.sum(e, 1), 0)
        tl.store(out_ptr + (sample * size + n) * size + i, keep * (e * share), mask=inside[:, None])


@triton.jit
def _both_ways(pointer, stride, at, inside, x, column, width, VECTOR: tl.constexpr):
    """Return m[n, i] + m[n - 1, i - 1] and m[n, i] + m[n + 1, i + 1], within a line. ``pointer`` is row n of m."""
    here = load(pointer, at, inside, VECTOR)
    left = previous_pair(pointer, stride, at, inside=inside & (x > 0), has_begun=column > 0, VECTOR=VECTOR)
    right = next_pair(
        pointer, stride, at, inside=inside & (x < width - 1), goes_on=column + VECTOR < width, VECTOR=VECTOR
    )
    return here + left, here + right


@triton.jit(do_not_specialize=["batch", "height"])
def _spread(
    x_ptr, out_ptr, batch, size, height, width, TOGETHER: tl.constexpr, VECTOR: tl.constexpr, GROUPS: tl.constexpr
):
    """A program writes the rows of a few queries in the four maps, one for each pixel of a cell."""
    # U_ab[q, p] = 1/4 sum of A[q + o, p + o] over o in {0, a'} x {0, b'}.
    # x_ptr: [batch, size, size]; out_ptr: [batch, 4, size, size]
    row, block = program(batch)
    sample, first = row.to(tl.int64), block * TOGETHER
    at, inside, own, column = keys(size, width, VECTOR=VECTOR, GROUPS=GROUPS)
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    y = first // width
    far, map_size = width * tl.cast(size, tl.int64) + width, tl.cast(size, tl.int64) * size
    above, below = inside & (y > 0) & (own > 0), inside & (y < height - 1) & (own < height - 1)
    for query in range(TOGETHER):
        n = first + query
        pointer, x = x_ptr + (sample * size + n) * size, n - y * width
        left, right = _both_ways(pointer, size, at, inside=inside, x=x, column=column, width=width, VECTOR=VECTOR)
        left, right = 0.25 * left, 0.25 * right
        to = out_ptr + (sample * 4 * size + n) * size + i
        over = _both_ways(pointer - far, size, at, inside=above, x=x, column=column, width=width, VECTOR=VECTOR)
        tl.store(to, (left + 0.25 * over[0]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(to + map_size, (right + 0.25 * over[1]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
        under = _both_ways(pointer + far, size, at, inside=below, x=x, column=column, width=width, VECTOR=VECTOR)
        tl.store(to + 2 * map_size, (left + 0.25 * under[0]).to(out_ptr.dtype.element_ty), mask=inside[:, None])
        tl.store(to + 3 * map_size, (right + 0.25 * under[1]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _half_line(pointer, stride, at, inside, places, RIGHT: tl.constexpr, VECTOR: tl.constexpr):
    """Return m[n, i] plus m[n + 1, i + 1] if ``RIGHT``, or plus m[n - 1, i - 1] if not, within a line of the grid."""
    x, column, width = places
    total = load(pointer, at, inside, VECTOR)
    if RIGHT:
        total += next_pair(
            pointer, stride, at, inside=inside & (x < width - 1), goes_on=column + VECTOR < width, VECTOR=VECTOR
        )
    else:
        total += previous_pair(pointer, stride, at, inside=inside & (x > 0), has_begun=column > 0, VECTOR=VECTOR)
    return total


@triton.jit(do_not_specialize=["batch", "height"])
def _gather(
    grad_ptr,  # [batch, 4, size, size]
    weights_ptr,  # [batch, size, size]
    out_ptr,  # [batch, size, size + 2 * width]
    batch,
    size,
    height,
    width,
    scale,
    TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program writes the rows of a few queries: the gradient of `_spread`, and through the softmax."""
    # dS = scale A (dA - sum_p A dA), dA[q, p] = 1/4 sum of dU_ab[q - o, p - o].
    row, block = program(batch)
    sample, first = row.to(tl.int64), block * TOGETHER
    at, inside, own, column = keys(size, width, VECTOR=VECTOR, GROUPS=GROUPS)
    y = first // width
    far, map_size = width * tl.cast(size, tl.int64) + width, tl.cast(size, tl.int64) * size
    above, below = inside & (y > 0) & (own > 0), inside & (y < height - 1) & (own < height - 1)
    for query in range(TOGETHER):
        n = first + query
        x = n - y * width
        total = tl.zeros((GROUPS, VECTOR), tl.float32)
        # This is a loop, because the numbers of all four maps together would need too many registers.
        for down in range(2):
            there = tl.where(down == 0, below, above)
            for right in tl.static_range(2):
                pointer = grad_ptr + (sample * 4 * size + n) * size + (2 * down + right) * map_size
                beside = pointer + (1 - 2 * down) * far
                total += _half_line(pointer, size, at, inside, (x, column, width), RIGHT=right == 0, VECTOR=VECTOR)
                total += _half_line(beside, size, at, there, (x, column, width), RIGHT=right == 0, VECTOR=VECTOR)
        weights = load(weights_ptr + (sample * size + n) * size, at, inside, VECTOR)
        total *= 0.25
        slope = tl.cast(scale, tl.float32) * weights * (total - tl.sum(tl.sum(weights * total, 1), 0))
        winged = out_ptr + (sample * size + n) * (size + 2 * width) + width
        store_winged(winged, at, slope, inside=inside, size=size, width=width, VECTOR=VECTOR)


@triton.jit(do_not_specialize=["batch", "height", "blocks"])
def _scaled(
    x_ptr,  # [batch, size, size + 2 * width]
    correlation_ptr,  # [batch, size, size]
    inverse_ptr,  # [batch, size]
    parts_ptr,  # [batch, blocks, size]
    out_ptr,  # [batch, size, size]
    batch,
    size,
    height,
    width,
    blocks,
    QUERIES: tl.constexpr,
    VECTOR: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A program writes the rows of a few queries: the gradient of "fuse" and of the division by the norms."""
    # dR = dX / |K_p|; the part of a program is the sum of dX R over its queries, from which d|K_p| follows.
    row, block = program(batch)
    sample, first = row.to(tl.int64), block * QUERIES
    at, inside, own, column = keys(size, width, VECTOR=VECTOR, GROUPS=GROUPS)
    i = at[:, None] + tl.arange(0, VECTOR)[None, :]
    inverse = load(inverse_ptr + sample * size, at, inside, VECTOR)
    part = tl.zeros((GROUPS, VECTOR), tl.float32)
    stride = size + 2 * width
    fused = x_ptr + sample * size * stride + width
    for query in range(tl.minimum(QUERIES, size - first)):
        n = first + query
        total = _column(fused, stride, n, i=i, inside=inside[:, None], size=size, width=width)
        lower, upper = inside & (n > 0), inside & (n < size - 1)
        x = _column(fused, stride, n - 1, i=i, inside=lower[:, None], size=size, width=width)
        one = _column(fused, stride, n - 1, i=at - 1, inside=lower & (at > 0), size=size, width=width)
        total += moved_in(x, one, VECTOR)
        x = _column(fused, stride, n + 1, i=i, inside=upper[:, None], size=size, width=width)
        last = at + VECTOR
        one = _column(fused, stride, n + 1, i=last, inside=upper & (last < size), size=size, width=width)
        total += moved_out(x, one, VECTOR)
        y = n // width
        pointer, sizes = correlation_ptr + (sample * size + n) * size, (size, height, width)
        part += total * window(pointer, (at, inside, own, column), (y, n - y * width), sizes, VECTOR)
        tl.store(out_ptr + (sample * size + n) * size + i, total * inverse, mask=inside[:, None])
    tl.store(parts_ptr + (sample * blocks + block) * size + i, part, mask=inside[:, None])


def _layout(size: int, height: int, width: int) -> dict[str, Any]:
    """Return the number of keys per thread, the number of groups of keys, and the options of a launch.

    If the grid has a single line, a group has one key, because the wings are too short for groups of four keys.
    """
    vector = 4 if width % 4 == 0 and height > 1 else 1
    groups = next_power_of_2(cdiv(size, vector))
    return {"VECTOR": vector, "GROUPS": groups, "num_warps": warps(groups), "enable_fp_fusion": True}


def _together(width: int) -> int:
    """Return the number of queries of a program. All are in the same line of the grid."""
    return TOGETHER if width % TOGETHER == 0 else 1


def forward(
    correlation: Tensor, inverse: Tensor, keep: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (U [B, 4, L, L] in the dtype of keep, A [B, L, L] float32) like the op."""
    batch, size = keep.shape
    out = torch.empty((batch, 4, size, size), dtype=keep.dtype, device=keep.device)
    weights = torch.empty((batch, size, size), dtype=torch.float32, device=keep.device)
    if batch == 0:
        return out, weights
    together = _together(width)
    row, programs = _layout(size, height, width) | {"TOGETHER": together}, grid(batch, size // together)
    scores = torch.empty((batch, size, size + 2 * width), dtype=torch.float32, device=keep.device)
    sizes = (batch, size, height, width)
    launch(_patches, programs, correlation.contiguous(), inverse.contiguous(), scores, *sizes, SCALED=True, **row)
    launch(_attend, programs, scores, keep.contiguous(), weights, batch, size, width, float(scale), **row)
    launch(_spread, programs, weights, out, *sizes, **row)
    return out, weights


def backward(
    grad: Tensor, correlation: Tensor, inverse: Tensor, weights: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the correlation [B, L, L] and of the inverse norms [B, L], float32."""
    batch, size = inverse.shape
    out = torch.empty((batch, size, size), dtype=torch.float32, device=grad.device)
    if batch == 0:
        return out, torch.empty((batch, size), dtype=torch.float32, device=grad.device)
    blocks = cdiv(size, QUERIES)
    parts = torch.empty((batch, blocks, size), dtype=torch.float32, device=grad.device)
    row, together = _layout(size, height, width), _together(width)
    programs, sizes = grid(batch, size // together), (batch, size, height, width)
    first = torch.empty((batch, size, size + 2 * width), dtype=torch.float32, device=out.device)
    second = torch.empty_like(out)
    inverse = inverse.contiguous()
    grad, weights, correlation = grad.contiguous(), weights.contiguous(), correlation.contiguous()
    launch(_gather, programs, grad, weights, first, *sizes, float(scale), TOGETHER=together, **row)
    several = grid(batch, blocks)
    launch(_scaled, several, first, correlation, inverse, parts, second, *sizes, blocks, QUERIES=QUERIES, **row)
    launch(_patches, programs, second, inverse, out, *sizes, SCALED=False, TOGETHER=together, **row)
    return out, parts.sum(1)
