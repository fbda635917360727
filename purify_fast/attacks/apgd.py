"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum, whose step is halved where it stops paying; no step to choose.

At checkpoints an image's step is halved, and its search goes on from the best point seen, if at most a share rho of the
steps since the last checkpoint raised the loss, or if the step was kept then and the best loss is still the same. The
checkpoints, 22 % of the steps and then ever closer, are rounded as in the authors' implementation. Ours: the start is
uniform in the ball, and a randomised model's loss is the mean over the draws.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.apgd_step import NORMS, apgd_step
from ..ops.pgd_step import per_sample
from .frozen_model import frozen
from .gradient import Model, _better, _check, _gradient, _score, random_start
from .health import GradientHealth
from .losses import LOSSES, TARGETED

MOMENTUM = 0.75  # the paper's a


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps an image is judged, and over how many: 22 %, then 3 % fewer each time, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 100,
    norm: str = "linf",
    loss: str = "ce",
    target: Tensor | None = None,
    targets: int = 9,
    eot: int = 1,
    restarts: int = 1,
    rho: float = 0.75,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    chunk: int | None = None,
    health: GradientHealth | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """Auto-PGD from random starts; with ``dlr_targeted``, towards one class after the other.

    Args:
        model: images ``[B, ...]`` to logits ``[B, C]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: ``[B, ...]`` in [lo, hi]; y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        norm: ``linf`` or ``l2``. loss: ``ce``, ``margin``, ``dlr`` or ``dlr_targeted``.
        target: int64 ``[B]``, the class that ``dlr_targeted`` raises. Without it, the ``targets`` wrong classes of
            highest logit on x, one run each: all of them where there are fewer.
        eot: draws of a randomised model averaged per step, folded into the batch.
        restarts: runs (for each target), each from a start of its own. Only images not yet misclassified in every
            draw get another run.
        rho: the share of the steps that must raise the loss for the step to stay.
        seed, sample_ids: of the starts, as in `pgd`. chunk: images in one forward pass at most; exact.
        health: counts gradients and, in every run, movement.

    Returns:
        Per image the best point seen: misclassified (in most draws), then of highest loss. Shape and dtype of x, within
        eps of x and within [lo, hi], up to the rounding of x's dtype.

    Raises:
        ValueError: a wrong shape, dtype, name, count or range, or too few classes for the loss.
    """
    _check(x, y, norm, loss, steps, eot, chunk, (*LOSSES, *TARGETED), NORMS)
    for name, count in (("targets", targets), ("restarts", restarts)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")
    if isinstance(eps, (int, float)) and not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if target is not None:
        if loss not in TARGETED:
            raise ValueError(f"a target needs the loss {', '.join(TARGETED)}, got {loss!r}")
        if target.shape != y.shape or target.dtype != torch.int64:
            raise ValueError(f"target must be int64 [B] = [{len(y)}], got {target.dtype} {list(target.shape)}")
        if bool((target == y).any()):
            raise ValueError("target must differ from y for every image")
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach()
    radius = per_sample("eps", eps, x)
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    best, score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
    with frozen(model):
        logits = _logits(model, x, chunk)
        if target is not None and bool(((target < 0) | (target >= logits.shape[1])).any()):
            raise ValueError(f"target must be in 0 .. {logits.shape[1] - 1}, got {target.min()} .. {target.max()}")
        correct = logits.argmax(1) == y
        for run, goal in enumerate(goal for goal in _goals(logits, y, loss, target, targets) for _ in range(restarts)):
            left = (score[0] < 1).nonzero()[:, 0]  # the one synchronisation, once per run
            if len(left) == 0:
                break
            begin = random_start(x[left], radius[left], norm, seed + run, ids[left], lo, hi)
            labels = y if goal is None else torch.stack([y, goal], 1)
            last, found, found_score = _run(
                model, begin, x[left], labels[left], radius[left], steps, norm, loss, eot, rho, chunk, health, lo, hi
            )
            if health is not None:
                health.see_move(begin, last, correct[left])
            found, found_score = _better(best[left], score[:, left], found, found_score)
            best[left], score[:, left] = found, found_score.to(score.dtype)
    return best


@torch.no_grad()
def _logits(model: Model, x: Tensor, chunk: int | None) -> Tensor:
    return torch.cat([model(part) for part in x.split(chunk or len(x))])


def _goals(logits: Tensor, y: Tensor, loss: str, target: Tensor | None, targets: int) -> tuple[Tensor | None, ...]:
    """The target classes, one [B] for each run."""
    if loss not in TARGETED:
        return (None,)
    if target is not None:
        return (target,)
    wrong = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return wrong.topk(min(targets, logits.shape[1] - 1), 1).indices.unbind(1)


def _run(
    model: Model,
    begin: Tensor,
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    steps: int,
    norm: str,
    loss: str,
    eot: int,
    rho: float,
    chunk: int | None,
    health: GradientHealth | None,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One run from ``begin``: the last iterate, the best, and its score [2, B]; decisions are taken on the device."""

    def pick(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition.view(-1, *[1] * (x.dim() - 1)), a, b)

    marks = checkpoints(steps)
    nothing = torch.full((len(x),), -torch.inf, device=x.device)
    point = previous = begin
    found = top = begin  # what is returned, and the point of highest loss, from where a halved step starts
    found_score, top_value, top_gradient = nothing.expand(2, -1), nothing, torch.zeros_like(x)
    last, kept_value, rises = -nothing, nothing, torch.zeros_like(nothing)
    step, halved = 2 * radius, torch.ones_like(nothing, dtype=torch.bool)
    for i in range(steps):
        gradient, value, wrong = _gradient(model, point, y, loss, eot, chunk)
        if health is not None:
            health.see_gradient(gradient, None if loss == "ce" else wrong == 1)  # as in pgd: flat where it has won
        found, found_score = _better(found, found_score, point, torch.stack([wrong, value]))
        higher = value > top_value
        top, top_gradient = pick(higher, point, top), pick(higher, gradient, top_gradient)
        top_value = torch.where(higher, value, top_value)
        rises = rises + (value > last)
        if i in marks:
            halved = (rises <= rho * marks[i]) | (~halved & (top_value <= kept_value))
            step = torch.where(halved, step / 2, step)
            point, gradient = pick(halved, top, point), pick(halved, top_gradient, gradient)
            value, kept_value, rises = torch.where(halved, top_value, value), top_value, torch.zeros_like(rises)
        last = value
        momentum = MOMENTUM if i > 0 else 1.0
        moved = apgd_step(point, gradient.to(x.dtype), x, previous, step, radius, momentum, norm, lo, hi)
        previous, point = point, moved
    if eot > 1:  # judged afresh: the highest of many noisy scores is high by luck
        found_score = _score(model, found, y, loss, eot, chunk)
    return point, *_better(found, found_score, point, _score(model, point, y, loss, eot, chunk))
