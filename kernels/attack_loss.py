"""`attack_loss` in Triton: a program computes several rows of few classes, or one row of many classes.

A program that can hold its rows in registers reads them once. For more classes, it processes a row in blocks, and reads
the row again for each maximum and each sum, and for the gradient.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import KEPT, cdiv, log1p, next_power_of_2, warps
from ._launch import launch

#: The indices of the losses in `purify_fast.ops.attack_loss.KINDS`.
CE, MARGIN, SCALED_MARGIN, DLR, MARGIN_TARGETED, DLR_TARGETED = (tl.constexpr(index) for index in range(6))
#: Constants of the same file: SURE and TINY, and the `least_exponent` of float16 and of the other dtypes.
SURE, TINY = tl.constexpr(2.0**-8), tl.constexpr(1e-12)
LEAST_HALF, LEAST = (tl.constexpr(0.7 * math.log(2.0**exponent)) for exponent in (-14, -126))
#: The largest row that a program holds; the elements of a block of a larger row; and the elements of several rows.
HELD, BLOCK, SHARED = 4096, 2048, 256


@triton.jit
def _read(place, first, WIDTH: tl.constexpr):
    """Read the classes from ``first`` on. Return the logits, float32, and -inf beyond the rows, and the classes."""
    start, exists, classes = place
    column = first + tl.arange(0, WIDTH)[None, :]
    return tl.load(start + column, mask=exists & (column < classes), other=float("-inf")).to(tl.float32), column


@triton.jit
def _again(place, held, first, WHOLE: tl.constexpr, WIDTH: tl.constexpr):
    """Return what `_read` does: what is held if that is the whole row, and else what is read."""
    return held if WHOLE else _read(place, first, WIDTH)


@triton.jit
def _next_largest(place, held, before, at, end, WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the logit that follows the logit ``before`` of class ``at`` in descending order, and its class.

    Equal logits are in the order of the classes. NaN is left out.
    """
    best, index = tl.full((ROWS, WIDTH), float("-inf"), tl.float32), tl.zeros((ROWS, WIDTH), tl.int32) + end
    for first in range(0, end, WIDTH):
        x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        better = ((x < before) | ((x == before) & (column > at))) & (x > best)
        best, index = tl.where(better, x, best), tl.where(better, column, index)
    high = tl.max(best, 1)[:, None]
    return high, tl.min(tl.where(best == high, index, end), 1)[:, None]


@triton.jit
def _cross_entropy(
    place, held, true, top, end, HALF: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Return the loss, and what its gradient needs: two shifts, a scale, its value for y, and if the form is exact."""
    y, of_true = true
    # The usual form is -log softmax(l)_y. Where the model is sure, with z = logsumexp(others) - l_y and
    # s = sigmoid(z), the loss is log(1 + exp z), and the gradient s softmax(others), and -s for the true class.
    most = tl.maximum(top, of_true)
    every, rest = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, end, WIDTH):
        x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        every += tl.exp(x - most)
        rest += tl.where(column != y, tl.exp(x - top), 0.0)
    log_sum, rest_sum = tl.log(tl.sum(every, 1)[:, None]), tl.sum(rest, 1)[:, None]
    usual = -((of_true - most) - log_sum)
    z = (top - of_true) + tl.log(rest_sum)
    # With NaN or infinite logits, one of these two numbers is NaN, and the usual form is kept.
    exact = (usual < SURE) & (z < SURE)
    bounded = tl.maximum(z, LEAST_HALF if HALF else LEAST)
    exponential = tl.exp(bounded)
    slope = exponential / (1.0 + exponential)
    loss = tl.where(exact, log1p(exponential) + slope * (z - bounded), usual)
    shift, less = tl.where(exact, top, most), tl.where(exact, 0.0, log_sum)
    scale, of_y = tl.where(exact, slope / rest_sum, 1.0), tl.where(exact, slope, 1.0)
    return loss, (shift, less, scale, of_y, exact)


@triton.jit
def _margin(
    place,
    held,
    true,
    top,
    end,
    of_target,
    total,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the loss, and what its gradient needs: how many logits share it, the width, and the width's classes."""
    y, of_true = true
    classes = place[2]
    TARGETED: tl.constexpr = (KIND == MARGIN_TARGETED) | (KIND == DLR_TARGETED)
    one, three, four = 0, 0, 0
    # m = max_{j != y} l_j - l_y, or l_t - l_y. Its gradient g is -1 for y, and 1 for t, or shared by the largest.
    loss = (of_target if TARGETED else top) - of_true
    width, ratio, count = 1.0, 0.0, 1.0
    if not TARGETED:
        equal = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, end, WIDTH):
            x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
            equal += ((tl.where(column != y, x, float("-inf")) == top) & (column < classes)).to(tl.float32)
        count = tl.sum(equal, 1)[:, None]
    if KIND == SCALED_MARGIN:
        # m / std(l), with a constant std.
        mean = tl.sum(total, 1)[:, None] / classes
        squares = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, end, WIDTH):
            x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
            squares += tl.where(column < classes, (x - mean) * (x - mean), 0.0)
        width = tl.sqrt_rn(tl.sum(squares, 1)[:, None] / classes) + TINY
        loss = loss / width
    if (KIND == DLR) | (KIND == DLR_TARGETED):
        # m / w with w = l_(1) - l_(3), or l_(1) - (l_(3) + l_(4)) / 2. Its gradient is (g - (m / w) dw/dl) / w.
        l1, one = _next_largest(place, held, float("inf"), -1, end, WHOLE=WHOLE, ROWS=ROWS, WIDTH=WIDTH)
        l2, two = _next_largest(place, held, l1, one, end, WHOLE=WHOLE, ROWS=ROWS, WIDTH=WIDTH)
        l3, three = _next_largest(place, held, l2, two, end, WHOLE=WHOLE, ROWS=ROWS, WIDTH=WIDTH)
        below = l3
        if TARGETED:
            l4, four = _next_largest(place, held, l3, three, end, WHOLE=WHOLE, ROWS=ROWS, WIDTH=WIDTH)
            below = (l3 + l4) / 2
        width = tl.where((top != top) | (of_true != of_true), float("nan"), l1) - below + TINY
        loss = loss / width
        ratio = loss
    return loss, (count, width, ratio, one, three, four)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    logits_ptr,  # [rows, classes]
    labels_ptr,  # [rows], or [rows, 2] for the targeted losses
    gradient_ptr,  # [rows, classes]
    loss_ptr,  # [rows]
    wrong_ptr,  # [rows]
    rows,
    classes,
    KIND: tl.constexpr,
    TOWARD: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program computes the loss, the gradient and whether it is wrong, for some rows of logits, or for one row."""
    # The formulas are in `purify_fast.ops.attack_loss`: a maximum over classes, or a logsumexp, minus the true logit.
    TARGETED: tl.constexpr = (KIND == MARGIN_TARGETED) | (KIND == DLR_TARGETED)
    DIVIDED: tl.constexpr = (KIND == DLR) | (KIND == DLR_TARGETED)
    sign = -1.0 if TOWARD else 1.0
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    exists, end = row < rows, WIDTH if WHOLE else classes
    start = logits_ptr + row * classes
    place = start, exists, classes
    y = tl.load(labels_ptr + row * (2 if TARGETED else 1), mask=exists, other=0)
    valid, of_target = (y >= 0) & (y < classes), 0.0
    if TARGETED:
        t = tl.load(labels_ptr + row * 2 + 1, mask=exists, other=0)
        valid = valid & (t >= 0) & (t < classes)
        of_target = tl.load(start + t, mask=exists & valid, other=float("nan")).to(tl.float32)
        t = t.to(tl.int32)
    # With a label outside of the classes, loss and gradient of the row are NaN, and the row is wrong.
    of_true = tl.load(start + y, mask=exists & valid, other=float("nan")).to(tl.float32)
    y = y.to(tl.int32)
    true = y, of_true

    held = _read(place, 0, WIDTH) if WHOLE else 0
    high, total = tl.full((ROWS, WIDTH), float("-inf"), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    beaten, nan = tl.zeros((ROWS, WIDTH), tl.int32), tl.zeros((ROWS, WIDTH), tl.int32)
    for first in range(0, end, WIDTH):
        x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        others = column != y
        inside = column < classes
        high = tl.maximum(high, tl.where(others, x, float("-inf")))
        total += tl.where(inside, x, 0.0)
        nan |= (others & (x != x)).to(tl.int32)
        # The first of the largest logits decides. NaN fails the comparisons.
        below = (x < of_true) | ((x == of_true) & (column > y))
        beaten |= (inside & others & (below == 0)).to(tl.int32)
    wrong = tl.max(beaten, 1)[:, None] > 0
    # tl.maximum leaves NaN out.
    top = tl.where(tl.max(nan, 1)[:, None] > 0, float("nan"), tl.max(high, 1)[:, None])

    if KIND == CE:
        half: tl.constexpr = logits_ptr.dtype.element_ty == tl.float16
        loss, of_ce = _cross_entropy(place, held, true, top, end, HALF=half, WHOLE=WHOLE, ROWS=ROWS, WIDTH=WIDTH)
        shift, less, scale, of_y, exact = of_ce
    else:
        loss, of_margin = _margin(
            place,
            held,
            true,
            top,
            end,
            of_target=of_target,
            total=total,
            KIND=KIND,
            WHOLE=WHOLE,
            ROWS=ROWS,
            WIDTH=WIDTH,
        )
        count, width, ratio, one, three, four = of_margin
        if KIND == MARGIN:
            wrong = wrong | (loss != loss)

    for first in range(0, end, WIDTH):
        x, column = _again(place, held, first, WHOLE=WHOLE, WIDTH=WIDTH)
        if KIND == CE:
            out = tl.exp((x - shift) - less) * scale
            out = tl.where(column == y, tl.where(exact, 0.0, out) - of_y, out)
        else:
            if TARGETED:
                out = (column == t).to(tl.float32) - (column == y).to(tl.float32)
            else:
                out = tl.where(column == y, -1.0, (x == top).to(tl.float32) / count)
            if DIVIDED:
                if TARGETED:
                    of_below = ((column == three).to(tl.float32) + (column == four).to(tl.float32)) * 0.5
                else:
                    of_below = (column == three).to(tl.float32)
                out = out - ratio * ((column == one).to(tl.float32) - of_below)
            if DIVIDED or KIND == SCALED_MARGIN:
                out = out / width
        out = tl.where(valid, sign * out, float("nan"))
        at = gradient_ptr + row * classes + column
        tl.store(at, out.to(gradient_ptr.dtype.element_ty), mask=exists & (column < classes))
    tl.store(loss_ptr + row, tl.where(valid, sign * loss, float("nan")), mask=exists)
    tl.store(wrong_ptr + row, tl.where(valid, wrong, True).to(tl.float32), mask=exists)


@functools.lru_cache(KEPT)
def _shape(classes: int) -> dict[str, int]:
    """Return the tile of a program and its warps. They do not depend on the batch size."""
    width = next_power_of_2(classes)
    whole = width <= HELD
    width = width if whole else BLOCK
    rows = max(1, SHARED // width)
    return {"WHOLE": whole, "ROWS": rows, "WIDTH": width, "num_warps": warps(rows * width)}


def forward(logits: Tensor, labels: Tensor, kind: int, toward: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Map logits [B, C] and labels [B] or [B, 2] to the gradient [B, C], the loss [B] and wrong [B]."""
    (rows, classes), device = logits.shape, logits.device
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=device)
    loss, wrong = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    if rows:
        shape = _shape(classes)
        given = logits.contiguous(), labels.contiguous(), gradient, loss, wrong, rows, classes
        launch(_forward, (cdiv(rows, shape["ROWS"]),), *given, KIND=kind, TOWARD=toward, **shape, enable_fp_fusion=True)
    return gradient, loss, wrong
