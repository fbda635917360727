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


def reference(
    x: Tensor, grad: Tensor, x_nat: Tensor, alpha: Tensor, eps: Tensor, norm: int, lo: float, hi: float
) -> Tensor:
    """The definition: float32 arithmetic (float64 for float64), x's dtype out. alpha, eps: [B]."""
    w, g, n = wide(x), wide(grad), wide(x_nat)
    ones = [1] * (x.dim() - 1)
    a, e = alpha.to(w.dtype).view(-1, *ones), eps.to(w.dtype).view(-1, *ones)
    if NORMS[norm] == "linf":
        w = w + a * torch.sign(torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0))
        w = torch.minimum(torch.maximum(w, n - e), n + e)
    else:
        dims = list(range(1, x.dim()))
        peak = g.abs().amax(dims, keepdim=True)
        usable = torch.isfinite(peak) & (peak > 0)  # amax propagates NaN
        g = torch.where(usable, g / torch.where(usable, peak, 1), 0.0)
        length = g.square().sum(dims, keepdim=True).sqrt()
        w = w + a * torch.where(usable, g / torch.where(usable, length, 1), 0.0)
        d = w - n
        radius = d.square().sum(dims, keepdim=True).sqrt()
        w = n + d * torch.where(radius > e, e / radius, 1.0)
    return w.clamp(lo, hi).to(x.dtype).contiguous()


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
    if not (x.shape == grad.shape == x_nat.shape) or x.dim() < 2:
        raise ValueError(
            f"x, grad and x_nat need one shape [B, ...], got {list(x.shape)}, {list(grad.shape)}, {list(x_nat.shape)}"
        )
    if not (x.dtype == grad.dtype == x_nat.dtype) or not x.is_floating_point():
        raise ValueError(f"x, grad and x_nat need one floating-point dtype, got {x.dtype}, {grad.dtype}, {x_nat.dtype}")
    if not (x.device == grad.device == x_nat.device):
        raise ValueError(f"x, grad and x_nat are on {x.device}, {grad.device}, {x_nat.device}: they must agree")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if lo > hi:
        raise ValueError(f"lo = {lo} is above hi = {hi}")
    call = reference if OP.plain(x.device) else OP.handle
    with torch.no_grad():
        alpha, eps = per_sample("alpha", alpha, x), per_sample("eps", eps, x)
        return call(x, grad, x_nat, alpha, eps, NORMS.index(norm), float(lo), float(hi))
