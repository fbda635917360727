"""Auto-PGD (Croce & Hein, ICML 2020): PGD with momentum that halves its steps by itself.

At a checkpoint the step of an image is halved, and its search continues at the best point seen, in two cases: at most a
share rho of the steps since the last checkpoint raised the loss, or the step was not halved at the last checkpoint and
the best loss is the same as then. The first checkpoint comes after 22 % of the steps, and the next ones follow at ever
shorter distances, rounded as in the authors' implementation. Two things are not in the paper: the start is uniform in
the ball, and a random model's loss is the mean over the draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._tensors import per_image
from .._validation import Count, Share
from ..ops.apgd_step import apgd_step
from .ball import projected
from .base import USUAL_TARGETS, Decided, EngineAttack, as_function, targets_and_times, times
from .context import AttackContext
from .engine.row_batches import ActiveSet, Goals, Rows, RowSearch, cost_of_borders, nearest_borders, waves
from .losses import FEWEST_CLASSES, TARGETED, ApgdLoss, check_classes
from .objective import Objective
from .search import better_of, forgiven

#: The paper's a. A move is a times the new step plus 1 - a times the last move.
MOMENTUM = 0.75
#: A run in the l1 ball begins in larger balls. LARGER: the factors of their radii; the last ball is the given one.
#: LARGER_STEPS: the share of the steps in each ball.
LARGER, LARGER_STEPS = (3.0, 2.0, 1.0), (0.3, 0.3, 0.4)
#: Constants for the l1 ball (Croce & Hein, "Mind the box", ICML 2021). FIRST_SHARE: the share of the coordinates that
#: the first steps move. SPARSER: a later step moves the share of coordinates in which the best point differs from the
#: image, divided by this. SHRINK: the factor by which a step is shortened. SHORTEST: no step is shorter than eps
#: divided by this.
FIRST_SHARE, SPARSER, SHRINK, SHORTEST = 0.2, 1.5, 1.5, 10.0
#: If the number of changed coordinates falls below this share of the number before, the steps get their full length
#: again.
FEWER = 0.95


@dataclass(frozen=True, kw_only=True)
class APGD(EngineAttack):
    """Auto-PGD; every run begins at another random point, and images leave the attack as soon as they have fallen.

    Args:
        steps: gradient steps of a run; None: as many as the evaluation takes, and 100 without an evaluation.
        n_target_classes: the number of wrong classes with a run each. They are those with the nearest borders by the
            model's linear approximation at the image. None, or more than there are: all.
        loss: a name of `purify_fast.attacks.losses.LOSSES`, or of `TARGETED`, whose losses raise one class each.
            "margin" replaces "dlr" below 3 classes and "dlr_targeted" below 4. Only a targeted loss uses
            ``n_target_classes``.
        rho: a step keeps its length if at least this share of the steps between two checkpoints raised the loss.
        leave_when_fallen: whether an image leaves once a second look of the model itself misclassifies its point; that
            point is then returned. If not, every image is attacked to the end, as long as some draw is right.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    kind: ClassVar[str] = "apgd"
    code_version: ClassVar[str] = "8"
    follows_gradients: ClassVar[bool] = True

    steps: Count | None = None
    n_target_classes: Count | None = USUAL_TARGETS
    loss: ApgdLoss = "ce"
    rho: Share = 0.75
    leave_when_fallen: bool = True

    def name(self, context: AttackContext) -> str:
        steps, _, loss, targets = self.decided(context)
        if targets is None:
            return f"APGD-{steps} {loss}" + times(self.restarts)
        margin = "" if loss == "dlr_targeted" else " margin"
        return f"APGD-T {steps}{margin}" + targets_and_times(self.n_target_classes, self.restarts)

    def decided(self, context: AttackContext) -> Decided:
        decided = super().decided(context)
        return decided if decided.loss in TARGETED else decided._replace(n_target_classes=None)

    def cost(self, context: AttackContext) -> int:
        steps, draws, loss, targets = self.decided(context)
        runs = self.restarts * (targets or 1)
        at_the_end = draws * (2 if draws > 1 else 1)
        # Before the runs the clean image is judged. One more prediction gives the order of the targets or the number of
        # classes.
        before = context.judges(draws) + (loss in FEWEST_CLASSES)
        if targets is not None:
            before = context.judges(draws) + cost_of_borders(self.n_target_classes, context.num_classes, draws)
        return runs * (steps * draws + at_the_end) + before

    def may_end_early(self, context: AttackContext) -> bool:
        return super().may_end_early(context) and self.threat_model(context).norm != "l1"

    def explore(self, active: ActiveSet, objective: Objective, context: AttackContext) -> None:
        steps = self.decided(context).steps
        goals = self._goals(active, objective)
        by_pace = self.give_up and self.leave_when_fallen
        for rows in waves(active, goals, self.restarts, context):
            if active.ball.norm == "l1":
                run_from_larger(objective, active, rows, steps)
            else:
                AutoPgd(objective, active, rows, steps, rho=self.rho, give_up=by_pace).run()

    def _goals(self, active: ActiveSet, objective: Objective) -> Goals:
        """The target class of each run, int64 ``[B]``, or None; ValueError for too few classes for the loss."""
        loss = objective.loss
        if loss in FEWEST_CLASSES:
            check_classes(loss, active.logits.shape[1])
        return nearest_borders(active, objective, self.n_target_classes) if loss in TARGETED else (None,)


apgd = as_function(
    "apgd",
    APGD,
    "Per image the best point seen: misclassified in most draws, then of highest loss.",
    precision="float32",
)


def checkpoints(steps: int) -> dict[int, int]:
    """The checkpoints, and the steps since the one before: 22 % of all steps, then each time 3 % less, at least 6 %."""
    length, less, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks, at = {}, length
    while at < steps:
        marks[at] = length
        length = max(length - less, least)
        at += length
    return marks


def checkpoints_l1(steps: int) -> dict[int, int]:
    """The checkpoints for the l1 ball, as `checkpoints` gives them: one after every 4 % of the steps."""
    length = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(length, steps, length), length)


def changed_share(point: Tensor, x: Tensor) -> Tensor:
    """The share of the coordinates in which points differ from their images, ``[R]``."""
    return (point != x).flatten(1).float().mean(1)


def border(loss: str) -> float:
    """The least value of a loss at a misclassified image; for a targeted loss at one that is taken for the target."""
    # At a misclassified image the true class has at most half of the probability, so the cross-entropy is at least log
    # 2. All other losses are margins, up to a positive factor.
    return math.log(2) if loss == "ce" else 0.0


class AutoPgd(RowSearch):
    """A run of Auto-PGD. It takes the options of `RowSearch` too.

    A checkpoint may halve the step of a row. The search of that row then continues at its point of highest loss, the
    top.

    Args:
        rho: a step keeps its length if at least this share of the steps between two checkpoints raised the loss.
        claims: whether a misclassified point is a success; it is not in a ball that is too large.
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
        """Take all steps, or stop when no row is left."""
        for i in range(self.steps):
            self._look()
            if self.claims and self.active.leave and self.shrinks_after(i + 1):
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
        """Take the gradient, and remember the point if it is better than those before."""
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
        """Adapt the steps at a checkpoint, and return which rows continue at the top, bool ``[R]``."""
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
        share, fell = self.active.confirm_successes(self.rows.owner, self.best, self.score[0], self.rows.run)
        self.score = torch.stack([share, self.score[1]])
        lost = self.out_of_reach(step, border(self.objective.loss) - self.top_loss)
        if lost is None and not fell:
            return
        kept, given_up = self.active.rows_to_keep(self.rows.owner, lost), 0
        if lost is not None:
            index = lost.nonzero()[:, 0]
            given_up = len(index)
            self._finish(index)
            self._see_move(index)
            self.see_given_up(index)
        if kept is not None:
            if self.health is not None:
                # Rows that leave because their image has fallen count as images, but never as unmoved ones: they may
                # have begun at a misclassified point.
                self.health.add(images=max(0, len(self.point) - len(kept) - given_up))
            self.take(kept)

    def may_end(self) -> Tensor:
        # A row without a gradient, or a row that never moved, is searched to the end, because it is a sign of masked
        # gradients.
        return self.gradient.flatten(1).any(1) & (self.point != self.rows.begin).flatten(1).any(1)

    def _see_move(self, index: Tensor | slice) -> None:
        if self.health is not None:
            correct = self.active.correct[self.rows.owner[index]]
            self.health.see_move(self.rows.begin[index], self.point[index], correct)

    def _finish(self, index: Tensor | slice) -> None:
        """Judge the best and the last points of some rows, and keep the best of those that are no success."""
        owner, labels, run = self.rows.owner[index], self.rows.labels[index], self.rows.run[index]
        best, last, score = self.best[index], self.point[index], self.score[:, index]
        if self.objective.eot_iter > 1:
            # The highest of many noisy scores is partly luck, so the best point is scored again.
            score = self.objective.score(best, labels)
        best, score = better_of(best, score, last, self.objective.score(last, labels))
        if self.active.leave:
            # The model itself may misclassify a point that its copy classifies correctly. So every point is judged if
            # the search used a copy.
            by_copy = self.objective.model is not self.active.judge.model
            claimed = torch.ones_like(score[0]) if by_copy else score[0]
            share, _ = self.active.confirm_successes(owner, best, claimed, run)
            score = torch.stack([share, score[1]])
        self.active.keep_best(owner, best, score)


class AutoPgdL1(AutoPgd):
    """Auto-PGD in the l1 ball: a step moves a share of the coordinates, which follows how many the best point changed.

    Args:
        share: the share of the coordinates that the first steps move, ``[R]``; None: a fifth.
    """

    def __init__(self, *given: Any, share: Tensor | None = None, **options: Any):
        super().__init__(*given, **options)
        self.marks, self.step = checkpoints_l1(self.steps), self.rows.ball.eps.clone()
        # A given share belongs to the point where the run begins: that point changed SPARSER times as many coordinates.
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


def run_from_larger(objective: Objective, active: ActiveSet, rows: Rows, steps: int) -> None:
    """One run of the l1 ball: in a ball three times as large, then twice, then in the ball itself.

    The rows begin anywhere; the steps are those of all three parts.
    """
    parts = [math.ceil(part * steps) for part in LARGER_STEPS[:-1]]
    # The last ball, the given one, gets at least one step.
    parts.append(max(1, steps - sum(parts)))
    begin = rows.begin
    for factor, count in zip(LARGER, parts, strict=True):
        ball = replace(rows.ball, eps=factor * rows.ball.eps)
        begin = projected(rows.x, begin, ball)
        share = changed_share(begin, rows.x) / SPARSER
        part = replace(rows, ball=ball, begin=begin)
        search = AutoPgdL1(objective, active, part, count, claims=factor == 1, share=share)
        search.run()
        begin = search.top
