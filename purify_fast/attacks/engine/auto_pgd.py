"""One run of Auto-PGD over a batch of rows, which leave it as soon as their images have fallen.

How long a step is, and from where it goes on, is decided per row and on the device, never in between.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._tensors import per_image
from ...ops.apgd_step import apgd_step
from ..ball import projected
from ..objective import Gradients, Objective
from ..search import GradientHealth, better_of, forgiven
from .rows import ActiveSet, HealthOfRows, Reach, Rows, RowState, some_of

#: After which of the first steps the batch may shrink; later every `SHRINK_EVERY` steps. Each of these waits for the
#: device once.
SHRINK_AFTER, SHRINK_EVERY = (1, 2, 3, 4, 6, 8), 5
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


def shrinks_after(step: int) -> bool:
    """Whether the batch may shrink after so many steps."""
    return step in SHRINK_AFTER or step % SHRINK_EVERY == 0


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


class StepSize(RowState):
    """Every row's step, which is halved at the checkpoints, and the point of highest loss, where it then goes on.

    Args:
        rows: where the rows begin, and the ball around their images.
        steps: gradient steps of the run.
        rho: the share of the steps between two checkpoints that must raise the loss for the step to stay.
    """

    def __init__(self, rows: Rows, steps: int, rho: float):
        begin = rows.begin
        nothing = torch.full((len(begin),), -torch.inf, device=begin.device)
        self.x, self.ball, self.rho = rows.x, rows.ball, rho
        self.marks = checkpoints(steps)
        self.step, self.halved = 2 * rows.ball.eps, torch.ones_like(nothing, dtype=torch.bool)
        self.top, self.top_gradient, self.top_loss = begin, torch.zeros_like(begin), nothing
        self.last_loss, self.checked_loss, self.rises = -nothing, nothing, torch.zeros_like(nothing)

    def see(self, point: Tensor, gradient: Tensor, loss: Tensor) -> None:
        """Take note of the rows' points and gradients, ``[R, ...]``, and losses, ``[R]``."""
        higher = loss > self.top_loss
        wide = per_image(higher, point)
        self.top = torch.where(wide, point, self.top)
        self.top_gradient = torch.where(wide, gradient, self.top_gradient)
        self.top_loss = torch.where(higher, loss, self.top_loss)
        self.rises = self.rises + (loss > self.last_loss)
        self.last_loss = loss

    def origin(self, i: int, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """From where step ``i`` is taken, and along which gradient: from ``point``, or from the top after a halving."""
        if i not in self.marks:
            return point, gradient
        few = self.rises <= self.rho * self.marks[i]
        stuck = ~self.halved & (self.top_loss <= self.checked_loss)
        self.halved = few | stuck
        self.step = torch.where(self.halved, self.step / 2, self.step)
        self.last_loss = torch.where(self.halved, self.top_loss, self.last_loss)
        self.checked_loss, self.rises = self.top_loss, torch.zeros_like(self.rises)
        return self._from_top(self.halved, point, gradient)

    def _from_top(self, rows: Tensor, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        wide = per_image(rows, point)
        return torch.where(wide, self.top, point), torch.where(wide, self.top_gradient, gradient)

    def move(self, i: int, point: Tensor, gradient: Tensor, previous: Tensor) -> Tensor:
        """Step ``i``; ``previous`` is what the points were before their last step, ``[R, ...]``."""
        momentum = MOMENTUM if i > 0 else 1.0
        return apgd_step(
            point, gradient, self.x, previous, self.step, eps=self.ball.eps, momentum=momentum, **self.ball.bounds
        )


class StepSizeL1(StepSize):
    """The l1 ball's: a step moves a share of the coordinates, fitted to how many the best point has changed.

    Args:
        rows: where the rows begin, and the ball around their images.
        steps: gradient steps of the run.
        share: of the coordinates that the first steps move, ``[R]``; None: a fifth.
    """

    def __init__(self, rows: Rows, steps: int, share: Tensor | None = None):
        super().__init__(rows, steps, 0.0)
        self.marks, self.step = checkpoints_l1(steps), rows.ball.eps.clone()
        # a share that is given is that of the point where the run begins
        self.changed = torch.ones_like(self.top_loss) if share is None else share * SPARSER
        self.share = torch.full_like(self.top_loss, FIRST_SHARE) if share is None else share

    def origin(self, i: int, point: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        if i not in self.marks:
            return point, gradient
        changed = changed_share(self.top, self.x)
        sparser = changed < FEWER * self.changed
        shortened = (self.step / SHRINK).maximum(self.ball.eps / SHORTEST)
        self.step = torch.where(sparser, self.ball.eps, shortened)
        self.share, self.changed = changed / SPARSER, changed
        return self._from_top(sparser, point, gradient)

    def move(self, i: int, point: Tensor, gradient: Tensor, previous: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        size = torch.where(flat.isfinite().all(1, keepdim=True), flat.abs(), 0.0)
        place = ((1 - self.share) * size.shape[1]).long().clamp(0, size.shape[1] - 1)
        least = size.sort(1).values.gather(1, place[:, None])
        sign = torch.where((size >= least) & (size > 0), flat.sign(), 0.0)
        unit = sign / sign.abs().sum(1, keepdim=True).clamp_min(1)
        moved = point + per_image(self.step.to(point.dtype), point) * unit.view_as(point)
        return projected(self.x, moved, self.ball)


def changed_share(point: Tensor, x: Tensor) -> Tensor:
    """The share of the coordinates in which points differ from their images, ``[R]``."""
    return (point != x).flatten(1).float().mean(1)


def border(loss: str) -> float:
    """The value that a loss has at least where an image is misclassified, of a targeted loss as the target."""
    # the true class has less than half of the probability there; all other losses are margins, up to a factor
    return math.log(2) if loss == "ce" else 0.0


class RowSearch(RowState):
    """One run of a search by gradients over a batch of rows, which leave it as their images fall.

    Args:
        objective: the loss, on what gradients are taken from.
        active: the images; what falls is noted there, and the best points of the others are offered to it.
        rows: what is searched.
        steps: of the run.
        health: counts gradients and movement, if given.
        give_up: whether rows leave that are out of reach.
    """

    def __init__(
        self,
        objective: Objective,
        active: ActiveSet,
        rows: Rows,
        steps: int,
        *,
        health: GradientHealth | None = None,
        give_up: bool = False,
    ):
        self.objective, self.active, self.rows, self.steps = objective, active, rows, steps
        self.point = rows.begin
        # the batch may shrink after any of the first steps
        self.gradients = Gradients(objective, self.point, rows.labels, steps, later=active.waves_to_come)
        self.reach = Reach.of_steps(steps) if give_up else None
        self.health = None if health is None else HealthOfRows(health, self.point)

    def take(self, index: Tensor) -> None:
        super().take(index)
        if len(index):
            self.gradients.now_of(self.point, self.rows.labels)


class AutoPgd(RowSearch):
    """One run of Auto-PGD, told `RowSearch`'s options besides its own.

    Args:
        rho: as of `StepSize`.
        claims: whether a misclassified point is a success; it is none in a ball that is too large.
        share: of the l1 ball: the share of the coordinates that the first steps move, ``[R]``.

    Attributes:
        size: the step sizes of the rows that are left, with their points of highest loss.
    """

    by_column = ("score",)

    def __init__(self, *given: Any, rho: float = 0.0, claims: bool = True, share: Tensor | None = None, **options: Any):
        super().__init__(*given, **options)
        rows = self.rows
        self.may_shrink, self.claims = claims and self.active.leave, claims
        self.previous = self.best = self.gradient = self.point
        self.score = torch.full((2, len(self.point)), -torch.inf, device=self.point.device)
        in_l1 = rows.ball.norm == "l1"
        self.size = StepSizeL1(rows, self.steps, share) if in_l1 else StepSize(rows, self.steps, rho)

    def run(self) -> None:
        """Take all steps, or as many as there are rows for."""
        for i in range(self.steps):
            self._look()
            if self.may_shrink and shrinks_after(i + 1):
                self._shrink(i + 1)
                if len(self.point) == 0:
                    return
            origin, gradient = self.size.origin(i, self.point, self.gradient)
            self.previous, self.point = origin, self.size.move(i, origin, gradient, self.previous)
        self._see_move(slice(None))
        if self.claims:
            self._finish(slice(None))

    def _look(self) -> None:
        """Take the gradient, and note the point."""
        now = self.gradients.at(self.point)
        self.gradient = now.image.to(self.point.dtype)
        if self.health is not None:
            self.health.see_gradient(self.gradient, forgiven(self.objective, now))
        self.best, self.score = better_of(self.best, self.score, self.point, now.score)
        self.size.see(self.point, self.gradient, now.loss)

    def _shrink(self, step: int) -> None:
        """Let the rows leave whose images have fallen, and those that are given up."""
        share, fell = self.active.settle(self.rows.owner, self.best, self.score[0], self.rows.run)
        self.score = torch.stack([share, self.score[1]])
        lost = self._out_of_reach(step)
        if lost is None and not fell:
            return
        staying = self.active.staying(self.rows.owner, lost)
        given_up = 0
        if lost is not None:
            index = lost.nonzero()[:, 0]
            given_up = len(index)
            self._finish(index)
            self._see_move(index)
            if self.health is not None:
                self.health.give_up(index, self.steps)
        if staying is not None:
            if self.health is not None:
                self.health.health.see_fallen(max(0, len(self.point) - len(staying) - given_up))
            self.take(staying)

    def _out_of_reach(self, step: int) -> Tensor | None:
        """Those rows that are given up, bool ``[R]``; None if there are none.

        A row without a gradient, or one that never moved, is searched to the end: it shows that gradients are masked.
        """
        missing = border(self.objective.loss) - self.size.top_loss
        lost = None if self.reach is None else self.reach.lost(step, missing)
        if lost is None:
            return None
        alive = self.gradient.flatten(1).any(1) & (self.point != self.rows.begin).flatten(1).any(1)
        return some_of(lost & alive & ~self.active.fallen[self.rows.owner])

    def _see_move(self, index: Tensor | slice) -> None:
        if self.health is not None:
            correct = self.active.correct[self.rows.owner[index]]
            self.health.health.see_move(self.rows.begin[index], self.point[index], correct)

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
        search = AutoPgd(objective, active, part, count, health=health, claims=factor == 1, share=share)
        search.run()
        begin = search.size.top
