"""StAdv (Xiao et al., ICLR 2018): spatially transformed adversarial examples, pixels moved rather than changed.

    x'(p) = x(p + f(p)), bilinear;   f maximises  loss(x') - tau flow_loss(f),   |f| <= eps everywhere
    flow_loss(f) = sum over pixels p and their up to four neighbours q of |f(p) - f(q)|_2

The flow is in units in which the image spans [-1, 1]: 0.05 moves a pixel by 0.8 of 32. The bound, Adam in place of the
paper's L-BFGS, its rate and its 20 steps are those of Laidlaw et al., "Perceptual adversarial robustness", ICLR 2021;
tau = 0.05 is both papers', the first's with the flow in pixels. Ours: beyond its border the image goes on as it ends,
and Adam's small constant is smaller, so that a saturated loss still moves the flow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.pgd_step import per_sample
from .frozen_model import frozen
from .gradient import Model, _better, _check, _gradient, _not_negative, _score, random_start
from .health import GradientHealth

EPS, RATE, TAU = 0.05, 0.01, 0.05
BETAS, TINY = (0.9, 0.999), 1e-16  # of Adam
CORNER = 1e-5  # far below any step: neighbours that differ by a rounding error are not pulled together with full force


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Sample every pixel from where the flow points, bilinearly; exactly x at zero flow, and never out of x's range.

    Args:
        x: ``[B, C, H, W]``. flow: ``[B, 2, H, W]``, to the right and down, in units of half the image.

    Returns:
        Shape and dtype of x; differentiable to the flow, one-sided where it points at a pixel's middle.
    """
    height, width = x.shape[2:]

    def split(offset: Tensor, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The pixel before the place, and how far beyond it the place is, in [0, 1]."""
        place = start + offset * (size / 2)
        inside = (place >= 0) & (place <= size - 1)  # clamp() alone may pass no gradient at the border itself
        place = torch.where(inside, place, place.detach().clamp(0, size - 1))
        before = place.detach().floor().clamp(max=max(size - 2, 0))
        return before.long(), (place - before)[:, None]

    left, right = split(flow[:, 0], torch.arange(width, device=x.device), width)
    top, down = split(flow[:, 1], torch.arange(height, device=x.device)[:, None], height)
    flat = x.to(flow.dtype).flatten(2)

    def pixel(dy: int, dx: int) -> Tensor:
        index = (top + dy).clamp(max=height - 1) * width + (left + dx).clamp(max=width - 1)
        return flat.gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)

    above, below = (torch.lerp(pixel(dy, 0), pixel(dy, 1), right.expand_as(x)) for dy in (0, 1))
    return torch.lerp(above, below, down.expand_as(x)).to(x.dtype)


def flow_loss(flow: Tensor) -> Tensor:
    """How far neighbours part, ``[B, 2, H, W]`` -> ``[B]``; every pair counts for both of its pixels, as in the paper.

    |d| is taken as sqrt(|d|^2 + c^2) - c, c = 1e-5: a constant flow has the gradient 0.
    """
    across, down = (((flow.diff(dim=dim).square().sum(1) + CORNER**2).sqrt() - CORNER).sum((1, 2)) for dim in (3, 2))
    return 2 * (across + down)


def stadv(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor = EPS,
    steps: int = 20,
    rate: float = RATE,
    smoothness: float = TAU,
    loss: str = "margin",
    eot: int = 1,
    start: bool = False,
    keep_best: bool = False,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    chunk: int | None = None,
    health: GradientHealth | None = None,
) -> Tensor:
    """Adam on a flow field, from none at all, clamped to its bound after every step.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack.
        x: ``[B, C, H, W]``; y: true labels, int64 ``[B]``.
        eps: the largest flow along each axis, half the image being 1; a number or ``[B]``.
        rate: Adam's, in the same unit. smoothness: the paper's tau; 0 attacks hardest, and leaves ragged edges.
        loss: ``margin``, the paper's, ``ce`` or ``dlr``; ``ce`` fades where the model is sure, and tau outweighs it.
        start: whether to begin with a random flow within the bound, a function of ``seed`` and ``sample_ids`` as in
            `pgd`, instead of none.
        eot, keep_best, chunk, health: as in `pgd`; health counts the loss's gradients to the flow.

    Returns:
        Adversarial images: shape, dtype and range of x.

    Raises:
        ValueError: a wrong shape, dtype, name or count, or a negative eps, rate or smoothness.
    """
    _check(x, y, "linf", loss, steps, eot, chunk)
    if x.dim() != 4:
        raise ValueError(f"x must be images [B, C, H, W], got {list(x.shape)}")
    _not_negative(eps=eps, rate=rate, smoothness=smoothness)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach()
    radius = per_sample("eps", eps, x)
    bound = radius.view(-1, 1, 1, 1)
    flow = bound.new_zeros((len(x), 2, *x.shape[2:]))
    if start:
        flow = random_start(flow, radius, "linf", seed, sample_ids, -torch.inf, torch.inf)
    mean, square = torch.zeros_like(flow), torch.zeros_like(flow)
    with frozen(model):
        adversarial = begin = warp(x, flow)
        best, best_score = adversarial, torch.full((2, len(x)), -torch.inf, device=x.device)
        for i in range(steps):
            with torch.enable_grad():
                leaf = flow.detach().requires_grad_()
                moved, rough = warp(x, leaf), flow_loss(leaf).sum()
            to_image, value, wrong = _gradient(model, adversarial, y, loss, eot, chunk)
            (gradient,) = torch.autograd.grad(moved, leaf, (to_image / eot).to(moved.dtype))
            if health is not None:
                health.see_gradient(gradient, None if loss == "ce" else wrong == 1)  # as in pgd
            if keep_best:
                best, best_score = _better(best, best_score, adversarial, torch.stack([wrong, value]))
            (apart,) = torch.autograd.grad(rough, leaf)
            gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0) - smoothness * apart
            mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
            square = BETAS[1] * square + (1 - BETAS[1]) * gradient.square()
            step = mean / (1 - BETAS[0] ** (i + 1)) / ((square / (1 - BETAS[1] ** (i + 1))).sqrt() + TINY)
            flow = (flow + rate * step).clamp(-bound, bound)
            adversarial = warp(x, flow)
        if health is not None:
            with torch.no_grad():
                health.see_move(begin, adversarial, model(x).argmax(1) == y)
        if keep_best:
            score = _score(model, adversarial, y, loss, eot, chunk)
            if eot > 1:  # judged afresh, as in pgd
                best_score = _score(model, best, y, loss, eot, chunk)
            adversarial, _ = _better(best, best_score, adversarial, score)
    return adversarial
