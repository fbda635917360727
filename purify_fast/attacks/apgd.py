"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum, whose step is halved where it stops paying; no step to choose.

At checkpoints an image's step is halved, and its search goes on from the best point seen, if at most a share rho of the
steps since the last checkpoint raised the loss, or if the step was kept then and the best loss is still the same. The
checkpoints, 22 % of the steps and then ever closer, are rounded as in the authors' implementation. Two things are not
in the paper: the start is uniform in the ball, and a random model's loss is the mean over the draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import GradientPrecision, Share
from ..ops.apgd_step import apgd_step
from ..protocols import Classifier
from .ball import projected
from .base import AttackContext, Radius, TargetedAttack, run_alone
from .engine.rows import ActiveSet, Goals, Rows, RowSearch, nearest_borders, shrinks_after
from .losses import FEWEST_CLASSES, TARGETED, ApgdLoss
from .objective import Objective
from .search import GradientHealth, better_of, forgiven

#: The paper's a, the weight of a new step; that of the last move is 1 - a.
MOMENTUM = 0.75
#: Of the l1 ball, with ever smaller radii: by how much the radii are larger, and the share of the steps at each.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)
#: Of the l1 ball (Croce & Hein, "Mind the box", ICML 2021): the share of the coordinates that the first steps move, by
#: how much smaller the next share is than that of the best point's changed ones, and by how much a step shrinks and how
#: far at most.
FIRST_SHARE, SPARSER, SHRINK, SHORTEST = 0.2, 1.5, 1.5, 10.0
#: The changed coordinates of the best point count as fewer when there are less than this share of them.
FEWER = 0.95


@dataclass(frozen=True, kw_only=True)
class APGD(TargetedAttack):
    """Auto-PGD, from a start of its own in every run; images leave the attack as soon as they have fallen.

    Args:
        loss: a name of `purify_fast.attacks.losses.LOSSES`, or of `TARGETED`, which raise one class each; "margin"
            replaces "dlr" below 3 classes and "dlr_targeted" below 4. Only a targeted loss looks at
            ``n_target_classes``.
        steps: gradient steps of a run; None: the report's.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
        leave_when_fallen: whether an image is attacked no more once the model itself, asked again, misclassifies its
            point; that point is then returned. If not, every image is attacked to the end, and as long as some draw is
            right.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "apgd"
    follows_gradients: ClassVar[bool] = True

    loss: ApgdLoss = "ce"
    rho: Share = 0.75
    leave_when_fallen: bool = True

    def name(self, context: AttackContext) -> str:
        steps, _, loss = self.decided(context)
        if loss not in TARGETED:
            return self.full_name(f"APGD-{steps} {loss}", targeted=False)
        return self.full_name(f"APGD-T {steps}" + ("" if loss == "dlr_targeted" else " margin"))

    def targets(self, context: AttackContext) -> int | None:
        return super().targets(context) if self.decided(context).loss in TARGETED else None

    def cost(self, context: AttackContext) -> int:
        steps, draws, loss = self.decided(context)
        runs = self.restarts * (self.targets(context) or 1)
        at_the_end = draws * (2 if draws > 1 else 1)
        # the clean image is judged, and a prediction tells the order of the targets or the number of classes
        before = context.judges(draws) + (self.cost_of_order(context) if loss in TARGETED else loss in FEWEST_CLASSES)
        return runs * (steps * draws + at_the_end) + before

    def revision(self) -> str:
        return "8"

    def leaves(self) -> bool:
        return self.leave_when_fallen

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        steps = self.decided(context).steps
        goals = self._goals(active, objective)
        by_pace = self.give_up and self.leave_when_fallen
        for rows in self.waves(active, goals, context):
            if active.ball.norm == "l1":
                run_from_larger(objective, active, rows, steps, health=context.health)
            else:
                AutoPgd(objective, active, rows, steps, rho=self.rho, health=context.health, give_up=by_pace).run()

    def _goals(self, active: ActiveSet, objective: Objective) -> Goals:
        """The target class of each run, int64 ``[B]``, or None; ValueError for too few classes for the loss."""
        loss = objective.loss
        if loss in FEWEST_CLASSES:
            classes = active.logits().shape[1]
            if classes < FEWEST_CLASSES[loss]:
                least = FEWEST_CLASSES[loss]
                raise ValueError(f"the {loss} loss needs at least {least} classes, got {classes}: use 'margin'")
        return nearest_borders(active, objective, self.n_target_classes) if loss in TARGETED else (None,)


def apgd(
    model: Classifier, x: Tensor, y: Tensor, *, eps: Radius, precision: GradientPrecision = "float32", **options: Any
) -> Tensor:
    """Auto-PGD from random starts; with ``dlr_targeted``, towards one class after the other.

    Args:
        model: images ``[B, ...]`` to logits ``[B, classes]``; an ``nn.Module`` is frozen for the attack, then restored.
        x: images, floating point ``[B, ...]`` in [clip_min, clip_max].
        y: true labels, int64 ``[B]``.
        eps: radius in image units, a number or ``[B]``.
        precision: what gradients are computed in; "bfloat16" and "auto" take them from a copy, while every success is
            judged by the model itself (see `purify_fast.attacks.engine.gradient_copy`).
        **options: of `APGD`, such as ``loss``, ``n_target_classes`` and ``restarts``, and of `AttackContext`, such
            as ``norm``, ``steps`` (100), ``seed``, ``max_forward_batch`` and ``graphs``.

    Returns:
        Per image the best point seen: misclassified (in most draws), then of highest loss. Shape and dtype of x, within
        eps of x and within [clip_min, clip_max], up to the rounding of x's dtype.

    Raises:
        TypeError: x or y is no tensor, or there is no such option.
        RuntimeError: it is called within ``torch.inference_mode()``.
        ValueError: a wrong shape, dtype, name, count or range, or too few classes for the loss; or a model
            that writes to its input.
    """
    return run_alone(APGD, model, x, y, eps=eps, precision=precision, **options)


def checkpoints(steps: int) -> dict[int, int]:
    """After how many steps an image is judged, and over how many: 22 %, then 3 % fewer each time, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


def checkpoints_l1(steps: int) -> dict[int, int]:
    """The same for the l1 ball: every 4 % of the steps."""
    length = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(length, steps, length), length)


def changed_share(point: Tensor, x: Tensor) -> Tensor:
    """The share of the coordinates in which points differ from their images, ``[R]``."""
    return (point != x).flatten(1).float().mean(1)


def border(loss: str) -> float:
    """The value that a loss has at least where an image is misclassified, of a targeted loss as the target."""
    # the true class has less than half of the probability there; all other losses are margins, up to a factor
    return math.log(2) if loss == "ce" else 0.0


class AutoPgd(RowSearch):
    """One run of Auto-PGD, told `RowSearch`'s options besides its own.

    Every row's step is halved at the checkpoints, and the search then goes on from the point of highest loss, the top.

    Args:
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
        claims: whether a misclassified point is a success; it is none in a ball that is too large.
    """

    def __init__(self, *given: Any, rho: float = 0.0, claims: bool = True, **options: Any):
        super().__init__(*given, **options)
        begin, self.rho, self.claims = self.point, rho, claims
        nothing = torch.full((len(begin),), -torch.inf, device=begin.device)
        self.previous = self.best = self.gradient = self.top = begin
        self.score = torch.stack([nothing, nothing])
        self.marks = checkpoints(self.steps)
        self.step, self.halved = 2 * self.rows.ball.eps, torch.ones_like(nothing, dtype=torch.bool)
        self.top_gradient, self.top_loss = torch.zeros_like(begin), nothing
        self.last_loss, self.checked_loss, self.rises = -nothing, nothing, torch.zeros_like(nothing)

    def run(self) -> None:
        """Take all steps, or as many as there are rows for."""
        for i in range(self.steps):
            self._look()
            if self.claims and self.active.leave and shrinks_after(i + 1):
                self._shrink(i + 1)
                if len(self.point) == 0:
                    return
            origin, gradient = self.point, self.gradient
            if i in self.marks:
                wide = per_image(self._check(i), self.point)
                origin = torch.where(wide, self.top, self.point)
                gradient = torch.where(wide, self.top_gradient, self.gradient)
            self.point, self.previous = self._move(i, origin, gradient), origin
        self._see_move(slice(None))
        if self.claims:
            self.active.tried.index_fill_(0, self.rows.owner, True)
            self._finish(slice(None))

    def _look(self) -> None:
        """Take the gradient, and note the point."""
        now = self.gradients.at(self.point)
        self.gradient, loss = now.image.to(self.point.dtype), now.loss
        self.see_gradient(self.gradient, forgiven(self.objective, now))
        self.best, self.score = better_of(self.best, self.score, self.point, now.score)
        higher = loss > self.top_loss
        wide = per_image(higher, self.point)
        self.top = torch.where(wide, self.point, self.top)
        self.top_gradient = torch.where(wide, self.gradient, self.top_gradient)
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.rises = self.rises + (loss > self.last_loss)
        self.last_loss = loss

    def _check(self, i: int) -> Tensor:
        """Fit the steps at a checkpoint; which rows go on from the top, bool ``[R]``."""
        few = self.rises <= self.rho * self.marks[i]
        stuck = ~self.halved & (self.top_loss <= self.checked_loss)
        self.halved = few | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.last_loss = torch.where(self.halved, self.top_loss, self.last_loss)
        self.checked_loss, self.rises = self.top_loss, torch.zeros_like(self.rises)
        return self.halved

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        """Step ``i`` from some points along gradients, ``[R, ...]``."""
        ball, momentum = self.rows.ball, MOMENTUM if i > 0 else 1.0
        step = {"eps": ball.eps, "momentum": momentum, **ball.bounds}
        return apgd_step(point, gradient, self.rows.x, self.previous, self.step, **step)

    def _shrink(self, step: int) -> None:
        """Let the rows leave whose images have fallen, and those that are given up."""
        share, fell = self.active.settle(self.rows.owner, self.best, self.score[0], self.rows.run)
        self.score = torch.stack([share, self.score[1]])
        lost = self.out_of_reach(step, border(self.objective.loss) - self.top_loss)
        if lost is None and not fell:
            return
        staying, given_up = self.active.staying(self.rows.owner, lost), 0
        if lost is not None:
            index = lost.nonzero()[:, 0]
            given_up = len(index)
            self._finish(index)
            self._see_move(index)
            self.see_given_up(index)
        if staying is not None:
            if self.health is not None:
                # what has fallen needed no movement
                self.health.add(images=max(0, len(self.point) - len(staying) - given_up))
            self.take(staying)

    def may_end(self) -> Tensor:
        # a row without a gradient, or one that never moved, is searched to the end: it shows that gradients are masked
        return self.gradient.flatten(1).any(1) & (self.point != self.rows.begin).flatten(1).any(1)

    def _see_move(self, index: Tensor | slice) -> None:
        if self.health is not None:
            correct = self.active.correct[self.rows.owner[index]]
            self.health.see_move(self.rows.begin[index], self.point[index], correct)

    def _finish(self, index: Tensor | slice) -> None:
        """Judge the best points of some rows, the last ones included, and keep those that are no success."""
        owner, labels, run = self.rows.owner[index], self.rows.labels[index], self.rows.run[index]
        best, last, score = self.best[index], self.point[index], self.score[:, index]
        if self.objective.eot_iter > 1:
            # the highest of many noisy scores is high by luck
            score = self.objective.score(best, labels)
        best, score = better_of(best, score, last, self.objective.score(last, labels))
        if self.active.leave:
            # where a copy sees no success the model itself may see one: every point is judged
            by_copy = self.objective.model is not self.active.judge.model
            claimed = torch.ones_like(score[0]) if by_copy else score[0]
            share, _ = self.active.settle(owner, best, claimed, run)
            score = torch.stack([share, score[1]])
        self.active.offer(owner, best, score)


class AutoPgdL1(AutoPgd):
    """The l1 ball's: a step moves a share of the coordinates, fitted to how many the best point has changed.

    Args:
        share: of the coordinates that the first steps move, ``[R]``; None: a fifth.
    """

    def __init__(self, *given: Any, share: Tensor | None = None, **options: Any):
        super().__init__(*given, **options)
        self.marks, self.step = checkpoints_l1(self.steps), self.rows.ball.eps.clone()
        # a share that is given is that of the point where the run begins
        self.changed = torch.ones_like(self.top_loss) if share is None else share * SPARSER
        self.share = torch.full_like(self.top_loss, FIRST_SHARE) if share is None else share

    def _check(self, i: int) -> Tensor:
        eps, changed = self.rows.ball.eps, changed_share(self.top, self.rows.x)
        sparser = changed < FEWER * self.changed
        self.step = torch.where(sparser, eps, (self.step / SHRINK).maximum(eps / SHORTEST))
        self.share, self.changed = changed / SPARSER, changed
        return sparser

    def _move(self, i: int, point: Tensor, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        size = torch.where(flat.isfinite().all(1, keepdim=True), flat.abs(), 0.0)
        place = ((1 - self.share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
        least = size.sort(1).values.gather(1, place[:, None])
        sign = torch.where((size >= least) & (size > 0), flat.sign(), 0.0)
        unit = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        moved = point + per_image(self.step.to(point.dtype), point) * unit.view_as(point)
        return projected(self.rows.x, moved, self.rows.ball)


def run_from_larger(
    objective: Objective, active: ActiveSet, rows: Rows, steps: int, *, health: GradientHealth | None = None
) -> None:
    """One run of the l1 ball: in a ball three times as large, then twice, then in the ball itself.

    The rows begin anywhere; the steps are those of all three parts.
    """
    parts = [math.ceil(part * steps) for part in LARGER_STEPS[:-1]]
    # of very few steps the last radius gets one at least
    parts.append(max(1, steps - sum(parts)))
    begin = rows.begin
    for factor, count in zip(LARGER, parts, strict=True):
        ball = replace(rows.ball, eps=factor * rows.ball.eps)
        begin = projected(rows.x, begin, ball)
        share = changed_share(begin, rows.x) / SPARSER
        part = replace(rows, ball=ball, begin=begin)
        search = AutoPgdL1(objective, active, part, count, health=health, claims=factor == 1, share=share)
        search.run()
        begin = search.top
