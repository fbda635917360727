"""Takes a step of projected gradient descent (ascent on the attacker's loss). Each sample has its own step and radius.

    linf:  x <- clamp(x + alpha sign(g), x_nat - eps, x_nat + eps)
    l2:    x <- x_nat + d min(1, eps / |d|),   d = x + alpha g / |g| - x_nat
    both:  x <- clamp(x, lo, hi)
    l1:    x <- argmin |z - y|_2,   |z - x_nat|_1 <= eps,  lo <= z <= hi,   y = x + alpha s / |s|_1

Sources: Madry et al., ICLR 2018 (linf and l2). In l1, s is the sparse direction of SLIDE (Tramer & Boneh, NeurIPS 2019,
arXiv 1904.13000): sign(g) for the coordinates with the largest |g| (ties included), and 0 for the others and those that
cannot move into the box. The projection is that of Croce & Hein ("Mind the box", ICML 2021, arXiv 2103.01208). Let d be
y - x_nat, and let room be the distance from x_nat in the box to its border in the direction of d. Then

    z = x_nat + sign(d) clamp(|d| - shift, 0, room),   the least shift >= 0 with |z - x_nat|_1 <= eps

A zero or non-finite gradient does not move its element (linf) or its sample (l2, l1). NaN in x or x_nat propagates. For
l2, the gradient is divided by max |g| first, so that tiny gradients still have a direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._tensors import check_alike, per_image, per_sample
from .._validation import Norm, read_norm
from .dispatch.examples import IMAGES, LAYOUTS, ROWS, Example, examples, laid_out, normal, uniform, wide_dtype
from .dispatch.registry import define_op, wide

NORMS = ("linf", "l2", "l1")
#: The fraction of the coordinates that an l1 step moves, which we chose for this package. SLIDE's implementation in
#: cleverhans uses 0.01. AutoAttack's APGD begins with 0.2 and adapts the fraction.
DENSITY = 0.05
#: Bisections for l1's shift: then the interval is shorter than the rounding error of its first upper end.
HALVINGS = {torch.float32: 24, torch.float64: 53}


def direction(grad: Tensor, norm: int) -> Tensor:
    """Return the unit step along ``grad``, [B, ...]: its sign (linf), or grad / |grad| (l2); 0 if not finite."""
    if NORMS[norm] == "linf":
        return torch.sign(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0))
    if grad.numel() == 0:
        return grad
    dims = list(range(1, grad.dim()))
    peak = grad.abs().amax(dims, keepdim=True)
    # The maximum (amax) propagates NaN, so a sample with a NaN is not usable.
    usable = torch.isfinite(peak) & (peak > 0)
    grad = torch.where(usable, grad / torch.where(usable, peak, 1), 0.0)
    length = grad.square().sum(dims, keepdim=True).sqrt()
    return torch.where(usable, grad / torch.where(usable, length, 1), 0.0)


def chosen(size: int, density: float) -> int:
    """Return how many of ``size`` coordinates an l1 step moves, if all coordinates have different |grad|."""
    return max(1, int(density * size + 0.5))


def sparse_direction(x: Tensor, grad: Tensor, lo: float, hi: float, density: float = DENSITY) -> Tensor:
    """Return the step with l1 norm 1 in the coordinates with the largest |grad| that can move in the box, or 0."""
    if grad.numel() == 0:
        return grad
    position, g = x.flatten(1), grad.flatten(1)
    usable = torch.isfinite(g.abs().amax(1, keepdim=True))
    stopped = ((position >= hi) & (g > 0)) | ((position <= lo) & (g < 0))
    size = torch.where(usable & ~stopped, g.abs(), 0.0)
    least = size.topk(chosen(size.shape[1], density), 1).values[:, -1:]
    moves = (size >= least) & (size > 0)
    return torch.where(moves, g.sign() / moves.sum(1, keepdim=True), 0.0).view_as(grad)


def project(x: Tensor, x_nat: Tensor, eps: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    """Project ``x`` onto the ball, then the box (linf, l2), or onto their intersection (l1). eps is [B, 1, ...]."""
    if x.numel() == 0:
        return x
    dims = list(range(1, x.dim()))
    if NORMS[norm] == "linf":
        x = torch.minimum(torch.maximum(x, x_nat - eps), x_nat + eps)
    elif NORMS[norm] == "l2":
        d = x - x_nat
        radius = d.square().sum(dims, keepdim=True).sqrt()
        x = x_nat + d * torch.where(radius > eps, eps / radius, 1.0)
    else:
        d = x - x_nat
        size, room = d.abs(), torch.where(d > 0, hi - x_nat, x_nat - lo).clamp_min(0)

        def outside(shift: Tensor | float) -> Tensor:
            # A sample whose sum is NaN does not count as outside.
            return (size - shift).clamp_min(0).minimum(room).sum(dims, keepdim=True) > eps

        moves = outside(0.0)
        inner, outer = torch.zeros_like(eps), size.amax(dims, keepdim=True)
        for _ in range(HALVINGS[x.dtype]):
            middle = (inner + outer) / 2
            short = outside(middle)
            inner, outer = torch.where(short, middle, inner), torch.where(short, outer, middle)
        # Keep a sample inside the ball unchanged, because the formula would round it.
        x = torch.where(moves | d.isnan(), x_nat + d.sign() * (size - outer).clamp_min(0), x)
    return x.clamp(lo, hi)


def reference(x: Tensor, grad: Tensor, x_nat: Tensor, alpha: Tensor, eps: Tensor, norm: int, *space: float) -> Tensor:
    """Compute a step of PGD in float32, or in float64 for float64. The result has x's dtype. alpha and eps are [B]."""
    lo, hi, *_ = space
    start, g = wide(x), wide(grad)
    length, radius = per_image(alpha.to(start.dtype), x), per_image(eps.to(start.dtype), x)
    unit = sparse_direction(start, g, *space) if NORMS[norm] == "l1" else direction(g, norm)
    moved = project(start + length * unit, wide(x_nat), eps=radius, norm=norm, lo=lo, hi=hi)
    return moved.to(x.dtype).contiguous()


#: By norm, `Example.gpu` for each shape of `IMAGES`.
ON_GPU = {"linf": ("", "h", "", "f"), "l2": ("b", "f", "", "fb"), "l1": ("b", "f", "", "fb")}


def step_arguments(
    norm: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, momentum: bool = False
) -> tuple[Tensor | float, ...]:
    """Make a gradient with zeros, and images slightly outside the ball, so that a step executes every branch."""
    clean, grad = uniform(seed, *shape), normal(seed + 100, *shape)
    grad[uniform(seed + 200, *shape) < 0.1] = 0
    x, previous = ((clean + 0.2 * (uniform(seed + i, *shape) - 0.5)).clamp(0, 1) for i in (300, 400))
    images = [laid_out(image.to(dtype), layout) for image in (x, grad, clean, *([previous] if momentum else []))]
    radii = [torch.linspace(low, high, ROWS).to(wide_dtype(dtype)) for low, high in ((0.01, 0.4), (0.02, 1.0))]
    index = NORMS.index(norm)
    return *images, *radii, *([0.75] if momentum else []), index, 0.1, 0.9, *([] if momentum else [DENSITY])


def step_examples(arguments: Callable[..., tuple[Any, ...]], gpu: Mapping[str, tuple[str, ...]]) -> list[Example]:
    """Return examples of a step for the norms and the shapes of `ON_GPU`, contiguous and channels_last."""
    settings = {
        (norm, layout, shape): "" if layout else letters
        for layout in LAYOUTS
        for norm, of_shapes in gpu.items()
        for (shape,), letters in zip(IMAGES, of_shapes, strict=True)
        if len(shape) == 4 or not layout
    }
    return examples(arguments, settings, exact=lambda norm, *_: norm == "linf", variant=lambda norm, *_: norm)


OP = define_op(
    "pgd_step",
    "(Tensor x, Tensor grad, Tensor x_nat, Tensor alpha, Tensor eps, int norm, float lo, float hi, float density) "
    "-> Tensor",
    reference=reference,
    examples=step_examples(step_arguments, ON_GPU),
    # From benchmarks/results: kernels.csv of cpu and nvidia-h200, and cpu/ops.csv.
    in_graphs={"cpu": ("l1",), "cuda": ("l2", "l1")},
)


def per_pixel(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Do the same as `per_sample`. A tensor with more dimensions gets the shape of x."""
    if isinstance(value, Tensor) and value.dim() > 1:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.broadcast_to(broadcastable(name, value.to(x.device, dtype), x), x.shape)
    return per_sample(name, value, x)


def broadcastable(name: str, value: Any, x: Tensor) -> Any:
    """Return a number or a tensor that can be broadcast over the images ``x``: ``[B]`` becomes ``[B, 1, ...]``."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape == x.shape[:1]:
        return per_image(value, x)
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        shapes = f"[B] or a tensor that can be broadcast over the images {list(x.shape)}"
        raise ValueError(f"{name} must be a number, {shapes}, got {list(value.shape)}")
    return value


def clamped(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Clamp images to a range of numbers or of tensors, without a copy from the host to the device for numbers."""
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)):
        return x.clamp(low, high)
    return torch.minimum(torch.maximum(x, torch.as_tensor(low).to(x)), torch.as_tensor(high).to(x))


def _of_pixels(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _pixelwise_step(images: tuple[Tensor, Tensor, Tensor], norm: Norm, **numbers: float | Tensor) -> Tensor:
    """A step in "linf" with a radius, a length or a range of its own for each channel or pixel."""
    if norm != "linf":
        raise ValueError(f"norm must be linf with a radius, a step or a range for each channel or pixel, got {norm}")
    x, grad, x_nat = images
    alpha, eps, lo, hi = (broadcastable(name, value, x) for name, value in numbers.items())
    wide = torch.promote_types(x.dtype, torch.float32)
    signs = torch.where(grad.isfinite(), grad.sign(), 0)
    center, moved = x_nat.to(wide), x.to(wide) + alpha * signs.to(wide)
    return clamped(clamped(moved, center - eps, center + eps), lo, hi).to(x.dtype)


def check(images: dict[str, Tensor], norm: str, lo: Any, hi: Any, norms: Sequence[str] = NORMS) -> Norm:
    """Check the images of a step (by name), its norm and its box, and return the norm in this package's spelling."""
    check_alike(**images)
    if not (isinstance(lo, Tensor) or isinstance(hi, Tensor) or lo <= hi):
        raise ValueError(f"lo must be at most hi, got lo = {lo} and hi = {hi}")
    return read_norm(norm, norms)


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    density: float = DENSITY,
) -> Tensor:
    """Move ``x`` along ``grad``, and project it back into the ball around ``x_nat`` and the box [lo, hi].

    Args:
        x: current images of the attack, ``[B, ...]``; float16, bfloat16, float32 or float64; image units.
        grad: gradient of the attacker's loss at x, with x's shape, dtype and device.
        x_nat: attacked images, the centers of the balls, in the same form.
        alpha: length of the step, measured in ``norm`` and image units, a number or ``[B]``. For ``linf`` also any
            tensor that can be broadcast over x, such as ``[C, 1, 1]`` for normalized images, for PyTorch's operators.
        eps: radius of the ball, as alpha.
        norm: ``linf``, ``l2`` or ``l1``.
        lo: lower end of the box of the images, a number, or for ``linf`` a tensor that can be broadcast over x.
        hi: upper end of the box, at least lo, as lo.
        density: fraction of the coordinates that an ``l1`` step moves, in (0, 1]. These coordinates have the largest
            |grad|. Their number is rounded, and at least 1. SLIDE's percentile is 1 - density.

    Returns:
        The new x, with the same shape and dtype, contiguous. There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or setting is wrong.

    The op is deterministic, and ``linf`` is bit-exact across backends.
    """
    norm = check({"x": x, "grad": grad, "x_nat": x_nat}, norm, lo, hi)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    with torch.no_grad():
        if _of_pixels(alpha) or _of_pixels(eps) or isinstance(lo, Tensor) or isinstance(hi, Tensor):
            return _pixelwise_step((x, grad, x_nat), norm, alpha=alpha, eps=eps, lo=lo, hi=hi)
        alpha, eps = per_sample("alpha", alpha, x), per_sample("eps", eps, x)
        space = float(lo), float(hi), float(density)
        return OP(x, grad, x_nat, alpha, eps, NORMS.index(norm), *space, variant=norm)
