"""The shortest move to a hyperplane within a box, row by row, in the l-infinity, l2 or l1 norm.

    d = argmin |d|_p,   <w, x + d> = b,   lo <= x + d <= hi

FAB's projection (Croce & Hein, "Fast Adaptive Boundary Attack", ICML 2020). No coordinate moves away from the plane,
and what is left is one number t for each row. With g = b - <w, x>, and room the distance from x to the box on that
side,

    d = sign(g w) m,   0 <= m <= room,   sum of |w| m = |g|
    linf:  m = min(t, room)
    l2:    m = min(t |w|, room)
    l1:    m = room where |w| > t, one share of room for all with |w| = t, and 0 elsewhere

How far a row comes is a monotone function of t, made of straight pieces (linf, l2) or of steps (l1). The reference
sorts the places where the pieces meet, and so finds the piece that holds the solution. Kernels do not sort. For linf
and l2 the function is concave: Newton's steps approach t from below, pass at least one such place each, and end on t
itself. For l1 the bits of t are found one by one.

Where the plane does not meet the box, d leads to the corner nearest to the plane. Elements of w that are not finite
count as 0, and a row with NaN in x or b does not move. All is done after scaling w and b by a power of two, so that the
squares of tiny gradients do not vanish.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch.examples import IMAGES, RGB, ROWS, examples, normal, uniform, wide_dtype
from .dispatch.registry import Launcher, define_op, wide
from .pgd_step import NORMS, check, per_sample

#: By dtype: the integers of its width, the bits of its mantissa, and twice the bias of its exponent.
LAYOUT = {torch.float32: (torch.int32, 23, 254), torch.float64: (torch.int64, 52, 2046)}


def scale_of(peak: Tensor) -> Tensor:
    """The power of two that brings ``peak``, [B], into [1, 2); for numbers too small or too large the nearest one."""
    integers, mantissa, twice = LAYOUT[peak.dtype]
    exponent = (peak.view(integers) >> mantissa).clamp(1, twice - 1)
    return ((twice - exponent) << mantissa).view(peak.dtype)


def reference(x: Tensor, w: Tensor, b: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    """The definition: float32 arithmetic (float64 for float64), x's dtype out. b: [B]."""
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
    """The t at which moves of min(t unit, room) lead over the gap, [B, 1]; infinite where none does."""
    full = torch.where(room > 0, room / unit, 0.0)
    full, order = full.sort(1)
    gain, rate = ((slope * part).gather(1, order) for part in (room, unit))
    # the contribution of the coordinates that are at the border of the box, and of the others per t
    filled = gain.cumsum(1)
    rate = torch.where(full > 0, rate, 0.0).flip(1).cumsum(1).flip(1)
    reached = filled - gain + full * rate
    count = (reached < gap).sum(1, keepdim=True)
    last, missing = (F.pad(part, (1, 0)).gather(1, count) for part in (full, filled))
    missing = gap - missing
    return torch.where(missing > 0, missing / F.pad(rate, (0, 1)).gather(1, count), last)


def _share(slope: Tensor, gain: Tensor, gap: Tensor) -> Tensor:
    """The share of its room that each coordinate moves where those of the largest slope go first, [B, D]."""
    ordered, order = slope.sort(1, descending=True)
    count = (gain.gather(1, order).cumsum(1) < gap).sum(1, keepdim=True)
    least = ordered.gather(1, count.clamp(max=slope.shape[1] - 1))
    whole, edge = slope > least, slope == least
    missing, there = gap - (gain * whole).sum(1, keepdim=True), (gain * edge).sum(1, keepdim=True)
    part = torch.where(there > 0, missing / there, 0.0).clamp(0, 1)
    return torch.where(whole, 1.0, torch.where(edge, part, 0.0))


#: Norm and shape, with the dtypes that stand for it on a GPU.
EXAMPLES = {(norm, shape): "" for norm in NORMS for (shape,) in IMAGES} | {
    ("linf", (ROWS, 16400)): "f",
    ("l2", (ROWS, 3, 33, 31)): "b",
    ("l1", (ROWS, 16400)): "f",
    ("l1", (ROWS, 3, 33, 31)): "h",
}
RACED = tuple((norm, shape) for norm in NORMS for (shape,) in RGB)
PROPERTIES: dict[str, Any] = {
    "variant": lambda norm, _: norm,
    # The distance of a row to its plane is a sum, which each backend rounds in its own order. In l1 one coordinate
    # takes all of it.
    "slack": lambda norm, _: 2.0**14 if norm == "l1" else 256.0,
}


def _arguments(norm: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor | float, ...]:
    """Planes nearby, further away and out of reach; a normal with zeros, infinities and NaN."""
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
    examples=examples(_arguments, EXAMPLES, **PROPERTIES),
    raced=examples(_arguments, RACED, **PROPERTIES),
    triton=Launcher("hyperplane_projection", "forward"),
    replaces_many=NORMS,
    differentiable=False,
)


def hyperplane_projection(
    x: Tensor, w: Tensor, b: float | Tensor, norm: str = "linf", lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """The shortest move of each point to its hyperplane ``<w, z> = b`` within the box [lo, hi].

    Args:
        x: the points, in the box, ``[B, ...]``; float16, bfloat16, float32 or float64; image units.
        w: the normals of the planes, of x's shape, dtype and device; elements that are not finite count as 0.
        b: the offsets of the planes, a number or ``[B]``.
        norm: in which the move is shortest: ``linf``, ``l2`` or ``l1``.
        lo: lower end of the box.
        hi: upper end of the box, at least lo.

    Returns:
        The moves d: shape and dtype of x, contiguous, x + d within the box up to rounding. Where the plane does not
        meet the box, the move to the corner of the box nearest to the plane; of a row with NaN in x or b, 0. No
        gradient.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown norm, or lo > hi.

    Deterministic.
    """
    norm = check({"x": x, "w": w}, norm, lo, hi)
    with torch.no_grad():
        return OP(x, w, per_sample("b", b, x), NORMS.index(norm), float(lo), float(hi), variant=norm)
