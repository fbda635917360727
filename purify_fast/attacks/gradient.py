"""Gradient attacks: FGSM (Goodfellow et al., ICLR 2015) and PGD (Madry et al., ICLR 2018), with EOT draws in the batch.

Models map images [B, C, H, W] in [lo, hi] to logits [B, classes]. They are attacked through a frozen view: evaluation
mode, gradients to the input only; the model comes back as it was. Randomised models are attacked through the mean of
the loss over ``eot`` draws (expectation over transformation, Athalye et al., ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.pgd_step import NORMS, per_sample, pgd_step
from ..ops.philox import Stream, philox
from ._frozen import frozen
from .health import GradientHealth
from .losses import LOSSES

Model = Callable[[Tensor], Tensor]


def _check(x: Tensor, y: Tensor, norm: str, loss: str, steps: int, eot: int, chunk: int | None) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, ...], got {x.dtype} {list(x.shape)}")
    if y.shape != (x.shape[0],) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 [B] = [{x.shape[0]}], got {y.dtype} {list(y.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    for name, value in (("steps", steps), ("eot", eot), ("chunk", chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def input_gradient(
    model: Model, x: Tensor, y: Tensor, *, loss: str = "ce", eot: int = 1, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient to the input of the loss summed over ``eot`` draws, exact whatever ``chunk``.

    Args:
        model: images to logits; call within `frozen`.
        x, y: ``[B, ...]`` and int64 ``[B]``.
        loss: ``ce``, ``margin`` or ``dlr``.
        eot: draws, folded into the batch.
        chunk: images in one forward pass at most (at least one draw of the batch).

    Returns:
        The gradient, shape of x, and the mean loss over the draws, ``[B]``.
    """
    together = eot if chunk is None else min(eot, max(1, chunk // max(1, x.shape[0])))
    gradient, value = torch.zeros_like(x), torch.zeros(x.shape[0], device=x.device)
    for first in range(0, eot, together):
        draws = min(together, eot - first)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            logits = model(leaf.repeat(draws, *[1] * (x.dim() - 1)))
            each = LOSSES[loss](logits, y.repeat(draws))
            gradient += torch.autograd.grad(each.sum(), leaf)[0]
        value += each.detach().view(draws, -1).sum(0)
    return gradient, value / eot


def random_start(
    x: Tensor, eps: Tensor, norm: str, seed: int, sample_ids: Tensor | None, lo: float, hi: float
) -> Tensor:
    """A point drawn uniformly from the ball around each image, clamped to the box; a function of (seed, sample id)."""
    ids = torch.arange(x.shape[0], device=x.device) if sample_ids is None else sample_ids
    key = torch.tensor([seed], dtype=torch.int64, device=x.device)
    size = x[0].numel()
    radius = eps.view(-1, *[1] * (x.dim() - 1))
    if norm == "linf":
        noise = 2 * philox(key, ids, size, stream=Stream.ATTACK_START)[:, 0] - 1
    else:
        noise = philox(key, ids, size, stream=Stream.ATTACK_START, distribution="normal")[:, 0]
        shrink = philox(key, ids, 1, stream=Stream.ATTACK_START, first_draw=1)[:, 0] ** (1 / size)
        noise = noise / noise.norm(dim=1, keepdim=True) * shrink
    return (x + noise.view_as(x).to(x.dtype) * radius.to(x.dtype)).clamp(lo, hi)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 40,
    alpha: float | Tensor | None = None,
    norm: str = "linf",
    loss: str = "ce",
    eot: int = 1,
    start: bool = True,
    keep_best: bool = False,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    chunk: int | None = None,
    health: GradientHealth | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Projected gradient ascent on the attack loss.

    Args:
        model: images ``[B, ...]`` to logits ``[B, C]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: ``[B, ...]`` in [lo, hi]; y: true labels, int64 ``[B]``.
        eps, alpha: radius and step in image units, numbers or ``[B]``; alpha defaults to ``eps / 10``, or
            ``2.5 eps / steps`` if that is more: PGD-100 with smaller steps was five to seven points weaker on digits.
        norm: ``linf`` or ``l2``. loss: ``ce``, ``margin`` or ``dlr``.
        eot: draws of a randomised model averaged per step, folded into the batch.
        start: whether to begin at a random point of the ball (Philox stream ATTACK_START, from ``seed`` and
            ``sample_ids``, int64 ``[B]``, default 0 .. B-1).
        keep_best: return, per image, the iterate of highest mean loss seen and not the last (one more forward pass, or
            two with EOT).
        chunk: images in one forward pass at most; exact, bounds the memory.
        health: counts gradients and movement.

    Returns:
        Adversarial images: shape and dtype of x, within eps of x and within [lo, hi].

    Raises:
        ValueError: a wrong shape, dtype, name or count, or a negative eps or alpha.
    """
    _check(x, y, norm, loss, steps, eot, chunk)
    for name, value in (("eps", eps), ("alpha", alpha)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach()
    radius = per_sample("eps", eps, x)
    step = max(2.5 / steps, 0.1) * radius if alpha is None else per_sample("alpha", alpha, x)
    with frozen(model):
        adversarial = begin = random_start(x, radius, norm, seed, sample_ids, lo, hi) if start else x
        best, best_value = adversarial, torch.full((x.shape[0],), -torch.inf, device=x.device)
        for _ in range(steps):
            gradient, value = input_gradient(model, adversarial, y, loss=loss, eot=eot, chunk=chunk)
            if health is not None:
                # the margin's sign tells who is fooled; dlr is flat, 1, once the true class is third
                health.see_gradient(gradient, None if loss == "ce" else value > 0)
            if keep_best:
                best, best_value = _better(best, best_value, adversarial, value)
            adversarial = pgd_step(adversarial, gradient.to(x.dtype), x, step, radius, norm, lo, hi)
        if health is not None:
            with torch.no_grad():
                health.see_move(begin, adversarial, model(x).argmax(1) == y)
        if keep_best:
            value = _mean_loss(model, adversarial, y, loss, eot, chunk)
            if eot > 1:  # judged afresh: the highest of many noisy values is high by luck
                best_value = _mean_loss(model, best, y, loss, eot, chunk)
            adversarial, _ = _better(best, best_value, adversarial, value)
    return adversarial


def _better(best: Tensor, best_value: Tensor, x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    higher = value > best_value
    return torch.where(higher.view(-1, *[1] * (x.dim() - 1)), x, best), torch.where(higher, value, best_value)


@torch.no_grad()
def _mean_loss(model: Model, x: Tensor, y: Tensor, loss: str, eot: int, chunk: int | None) -> Tensor:
    together = eot if chunk is None else min(eot, max(1, chunk // max(1, x.shape[0])))
    value = torch.zeros(x.shape[0], device=x.device)
    for first in range(0, eot, together):
        draws = min(together, eot - first)
        each = LOSSES[loss](model(x.repeat(draws, *[1] * (x.dim() - 1))), y.repeat(draws))
        value += each.view(draws, -1).sum(0)
    return value / eot


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: str = "linf",
    loss: str = "ce",
    eot: int = 1,
    chunk: int | None = None,
    health: GradientHealth | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """The fast gradient (sign) method: one step of length eps from the image itself. Arguments as in `pgd`."""
    return pgd(
        model,
        x,
        y,
        eps=eps,
        alpha=eps,
        steps=1,
        norm=norm,
        loss=loss,
        eot=eot,
        start=False,
        chunk=chunk,
        health=health,
        lo=lo,
        hi=hi,
    )
