"""Computes the proposals of the Square Attack, a random search. A proposal changes an image in one or two squares.

    linf:    z = clamp(x_nat + eps s, lo, hi)                                       in the window W, x elsewhere
    l2, l1:  d = x - x_nat,  h = s P + d / |d|_W,  u = max(eps^p - |d|^p, 0)        p = 2, 1
             d <- h / |h|_W (u / C + |d|_{W or V}^p)^(1/p)  in W,  0 in the rest of V,  d elsewhere
    l2:      z = clamp(x_nat + eps d / |d|, lo, hi)
    l1:      z = argmin |z - (x_nat + d)|_2,   |z - x_nat|_1 <= eps,  lo <= z <= hi

W and V are square windows at random places. s is a random sign per channel. P is a pattern of length 1 in W. |d|_W is
the norm of one channel inside the window W. u is the unused part of the radius, to the power p, and C is the number of
channels. So l2 and l1 set the perturbation in the rest of V to 0, and give W the norm of both windows together with the
unused part of the radius. Source: Andriushchenko et al., "Square Attack", ECCV 2020 (arXiv 1912.00049), algorithms 2
and 3. l1 is the version of AutoAttack, with the projection of `pgd_step`.

The caller passes the random numbers of each image, for several proposals at once: the places of W and V (row and column
of each), the orientation of the pattern, and the signs of the channels. The place of a window is computed in float32
for every dtype of the images.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._tensors import check_form, per_image, per_sample
from .dispatch.examples import ROWS, examples, normal, uniform, wide_dtype
from .dispatch.registry import define_op, wide
from .pgd_step import NORMS, check, pgd_step

#: The random numbers before the channels' signs: two places of two numbers, and the pattern's orientation.
PLACES = 5
#: This is added to lengths, so that they are never 0 in a division.
TINY = 1e-12


def signs(numbers: Tensor) -> Tensor:
    """Return 1 or -1, each with probability 1/2, for uniform numbers in [0, 1)."""
    return torch.where(numbers < 0.5, -1.0, 1.0)


def from_border(place: Tensor, edge: int | Tensor, size: int) -> Tensor:
    """Return the distance of every pixel along an axis from the first pixel of a random window, int64 ``[..., size]``.

    The places are uniform numbers in [0, 1), ``[...]``, and sizes are in pixels.
    """
    first = (place.float() * (size - edge + 1)).long()
    return torch.arange(size, device=place.device) - first[..., None]


def window(place: Tensor, edge: int | Tensor, height: int, width: int) -> Tensor:
    """Return the mask of a random window, bool ``[..., 1, height, width]``, for its place ``[..., 2]`` in [0, 1)."""
    rows, columns = from_border(place[..., 0], edge, height), from_border(place[..., 1], edge, width)
    lines, across = ((line >= 0) & (line < edge) for line in (rows, columns))
    # The masks are combined as bytes, because CPU code for bytes is vectorized and code for booleans is not.
    both = lines.view(torch.uint8)[..., None, :, None] & across.view(torch.uint8)[..., None, None, :]
    return both.view(torch.bool)


def _placed(pattern: Tensor, numbers: Tensor, edge: Tensor, height: int, width: int) -> Tensor:
    """Return the pattern, placed in the window W: [..., 1, height, width]. Values outside W are arbitrary."""
    last = pattern.shape[1] - 1
    rows = from_border(numbers[..., 0], edge, height).clamp(0, last)
    columns = from_border(numbers[..., 1], edge, width).clamp(0, last)
    way = (numbers[..., 4] < 0.5).long()
    return pattern[way[..., None, None], rows[..., :, None], columns[..., None, :]].unsqueeze(-3)


def _moved_mass(offset: Tensor, radius: Tensor, numbers: Tensor, pattern: Tensor, edge: Tensor, power: int) -> Tensor:
    """Return the proposals' new offsets d in l2 or l1, by the formula in the module's docstring.

    The offsets are [B, C, H, W], radius is [B, 1, 1, 1], numbers is [T, B, 5 + C], and the result is [T, B, C, H, W].
    """
    channels, height, width = offset.shape[1:]

    def mass(part: Tensor) -> Tensor:
        return part.abs().pow(power).sum((-2, -1), keepdim=True)

    sizes = edge, height, width
    first, two = window(numbers[..., :2], *sizes), window(numbers[..., 2:4], *sizes)
    old = torch.where(first, offset, 0.0)
    length = mass(old).pow(1 / power)
    shape = torch.where(first, _placed(pattern, numbers, *sizes).to(offset.dtype), 0.0)
    new = shape * signs(numbers[..., PLACES:]).to(offset.dtype)[..., None, None] + old / (TINY + length)
    new = new / (TINY + mass(new).pow(1 / power))
    unused = (radius.pow(power) - mass(offset).sum(1, keepdim=True)).clamp_min(0)
    size = (unused / channels + mass(torch.where(first | two, offset, 0.0))).pow(1 / power)
    return torch.where(first, new * size, torch.where(two, 0.0, offset))


def reference(
    x: Tensor, x_nat: Tensor, eps: Tensor, numbers: Tensor, pattern: Tensor | None, edge: Tensor, norm: int, *box: float
) -> Tensor:
    """Compute the op by PyTorch in float32 (float64 for float64) to x's dtype. eps is [B], numbers is [B, T, 5 + C]."""
    lo, hi = box
    point, clean, drawn = wide(x), wide(x_nat), numbers.transpose(0, 1)
    radius = per_image(eps.to(point.dtype), x)
    if pattern is None:
        moved = clean + radius * signs(drawn[..., PLACES:]).to(point.dtype)[..., None, None]
        inside = window(drawn[..., :2], edge, *x.shape[2:])
        # The published attack moves x by twice the radius and projects it. This gives x_nat + eps or x_nat - eps.
        points = torch.where(inside, moved.clamp_(lo, hi), point).flatten(0, 1)
    elif NORMS[norm] == "l2":
        offset = _moved_mass(point - clean, radius, drawn, pattern=pattern, edge=edge, power=2)
        length = offset.square().sum((2, 3, 4), keepdim=True).sqrt() + TINY
        points = (clean + offset / length * radius).clamp(lo, hi).flatten(0, 1)
    else:
        moved = (clean + _moved_mass(point - clean, radius, drawn, pattern=pattern, edge=edge, power=1)).flatten(0, 1)
        centers = clean.expand(len(drawn), *clean.shape).flatten(0, 1)
        # With alpha = 0, the step only projects.
        radii = eps.repeat(len(drawn))
        points = pgd_step(moved, torch.zeros_like(moved), centers, alpha=0.0, eps=radii, norm="l1", lo=lo, hi=hi)
    return points.to(x.dtype).contiguous()


#: By norm, shape, number of proposals and side of the windows; for the values see `Example.gpu`. A program of l2 or l1
#: holds an image of the other shapes, but reads one of the last shape several times.
EXAMPLES = {
    (norm, shape, draws, edge): gpu.get(norm, "")
    for norm in NORMS
    for shape, draws, edge, gpu in (
        ((ROWS, 3, 32, 32), 1, 7, {"linf": "f", "l2": "f"}),
        ((ROWS, 1, 16, 16), 3, 5, {}),
        ((ROWS, 2, 9, 15), 2, 3, {"linf": "h", "l1": "b"}),
        ((ROWS, 3, 48, 40), 1, 15, {"l2": "b", "l1": "f"}),
    )
}


def _arguments(
    norm: str, shape: tuple[int, ...], draws: int, edge: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor | float | None, ...]:
    """Make points well inside their balls, where the unused radius is more than rounding, and a point outside."""
    clean, offset = 0.25 + 0.5 * uniform(seed, *shape), 0.2 * (uniform(seed + 100, *shape) - 0.5)
    index = NORMS.index(norm)
    power = (math.inf, 2, 1)[index]
    radius = offset.flatten(1).norm(p=power, dim=1) * torch.tensor([1.5, 0.7, 2.0])
    pattern = normal(seed + 300, 2, edge, edge)
    pattern = pattern / pattern.norm(p=power, dim=(1, 2), keepdim=True)
    images = (clean + offset).to(dtype), clean.to(dtype), radius.to(wide_dtype(dtype))
    numbers = uniform(seed + 200, shape[0], draws, PLACES + shape[1]).float()
    # Pattern and edge are parameters, because `tile` repeats the rows of all tensors that are not parameters.
    shapes = Parameter(pattern.float(), False) if index else None, Parameter(torch.tensor(edge), False)
    return *images, numbers, *shapes, index, 0.1, 0.9


OP = define_op(
    "square_proposal",
    "(Tensor x, Tensor x_nat, Tensor eps, Tensor numbers, Tensor? pattern, Tensor edge, int norm, float lo, float hi) "
    "-> Tensor",
    reference=reference,
    fake=lambda x, x_nat, eps, numbers, *_: x.new_empty((numbers.shape[1] * x.shape[0], *x.shape[1:])),
    examples=examples(_arguments, EXAMPLES, exact=lambda norm, *_: norm == "linf", variant=lambda norm, *_: norm),
    # From benchmarks/results: nvidia-h200/kernels.csv. There is no kernel for CPUs.
    cpu=None,
    in_graphs={"cuda": ("l2", "l1")},
)


def _check(x: Tensor, numbers: Tensor, edge: int | Tensor, norm: str, pattern: Tensor | None) -> None:
    """Raise ValueError if the numbers, the window or the pattern of a proposal do not match."""
    if x.dim() != 4:
        raise ValueError(f"x must be images [B, C, H, W], got {list(x.shape)}")
    batch, channels, height, width = x.shape
    sizes = batch, *numbers.shape[1:2], PLACES + channels
    check_form("numbers", numbers, torch.float32, "[B, T, 5 + C]", sizes, x=x)
    side: Any = edge
    if isinstance(edge, Tensor):
        check_form("edge", edge, torch.int64, "[] or a number", ())
        # The pattern may be larger than the windows.
        side = min(height, width) if pattern is None else pattern.shape[-1]
    elif not 1 <= edge <= min(height, width):
        raise ValueError(f"edge must be from 1 to {min(height, width)} in images of {height} x {width}, got {edge}")
    if norm == "linf":
        if pattern is not None:
            raise ValueError("pattern must be None for norm='linf', which has no pattern")
        return
    check_form("pattern", pattern, torch.float32, f"[2, edge, edge] for norm={norm!r}", (2, side, side), x=x)


def square_proposal(
    x: Tensor,
    x_nat: Tensor,
    eps: float | Tensor,
    numbers: Tensor,
    edge: int | Tensor,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
    pattern: Tensor | None = None,
) -> Tensor:
    """Compute the next points of a random search with squares, several points for each image.

    Args:
        x: best points so far, ``[B, C, H, W]``; float16, bfloat16, float32 or float64; image units.
        x_nat: attacked images, the centers of the balls, with x's shape, dtype and device.
        eps: radius of the ball, measured in ``norm`` and image units, a number or ``[B]``.
        numbers: uniform numbers in [0, 1), float32 ``[B, T, 5 + C]``, for T proposals per image: the places of two
            windows (two numbers each), the orientation of the pattern, and the signs of the channels. ``linf`` uses
            only the first place and the signs.
        edge: side of the windows, in pixels, from 1 to the smaller side of the images. It may be an int64 tensor ``[]``
            on x's device, so that a captured step serves for every edge. Nobody then checks the range of the edge.
        norm: ``linf``, ``l2`` or ``l1``.
        lo: lower end of the box of the images.
        hi: upper end of the box, at least lo.
        pattern: content of a window in its two orientations, for ``l2`` and ``l1``; float32 ``[2, edge, edge]``. Each
            has length 1 in ``norm``. If ``edge`` is a tensor, the pattern may be larger, and only its first rows and
            columns are used.

    Returns:
        The points, ``[T * B, C, H, W]`` in x's dtype, contiguous: the first proposal of every image, then the second of
        every image, and so on. There is no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, if the norm is unknown, if eps is a number and negative
            or NaN, if lo > hi, if edge is larger than an image, or if pattern is missing or not allowed.

    The op is deterministic, and ``linf`` is bit-exact across backends. Numbers outside [0, 1) give undefined results.
    """
    norm = check({"x": x, "x_nat": x_nat}, norm, lo, hi)
    _check(x, numbers, edge, norm, pattern)
    with torch.no_grad():
        radii, index = per_sample("eps", eps, x), NORMS.index(norm)
        side = edge if isinstance(edge, Tensor) else torch.full((), edge, dtype=torch.int64, device=x.device)
        return OP(x, x_nat, radii, numbers, pattern, side, index, float(lo), float(hi), variant=norm)
