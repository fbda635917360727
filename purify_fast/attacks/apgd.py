"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum, whose step is halved where it stops paying; no step to choose.

At checkpoints an image's step is halved, and its search goes on from the best point seen, if at most a share rho of the
steps since the last checkpoint raised the loss, or if the step was kept then and the best loss is still the same. The
checkpoints, 22 % of the steps and then ever closer, are rounded as in the authors' implementation. Two things are not
in the paper: the start is uniform in the ball, and a random model's loss is the mean over the draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import renamed_arguments
from .._tensors import per_image
from .._validation import check_literal
from ..ops.apgd_step import apgd_step
from ..protocols import Classifier
from .arguments import ApgdNorm, NormName, check_at_least_one, check_images, read_norm
from .ball import Ball, ball_around, sample_in_ball
from .base import AttackContext, BallAttack
from .draws import Objective
from .frozen_model import frozen
from .health import GradientHealth
from .losses import TARGETED, ApgdLoss, usable_loss
from .search import Search, better_of

#: The paper's a, the weight of a new step; that of the last move is 1 - a.
MOMENTUM = 0.75


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps an image is judged, and over how many: 22 %, then 3 % fewer each time, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


@renamed_arguments(targets="n_target_classes", eot="eot_iter", chunk="max_forward_batch", lo="clip_min", hi="clip_max")
def apgd(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 100,
    norm: NormName = "linf",
    loss: ApgdLoss = "ce",
    target: Tensor | None = None,
    n_target_classes: int = 9,
    eot_iter: int = 1,
    restarts: int = 1,
    rho: float = 0.75,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_forward_batch: int | None = None,
    health: GradientHealth | None = None,
    clip_min: float = 0.0,
    clip_max: float = 1.0,
) -> Tensor:
    """Auto-PGD from random starts; with ``dlr_targeted``, towards one class after the other.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        steps: gradient steps of a run.
        norm: "linf" or "l2".
        loss: "ce", "margin", "dlr" or "dlr_targeted".
        target: int64 ``[B]``, the class that "dlr_targeted" raises. None: the ``n_target_classes`` wrong classes of
            highest logit on x, one run each.
        n_target_classes: wrong classes that "dlr_targeted" tries; all of them where there are fewer.
        eot_iter: draws of a random model averaged per step, folded into the batch.
        restarts: runs (for each target), each from a start of its own. Only images not yet misclassified in every
            draw get another run.
        rho: the share of the steps that must raise the loss for the step to stay.
        seed: of the random starts.
        sample_ids: int64 ``[B]``; an image's random start depends on the seed and its id alone. None: 0 .. B - 1.
        max_forward_batch: images in one forward pass at most; exact. None: no limit.
        health: counts gradients and, in every run, movement, if given.
        clip_min: the smallest value of a pixel.
        clip_max: the largest value of a pixel.

    Returns:
        Per image the best point seen: misclassified (in most draws), then of highest loss. Shape and dtype of x, within
        eps of x and within [clip_min, clip_max], up to the rounding of x's dtype.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: a wrong shape, dtype, name, count or range, or too few classes for the loss.
    """
    check_images(x, y)
    ball = ball_around(x, eps, read_norm(norm, ApgdNorm), clip_min, clip_max)
    check_literal("loss", loss, ApgdLoss)
    check_at_least_one(
        steps=steps,
        eot_iter=eot_iter,
        max_forward_batch=max_forward_batch,
        n_target_classes=n_target_classes,
        restarts=restarts,
    )
    _check_rho(rho)
    if target is not None:
        _check_target(target, y, loss)
    if x.shape[0] == 0:
        return x.clone()
    x = x.detach()
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    objective = Objective(model, loss, eot_iter, max_forward_batch)
    schedule = Schedule(steps, rho)
    best, score = x.clone(), torch.full((2, len(x)), -torch.inf, device=x.device)
    with frozen(model):
        logits = _logits(model, x, max_forward_batch)
        correct = logits.argmax(1) == y
        runs = [goal for goal in _goals(logits, y, loss, target, n_target_classes) for _ in range(restarts)]
        for run, goal in enumerate(runs):
            # the one time that the device is waited for, once per run
            left = (score[0] < 1).nonzero()[:, 0]
            if len(left) == 0:
                break
            begin = sample_in_ball(x[left], ball.of(left), seed=seed + run, sample_ids=ids[left])
            labels = y if goal is None else torch.stack([y, goal], 1)
            search = Search(objective, begin, labels[left], health=health)
            last, found, found_score = _run(search, x[left], ball.of(left), schedule)
            if health is not None:
                health.see_move(begin, last, correct[left])
            found, found_score = better_of(best[left], score[:, left], found, found_score)
            best[left], score[:, left] = found, found_score.to(score.dtype)
    return best


def _check_rho(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be in [0, 1], got {rho}")


def _check_target(target: Tensor, y: Tensor, loss: str) -> None:
    if loss not in TARGETED:
        raise ValueError(f"a target needs the loss {', '.join(TARGETED)}, got {loss!r}")
    if target.shape != y.shape or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [B] = [{len(y)}], got {target.dtype} {list(target.shape)}")
    if bool((target == y).any()):
        raise ValueError("target must differ from y for every image")


@torch.no_grad()
def _logits(model: Classifier, x: Tensor, max_forward_batch: int | None) -> Tensor:
    return torch.cat([model(part) for part in x.split(max_forward_batch or len(x))])


def _goals(
    logits: Tensor, y: Tensor, loss: str, target: Tensor | None, n_target_classes: int
) -> tuple[Tensor | None, ...]:
    """The target classes, one ``[B]`` for each run; None for a loss without a target."""
    if loss not in TARGETED:
        return (None,)
    if target is not None:
        if bool(((target < 0) | (target >= logits.shape[1])).any()):
            raise ValueError(f"target must be in 0 .. {logits.shape[1] - 1}, got {target.min()} .. {target.max()}")
        return (target,)
    wrong = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return wrong.topk(min(n_target_classes, logits.shape[1] - 1), 1).indices.unbind(1)


@dataclass(frozen=True)
class Schedule:
    """When a run's steps are halved.

    Args:
        steps: gradient steps of a run.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
    """

    steps: int
    rho: float = 0.75


class _StepSize:
    """Every image's step, which is halved at the checkpoints, and the point of highest loss, where it then goes on.

    This is not the best point of `Search`, which asks first whether an image is misclassified.
    """

    def __init__(self, begin: Tensor, ball: Ball, schedule: Schedule):
        nothing = torch.full((len(begin),), -torch.inf, device=begin.device)
        self.marks, self.rho = checkpoints(schedule.steps), schedule.rho
        self.step, self.halved = 2 * ball.eps, torch.ones_like(nothing, dtype=torch.bool)
        self.top, self.top_gradient, self.top_loss = begin, torch.zeros_like(begin), nothing
        self.last_loss, self.kept_loss, self.rises = -nothing, nothing, torch.zeros_like(nothing)

    def judge(self, i: int, point: Tensor, gradient: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """From where step ``i`` is taken, and along which gradient: from ``point``, or from the top after a halving."""
        higher = loss > self.top_loss
        self.top = torch.where(per_image(higher, point), point, self.top)
        self.top_gradient = torch.where(per_image(higher, point), gradient, self.top_gradient)
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.rises = self.rises + (loss > self.last_loss)
        if i in self.marks:
            few = self.rises <= self.rho * self.marks[i]
            stuck = ~self.halved & (self.top_loss <= self.kept_loss)
            self.halved = few | stuck
            self.step = torch.where(self.halved, self.step / 2, self.step)
            point = torch.where(per_image(self.halved, point), self.top, point)
            gradient = torch.where(per_image(self.halved, point), self.top_gradient, gradient)
            loss = torch.where(self.halved, self.top_loss, loss)
            self.kept_loss, self.rises = self.top_loss, torch.zeros_like(self.rises)
        self.last_loss = loss
        return point, gradient


def _run(search: Search, x: Tensor, ball: Ball, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """One run: its last point, the best one, and the best one's score; every decision is taken on the device."""
    point = previous = search.begin
    size = _StepSize(point, ball, schedule)
    for i in range(schedule.steps):
        found = search.objective.gradient(point, search.y)
        search.see(point, found)
        point, gradient = size.judge(i, point, found.image, found.loss)
        momentum = MOMENTUM if i > 0 else 1.0
        moved = apgd_step(
            point, gradient.to(x.dtype), x, previous, size.step, eps=ball.eps, momentum=momentum, **ball.bounds
        )
        previous, point = point, moved
    search.judge_afresh()
    return point, *better_of(search.best, search.best_score, point, search.objective.score(point, search.y))


@dataclass(frozen=True, kw_only=True)
class APGD(BallAttack):
    """Auto-PGD, as a row of an evaluation.

    Args:
        loss: "ce", "margin", "dlr" or "dlr_targeted"; "margin" replaces the third below 3 classes, the last below 4.
        steps: gradient steps of a run; None: the report's.
        n_target_classes: wrong classes that "dlr_targeted" tries, a run for each; all of them where there are fewer.
        restarts: runs (for each target), of which each image keeps its worst.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
        eot_iter: draws of a random model averaged per step; None: the report's.
        eps: radius of another ball than the report's, in image units; None: the report's.
        norm: norm of another ball than the report's: "linf" or "l2"; None: the report's. It needs an eps.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "apgd"
    norms: ClassVar[Any] = ApgdNorm

    loss: ApgdLoss = "ce"
    steps: int | None = None
    n_target_classes: int = 9
    restarts: int = 1
    rho: float = 0.75
    eot_iter: int | None = None
    eps: float | None = None
    norm: ApgdNorm | None = None

    def __post_init__(self) -> None:
        check_literal("loss", self.loss, ApgdLoss)
        check_at_least_one(
            steps=self.steps, restarts=self.restarts, n_target_classes=self.n_target_classes, eot_iter=self.eot_iter
        )
        _check_rho(self.rho)
        self.check_ball()

    def name(self, context: AttackContext) -> str:
        loss, steps = usable_loss(self.loss, context.num_classes), self.steps or context.steps
        name = f"APGD-{steps} {loss}"
        if loss in TARGETED:
            name = f"APGD-T {steps}" + (f", {self.n_target_classes} targets" if self.n_target_classes != 9 else "")
        return name + (f" x{self.restarts}" if self.restarts > 1 else "")

    def target_classes(self, context: AttackContext) -> int | None:
        """How many wrong classes are tried; None for a loss without a target."""
        if usable_loss(self.loss, context.num_classes) not in TARGETED:
            return None
        return min(self.n_target_classes, context.num_classes - 1)

    def cost(self, context: AttackContext) -> int:
        draws = self.draws(context)
        runs = self.restarts * (self.target_classes(context) or 1)
        at_the_end = draws * (2 if draws > 1 else 1)
        # runs after the first are only for those still robust; the clean image is classified once
        return runs * ((self.steps or context.steps) * draws + at_the_end) + 1

    def settings(self, context: AttackContext) -> dict[str, Any]:
        loss, steps = usable_loss(self.loss, context.num_classes), self.steps or context.steps
        own = {"loss": loss, "steps": steps, "n_target_classes": self.target_classes(context)}
        return super().settings(context) | own

    def revision(self) -> str:
        return "1"

    def search(self, target: Classifier, x: Tensor, y: Tensor, context: AttackContext) -> Tensor:
        norm, eps = self.ball(context)
        return apgd(
            target,
            x,
            y,
            eps=eps,
            norm=norm,
            steps=self.steps or context.steps,
            loss=usable_loss(self.loss, context.num_classes),
            n_target_classes=self.n_target_classes,
            restarts=self.restarts,
            rho=self.rho,
            eot_iter=self.draws(context),
            max_forward_batch=context.max_forward_batch,
            seed=context.seed,
            sample_ids=context.sample_ids,
            health=context.health,
        )
