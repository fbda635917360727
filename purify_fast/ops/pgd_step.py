"""One step of projected gradient descent (ascent on the attacker's loss), per-sample step and radius.

    linf:  x <- clamp(x + alpha sign(g), x_nat - eps, x_nat + eps)
    l2:    x <- x_nat + d min(1, eps / |d|),   d = x + alpha g / |g| - x_nat
    then   x <- clamp(x, lo, hi)

Madry et al., ICLR 2018. sign(0) = 0, and a non-finite gradient moves nothing: an element (linf) or a sample (l2); the
attacks count those, never hide them. NaN in x or x_nat propagates. |g| is taken after scaling by max |g|, so that the
tiny gradients of a saturated loss still point somewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import define_op, launcher, wide

NORMS = ("linf", "l2")


def direction(grad: Tensor, norm: int) -> Tensor:
    """The unit step along ``grad``, [B, ...]: its sign, or grad / |grad| per sample; 0 where it has no direction."""
    if NORMS[norm] == "linf":
        return torch.sign(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0))
    dims = list(range(1, grad.dim()))
    peak = grad.abs().amax(dims, keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)  # amax propagates NaN
    grad = torch.where(usable, grad / torch.where(usable, peak, 1), 0.0)
    length = grad.square().sum(dims, keepdim=True).sqrt()
    return torch.where(usable, grad / torch.where(usable, length, 1), 0.0)


def project(x: Tensor, x_nat: Tensor, eps: Tensor, norm: int, lo: float, hi: float) -> Tensor:
    """``x`` in the ball around ``x_nat``, then in the box; eps: [B, 1, ...]."""
    if NORMS[norm] == "linf":
        x = torch.minimum(torch.maximum(x, x_nat - eps), x_nat + eps)
    else:
        d = x - x_nat
        radius = d.square().sum(list(range(1, x.dim())), keepdim=True).sqrt()
        x = x_nat + d * torch.where(radius > eps, eps / radius, 1.0)
    return x.clamp(lo, hi)


def reference(
    x: Tensor, grad: Tensor, x_nat: Tensor, alpha: Tensor, eps: Tensor, norm: int, lo: float, hi: float
) -> Tensor:
    """The definition: float32 arithmetic (float64 for float64), x's dtype out. alpha, eps: [B]."""
    w, g, n = wide(x), wide(grad), wide(x_nat)
    ones = [1] * (x.dim() - 1)
    a, e = alpha.to(w.dtype).view(-1, *ones), eps.to(w.dtype).view(-1, *ones)
    return project(w + a * direction(g, norm), n, e, norm, lo, hi).to(x.dtype).contiguous()


OP = define_op(
    "pgd_step",
    "(Tensor x, Tensor grad, Tensor x_nat, Tensor alpha, Tensor eps, int norm, float lo, float hi) -> Tensor",
    reference=reference,
    fake=lambda x, grad, x_nat, alpha, eps, norm, lo, hi: x.new_empty(x.shape),
    triton=launcher("pgd_step", "forward"),
    cpu="cpp",
    why_cpu="fastest in every eager row: benchmarks/results/cpu/ops.md",
)


def per_sample(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """``value`` as a [B] tensor of x's device, float32 (float64 for float64); ValueError if its shape is another."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(value, Tensor):
        return torch.full((x.shape[0],), float(value), dtype=dtype, device=x.device)
    if value.shape not in ((), (x.shape[0],)):
        raise ValueError(f"{name} must be a number or a tensor [B] = [{x.shape[0]}], got {list(value.shape)}")
    return value.to(device=x.device, dtype=dtype).expand(x.shape[0]).contiguous()


def check(images: dict[str, Tensor], norm: str, lo: float, hi: float) -> None:
    """What every step asks of its images, by name, its norm and its box; ValueError otherwise."""
    shapes, dtypes, devices = ([getattr(x, what) for x in images.values()] for what in ("shape", "dtype", "device"))
    *names, last = images
    joined = f"{', '.join(names)} and {last}"
    if any(other != shapes[0] for other in shapes) or len(shapes[0]) < 2:
        raise ValueError(f"{joined} need one shape [B, ...], got {', '.join(str(list(s)) for s in shapes)}")
    if any(other != dtypes[0] for other in dtypes) or not dtypes[0].is_floating_point:
        raise ValueError(f"{joined} need one floating-point dtype, got {', '.join(map(str, dtypes))}")
    if any(other != devices[0] for other in devices):
        raise ValueError(f"{joined} are on {', '.join(map(str, devices))}: they must agree")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if lo > hi:
        raise ValueError(f"lo = {lo} is above hi = {hi}")


def pgd_step(
    x: Tensor,
    grad: Tensor,
    x_nat: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Move ``x`` along ``grad`` and project it back into the ball around ``x_nat`` and the box [lo, hi].

    Args:
        x, grad, x_nat: ``[B, ...]``, one shape, dtype and device; float16, bfloat16, float32 or float64; image units.
        alpha, eps: step and radius in image units, a number or ``[B]``.
        norm: ``linf`` or ``l2``.
        lo, hi: the box, lo <= hi.

    Returns:
        The new x: same shape and dtype, contiguous. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an unknown norm, or lo > hi.

    Deterministic; ``linf`` is bit-exact across backends.
    """
    check({"x": x, "grad": grad, "x_nat": x_nat}, norm, lo, hi)
    call = reference if OP.plain(x.device) else OP.handle
    with torch.no_grad():
        alpha, eps = per_sample("alpha", alpha, x), per_sample("eps", eps, x)
        return call(x, grad, x_nat, alpha, eps, NORMS.index(norm), float(lo), float(hi))
