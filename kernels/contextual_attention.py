"""`contextual_attention` in Triton: a program makes the row of one query, from rows moved by as many keys as queries.

Forward: patch sums; both fuses and the softmax; the sums for the four pixels of a cell. Backward: those sums and the
softmax; both fuses, and the gradient of the norms over a few queries; patch sums. Everything between stays in the L2
cache of a large GPU; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import on

#: Queries whose part of the norms' gradient one program adds; fixed, so that the result is independent of the batch.
QUERIES = 16
#: Registers a thread of `_scaled` may take: three windows of nine, four keys each, and two sums. Without this limit the
#: compiler of triton 3.6 takes 231.
SCALED_REGISTERS = 224


def warps(block: int) -> int:
    """Four keys per thread: a row is a sum of up to eighteen, each with a mask of its own, all in registers."""
    return max(1, min(16, block // 128))


@triton.jit
def _query(size):
    """This program's sample, its query, and where the query's row starts in [B, size, size]. Divides 32-bit numbers."""
    pid = tl.program_id(0)
    return (pid // size).to(tl.int64), pid % size, pid.to(tl.int64) * size


@triton.jit
def _load(x_ptr, sample, n, i, inside, size):
    """x[sample, n, i] of [B, size, size], float32, 0 where not inside."""
    return tl.load(x_ptr + (sample * size + n) * size + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _window(
    x_ptr, sample, n, i, size, height, width,
    TOP: tl.constexpr, BOTTOM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Sum over the moves o of x[n + o, i + o], wherever both are on the grid."""
    y, column, own = n // width, n % width, i % width
    total = tl.zeros(i.shape, tl.float32)
    for down in tl.static_range(TOP, BOTTOM + 1):
        for right in tl.static_range(LEFT, RIGHT + 1):
            shift = down * width + right
            query = (y + down >= 0) & (y + down < height) & (column + right >= 0) & (column + right < width)
            key = (i < size) & (i + shift >= 0) & (i + shift < size) & (own + right >= 0) & (own + right < width)
            total += _load(x_ptr=x_ptr, sample=sample, n=n + shift, i=i + shift, inside=query & key, size=size)
    return total


@triton.jit
def _next(i, size, width):
    """The successor in column-major order, of all but the last."""
    return tl.where(i < size - width, i + width, i + width - size + 1)


@triton.jit
def _previous(i, size, width):
    """The predecessor, of all but the first."""
    return tl.where(i < width, i - width + size - 1, i - width)


@triton.jit
def _fused_rows(x_ptr, sample, n, i, inside, size):
    """x fused in row-major order, at [n, i] where inside."""
    total = _load(x_ptr, sample, n, i=i, inside=inside, size=size)
    total += _load(x_ptr=x_ptr, sample=sample, n=n - 1, i=i - 1, inside=inside & (n > 0) & (i > 0), size=size)
    return total + _load(
        x_ptr=x_ptr, sample=sample, n=n + 1, i=i + 1, inside=inside & (n < size - 1) & (i < size - 1), size=size
    )


@triton.jit
def _fused_columns(x_ptr, sample, n, i, inside, size, width):
    """x fused in column-major order, at [n, i] where inside."""
    total = _load(x_ptr, sample, n, i=i, inside=inside, size=size)
    after = inside & (n < size - 1) & (i < size - 1)
    total += _load(
        x_ptr=x_ptr, sample=sample, n=_next(n, size, width), i=_next(i, size, width), inside=after, size=size
    )
    before = inside & (n > 0) & (i > 0)
    return total + _load(
        x_ptr=x_ptr, sample=sample, n=_previous(n, size, width), i=_previous(i, size, width), inside=before, size=size
    )


@triton.jit
def _patches(x_ptr, inverse_ptr, out_ptr, size, height, width, SCALED: tl.constexpr, WIDTH: tl.constexpr):
    sample, n, row = _query(size)
    i = tl.arange(0, WIDTH)
    total = _window(x_ptr, sample, n, i=i, size=size, height=height, width=width, TOP=-1, BOTTOM=1, LEFT=-1, RIGHT=1)
    if SCALED:
        total *= tl.load(inverse_ptr + sample * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + row + i, total, mask=i < size)


@triton.jit
def _attend(x_ptr, keep_ptr, out_ptr, size, width, scale, WIDTH: tl.constexpr):
    sample, n, row = _query(size)
    i = tl.arange(0, WIDTH)
    inside = i < size
    total = _fused_rows(x_ptr, sample, n, i=i, inside=inside, size=size)
    after = inside & (n < size - 1) & (i < size - 1)
    total += _fused_rows(
        x_ptr=x_ptr, sample=sample, n=_next(n, size, width), i=_next(i, size, width), inside=after, size=size
    )
    before = inside & (n > 0) & (i > 0)
    total += _fused_rows(
        x_ptr=x_ptr, sample=sample, n=_previous(n, size, width), i=_previous(i, size, width), inside=before, size=size
    )
    keep = tl.load(keep_ptr + sample * size + i, mask=inside, other=0.0).to(tl.float32)
    logits = tl.where(inside, tl.cast(scale, tl.float32) * keep * total, float("-inf"))
    e = tl.where(inside, tl.exp(logits - tl.max(logits, 0)), 0.0)  # NaN anywhere is NaN everywhere
    tl.store(out_ptr + row + i, keep * (e / tl.sum(e, 0)), mask=inside)


@triton.jit
def _spread(x_ptr, out_ptr, size, height, width, WIDTH: tl.constexpr):
    sample, n, _row = _query(size)
    i = tl.arange(0, WIDTH)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            total = 0.25 * _window(
                x_ptr, sample, n, i=i, size=size, height=height, width=width, TOP=a - 1, BOTTOM=a, LEFT=b - 1, RIGHT=b
            )
            at = ((sample * 4 + 2 * a + b) * size + n) * size + i
            tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _gather(grad_ptr, weights_ptr, out_ptr, size, height, width, scale, WIDTH: tl.constexpr):
    sample, n, row = _query(size)
    i = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            phase = sample * 4 + 2 * a + b
            total += _window(
                grad_ptr, phase, n, i=i, size=size, height=height, width=width,
                TOP=-a, BOTTOM=1 - a, LEFT=-b, RIGHT=1 - b,
            )  # fmt: skip
    total *= 0.25
    weights = tl.load(weights_ptr + row + i, mask=i < size, other=0.0)
    slope = tl.cast(scale, tl.float32) * weights * (total - tl.sum(weights * total, 0))
    tl.store(out_ptr + row + i, slope, mask=i < size)


@triton.jit
def _scaled(
    x_ptr, correlation_ptr, inverse_ptr, parts_ptr, out_ptr, size, height, width, blocks,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    pid, i = tl.program_id(0), tl.arange(0, WIDTH)
    sample, first = (pid // blocks).to(tl.int64), pid % blocks * QUERIES
    inverse = tl.load(inverse_ptr + sample * size + i, mask=i < size, other=0.0)
    part = tl.zeros((WIDTH,), tl.float32)
    for n in range(first, tl.minimum(first + QUERIES, size)):
        total = _fused_columns(x_ptr, sample, n, i=i, inside=i < size, size=size, width=width)
        total += _fused_columns(
            x_ptr=x_ptr, sample=sample, n=n - 1, i=i - 1, inside=(n > 0) & (i > 0) & (i < size), size=size, width=width
        )
        total += _fused_columns(
            x_ptr=x_ptr, sample=sample, n=n + 1, i=i + 1, inside=(n < size - 1) & (i < size - 1), size=size, width=width
        )
        part += total * _window(
            correlation_ptr, sample, n, i=i, size=size, height=height, width=width, TOP=-1, BOTTOM=1, LEFT=-1, RIGHT=1
        )
        tl.store(out_ptr + (sample * size + n) * size + i, total * inverse, mask=i < size)
    tl.store(parts_ptr + pid.to(tl.int64) * size + i, part, mask=i < size)


def forward(
    correlation: Tensor, inverse: Tensor, keep: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(U [B, 4, L, L] in keep's dtype, A [B, L, L] float32), as the op returns them."""
    batch, size = keep.shape
    out = torch.empty((batch, 4, size, size), dtype=keep.dtype, device=keep.device)
    weights = torch.empty((batch, size, size), dtype=torch.float32, device=keep.device)
    if batch == 0:
        return out, weights
    block = triton.next_power_of_2(size)
    row, grid = {"WIDTH": block, "num_warps": warps(block)}, (batch * size,)
    scores = torch.empty_like(weights)
    with on(keep):
        _patches[grid](correlation.contiguous(), inverse.contiguous(), scores, size, height, width, SCALED=True, **row)
        _attend[grid](scores, keep.contiguous(), weights, size, width, float(scale), **row)
        _spread[grid](weights, out, size, height, width, **row)
    return out, weights


def backward(
    grad: Tensor, correlation: Tensor, inverse: Tensor, weights: Tensor, height: int, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of the correlation [B, L, L] and of the inverse norms [B, L], float32."""
    batch, size = inverse.shape
    out = torch.empty((batch, size, size), dtype=torch.float32, device=grad.device)
    if batch == 0:
        return out, torch.empty((batch, size), dtype=torch.float32, device=grad.device)
    blocks = triton.cdiv(size, QUERIES)
    parts = torch.empty((batch, blocks, size), dtype=torch.float32, device=grad.device)
    block = triton.next_power_of_2(size)
    row, grid = {"WIDTH": block, "num_warps": warps(block)}, (batch * size,)
    first, second = torch.empty_like(out), torch.empty_like(out)
    inverse = inverse.contiguous()
    with on(grad):
        _gather[grid](grad.contiguous(), weights.contiguous(), first, size, height, width, float(scale), **row)
        _scaled[(batch * blocks,)](
            first, correlation.contiguous(), inverse, parts, second, size, height, width, blocks,
            QUERIES=QUERIES, maxnreg=SCALED_REGISTERS, **row,
        )  # fmt: skip
        _patches[grid](second, inverse, out, size, height, width, SCALED=False, **row)
    return out, parts.sum(1)
