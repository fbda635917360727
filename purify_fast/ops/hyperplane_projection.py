"""Computes, for each row, the shortest move to a hyperplane within a box, in the l-infinity, l2 or l1 norm.

    d = argmin |d|_p,   <w, x + d> = b,   lo <= x + d <= hi

This is FAB's projection (Croce & Hein, "Fast Adaptive Boundary Attack", ICML 2020). No coordinate moves away from the
plane, so each row has a single unknown number t. Let g = b - <w, x>, and let room be the distance to the border. Then

    d = sign(g w) m,   0 <= m <= room,   sum of |w| m = |g|
    linf:  m = min(t, room)
    l2:    m = min(t |w|, room)
    l1:    m = room where |w| > t, the same fraction of room where |w| = t, and 0 elsewhere

The progress towards the plane is a monotone function of t, piecewise linear (linf, l2) or a step function (l1). The
reference sorts the breakpoints. For linf and l2, the kernels use Newton's method from below: the function is concave,
so each iteration passes a breakpoint. For l1 they bisect t's bits. w and b are scaled against underflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .._tensors import per_sample
from .dispatch.examples import IMAGES, ROWS, examples, normal, uniform, wide_dtype
from .dispatch.registry import define_op, wide
from .pgd_step import NORMS, check

#: For each dtype: the integer dtype of the same width, the bits of the mantissa, and twice the bias of the exponent.
LAYOUT = {torch.float32: (torch.int32, 23, 254), torch.float64: (torch.int64, 52, 2046)}


def scale_of(peak: Tensor) -> Tensor:
    """Return the power of two that scales ``peak`` [B] into [1, 2), limited to normal floating-point numbers."""
    integers, mantissa, twice = LAYOUT[peak.dtype]
    exponent = (peak.view(integers) >> mantissa).clamp(1, twice - 1)
    return ((twice - exponent) << mantissa).view(peak.dtype)


def reference(x: Tensor, w: Tensor, b: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    """Compute the op by PyTorch in float32 (float64 for float64). The result has x's dtype. b is [B]."""
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    start, normal = wide(x).flatten(1), wide(w).flatten(1)
    normal = torch.where(normal.isfinite(), normal, 0.0)
    scale = scale_of(normal.abs().amax(1))
    normal = normal * scale[:, None]
    gap = b.to(start.dtype) * scale - (normal * start).sum(1)
    gap = torch.where(gap.isnan(), 0.0, gap)[:, None]
    sign, slope, gap = torch.where(gap < 0, -normal.sign(), normal.sign()), normal.abs(), gap.abs()
    free = torch.where(sign > 0, hi - start, start - lo)
    room = torch.where((sign != 0) & (free > 0), free, 0.0)
    if NORMS[norm] == "l1":
        move = room * _share(slope, slope * room, gap)
    else:
        unit = torch.ones_like(slope) if NORMS[norm] == "linf" else slope
        wish = _step(slope, unit, room=room, gap=gap) * unit
        move = torch.where(wish < room, wish, room)
    return (sign * move).view_as(x).to(x.dtype).contiguous()


def _step(slope: Tensor, unit: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Return the t, [B, 1], for which the moves min(t unit, room) close the gap |g|; infinity if there is no such t."""
    full = torch.where(room > 0, room / unit, 0.0)
    full, order = full.sort(1)
    gain, rate = ((slope * part).gather(1, order) for part in (room, unit))
    # `filled`: the progress to the plane by coordinates at the border of the box. `rate`: that of the others, per t.
    filled = gain.cumsum(1)
    rate = torch.where(full > 0, rate, 0.0).flip(1).cumsum(1).flip(1)
    reached = filled - gain + full * rate
    count = (reached < gap).sum(1, keepdim=True)
    last, missing = (F.pad(part, (1, 0)).gather(1, count) for part in (full, filled))
    missing = gap - missing
    return torch.where(missing > 0, missing / F.pad(rate, (0, 1)).gather(1, count), last)


def _share(slope: Tensor, gain: Tensor, gap: Tensor) -> Tensor:
    """Return the fraction of its room that each coordinate moves, [B, D]. The largest slopes move first."""
    ordered, order = slope.sort(1, descending=True)
    count = (gain.gather(1, order).cumsum(1) < gap).sum(1, keepdim=True)
    least = ordered.gather(1, count.clamp(max=slope.shape[1] - 1))
    full, edge = slope > least, slope == least
    missing, there = gap - (gain * full).sum(1, keepdim=True), (gain * edge).sum(1, keepdim=True)
    part = torch.where(there > 0, missing / there, 0.0).clamp(0, 1)
    return torch.where(full, 1.0, torch.where(edge, part, 0.0))


#: By norm and shape; for the values see `Example.gpu`.
EXAMPLES = {(norm, shape): "" for norm in NORMS for (shape,) in IMAGES} | {
    ("linf", (ROWS, 16400)): "f",
    ("l2", (ROWS, 3, 33, 31)): "b",
    ("l1", (ROWS, 16400)): "f",
    ("l1", (ROWS, 3, 33, 31)): "h",
}


def _arguments(norm: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor | float, ...]:
    """Make planes that are near, far and outside the box. The normals have zeros, and one has infinity and NaN."""
    x, w = uniform(seed, *shape).to(dtype), normal(seed + 100, *shape)
    w[uniform(seed + 200, *shape) < 0.1] = 0
    w[1].view(-1)[:2] = torch.tensor([math.nan, math.inf])
    w, finite = w.to(dtype), w.nan_to_num(posinf=0.0).to(dtype).double()
    size = finite.abs().flatten(1).sum(1)
    offset = (finite * x.double()).flatten(1).sum(1) + torch.tensor([0.02, -0.3, 2.0]) * size
    return x, w, offset.to(wide_dtype(dtype)), NORMS.index(norm), 0.0, 1.0


OP = define_op(
    "hyperplane_projection",
    "(Tensor x, Tensor w, Tensor b, int norm, float lo, float hi) -> Tensor",
    reference=reference,
    # The distance of a row to its plane is a sum. Each backend adds in its own order, so the rounding errors differ. In
    # l1, a single coordinate receives all of this error.
    examples=examples(
        _arguments, EXAMPLES, variant=lambda norm, _: norm, slack=lambda norm, _: 2.0**14 if norm == "l1" else 256.0
    ),
    # From benchmarks/results: cpu/ops.csv and nvidia-h200/kernels.csv.
    in_graphs={"cpu": NORMS, "cuda": NORMS},
)


def hyperplane_projection(
    x: Tensor, w: Tensor, b: float | Tensor, norm: str = "linf", lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """Compute the shortest move of each point to its hyperplane ``<w, z> = b`` within the box [lo, hi].

    Args:
        x: points in the box, ``[B, ...]``; float16, bfloat16, float32 or float64; image units.
        w: normals of the planes, with x's shape, dtype and device. Non-finite elements count as 0.
        b: offsets of the planes, a number or ``[B]``.
        norm: norm that the move minimizes: ``linf``, ``l2`` or ``l1``.
        lo: lower end of the box.
        hi: upper end of the box, at least lo.

    Returns:
        The moves d, with the shape and dtype of x, contiguous. Up to rounding, x + d is in the box. If the plane does
        not intersect the box, d leads to the corner of the box nearest to the plane. If x or b has NaN in a row, d is 0
        there. There is no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match, the norm is unknown, or lo > hi.

    The op is deterministic.
    """
    norm = check({"x": x, "w": w}, norm, lo, hi)
    with torch.no_grad():
        return OP(x, w, per_sample("b", b, x), NORMS.index(norm), float(lo), float(hi), variant=norm)
